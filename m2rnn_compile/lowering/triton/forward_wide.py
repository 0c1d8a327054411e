# SPDX-License-Identifier: Apache-2.0
"""The forward scan at V = 64 on Hopper: four warps carry the state, four others read y out of it.

There is one state of 64 × 64 to a multiprocessor, so the latency of a step is all that counts. The walking warps begin
the next step's product while tanh of this step is still under way (`quarters.py`), and leave each state in shared
memory as products see it; the reading warps sum over rows there by tensor cores, eight steps at a time.

Checkpoints are those of `forward_gluon.py`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from .quarters import begin, factors, in_quarters, load_state, outer, quarter_layout, step, store_state, whole
from .tile import (
    LINE,
    ROW_MAJOR,
    SWIZZLED,
    column_of,
    finish_gate,
    gate,
    left_layout,
    load_W,
    rows_of_right_operand,
    stage_gate,
    stage_rows,
    steps_of,
    tile_layout,
)  # fmt: skip


@gluon.jit
def walk(
    first, length, block, at, ks, vs, fs, W, ring, full, empty,
    k_at, k_st, k_sk, v_at, v_st, v_sv, f_at, f_st, h0_ptr, final_ptr, ckpt_ptr, ckpt_step,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, U: gl.constexpr,
    HAS_H0: gl.constexpr, SAVE: gl.constexpr,
):  # fmt: skip
    """at: elements before this state in h0 and final; ckpt_ptr: this state's first checkpoint."""
    LOW: gl.constexpr = W.dtype
    NW: gl.constexpr = gl.num_warps()
    L: gl.constexpr = tile_layout(NW, BV, True)
    Q: gl.constexpr = quarter_layout(NW)
    if HAS_H0:
        h0, h1, h2, h3 = in_quarters(load_state(h0_ptr + at, block * BK, K, V, BK, BV), BK, BV)
    else:
        h0 = gl.full((BK, BV // 4), 0.0, gl.float32, Q)
        h1 = h0
        h2 = h0
        h3 = h0
    chunks = (length + C - 1) // C
    stage_rows(ks.index(0), k_at, k_st, k_sk, first, length, block * BK, K, C, BK)
    stage_rows(vs.index(0), v_at, v_st, v_sv, first, length, 0, V, C, BV)
    stage_gate(fs.index(0), f_at, f_st, first, length, C)
    async_copy.commit_group()
    for c in range(0, chunks):
        left = length - c * C
        now = c % 2
        t_next = first + (c + 1) * C
        stage_rows(ks.index(1 - now), k_at, k_st, k_sk, t_next, left - C, block * BK, K, C, BK)
        stage_rows(vs.index(1 - now), v_at, v_st, v_sv, t_next, left - C, 0, V, C, BV)
        stage_gate(fs.index(1 - now), f_at, f_st, t_next, left - C, C)
        async_copy.commit_group()
        async_copy.wait_group(1)
        finish_gate(fs.index(now), left, C)
        if SAVE:
            c_at = ckpt_ptr + (c // 2).to(gl.int64) * ckpt_step + c % 2 * (K * V)
            store_state(c_at, h0, h1, h2, h3, block * BK, K, V, BK, BV)
        k_now = steps_of(ks.index(now), C, BK)
        v_now = steps_of(vs.index(now), C, BV)
        f_now = steps_of(fs.index(now), C, 1)
        k, v = factors(k_now, v_now, 0, BK, BV)
        u = begin(h0, h1, h2, h3, outer(k, v, BK, BV, L), W, BV, LOW, L)
        k, v = factors(k_now, v_now, 1, BK, BV)
        for g in range(0, (gl.minimum(left, C) + U - 1) // U):
            group = c * (C // U) + g
            slot = group % 2
            mbarrier.wait(empty.index(slot), group // 2 % 2 ^ 1)
            for m in gl.static_range(U):
                t = g * U + m
                seed = outer(k, v, BK, BV, L)
                k, v = factors(k_now, v_now, gl.minimum(t + 2, C - 1), BK, BV)  # the last one's u is not used
                h0, h1, h2, h3, a0, a1, a2, a3, _, _, _, _, _, _, _, _, later = step(
                    h0, h1, h2, h3, u, seed, 1.0 - gate(f_now, t, Q), W, True, BK, BV
                )
                ring.index(slot * U + m).store(whole(a0, a1, a2, a3, BK, BV, L))
                u = warpgroup_mma_wait(0, [later])
            mbarrier.arrive(full.index(slot))
    store_state(final_ptr + at, h0, h1, h2, h3, block * BK, K, V, BK, BV)


@gluon.jit
def read(
    first, length, block, qs, ring, full, empty, q_at, q_st, q_sk, y_at, y_st,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, U: gl.constexpr,
):  # fmt: skip
    """y of U steps at a time, as the columns of Hᵀ q; y_at: this head's first line."""
    MMA: gl.constexpr = tile_layout(gl.num_warps(), BV, False)
    line = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, MMA)), 0)
    col = column_of(gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(1, MMA)), 1), BV)
    offset = line * y_st + col
    groups = (length + U - 1) // U
    for i in gl.static_range(3):
        stage_rows(qs.index(i), q_at, q_st, q_sk, first + i * U, length - i * U, block * BK, K, U, BK)
        async_copy.commit_group()
    for g in range(0, groups):
        ahead = g + 3
        stage_rows(qs.index(ahead % 4), q_at, q_st, q_sk, first + ahead * U, length - ahead * U, block * BK, K, U, BK)
        async_copy.commit_group()
        async_copy.wait_group(3)
        q_now = steps_of(qs.index(g % 4), U, BK)
        slot = g % 2
        mbarrier.wait(full.index(slot), g // 2 % 2)
        y = gl.full((BV, 8), 0.0, gl.float32, MMA)
        for u in gl.static_range(U):
            h = ring.index(slot * U + u).permute((1, 0)).load(left_layout(MMA))
            y = mma_v2(h, rows_of_right_operand(q_now, u, u, BK, MMA), y)
        mbarrier.arrive(empty.index(slot))
        here = (line < gl.minimum(length - g * U, U)) & (col < V)
        gl.store(y_at + offset, y.to(y_at.dtype.element_ty), mask=here)
        y_at += U * y_st
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["T", "NC", "f_sb", "f_st"])
def scan_forward_wide_kernel(
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
    L: gl.constexpr = tile_layout(NW, BV, True)
    U: gl.constexpr = 8

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
    y_at = y_ptr + block.to(gl.int64) * y_skb + ((b * T + first) * N + n) * V

    ks = gl.allocate_shared_memory(LOW, [2, C, BK], ROW_MAJOR)
    vs = gl.allocate_shared_memory(LOW, [2, C, BV], ROW_MAJOR)
    fs = gl.allocate_shared_memory(gl.float32, [2, C], LINE)
    qs = gl.allocate_shared_memory(LOW, [4, U, BK], ROW_MAJOR)
    ring = gl.allocate_shared_memory(LOW, [2 * U, BK, BV], SWIZZLED)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    W = gl.allocate_shared_memory(
        LOW, [BV, BV], SWIZZLED, load_W(W_ptr + (n // Gw) * (V * V), V, BV, False, L).to(LOW)
    )
    fence_async_shared()
    at = (s * N + n) * (K * V)
    gl.warp_specialize(
        [
            (walk, (
                first, length, block, at, ks, vs, fs, W, ring, full, empty,
                k_at, k_st, k_sk, v_at, v_st, v_sv, f_at, f_st, h0_ptr, final_ptr,
                ckpt_ptr + (slot * N + n) * (2 * K * V), N * (2 * K * V),
                K, V, BK, BV, C, U, HAS_H0, SAVE,
            )),
            (read, (first, length, block, qs, ring, full, empty, q_at, q_st, q_sk, y_at, N * V, K, V, BK, BV, U)),
        ],
        [4], [128],
    )  # fmt: skip
