# SPDX-License-Identifier: Apache-2.0
"""torch.export of a layer, a hybrid model and a decoding step; decompositions; through a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from m2rnn_compile import enable_fusion
from m2rnn_compile.ops import fusion_switch
from tests.export.helpers import BATCH, TIME, Hybrid, export_layer, export_with_cache, make_layer
from tests.fusion.compiling import ON_CPU

CLOSE = dict(atol=1e-5, rtol=1e-4)


def ops_of(program: torch.export.ExportedProgram) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if "m2rnn" in str(n.target)]


def test_layer_with_dynamic_batch_and_time_through_a_file(tmp_path: Path) -> None:
    layer = make_layer()
    program = export_layer(layer)
    assert ops_of(program) == ["m2rnn.scan.default"]
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for shape in ((3, 9), (1, 1), (5, 70), (2, 0)):
        x = torch.randn(*shape, 24)
        torch.testing.assert_close(loaded(x), layer(x), **CLOSE)


def test_decompositions_leave_the_op_whole() -> None:
    """One op and aten's core ops: nothing of the recurrence is unrolled."""
    layer = make_layer()
    program = export_layer(layer).run_decompositions()
    assert ops_of(program) == ["m2rnn.scan.default"]
    namespaces = {n.target.namespace for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert namespaces == {"aten", "m2rnn"}
    x = torch.randn(2, 40, 24)
    torch.testing.assert_close(program.module()(x), layer(x), **CLOSE)


def test_training_graph_keeps_the_checkpoints() -> None:
    """Exported with grad mode on, the graph can be trained: the op's chunk is not 0."""
    layer = make_layer()
    program = torch.export.export(layer, (torch.randn(3, 9, 24),), dynamic_shapes={"x": {0: BATCH, 1: TIME}})
    x = torch.randn(2, 17, 24, requires_grad=True)
    (got,) = torch.autograd.grad(program.module()(x).square().sum(), x)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_program_for_inference_runs_compiled_in_grad_mode(backend: str) -> None:
    """Its parameters still require gradients, so a backward is traced; it fails only where it is asked for."""
    layer, x = make_layer(), torch.randn(2, 17, 24)
    compiled = torch.compile(export_layer(layer).module(), backend=backend)
    y = compiled(x)
    torch.testing.assert_close(y, layer(x), **CLOSE)
    with pytest.raises(RuntimeError, match=r"no backward.*exported under torch\.no_grad\(\) keeps none"):
        y.sum().backward()


def test_prefill_and_decode_with_a_state(tmp_path: Path) -> None:
    layer, x = make_layer(), torch.randn(2, 12, 24)
    modules = {}
    for name, program in (("prefill", export_with_cache(layer, 9)), ("step", export_with_cache(layer, 1))):
        torch.export.save(program, tmp_path / f"{name}.pt2")
        modules[name] = torch.export.load(tmp_path / f"{name}.pt2").module()
    with torch.no_grad():
        y, *cache = modules["prefill"](x[:, :7], *layer.init_cache(2))
        ys = [y]
        for t in range(7, 12):
            y, *cache = modules["step"](x[:, t : t + 1], *cache)
            ys.append(y)
        torch.testing.assert_close(torch.cat(ys, 1), layer(x), **CLOSE)


def test_hybrid_model_through_a_file(tmp_path: Path) -> None:
    model = Hybrid().eval()
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.zeros(2, 9, dtype=torch.int64),), dynamic_shapes={"tokens": {0: BATCH, 1: TIME}}
        )
        tokens = torch.randint(0, 32, (3, 21))
        torch.testing.assert_close(program.run_decompositions().module()(tokens), model(tokens), **CLOSE)
        torch.export.save(program, tmp_path / "hybrid.pt2")
        loaded = torch.export.load(tmp_path / "hybrid.pt2")
        assert ops_of(loaded) == ["m2rnn.scan.default"] * 2
        for shape in ((3, 21), (1, 1), (2, 70)):
            tokens = torch.randint(0, 32, shape)
            torch.testing.assert_close(loaded.module()(tokens), model(tokens), **CLOSE)


def test_export_does_not_depend_on_fusion() -> None:
    """A file of today must not need an op that a switch chose: export takes the scan as it is."""
    before = fusion_switch.SETTINGS
    enable_fusion(True, **ON_CPU)
    try:
        assert ops_of(export_layer(make_layer())) == ["m2rnn.scan.default"]
    finally:
        enable_fusion(**before._asdict())
