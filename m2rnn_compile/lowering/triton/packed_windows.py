# SPDX-License-Identifier: Apache-2.0
"""Which chunks of packed sequences each window of backward walks, decided on the device.

A window of an unpacked batch is a slice of time. Sequences packed along time have it one after the other, so a slice
of the packed axis would hold one or two of them, and the others' programs would wait. Instead every chunk of every
sequence is counted by its distance from its sequence's end,

    the last chunks of all sequences, the chunks before those, ...

and a window is the next `slots` of that list: all sequences are walked at once, each backwards, for as long as they
last. A chunk has a slot of C steps in the window's partial sums.

`cu_seqlens` is never read back: the host knows no more than T and the number of sequences, which bound the number of
chunks. All below is torch on the device, in shapes that follow from these two.
"""

from __future__ import annotations

import torch
from torch import Tensor


def windows_of(cu_seqlens: Tensor, T: int, C: int, slots: int) -> tuple[Tensor, Tensor]:
    """(walks [windows, programs, 4] int32, places [windows, slots, 2] int64).

    A walk is (sequence, its first chunk, the end of its chunks, the slot of the first): chunks of one sequence are in
    consecutive slots. A place is (time of its first step, number of steps). Unused ones have no chunks and no steps.
    """
    S = cu_seqlens.shape[0] - 1
    most = T // C + S  # chunks: each sequence has at most one that is not full
    windows = -(-most // slots)
    starts = cu_seqlens[:-1].long().clamp(0, T)
    lengths = cu_seqlens[1:].long().clamp(0, T) - starts
    chunks = (lengths.clamp(min=0) + (C - 1)) // C
    ends = chunks.cumsum(0)

    x = torch.arange(windows * slots, device=cu_seqlens.device)
    used = x < ends[-1]
    s = torch.searchsorted(ends, x, right=True).clamp(max=S - 1)
    chunk = x - (ends - chunks)[s]
    from_end = torch.where(used, chunks[s] - 1 - chunk, T + 1)  # those that are none come last
    window = torch.empty_like(x)
    window[(from_end * S + s).argsort()] = x // slots
    # By window, sequence and time, which is the order within a sequence already: so no key is larger than that.
    order = (window * S + s).argsort(stable=True)
    s, chunk, used = (z[order].view(windows, slots) for z in (s, chunk, used))

    time = chunk * C
    places = torch.stack([starts[s] + time, torch.where(used, (lengths[s] - time).clamp(max=C), 0)], 2)
    slot = torch.arange(slots, device=s.device).expand(windows, slots)
    begins = used.clone()
    begins[:, 1:] &= s[:, 1:] != s[:, :-1]
    # The end of a walk is where the next one begins, or where the used slots end.
    after = torch.where(begins, slot, used.sum(1, keepdim=True))
    after = torch.cat([after[:, 1:], used.sum(1, keepdim=True)], 1).flip(1).cummin(1).values.flip(1)
    walks = torch.where(begins[..., None], torch.stack([s, chunk, chunk + after - slot, slot], 2), 0)
    first = begins.int().argsort(dim=1, descending=True, stable=True)[:, : min(S, slots)]
    return walks.gather(1, first[..., None].expand(-1, -1, 4)).int(), places
