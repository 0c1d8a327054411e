# SPDX-License-Identifier: Apache-2.0
"""The M²RNN layer (arXiv 2603.14360), order of operations and parameter names as in the released models."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import m2rnn, m2rnn_decode_step, m2rnn_step
from ..ops.registry import check_name
from ..ops.validation import accumulation_dtype, check_clip, check_slot_values
from .conv import CausalConv
from .mixer import SequenceMixer, check_layout, check_rows, zero_pads
from .norm import RMSNorm

# A projection whose width is not a multiple of 64 misses the fast GEMM tiles: 2900 columns cost 3x 2944 on an H200.
PROJECTION_MULTIPLE = 64
STATE_WEIGHT_INITS = ("identity", "orthogonal", "normal")


class M2RNNCache(NamedTuple):
    """What decoding carries from one call to the next.

    Attributes:
        conv_state: the last three conv inputs, oldest first, ``[B, conv_size - 1, C]`` in the activations' dtype
            (``[B, 0, C]`` without a conv).
        state: H, ``[B, N, K, V]`` in fp32 (fp64 for fp64 models).
    """

    conv_state: Tensor
    state: Tensor


class DecayGate(nn.Module):
    """The forget factor ``f = exp(-exp(A_log) · softplus(x_f + dt_bias))``, one per head.

    Computed and returned in fp32 (fp64 for fp64 inputs) whatever autocast says: f rounded to bf16 freezes the state for
    f > 0.998. A_log and dt_bias are created in fp32 also in a low-precision model.

    Args:
        num_heads: forget heads.
        A_init: A is drawn uniformly from this range, open at the lower end.
        dt_init: dt is drawn log-uniformly from this range; `dt_floor` bounds it from below.

    Raises:
        ValueError: `dt_init` is no range of positive numbers.
    """

    no_weight_decay = ("A_log", "dt_bias")

    def __init__(
        self,
        num_heads: int,
        *,
        A_init: tuple[float, float] = (0.0, 16.0),
        dt_init: tuple[float, float] = (1e-3, 0.1),
        dt_floor: float = 1e-4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(dt_init) != 2 or not 0 < dt_init[0] <= dt_init[1] < math.inf:
            raise ValueError(
                "`dt_init` must be (low, high) with 0 < low <= high < inf, as (0.001, 0.1) of the released models, "
                f"got {dt_init!r}"
            )
        self.A_init, self.dt_init, self.dt_floor = A_init, dt_init, dt_floor
        wide = accumulation_dtype(dtype or torch.get_default_dtype())
        self.A_log = nn.Parameter(torch.empty(num_heads, device=device, dtype=wide))
        self.dt_bias = nn.Parameter(torch.empty(num_heads, device=device, dtype=wide))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            # log U(0, 16); the floor only keeps the (never seen) draw of exactly zero finite.
            nn.init.uniform_(self.A_log, *self.A_init).clamp_min_(torch.finfo(self.A_log.dtype).tiny).log_()
            lo, hi = (math.log(x) for x in self.dt_init)
            dt = nn.init.uniform_(self.dt_bias, lo, hi).exp().clamp_min(self.dt_floor)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, x_f: Tensor) -> Tensor:
        """x_f ``[..., Nf]`` gives f of the same shape in fp32 (fp64 for fp64 inputs)."""
        return torch.exp(self.log(x_f))

    def log(self, x_f: Tensor) -> Tensor:
        """log f, which the linear recurrences take."""
        acc = accumulation_dtype(x_f.dtype)
        return -torch.exp(self.A_log.to(acc)) * F.softplus(x_f.to(acc) + self.dt_bias.to(acc))


class M2RNN(SequenceMixer):
    """The M²RNN layer: projection, causal conv and SiLU on q/k/v, the recurrence, gate, norm, projection.

    In order (arXiv 2603.14360, as in the released models): one bias-free input projection with rows q | k | v | f | g;
    depthwise causal conv and SiLU over q | k | v; f from `DecayGate`; the recurrence; ``y + D ⊙ v``; ``· SiLU(g)``;
    RMSNorm over all N·V features together; bias-free output projection.

    The input projection runs as one matrix product whose width is padded with zero rows to a multiple of 64 *inside*
    forward. The parameter (and so the state dict and the gradient) has the true width; the price is one copy of the
    weight a call, which the compiler plans as a buffer. Decode steps skip it: with one row they are bound by reading
    the weight.

    A single step from a cache is one `m2rnn_decode_step` between the projections (two launches instead of some twenty)
    where it can be: without grad mode, without an attention mask, and with impl="triton", or "auto" on CUDA. It runs on
    a copy of the cache, which callers keep; with `state_indices` it runs in place on a pool of states instead, on every
    device. Every other single step goes through `m2rnn_step`, which is differentiable.

    Args:
        hidden_size: width D of the residual stream.
        num_heads: N, heads of the result. The paper's models use 84 (410M).
        key_dim: K, rows of the state.  value_dim: V, columns of the state.
        num_q_heads, num_k_heads: default 1 (the paper's "multi-value" form).
        num_v_heads, num_f_heads, num_g_heads, num_w_heads: default N. Each of them divides N: head n of the result
            reads head ``n // (N / N_x)``; at least one of q, k, v, f, w has N heads.
        conv_size: taps of the causal conv. None leaves out the conv *and* the SiLU after it: q, k and v are the
            projection's rows as they are (lm-engine's ``kernel_size: null``). For state tracking: each step then adds
            the current token's ``k vᵀ``, of either sign, to the state and nothing else, see docs/reproduction.md.
            Decoding takes one `m2rnn_step` among torch operations then, on every device.
        state_weight_init: how each head's W starts: "identity" (the released models), "orthogonal" (Haar-distributed),
            or "normal" with variance 1/V.
        dt_init: range of the forget gate's dt, see `DecayGate`. From (0.5, 2.0) f starts near 0, from the released
            models' (0.001, 0.1) often near 1.
        state_grad_clip: see `m2rnn`; None for no clipping. The released models were trained with 1.
        norm_eps: of the RMSNorm before the output projection.
        init_std: standard deviation of the input projection and the conv at the start. 0.02 is of the released models;
            a narrow model that tracks states takes 1 / sqrt(hidden_size), so that q, k and v start at the size of x.
        init_num_layers: layers L of the model: the output projection starts with init_std / sqrt(2 L).
        impl: implementation of the recurrence, see `m2rnn`.

    Raises:
        TypeError, ValueError: sizes, head counts or options that do not fit.
    """

    no_weight_decay = ("D",)

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        key_dim: int = 64,
        value_dim: int = 16,
        num_q_heads: int = 1,
        num_k_heads: int = 1,
        num_v_heads: int | None = None,
        num_f_heads: int | None = None,
        num_g_heads: int | None = None,
        num_w_heads: int | None = None,
        conv_size: int | None = 4,
        state_weight_init: str = "identity",
        dt_init: tuple[float, float] = (1e-3, 0.1),
        state_grad_clip: float | None = 1.0,
        norm_eps: float = 1e-5,
        init_std: float = 0.02,
        init_num_layers: int = 1,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = dict(hidden_size=hidden_size, num_heads=num_heads, key_dim=key_dim, value_dim=value_dim)
        sizes |= dict(conv_size=1 if conv_size is None else conv_size, init_num_layers=init_num_layers)
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"M2RNN: `{name}` must be at least 1, got {size}")
        check_clip(state_grad_clip)
        check_name(impl)
        if state_weight_init not in STATE_WEIGHT_INITS:
            raise ValueError(
                f"M2RNN: `state_weight_init` must be one of {', '.join(STATE_WEIGHT_INITS)}, got {state_weight_init!r}"
            )
        heads = dict(
            num_q_heads=num_q_heads,
            num_k_heads=num_k_heads,
            num_v_heads=num_heads if num_v_heads is None else num_v_heads,
            num_f_heads=num_heads if num_f_heads is None else num_f_heads,
            num_g_heads=num_heads if num_g_heads is None else num_g_heads,
            num_w_heads=num_heads if num_w_heads is None else num_w_heads,
        )
        for name, n in heads.items():
            if n < 1 or num_heads % n != 0:
                raise ValueError(
                    f"M2RNN: `{name}` must divide `num_heads` = {num_heads}, got {n}; heads are shared by "
                    "divisibility, "
                    f"so choose one of {[d for d in range(1, num_heads + 1) if num_heads % d == 0]}"
                )
        widest = max(n for name, n in heads.items() if name != "num_g_heads")
        if widest != num_heads:
            raise ValueError(
                f"M2RNN: at least one of q, k, v, f, w must have `num_heads` = {num_heads} heads, got at most "
                f"{widest}; "
                f"set num_heads={widest}, or give num_v_heads={num_heads}"
            )

        self.hidden_size, self.num_heads, self.key_dim, self.value_dim = hidden_size, num_heads, key_dim, value_dim
        self.num_q_heads, self.num_k_heads, self.num_v_heads = num_q_heads, num_k_heads, heads["num_v_heads"]
        self.num_f_heads, self.num_g_heads = heads["num_f_heads"], heads["num_g_heads"]
        self.state_grad_clip, self.impl = state_grad_clip, impl
        self.init_std, self.init_num_layers, self.state_weight_init = init_std, init_num_layers, state_weight_init

        self.qkv_sizes = [num_q_heads * key_dim, num_k_heads * key_dim, self.num_v_heads * value_dim]
        self.projection_sizes = [sum(self.qkv_sizes), self.num_f_heads, self.num_g_heads * value_dim]
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.input_projection = nn.Linear(hidden_size, sum(self.projection_sizes), bias=False, **factory)
        self.conv1d: CausalConv | None = None
        if conv_size is not None:
            self.conv1d = CausalConv(self.projection_sizes[0], conv_size, init_std=init_std, **factory)
        self.decay_gate = DecayGate(self.num_f_heads, dt_init=dt_init, **factory)
        self.state_weight = nn.Parameter(torch.empty(heads["num_w_heads"], value_dim, value_dim, **factory))
        self.D = nn.Parameter(torch.empty(num_heads, value_dim, **factory))
        self.g_norm = RMSNorm(num_heads * value_dim, eps=norm_eps, **factory)
        self.output_projection = nn.Linear(num_heads * value_dim, hidden_size, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.input_projection.weight, std=self.init_std)
        nn.init.normal_(self.output_projection.weight, std=self.init_std / math.sqrt(2 * self.init_num_layers))
        nn.init.ones_(self.D)
        with torch.no_grad():
            for W in self.state_weight:
                if self.state_weight_init == "identity":
                    nn.init.eye_(W)
                elif self.state_weight_init == "normal":
                    nn.init.normal_(W, std=self.value_dim**-0.5)
                else:  # a factorisation, which low precision has none of
                    wide = accumulation_dtype(W.dtype)
                    W.copy_(nn.init.orthogonal_(torch.empty_like(W, dtype=wide)))
        if self.conv1d is not None:
            self.conv1d.reset_parameters()
        self.decay_gate.reset_parameters()
        self.g_norm.reset_parameters()

    def init_cache(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> M2RNNCache:
        """Zero conv inputs and a zero H for `batch_size` sequences (packed: for S sequences)."""
        weight = self.input_projection.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        wide = accumulation_dtype(dtype)
        return M2RNNCache(
            torch.zeros(batch_size, *self._conv_rows, device=device, dtype=dtype),
            torch.zeros(batch_size, self.num_heads, self.key_dim, self.value_dim, device=device, dtype=wide),
        )

    @property
    def _conv_rows(self) -> tuple[int, int]:
        """What a cache keeps of each sequence for the conv: inputs, channels."""
        return 0 if self.conv1d is None else self.conv1d.width - 1, self.projection_sizes[0]

    def forward(
        self,
        x: Tensor,
        *,
        cache: M2RNNCache | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state_indices: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, M2RNNCache]:
        """Mix a batch of sequences.

        Args:
            x: ``[B, T, hidden_size]``.
            cache: from `init_cache` or an earlier call; continue from it and return the new one. Never modified. With
                `cu_seqlens` it holds one row a sequence. With `state_indices` it is a pool and *is* modified.
            cu_seqlens: int32 or int64 ``[S + 1]`` from 0 to T: sequences packed along time (B = 1); neither the conv
                nor the recurrence looks across a boundary.
            attention_mask: ``[B, T]``, False marks *left* padding. Pads never move the state: conv inputs are zero
                there and f is exactly 1. Outputs at pads are finite and mean nothing.
            state_indices: int32 or int64 ``[B]``, for continuous batching: `cache` is a pool made with
                ``init_cache(slots)``, row b of x (T = 1) continues slot ``state_indices[b]``, and -1 skips a row (its y
                is zero). The pool is modified in place and returned. Inference only; see `m2rnn_decode_step` for what
                is checked where, and `write_rows` to move a prefilled or an empty cache into a pool.

        Returns:
            y ``[B, T, hidden_size]``, or ``(y, new_cache)`` if a cache was given.

        Raises:
            TypeError, ValueError: arguments that do not fit.
        """
        check_layout("M2RNN", x, self.hidden_size, cu_seqlens, attention_mask)
        x = zero_pads(x, attention_mask)
        if state_indices is not None:
            if cache is None or cu_seqlens is not None or attention_mask is not None or x.shape[1] != 1:
                raise ValueError(
                    "M2RNN: `state_indices` goes with a `cache` (the pool), x of shape [B, 1, hidden_size], and "
                    f"neither `cu_seqlens` nor `attention_mask`; got x of shape {tuple(x.shape)}. Prefill with a cache "
                    "of its own and move it into the pool with write_rows"
                )
            return self._decode(x, cache, state_indices), cache
        single_step = cache is not None and cu_seqlens is None and x.shape[1] == 1
        if cache is not None:
            sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            check_rows("M2RNN", "cache.conv_state", cache.conv_state, (sequences, *self._conv_rows))
            check_rows("M2RNN", "cache.state", cache.state, (sequences, self.num_heads, self.key_dim, self.value_dim))
            if single_step and attention_mask is None and self._fuses_decoding(x):
                copy = M2RNNCache(cache.conv_state.clone(), cache.state.clone())
                return self._decode(x, copy, None), copy
        qkv, x_f, g = self._project(x, pad=not single_step)
        conv_state = None if cache is None else cache.conv_state
        if self.conv1d is not None:
            qkv, conv_state = self.conv1d(
                qkv,
                state=conv_state,
                cu_seqlens=cu_seqlens,
                attention_mask=attention_mask,
                output_final_state=cache is not None,
            )
            qkv = F.silu(qkv)
        q, k, v = self._heads(qkv)
        f = self.decay_gate(x_f)
        if attention_mask is not None:
            f = torch.where(attention_mask.to(torch.bool)[:, :, None], f, 1)  # f = 1 keeps H exactly: 1·H + 0·Z

        if single_step:
            assert cache is not None  # for the type checker
            step = m2rnn_step(
                q[:, 0], k[:, 0], v[:, 0], f[:, 0], self.state_weight, initial_state=cache.state, impl=self.impl
            )
            y, state = step.y[:, None], step.state
        else:
            y, final_state = m2rnn(
                q,
                k,
                v,
                f,
                self.state_weight,
                initial_state=None if cache is None else cache.state,
                cu_seqlens=cu_seqlens,
                state_grad_clip=self.state_grad_clip,
                output_final_state=cache is not None,
                impl=self.impl,
            )
            if final_state is not None:
                state = final_state
        out = self._gate_and_norm(y, v, g)
        if cache is None:
            return out
        assert conv_state is not None  # for the type checker
        return out, M2RNNCache(conv_state, state)

    def _fuses_decoding(self, x: Tensor) -> bool:
        """By conv_size, grad mode, impl and device: what the kernel cannot do then raises, it does not run slowly."""
        wanted = self.impl == "triton" or (self.impl == "auto" and x.device.type == "cuda")
        return wanted and self.conv1d is not None and not torch.is_grad_enabled()

    def _decode(self, x_B1D: Tensor, pool: M2RNNCache, state_indices: Tensor | None) -> Tensor:
        """One step, in place on `pool`."""
        qkv, x_f, g = self._project(x_B1D[:, 0], pad=False)
        if self.conv1d is None:
            return self._decode_without_conv(qkv, x_f, g, pool, state_indices)[:, None]
        gate, norm = self.decay_gate, self.g_norm
        o = m2rnn_decode_step(
            qkv, x_f, g, self.conv1d.weight, gate.A_log, gate.dt_bias, self.state_weight, self.D, norm.weight, *pool,
            state_indices=state_indices, num_q_heads=self.num_q_heads, num_k_heads=self.num_k_heads,
            norm_eps=norm.eps, impl=self.impl,
        )  # fmt: skip
        return self.output_projection(o)[:, None]

    def _decode_without_conv(
        self, qkv: Tensor, x_f: Tensor, g: Tensor, pool: M2RNNCache, state_indices: Tensor | None
    ) -> Tensor:
        """The same in torch operations around `m2rnn_step`. Reads the indices, so on a GPU it waits for them."""
        if torch.is_grad_enabled() and any(x.requires_grad for x in (qkv, x_f, g, self.state_weight, pool.state)):
            raise ValueError(
                "M2RNN: `state_indices` writes the pool in place and has no backward, but a gradient is asked for; "
                "call it under torch.no_grad() or torch.inference_mode(), or leave it out: caches are functional then"
            )
        row = slot = torch.arange(qkv.shape[0], device=qkv.device)
        if state_indices is not None:
            row = torch.nonzero(state_indices != -1).squeeze(1)
            slot = state_indices[row].long()
            check_slot_values(slot.tolist(), pool.state.shape[0])
        q, k, v = self._heads(qkv[row])
        f = self.decay_gate(x_f[row])
        step = m2rnn_step(q, k, v, f, self.state_weight, initial_state=pool.state[slot], impl=self.impl)
        pool.state[slot] = step.state
        out = qkv.new_zeros(qkv.shape[0], self.hidden_size)
        out[row] = self._gate_and_norm(step.y, v, g[row]).to(out.dtype)
        return out

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v with their heads apart."""
        q, k, v = qkv.split(self.qkv_sizes, -1)
        return (
            q.unflatten(-1, (self.num_q_heads, self.key_dim)),
            k.unflatten(-1, (self.num_k_heads, self.key_dim)),
            v.unflatten(-1, (self.num_v_heads, self.value_dim)),
        )

    def _project(self, x: Tensor, pad: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(q | k | v before the conv, x_f, g) from one matrix product of padded width."""
        weight = self.input_projection.weight
        extra = -weight.shape[0] % PROJECTION_MULTIPLE if pad else 0
        if extra:
            weight = F.pad(weight, (0, 0, 0, extra))
        qkv, x_f, g, _ = F.linear(x, weight).split([*self.projection_sizes, extra], -1)
        return qkv, x_f, g

    def _gate_and_norm(self, y_BTNV: Tensor, v_BTNV: Tensor, g: Tensor) -> Tensor:
        """(y + D ⊙ v) · SiLU(g), normed over all heads together, projected."""
        N = self.num_heads
        o = y_BTNV + self.D * _repeat_heads(v_BTNV, N)
        o = o * F.silu(_repeat_heads(g.unflatten(-1, (self.num_g_heads, self.value_dim)), N))
        return self.output_projection(self.g_norm(o.flatten(-2)))

    def mixing_flops(self, context: int) -> int:
        """See `SequenceMixer.mixing_flops`: H W, k vᵀ and Hᵀ q."""
        return 2 * self.num_heads * self.key_dim * self.value_dim * (self.value_dim + 2)

    def extra_repr(self) -> str:
        sizes = f"N={self.num_heads}, K={self.key_dim}, V={self.value_dim}"
        return f"{sizes}, state_grad_clip={self.state_grad_clip}, impl={self.impl!r}"


def _repeat_heads(x: Tensor, N: int) -> Tensor:
    """Head n of the result reads head n // (N / N_x)."""
    return x if x.shape[-2] == N else x.repeat_interleave(N // x.shape[-2], -2)
