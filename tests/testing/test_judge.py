# SPDX-License-Identifier: Apache-2.0
"""The judge is what the other tests lean on: it must not let anything pass by accident."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from m2rnn_compile.testing import assert_accurate, compare

EPS = torch.finfo(torch.float32).eps
TRUTH = {
    "y": torch.randn(2, 64, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    "dW": torch.randn(3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
}
EAGER = {name: (x * (1 + 10 * EPS)).float() for name, x in TRUTH.items()}  # wrong by ten roundings everywhere


def judged(change: Callable[[dict[str, Tensor]], None], eager: dict[str, Tensor] = EAGER) -> str:
    """What the judge says of the truth rounded to fp32 and then changed; empty if nothing."""
    got = {name: x.float() for name, x in TRUTH.items()}
    change(got)
    try:
        assert_accurate(got, TRUTH, eager)
    except AssertionError as verdict:
        return str(verdict)
    return ""


def test_twice_the_error_of_the_eager_run_passes_and_more_does_not() -> None:
    def off_by(roundings: float) -> Callable[[dict[str, Tensor]], None]:
        return lambda got: got.update(dW=(TRUTH["dW"] * (1 + roundings * EPS)).float())

    assert not judged(off_by(20))
    assert "dW [all]" in judged(off_by(23))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_element_that_is_not_finite_never_passes(value: float) -> None:
    assert "y [all]" in judged(lambda got: got["y"][1, 40, 2, 3].fill_(value))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_eager_run_that_is_not_finite_sets_no_bar_that_anything_passes(value: float) -> None:
    broken = {**EAGER, "dW": EAGER["dW"].clone()}
    broken["dW"][0, 0, 0] = value
    assert "dW [all]" in judged(lambda got: None, broken)
    assert "dW [all]" in judged(lambda got: got["dW"].zero_(), broken)


def test_a_late_error_is_caught_by_its_slice_where_the_whole_would_hide_it() -> None:
    def late(got: dict[str, Tensor]) -> None:
        got["y"][:, -1] *= 1 + 100 * EPS

    got = {name: x.float() for name, x in TRUTH.items()}
    late(got)
    verdicts = {row.slice: row.ok for row in compare(got, TRUTH, EAGER) if row.name == "y"}
    assert verdicts.pop("t 56:64") is False
    assert all(verdicts.values())
    assert len(verdicts) == 8  # the whole, and the other seven slices
    assert judged(late).count("\n") == 1


def test_one_rounding_passes_even_where_the_eager_run_is_exact() -> None:
    exact = {name: x.clone() for name, x in TRUTH.items()}
    assert not judged(lambda got: None, exact)
    assert judged(lambda got: got.update(y=(TRUTH["y"] * (1 + 2 * EPS)).float()), exact)
    coarse = {name: x.bfloat16() for name, x in TRUTH.items()}
    assert_accurate(coarse, TRUTH, exact)  # the allowance is that of the result's own dtype


def test_where_the_truth_is_zero_only_the_eager_run_gives_room() -> None:
    truth, zero = {"dq": torch.zeros(1, 8, 1, 3).double()}, {"dq": torch.zeros(1, 8, 1, 3)}
    tiny, huge = ({"dq": torch.full((1, 8, 1, 3), value)} for value in (1e-30, 1e30))
    assert_accurate(zero, truth, zero)
    assert_accurate(tiny, truth, tiny)
    for wrong, eager in ((tiny, zero), (huge, tiny)):
        with pytest.raises(AssertionError, match="dq"):
            assert_accurate(wrong, truth, eager)


@pytest.mark.parametrize("name", TRUTH)
def test_a_wrong_shape_is_not_broadcast(name: str) -> None:
    """With every head alike, a result of one head would compare equal to the truth."""
    alike = {n: x[..., :1].expand_as(x).clone() for n, x in TRUTH.items()}
    got = {n: x.float() for n, x in alike.items()}
    assert_accurate(got, alike, got)
    got[name] = got[name][..., :1]
    with pytest.raises(AssertionError, match=rf"{name} \[shape: got \("):
        assert_accurate(got, alike, {n: x.float() for n, x in alike.items()})
    got[name] = got[name][:0]
    assert not all(row.ok for row in compare(got, alike, {n: x.float() for n, x in alike.items()}))


def test_a_missing_result_is_an_error() -> None:
    with pytest.raises(KeyError, match="dW"):
        judged(lambda got: got.pop("dW"))


def test_empty_tensors_and_sequences_shorter_than_the_slices_are_judged_as_a_whole() -> None:
    empty = {"y": torch.zeros(2, 0, 3, 5)}
    assert all(row.ok for row in compare(empty, empty, empty))
    short = {"y": TRUTH["y"][:, :5]}
    (row,) = compare(short, short, short)
    assert (row.slice, row.error) == ("all", 0.0)
    assert math.isfinite(row.allowed)
