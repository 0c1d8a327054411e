# SPDX-License-Identifier: Apache-2.0
"""With fusion off, Inductor's code is what it is without this library's pass, and so are the bits."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from m2rnn_compile import M2RNN, enable_fusion

pytestmark = pytest.mark.slow


def compiled(layer: M2RNN, x: Tensor, **options: Any) -> tuple[list[Tensor], list[str]]:
    """The output and all gradients of a compilation from scratch, and the code of both directions."""

    def run() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = torch.compile(layer, fullgraph=True)(leaf)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])]

    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True, **options):
        values, codes = run_and_get_code(run)
    return values, [re.sub("AOT ID.*", "", code) for code in codes]


def test_off_is_the_code_and_the_bits_of_a_torch_without_the_pass() -> None:
    before = enable_fusion(False)
    try:
        layer, x = M2RNN(24, num_heads=4, key_dim=8, value_dim=4), torch.randn(2, 9, 24)
        compiled(layer, x)  # the first compilation of a process fuses otherwise, whatever the settings
        off, never = compiled(layer, x), compiled(layer, x, pre_grad_custom_pass=None)
        assert len(off[1]) == 2
        assert off[1] == never[1]
        assert all(torch.equal(a, b) for a, b in zip(off[0], never[0], strict=True))
        enable_fusion(True, devices=("cpu",))
        assert compiled(layer, x)[1] != off[1], "else this tests nothing"
    finally:
        enable_fusion(**before._asdict())
