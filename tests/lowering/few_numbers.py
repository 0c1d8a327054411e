# SPDX-License-Identifier: Apache-2.0
"""The tolerance rule where a result is a few numbers: over several draws at once, its factor as it is.

df is one number a step and head. Let a kernel's error be r times eager's on average. Over m numbers, the square of the
ratio of the two norms is r² times a variable of Fisher's distribution F(m, m), whose tail for m = 2 is 1 / (1 + x): one
step of two heads breaks the factor 2 with probability 1 / (1 + 4 / r²), in a fifth of all draws of a kernel that is as
accurate as eager. The logarithm of the ratio spreads by about 1 / √m. Over 128 numbers that is 9 %, and whoever breaks
the rule by more than chance has an r near 2 or above it.
"""

from __future__ import annotations

import torch
from torch import Tensor

ENOUGH = 128


def draws_for(heads: int, T: int, slices: int = 8) -> int:
    """How many draws it takes that df, and each slice of it that `compare` judges, is ENOUGH numbers.

    heads: of all sequences together.
    """
    steps = T // slices if slices <= T else T
    return -(-ENOUGH // (heads * steps))


def together(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The results of several draws as those of one: its norms are over all of them."""
    return {name: torch.cat([r[name] for r in results]) for name in results[0]}
