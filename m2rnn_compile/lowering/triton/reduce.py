# SPDX-License-Identifier: Apache-2.0
"""Add partials in a fixed order: over blocks of rows, and over the heads of the result that share an input head."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "inner", "T", "t_first", "blocks"])
def reduce_kernel(
    part_ptr, out_ptr, rows, inner, heads_in, T, t_first, blocks, block_stride,
    G: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[b, t_first + t, m, d] = Σ over blocks and g of part[block, b, t, m·G + g, d].

    Rows of the output are (b, t, m) with t inside the window; `inner` = window · heads_in of them per batch element.
    """
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    d = tl.arange(0, BD)
    mask = (r < rows)[:, None] & (d < D)[None, :]
    total = tl.zeros((BR, BD), tl.float32)
    at = part_ptr + (r * G * D)[:, None] + d[None, :]
    for block in range(0, blocks):
        for g in range(0, G):
            total += tl.load(at + block * block_stride + g * D, mask=mask, other=0.0).to(tl.float32)
    b = r // inner
    out_row = b * T * heads_in + t_first * heads_in + (r - b * inner)
    tl.store(out_ptr + (out_row * D)[:, None] + d[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)
