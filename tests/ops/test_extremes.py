# SPDX-License-Identifier: Apache-2.0
"""Values and gradients at the edges: saturation, gates of 0 and 1, large W, what is not finite, mixed dtypes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from m2rnn_compile import m2rnn
from m2rnn_compile.testing import ScanInputs, make_inputs, oracle, run
from tests.ops.helpers import IMPLS, leaves


def extreme() -> ScanInputs:
    """Steps that saturate tanh, keep the state, replace it, and a W that multiplies it by more than one."""
    x = make_inputs(2, 66, 4, 5, 6, Nq=2, dtype=torch.float64, seed=11, initial_state=True)
    x.W.mul_(2)
    assert torch.linalg.matrix_norm(x.W, ord=2).min() > 1.5
    x.k[:, 10:13] *= 1e6
    x.f[:, 5:8], x.f[:, 20:25] = 0, 1
    x.f[0, 64:] = 1  # across a chunk's edge
    return x


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("c", [None, 0.1])
def test_saturation_gates_of_zero_and_one_and_large_weights(impl: str, c: float | None) -> None:
    x = dataclasses.replace(extreme(), state_grad_clip=c)
    got, want = run(x, impl=impl), oracle(x)
    assert all(t.isfinite().all() for t in want.values())
    assert not want["dv"][:, 10:13].any()  # the derivative of a saturated tanh is zero, not NaN
    assert not want["dk"][:, 20:25].any()  # f = 1: nothing of the step enters the state
    for name, truth in want.items():
        # The state is not contracted, so roundings grow: relative to the largest element, not to each.
        scale = float(truth.abs().max())
        torch.testing.assert_close(got[name], truth, rtol=0, atol=1e-10 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("used", ["y", "final_state"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_one_result_used_without_the_other(impl: str, used: str, packed: bool) -> None:
    """A gradient that is absent is a gradient of zero."""
    seqlens = [65, 0, 10] if packed else None
    x = make_inputs(1 if packed else 2, 75, 4, 3, 5, Nq=2, dtype=torch.float64, seqlens=seqlens, initial_state=True)
    args, want = leaves(x), leaves(x)
    options = dict(cu_seqlens=x.cu_seqlens, state_grad_clip=0.3)
    result = getattr(m2rnn(*args[:5], initial_state=args[5], impl=impl, **options), used)
    y, final = m2rnn(*want[:5], initial_state=want[5], impl="reference", **options)
    dy, dh = (x.dy, torch.zeros_like(final)) if used == "y" else (torch.zeros_like(y), x.dfinal_state)
    result.backward(dy if used == "y" else dh)
    torch.autograd.backward([y, final], [dy, dh])
    for name, a, b in zip(x.named_inputs(), args, want, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"d{n}: {m}")
    assert args[1].grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_stride_zero(impl: str) -> None:
    """`y.sum().backward()` sends one number with strides of zero."""
    x = make_inputs(2, 9, 4, 3, 5, initial_state=True)
    args, dense = leaves(x), leaves(x)
    y, final = m2rnn(*args[:5], initial_state=args[5], impl=impl)
    (y.sum() + final.sum()).backward()
    y, final = m2rnn(*dense[:5], initial_state=dense[5], impl=impl)
    torch.autograd.backward([y, final], [torch.ones_like(y), torch.ones_like(final)])
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(args, dense, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["q", "k", "v", "f", "initial_state", "dy", "dfinal_state"])
def test_what_is_not_finite_stays_in_its_row(impl: str, value: float, where: str) -> None:
    x = make_inputs(2, 70, 4, 3, 5, Nq=2, seed=4, initial_state=True, state_grad_clip=1.0)
    clean = run(x, impl=impl)
    place = getattr(x, where)
    place[1][(0,) * (place.dim() - 1)] = value
    dirty = run(x, impl=impl)
    rows = [name for name in clean if name != "dW"]  # dW is a sum over all rows
    for name in rows:
        assert torch.equal(clean[name][0], dirty[name][0]), name
    assert any(not torch.equal(clean[name][1], dirty[name][1]) for name in rows)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gate_weight_and_state_may_have_dtypes_of_their_own(impl: str, dtype: torch.dtype) -> None:
    """They are cast to the state's dtype, and each gradient comes back in the dtype of its input."""
    x = make_inputs(2, 9, 4, 3, 5, dtype=torch.float32, initial_state=True)
    mixed = dataclasses.replace(x, f=x.f.to(dtype), W=x.W.to(dtype), initial_state=x.initial_state.to(dtype))
    wide = dataclasses.replace(mixed, f=mixed.f.float(), W=mixed.W.float(), initial_state=mixed.initial_state.float())
    got, want = run(mixed, impl=impl), run(wide, impl=impl)
    assert (got["y"].dtype, got["final_state"].dtype) == (torch.float32, torch.float32)
    for name in want:
        expected = want[name].to(dtype) if name in ("df", "dW", "dinitial_state") else want[name]
        assert got[name].dtype == expected.dtype, name
        assert torch.equal(got[name], expected), name


@pytest.mark.parametrize("impl", [p for p in IMPLS if p != "eager"])
def test_torch_s_precision_switch_changes_no_bit(impl: str) -> None:
    x, before = make_inputs(2, 70, 4, 16, 16, seed=2), torch.get_float32_matmul_precision()
    results: list[dict[str, Tensor]] = []
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            results.append(run(x, impl=impl))
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
