# SPDX-License-Identifier: Apache-2.0
"""An exported layer compiles as one graph and fuses like the layer, but for the convolution.

Export's checks of dtypes are users that use nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from m2rnn_compile import M2RNN, enable_fusion, explain
from m2rnn_compile.lowering import cpu
from m2rnn_compile.lowering.inductor import hook
from m2rnn_compile.lowering.inductor.rewrite import fuse
from m2rnn_compile.ops import fusion_switch
from tests.export.helpers import Hybrid, Stateful, export_layer, export_with_cache, make_layer
from tests.fusion.compiling import Rewriting, fusion_on_cpu
from tests.layers.test_mixers import MIXERS

__all__ = ["fusion_on_cpu"]
pytestmark = pytest.mark.usefixtures("fusion_on_cpu")
# Decompositions take softplus apart, so that the forget gate is not recognised then: the compiler's, as by default.
PARTS = ("q | k | v as one tensor", "D ⊙ v", "SiLU(g)", "RMSNorm over N·V")
WITH_GATE = (PARTS[0], "decay gate", *PARTS[1:])


def exported(layer: M2RNN, x: torch.Tensor) -> torch.export.ExportedProgram:
    T = torch.export.Dim("T")
    with torch.no_grad():
        return torch.export.export(layer, (x,), dynamic_shapes={"x": {1: T}})


@pytest.mark.parametrize("grad", [True, False], ids=["grad mode", "no grad"])
@pytest.mark.parametrize("model, scans", [("layer", 1), ("hybrid", 2)])
def test_the_module_of_a_program_compiles_as_one_graph(model: str, scans: int, grad: bool) -> None:
    """What a user does with it. By default the forget gate stays outside in training, and the conv always."""
    enable_fusion(devices=("cpu",))
    eager = make_layer() if model == "layer" else Hybrid().eval()
    x = torch.randn(2, 9, 24) if model == "layer" else torch.randint(32, (2, 9))
    backend = Rewriting()
    with torch.set_grad_enabled(grad):
        module = torch.export.export(eager, (x,)).module()
        got = torch.compile(module, backend=backend, fullgraph=True)(x)
        expected = eager(x)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        report = explain(module, x)
    assert report.graphs == 1
    assert [(r.fused, r.training) for r in report.scans] == [(PARTS if grad else WITH_GATE, grad)] * scans
    for record in report.scans:
        assert any(why.startswith("in front of q | k | v: what SiLU is taken of is not a sum") for why in record.left)
    assert backend.ops == [["fused_scan_packed" if grad else "fused_scan_conv"] * scans]
    if grad:
        names, parameters = zip(*eager.named_parameters(), strict=True)  # the program's module holds the same tensors
        gradients = (torch.autograd.grad(y.square().sum(), parameters) for y in (got, expected))
        for name, a, b in zip(names, *gradients, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_a_program_for_inference_fuses_nothing_in_grad_mode() -> None:
    """Its parameters may want gradients there, for which its scan keeps nothing: one graph, right, and said."""
    layer, x = make_layer(), torch.randn(2, 9, 24)
    module: Any = exported(layer, x).module()
    (record,) = explain(module, x).scans
    assert record.fused == ()
    assert any("keeps nothing for a backward" in why for why in record.left)
    compiled = torch.compile(module, backend=Rewriting(), fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("T", [1, 9], ids=["step", "prefill"])
def test_a_program_with_a_cache_compiles_as_one_graph(T: int) -> None:
    layer = make_layer()
    inputs = torch.randn(2, T, 24), *layer.init_cache(2)
    with torch.no_grad():
        got = torch.compile(export_with_cache(layer, T).module(), backend=Rewriting(), fullgraph=True)(*inputs)
        for a, b in zip(got, Stateful(layer)(*inputs), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MIXERS)
def test_a_program_of_any_mixer_compiles_as_one_graph(name: str) -> None:
    mixer, x = MIXERS[name](), torch.randn(2, 9, 24)
    with torch.no_grad():
        module = torch.export.export(mixer, (x,)).module()
        torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), mixer(x))


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
    assert record.fused == WITH_GATE
    module.graph.lint()
    module.recompile()
    with torch.no_grad():
        torch.testing.assert_close(module(x), layer(x), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(cpu.availability() is not None, reason="no C++ compiler")
@pytest.mark.parametrize("grad", [True, False], ids=["grad mode", "no grad"])
def test_inductor_fuses_the_module_of_a_program(grad: bool) -> None:
    layer, x = make_layer(), torch.randn(2, 9, 24)
    hook.RECORDS.clear()
    with torch.set_grad_enabled(grad):
        module = torch.export.export(layer, (x,)).module()
        torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), layer(x), atol=1e-5, rtol=1e-4)
    (record,) = hook.RECORDS
    assert (record.fused, record.training) == (WITH_GATE, grad)


@pytest.mark.slow
@pytest.mark.skipif(cpu.availability() is not None, reason="no C++ compiler")
def test_aot_inductor_fuses_like_torch_compile(tmp_path: Path) -> None:
    layer = make_layer()
    hook.RECORDS.clear()
    path = str(tmp_path / "layer.pt2")
    torch._inductor.aoti_compile_and_package(export_layer(layer), package_path=path)
    (record,) = hook.RECORDS
    assert record.fused == WITH_GATE
    x = torch.randn(2, 30, 24)
    with torch.no_grad():
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), layer(x), atol=1e-5, rtol=1e-4)
