# SPDX-License-Identifier: Apache-2.0
"""The backward scan for 16-bit inputs on NVIDIA GPUs, in Gluon: what `backward.py` does, a warp to a tile.

    program (s, n, block of rows), chunks of C steps of the window from the last to the first
      1. from the chunk's checkpoint, redo its steps and note H every 4 steps in shared memory
      2. for every group of 4 steps from the last: redo it, keeping H' = H_{t-1} in shared memory and, as pairs of 16
         bits in registers, E = H' - Z and S = (1-f)(1 - Z ⊙ Z); and dq = H dy
      3. walk the group backwards with carry = dL/dH in fp32
             D = clip(carry) + q dyᵀ     dU = D ⊙ S        carry = f D + dU Wᵀ
             dk = dU v     dv = dUᵀ k     df = Σ D ⊙ E     dW += H'ᵀ dU

Sums but df are tensor-core products with fp32 accumulation: those over columns take the tile as it lies in registers,
those over rows take it `turned`. The steps of a group share accumulators, each with a row or column of its own.
Partial sums over heads and blocks are added in a fixed order by `reduce.py`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from .tile import (
    LINE,
    ROW_MAJOR,
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
    right_layout,
    row_of,
    rows,
    rows_of_right_operand,
    stage_gate,
    stage_rows,
    steps_of,
    store_columns,
    sum_own,
    tile_in_shared,
    tile_layout,
    to_float,
    turned,
)  # fmt: skip


@gluon.jit
def redo(
    h, h_low, ks, vs, fs, dys, t, u: gl.constexpr, W, dq, BK: gl.constexpr, BV: gl.constexpr, HAS_DY: gl.constexpr
):
    """One step forwards: the new state, what backward needs of it, and the group's dq with column u filled in."""
    LOW: gl.constexpr = h_low.dtype
    L: gl.constexpr = h.type.layout
    f = gate(fs, t, L)
    h, z, e = advance(h, h_low, rows(ks, t, BK, L) * columns(vs, t, BV, L), f, W)
    g = gl.full((BK, BV), 0.0, gl.float32, L) + (1.0 - f)
    s = multiply((1.0 - z * z).to(LOW), g.to(LOW))
    h_low = h.to(LOW)
    if HAS_DY:
        dq = mma_v2(left_operand(h_low), column_of_right_operand(dys, t, u, BV, L), dq)
    return h, h_low, e.to(LOW), s, dq


@gluon.jit
def undo(carry, h_before, e, s, qs, ks, vs, fs, dys, t, u: gl.constexpr, Wt, dk, dv, dWt, clip,
         BK: gl.constexpr, BV: gl.constexpr, CLIP: gl.constexpr, HAS_DY: gl.constexpr):  # fmt: skip
    """One step backwards from H_{t-1} in shared memory; also each thread's part of df, in fp32.

    Column u of dk [BK, 8] and of dv [BV, 8] is filled in.
    """
    LOW: gl.constexpr = s.dtype
    L: gl.constexpr = carry.type.layout
    d = carry
    if CLIP > 0:
        d = clamp(d, clip, CLIP == 2)
    if HAS_DY:
        d = d + rows(qs, t, BK, L) * columns(dys, t, BV, L)
    d_low = d.to(LOW)
    du = multiply(d_low, s)
    carry = mma_v2(left_operand(du), Wt, gate(fs, t, L) * d)
    dk = mma_v2(left_operand(du), column_of_right_operand(vs, t, u, BV, L), dk)
    df = sum_own(d * to_float(e), BK, BV)
    du_t = gl.convert_layout(turned(du, BK, BV).permute((1, 0)), left_layout(L), assert_trivial=True)
    dv = mma_v2(du_t, rows_of_right_operand(ks, t, u, BK, L), dv)
    dWt = mma_v2(du_t, h_before.load(right_layout(L)), dWt)
    return carry, df, dk, dv, dWt


@gluon.jit(do_not_specialize=["T", "NC", "chunk_first", "chunk_last", "window", "f_sb", "df_skb"])
def scan_backward_gluon_kernel(
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
    L: gl.constexpr = tile_layout(1, BV, False)
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
    noted = gl.allocate_shared_memory(LOW, [C // 4, BK, BV], tile_in_shared(BV))
    h1_shared = gl.allocate_shared_memory(LOW, [BK, BV], tile_in_shared(BV))
    h2_shared = gl.allocate_shared_memory(LOW, [BK, BV], tile_in_shared(BV))
    h3_shared = gl.allocate_shared_memory(LOW, [BK, BV], tile_in_shared(BV))
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
    W = load_W(W_ptr + (n // Gw) * (V * V), V, BV, False, right_layout(L)).to(LOW)
    Wt = load_W(W_ptr + (n // Gw) * (V * V), V, BV, True, right_layout(L)).to(LOW)
    wi = column_of(gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(1, L)), 1), BV)
    in_W = (wi < V) & (j < V)
    dWt_at = dW_ptr + (sn * gl.num_programs(1) + block) * (V * V) + j * V + wi
    dWt = gl.load(dWt_at, mask=in_W, other=0.0)

    STEP: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    df_step = gl.arange(0, 4, STEP)
    step = gl.arange(0, 8, gl.SliceLayout(0, L))
    dv_offset = gl.expand_dims(step, 0) * (N * V) + wi

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
            h0 = gl.convert_layout(noted.index(g).load(left_layout(L)), L, assert_trivial=True)
            dq = gl.full((BK, 8), 0.0, gl.float32, L)
            h = h0.to(gl.float32)
            h, h1, e0, s0, dq = redo(h, h0, ks, vs, fs, dys, t, 0, W, dq, BK, BV, HAS_DY)
            h1_shared.store(h1)
            h, h2, e1, s1, dq = redo(h, h1, ks, vs, fs, dys, t + 1, 1, W, dq, BK, BV, HAS_DY)
            h2_shared.store(h2)
            h, h3, e2, s2, dq = redo(h, h2, ks, vs, fs, dys, t + 2, 2, W, dq, BK, BV, HAS_DY)
            h3_shared.store(h3)
            h, _, e3, s3, dq = redo(h, h3, ks, vs, fs, dys, t + 3, 3, W, dq, BK, BV, HAS_DY)
            steps = left - t
            out = ((t0 + t).to(gl.int64)) * N
            if HAS_DY:
                store_columns(dq_at + out * K, dq, steps, N * K, block * BK, K, BK)
            dk = gl.full((BK, 8), 0.0, gl.float32, L)
            dv = gl.full((BV, 8), 0.0, gl.float32, L)
            carry, df3, dk, dv, dWt = undo(
                carry, h3_shared, e3, s3, qs, ks, vs, fs, dys, t + 3, 3, Wt, dk, dv, dWt, clip, BK, BV, CLIP, HAS_DY
            )
            carry, df2, dk, dv, dWt = undo(
                carry, h2_shared, e2, s2, qs, ks, vs, fs, dys, t + 2, 2, Wt, dk, dv, dWt, clip, BK, BV, CLIP, HAS_DY
            )
            carry, df1, dk, dv, dWt = undo(
                carry, h1_shared, e1, s1, qs, ks, vs, fs, dys, t + 1, 1, Wt, dk, dv, dWt, clip, BK, BV, CLIP, HAS_DY
            )
            carry, df0, dk, dv, dWt = undo(
                carry, noted.index(g), e0, s0, qs, ks, vs, fs, dys, t, 0, Wt, dk, dv, dWt, clip, BK, BV, CLIP, HAS_DY
            )
            store_columns(dk_at + out * K, dk, steps, N * K, block * BK, K, BK)
            df = gl.join(gl.join(df0, df2), gl.join(df1, df3)).reshape((32, 4))  # the last axis of join is the fastest
            gl.store(df_at + out + df_step * N, gl.convert_layout(gl.sum(df, 0), STEP), mask=df_step < steps)
            gl.store(dv_at + out * V + dv_offset, dv.to(dv_ptr.dtype.element_ty),
                     mask=gl.expand_dims(step < gl.minimum(steps, 4), 0) & (wi < V))  # fmt: skip
    gl.store(carry_at, carry, mask=in_state)
    gl.store(dWt_at, dWt, mask=in_W)
