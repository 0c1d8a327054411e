# SPDX-License-Identifier: Apache-2.0
"""The plan of backward's windows over packed sequences: every chunk once, from ends to beginnings, all at once."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton")

from torch._subclasses.fake_tensor import FakeTensorMode

from m2rnn_compile.lowering.triton.packed_windows import windows_of


def check(seqlens: list[int], C: int, slots: int, dtype: torch.dtype) -> None:
    cu_seqlens = torch.tensor([0, *seqlens], dtype=dtype).cumsum(0).to(dtype)
    T, S = sum(seqlens), len(seqlens)
    walks, places = windows_of(cu_seqlens, T, C, slots)
    windows = -(-(T // C + S) // slots)
    assert walks.shape == (windows, min(S, slots), 4)
    assert places.shape == (windows, slots, 2)
    left = [-(-n // C) for n in seqlens]  # chunks that are still to be walked
    for walk, place in zip(walks.tolist(), places.tolist(), strict=True):
        before, written = list(left), {}
        for s, first, end, slot in walk:
            if first == end:
                assert first == 0
                continue
            assert end == left[s], "a sequence is walked from its end"
            left[s] = first
            for c in range(first, end):
                time, steps = place[slot + c - first]
                assert time == int(cu_seqlens[s]) + c * C
                assert steps == min(C, seqlens[s] - c * C) > 0
                assert written.setdefault(slot + c - first, s) == s
        assert [j for j, (_, steps) in enumerate(place) if steps] == sorted(written), "a sum of what nobody wrote"
        # No sequence waits for another: all that have chunks left go as far as each other, but for one chunk.
        done = [b - a for b, a in zip(before, left, strict=True) if a > 0]
        assert not done or max(done) - min(done) <= 2, (before, left)
    assert not any(left), "chunks that no window walks"


@pytest.mark.parametrize("seed", range(60))
def test_every_chunk_is_walked_once_and_no_sequence_waits_for_another(seed: int) -> None:
    draw = random.Random(seed)
    C = draw.choice([4, 32, 64])
    lengths = lambda: draw.choice([0, 1, C - 1, C, C + 1, draw.randint(0, 6 * C)])
    seqlens = [lengths() for _ in range(draw.randint(1, 9))]
    check(seqlens, C, draw.randint(1, 12), draw.choice([torch.int32, torch.int64]))


def test_lengths_are_not_read_back() -> None:
    """A fake tensor has no values: reading one, which on a GPU would wait for it, is an error."""
    with FakeTensorMode():
        walks, places = windows_of(torch.empty(6, dtype=torch.int32), 1000, 32, 7)
    assert walks.shape == (6, 5, 4)
    assert places.shape == (6, 7, 2)


@pytest.mark.parametrize("values", [[-5, 400, 70], [50, 0, 50], [2**31 - 1, -(2**31), 0], [0, 50, 0]])
def test_broken_cu_seqlens_stay_inside_of_all_tensors(values: list[int]) -> None:
    T, C, slots = 50, 4, 3
    walks, places = windows_of(torch.tensor(values, dtype=torch.int32), T, C, slots)
    s, first, end, slot = walks.unbind(2)
    assert ((s >= 0) & (s < 2)).all()
    assert ((slot >= 0) & (end >= first) & (slot + end - first <= slots)).all()
    time, steps = places.unbind(2)
    assert ((steps >= 0) & (steps <= C)).all()
    assert ((steps == 0) | ((time >= 0) & (time + steps <= T))).all()
