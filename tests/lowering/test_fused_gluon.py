# SPDX-License-Identifier: Apache-2.0
"""What the scan kernels in Gluon compute, without a GPU: emulated on CPU tensors, against the fp64 composition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton.experimental.gluon")

from m2rnn_compile.lowering import triton as lowering
from m2rnn_compile.lowering.triton import fused_inference, gluon
from m2rnn_compile.lowering.triton.config import LaunchConfig
from m2rnn_compile.lowering.triton.forward_fused_gluon import scan_forward_fused_kernel
from m2rnn_compile.lowering.triton.forward_gluon import scan_forward_gluon_kernel
from m2rnn_compile.ops.conv import conv_silu
from m2rnn_compile.ops.fused import prologue
from m2rnn_compile.ops.reference import expand_heads
from tests.lowering.emulated_gluon import Emulated


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_inference, "forward_fused_kernel", lambda: Emulated(scan_forward_fused_kernel))
    monkeypatch.setattr(lowering, "forward_gluon_kernel", lambda: Emulated(scan_forward_gluon_kernel))
    monkeypatch.setattr(fused_inference, "norm_kernel", None)  # a Triton kernel: `interpreted_fused.py` has it
    new_empty = Tensor.new_empty

    def poisoned(x: Tensor, *size: Any, **options: Any) -> Tensor:
        made = new_empty(x, *size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def share_out(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    for module in (fused_inference, lowering):
        monkeypatch.setattr(module, "_shared_programs", lambda *_: programs)


def inputs(
    T: int, B: int = 1, N: int = 2, K: int = 32, V: int = 16, Nq: int = 1, Ng: int = 2, width: int = 4, extra: int = 4
) -> dict[str, Tensor]:
    """As slices of one projection, like the layer's; `extra` columns move g off its 16 bytes."""
    C = (Nq + 1) * K + N * V
    wide = C + extra + Ng * V
    x = torch.randn(B, T, wide + -wide % 16).bfloat16()
    f = torch.rand(B, T, N)
    return dict(
        x=x[..., :C], g=x[..., C + extra : wide].unflatten(-1, (Ng, V)), f=f,
        taps=0.5 * torch.randn(C, width), W=(torch.eye(V).repeat(N, 1, 1) + 0.1 * torch.randn(N, V, V)).bfloat16(),
        D=torch.randn(N, V), weight=1 + 0.3 * torch.randn(N, V), h0=torch.randn(B, N, K, V),
    )  # fmt: skip


def parts(x: Tensor, N: int, K: int, V: int) -> list[Tensor]:
    q, k, v = x.split([x.shape[-1] - K - N * V, K, N * V], -1)
    return [q.unflatten(-1, (-1, K)), k.unflatten(-1, (1, K)), v.unflatten(-1, (N, V))]


def scan64(q: Tensor, k: Tensor, v: Tensor, f: Tensor, W: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor]:
    tensors = [t.double() for t in (q, k, v, f, W)]
    y, state, _ = torch.ops.m2rnn.scan(*tensors, None if h0 is None else h0.double(), None, None, 0, "eager")
    return y, state


def assert_near(got: Tensor, expected: Tensor) -> None:
    """Within what rounding of operands to bf16 gives; a wrong index is off by the size of the values themselves."""
    assert (got.double() - expected).norm() <= 0.02 * expected.norm()
    torch.testing.assert_close(got.double(), expected, atol=0.15, rtol=0.05)


@pytest.mark.parametrize("programs", [None, 3])
@pytest.mark.parametrize("config", [LaunchConfig(32, 1), LaunchConfig(32, 2)], ids=str)
def test_the_emulation_on_the_scan_s_own_kernel(
    config: LaunchConfig, programs: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That kernel is tested on a GPU, so this tests the emulation."""
    share_out(monkeypatch, programs)  # type: ignore[arg-type]
    d = inputs(70)
    q, k, v = parts(d["x"], 2, 32, 16)
    y, state, _ = lowering.scan(q, k, v, d["f"], d["W"], d["h0"], None, None, 0, config=config, gluon=True)
    y64, state64 = scan64(q, k, v, d["f"], d["W"], d["h0"])
    assert_near(y, y64)
    assert_near(state, state64)


def fused(d: dict[str, Tensor], N: int, K: int, V: int, *, D: bool, g: str, norm: str, conv: bool, h0: bool,
          **options: Any) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:  # fmt: skip
    """(o, state) of the kernel and of the composition."""
    q, k, v = parts(d["x"], N, K, V)
    if conv:
        q, k, _ = parts(conv_silu(d["x"].double(), d["taps"], None).bfloat16(), N, K, V)
    got = fused_inference.walk(
        q, k, v, d["f"], d["W"], d["h0"] if h0 else None, d["taps"][-N * V :] if conv else None,
        d["D"] if D else None, None if g == "none" else d["g"], d["weight"] if norm == "head" else None,
        g, norm, 1e-5, **options,
    )  # fmt: skip
    v = conv_silu(v.flatten(2).double(), d["taps"][-N * V :].double(), None).view(v.shape) if conv else v
    o, state = scan64(q, k, v, d["f"], d["W"], d["h0"] if h0 else None)
    if D:
        o = o + d["D"] * v
    if g != "none":
        gate = expand_heads(d["g"].double(), N, 2)
        o = o * (F.silu(gate) if g == "silu" else torch.sigmoid(gate))
    if norm == "head":
        o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * d["weight"]
    return got, (o, state)


def check(*args: Any, **options: Any) -> None:
    got, expected = fused(*args, **options)
    for a, b in zip(got, expected, strict=True):
        assert_near(a, b)


LAYER: dict[str, Any] = dict(D=True, g="silu", norm="none", conv=True, h0=False)


@pytest.mark.parametrize("T", [1, 2, 4, 5, 15, 16, 17, 31, 33, 50, 64, 65])
def test_lengths_around_groups_and_stages(T: int) -> None:
    check(inputs(T), 2, 32, 16, **LAYER)


@pytest.mark.parametrize("programs", [2, 3, 5])
@pytest.mark.parametrize("T", [33, 96, 100])
def test_scans_shared_out_give_the_same_bits(T: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    d = inputs(T, B=2, N=3, Ng=3)
    whole, _ = fused(d, 3, 32, 16, shared=False, **LAYER)
    share_out(monkeypatch, programs)
    pieces, _ = fused(d, 3, 32, 16, **LAYER)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no convolution": (dict(), dict(conv=False)),
    "initial state": (dict(), dict(h0=True)),
    "no D": (dict(), dict(D=False)),
    "no gate": (dict(), dict(g="none")),
    "sigmoid, norm over V": (dict(), dict(g="sigmoid", norm="head")),
    "one tap": (dict(width=1), dict()),
    "three taps": (dict(width=3), dict()),
    "heads of g shared": (dict(N=4, Ng=2), dict()),
    "two heads of q": (dict(Nq=2), dict()),
    "g at 12 bytes": (dict(extra=6), dict()),
    "g at an odd offset": (dict(extra=3), dict()),
    "g aligned": (dict(extra=0), dict()),
    "64 rows": (dict(K=64), dict()),
    "48 rows": (dict(K=48), dict(h0=True)),
    "16 rows, 32 columns": (dict(K=16, V=32), dict(norm="head")),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str) -> None:
    sizes, options = VARIANTS[variant]
    d = inputs(40, **sizes)
    check(d, sizes.get("N", 2), sizes.get("K", 32), sizes.get("V", 16), **{**LAYER, **options})


@pytest.mark.parametrize("config", [LaunchConfig(64, 1), LaunchConfig(64, 2), LaunchConfig(64, 4)], ids=str)
def test_any_number_of_warps(config: LaunchConfig) -> None:
    check(inputs(24, K=64), 2, 64, 16, **LAYER, config=config)


class NormInTorch:
    """In the place of `norm_kernel`, which Triton's interpreter tests (`interpreted_fused.py`)."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(x: Tensor, w: Tensor, rows: int, eps: float, *, F: int, HAS_W: bool, ROWS: int, **_: Any) -> None:
            assert grid[0] * ROWS >= rows
            flat = x.view(rows, F)
            flat.copy_(torch.nn.functional.rms_norm(flat.float(), (F,), w.flatten().float() if HAS_W else None, eps))

        return launch


def before_scan(x: Tensor | None, w: Tensor | None, f: Tensor, A_log: Any, dt_bias: Any, forget: str) -> Any:
    """Likewise."""
    factor = prologue(f, A_log, dt_bias, forget, torch.float32)
    return None if x is None or w is None else conv_silu(x, w, None), factor


@pytest.mark.parametrize("conv", [True, False])
@pytest.mark.parametrize("norm", ["all", "head"])
def test_the_whole_op(conv: bool, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From q | k | v in one tensor to o: how it is taken apart and put together."""
    monkeypatch.setattr(fused_inference, "before_scan", before_scan)
    monkeypatch.setattr(fused_inference, "norm_kernel", NormInTorch())
    monkeypatch.setattr(fused_inference, "gluon_unsupported", lambda *_: None)
    B, T, N, K, V = 2, 21, 4, 32, 16
    d = inputs(T, B, N, K, V, Nq=2, Ng=2)
    A_log, dt_bias, x_f = torch.randn(N), torch.randn(N) - 2, torch.randn(B, T, N)
    rest = (d["D"], d["g"], d["weight"], d["h0"], None)
    options = ("decay", "silu", norm, 1e-5)
    weight = d["taps"] if conv else None
    sizes = [2, 1, N, K, V]
    arguments = (x_f, d["W"], A_log, dt_bias, *rest)
    got = fused_inference.fused_scan_conv(d["x"], weight, None, sizes, *arguments, *options, torch.bfloat16)
    assert got is not None
    wide = [None if t is None else t.double() for t in (d["x"], weight, *arguments)]
    qkv = conv_silu(wide[0], wide[1], None) if conv else wide[0]
    expected = torch.ops.m2rnn.fused_scan_packed(qkv, sizes, *wide[2:], None, *options, "float64", 0, "eager")
    for a, b in zip(got, expected[:2], strict=True):
        assert_near(a, b)


@pytest.mark.parametrize(
    "change",
    [dict(cu_seqlens=torch.tensor([0, 8])), dict(position=torch.arange(8)), dict(activation="gelu"),
     dict(out_dtype=torch.float32), dict(K=128), dict(V=64), dict(dtype=torch.float32)],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_what_it_does_not_take_is_left_to_the_other_kernels(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_inference, "gluon_unsupported", gluon_unsupported_on_a_gpu)
    o = dict(cu_seqlens=None, position=None, activation="silu", out_dtype=torch.bfloat16, K=32, V=16) | change
    dtype = o.get("dtype", torch.bfloat16)
    N, K, V = 2, o["K"], o["V"]
    x = torch.randn(1, 8, 2 * K + N * V, dtype=dtype)
    done = fused_inference.fused_scan_conv(
        x, torch.randn(x.shape[2], 4), o["position"], [1, 1, N, K, V], torch.randn(1, 8, N), torch.randn(N, V, V),
        None, None, None, torch.randn(1, 8, N, V, dtype=dtype), None, None, o["cu_seqlens"],
        "none", o["activation"], "none", 1e-5, o["out_dtype"],
    )  # fmt: skip
    assert done is None


def gluon_unsupported_on_a_gpu(v: Tensor, K: int, chunk: int) -> str | None:
    monkey = pytest.MonkeyPatch()
    monkey.setattr(gluon, "_device_reason", lambda device: None)
    reason = gluon.gluon_unsupported(v, K, chunk)
    monkey.undo()
    return reason
