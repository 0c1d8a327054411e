# SPDX-License-Identifier: Apache-2.0
"""The kernels of the fused scan on the CPU, under Triton's interpreter, against the fp64 composition.

Run by `test_fused_kernels.py` in a process of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from m2rnn_compile import m2rnn_fused
from m2rnn_compile.lowering.triton import fused as lowering
from m2rnn_compile.ops import fused as op
from m2rnn_compile.ops import registry
from m2rnn_compile.testing import assert_accurate, low_precision_eager
from tests.fusion.composed import CASES, compose, make_fused, run


@pytest.fixture(autouse=True)
def _on_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ops take the Triton lowering for CPU tensors, with poisoned memory."""
    monkeypatch.setitem(
        registry.IMPLEMENTATIONS, "triton", registry.IMPLEMENTATIONS["triton"]._replace(devices=("cpu",))
    )
    new_empty = Tensor.new_empty

    def poisoned(x: Tensor, *size: Any, **options: Any) -> Tensor:
        made = new_empty(x, *size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


SIZES: dict[str, dict[str, Any]] = {
    "heads of the paper": dict(N=3, K=64, V=16, T=17),
    "two blocks of rows": dict(N=2, K=40, V=5, T=9),
    "one block": dict(N=2, K=16, V=16, T=9),
}


@pytest.mark.parametrize(
    "case,dtype", [(case, torch.float32) for case in CASES] + [(case, torch.bfloat16) for case in ("layer", "packed")]
)
def test_each_composition(case: str, dtype: torch.dtype) -> None:
    x = make_fused(
        **{**CASES[case], "B": 1, "T": 32} | (dict(seqlens=[12, 0, 20]) if case == "packed" else {}), K=20, dtype=dtype
    )
    truth = run(x.to(torch.float64), compose, impl="reference")
    assert_accurate(run(x, m2rnn_fused, impl="triton"), truth, run(x, compose, scan=low_precision_eager), slices=1)


@pytest.mark.parametrize("size", SIZES)
def test_each_size(size: str) -> None:
    x = make_fused(B=2, **CASES["layer"], **SIZES[size])
    truth = run(x.to(torch.float64), compose, impl="reference")
    assert_accurate(run(x, m2rnn_fused, impl="triton"), truth, run(x, compose, scan=low_precision_eager), slices=1)


@pytest.mark.parametrize("norm", ["none", "head", "all"])
def test_tail_backward_for_any_number_of_programs(norm: str) -> None:
    """Also strided and broadcast gradients, and heads over several tiles."""
    B, T, N, V = 2, 7, 300, 16
    draw = lambda *shape: torch.randn(*shape)
    if norm == "all":
        N = 20
    y, v, D, g = (
        draw(B, T, N, V),
        draw(B, V, T, N).permute(0, 2, 3, 1),
        draw(N, V),
        draw(B, T, N // 2, V + 3)[..., 2:-1],
    )
    w = draw(N, V) if norm != "none" else None
    _, rstd = op.tail(y, v, D, g, w, "silu", norm, 1e-5, torch.float32)
    for do in (draw(B, T, V, N).transpose(2, 3), draw(1, 1, 1, 1).expand(B, T, N, V)):
        truth = op.tail_backward(
            do.double(), y.double(), v.double(), D.double(), g.double(), None if w is None else w.double(),
            rstd.double(), "silu", norm,
        )  # fmt: skip
        for programs in (1, 3, 1000):
            got = lowering.fused_tail_backward(do, y, v, D, g, w, rstd, "silu", norm, programs=programs)
            for a, b in zip(got, truth, strict=True):
                torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)


def test_inference_writes_no_y() -> None:
    x = make_fused(**CASES["layer"], K=40)
    with torch.no_grad():
        o, _ = m2rnn_fused(**x.tensors, **x.options, impl="triton")
    expected, _ = compose(**x.tensors, **x.options)
    torch.testing.assert_close(o, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("T", [0, 1])
def test_short(T: int) -> None:
    x = make_fused(**CASES["layer"], T=T)
    got, expected = run(x, m2rnn_fused, impl="triton"), run(x, compose)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-4)


def test_g_at_an_odd_offset() -> None:
    """As in the layer: a slice of a projection, aligned to fewer than 16 bytes."""
    x = make_fused(**CASES["layer"], V=4)
    g = x.tensors["g"]
    wide = torch.cat([torch.randn(*g.shape[:2], 7), g.flatten(2), torch.randn(*g.shape[:2], 3)], -1)
    view = wide[..., 7:-3].unflatten(-1, g.shape[2:])
    assert lowering._aligned_base(view)[1] == 3
    a, _ = m2rnn_fused(**{**x.tensors, "g": view}, **x.options, impl="triton")
    b, _ = m2rnn_fused(**x.tensors, **x.options, impl="triton")
    assert torch.equal(a, b)


def test_what_does_not_fit_is_refused() -> None:
    x = make_fused(**CASES["layer"], N=300, V=33, K=1, T=1)
    with pytest.raises(ValueError, match="norm over all N·V features takes up to 16384"):
        m2rnn_fused(**x.tensors, **x.options, impl="triton")


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_conv_kernels(width: int, packed: bool) -> None:
    """Several programs in time and channels, rows further apart than C, and sequences shorter than the taps."""
    from m2rnn_compile.lowering.triton import conv as kernels
    from m2rnn_compile.ops import conv as equations

    B, T, C = 1 if packed else 2, 21, 37
    x, w, dy = torch.randn(B, T, C + 5)[..., 2:-3], torch.randn(C, width), torch.randn(B, T, C)
    position = torch.cat([torch.arange(n) for n in (1, 2, 8, 10)]) if packed else None
    got = kernels.conv_silu(x, w, position, steps=8, channels=16)
    torch.testing.assert_close(got, equations.conv_silu(x.double(), w.double(), position).float())
    truth = equations.conv_silu_backward(dy.double(), x.double(), w.double(), position)
    for a, b in zip(kernels.conv_silu_backward(dy, x, w, position, steps=8, channels=16), truth, strict=True):
        torch.testing.assert_close(a, b.float())
    assert kernels.conv_silu(x[:, :0], w, None).shape == (B, 0, C)
    assert kernels.conv_silu_backward(dy[:, :0], x[:, :0], w, None)[1].abs().sum() == 0


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("forget", ["decay", "sigmoid", "none"])
def test_what_stands_in_front_of_the_scan(width: int, forget: str) -> None:
    """Several programs in time, channels that fill none, slices of a wider tensor; either part alone."""
    from m2rnn_compile.lowering.triton.prologue import before_scan
    from m2rnn_compile.ops import conv as equations

    B, T, C, N = 2, 21, 150, 5
    wide = torch.randn(B, T, C + N + 4)
    x, f, w = wide[..., :C], wide[..., C + 1 : C + 1 + N], torch.randn(C, width)
    gate = (torch.randn(N), torch.randn(N) - 3) if forget == "decay" else (None, None)
    y, factor = before_scan(x, w, f, *gate, forget, steps=8)
    torch.testing.assert_close(y, equations.conv_silu(x.double(), w.double(), None).float())
    expected = op.prologue(f.double(), *(None if p is None else p.double() for p in gate), forget, torch.float64)
    torch.testing.assert_close(factor, expected.float(), atol=0, rtol=1e-6)
    nothing, alone = before_scan(None, None, f, *gate, forget, steps=8)
    assert nothing is None
    assert torch.equal(alone, factor)


@pytest.mark.parametrize("weight", [True, False])
def test_norm_in_place(weight: bool) -> None:
    from m2rnn_compile.lowering.triton.fused_tail import norm_kernel

    x, w = torch.randn(7, 48), torch.randn(48) if weight else None
    expected = torch.nn.functional.rms_norm(x.double(), (48,), None if w is None else w.double(), 1e-3)
    norm_kernel[(4,)](x, x if w is None else w, 7, 1e-3, F=48, HAS_W=weight, BF=64, ROWS=2)
    torch.testing.assert_close(x, expected.float())
