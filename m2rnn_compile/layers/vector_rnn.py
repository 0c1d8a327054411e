# SPDX-License-Identifier: Apache-2.0
"""Baselines with a vector-valued state per head: an Elman RNN and a GRU, in the block of the M²RNN layer."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import m2rnn
from ..ops.validation import accumulation_dtype
from .conv import CausalConv
from .gru_scan import gru_scan
from .linear import padded_linear
from .mixer import SequenceMixer, check_layout, check_rows, check_sizes, zero_pads
from .norm import RMSNorm


class VectorRNNCache(NamedTuple):
    """What decoding carries: the last conv inputs ``[B, conv_size - 1, C]`` and the state ``[B, N, V]``."""

    conv_state: Tensor
    state: Tensor


class _VectorMixer(SequenceMixer):
    """``input_projection`` gives x, further inputs of the recurrence, and the gate; conv and SiLU over x; the
    recurrence; · SiLU(gate); RMSNorm over all heads; ``output_projection``.

    Args:
        hidden_size: width of the residual stream.
        num_heads: N.  head_dim: V, size of a head's state.
        conv_size: taps of the causal conv.
        init_num_layers: layers L of the model; the output projection starts at 0.02 / sqrt(2 L).
    """

    inputs: int  # of the recurrence: x, and one for each of its gates

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int = 16,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        init_std: float = 0.02,
        init_num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(type(self).__name__, hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim)
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, num_heads, head_dim
        self.init_std, self.init_num_layers = init_std, init_num_layers
        width = num_heads * head_dim
        self.projection_sizes = [width] * (self.inputs + 1)
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.input_projection = nn.Linear(hidden_size, sum(self.projection_sizes), bias=False, **factory)
        self.conv1d = CausalConv(width, conv_size, init_std=init_std, **factory)
        self.state_weight = nn.Parameter(torch.empty(self.inputs * num_heads, head_dim, head_dim, **factory))
        self.norm = RMSNorm(width, eps=norm_eps, **factory)
        self.output_projection = nn.Linear(width, hidden_size, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.input_projection.weight, std=self.init_std)
        nn.init.normal_(self.output_projection.weight, std=self.init_std / math.sqrt(2 * self.init_num_layers))
        nn.init.normal_(self.state_weight, std=self.init_std)
        self.conv1d.reset_parameters()
        self.norm.reset_parameters()

    def init_cache(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> VectorRNNCache:
        """Zero conv inputs and a zero state for `batch_size` sequences (packed: for S sequences)."""
        weight = self.input_projection.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        wide = accumulation_dtype(dtype)
        return VectorRNNCache(
            torch.zeros(batch_size, self.conv1d.width - 1, self.conv1d.channels, device=device, dtype=dtype),
            torch.zeros(batch_size, self.num_heads, self.head_dim, device=device, dtype=wide),
        )

    def forward(
        self,
        x: Tensor,
        *,
        cache: VectorRNNCache | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, VectorRNNCache]:
        """Mix a batch of sequences; arguments and results as `SequenceMixer` says. Pads never move the state.

        Raises:
            TypeError, ValueError: arguments that do not fit.
        """
        owner = type(self).__name__
        check_layout(owner, x, self.hidden_size, cu_seqlens, attention_mask)
        x = zero_pads(x, attention_mask)
        if cache is not None:
            sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            check_rows(owner, "cache.state", cache.state, (sequences, self.num_heads, self.head_dim))
        projected = padded_linear(x, self.input_projection.weight)[..., : sum(self.projection_sizes)]
        u, *gates, g = projected.split(self.projection_sizes, -1)
        u, conv_state = self.conv1d(
            u,
            state=None if cache is None else cache.conv_state,
            cu_seqlens=cu_seqlens,
            attention_mask=attention_mask,
            output_final_state=cache is not None,
        )
        inputs = [t.unflatten(-1, (self.num_heads, self.head_dim)) for t in (F.silu(u), *gates)]
        real = None if attention_mask is None else attention_mask.to(torch.bool)
        y, state = self._recurrence(inputs, real, None if cache is None else cache.state, cu_seqlens)
        y = self.output_projection(self.norm(y.flatten(-2) * F.silu(g)))
        if cache is None:
            return y
        assert conv_state is not None  # for the type checker
        return y, VectorRNNCache(conv_state, state)

    def _recurrence(
        self, inputs: list[Tensor], real: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y and the final state ``[B, N, V]`` from the inputs ``[B, T, N, V]``; `real` [B, T] is False on pads."""
        raise NotImplementedError

    def mixing_flops(self, context: int) -> int:
        """See `SequenceMixer.mixing_flops`: a V·V product for each input of the recurrence."""
        return 2 * self.inputs * self.num_heads * self.head_dim**2

    def extra_repr(self) -> str:
        return f"N={self.num_heads}, V={self.head_dim}"


class VectorRNN(_VectorMixer):
    """``h_t = tanh(h_{t-1} W + x_t)`` for every head.

    It is the M²RNN recurrence with one row of state, k = q = 1 and f = 0, and so runs on the same kernels.

    Args:
        state_grad_clip, impl: see `m2rnn`.
    """

    inputs = 1

    def __init__(
        self, hidden_size: int, *, state_grad_clip: float | None = 1.0, impl: str = "auto", **options: Any
    ) -> None:
        self.state_grad_clip, self.impl = state_grad_clip, impl
        super().__init__(hidden_size, **options)

    def _recurrence(
        self, inputs: list[Tensor], real: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        (x,) = inputs
        B, T = x.shape[:2]
        one = x.new_ones(B, T, 1, 1)
        wide = accumulation_dtype(x.dtype)
        f = x.new_zeros(B, T, 1, dtype=wide)
        if real is not None:
            f = torch.where(real[:, :, None], f, 1)  # f = 1 keeps the state exactly
        out = m2rnn(
            one,
            one,
            x,
            f,
            self.state_weight,
            initial_state=None if state is None else state[:, :, None],
            cu_seqlens=cu_seqlens,
            state_grad_clip=self.state_grad_clip,
            impl=self.impl,
        )
        assert out.final_state is not None  # for the type checker
        return out.y, out.final_state[:, :, 0]


class GRU(_VectorMixer):
    """``h_t = f ⊙ h_{t-1} + (1 − f) ⊙ tanh((r ⊙ h_{t-1}) W + x_t)`` with f and r = sigmoid(h_{t-1} W_g + x_g).

    A baseline for state tracking: the recurrence is a loop of torch operations on every device (`gru_scan`), and slow.
    """

    inputs = 3

    def _recurrence(
        self, inputs: list[Tensor], real: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, x_f, x_r = inputs
        if real is not None:
            x_f = torch.where(real[:, :, None, None], x_f, 1e4)  # sigmoid gives exactly 1: the state is kept
        return gru_scan(x, x_f, x_r, self.state_weight, initial_state=state, cu_seqlens=cu_seqlens)
