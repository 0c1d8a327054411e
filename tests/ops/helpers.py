# SPDX-License-Identifier: Apache-2.0
"""What the tests of the ops share: the implementations that run here, memory layouts, leaves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from m2rnn_compile.lowering import cpu
from m2rnn_compile.testing import ScanInputs

IMPLS = ["eager", pytest.param("cpp", marks=pytest.mark.skipif(cpu.availability() is not None, reason="no compiler"))]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:1].expand_as(x),
    "permuted": lambda x: x.permute(*range(x.dim() - 1, -1, -1)).contiguous().permute(*range(x.dim() - 1, -1, -1)),
    "offset": lambda x: torch.cat([x[:1], x])[1:],
}


def leaves(x: ScanInputs, layout: str = "contiguous") -> list[Tensor]:
    """q, k, v, f, W and, if there is one, the initial state, each to be differentiated by."""
    return [LAYOUTS[layout](t).detach().requires_grad_() for t in x.named_inputs().values()]
