# SPDX-License-Identifier: Apache-2.0
"""Add partials in a fixed order: over blocks of rows, and over the heads of the result that share an input head."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "inner", "T", "t_first", "block_rows"])
def reduce_kernel(
    part_ptr, out_ptr, rows, inner, heads_in, T, t_first, block_rows,
    BLOCKS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[b, t_first + t, m, d] = Σ over blocks and g of part[block, b, t, m·G + g, d].

    Rows of the output are (b, t, m) with t inside the window; `inner` = window · heads_in of them per batch element.
    A program takes BR of them and, for every block, BG of G heads at once: many loads in flight, for this only moves
    bytes.
    """
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    g = tl.arange(0, BG)
    d = tl.arange(0, BD)
    total = tl.zeros((BR, BG, BD), tl.float32)
    at = part_ptr + (r * (G * D))[:, None, None] + (g * D)[None, :, None] + d[None, None, :]
    in_row = (r < rows)[:, None, None] & (d < D)[None, None, :]
    # Counted in rows of D elements, not in elements: so the compiler knows that loads stay aligned at any T.
    block_stride = block_rows.to(tl.int64) * D
    for block in tl.static_range(BLOCKS):
        for first in tl.static_range(0, G, BG):
            mask = in_row & (g < G - first)[None, :, None]
            total += tl.load(at + (block * block_stride + first * D), mask=mask, other=0.0).to(tl.float32)
    b = r // inner
    out_row = b * T * heads_in + t_first * heads_in + (r - b * inner)
    mask = (r < rows)[:, None] & (d < D)[None, :]
    tl.store(out_ptr + (out_row * D)[:, None] + d[None, :], tl.sum(total, 1).to(out_ptr.dtype.element_ty), mask=mask)
