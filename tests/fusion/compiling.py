# SPDX-License-Identifier: Apache-2.0
"""What the tests of the rewrite share: a backend that rewrites, then AOTAutograd in eager mode; fusion on CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
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


class Rewriting:
    """A backend. Inductor's own way through the hook takes seconds a graph; this one takes none."""

    def __init__(self) -> None:
        self.records: list[FusionRecord] = []
        self.graphs: list[tuple[str, str]] = []  # before and after, as code
        self.compilations = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        self.compilations += 1
        before = gm.code.strip()
        for module in gm.modules():
            if isinstance(module, torch.fx.GraphModule):
                self.records += fuse(module.graph, fusion_switch.SETTINGS)
                module.graph.lint()
                module.recompile()
        self.graphs.append((before, gm.code.strip()))
        return aot_eager(gm, example_inputs)

    def parts(self) -> list[str]:
        (record,) = self.records
        return list(record.fused)
