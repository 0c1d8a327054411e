# SPDX-License-Identifier: Apache-2.0
"""Properties that hold at every shape and every way of sharing heads, at shapes that hypothesis picks; all in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m2rnn_compile import m2rnn, m2rnn_step
from m2rnn_compile.testing import ScanInputs, make_inputs, oracle, run
from tests.ops.helpers import IMPLS, leaves

TOLERANCE = dict(rtol=1e-11, atol=1e-11)  # fp64: sums of at most a few thousand terms of order one
SHARED = ("q", "k", "v", "f")
PROPERTY = settings(max_examples=25)


@st.composite
def scans(draw: st.DrawFn, max_T: int = 70, packed: bool | None = None) -> ScanInputs:
    """A scan of random shape: no rows, no steps, one of everything, odd K and V, lengths on both sides of a chunk."""
    N = draw(st.sampled_from([1, 2, 3, 4, 6]))
    heads = st.sampled_from([n for n in (1, 2, 3, 4, 6) if N % n == 0])
    shape: dict[str, Any] = {f"N{x}": draw(heads) for x in "qkvfw"}
    shape[f"N{draw(st.sampled_from('qkvfw'))}"] = N  # N is the largest number of heads that any of them has
    T = draw(st.one_of(st.integers(0, 9), st.sampled_from([63, 64, 65, max_T])))
    seqlens = None
    if draw(st.booleans()) if packed is None else packed:
        cuts = sorted(draw(st.lists(st.integers(0, T), max_size=4)))
        seqlens = [b - a for a, b in zip([0, *cuts], [*cuts, T], strict=True)]  # empty and repeated ones among them
    return make_inputs(
        1 if seqlens is not None else draw(st.integers(0, 3)), T, N, draw(st.integers(1, 9)), draw(st.integers(1, 9)),
        **shape, dtype=torch.float64, seed=draw(st.integers(0, 99)), seqlens=seqlens,
        initial_state=draw(st.booleans()), dfinal_state=draw(st.booleans()),
        state_grad_clip=draw(st.sampled_from([None, 0.0, 0.1, 1.0, float("inf")])),
    )  # fmt: skip


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("impl", IMPLS)
@given(x=scans())
@PROPERTY
def test_every_result_and_gradient_is_the_oracle_s(impl: str, x: ScanInputs) -> None:
    assert_same(run(x, impl=impl), oracle(x))


@pytest.mark.parametrize("impl", IMPLS)
@given(x=scans())
@PROPERTY
def test_sharing_is_repeating(impl: str, x: ScanInputs) -> None:
    """Head n reads head n // (N / Nx) of x: the same as every head with a copy of its own, whose gradients add up."""
    shared = leaves(x)
    q, k, v, f, W = shared[:5]
    N = x.dy.shape[2]
    own = [t.repeat_interleave(N // t.shape[2], 2) for t in (q, k, v, f)] + [W.repeat_interleave(N // W.shape[0], 0)]
    rest = dict(cu_seqlens=x.cu_seqlens, state_grad_clip=x.state_grad_clip, impl=impl)
    h0 = shared[5] if x.initial_state is not None else None
    results = [m2rnn(*args, initial_state=h0, **rest) for args in (shared[:5], own)]
    torch.testing.assert_close(results[0], results[1], **TOLERANCE)
    grads = [torch.autograd.grad(r.y, shared, x.dy) for r in results]
    torch.testing.assert_close(grads[0], grads[1], **TOLERANCE)


@pytest.mark.parametrize("impl", IMPLS)
@given(x=scans(packed=False), cut=st.integers(0, 70))
@PROPERTY
def test_two_scans_in_a_row_are_one(impl: str, x: ScanInputs, cut: int) -> None:
    """Prefill in pieces, and truncated time: values and, with the state's gradient handed back, every gradient."""
    cut = min(cut, x.q.shape[1])
    args = leaves(x)
    h0 = args[5] if x.initial_state is not None else None
    rest = dict(state_grad_clip=x.state_grad_clip, impl=impl)
    whole = m2rnn(*args[:5], initial_state=h0, **rest)
    first = m2rnn(*(t[:, :cut] for t in args[:4]), args[4], initial_state=h0, **rest)
    second = m2rnn(*(t[:, cut:] for t in args[:4]), args[4], initial_state=first.final_state, **rest)
    y = torch.cat([first.y, second.y], 1)
    torch.testing.assert_close((y, second.final_state), (whole.y, whole.final_state), **TOLERANCE)
    torch.testing.assert_close(
        torch.autograd.grad(y, args, x.dy, allow_unused=True),
        torch.autograd.grad(whole.y, args, x.dy, allow_unused=True),
        **TOLERANCE,
    )


@pytest.mark.parametrize("impl", IMPLS)
@given(x=scans(max_T=9, packed=False))
@PROPERTY
def test_steps_are_a_scan(impl: str, x: ScanInputs) -> None:
    want = m2rnn(*leaves(x)[:5], initial_state=x.initial_state, impl=impl)
    state = x.initial_state
    for t in range(x.q.shape[1]):
        y, state = m2rnn_step(*(getattr(x, n)[:, t] for n in SHARED), x.W, initial_state=state, impl=impl)
        torch.testing.assert_close(y, want.y[:, t].detach(), **TOLERANCE)
    if state is not None:
        torch.testing.assert_close(state, want.final_state.detach(), **TOLERANCE)


@pytest.mark.parametrize("impl", IMPLS)
@given(x=scans())
@PROPERTY
def test_the_output_dtype_and_layout_are_those_promised(impl: str, x: ScanInputs) -> None:
    x = x.to(torch.bfloat16)
    y, final = m2rnn(x.q, x.k, x.v, x.f, x.W, cu_seqlens=x.cu_seqlens, state_grad_clip=x.state_grad_clip, impl=impl)
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    assert y.is_contiguous()
    assert final.is_contiguous()
