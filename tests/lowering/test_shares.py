# SPDX-License-Identifier: Apache-2.0
"""How scans are shared out among programs: the arithmetic, which needs no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from m2rnn_compile.lowering.triton import _shared_programs
from m2rnn_compile.lowering.triton.config import shared_programs
from m2rnn_compile.lowering.triton.shares import share


def pieces(programs: int, scans: int, units: int) -> list[list[tuple[int, int, int]]]:
    """(scan, first unit, last unit) of every program, in the order in which it walks them, as the kernels do."""
    result = []
    for p in range(programs):
        first, last = share.fn(p, programs, scans * units)
        walked = []
        for scan in range((last - 1) // units, first // units - 1, -1):
            walked.append((scan, max(first, scan * units) - scan * units, min(last, (scan + 1) * units) - scan * units))
        result.append(walked)
    return result


CASES = [(8, 13, 1), (8, 13, 4), (8, 8, 4), (1056, 1344, 128), (1056, 1344, 18), (528, 672, 128), (7, 100, 3)]


@pytest.mark.parametrize(("programs", "scans", "units"), CASES)
def test_every_unit_is_walked_once_and_shares_are_equal(programs: int, scans: int, units: int) -> None:
    walked = [(s, u) for program in pieces(programs, scans, units) for s, a, b in program for u in range(a, b)]
    assert sorted(walked) == [(s, u) for s in range(scans) for u in range(units)]
    lengths = {sum(b - a for _, a, b in program) for program in pieces(programs, scans, units)}
    assert max(lengths) - min(lengths) <= 1


def test_no_time_is_not_shared_out() -> None:
    """A share is counted in chunks of a scan, of which there are none then."""
    v = torch.empty(8, 0, 84, 16, device="meta")
    assert _shared_programs(v, 1344, 2, 16) is None


@pytest.mark.parametrize(("programs", "scans", "units"), CASES)
def test_what_a_program_waits_for_comes_first_in_the_program_before_it(programs: int, scans: int, units: int) -> None:
    """So a program that runs waits only for one that was started before it and that waits for nothing itself."""
    plan = pieces(programs, scans, units)
    for p, program in enumerate(plan):
        for scan, a, _ in program:
            if a > 0:
                assert plan[p - 1][0] == (scan, 0, a), "its beginning is in one piece, and is the first of that program"


@pytest.mark.parametrize(("programs", "scans", "units"), [c for c in CASES if c[2] > 4])
def test_nothing_is_waited_for_in_vain(programs: int, scans: int, units: int) -> None:
    """With equal speeds a beginning is there before the program that finishes the scan comes to it."""
    plan = pieces(programs, scans, units)
    for p, program in enumerate(plan):
        at = 0
        for _, a, b in program:
            if a > 0:
                assert a <= at + 1, f"program {p} begins it at {at}, when {p - 1} is busy until {a}"
            at += b - a


def test_scans_are_shared_only_where_there_are_more_than_run_at_once() -> None:
    assert shared_programs(1344, 1, 16, 132, True) == 1056
    assert shared_programs(672, 2, 16, 132, True) == 528
    assert shared_programs(1056, 1, 16, 132, True) is None
    assert shared_programs(1344, 1, 16, 132, False) is None
    assert shared_programs(1344, 1, 32, 132, True) is None
