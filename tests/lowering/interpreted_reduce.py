# SPDX-License-Identifier: Apache-2.0
"""Sums of partials: over blocks of rows, and over heads that share an input, window by window; see `test_triton.py`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from m2rnn_compile.lowering.triton.reduce import Sum, add, add_all

B, T, T_FIRST, WINDOW = 2, 11, 3, 5


def made(heads: int, G: int, D: int | None, blocks: int, dtype: torch.dtype) -> tuple[Sum, Tensor]:
    """A sum over a window in the middle of time, its result poisoned, and what is to be in the result."""
    shape = (heads * G,) if D is None else (heads * G, D)
    part = torch.randn(blocks, B, WINDOW, *shape).to(dtype)
    out = torch.full((B, T, *([heads] if D is None else [heads, D])), float("nan"), dtype=dtype)
    want = out.clone()
    total = part.float().sum(0).unflatten(2, (heads, G)).sum(3)
    want[:, T_FIRST : T_FIRST + WINDOW] = total.to(dtype)
    return Sum(part, out, G, blocks), want


CASES = {
    "q of 84 heads": (1, 84, 64, 1),
    "v over blocks": (6, 1, 16, 2),
    "f over blocks": (6, 1, None, 4),
    "odd sizes": (3, 5, 20, 3),
    "a copy": (2, 1, 8, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_one(case: str, dtype: torch.dtype) -> None:
    s, want = made(*CASES[case], dtype)
    add(s, WINDOW, T_FIRST)
    torch.testing.assert_close(s.out, want, equal_nan=True)


@pytest.mark.parametrize("beside", [1, 6, 64])
@pytest.mark.parametrize("case", ["q of 84 heads", "v over blocks", "odd sizes"])
def test_columns_of_a_larger_tensor(case: str, beside: int) -> None:
    """Written to heads · D columns of [B, T, P]; the others stay as they are."""
    s, want = made(*CASES[case], torch.float32)
    heads, D = s.out.shape[2:]
    whole = torch.full((B, T, heads * D + beside), 3.0)
    first = beside // 2
    out = whole[..., first : first + heads * D].unflatten(-1, (heads, D)).copy_(s.out)
    for run in (add, lambda s, *window: add_all([s, s], *window)):
        run(s._replace(out=out), WINDOW, T_FIRST)
        torch.testing.assert_close(out, want, equal_nan=True)
        assert (whole[..., :first] == 3).all()
        assert (whole[..., first + heads * D :] == 3).all()
        out.fill_(torch.nan)


@pytest.mark.parametrize("beside", [0, 10])
def test_something_more_is_added(beside: int) -> None:
    s, want = made(*CASES["v over blocks"], torch.float32)
    scale, plus = torch.randn(6, 16), torch.randn(B, T, 6 * 16 + beside)[..., : 6 * 16].unflatten(-1, (6, 16))
    add(s._replace(scale=scale, plus=plus), WINDOW, T_FIRST)
    torch.testing.assert_close(s.out, want + scale * plus, equal_nan=True)


@pytest.mark.parametrize("case", ["q of 84 heads", "v over blocks", "odd sizes"])
def test_slots_of_time_go_where_each_belongs(case: str) -> None:
    """What lies past the steps of a slot is NaN here, and not to be read or written."""
    heads, G, D, blocks = CASES[case]
    places, C, T = [(7, 4), (0, 0), (3, 3), (11, 1), (0, 3)], 4, 12
    part = torch.full((blocks, 1, len(places) * C, heads * G, D), torch.nan)
    want, scale, plus = torch.full((1, T, heads, D), torch.nan), torch.randn(heads, D), torch.randn(1, T, heads, D)
    for slot, (t, steps) in enumerate(places):
        own = part[:, 0, slot * C : slot * C + steps].normal_()
        want[0, t : t + steps] = own.sum(0).unflatten(1, (heads, G)).sum(2) + scale * plus[0, t : t + steps]
    s = Sum(part, torch.full_like(want, torch.nan), G, blocks, scale, plus)
    add_all([s, s._replace(out=torch.empty_like(want))], C, 0, torch.tensor(places))
    torch.testing.assert_close(s.out, want, equal_nan=True)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_all_at_once_equal_one_by_one(count: int) -> None:
    torch.manual_seed(0)
    sums = [made(*CASES[case], torch.float32)[0] for case in list(CASES)[:count]]
    add_all(sums, WINDOW, T_FIRST)
    for s in sums:
        alone = s._replace(out=torch.full_like(s.out, float("nan")))
        add(alone, WINDOW, T_FIRST)
        assert torch.equal(alone.out.nan_to_num(7), s.out.nan_to_num(7))


def test_nothing_to_add() -> None:
    s, _ = made(1, 3, 4, 1, torch.float32)
    empty = Sum(s.part[:, :0], s.out[:0], 3, 1)
    add(empty, WINDOW, T_FIRST)
    add_all([empty, empty], WINDOW, T_FIRST)
