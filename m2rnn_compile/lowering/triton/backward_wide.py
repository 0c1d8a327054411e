# SPDX-License-Identifier: Apache-2.0
"""The backward scan at V = 64 on Hopper: what `backward_gluon.py` does, one warpgroup to 64 rows of the state.

At V = 64 the registers of one warp cannot hold dW beside W and the state. Here four warps share a tile; W and the
states stay in shared memory, where warpgroup products read them, and so do E and S of a group, which spill otherwise.
dW is added up after every group of 4 steps as one product over 4 · BK rows, while the next group begins. The program
sees up to 64 rows, so it sums dv and df over them itself.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .tile import (
    LINE,
    ROW_MAJOR,
    SWIZZLED,
    advance,
    clamp,
    column_of,
    column_of_right_operand,
    columns,
    finish_gate,
    gate,
    left_layout,
    left_operand,
    load_W,
    multiply,
    row_of,
    rows,
    rows_of_right_operand,
    stage_gate,
    stage_rows,
    steps_of,
    store_columns,
    sum_own,
    tile_layout,
    to_float,
)  # fmt: skip


@gluon.jit
def redo(h, h_low, ks, vs, fs, dys, t, u: gl.constexpr, W, e_shared, s_shared, dq,
         BK: gl.constexpr, BV: gl.constexpr, HAS_DY: gl.constexpr):  # fmt: skip
    """One step forwards: the new state, what backward needs of it, and the group's dq with column u filled in."""
    LOW: gl.constexpr = h_low.dtype
    L: gl.constexpr = h.type.layout
    MMA: gl.constexpr = dq.type.layout
    f = gate(fs, t, L)
    h, z, e = advance(h, h_low, rows(ks, t, BK, L) * columns(vs, t, BV, L), f, W)
    g = gl.full((BK, BV), 0.0, gl.float32, L) + (1.0 - f)
    s = multiply((1.0 - z * z).to(LOW), g.to(LOW))
    h_low = h.to(LOW)
    if HAS_DY:
        left = gl.convert_layout(h_low, left_layout(MMA), assert_trivial=True)
        dq = mma_v2(left, column_of_right_operand(dys, t, u, BV, MMA), dq)
    e_shared.store(e.to(LOW))
    s_shared.store(s)
    return h, h_low, dq


@gluon.jit
def undo(carry, e_shared, s_shared, qs, ks, vs, fs, dys, t, u: gl.constexpr, Wt, du_shared, dk, clip,
         BK: gl.constexpr, BV: gl.constexpr, CLIP: gl.constexpr, HAS_DY: gl.constexpr):  # fmt: skip
    """One step backwards: the carry, each thread's part of df, the group's dk with column u filled in; dU is noted."""
    LOW: gl.constexpr = s_shared.dtype
    L: gl.constexpr = carry.type.layout
    MMA: gl.constexpr = dk.type.layout
    d = carry
    if CLIP:
        d = clamp(d, clip, True)
    if HAS_DY:
        d = d + rows(qs, t, BK, L) * columns(dys, t, BV, L)
    du = multiply(d.to(LOW), s_shared.load(L))
    later = warpgroup_mma(left_operand(du), Wt, gate(fs, t, L) * d, is_async=True)
    du_shared.store(du)
    df = sum_own(d * to_float(e_shared.load(L)), BK, BV)
    left = gl.convert_layout(du, left_layout(MMA), assert_trivial=True)
    dk = mma_v2(left, column_of_right_operand(vs, t, u, BV, MMA), dk)
    return warpgroup_mma_wait(0, [later]), df, dk


@gluon.jit
def add_rows(dv, du_shared, ks, t, u: gl.constexpr, BK: gl.constexpr):
    """dUᵀ k into column u of dv [BV, 8]."""
    MMA: gl.constexpr = dv.type.layout
    return mma_v2(du_shared.permute((1, 0)).load(left_layout(MMA)), rows_of_right_operand(ks, t, u, BK, MMA), dv)


@gluon.jit(do_not_specialize=["T", "NC", "chunk_first", "chunk_last", "window", "f_sb", "df_skb"])
def scan_backward_wide_kernel(
    q_ptr, k_ptr, v_ptr, f_ptr, W_ptr, dy_ptr, cu_ptr, ckpt_ptr,
    carry_ptr, dW_ptr, dq_ptr, dk_ptr, dv_ptr, df_ptr,
    T, NC, chunk_first, chunk_last, window, clip,
    q_sb, q_st, q_sn, q_sk, k_sb, k_st, k_sn, k_sk, v_sb, v_st, v_sn, v_sv, f_sb, f_st, f_sn,
    dy_sb, dy_st, dy_sn, dy_sv,
    dv_skb, df_skb,  # elements between the partial sums of two blocks of rows
    N: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    Gq: gl.constexpr, Gk: gl.constexpr, Gv: gl.constexpr, Gf: gl.constexpr, Gw: gl.constexpr,
    BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr,
    PACKED: gl.constexpr, HAS_DY: gl.constexpr, CLIP: gl.constexpr,
):  # fmt: skip
    LOW: gl.constexpr = v_ptr.dtype.element_ty
    NW: gl.constexpr = gl.num_warps()
    L: gl.constexpr = tile_layout(NW, BV, True)
    MMA: gl.constexpr = tile_layout(NW, BV, False)
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
        c_last = (length + C - 1) // C
        c_first = 0
        origin = first  # partials of the only window start at time 0
    else:
        first = s * 0
        length = T
        b = s
        slot = s * NC
        c_first = chunk_first
        c_last = chunk_last
        origin = first - chunk_first * C
    q_at = q_ptr + b * q_sb + (n // Gq) * q_sn
    k_at = k_ptr + b * k_sb + (n // Gk) * k_sn
    v_at = v_ptr + b * v_sb + (n // Gv) * v_sn
    f_at = f_ptr + b * f_sb + (n // Gf) * f_sn
    dy_at = dy_ptr + b * dy_sb + n * dy_sn
    part = (b * window + origin) * N + n  # [B, window, N, ...]: the partials of every head
    dq_at = dq_ptr + part * K
    dk_at = dk_ptr + part * K
    dv_at = dv_ptr + block.to(gl.int64) * dv_skb + part * V
    df_at = df_ptr + block.to(gl.int64) * df_skb + part

    staged_k = gl.allocate_shared_memory(LOW, [C, BK], ROW_MAJOR)
    staged_q = gl.allocate_shared_memory(LOW, [C, BK], ROW_MAJOR)
    staged_v = gl.allocate_shared_memory(LOW, [C, BV], ROW_MAJOR)
    staged_dy = gl.allocate_shared_memory(LOW, [C, BV], ROW_MAJOR)
    staged_f = gl.allocate_shared_memory(gl.float32, [C], LINE)
    noted = gl.allocate_shared_memory(LOW, [C // 4, BK, BV], SWIZZLED)
    h1_shared = gl.allocate_shared_memory(LOW, [BK, BV], SWIZZLED)
    h2_shared = gl.allocate_shared_memory(LOW, [BK, BV], SWIZZLED)
    h3_shared = gl.allocate_shared_memory(LOW, [BK, BV], SWIZZLED)
    e0_shared = gl.allocate_shared_memory(LOW, [BK, BV], SWIZZLED)
    s0_shared = gl.allocate_shared_memory(LOW, [BK, BV], SWIZZLED)
    e1_shared = gl.allocate_shared_memory(LOW, [BK, BV], SWIZZLED)
    s1_shared = gl.allocate_shared_memory(LOW, [BK, BV], SWIZZLED)
    e2_shared = gl.allocate_shared_memory(LOW, [BK, BV], SWIZZLED)
    s2_shared = gl.allocate_shared_memory(LOW, [BK, BV], SWIZZLED)
    e3_shared = gl.allocate_shared_memory(LOW, [BK, BV], SWIZZLED)
    s3_shared = gl.allocate_shared_memory(LOW, [BK, BV], SWIZZLED)
    du0_shared = gl.allocate_shared_memory(LOW, [BK, BV], SWIZZLED)
    du1_shared = gl.allocate_shared_memory(LOW, [BK, BV], SWIZZLED)
    du2_shared = gl.allocate_shared_memory(LOW, [BK, BV], SWIZZLED)
    du3_shared = gl.allocate_shared_memory(LOW, [BK, BV], SWIZZLED)
    ks = steps_of(staged_k, C, BK)
    qs = steps_of(staged_q, C, BK)
    vs = steps_of(staged_v, C, BV)
    dys = steps_of(staged_dy, C, BV)
    fs = steps_of(staged_f, C, 1)

    i = row_of(gl.expand_dims(gl.arange(0, BK, gl.SliceLayout(1, L)), 1), BK) + block * BK
    j = column_of(gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(0, L)), 0), BV)
    state = i * V + j
    in_state = (i < K) & (j < V)
    sn = s * N + n
    carry_at = carry_ptr + sn * (K * V) + state
    carry = gl.load(carry_at, mask=in_state, other=0.0)
    W = gl.allocate_shared_memory(LOW, [BV, BV], SWIZZLED, load_W(W_ptr + (n // Gw) * (V * V), V, BV, False, L).to(LOW))
    Wt = W.permute((1, 0))
    fence_async_shared()
    wi = column_of(gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(1, L)), 1), BV)
    in_W = (wi < V) & (j < V)
    dW_at = dW_ptr + (sn * gl.num_programs(1) + block) * (V * V) + wi * V + j
    dW = gl.load(dW_at, mask=in_W, other=0.0)

    STEP: gl.constexpr = gl.BlockedLayout([1], [32], [NW], [0])
    df_step = gl.arange(0, 4, STEP)
    step = gl.arange(0, 8, gl.SliceLayout(0, MMA))
    v_col = column_of(gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(1, MMA)), 1), BV)
    dv_offset = gl.expand_dims(step, 0) * (N * V) + v_col

    for back in range(0, c_last - c_first):
        c = c_last - 1 - back
        t0 = c * C
        left = length - t0
        stage_rows(staged_k, k_at, k_st, k_sk, first + t0, left, block * BK, K, C, BK)
        stage_rows(staged_v, v_at, v_st, v_sv, first + t0, left, 0, V, C, BV)
        stage_gate(staged_f, f_at, f_st, first + t0, left, C)
        async_copy.commit_group()
        if HAS_DY:
            stage_rows(staged_q, q_at, q_st, q_sk, first + t0, left, block * BK, K, C, BK)
            stage_rows(staged_dy, dy_at, dy_st, dy_sv, first + t0, left, 0, V, C, BV)
            async_copy.commit_group()
        ckpt_at = ckpt_ptr + ((slot + c // 2) * N + n) * (2 * K * V) + c % 2 * (K * V)
        h_low = gl.load(ckpt_at + state, mask=in_state, other=0.0)
        if HAS_DY:
            async_copy.wait_group(1)
        else:
            async_copy.wait_group(0)
        finish_gate(staged_f, left, C)
        groups = (gl.minimum(left, C) + 3) // 4
        h = h_low.to(gl.float32)
        noted.index(0).store(h_low)
        for g in range(0, groups - 1):
            for u in gl.static_range(4):
                h, _, _ = advance(h, h.to(LOW), rows(ks, g * 4 + u, BK, L) * columns(vs, g * 4 + u, BV, L),
                                  gate(fs, g * 4 + u, L), W)  # fmt: skip
            noted.index(g + 1).store(h.to(LOW))
        async_copy.wait_group(0)
        for back_g in range(0, groups):
            g = groups - 1 - back_g
            t = g * 4
            h0 = noted.index(g).load(L)
            dq = gl.full((BK, 8), 0.0, gl.float32, MMA)
            h = h0.to(gl.float32)
            h, h1, dq = redo(h, h0, ks, vs, fs, dys, t, 0, W, e0_shared, s0_shared, dq, BK, BV, HAS_DY)
            h1_shared.store(h1)
            h, h2, dq = redo(h, h1, ks, vs, fs, dys, t + 1, 1, W, e1_shared, s1_shared, dq, BK, BV, HAS_DY)
            h2_shared.store(h2)
            h, h3, dq = redo(h, h2, ks, vs, fs, dys, t + 2, 2, W, e2_shared, s2_shared, dq, BK, BV, HAS_DY)
            h3_shared.store(h3)
            h, _, dq = redo(h, h3, ks, vs, fs, dys, t + 3, 3, W, e3_shared, s3_shared, dq, BK, BV, HAS_DY)
            steps = left - t
            out = ((t0 + t).to(gl.int64)) * N
            if HAS_DY:
                store_columns(dq_at + out * K, dq, steps, N * K, block * BK, K, BK)
            dk = gl.full((BK, 8), 0.0, gl.float32, MMA)
            carry, df3, dk = undo(
                carry, e3_shared, s3_shared, qs, ks, vs, fs, dys, t + 3, 3, Wt, du3_shared, dk, clip,
                BK, BV, CLIP, HAS_DY,
            )  # fmt: skip
            carry, df2, dk = undo(
                carry, e2_shared, s2_shared, qs, ks, vs, fs, dys, t + 2, 2, Wt, du2_shared, dk, clip,
                BK, BV, CLIP, HAS_DY,
            )  # fmt: skip
            carry, df1, dk = undo(
                carry, e1_shared, s1_shared, qs, ks, vs, fs, dys, t + 1, 1, Wt, du1_shared, dk, clip,
                BK, BV, CLIP, HAS_DY,
            )  # fmt: skip
            carry, df0, dk = undo(
                carry, e0_shared, s0_shared, qs, ks, vs, fs, dys, t, 0, Wt, du0_shared, dk, clip,
                BK, BV, CLIP, HAS_DY,
            )  # fmt: skip
            fence_async_shared()
            dv = gl.full((BV, 8), 0.0, gl.float32, MMA)
            dv = add_rows(dv, du3_shared, ks, t + 3, 3, BK)
            dW_later = warpgroup_mma(h3_shared.permute((1, 0)), du3_shared, dW, is_async=True)
            dW_later = warpgroup_mma(h2_shared.permute((1, 0)), du2_shared, dW_later, is_async=True)
            dW_later = warpgroup_mma(h1_shared.permute((1, 0)), du1_shared, dW_later, is_async=True)
            dW_later = warpgroup_mma(noted.index(g).permute((1, 0)), du0_shared, dW_later, is_async=True)
            dv = add_rows(dv, du2_shared, ks, t + 2, 2, BK)
            dv = add_rows(dv, du1_shared, ks, t + 1, 1, BK)
            dv = add_rows(dv, du0_shared, ks, t, 0, BK)
            store_columns(dk_at + out * K, dk, steps, N * K, block * BK, K, BK)
            df = gl.join(gl.join(df0, df2), gl.join(df1, df3)).reshape((32 * NW, 4))  # join's last axis is the fastest
            gl.store(df_at + out + df_step * N, gl.convert_layout(gl.sum(df, 0), STEP), mask=df_step < steps)
            gl.store(dv_at + out * V + dv_offset, dv.to(dv_ptr.dtype.element_ty),
                     mask=gl.expand_dims(step < gl.minimum(steps, 4), 0) & (v_col < V))  # fmt: skip
            dW = warpgroup_mma_wait(0, [dW_later])
    gl.store(carry_at, carry, mask=in_state)
    gl.store(dW_at, dW, mask=in_W)
