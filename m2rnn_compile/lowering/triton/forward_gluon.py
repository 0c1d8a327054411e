# SPDX-License-Identifier: Apache-2.0
"""The forward scan for 16-bit inputs on NVIDIA GPUs, in Gluon: `forward.py` with layouts and staging by hand.

Why beside the portable kernel: there Triton puts the constant W in shared memory, reads it back every step, and takes
the sum over rows for y through shuffles and a barrier. Here W and H stay in registers, a chunk of inputs is copied to
shared memory while the one before it is worked on, and the sum over rows, taken by each thread over its own, is
finished through shared memory once for U steps. (As a tensor-core product y cost twice as much: docs/kernel-notes.md.)

Checkpoints are 16-bit states every C steps (as products see them), two in the place of one fp32 state every 2C steps.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .tile import (
    LINE,
    LINES,
    ROW_MAJOR,
    advance,
    column_of,
    columns,
    finish_gate,
    gate,
    in_lines,
    lines_layout,
    load_W,
    right_layout,
    row_of,
    rows,
    stage_gate,
    stage_rows,
    steps_of,
    sum_own_rows,
    tile_layout,
)  # fmt: skip


@gluon.jit
def walk(h, ks, vs, fs, t, W, BK: gl.constexpr, BV: gl.constexpr):
    """One step of the state."""
    L: gl.constexpr = h.type.layout
    return advance(h, h.to(W.dtype), rows(ks, t, BK, L) * columns(vs, t, BV, L), gate(fs, t, L), W)[0]


@gluon.jit
def read(h, qs, t, BK: gl.constexpr, BV: gl.constexpr):
    """Each thread's part of y, over its own rows."""
    L: gl.constexpr = h.type.layout
    return sum_own_rows(h * rows(qs, t, BK, L), BK, BV)


@gluon.jit(do_not_specialize=["T", "NC", "f_sb"])
def scan_forward_gluon_kernel(
    q_ptr, k_ptr, v_ptr, f_ptr, W_ptr, h0_ptr, cu_ptr, y_ptr, final_ptr, ckpt_ptr,
    T, NC,
    q_sb, q_st, q_sn, q_sk, k_sb, k_st, k_sn, k_sk, v_sb, v_st, v_sn, v_sv, f_sb, f_st, f_sn,
    y_skb,  # elements between the partial sums of two blocks of rows
    N: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    Gq: gl.constexpr, Gk: gl.constexpr, Gv: gl.constexpr, Gf: gl.constexpr, Gw: gl.constexpr,
    BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr,
    PACKED: gl.constexpr, HAS_H0: gl.constexpr, SAVE: gl.constexpr,
):  # fmt: skip
    LOW: gl.constexpr = v_ptr.dtype.element_ty
    NW: gl.constexpr = gl.num_warps()
    L: gl.constexpr = tile_layout(NW, BV, False)

    block = gl.program_id(1)
    s = (gl.program_id(0) // N).to(gl.int64)
    n = (gl.program_id(0) % N).to(gl.int64)
    if PACKED:
        first = gl.load(cu_ptr + s).to(gl.int64)
        last = gl.load(cu_ptr + s + 1).to(gl.int64)
        first = gl.minimum(gl.maximum(first, 0), T)
        last = gl.minimum(gl.maximum(last, first), T)
        length = (last - first).to(gl.int32)
        b = s * 0
        slot = first // (2 * C) + s
    else:
        first = s * 0
        length = T
        b = s
        slot = s * NC
    q_at = q_ptr + b * q_sb + (n // Gq) * q_sn
    k_at = k_ptr + b * k_sb + (n // Gk) * k_sn
    v_at = v_ptr + b * v_sb + (n // Gv) * v_sn
    f_at = f_ptr + b * f_sb + (n // Gf) * f_sn

    ks = gl.allocate_shared_memory(LOW, [2, C, BK], ROW_MAJOR)
    qs = gl.allocate_shared_memory(LOW, [2, C, BK], ROW_MAJOR)
    vs = gl.allocate_shared_memory(LOW, [2, C, BV], ROW_MAJOR)
    fs = gl.allocate_shared_memory(gl.float32, [2, C], LINE)
    first_half = gl.allocate_shared_memory(gl.float32, [4, 8 * NW, BV], LINES)
    second_half = gl.allocate_shared_memory(gl.float32, [4, 8 * NW, BV], LINES)

    i = row_of(gl.expand_dims(gl.arange(0, BK, gl.SliceLayout(1, L)), 1), BK) + block * BK
    j = column_of(gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(0, L)), 0), BV)
    state = i * V + j
    in_state = (i < K) & (j < V)
    sn = s * N + n
    if HAS_H0:
        h = gl.load(h0_ptr + sn * (K * V) + state, mask=in_state, other=0.0)
    else:
        h = gl.full((BK, BV), 0.0, gl.float32, L)
    W = load_W(W_ptr + (n // Gw) * (V * V), V, BV, False, right_layout(L)).to(LOW)

    Y8: gl.constexpr = lines_layout(BV, NW)
    Y: gl.constexpr = gl.SliceLayout(1, Y8)
    y_step = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(1, Y)), 1)
    y_col = gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(0, Y)), 0)
    y_offset = y_step * (N * V) + y_col
    y_at = y_ptr + block.to(gl.int64) * y_skb + ((b * T + first) * N + n) * V

    chunks = (length + C - 1) // C
    stage_rows(ks.index(0), k_at, k_st, k_sk, first, length, block * BK, K, C, BK)
    stage_rows(qs.index(0), q_at, q_st, q_sk, first, length, block * BK, K, C, BK)
    stage_rows(vs.index(0), v_at, v_st, v_sv, first, length, 0, V, C, BV)
    stage_gate(fs.index(0), f_at, f_st, first, length, C)
    async_copy.commit_group()
    for c in range(0, chunks):
        left = length - c * C
        now = c % 2
        t_next = first + (c + 1) * C
        stage_rows(ks.index(1 - now), k_at, k_st, k_sk, t_next, left - C, block * BK, K, C, BK)
        stage_rows(qs.index(1 - now), q_at, q_st, q_sk, t_next, left - C, block * BK, K, C, BK)
        stage_rows(vs.index(1 - now), v_at, v_st, v_sv, t_next, left - C, 0, V, C, BV)
        stage_gate(fs.index(1 - now), f_at, f_st, t_next, left - C, C)
        async_copy.commit_group()
        async_copy.wait_group(1)
        finish_gate(fs.index(now), left, C)
        if SAVE:
            at = ((slot + c // 2) * N + n) * (2 * K * V) + c % 2 * (K * V)
            gl.store(ckpt_ptr + at + state, h.to(LOW), mask=in_state)
        k_now = steps_of(ks.index(now), C, BK)
        q_now = steps_of(qs.index(now), C, BK)
        v_now = steps_of(vs.index(now), C, BV)
        f_now = steps_of(fs.index(now), C, 1)
        for g in range(0, (gl.minimum(left, C) + 7) // 8):
            t = g * 8
            h = walk(h, k_now, v_now, f_now, t, W, BK, BV)
            p0 = read(h, q_now, t, BK, BV)
            h = walk(h, k_now, v_now, f_now, t + 1, W, BK, BV)
            p1 = read(h, q_now, t + 1, BK, BV)
            h = walk(h, k_now, v_now, f_now, t + 2, W, BK, BV)
            p2 = read(h, q_now, t + 2, BK, BV)
            h = walk(h, k_now, v_now, f_now, t + 3, W, BK, BV)
            p3 = read(h, q_now, t + 3, BK, BV)
            first_half.store(in_lines(p0, p1, p2, p3, BV))
            h = walk(h, k_now, v_now, f_now, t + 4, W, BK, BV)
            p0 = read(h, q_now, t + 4, BK, BV)
            h = walk(h, k_now, v_now, f_now, t + 5, W, BK, BV)
            p1 = read(h, q_now, t + 5, BK, BV)
            h = walk(h, k_now, v_now, f_now, t + 6, W, BK, BV)
            p2 = read(h, q_now, t + 6, BK, BV)
            h = walk(h, k_now, v_now, f_now, t + 7, W, BK, BV)
            p3 = read(h, q_now, t + 7, BK, BV)
            y = gl.sum(first_half.load(Y8), 1)
            gl.store(y_at + y_offset, y.to(y_ptr.dtype.element_ty), mask=(y_step < left - t) & (y_col < V))
            second_half.store(in_lines(p0, p1, p2, p3, BV))
            y = gl.sum(second_half.load(Y8), 1)
            y_at += 4 * N * V
            gl.store(y_at + y_offset, y.to(y_ptr.dtype.element_ty), mask=(y_step < left - t - 4) & (y_col < V))
            y_at += 4 * N * V
    gl.store(final_ptr + sn * (K * V) + state, h, mask=in_state)
