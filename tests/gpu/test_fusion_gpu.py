# SPDX-License-Identifier: Apache-2.0
"""Fused ops and compiled layers on CUDA tensors: run by `make test-gpu`."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from m2rnn_compile import M2RNN, enable_fusion, m2rnn_fused
from m2rnn_compile.lowering.inductor import hook
from m2rnn_compile.ops import conv as equations
from m2rnn_compile.ops import fused as fused_op
from m2rnn_compile.ops.library import name_of
from m2rnn_compile.testing import assert_accurate, low_precision_eager
from m2rnn_compile.testing.judge import TIME_MAJOR
from tests.export.toolchain import compiler
from tests.fusion.composed import CASES, compose, make_fused, run
from tests.fusion.mixing import composed_mixer, make_mixer, mixer

pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


# ---- ops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.replace(" ", "-"))
def test_fused_scan(case: str, dtype: torch.dtype) -> None:
    x = make_fused(**{"T": 96, **CASES[case]} | dict(K=64, V=16), dtype=dtype).to(device="cuda")
    truth = run(x.to(torch.float64), compose, impl="eager")
    assert_accurate(run(x, m2rnn_fused, impl="triton"), truth, run(x, compose, scan=low_precision_eager), slices=4)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.replace(" ", "-"))
def test_fused_mixer(case: str, dtype: torch.dtype) -> None:
    """Training from the whole projection on; in the layer's order g begins 8 bytes behind a 16-byte boundary.

    Eight draws: in one, a gradient that slow gates carry far can be 2.6 times eager's by chance, emulated on a CPU too
    (H₀'s of 8,192 numbers that share what the first steps made of a rounding, A_log's of four); over eight it is 0.7 to
    1.0 of eager's.
    """
    for taps, orders in ((4, ("the layer's", "padded")), (None, ("turned", "padded"))):
        runs = []
        for seed, (order, T) in itertools.product(range(4), zip(orders, (96, 80), strict=True)):
            sizes = {"T": T, **CASES[case]} | dict(K=64, V=16, seed=seed)
            x = make_mixer(case, taps=taps, order=order, **sizes, dtype=dtype).to(device="cuda")
            truth = run(x.to(torch.float64), composed_mixer, impl="eager")
            eager = run(x, composed_mixer, scan=low_precision_eager)
            got = run(x, mixer, impl="triton")
            runs.append(tuple(in_slices(results, truth) for results in (got, eager, truth)))
        assert_as_near_as(*runs, alone=math.inf)


def in_slices(results: dict[str, Tensor], truth: dict[str, Tensor]) -> list[Tensor]:
    """The results in one order, those with a time dimension by quarters of the time."""
    return [part for name in truth for part in (results[name].chunk(4, 1) if name in TIME_MAJOR else [results[name]])]


def test_fused_mixer_at_the_papers_sizes() -> None:
    """84 heads, windows of time, a projection padded to 2,944 columns; every column is written, bits repeat."""
    x = make_mixer("layer", B=2, T=300, N=84, K=64, V=16, dtype=BF16).to(device="cuda")
    truth = run(x.to(torch.float64), composed_mixer, impl="eager")
    poison = torch.full((2**26,), float("nan"), device="cuda")
    del poison
    got = run(x, mixer, impl="triton")
    assert_accurate(got, truth, run(x, composed_mixer, scan=low_precision_eager), slices=4)
    again = run(x, mixer, impl="triton")
    assert all(torch.equal(got[name], again[name]) for name in got)


class Whole:
    """Arguments of `m2rnn::fused_scan_conv` as slices of one projection, and the composition of it in any dtype."""

    def __init__(
        self,
        B: int = 2,
        T: int = 70,
        N: int = 4,
        K: int = 64,
        V: int = 16,
        Nq: int = 1,
        Ng: int | None = None,
        width: int = 4,
        dtype: torch.dtype = BF16,
        forget: str = "decay",
        activation: str = "silu",
        norm: str = "all",
        D: bool = True,
        gate: bool = True,
        h0: bool = False,
        conv: bool = True,
    ) -> None:
        made = torch.Generator("cuda").manual_seed(3)
        draw = lambda *shape: torch.randn(*shape, generator=made, device="cuda")
        C, Ng = (Nq + 1) * K + N * V, Ng or N
        x = draw(B, T, C + N + Ng * V + -(C + N + Ng * V) % 64).to(dtype)
        self.dtype, self.sizes, self.options = dtype, [Nq, 1, N, K, V], (forget, activation, norm, 1e-5)
        decay = forget == "decay"
        self.qkv, self.weight = x[..., :C], (0.5 * draw(C, width)).to(dtype) if conv else None
        self.rest: list[Tensor | None] = [
            x[..., C : C + N],
            (torch.eye(V, device="cuda") + 0.1 * draw(N, V, V)).to(dtype),
            draw(N) if decay else None,
            draw(N) - 3 if decay else None,
            (1 + 0.3 * draw(N, V)).to(dtype) if D else None,
            x[..., C + N : C + N + Ng * V].unflatten(-1, (Ng, V)) if gate else None,
            (1 + 0.3 * draw(N, V)).to(dtype) if norm != "none" else None,
            draw(B, N, K, V) if h0 else None,
            None,  # cu_seqlens
        ]

    def arguments(self) -> tuple[Any, ...]:
        return (self.qkv, self.weight, None, self.sizes, *self.rest, None, *self.options, name_of(self.dtype), "triton")

    def composed(self, dtype: torch.dtype, scan: Any = None) -> dict[str, Tensor]:
        low = lambda x: None if x is None else x.to(dtype)
        qkv = low(self.qkv) if self.weight is None else equations.conv_silu(low(self.qkv), low(self.weight), None)
        acc = torch.promote_types(dtype, FP32)
        f, W, A_log, dt_bias, D, g, norm_weight, h0, _ = self.rest
        forget, activation, norm, eps = self.options
        wide = [None if p is None else p.to(acc) for p in (A_log, dt_bias, h0)]
        o, state = compose(
            *fused_op.unpack(qkv, self.sizes), low(f), low(W), A_log=wide[0], dt_bias=wide[1], D=low(D), g=low(g),
            norm_weight=low(norm_weight), initial_state=wide[2], forget=forget, activation=activation, norm=norm,
            norm_eps=eps, impl="eager", scan=scan,
        )  # fmt: skip
        assert state is not None
        return {"y": o, "final_state": state}


WHOLE: dict[str, dict[str, Any]] = {
    "layer": dict(N=84, T=100),
    **{f"T {T}": dict(T=T) for T in (1, 2, 4, 5, 15, 16, 17, 33, 64)},
    "no conv": dict(N=12, conv=False),
    "g at 12 bytes": dict(N=6),
    "g at an odd offset": dict(N=3),
    "V 32, K 48": dict(K=48, V=32),
    "K 16, sigmoid, norm over V": dict(K=16, norm="head", activation="sigmoid"),
    "K 32, no D, no norm": dict(K=32, D=False, norm="none"),
    "no gate, two heads of q": dict(gate=False, norm="head", Nq=2),
    "fp16, two taps, initial state": dict(Ng=2, dtype=FP16, width=2, h0=True),
    "one tap, sigmoid forget": dict(N=8, Ng=4, width=1, forget="sigmoid"),
    "fp32: the other kernels": dict(dtype=FP32),
    "gelu: the other kernels": dict(activation="gelu"),
    "V 64: the other kernels": dict(V=64),
}


@pytest.mark.parametrize("case", WHOLE, ids=lambda c: c.replace(" ", "-"))
def test_whole(case: str) -> None:
    x = Whole(**WHOLE[case])
    o, state = torch.ops.m2rnn.fused_scan_conv(*x.arguments())
    eager = x.composed(x.dtype, low_precision_eager)
    assert_accurate({"y": o, "final_state": state}, x.composed(torch.float64), eager, slices=1)


def in_the_scan(x: Whole) -> Any:
    """By the scan's own kernel, or None where it does not take it."""
    from m2rnn_compile.lowering.triton.fused_inference import fused_scan_conv

    return fused_scan_conv(x.qkv, x.weight, None, x.sizes, *x.rest, *x.options, x.dtype)  # type: ignore[arg-type]


def test_which_cases_the_scan_s_own_kernel_takes() -> None:
    taken = {case for case, options in WHOLE.items() if in_the_scan(Whole(**options)) is not None}
    assert taken == {case for case in WHOLE if not case.endswith("the other kernels")}


def test_scans_shared_out_and_again_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """More scans than run at once: some begin in one program and end in another."""
    from m2rnn_compile.lowering.triton import fused_inference

    x = Whole(B=8, T=330, N=84)
    first = in_the_scan(x)
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(first, in_the_scan(x), strict=True))
    monkeypatch.setattr(fused_inference, "_shared_programs", lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(first, in_the_scan(x), strict=True))


def test_opcheck_of_the_whole() -> None:
    opcheck(torch.ops.m2rnn.fused_scan_conv.default, Whole().arguments())


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_conv(width: int, packed: bool, dtype: torch.dtype) -> None:
    T, C = 133, 1472
    x = torch.randn(2, T, C + 64, device="cuda").to(dtype)[..., :C]
    w, dy = torch.randn(C, width, device="cuda").to(dtype), torch.randn(2, T, C, device="cuda").to(dtype)
    position = torch.arange(T, device="cuda") % 50 if packed else None
    y, grads = {}, {}
    for name, kind in (("got", dtype), ("truth", torch.float64)):
        a, b = (x, w) if name == "got" else (x.to(kind), w.to(kind))
        f = torch.ops.m2rnn.conv_silu if name == "got" else equations.conv_silu
        g = torch.ops.m2rnn.conv_silu_backward if name == "got" else equations.conv_silu_backward
        y[name], grads[name] = f(a, b, position), g(dy.to(kind), a, b, position)
    for a, b in zip((y["got"], *grads["got"]), (y["truth"], *grads["truth"]), strict=True):
        assert (a.double() - b).norm() <= (4e-3 if dtype == BF16 else 1e-6) * b.norm()


# ---- compiled layers ------------------------------------------------------------------------------------------------


SETTINGS: dict[str, dict[str, Any]] = {
    "off": dict(enabled=False), "on": dict(), "prologue": dict(prologue=True), "tail": dict(conv=False),
}  # fmt: skip


def make_layer(dtype: torch.dtype = BF16) -> M2RNN:
    torch.manual_seed(0)
    layer = M2RNN(128, num_heads=12, device="cuda", dtype=dtype)
    assert layer.conv1d is not None
    torch.nn.init.normal_(layer.conv1d.weight, std=0.5)
    return layer


def values_and_gradients(fn: Any, layer: M2RNN, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = fn(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])]


def assert_as_near_as(*runs: tuple[list[Tensor], list[Tensor], list[Tensor]], alone: float = 1000) -> None:
    """Runs of (got, eager, truth): at most twice eager's error and one eps of the dtype, as `assert_accurate` asks.

    Errors are pooled over the runs where a result has fewer numbers than `alone`: one draw of a gradient of twelve can
    be off, or eager's lucky, by chance. Larger results are judged run by run.
    """
    pooled = lambda norms: torch.stack(norms).norm()
    for i, x in enumerate(runs[0][0]):
        if len(runs) > 1 and x.numel() >= alone:
            for got, eager, truth in runs:
                assert_as_near_as(([got[i]], [eager[i]], [truth[i]]))
            continue
        error = pooled([(got[i].double() - truth[i]).norm() for got, _, truth in runs])
        allowed = 2 * pooled([(eager[i].double() - truth[i]).norm() for _, eager, truth in runs])
        allowed += torch.finfo(x.dtype).eps * pooled([truth[i].norm() for _, _, truth in runs])
        assert error <= allowed + 1e-12, (tuple(x.shape), error, allowed)


def in_fp64(layer: M2RNN, x: Tensor) -> list[Tensor]:
    import copy

    wide = copy.deepcopy(layer).double()
    wide.impl = "eager"
    return values_and_gradients(wide, wide, x.double())


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_layer(setting: str, dtype: torch.dtype) -> None:
    """Training and inference, two lengths, nothing compiled a third time."""
    from torch._dynamo.testing import CompileCounterWithBackend

    enable_fusion(**{"enabled": True, **SETTINGS[setting]})
    layer = make_layer(dtype)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    training, inference = [], []
    for T in (70, 130, 33):
        x = torch.randn(2, T, 128, device="cuda", dtype=dtype)
        eager, truth = values_and_gradients(layer, layer, x), in_fp64(layer, x)
        training.append((values_and_gradients(compiled, layer, x), eager, truth))
        with torch.no_grad():
            inference.append(([compiled(x)], eager[:1], truth[:1]))
    assert_as_near_as(*training)
    assert_as_near_as(*inference)
    assert counter.frame_count <= 4  # static and dynamic, with and without a backward


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["on", "tail"])
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes(mode: str, setting: str) -> None:
    """New inputs through captured graphs: nothing stale."""
    enable_fusion(True, **SETTINGS[setting])
    layer = make_layer()
    compiled = torch.compile(layer, mode=mode, fullgraph=True)
    training, inference = [], []
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(2, 70, 128, device="cuda", dtype=BF16)
        truth, eager = in_fp64(layer, x), values_and_gradients(layer, layer, x)
        torch.compiler.cudagraph_mark_step_begin()
        training.append(([t.clone() for t in values_and_gradients(compiled, layer, x)], eager, truth))
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            inference.append(([compiled(x).clone()], eager[:1], truth[:1]))
    for calls in (*training, *inference):  # nothing of another call's
        for a, _, t in zip(*calls, strict=True):
            assert a.numel() < 1000 or (a.double() - t).norm() <= 0.1 * t.norm()
    assert_as_near_as(*training)
    assert_as_near_as(*inference)


@pytest.mark.parametrize("setting", ["on", "tail"])
def test_inference_launches(setting: str) -> None:
    """How many kernels run between the two products (the first pads the weight in front of them)."""
    from torch.profiler import ProfilerActivity, profile

    enable_fusion(True, **SETTINGS[setting])
    hook.RECORDS.clear()
    layer, x = make_layer(), torch.randn(2, 512, 128, device="cuda", dtype=BF16)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        compiled(x)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            compiled(x)
            torch.cuda.synchronize()
    names = [e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [n for n in names if not n.startswith("Mem")]
    assert any("scan_forward" in n for n in kernels), kernels
    products = [i for i, n in enumerate(kernels) if "nvjet" in n or "gemm" in n.lower() or "cutlass" in n]
    between = kernels[products[0] + 1 : products[-1]]
    assert len(between) <= {"on": 3, "tail": 4}[setting], between


def test_off_is_bit_for_bit_the_opaque_op(monkeypatch: pytest.MonkeyPatch) -> None:
    # Inductor times configurations of a reduction against each other, and they add in different orders. And the first
    # compilation of a process fuses a backward otherwise than later ones, with the same settings: that one is dropped.
    monkeypatch.setattr(torch._inductor.config, "deterministic", True)
    enable_fusion(False)
    layer, x = make_layer(), torch.randn(2, 70, 128, device="cuda", dtype=BF16)

    def compiled(**options: Any) -> list[Tensor]:
        torch._dynamo.reset()
        with torch._inductor.config.patch(force_disable_caches=True, **options):
            return values_and_gradients(torch.compile(layer, fullgraph=True), layer, x)

    compiled()
    off, never = compiled(), compiled(pre_grad_custom_pass=None)
    assert all(torch.equal(a, b) for a, b in zip(off, never, strict=True))


# ---- export ---------------------------------------------------------------------------------------------------------


LOAD = """
import sys, torch
import m2rnn_compile
model = torch._inductor.aoti_load_package(sys.argv[1])
for x, y in torch.load(sys.argv[2]):
    got = model(x)
    assert (got - y).norm() <= 1e-4 * y.norm(), (got - y).norm() / y.norm()
print("agrees", flush=True)
"""


@pytest.mark.slow
def test_aot_inductor_package_in_another_process(tmp_path: Path) -> None:
    """That process imports this library, which registers the op; the kernels are Triton's and compile there."""
    layer = make_layer(FP32).eval()
    B, T = torch.export.Dim("B"), torch.export.Dim("T")
    x = torch.randn(3, 40, 128, device="cuda")
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: B, 1: T}})
        pairs = [(x, layer(x)), (x[:2, :33].contiguous(), layer(x[:2, :33].contiguous()))]
    with torch._inductor.config.patch({"cpp.cxx": (None, compiler(tmp_path))}):
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
    torch.save(pairs, tmp_path / "io.pt")
    command = [sys.executable, "-X", "faulthandler", "-c", LOAD, str(path), str(tmp_path / "io.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agrees" in done.stdout


def test_export_and_a_stateful_step() -> None:
    from tests.export.helpers import Stateful

    layer = make_layer(FP32).eval()
    B = torch.export.Dim("B")
    x = torch.randn(3, 6, 128, device="cuda")
    with torch.no_grad():
        program = torch.export.export(
            Stateful(layer), (x[:, :1], *layer.init_cache(3)), dynamic_shapes=({0: B}, {0: B}, {0: B})
        )
        step, cache, ys = program.module(), tuple(layer.init_cache(2)), []
        for t in range(6):
            y, *cache = step(x[:2, t : t + 1], *cache)
            ys.append(y)
        torch.testing.assert_close(torch.cat(ys, 1), layer(x[:2]), atol=1e-4, rtol=1e-3)
