# SPDX-License-Identifier: Apache-2.0
"""An exported layer fuses as the layer does: export's checks of dtypes are users that use nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from m2rnn_compile import M2RNN
from m2rnn_compile.lowering import cpu
from m2rnn_compile.lowering.inductor import hook
from m2rnn_compile.lowering.inductor.rewrite import fuse
from m2rnn_compile.ops import fusion_switch
from tests.export.helpers import export_layer, make_layer
from tests.fusion.compiling import Rewriting, fusion_on_cpu

__all__ = ["fusion_on_cpu"]
pytestmark = pytest.mark.usefixtures("fusion_on_cpu")
# Decompositions take softplus apart, so that the forget gate is not recognised then: the compiler's, as by default.
PARTS = ("q | k | v as one tensor", "D ⊙ v", "SiLU(g)", "RMSNorm over N·V")


def exported(layer: M2RNN, x: torch.Tensor) -> torch.export.ExportedProgram:
    T = torch.export.Dim("T")
    with torch.no_grad():
        return torch.export.export(layer, (x,), dynamic_shapes={"x": {1: T}})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_decomposed_program_fuses_like_its_module(dtype: torch.dtype) -> None:
    layer, x = make_layer().to(dtype), torch.randn(2, 9, 24, dtype=dtype)
    program = exported(layer, x).run_decompositions().module()
    backend = Rewriting()
    with torch.no_grad():
        got = torch.compile(program, backend=backend, fullgraph=True)(x)
        tolerance = dict(atol=1e-5, rtol=1e-4) if dtype == torch.float32 else dict(atol=1e-3, rtol=0.02)
        torch.testing.assert_close(got, layer(x), **tolerance)
    assert tuple(backend.parts()) == PARTS
    before, after = (graph.splitlines() for graph in backend.graphs[0])
    checks = [sum("_assert_tensor_metadata" in line for line in code) for code in (before, after)]
    assert checks[0] > checks[1]  # those of absorbed nodes went with them


def test_a_program_as_exported_fuses_like_its_module() -> None:
    """Before decompositions a check stands in front of every `.to`: also on y, and on f."""
    layer, x = make_layer(), torch.randn(2, 9, 24)
    module: Any = exported(layer, x).module()
    (record,) = fuse(module.graph, fusion_switch.SETTINGS)
    assert record.fused == (PARTS[0], "decay gate", *PARTS[1:])
    module.graph.lint()
    module.recompile()
    with torch.no_grad():
        torch.testing.assert_close(module(x), layer(x), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(cpu.availability() is not None, reason="no C++ compiler")
def test_aot_inductor_fuses_like_torch_compile(tmp_path: Path) -> None:
    layer = make_layer()
    hook.RECORDS.clear()
    path = str(tmp_path / "layer.pt2")
    torch._inductor.aoti_compile_and_package(export_layer(layer), package_path=path)
    (record,) = hook.RECORDS
    assert record.fused == (PARTS[0], "decay gate", *PARTS[1:])
    x = torch.randn(2, 30, 24)
    with torch.no_grad():
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), layer(x), atol=1e-5, rtol=1e-4)
