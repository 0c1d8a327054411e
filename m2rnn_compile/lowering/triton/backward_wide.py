# SPDX-License-Identifier: Apache-2.0
"""The backward scan at V = 64 on Hopper: what `backward_gluon.py` does, two warpgroups to 64 rows of the state.

One state fills a multiprocessor, so warps, not programs, must overlap. Four warps redo the forward walk from a
checkpoint (`quarters.py`) and leave H_{t-1}, E = H_{t-1} - Z_t and S = (1 - f)(1 - Z²) of four steps at a time in
shared memory; four others undo these steps while the first four redo the ones before them. Redoing goes twice over a chunk:
once to note the state every four steps, in a scratch that stays in L2, and once, from its last group to its first, for
what undoing needs. dW is added up after every group as one product over 4 · BK rows.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .quarters import (
    begin,
    factors,
    in_quarters,
    load_state,
    note,
    noted,
    outer,
    quarter_layout,
    step,
    whole,
)
from .tile import (
    LINE,
    ROW_MAJOR,
    SWIZZLED,
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
def redo(
    first, length, block, c_first, c_last, groups_in_all, ks, vs, fs, dys, W, hs, es, ss, full, empty,
    k_at, k_st, k_sk, v_at, v_st, v_sv, f_at, f_st, dy_at, dy_st, dy_sv, ckpt_ptr, ckpt_step, scratch, dq_at, dq_st,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, HAS_DY: gl.constexpr,
):  # fmt: skip
    """ckpt_ptr: this state's first checkpoint; scratch: for its notes; dq_at: its line of time 0."""
    LOW: gl.constexpr = W.dtype
    NW: gl.constexpr = gl.num_warps()
    L: gl.constexpr = tile_layout(NW, BV, True)
    MMA: gl.constexpr = tile_layout(NW, BV, False)
    Q: gl.constexpr = quarter_layout(NW)
    dys_of = steps_of(dys, C, BV)
    chunks = c_last - c_first
    t_last = (c_last - 1) * C
    if chunks > 0:
        stage_rows(ks.index(0), k_at, k_st, k_sk, first + t_last, length - t_last, block * BK, K, C, BK)
        stage_rows(vs.index(0), v_at, v_st, v_sv, first + t_last, length - t_last, 0, V, C, BV)
        stage_gate(fs.index(0), f_at, f_st, first + t_last, length - t_last, C)
    async_copy.commit_group()
    for back in range(0, chunks):
        c = c_last - 1 - back
        t0 = c * C
        left = length - t0
        now = back % 2
        if HAS_DY:
            stage_rows(dys, dy_at, dy_st, dy_sv, first + t0, left, 0, V, C, BV)
            async_copy.commit_group()
        before = gl.where(c > c_first, C, 0)  # steps of the chunk before, if any
        stage_rows(ks.index(1 - now), k_at, k_st, k_sk, first + t0 - C, before, block * BK, K, C, BK)
        stage_rows(vs.index(1 - now), v_at, v_st, v_sv, first + t0 - C, before, 0, V, C, BV)
        stage_gate(fs.index(1 - now), f_at, f_st, first + t0 - C, before, C)
        async_copy.commit_group()
        c_at = ckpt_ptr + (c // 2).to(gl.int64) * ckpt_step + c % 2 * (K * V)
        n0, n1, n2, n3 = in_quarters(load_state(c_at, block * BK, K, V, BK, BV), BK, BV)
        async_copy.wait_group(1)
        finish_gate(fs.index(now), left, C)
        k_now = steps_of(ks.index(now), C, BK)
        v_now = steps_of(vs.index(now), C, BV)
        f_now = steps_of(fs.index(now), C, 1)
        groups = (gl.minimum(left, C) + 3) // 4
        note(scratch, n0, n1, n2, n3, BK)
        h0 = n0.to(gl.float32)
        h1 = n1.to(gl.float32)
        h2 = n2.to(gl.float32)
        h3 = n3.to(gl.float32)
        k, v = factors(k_now, v_now, 0, BK, BV)
        u = begin(h0, h1, h2, h3, outer(k, v, BK, BV, L), W, BV, LOW, L)
        k, v = factors(k_now, v_now, 1, BK, BV)
        for g in range(0, groups - 1):
            for m in gl.static_range(4):
                t = g * 4 + m
                seed = outer(k, v, BK, BV, L)
                k, v = factors(k_now, v_now, gl.minimum(t + 2, C - 1), BK, BV)
                h0, h1, h2, h3, n0, n1, n2, n3, _, _, _, _, _, _, _, _, later = step(
                    h0, h1, h2, h3, u, seed, 1.0 - gate(f_now, t, Q), W, True, BK, BV
                )
                u = warpgroup_mma_wait(0, [later])
            note(scratch + (g + 1) * (BK * BV), n0, n1, n2, n3, BK)
        for back_g in range(0, groups):
            g = groups - 1 - back_g
            count = groups_in_all - 1 - (c - c_first) * (C // 4) - g
            slot = count % 2
            h0 = n0.to(gl.float32)
            h1 = n1.to(gl.float32)
            h2 = n2.to(gl.float32)
            h3 = n3.to(gl.float32)
            k, v = factors(k_now, v_now, g * 4, BK, BV)
            u = begin(h0, h1, h2, h3, outer(k, v, BK, BV, L), W, BV, LOW, L)
            k, v = factors(k_now, v_now, g * 4 + 1, BK, BV)
            mbarrier.wait(empty.index(slot), count // 2 % 2 ^ 1)
            hs.index(slot * 4).store(whole(n0, n1, n2, n3, BK, BV, L))
            n0, n1, n2, n3 = noted(scratch + gl.maximum(g - 1, 0) * (BK * BV), BK)
            dq = gl.full((BK, 8), 0.0, gl.float32, MMA)
            for m in gl.static_range(4):
                t = g * 4 + m
                seed = outer(k, v, BK, BV, L)
                if m < 2:
                    k, v = factors(k_now, v_now, t + 2, BK, BV)
                h0, h1, h2, h3, a0, a1, a2, a3, e0, e1, e2, e3, s0, s1, s2, s3, later = step(
                    h0, h1, h2, h3, u, seed, 1.0 - gate(f_now, t, Q), W, m < 3, BK, BV
                )
                a = whole(a0, a1, a2, a3, BK, BV, L)
                if m < 3:
                    hs.index(slot * 4 + m + 1).store(a)
                es.index(slot * 4 + m).store(whole(e0, e1, e2, e3, BK, BV, L))
                ss.index(slot * 4 + m).store(whole(s0, s1, s2, s3, BK, BV, L))
                if HAS_DY:
                    left_h = gl.convert_layout(a, left_layout(MMA), assert_trivial=True)
                    dq = mma_v2(left_h, column_of_right_operand(dys_of, t, m, BV, MMA), dq)
                if m < 3:
                    u = warpgroup_mma_wait(0, [later])
            fence_async_shared()
            mbarrier.arrive(full.index(slot))
            if HAS_DY:
                out = (t0 + g * 4).to(gl.int64) * dq_st
                store_columns(dq_at + out, dq, left - g * 4, dq_st, block * BK, K, BK)
    async_copy.wait_group(0)


@gluon.jit
def undo(carry, e_shared, s_shared, qs, ks, vs, fs, dys, u: gl.constexpr, Wt, dk, clip,
         BK: gl.constexpr, BV: gl.constexpr, CLIP: gl.constexpr, HAS_DY: gl.constexpr):  # fmt: skip
    """One step backwards: the carry, each thread's part of df, dk with column u filled in; dU takes the place of S."""
    LOW: gl.constexpr = s_shared.dtype
    L: gl.constexpr = carry.type.layout
    MMA: gl.constexpr = dk.type.layout
    d = carry
    if CLIP:
        d = clamp(d, clip, True)
    if HAS_DY:
        d = d + rows(qs, u, BK, L) * columns(dys, u, BV, L)
    du = multiply(d.to(LOW), s_shared.load(L))
    later = warpgroup_mma(left_operand(du), Wt, gate(fs, u, L) * d, is_async=True)
    s_shared.store(du)
    df = sum_own(d * to_float(e_shared.load(L)), BK, BV)
    left = gl.convert_layout(du, left_layout(MMA), assert_trivial=True)
    dk = mma_v2(left, column_of_right_operand(vs, u, u, BV, MMA), dk)
    return warpgroup_mma_wait(0, [later]), df, dk


@gluon.jit
def add_rows(dv, du_shared, ks, u: gl.constexpr, BK: gl.constexpr):
    """dUᵀ k into column u of dv [BV, 8]."""
    MMA: gl.constexpr = dv.type.layout
    return mma_v2(du_shared.permute((1, 0)).load(left_layout(MMA)), rows_of_right_operand(ks, u, u, BK, MMA), dv)


@gluon.jit
def stage_group(i, t, left, first, block, ks, vs, qs, dys, fs, k_at, k_st, k_sk, v_at, v_st, v_sv,
                q_at, q_st, q_sk, dy_at, dy_st, dy_sv, f_at, f_st,
                K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, HAS_DY: gl.constexpr,
                ):  # fmt: skip
    """Begin copying the inputs of four steps from t to place i."""
    stage_rows(ks.index(i), k_at, k_st, k_sk, first + t, left, block * BK, K, 4, BK)
    stage_rows(vs.index(i), v_at, v_st, v_sv, first + t, left, 0, V, 4, BV)
    stage_gate(fs.index(i), f_at, f_st, first + t, left, 4)
    if HAS_DY:
        stage_rows(qs.index(i), q_at, q_st, q_sk, first + t, left, block * BK, K, 4, BK)
        stage_rows(dys.index(i), dy_at, dy_st, dy_sv, first + t, left, 0, V, 4, BV)
    async_copy.commit_group()


@gluon.jit
def undo_all(
    first, length, block, c_first, groups_in_all, ks, vs, qs, dys, fs, W, hs, es, ss, full, empty,
    k_at, k_st, k_sk, v_at, v_st, v_sv, q_at, q_st, q_sk, dy_at, dy_st, dy_sv, f_at, f_st,
    carry_ptr, dW_ptr, dk_at, dk_st, dv_at, dv_st, df_at, df_st, clip,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr,
    HAS_DY: gl.constexpr, CLIP: gl.constexpr,
):  # fmt: skip
    """carry_ptr and dW_ptr: of this state; dk_at, dv_at and df_at: its lines of time 0."""
    NW: gl.constexpr = gl.num_warps()
    L: gl.constexpr = tile_layout(NW, BV, True)
    MMA: gl.constexpr = tile_layout(NW, BV, False)
    i = row_of(gl.expand_dims(gl.arange(0, BK, gl.SliceLayout(1, L)), 1), BK) + block * BK
    j = column_of(gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(0, L)), 0), BV)
    carry_at = carry_ptr + i * V + j
    in_state = (i < K) & (j < V)
    carry = gl.load(carry_at, mask=in_state, other=0.0)
    wi = column_of(gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(1, L)), 1), BV)
    in_W = (wi < V) & (j < V)
    dW_at = dW_ptr + wi * V + j
    dW = gl.load(dW_at, mask=in_W, other=0.0)
    Wt = W.permute((1, 0))

    STEP: gl.constexpr = gl.BlockedLayout([1], [32], [NW], [0])
    df_step = gl.arange(0, 4, STEP)
    line = gl.arange(0, 8, gl.SliceLayout(0, MMA))
    v_col = column_of(gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(1, MMA)), 1), BV)
    dv_offset = gl.expand_dims(line, 0) * dv_st + v_col

    if groups_in_all > 0:
        t = c_first * C + (groups_in_all - 1) * 4
        stage_group(
            0, t, length - t, first, block, ks, vs, qs, dys, fs, k_at, k_st, k_sk, v_at, v_st, v_sv,
            q_at, q_st, q_sk, dy_at, dy_st, dy_sv, f_at, f_st, K, V, BK, BV, HAS_DY,
        )  # fmt: skip
    for count in range(0, groups_in_all):
        slot = count % 2
        t = c_first * C + (groups_in_all - 1 - count) * 4
        steps = length - t
        before = gl.where(count < groups_in_all - 1, 4, 0)
        stage_group(
            1 - slot, t - 4, before, first, block, ks, vs, qs, dys, fs, k_at, k_st, k_sk, v_at, v_st, v_sv,
            q_at, q_st, q_sk, dy_at, dy_st, dy_sv, f_at, f_st, K, V, BK, BV, HAS_DY,
        )  # fmt: skip
        async_copy.wait_group(1)
        finish_gate(fs.index(slot), steps, 4)
        k_now = steps_of(ks.index(slot), 4, BK)
        q_now = steps_of(qs.index(slot), 4, BK)
        v_now = steps_of(vs.index(slot), 4, BV)
        dy_now = steps_of(dys.index(slot), 4, BV)
        f_now = steps_of(fs.index(slot), 4, 1)
        mbarrier.wait(full.index(slot), count // 2 % 2)
        e = slot * 4
        dk = gl.full((BK, 8), 0.0, gl.float32, MMA)
        carry, df3, dk = undo(
            carry, es.index(e + 3), ss.index(e + 3), q_now, k_now, v_now, f_now, dy_now, 3, Wt, dk, clip,
            BK, BV, CLIP, HAS_DY,
        )  # fmt: skip
        carry, df2, dk = undo(
            carry, es.index(e + 2), ss.index(e + 2), q_now, k_now, v_now, f_now, dy_now, 2, Wt, dk, clip,
            BK, BV, CLIP, HAS_DY,
        )  # fmt: skip
        carry, df1, dk = undo(
            carry, es.index(e + 1), ss.index(e + 1), q_now, k_now, v_now, f_now, dy_now, 1, Wt, dk, clip,
            BK, BV, CLIP, HAS_DY,
        )  # fmt: skip
        carry, df0, dk = undo(
            carry, es.index(e), ss.index(e), q_now, k_now, v_now, f_now, dy_now, 0, Wt, dk, clip,
            BK, BV, CLIP, HAS_DY,
        )  # fmt: skip
        fence_async_shared()
        dv = gl.full((BV, 8), 0.0, gl.float32, MMA)
        dv = add_rows(dv, ss.index(e + 3), k_now, 3, BK)
        dW_later = warpgroup_mma(hs.index(e + 3).permute((1, 0)), ss.index(e + 3), dW, is_async=True)
        dW_later = warpgroup_mma(hs.index(e + 2).permute((1, 0)), ss.index(e + 2), dW_later, is_async=True)
        dW_later = warpgroup_mma(hs.index(e + 1).permute((1, 0)), ss.index(e + 1), dW_later, is_async=True)
        dW_later = warpgroup_mma(hs.index(e).permute((1, 0)), ss.index(e), dW_later, is_async=True)
        dv = add_rows(dv, ss.index(e + 2), k_now, 2, BK)
        dv = add_rows(dv, ss.index(e + 1), k_now, 1, BK)
        dv = add_rows(dv, ss.index(e), k_now, 0, BK)
        df = gl.join(gl.join(df0, df2), gl.join(df1, df3)).reshape((32 * NW, 4))  # join's last axis is the fastest
        df = gl.convert_layout(gl.sum(df, 0), STEP)
        dW = warpgroup_mma_wait(0, [dW_later])
        mbarrier.arrive(empty.index(slot))
        t = t.to(gl.int64)
        store_columns(dk_at + t * dk_st, dk, steps, dk_st, block * BK, K, BK)
        gl.store(df_at + t * df_st + df_step * df_st, df, mask=df_step < steps)
        gl.store(dv_at + t * dv_st + dv_offset, dv.to(dv_at.dtype.element_ty),
                 mask=gl.expand_dims(line < gl.minimum(steps, 4), 0) & (v_col < V))  # fmt: skip
    async_copy.wait_group(0)
    gl.store(carry_at, carry, mask=in_state)
    gl.store(dW_at, dW, mask=in_W)


@gluon.jit(do_not_specialize=["T", "NC", "chunk_first", "chunk_last", "window", "f_sb", "df_skb"])
def scan_backward_wide_kernel(
    q_ptr, k_ptr, v_ptr, f_ptr, W_ptr, dy_ptr, cu_ptr, ckpt_ptr, scratch_ptr,
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

    ks = gl.allocate_shared_memory(LOW, [2, C, BK], ROW_MAJOR)
    vs = gl.allocate_shared_memory(LOW, [2, C, BV], ROW_MAJOR)
    fs = gl.allocate_shared_memory(gl.float32, [2, C], LINE)
    dys = gl.allocate_shared_memory(LOW, [C, BV], ROW_MAJOR)
    group_k = gl.allocate_shared_memory(LOW, [2, 4, BK], ROW_MAJOR)
    group_q = gl.allocate_shared_memory(LOW, [2, 4, BK], ROW_MAJOR)
    group_v = gl.allocate_shared_memory(LOW, [2, 4, BV], ROW_MAJOR)
    group_dy = gl.allocate_shared_memory(LOW, [2, 4, BV], ROW_MAJOR)
    group_f = gl.allocate_shared_memory(gl.float32, [2, 4], LINE)
    hs = gl.allocate_shared_memory(LOW, [8, BK, BV], SWIZZLED)
    es = gl.allocate_shared_memory(LOW, [8, BK, BV], SWIZZLED)
    ss = gl.allocate_shared_memory(LOW, [8, BK, BV], SWIZZLED)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    W = gl.allocate_shared_memory(
        LOW, [BV, BV], SWIZZLED, load_W(W_ptr + (n // Gw) * (V * V), V, BV, False, L).to(LOW)
    )
    fence_async_shared()
    sn = s * N + n
    scratch = scratch_ptr + (sn * gl.num_programs(1) + block) * (C // 4 * BK * BV)
    t_first = c_first * C
    groups_in_all = (gl.maximum(gl.minimum(length, c_last * C) - t_first, 0) + 3) // 4
    gl.warp_specialize(
        [
            (redo, (
                first, length, block, c_first, c_last, groups_in_all, ks, vs, fs, dys, W, hs, es, ss, full, empty,
                k_at, k_st, k_sk, v_at, v_st, v_sv, f_at, f_st, dy_at, dy_st, dy_sv,
                ckpt_ptr + (slot * N + n) * (2 * K * V), N * (2 * K * V), scratch, dq_at, N * K,
                K, V, BK, BV, C, HAS_DY,
            )),
            (undo_all, (
                first, length, block, c_first, groups_in_all, group_k, group_v, group_q, group_dy, group_f, W,
                hs, es, ss, full, empty,
                k_at, k_st, k_sk, v_at, v_st, v_sv, q_at, q_st, q_sk, dy_at, dy_st, dy_sv, f_at, f_st,
                carry_ptr + sn * (K * V), dW_ptr + (sn * gl.num_programs(1) + block) * (V * V),
                dk_at, N * K, dv_at, N * V, df_at, N, clip, K, V, BK, BV, C, HAS_DY, CLIP,
            )),
        ],
        [4], [256],
    )  # fmt: skip
