# SPDX-License-Identifier: Apache-2.0
"""RMSNorm with fp32 statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.validation import accumulation_dtype


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension.

    Statistics and the product with the weight are taken in fp32 (fp64 for fp64 inputs); the result is rounded once, to
    x's dtype.

    Args:
        size: features of the last dimension.
        eps: added to the mean square; 1e-5 in the released models.
    """

    no_weight_decay = ("weight",)

    def __init__(
        self,
        size: int,
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., size]`` gives the same shape and dtype."""
        acc = accumulation_dtype(x.dtype)
        x_acc = x.to(acc)
        rstd = torch.rsqrt(x_acc.square().mean(-1, keepdim=True) + self.eps)
        return (x_acc * rstd * self.weight.to(acc)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}"
