# SPDX-License-Identifier: Apache-2.0
"""Gated DeltaNet (arXiv 2412.06464), order of operations and parameter names as in the released models."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.validation import accumulation_dtype
from .conv import CausalConv
from .linear import padded_linear
from .linear_recurrence import IMPLS, linear_rnn, linear_rnn_step
from .m2rnn import DecayGate
from .mixer import SequenceMixer, check_layout, check_rows, check_sizes, zero_pads
from .norm import RMSNorm


class GatedDeltaNetCache(NamedTuple):
    """What decoding carries from one call to the next.

    Attributes:
        conv_state: the last conv inputs, oldest first, ``[B, conv_size - 1, C]`` in the activations' dtype.
        state: S, ``[B, H, K, V]`` in fp32 (fp64 for fp64 models).
    """

    conv_state: Tensor
    state: Tensor


class GatedDeltaNet(SequenceMixer):
    """Projections, causal conv and SiLU on q/k/v, the gated delta rule, gate, norm of each head, projection.

    In order: ``qkv_proj`` gives q | k | v, ``ab_proj`` gives a | b | gate; depthwise causal conv and SiLU over
    q | k | v; q and k are L2-normalised per head (q then scaled by 1/√K); log decay g = -exp(A_log) · softplus(a +
    dt_bias) and step β = sigmoid(b) in fp32; the recurrence (`linear_rnn`); · SiLU(gate); RMSNorm over each head;
    ``o_proj``.

    Args:
        hidden_size: width of the residual stream.
        num_heads: H.  key_dim: K, rows of the state.  value_dim: V, columns of the state.
        use_gate: multiply by SiLU(gate) before the norm.
        allow_neg_eigval: β in (0, 2) instead of (0, 1), so that the transition I − β k kᵀ can have the eigenvalue −1:
            what state tracking needs (arXiv 2411.12537).
        conv_size: taps of the causal conv.
        norm_eps: of the RMSNorm.
        init_num_layers: layers L of the model; o_proj starts at 0.02 / sqrt(2 L).
        impl: of the recurrence, see `linear_rnn`.

    Raises:
        ValueError: sizes or options that do not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        key_dim: int = 256,
        value_dim: int = 512,
        use_gate: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        init_std: float = 0.02,
        init_num_layers: int = 1,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("GatedDeltaNet", hidden_size=hidden_size, num_heads=num_heads, key_dim=key_dim, value_dim=value_dim)
        if impl not in IMPLS:
            raise ValueError(f"GatedDeltaNet: `impl` must be one of {IMPLS}, got {impl!r}")
        self.hidden_size, self.num_heads, self.key_dim, self.value_dim = hidden_size, num_heads, key_dim, value_dim
        self.use_gate, self.allow_neg_eigval, self.impl = use_gate, allow_neg_eigval, impl
        self.init_std, self.init_num_layers = init_std, init_num_layers
        self.qkv_sizes = [num_heads * key_dim, num_heads * key_dim, num_heads * value_dim]
        self.ab_sizes = [num_heads, num_heads, num_heads * value_dim if use_gate else 0]
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.qkv_proj = nn.Linear(hidden_size, sum(self.qkv_sizes), bias=False, **factory)
        self.ab_proj = nn.Linear(hidden_size, sum(self.ab_sizes), bias=False, **factory)
        self.decay_gate = DecayGate(num_heads, **factory)
        self.qkv_conv1d = CausalConv(sum(self.qkv_sizes), conv_size, init_std=init_std, **factory)
        self.o_norm = RMSNorm(value_dim, eps=norm_eps, **factory)
        self.o_proj = nn.Linear(num_heads * value_dim, hidden_size, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.qkv_proj.weight, std=self.init_std)
        nn.init.normal_(self.ab_proj.weight, std=self.init_std)
        nn.init.normal_(self.o_proj.weight, std=self.init_std / math.sqrt(2 * self.init_num_layers))
        self.decay_gate.reset_parameters()
        self.qkv_conv1d.reset_parameters()
        self.o_norm.reset_parameters()

    def init_cache(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GatedDeltaNetCache:
        """Zero conv inputs and a zero S for `batch_size` sequences (packed: for S sequences)."""
        weight = self.qkv_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        wide = accumulation_dtype(dtype)
        return GatedDeltaNetCache(
            torch.zeros(batch_size, self.qkv_conv1d.width - 1, self.qkv_conv1d.channels, device=device, dtype=dtype),
            torch.zeros(batch_size, self.num_heads, self.key_dim, self.value_dim, device=device, dtype=wide),
        )

    def forward(
        self,
        x: Tensor,
        *,
        cache: GatedDeltaNetCache | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, GatedDeltaNetCache]:
        """Mix a batch of sequences; arguments and results as `SequenceMixer` says.

        Pads never move the state: conv inputs, g and β are zero there.

        Raises:
            TypeError, ValueError: arguments that do not fit.
        """
        check_layout("GatedDeltaNet", x, self.hidden_size, cu_seqlens, attention_mask)
        x = zero_pads(x, attention_mask)
        single_step = cache is not None and x.shape[1] == 1 and cu_seqlens is None
        if cache is not None:
            sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            expected = (sequences, self.num_heads, self.key_dim, self.value_dim)
            check_rows("GatedDeltaNet", "cache.state", cache.state, expected)
        qkv, conv_state = self.qkv_conv1d(
            padded_linear(x, self.qkv_proj.weight)[..., : sum(self.qkv_sizes)],
            state=None if cache is None else cache.conv_state,
            cu_seqlens=cu_seqlens,
            attention_mask=attention_mask,
            output_final_state=cache is not None,
        )
        q, k, v = (u.unflatten(-1, (self.num_heads, -1)) for u in F.silu(qkv).split(self.qkv_sizes, -1))
        q, k = _unit(q, self.key_dim**-0.5), _unit(k, 1.0)
        a, b, gate = padded_linear(x, self.ab_proj.weight)[..., : sum(self.ab_sizes)].split(self.ab_sizes, -1)
        g = self.decay_gate.log(a)
        beta = torch.sigmoid(b.to(g.dtype)) * (2 if self.allow_neg_eigval else 1)
        if attention_mask is not None:
            real = attention_mask.to(torch.bool)[:, :, None]
            g, beta = torch.where(real, g, 0), torch.where(real, beta, 0)

        state = None if cache is None else cache.state
        if single_step:
            assert state is not None  # for the type checker
            step = linear_rnn_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0], state)
            o, new_state = step.y[:, None], step.final_state
        else:
            o, new_state = linear_rnn(q, k, v, g, beta, initial_state=state, cu_seqlens=cu_seqlens, impl=self.impl)
        if self.use_gate:
            o = o * F.silu(gate.unflatten(-1, (self.num_heads, self.value_dim)))
        y = self.o_proj(self.o_norm(o).flatten(-2))
        if cache is None:
            return y
        assert conv_state is not None  # for the type checker
        return y, GatedDeltaNetCache(conv_state, new_state)

    def mixing_flops(self, context: int) -> int:
        """See `SequenceMixer.mixing_flops`: kᵀS, the update and qᵀS."""
        return 6 * self.num_heads * self.key_dim * self.value_dim

    def extra_repr(self) -> str:
        sizes = f"H={self.num_heads}, K={self.key_dim}, V={self.value_dim}"
        return f"{sizes}, allow_neg_eigval={self.allow_neg_eigval}, impl={self.impl!r}"


def _unit(x: Tensor, scale: float) -> Tensor:
    """x divided by its Euclidean norm over the last dimension, times `scale`; in fp32, rounded once."""
    wide = x.to(accumulation_dtype(x.dtype))
    return (wide * (torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6) * scale)).to(x.dtype)
