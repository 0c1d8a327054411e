# SPDX-License-Identifier: Apache-2.0
"""The pre-norm residual block."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .mixer import Cache, SequenceMixer
from .moe import MoE
from .norm import RMSNorm


class BlockOutput(NamedTuple):
    """What a block gives on.

    Attributes:
        x: the residual stream, ``[B, T, hidden_size]``.
        cache: the mixer's new cache; None if none was given.
        aux_loss: scalar, of a mixture of experts in training mode; else None.
    """

    x: Tensor
    cache: Cache | None
    aux_loss: Tensor | None


class Block(nn.Module):
    """``x += sequence_mixer(ln_1(x)); x += mlp_block(ln_2(x))``.

    Args:
        hidden_size: width of the residual stream.
        sequence_mixer: any `SequenceMixer`.
        mlp_block: a module ``[B, T, hidden_size] -> [B, T, hidden_size]``, or a `MoE`.
    """

    def __init__(
        self,
        hidden_size: int,
        sequence_mixer: SequenceMixer,
        mlp_block: nn.Module,
        *,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(hidden_size, eps=norm_eps, device=device, dtype=dtype)
        self.sequence_mixer = sequence_mixer
        self.ln_2 = RMSNorm(hidden_size, eps=norm_eps, device=device, dtype=dtype)
        self.mlp_block = mlp_block

    def forward(self, x: Tensor, *, cache: Cache | None = None, **layout: Any) -> BlockOutput:
        """Run the block; arguments as in `SequenceMixer.forward`."""
        mixed = self.sequence_mixer(self.ln_1(x), cache=cache, **layout)
        mixed, new_cache = (mixed, None) if cache is None else mixed
        x = x + mixed
        if isinstance(self.mlp_block, MoE):
            y, aux_loss = self.mlp_block(self.ln_2(x), attention_mask=layout.get("attention_mask"))
        else:
            y, aux_loss = self.mlp_block(self.ln_2(x)), None
        return BlockOutput(x + y, new_cache, aux_loss)
