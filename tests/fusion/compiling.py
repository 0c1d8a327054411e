# SPDX-License-Identifier: Apache-2.0
"""What the tests of the rewrite share: a backend that rewrites, then AOTAutograd in eager mode; fusion on CPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager

from m2rnn_compile import enable_fusion
from m2rnn_compile.lowering.inductor.rewrite import FusionRecord, fuse
from m2rnn_compile.ops import fusion_switch

ON_CPU: dict[str, Any] = dict(devices=("cpu", "cuda"), prologue=True)


@pytest.fixture
def fusion_on_cpu() -> Iterator[None]:
    before = enable_fusion(True, **ON_CPU)
    yield
    enable_fusion(**before._asdict())


@pytest.fixture(params=[True, False], ids=["conv moves", "conv stays"])
def conv(request: pytest.FixtureRequest, fusion_on_cpu: None) -> bool:
    """Both settings of `conv`, the default and the other one."""
    moves: bool = request.param
    enable_fusion(True, **ON_CPU, **({} if moves else dict(conv=False)))
    return moves


def training_ops(conv: bool) -> list[str]:
    """What the rewrite makes of a layer with a backward: the library's ops, in their order."""
    return ["fused_mixer"] if conv else ["fused_scan_packed"]


def inference_ops(conv: bool) -> list[str]:
    return ["fused_scan_conv"] if conv else ["fused_scan_packed"]


class Rewriting:
    """A backend. Inductor's own way through the hook takes seconds a graph; this one takes none."""

    def __init__(self, **aot_options: Any) -> None:
        self.aot_options = aot_options
        self.bw_compiler: Any = None  # of AOTAutograd: what is to be done with a graph of a backward
        self.records: list[FusionRecord] = []
        self.graphs: list[tuple[str, str]] = []  # before and after, as code
        self.ops: list[list[str]] = []  # of this library, in each rewritten graph and the graphs inside of it
        self.compilations = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        self.compilations += 1
        before = gm.code.strip()
        ops = []
        for module in gm.modules():
            if isinstance(module, torch.fx.GraphModule):
                self.records += fuse(module.graph, fusion_switch.SETTINGS)
                module.graph.lint()
                module.recompile()
                ops += re.findall(r"torch\.ops\.m2rnn\.(\w+)", module.code)
        self.ops.append(ops)
        self.graphs.append((before, gm.code.strip()))
        if self.bw_compiler is None:
            return aot_eager(gm, example_inputs)
        compilers = dict(fw_compiler=lambda gm, _: make_boxed_func(gm), bw_compiler=self.bw_compiler)
        return aot_autograd(**compilers, **self.aot_options)(gm, example_inputs)

    def parts(self) -> list[str]:
        (record,) = self.records
        return list(record.fused)
