# SPDX-License-Identifier: Apache-2.0
"""The backward kernels of the fused mixer under Triton's interpreter, against the fp64 composition.

Run by `test_fused_kernels.py` in a process of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import opcheck

pytest.importorskip("triton")

from m2rnn_compile.lowering.triton.fused_mixer import gate_backward
from m2rnn_compile.ops import fused as op
from m2rnn_compile.testing import assert_accurate, low_precision_eager
from tests.fusion.composed import run
from tests.fusion.interpreted_fused import _on_cpu_tensors  # noqa: F401  (a fixture: used by being here)
from tests.fusion.mixing import ORDERS, arguments, composed_mixer, make_mixer, mixer

# Where kernels take other ways: rows in one block or two, v at an odd offset, no convolution, packed sequences.
LAYOUTS: dict[str, dict[str, Any]] = {
    "as the layer": dict(case="layer", N=3, K=40, V=16, T=17),
    "one block of rows": dict(case="layer", N=2, K=16, V=16, T=9),
    "no conv": dict(case="layer", taps=None, N=3, K=20, V=16, T=9),
    "no conv, odd columns": dict(case="layer", taps=None, order="turned", N=3, K=5, V=3, T=9),
    "six taps, which the convolution's kernel does not have": dict(case="layer", taps=6, N=2, K=16, V=16, T=9),
    "shared heads": dict(case="shared heads", K=20),
    "packed": dict(case="packed", T=32, seqlens=[12, 0, 20]),
    "no D, norm per head": dict(case="no D"),
    "sigmoid forget, no norm": dict(case="sigmoid forget"),
    "nothing": dict(case="nothing"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout(layout: str, dtype: torch.dtype) -> None:
    x = make_mixer(**LAYOUTS[layout], dtype=dtype)
    truth = run(x.to(torch.float64), composed_mixer, impl="reference")
    eager = run(x, composed_mixer, scan=low_precision_eager)
    got = run(x, mixer, impl="triton")
    if dtype == torch.float32:  # a few roundings of fp32 apart, by their order: the rule is for errors that matter
        for name in truth:
            torch.testing.assert_close(got[name].double(), truth[name].double(), atol=2e-5, rtol=1e-4)
    else:
        assert_accurate(got, truth, eager, slices=1)


@pytest.mark.parametrize("order", ORDERS)
def test_every_column_is_written(order: str) -> None:
    """Memory is poisoned: what a kernel leaves out stays nan. Columns of no use get zero."""
    x = make_mixer("layer", order=order, T=7)
    dx = run(x, mixer, impl="triton")["dx"]
    expected = run(x, composed_mixer)["dx"]
    assert dx.isfinite().all()
    assert torch.equal(dx == 0, expected == 0)


def test_a_gradient_of_the_state_alone() -> None:
    x = make_mixer("layer")
    grads = []
    for fn, more in ((mixer, dict(impl="triton")), (composed_mixer, {})):
        leaves = {n: t.detach().requires_grad_() for n, t in x.tensors.items()}
        state = fn(**leaves, **x.options, **more)[1]
        found = torch.autograd.grad(state, list(leaves.values()), x.dfinal_state, allow_unused=True)
        grads.append([torch.zeros_like(t) if d is None else d for t, d in zip(leaves.values(), found, strict=True)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_results_share_no_memory() -> None:
    x = make_mixer("layer", B=1, N=2, K=16, V=16, T=5)
    args = arguments(**{n: t.detach() for n, t in x.tensors.items()}, **x.options, impl="triton")
    _, _, *kept = torch.ops.m2rnn.fused_mixer(*args)
    _, _, forget, activation, norm, _, _, chunk, impl = args[10:]
    given = (*args[:11], *kept, args[11], forget, activation, norm, chunk, impl)
    opcheck(torch.ops.m2rnn.fused_mixer.default, args)
    opcheck(torch.ops.m2rnn.fused_mixer_backward.default, (x.do, x.dfinal_state, *given))


@pytest.mark.parametrize("T", [0, 1])
def test_short(T: int) -> None:
    x = make_mixer("layer", T=T)
    got, expected = run(x, mixer, impl="triton"), run(x, composed_mixer)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("forget", ["decay", "sigmoid", "none"])
def test_the_gate_over_several_programs(forget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from m2rnn_compile.lowering.triton import fused_mixer

    monkeypatch.setattr(fused_mixer, "GATE_ELEMENTS", 16)
    monkeypatch.setattr(fused_mixer, "GATE_PROGRAMS_PER_MULTIPROCESSOR", 5)
    B, T, N = 3, 11, 5
    wide, into = torch.randn(B, T, N + 4), torch.full((B, T, N + 6), torch.nan)
    x, dx, df = wide[..., 2:-2], into[..., 1 : 1 + N], torch.randn(B, T, N)
    gate = (torch.randn(N), torch.randn(N) - 3) if forget == "decay" else (None, None)
    sums = gate_backward(df, x, *gate, forget, dx)
    wide_gate = (None if p is None else p.double() for p in gate)
    expected, *expected_sums = op.prologue_backward(df.double(), x.double(), *wide_gate, forget)
    torch.testing.assert_close(dx.double(), expected, atol=1e-6, rtol=1e-5)
    for a, b in zip(sums, expected_sums, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)
    assert into[..., 0].isnan().all()
    assert into[..., 1 + N :].isnan().all()
