# SPDX-License-Identifier: Apache-2.0
"""AOTInductor on a CPU: packages that run where `m2rnn_compile` is not, given the library of `build_runtime`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from m2rnn_compile.deploy import build_runtime
from m2rnn_compile.lowering import cpu
from m2rnn_compile.lowering.cpu.build import BuildError
from tests.export.helpers import export_layer, export_with_cache, make_layer, run_without_the_library
from tests.fusion.compiling import conv, fusion_on_cpu, inference_ops

__all__ = ["conv", "fusion_on_cpu"]
pytestmark = pytest.mark.skipif(cpu.availability() is not None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_runtime(tmp_path_factory.mktemp("runtime") / "libm2rnn_runtime.so")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.export.ExportedProgram, str], Path]:
    folder = tmp_path_factory.mktemp("packages")

    def make(program: torch.export.ExportedProgram, name: str) -> Path:
        path = folder / f"{name}.pt2"
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        return path

    return make


LOAD = """
import torch
torch.ops.load_library(sys.argv[1])
model = torch._inductor.aoti_load_package(sys.argv[2])
"""


@pytest.mark.slow
def test_layer_in_a_process_without_the_library(runtime: Path, package: Callable[..., Path], tmp_path: Path) -> None:
    layer = make_layer()
    path = package(export_layer(layer), "layer")
    inputs = [torch.randn(*shape, 24) for shape in ((3, 9), (1, 1), (5, 70))]
    torch.save([(x, layer(x).detach()) for x in inputs], tmp_path / "io.pt")
    code = LOAD + (
        "for x, y in torch.load(sys.argv[3]):\n"
        "    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-4)\n"
        "print('agrees')"
    )
    assert "agrees" in run_without_the_library(code, runtime, path, tmp_path / "io.pt")
    loaded = torch._inductor.aoti_load_package(str(path))  # and here, where the library has registered the op
    torch.testing.assert_close(loaded(inputs[2]), layer(inputs[2]), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_fused_package_needs_the_library(runtime: Path, package: Callable[..., Path], conv: bool) -> None:
    """It holds the fused op, which the runtime's library has not; torch names it."""
    layer, x = make_layer(), torch.randn(5, 70, 24)
    path = package(export_layer(layer), f"fused-{conv}")
    torch.testing.assert_close(torch._inductor.aoti_load_package(str(path))(x), layer(x).detach(), atol=1e-5, rtol=1e-4)
    code = "sys.stderr = sys.stdout\ntry:" + (LOAD + "model(torch.randn(5, 70, 24))\n").replace("\n", "\n    ")
    code += "\nexcept Exception as e:\n    print(type(e).__name__, e)"
    (op,) = inference_ops(conv)
    assert f"Could not find schema for m2rnn::{op}" in run_without_the_library(code, runtime, path)


def test_the_runtime_has_the_two_plain_ops_and_none_of_the_fused(runtime: Path) -> None:
    """As the docs say; a layer compiled with fusion on calls fused_scan_conv, or conv_silu and fused_scan_packed."""
    code = (
        "import torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "print(sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith('m2rnn::')))"
    )
    assert run_without_the_library(code, runtime).strip() == "['m2rnn::scan', 'm2rnn::step']"


@pytest.mark.slow
def test_decoding_with_a_state_in_a_process_without_the_library(
    runtime: Path, package: Callable[..., Path], tmp_path: Path
) -> None:
    layer, x = make_layer(), torch.randn(2, 6, 24)
    path = package(export_with_cache(layer, 1), "step")
    torch.save((x, layer(x).detach(), tuple(layer.init_cache(2))), tmp_path / "io.pt")
    code = LOAD + (
        "x, expected, cache = torch.load(sys.argv[3])\n"
        "ys = []\n"
        "for t in range(x.shape[1]):\n"
        "    y, *cache = model(x[:, t : t + 1].contiguous(), *cache)\n"
        "    ys.append(y)\n"
        "torch.testing.assert_close(torch.cat(ys, 1), expected, atol=1e-5, rtol=1e-4)\n"
        "print('agrees')"
    )
    assert "agrees" in run_without_the_library(code, runtime, path, tmp_path / "io.pt")


def test_an_exported_program_in_a_process_without_the_library(runtime: Path, tmp_path: Path) -> None:
    layer, x = make_layer(), torch.randn(2, 20, 24)
    torch.export.save(export_layer(layer).run_decompositions(), tmp_path / "layer.pt2")
    torch.save((x, layer(x).detach()), tmp_path / "io.pt")
    code = (
        "import torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "model = torch.export.load(sys.argv[2]).module()\n"
        "x, y = torch.load(sys.argv[3])\n"
        "torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-4)\n"
        "print('agrees')"
    )
    assert "agrees" in run_without_the_library(code, runtime, tmp_path / "layer.pt2", tmp_path / "io.pt")


def test_the_runtime_checks_what_becomes_an_address(runtime: Path) -> None:
    code = """
import torch
torch.ops.load_library(sys.argv[1])
scan, r = torch.ops.m2rnn.scan, torch.randn
q, k, v, f, W = r(2, 5, 1, 3), r(2, 5, 1, 3), r(2, 5, 4, 6), r(2, 5, 4), r(4, 6, 6)
def fails(message, *args):
    try:
        scan(*args)
    except RuntimeError as e:
        assert message in str(e), e
    else:
        raise AssertionError(message)
rest = (None, None, None, 0, "auto")
scan(q, k, v, f, W, *rest)
fails("agree in batch and time", q[:1], k, v, f, W, *rest)
fails("sizes K and V", q, k, v, f, W[:, :5], *rest)
fails("does not divide", q, k, v, f[..., :3], W, *rest)
fails("forward pass only", q, k, v, f, W, None, None, None, 64, "auto")
fails("initial_state must have shape", q, k, v, f, W, r(2, 4, 3, 5), None, None, 0, "auto")
packed = (q[:1], k[:1], v[:1], f[:1], W, None)
scan(*packed, torch.tensor([0, 2, 5]), None, 0, "auto")
fails("run from 0 to T", *packed, torch.tensor([0, 9]), None, 0, "auto")
fails("must not decrease", *packed, torch.tensor([0, 9, 5]), None, 0, "auto")
print("checked")
"""
    assert "checked" in run_without_the_library(code, runtime)


def test_without_anything_torch_names_the_missing_op(tmp_path: Path) -> None:
    torch.export.save(export_layer(make_layer()), tmp_path / "layer.pt2")
    code = (
        "sys.stderr = sys.stdout\n"
        "import torch\n"
        "try:\n    torch.export.load(sys.argv[1]).module()(torch.randn(1, 2, 24))\n"
        "except Exception as e:\n    print(type(e).__name__, e)"
    )
    assert "m2rnn" in run_without_the_library(code, tmp_path / "layer.pt2")


def test_a_failed_build_says_what_the_compiler_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildError, match="failed"):
        build_runtime(tmp_path / "no such folder" / "x.so")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(BuildError, match="was not found"):
        build_runtime(tmp_path / "x.so")
