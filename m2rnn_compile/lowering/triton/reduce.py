# SPDX-License-Identifier: Apache-2.0
"""Add partials in a fixed order: over blocks of rows, and over the heads of the result that share an input head."""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .config import next_power_of_2


class Sum(NamedTuple):
    """out[b, t_first + t, m] = Σ over blocks and g of part[block, b, t, m·G + g], each of D elements.

    With `scale` and `plus`, scale[m] · plus[b, t_first + t, m] is added to it, before the one rounding.
    """

    part: Tensor  # [blocks, B, window, heads · G, D], contiguous but for its first axis
    out: Tensor  # [B, T, heads, D], contiguous or columns of a contiguous [B, T, P]
    G: int
    blocks: int
    scale: Tensor | None = None  # [heads, D], contiguous
    plus: Tensor | None = None  # [B, T, heads, D], as `out`


@triton.jit
def _add(
    part_ptr, out_ptr, scale_ptr, plus_ptr, places_ptr, program, rows, inner, heads_in, T, t_first, block_rows, gap,
    plus_gap,
    BLOCKS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr,
    UNIT: tl.constexpr, PLUS: tl.constexpr, PLUS_UNIT: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """BR rows of the output: (b, t, m) with t inside the window; `inner` = window · heads_in of them per batch element.

    For every block, BG of G heads at once: many loads in flight, for this only moves bytes. Where it comes out even,
    programs take the batch at one time after the other, for backward wrote the first times last and the L2 cache still
    has them. What was read once can leave it.

    PLACED: the partials are of slots of time instead of batch elements; places_ptr has each slot's first step and the
    number of its steps.
    """
    of_sequence = inner // BR
    if of_sequence * BR == inner:
        B = rows // inner
        program = program % B * of_sequence + program // B
    r = program.to(tl.int64) * BR + tl.arange(0, BR)
    g = tl.arange(0, BG)
    d = tl.arange(0, BD)
    total = tl.zeros((BR, BG, BD), tl.float32)
    at = part_ptr + (r * (G * D))[:, None, None] + (g * D)[None, :, None] + d[None, None, :]
    here = r < rows
    if PLACED:
        b = r // inner
        own = r - b * inner
        t = tl.load(places_ptr + b * 2, mask=r < rows, other=0)
        here = own < tl.load(places_ptr + b * 2 + 1, mask=r < rows, other=0) * heads_in
    in_row = here[:, None, None] & (d < D)[None, None, :]
    # Counted in rows of D elements, not in elements: so the compiler knows that loads stay aligned at any T.
    block_stride = block_rows.to(tl.int64) * D
    for block in tl.static_range(BLOCKS):
        for first in tl.static_range(0, G, BG):
            mask = in_row & (g < G - first)[None, :, None]
            x = tl.load(at + (block * block_stride + first * D), mask=mask, other=0.0, eviction_policy="evict_first")
            total += x.to(tl.float32)
    if not PLACED:
        b = r // inner
        own = r - b * inner
        t = b * T + t_first
    out_row = t * heads_in + own
    mask = here[:, None] & (d < D)[None, :]
    result = tl.sum(total, 1)
    at_dense = (out_row * D)[:, None] + d[None, :]
    step = t + own // heads_in
    # Columns beside these in a step are counted in units, for the sake of alignment.
    if PLUS:
        scale = tl.load(scale_ptr + (own % heads_in * D)[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        plus_at = at_dense + (step * plus_gap * PLUS_UNIT)[:, None]
        result += scale * tl.load(plus_ptr + plus_at, mask=mask, other=0.0).to(tl.float32)
    out_at = at_dense + (step * gap * UNIT)[:, None]
    tl.store(out_ptr + out_at, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "inner", "heads_in", "T", "t_first", "block_rows", "gap", "plus_gap"])
def reduce_kernel(
    part_ptr, out_ptr, scale_ptr, plus_ptr, rows, inner, heads_in, T, t_first, block_rows, gap, plus_gap,
    A: tl.constexpr,
):  # fmt: skip
    """One sum."""
    _add(
        part_ptr, out_ptr, scale_ptr, plus_ptr, part_ptr, tl.program_id(0), rows, inner, heads_in, T, t_first,
        block_rows, gap, plus_gap, A[0], A[1], A[2], A[3], A[4], A[5], A[6], A[7], A[8], A[9],
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "T", "t_first",
        "a_last", "a_rows", "a_inner", "a_heads", "a_stride", "a_gap", "a_pgap",
        "b_last", "b_rows", "b_inner", "b_heads", "b_stride", "b_gap", "b_pgap",
        "c_last", "c_rows", "c_inner", "c_heads", "c_stride", "c_gap", "c_pgap",
        "d_rows", "d_inner", "d_heads", "d_stride", "d_gap", "d_pgap",
    ]
)  # fmt: skip
def reduce_four_kernel(
    places_ptr, T, t_first,
    a_ptr, a_out, a_scale, a_plus, a_last, a_rows, a_inner, a_heads, a_stride, a_gap, a_pgap,
    b_ptr, b_out, b_scale, b_plus, b_last, b_rows, b_inner, b_heads, b_stride, b_gap, b_pgap,
    c_ptr, c_out, c_scale, c_plus, c_last, c_rows, c_inner, c_heads, c_stride, c_gap, c_pgap,
    d_ptr, d_out, d_scale, d_plus, d_rows, d_inner, d_heads, d_stride, d_gap, d_pgap,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Four sums in one launch, so that one fills the GPU while another ends: programs up to a_last take the first."""
    p = tl.program_id(0)
    if p < a_last:
        _add(
            a_ptr, a_out, a_scale, a_plus, places_ptr, p, a_rows, a_inner, a_heads, T, t_first,
            a_stride, a_gap, a_pgap, A[0], A[1], A[2], A[3], A[4], A[5], A[6], A[7], A[8], A[9],
        )  # fmt: skip
    elif p < b_last:
        _add(
            b_ptr, b_out, b_scale, b_plus, places_ptr, p - a_last, b_rows, b_inner, b_heads, T, t_first,
            b_stride, b_gap, b_pgap, B[0], B[1], B[2], B[3], B[4], B[5], B[6], B[7], B[8], B[9],
        )  # fmt: skip
    elif p < c_last:
        _add(
            c_ptr, c_out, c_scale, c_plus, places_ptr, p - b_last, c_rows, c_inner, c_heads, T, t_first,
            c_stride, c_gap, c_pgap, C[0], C[1], C[2], C[3], C[4], C[5], C[6], C[7], C[8], C[9],
        )  # fmt: skip
    else:
        _add(
            d_ptr, d_out, d_scale, d_plus, places_ptr, p - c_last, d_rows, d_inner, d_heads, T, t_first,
            d_stride, d_gap, d_pgap, D[0], D[1], D[2], D[3], D[4], D[5], D[6], D[7], D[8], D[9],
        )  # fmt: skip


def pitch(x: Tensor) -> int:
    """Elements between two positions of x, columns of a contiguous [B, T, P]. A dimension of size 1 has any stride."""
    return x.stride(1) if x.shape[1] > 1 else x.stride(0)


def _gap(out: Tensor, width: int) -> tuple[int, int]:
    """(columns beside `out` in a step of the tensor it is part of, in units; elements of a unit, 0 without any)."""
    columns = pitch(out) - width
    if columns == 0 or out.shape[0] * out.shape[1] < 2:
        return 0, 0
    unit = math.gcd(columns, 16)
    return columns // unit, unit


def _split(
    s: Sum, window: int, warps: int | None, slots: int | None = None
) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """(programs, warps, numbers, constants) of a sum; a program has some 1024 elements a warp and load."""
    B, heads = slots or s.out.shape[0], s.out.shape[2]
    D = s.out.shape[3] if s.out.dim() == 4 else 1
    rows, BD = B * window * heads, next_power_of_2(D)
    # Measured on an H200: few warps with many loads in flight each (docs/kernel-notes.md).
    BG = min(next_power_of_2(s.G), 32)
    if warps is None:
        warps = 1 if BG * BD >= 1024 else 4
    BR = 1 if BG * BD >= 1024 else min(1024, 1024 * warps // (BG * BD))
    gap, unit = _gap(s.out, heads * D)
    plus_gap, plus_unit = (0, 0) if s.plus is None else _gap(s.plus, heads * D)
    numbers = (rows, window * heads, heads, s.part.stride(0) // D if s.blocks > 1 else 0, gap, plus_gap)
    constants = (s.blocks, s.G, D, BR, BG, BD, unit, int(s.plus is not None), plus_unit, int(slots is not None))
    return triton.cdiv(rows, BR), warps, numbers, constants


def _pointers(s: Sum) -> tuple[Tensor, ...]:
    return s.part, s.out, s.part if s.scale is None else s.scale, s.part if s.plus is None else s.plus


def add(s: Sum, window: int, t_first: int) -> None:
    """One sum over a window of time."""
    programs, warps, (rows, inner, heads, *strides), shape = _split(s, window, None)
    if programs:
        reduce_kernel[(programs,)](
            *_pointers(s), rows, inner, heads, s.out.shape[1], t_first, *strides, A=shape, num_warps=warps
        )


def add_all(sums: list[Sum], window: int, t_first: int, places: Tensor | None = None) -> None:
    """All of at most four sums over the same window in one launch.

    With `places` [slots, 2] the window is one of packed sequences (`packed_windows.py`): partials are
    [blocks, 1, slots · window, heads · G, D], and each slot of `window` steps has a time of its own.
    """
    split = [_split(s, window, 1, None if places is None else places.shape[0]) for s in sums]
    last, arguments, constants = 0, [], []
    for s, (programs, _, numbers, shape) in zip(sums, split, strict=True):
        last += programs
        arguments += [*_pointers(s), last, *numbers]
        constants.append(shape)
    for _ in range(4 - len(sums)):  # never reached: no program is beyond the last
        arguments += arguments[-11:]
        constants.append(constants[-1])
    del arguments[-7]  # the fourth ends with the grid
    if last:
        reduce_four_kernel[(last,)](
            sums[0].part if places is None else places, sums[0].out.shape[1], t_first, *arguments,
            **dict(zip("ABCD", constants, strict=True)), num_warps=1,
        )  # fmt: skip
