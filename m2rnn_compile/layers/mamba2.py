# SPDX-License-Identifier: Apache-2.0
"""Mamba-2 (arXiv 2405.21060), parameter names as in the released models."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.validation import accumulation_dtype
from .conv import CausalConv
from .linear import padded_linear
from .linear_recurrence import linear_rnn, linear_rnn_step
from .m2rnn import DecayGate
from .mixer import SequenceMixer, check_layout, check_rows, check_sizes, zero_pads
from .norm import RMSNorm


class Mamba2Cache(NamedTuple):
    """What decoding carries: the last conv inputs ``[B, conv_size - 1, C]`` and the state ``[B, H, K, V]``."""

    conv_state: Tensor
    state: Tensor


class Mamba2(SequenceMixer):
    """``in_proj`` gives gate | x | B | C | dt; conv (with bias) and SiLU over x | B | C; recurrence; D; gate; norm.

    The state-space model in the names of `linear_rnn` (plain sum): q = C, k = B (shared by the heads of a group),
    v = x, g = −exp(A_log) · Δ and β = Δ, where Δ = softplus(dt + dt_bias). It runs in chunks of plain torch on every
    device.

    Args:
        hidden_size: width of the residual stream.
        num_heads: H.  state_size: K, rows of the state.  intermediate_size: H·V, width of x.
        num_groups: groups of heads that share B and C; divides H.
        conv_size: taps of the causal conv.

    Raises:
        ValueError: sizes that do not fit.
    """

    no_weight_decay = ("D",)

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        state_size: int = 128,
        intermediate_size: int | None = None,
        num_groups: int = 1,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        init_std: float = 0.02,
        init_num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner = 2 * hidden_size if intermediate_size is None else intermediate_size
        check_sizes(
            "Mamba2", hidden_size=hidden_size, num_heads=num_heads, state_size=state_size, num_groups=num_groups
        )
        for name, size, divisor in (("intermediate_size", inner, num_heads), ("num_heads", num_heads, num_groups)):
            if size < 1 or size % divisor != 0:
                raise ValueError(f"Mamba2: `{name}` must be a multiple of {divisor}, got {size}")
        self.hidden_size, self.num_heads, self.state_size, self.num_groups = (
            hidden_size,
            num_heads,
            state_size,
            num_groups,
        )
        self.intermediate_size, self.head_dim = inner, inner // num_heads
        self.init_std, self.init_num_layers = init_std, init_num_layers
        self.conv_sizes = [inner, num_groups * state_size, num_groups * state_size]
        self.projection_sizes = [inner, sum(self.conv_sizes), num_heads]
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_proj = nn.Linear(hidden_size, sum(self.projection_sizes), bias=False, **factory)
        self.conv1d = CausalConv(sum(self.conv_sizes), conv_size, bias=True, init_std=init_std, **factory)
        self.decay_gate = DecayGate(num_heads, **factory)
        self.D = nn.Parameter(torch.empty(num_heads, **factory))
        self.norm = RMSNorm(inner, eps=norm_eps, **factory)
        self.out_proj = nn.Linear(inner, hidden_size, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.in_proj.weight, std=self.init_std)
        nn.init.normal_(self.out_proj.weight, std=self.init_std / math.sqrt(2 * self.init_num_layers))
        nn.init.ones_(self.D)
        for module in (self.conv1d, self.decay_gate, self.norm):
            module.reset_parameters()

    def init_cache(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Mamba2Cache:
        """Zero conv inputs and a zero state for `batch_size` sequences (packed: for S sequences)."""
        device, dtype = device or self.D.device, dtype or self.D.dtype
        wide = accumulation_dtype(dtype)
        return Mamba2Cache(
            torch.zeros(batch_size, self.conv1d.width - 1, self.conv1d.channels, device=device, dtype=dtype),
            torch.zeros(batch_size, self.num_heads, self.state_size, self.head_dim, device=device, dtype=wide),
        )

    def forward(
        self,
        x: Tensor,
        *,
        cache: Mamba2Cache | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Mamba2Cache]:
        """Mix a batch of sequences; arguments and results as `SequenceMixer` says. Pads never move the state.

        Raises:
            TypeError, ValueError: arguments that do not fit.
        """
        check_layout("Mamba2", x, self.hidden_size, cu_seqlens, attention_mask)
        x = zero_pads(x, attention_mask)
        single_step = cache is not None and x.shape[1] == 1 and cu_seqlens is None
        if cache is not None:
            sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            expected = (sequences, self.num_heads, self.state_size, self.head_dim)
            check_rows("Mamba2", "cache.state", cache.state, expected)
        projected = padded_linear(x, self.in_proj.weight)[..., : sum(self.projection_sizes)]
        gate, xBC, dt = projected.split(self.projection_sizes, -1)
        xBC, conv_state = self.conv1d(
            xBC,
            state=None if cache is None else cache.conv_state,
            cu_seqlens=cu_seqlens,
            attention_mask=attention_mask,
            output_final_state=cache is not None,
        )
        v, k, q = F.silu(xBC).split(self.conv_sizes, -1)
        v = v.unflatten(-1, (self.num_heads, self.head_dim))
        shared = self.num_heads // self.num_groups
        k, q = (u.unflatten(-1, (self.num_groups, -1)).repeat_interleave(shared, -2) for u in (k, q))
        g = self.decay_gate.log(dt)
        step_size = F.softplus(dt.to(g.dtype) + self.decay_gate.dt_bias.to(g.dtype))
        if attention_mask is not None:
            real = attention_mask.to(torch.bool)[:, :, None]
            g, step_size = torch.where(real, g, 0), torch.where(real, step_size, 0)

        state = None if cache is None else cache.state
        if single_step:
            assert state is not None  # for the type checker
            step = linear_rnn_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], step_size[:, 0], state, delta=False)
            y, new_state = step.y[:, None], step.final_state
        else:
            y, new_state = linear_rnn(
                q, k, v, g, step_size, initial_state=state, cu_seqlens=cu_seqlens, delta=False, impl="torch"
            )
        y = (y + self.D[:, None] * v).flatten(-2) * F.silu(gate)
        y = self.out_proj(self.norm(y))
        if cache is None:
            return y
        assert conv_state is not None  # for the type checker
        return y, Mamba2Cache(conv_state, new_state)

    def mixing_flops(self, context: int) -> int:
        """See `SequenceMixer.mixing_flops`: the update and qᵀS."""
        return 4 * self.num_heads * self.state_size * self.head_dim

    def extra_repr(self) -> str:
        return f"H={self.num_heads}, K={self.state_size}, V={self.head_dim}, groups={self.num_groups}"
