# SPDX-License-Identifier: Apache-2.0
"""The scan's kernels in Gluon, forward and backward, without a GPU: emulated on CPU tensors (`emulated_scan.py`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from m2rnn_compile.lowering import triton as lowering
from m2rnn_compile.testing import make_inputs, oracle, run_low_precision
from tests.lowering import emulated_gluon
from tests.lowering.emulated_scan import GRADIENTS, check, emulate, emulate_kernels


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate_kernels(monkeypatch, wide=False)


CASES: dict[str, dict[str, Any]] = {
    "a chunk and a bit": dict(B=2, T=37, N=2, K=32, V=16, initial_state=True, state_grad_clip=0.5),
    "two blocks of rows, V 32": dict(B=1, T=34, N=2, K=64, V=32, state_grad_clip=0.2),
    "rows that fill no block": dict(B=1, T=21, N=2, K=48, V=16, initial_state=True),
    "every input its own heads": dict(B=1, T=12, N=4, K=32, V=16, Nq=2, Nk=4, Nv=4, Nf=1, Nw=2),
    "packed, with an empty one": dict(B=1, T=70, N=2, K=32, V=16, seqlens=[33, 0, 1, 36], initial_state=True),
}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.replace(" ", "-"))
def test_values_and_gradients(case: str) -> None:
    check(make_inputs(**CASES[case], dtype=torch.bfloat16, seed=5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("forward", "backward"), [((16, 1), 16), ((32, 2), 32), ((64, 1), 32), ((64, 2), 16), ((64, 4), 64)]
)
def test_every_split_of_rows(forward: tuple[int, int], backward: int, dtype: torch.dtype) -> None:
    check(make_inputs(1, 19, 4, 64, 16, dtype=dtype, initial_state=True, seed=6), forward=forward, backward=backward)


@pytest.mark.parametrize("T", [1, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33])
def test_lengths_around_groups_and_stages(T: int) -> None:
    check(make_inputs(1, T, 8, 16, 16, dtype=torch.bfloat16, initial_state=True, seed=T), forward=(16, 1), backward=16)


@pytest.mark.parametrize("programs", [1, 2, 3, 5])
def test_scans_shared_out_and_windows_of_time_do_not_change_a_bit(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = make_inputs(2, 100, 3, 32, 16, dtype=torch.bfloat16, initial_state=True, state_grad_clip=0.5, seed=7)
    undivided = emulate(x)
    monkeypatch.setattr(lowering, "_shared_programs", lambda *_: programs)
    for window_bytes in (2**30, 1):
        shared = emulate(x, window_bytes=window_bytes)
        assert all(torch.equal(undivided[n], shared[n]) for n in undivided)


@pytest.mark.parametrize("window_bytes", [1, 90_000])
def test_windows_of_packed_sequences_do_not_change_a_bit(window_bytes: int) -> None:
    """One chunk a window, and windows of several in which programs are left without a walk."""
    seqlens = [33, 0, 100, 1, 70]
    x = make_inputs(1, sum(seqlens), 2, 64, 16, dtype=torch.bfloat16, seqlens=seqlens, initial_state=True,
                    state_grad_clip=0.5, seed=7)  # fmt: skip
    whole, parts = emulate(x), emulate(x, window_bytes=window_bytes)
    assert all(torch.equal(whole[n], parts[n]) for n in whole)


def test_without_dy() -> None:
    x = make_inputs(1, 20, 2, 32, 16, dtype=torch.bfloat16, initial_state=True, seed=8)
    zero = emulate(dataclasses.replace(x, dy=torch.zeros_like(x.dy)))
    none = emulate(dataclasses.replace(x, dy=None))
    assert all(torch.equal(zero[n], none[n]) for n in GRADIENTS)


def test_a_gradient_of_the_final_state_goes_far_back() -> None:
    """Slow gates, no dy: what is left is the product of all factors (1-f)(1-Z²), whose roundings add up."""
    x = make_inputs(1, 130, 4, 64, 16, dtype=torch.bfloat16, initial_state=True, seed=0)
    x = dataclasses.replace(x, dy=torch.zeros_like(x.dy))
    got, truth, eager = emulate(x), oracle(x, impl="eager"), run_low_precision(x)
    error, eager_error = (float((r["dinitial_state"].double() - truth["dinitial_state"]).norm()) for r in (got, eager))
    assert error < 1.4 * eager_error  # 1.01 and, at V = 64, 1.15; with 1-f and 1-Z² rounded by themselves 1.6 and 1.8


FAULTS = {
    "what a product is added to, dropped": ("mma_v2", lambda a, b, acc: a.float() @ b.float()),
    "the clip left out": ("clamp", lambda x, c, one: x),
    "the wrong step of eight": ("only_step_at", lambda y, first, u, BV: y * (torch.arange(8) == 7 - u)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_seeded_on_purpose_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_inputs(1, 33, 2, 32, 16, dtype=torch.bfloat16, initial_state=True, state_grad_clip=0.05, seed=9)
    name, wrong = FAULTS[fault]
    monkeypatch.setitem(emulated_gluon.REPLACED, name, wrong)
    with pytest.raises(AssertionError):
        check(x)
