# SPDX-License-Identifier: Apache-2.0
"""The SwiGLU feed-forward layer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """``c_proj(up · SiLU(gate))`` where ``c_fc`` gives both as halves ``[up; gate]``, the released models' dense order.

    Args:
        hidden_size: width of the residual stream.
        intermediate_size: width of each half.
        init_num_layers: layers L of the model; c_proj starts at 0.02 / sqrt(2 L).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        init_std: float = 0.02,
        init_num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.init_std, self.init_num_layers = init_std, init_num_layers
        self.c_fc = nn.Linear(hidden_size, 2 * intermediate_size, bias=False, device=device, dtype=dtype)
        self.c_proj = nn.Linear(intermediate_size, hidden_size, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.c_fc.weight, std=self.init_std)
        nn.init.normal_(self.c_proj.weight, std=self.init_std / math.sqrt(2 * self.init_num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., hidden_size]`` gives the same shape."""
        up, gate = self.c_fc(x).chunk(2, -1)
        return self.c_proj(up * F.silu(gate))
