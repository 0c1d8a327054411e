# SPDX-License-Identifier: Apache-2.0
"""Depthwise causal convolution, written as shifted multiply-adds so that the compiler fuses it with its neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.validation import accumulation_dtype
from .mixer import check_rows, positions_in_sequence


class CausalConv(nn.Module):
    """``y_t = Σ_j weight[:, 0, width - 1 - j] · x_{t-j}`` for each channel; x is zero before a sequence starts.

    A bias is added where asked for (Mamba-2). The weight is stored as ``nn.Conv1d`` stores it, ``[C, 1, width]``, the
    last tap being the current step. Sums are taken in fp32 (fp64 for fp64 inputs).

    Args:
        channels: C.
        width: taps; 4 in the released models.
        bias: add one, starting at zero.
        init_std: standard deviation of the initial weights.
    """

    def __init__(
        self,
        channels: int,
        width: int = 4,
        *,
        bias: bool = False,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"CausalConv: `width` must be at least 1, got {width}")
        self.channels, self.width, self.init_std = channels, width, init_std
        self.weight = nn.Parameter(torch.empty(channels, 1, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x_BTC: Tensor,
        *,
        state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Convolve a batch of sequences.

        Args:
            x_BTC: ``[B, T, C]``.
            state: the last ``width - 1`` inputs before x, oldest first, ``[B, width - 1, C]`` (packed: one row a
                sequence, ``[S, width - 1, C]``); None means zero. Not modified.
            cu_seqlens: ``[S + 1]``, packed sequences along time; B must be 1.
            attention_mask: ``[B, T]``, False on left padding: inputs there count as zero, and a row's `state` stands
                directly before its first real input (a row of pads only gives it back).
            output_final_state: return the state after the last step, in x's dtype.

        Returns:
            ``(y, final_state)``: y in x's shape and dtype; final_state like `state`, or None.

        Raises:
            ValueError: shapes or boundaries that do not fit.
        """
        if x_BTC.dim() != 3 or x_BTC.shape[2] != self.channels:
            raise ValueError(f"CausalConv: `x_BTC` must have shape [B, T, {self.channels}], got {tuple(x_BTC.shape)}")
        if state is not None:
            sequences = x_BTC.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            check_rows("CausalConv", "state", state, (sequences, self.width - 1, self.channels))
        if attention_mask is not None:
            x_BTC = torch.where(attention_mask.to(torch.bool)[:, :, None], x_BTC, 0)
        if cu_seqlens is not None:
            return self._forward_packed(x_BTC, state, cu_seqlens, output_final_state)
        T, past = x_BTC.shape[1], self.width - 1
        if state is None:
            extended = F.pad(x_BTC, (0, 0, past, 0))
        elif attention_mask is not None:
            # What a row's state is written over is zero: its pads, and the zeros in front of them.
            pads = (attention_mask.to(torch.bool).cumsum(1) == 0).sum(1)
            slot = pads[:, None, None] + torch.arange(past, device=x_BTC.device)[:, None]
            extended = F.pad(x_BTC, (0, 0, past, 0)).scatter(1, slot.expand_as(state), state.to(x_BTC.dtype))
        else:
            extended = torch.cat([state.to(x_BTC.dtype), x_BTC], 1)
        y = self._taps([extended[:, past - j : past - j + T] for j in range(self.width)])
        # A copy, not a slice: a cache that is a view would keep the whole of `extended` alive.
        final_state = extended[:, T : T + past].clone() if output_final_state else None
        return y, final_state

    def _taps(self, shifted: list[Tensor]) -> Tensor:
        """Multiply-add the input shifted by 0, 1, ... steps with the last, last but one, ... tap."""
        acc = accumulation_dtype(shifted[0].dtype)
        w = self.weight[:, 0].to(acc)
        y = shifted[0].to(acc) * w[:, -1]
        for j in range(1, self.width):
            y = y + shifted[j].to(acc) * w[:, self.width - 1 - j]
        if self.bias is not None:
            y = y + self.bias.to(acc)
        return y.to(shifted[0].dtype)

    def _forward_packed(
        self, x_1TC: Tensor, state: Tensor | None, cu_seqlens: Tensor, output_final_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        """No loop over sequences and no shape that depends on data: a step looks back only within its own sequence."""
        T, past, S = x_1TC.shape[1], self.width - 1, cu_seqlens.shape[0] - 1
        position, ids = positions_in_sequence(cu_seqlens, T)
        if state is None:
            padded = F.pad(x_1TC, (0, 0, past, 0))
            shifted = [
                torch.where((position >= j)[None, :, None], padded[:, past - j : past - j + T], 0)
                for j in range(self.width)
            ]
            if not output_final_state:
                return self._taps(shifted), None
            state = x_1TC.new_zeros(S, past, self.channels)

        # Rows 0 .. S·past-1 of the pool are the states, the rest are the inputs; every look-back is one row of it.
        pool = torch.cat([state.to(x_1TC.dtype).flatten(0, 1), x_1TC[0]])
        step = torch.arange(T, device=x_1TC.device) + S * past
        y = self._taps(
            [
                pool[torch.where(position >= j, step - j, ids * past + past + position - j)][None]
                for j in range(self.width)
            ]
        )
        if not output_final_state:
            return y, None
        bounds = cu_seqlens.to(torch.int64)
        start, end = bounds[:-1, None], bounds[1:, None]
        back = torch.arange(past, device=x_1TC.device)[None, :] - past  # -3, -2, -1: oldest first
        row = torch.arange(S, device=x_1TC.device)[:, None] * past
        kept = end - start + back + past  # where the old state still shows through: its entry len + i
        final = torch.where(end + back >= start, S * past + end + back, row + kept)
        return y, pool[final]

    def extra_repr(self) -> str:
        return f"{self.channels}, width={self.width}"
