# SPDX-License-Identifier: Apache-2.0
"""The interface that every sequence mixer (M²RNN, attention, and those that join later) offers to a block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.validation import check_cu_seqlens_values

# A mixer's decode cache: a NamedTuple of tensors whose first dimension is the batch (packed: the sequence). Being a
# plain tuple of tensors it passes through torch.compile, torch.export and tree_map as it is.
Cache = Any


class SequenceMixer(nn.Module):
    """Sequence in, sequence out, with an optional functional cache; packed or left-padded.

    ``forward(x, *, cache=None, cu_seqlens=None, attention_mask=None)``:

    - ``x [B, T, D]`` gives ``y [B, T, D]``; with a ``cache`` it gives ``(y, new_cache)``. The cache that was passed in
      is never modified, so it can be kept, branched (`select_rows`) or replayed.
    - ``cu_seqlens [S + 1]`` (int32 or int64, from 0 to T, B = 1): S sequences packed along time that do not see each
      other.
    - ``attention_mask [B, T]`` (bool, or 0/1): False marks padding on the *left* of the tokens of this call, which
      may go on from a cache: a row of pads only is skipped. What x holds at pads never matters, NaN included.
    """

    def init_cache(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Cache:
        """An empty cache for `batch_size` sequences, in `dtype` (default: the parameters'), on `device`."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        *,
        cache: Cache | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Cache]:
        raise NotImplementedError

    def mixing_flops(self, context: int) -> int:
        """FLOPs of one token besides those of the projections, `context` tokens into its sequence.

        A multiply-add counts as two; pointwise work and the width-4 conv do not count.
        """
        raise NotImplementedError


def check_sizes(owner: str, **sizes: int) -> None:
    """Check that all sizes are at least 1.

    Raises:
        ValueError: naming the one that is not.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{owner}: `{name}` must be at least 1, got {size}")


def check_layout(owner: str, x: Tensor, width: int, cu_seqlens: Tensor | None, attention_mask: Tensor | None) -> None:
    """Check the arguments that all mixers share. Looks at metadata only, so it runs under `torch.compile`.

    Raises:
        TypeError, ValueError: naming the argument, what was got, what was expected and the way out.
    """
    if x.dim() != 3 or x.shape[2] != width:
        raise ValueError(f"{owner}: `x` must have shape [B, T, {width}], got {tuple(x.shape)}")
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError(
                f"{owner}: give either `cu_seqlens` (packed) or `attention_mask` (left-padded), got both; "
                "packed sequences need no padding"
            )
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{owner}: `cu_seqlens` must be int32 or int64, got {cu_seqlens.dtype}; cast it with .to()")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(f"{owner}: `cu_seqlens` must have shape [S + 1], S >= 1, got {tuple(cu_seqlens.shape)}")
        if x.shape[0] != 1:
            raise ValueError(
                f"{owner}: with `cu_seqlens` the batch must be 1, got `x` of shape {tuple(x.shape)}; "
                "flatten the batch into time: x.reshape(1, B * T, D)"
            )
    if attention_mask is not None and attention_mask.shape != x.shape[:2]:
        raise ValueError(
            f"{owner}: `attention_mask` must have shape [B, T] = {tuple(x.shape[:2])}, got "
            f"{tuple(attention_mask.shape)}; "
            "it covers the tokens of this call only, not those already in the cache"
        )


def zero_pads(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """x with zeros at pads: 0 times NaN is NaN, so what a pad holds must be gone before the first product."""
    return x if attention_mask is None else torch.where(attention_mask.to(torch.bool)[:, :, None], x, 0)


def select_rows(cache: Cache, rows: Tensor) -> Cache:
    """Reorder, repeat or drop batch rows of a cache (or any nest of caches): beam search, finished requests.

    Args:
        cache: a mixer's cache, or a model's tuple of them.
        rows: int64 indices of the rows to keep, in their new order.
    """
    return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.index_select(0, rows), cache)


def write_rows(pool: Cache, rows: Tensor, cache: Cache) -> None:
    """Write the rows of `cache` over rows of `pool`, in place: a prefilled request enters a pool, a slot is emptied.

    Args:
        pool: a mixer's cache of as many rows as there are slots, or a nest of them. Modified.
        rows: int64 indices of the slots, one a row of `cache`, each at most once.
        cache: of the same structure, with ``len(rows)`` rows; ``init_cache(len(rows))`` empties the slots.
    """
    write = lambda kept, new: kept.index_copy_(0, rows, new.to(kept.dtype))
    torch.utils._pytree.tree_map(write, pool, cache)


def check_rows(owner: str, name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    """Check the shape of one tensor of a cache.

    Raises:
        ValueError: naming what was got and expected.
    """
    if tuple(x.shape) != expected:
        raise ValueError(
            f"{owner}: `{name}` must have shape {expected} for this input, got {tuple(x.shape)}; a cache belongs to "
            "one layer and holds one row for each sequence: make it with init_cache(number of sequences)"
        )


def sequence_ids(cu_seqlens: Tensor, T: int) -> Tensor:
    """Which packed sequence each of the T steps belongs to, ``[T]`` int64; zero-length sequences own no step.

    Raises:
        ValueError: boundaries that do not run from 0 to T, or that go back (looked at where reading them is free: in
            eager mode on a CPU; the scan itself looks again).
    """
    if type(cu_seqlens) is Tensor and cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        check_cu_seqlens_values(cu_seqlens, T)
    steps = torch.arange(T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), steps, right=True)


def positions_in_sequence(cu_seqlens: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """(position of each of the T steps inside its sequence, id of its sequence), both ``[T]`` int64."""
    ids = sequence_ids(cu_seqlens, T)
    return torch.arange(T, device=cu_seqlens.device) - cu_seqlens.to(torch.int64)[ids], ids
