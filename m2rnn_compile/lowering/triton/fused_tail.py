# SPDX-License-Identifier: Apache-2.0
"""What follows the scan, one pass forward and one backward: o = RMSNorm((y + D ⊙ v) · activation(g)).

    tail_forward_kernel    reads the partial sums of y, v and g of a position (b, t), all heads; writes o, and where a
                           backward follows y and 1/rms
    tail_backward_kernel   reads do, y, v and g of a position; writes dy and dg; keeps the sums over positions (dD, dw)
                           in registers and writes them once per program
    norm_kernel            the norm alone, in place: the scan of inference has done the rest (`forward_fused_gluon.py`)

A tile is [BN heads, BV columns] of one position. The norm over all heads needs all of them in one tile; otherwise a
grid axis walks the heads. A program takes ROWS positions, so that D and the norm's weight are loaded once for them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import exponential
from .math import multiple, tanh


@triton.jit
def logistic(x, FAST: tl.constexpr):
    """1 / (1 + exp(-x)). The fast exp errs by some 1e-6, far below 16 bits."""
    if FAST:
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        return tl.div_rn(1.0, 1.0 + exponential(-x))


@triton.jit
def activation(g, ACT: tl.constexpr, FAST: tl.constexpr):
    """(a(g), a'(g)). What is not used is not computed: the compiler drops it."""
    if ACT == "silu":
        s = logistic(g, FAST)
        return g * s, s * (1.0 + g * (1.0 - s))
    elif ACT == "sigmoid":
        s = logistic(g, FAST)
        return s, s * (1.0 - s)
    elif ACT == "gelu":
        p = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        return g * p, p + g * exponential(-0.5 * g * g) * 0.3989422804014327
    else:
        t = tanh(0.7978845608028654 * (g + 0.044715 * g * g * g), False)
        slope = 0.5 * g * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * g * g)
        return 0.5 * g * (1.0 + t), 0.5 * (1.0 + t) + slope


@triton.jit
def mean_square_of(x, F: tl.constexpr, V: tl.constexpr, NORM: tl.constexpr, BN: tl.constexpr):
    """Mean over what the norm takes together, for every head of the tile, [BN]."""
    per_head = tl.sum(x, 1)
    if NORM == "all":
        return tl.zeros((BN,), tl.float32) + tl.sum(per_head, 0) / F
    else:
        return per_head / V


@triton.jit(do_not_specialize=["rows", "T", "part_stride", "v_sb", "g_sb"])
def tail_forward_kernel(
    part_ptr, v_ptr, D_ptr, g_ptr, w_ptr, o_ptr, y_ptr, rstd_ptr,
    rows, T, eps, part_stride, v_sb, v_st, v_sh, v_se, g_sb, g_st, g_sh, g_se,
    N: tl.constexpr, V: tl.constexpr, Gv: tl.constexpr, Gg: tl.constexpr, BLOCKS: tl.constexpr,
    V_SHIFT: tl.constexpr, G_SHIFT: tl.constexpr,
    HAS_D: tl.constexpr, HAS_G: tl.constexpr, HAS_W: tl.constexpr, SAVE_Y: tl.constexpr, SAVE_RSTD: tl.constexpr,
    ACT: tl.constexpr, NORM: tl.constexpr, FAST: tl.constexpr,
    BN: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr, V_UNIT: tl.constexpr, G_UNIT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    e = tl.arange(0, BV)
    in_tile = (n < N)[:, None] & (e < V)[None, :]
    at = n[:, None] * V + e[None, :]
    if HAS_D:
        D = tl.load(D_ptr + at, mask=in_tile, other=0.0).to(tl.float32)
    if HAS_W:
        w = tl.load(w_ptr + at, mask=in_tile, other=0.0).to(tl.float32)
    v_at = (n // Gv)[:, None] * v_sh + e[None, :] * v_se + V_SHIFT
    g_at = (n // Gg)[:, None] * g_sh + e[None, :] * g_se + G_SHIFT
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i in range(ROWS):
        r = first + i
        b = r // T
        t = r - b * T
        in_rows = r + n * 0 < rows  # a block: the interpreter mixes no scalar into a mask
        mask = in_tile & in_rows[:, None]
        x = tl.load(part_ptr + r * (N * V) + at, mask=mask, other=0.0).to(tl.float32)
        for block in tl.static_range(1, BLOCKS):
            part = tl.load(part_ptr + block * multiple(part_stride, N * V) + r * (N * V) + at, mask=mask, other=0.0)
            x += part.to(tl.float32)
        if SAVE_Y:
            tl.store(y_ptr + r * (N * V) + at, x.to(y_ptr.dtype.element_ty), mask=mask)
        if HAS_D:
            x += D * tl.load(v_ptr + b * multiple(v_sb, V_UNIT) + t * v_st + v_at, mask=mask, other=0.0).to(tl.float32)
        if HAS_G:
            g = tl.load(g_ptr + b * multiple(g_sb, G_UNIT) + t * g_st + g_at, mask=mask, other=0.0).to(tl.float32)
            a, _ = activation(g, ACT, FAST)
            x *= a
        if NORM != "none":  # what is outside of the tile is zero and adds nothing
            mean = mean_square_of(x * x, N * V, V, NORM, BN)
            rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
            x *= rstd[:, None]
            if SAVE_RSTD:
                if NORM == "all":
                    tl.store(rstd_ptr + r + n, rstd, mask=(n == 0) & in_rows)
                else:
                    tl.store(rstd_ptr + r * N + n, rstd, mask=(n < N) & in_rows)
        if HAS_W:
            x *= w
        tl.store(o_ptr + r * (N * V) + at, x.to(o_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "T", "per_program", "do_sb", "v_sb", "g_sb"])
def tail_backward_kernel(
    do_ptr, y_ptr, v_ptr, D_ptr, g_ptr, w_ptr, rstd_ptr, dy_ptr, dg_ptr, dD_ptr, dw_ptr,
    rows, T, per_program, do_sb, do_st, do_sh, do_se, v_sb, v_st, v_sh, v_se, g_sb, g_st, g_sh, g_se,
    dy_row, dg_row,
    N: tl.constexpr, V: tl.constexpr, Gv: tl.constexpr, Gg: tl.constexpr,
    V_SHIFT: tl.constexpr, G_SHIFT: tl.constexpr, DY_SHIFT: tl.constexpr, DG_SHIFT: tl.constexpr,
    HAS_D: tl.constexpr, HAS_G: tl.constexpr, HAS_W: tl.constexpr,
    ACT: tl.constexpr, NORM: tl.constexpr, FAST: tl.constexpr,
    BN: tl.constexpr, BV: tl.constexpr, DO_UNIT: tl.constexpr, V_UNIT: tl.constexpr, G_UNIT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    e = tl.arange(0, BV)
    in_tile = (n < N)[:, None] & (e < V)[None, :]
    at = n[:, None] * V + e[None, :]
    if HAS_D:
        D = tl.load(D_ptr + at, mask=in_tile, other=0.0).to(tl.float32)
        dD = tl.zeros((BN, BV), tl.float32)
    if HAS_W:
        w = tl.load(w_ptr + at, mask=in_tile, other=0.0).to(tl.float32)
        dw = tl.zeros((BN, BV), tl.float32)
    do_at = n[:, None] * do_sh + e[None, :] * do_se
    v_at = (n // Gv)[:, None] * v_sh + e[None, :] * v_se + V_SHIFT
    g_at = (n // Gg)[:, None] * g_sh + e[None, :] * g_se + G_SHIFT
    first = tl.program_id(0).to(tl.int64) * per_program
    for r in range(first, tl.minimum(first + per_program, rows)):
        b = r // T
        t = r - b * T
        d = tl.load(do_ptr + b * multiple(do_sb, DO_UNIT) + t * do_st + do_at, mask=in_tile, other=0.0).to(tl.float32)
        u = tl.load(y_ptr + r * (N * V) + at, mask=in_tile, other=0.0).to(tl.float32)
        if HAS_D:
            v = tl.load(v_ptr + b * multiple(v_sb, V_UNIT) + t * v_st + v_at, mask=in_tile, other=0.0).to(tl.float32)
            u += D * v
        h = u
        if HAS_G:
            g = tl.load(g_ptr + b * multiple(g_sb, G_UNIT) + t * g_st + g_at, mask=in_tile, other=0.0).to(tl.float32)
            a, slope = activation(g, ACT, FAST)
            h = u * a
        if NORM != "none":
            if NORM == "all":
                rstd = tl.load(rstd_ptr + r + n * 0)
            else:
                rstd = tl.load(rstd_ptr + r * N + n, mask=n < N, other=0.0)
            rstd = rstd[:, None]
            if HAS_W:
                dw += d * h * rstd
                d *= w
            mean = mean_square_of(d * h, N * V, V, NORM, BN)
            d = rstd * (d - h * rstd * rstd * mean[:, None])
        if HAS_G:
            tl.store(dg_ptr + r * dg_row + DG_SHIFT + at, (d * u * slope).to(dg_ptr.dtype.element_ty), mask=in_tile)
            d *= a
        if HAS_D:
            dD += d * v
        tl.store(dy_ptr + r * dy_row + DY_SHIFT + at, d.to(dy_ptr.dtype.element_ty), mask=in_tile)
    sums = tl.program_id(0) * (N * V) + at
    if HAS_D:
        tl.store(dD_ptr + sums, dD, mask=in_tile)
    if HAS_W:
        tl.store(dw_ptr + sums, dw, mask=in_tile)


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(x_ptr, w_ptr, rows, eps, F: tl.constexpr, HAS_W: tl.constexpr, BF: tl.constexpr, ROWS: tl.constexpr):
    """RMSNorm of x [rows, F], in place: where the scan's own kernel has done all of the tail but this."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BF)
    at = r[:, None] * F + e[None, :]
    mask = (r < rows)[:, None] & (e < F)[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x *= tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 1) / F + eps))[:, None]
    if HAS_W:
        x *= tl.load(w_ptr + e, mask=e < F, other=0.0).to(tl.float32)[None, :]
    tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=mask)
