# SPDX-License-Identifier: Apache-2.0
"""The backward scan at V = 64 on Hopper: what `backward_gluon.py` does, two warpgroups to 64 rows of the state.

One state fills a multiprocessor, so warps, not programs, must overlap. Four warps redo the forward walk from a
checkpoint (`quarters.py`) and leave H_{t-1}, E = H_{t-1} - Z_t and S = (1 - f)(1 - Z²) of four steps at a time in
shared memory; four others undo these steps while the first four redo the ones before them. Redoing goes twice over a
chunk: once to note the state every four steps, in a scratch that stays in L2, and once, from its last group to its
first, for what undoing needs.

Sums over rows or columns with a vector (dq, dk, dv) are products of N = 8, whose right operand is eight lines of dy, v
or k: all but one column of each is thrown away, which costs less than a product that stops the warps (HMMA waits for
the tensor cores, warpgroup products do not).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
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
    PRIVATE_REINTERPRET,
    ROW_MAJOR,
    SWIZZLED,
    clamp,
    column_of,
    columns,
    columns_in_memory,
    finish_gate,
    gate,
    left_operand,
    load_W,
    multiply,
    row_of,
    rows,
    stage_gate,
    stage_rows,
    steps_of,
    sum_own,
    tile_layout,
    to_float,
)  # fmt: skip


@gluon.constexpr_function
def lines_layout(C, NW):
    """[C, 64] in memory order, pairs of columns to a lane."""
    steps = [[2**i, 0] for i in range(C.bit_length() - 1)]
    warps = steps[: NW.bit_length() - 1]
    lanes = [[0, 2], [0, 4], [0, 8], [0, 16], [0, 32]]
    return gl.DistributedLinearLayout([[0, 1], *steps[len(warps) :]], lanes, warps, [], [C, 64])


@gluon.jit
def load_lines(ptr, stride_t, stride_d, t, left, d_first, D: gl.constexpr, C: gl.constexpr, BD: gl.constexpr):
    """ptr[t : t + C, d_first : d_first + BD]; zeros past `left` steps or past D."""
    X: gl.constexpr = lines_layout(C, gl.num_warps())
    i = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(1, X)), 1)
    d = gl.expand_dims(gl.arange(0, BD, gl.SliceLayout(0, X)), 0) + d_first
    at = ptr + t.to(gl.int64) * stride_t + (i.to(gl.int64) * stride_t + d * stride_d)
    return gl.load(at, mask=(i < left) & (d < D), other=0.0)


@gluon.jit
def as_one_tile(shared, C: gl.constexpr, D: gl.constexpr):
    """Swizzled tiles of eight lines as one of C: the swizzle repeats every eight."""
    if PRIVATE_REINTERPRET:
        return shared._reinterpret(shared.dtype, [C, D], SWIZZLED)
    else:
        return shared.reinterpret(shared.dtype, [C, D], SWIZZLED)


@gluon.jit
def columns_by_position(x, C: gl.constexpr, BV: gl.constexpr):
    """[C, BV] in memory order -> by position."""
    return x.reshape((C, 4, BV // 8, 2)).permute((0, 2, 1, 3)).reshape((C, BV))


@gluon.jit
def rows_by_position(x, C: gl.constexpr, BK: gl.constexpr):
    return x.reshape((C, BK // 16, 8, 2)).permute((0, 1, 3, 2)).reshape((C, BK))


@gluon.jit
def left_operand_of(x, R: gl.constexpr):
    """The state-shaped x as left operand of a product with accumulators in layout R: the registers are the same."""
    return gl.convert_layout(x, gl.DotOperandLayout(0, R, 2), assert_trivial=True)


@gluon.jit
def store_lines(at, tile, begin, end, stride_t, k_first, K: gl.constexpr, BK: gl.constexpr):
    """Columns begin to end - 1 of tile [BK, 8], one per step, as rows of memory [8, K]."""
    NW: gl.constexpr = gl.num_warps()
    OUT: gl.constexpr = columns_in_memory(BK, NW)
    x = tile.reshape((NW, 2, 8, 8)).permute((3, 0, 2, 1)).reshape((8, BK))
    x = gl.convert_layout(x, OUT, assert_trivial=True)
    t = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(1, OUT)), 1)
    k = gl.expand_dims(gl.arange(0, BK, gl.SliceLayout(0, OUT)), 0) + k_first
    gl.store(at + t * stride_t + k, x.to(at.dtype.element_ty), mask=(t >= begin) & (t < end) & (k < K))


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
    THIN: gl.constexpr = tile_layout(NW, 8, True)
    Q: gl.constexpr = quarter_layout(NW)
    line = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, THIN)), 0)
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
            dy = load_lines(dy_at, dy_st, dy_sv, first + t0, left, 0, V, C, BV)
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
        if HAS_DY:
            as_one_tile(dys, C, BV).store(columns_by_position(dy, C, BV))
            fence_async_shared()
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
            a = whole(n0, n1, n2, n3, BK, BV, L)
            hs.index(slot * 4).store(a)
            n0, n1, n2, n3 = noted(scratch + gl.maximum(g - 1, 0) * (BK * BV), BK)
            dq = gl.full((BK, 8), 0.0, gl.float32, THIN)
            dy_of = dys.index(g // 2).permute((1, 0))  # [BV, 8]: of this group and its neighbour
            dy_first = g % 2 * 4
            for m in gl.static_range(4):
                t = g * 4 + m
                if HAS_DY and m > 0:
                    dq_later = warpgroup_mma(left_operand_of(a, THIN), dy_of, dq, use_acc=False, is_async=True)
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
                if HAS_DY and m > 0:
                    if m < 3:
                        u, dq_m = warpgroup_mma_wait(0, [later, dq_later])
                    else:
                        dq_m = warpgroup_mma_wait(0, [dq_later])
                    dq = gl.where(line == dy_first + (m - 1), dq_m, dq)
                elif m < 3:
                    u = warpgroup_mma_wait(0, [later])
            if HAS_DY:
                dq_later = warpgroup_mma(left_operand_of(a, THIN), dy_of, dq, use_acc=False, is_async=True)
            fence_async_shared()
            mbarrier.arrive(full.index(slot))
            if HAS_DY:
                dq_m = warpgroup_mma_wait(0, [dq_later])
                dq = gl.where(line == dy_first + 3, dq_m, dq)
                out = (t0 + g * 4 - dy_first).to(gl.int64) * dq_st
                steps = gl.minimum(left - g * 4, 4) + dy_first
                store_lines(dq_at + out, dq, dy_first, steps, dq_st, block * BK, K, BK)
    async_copy.wait_group(0)


@gluon.jit
def undo(carry, e_shared, s_shared, qs, fs, dys, u: gl.constexpr, Wt, v_of, clip,
         BK: gl.constexpr, BV: gl.constexpr, CLIP: gl.constexpr, HAS_DY: gl.constexpr):  # fmt: skip
    """One step backwards: D; dU, which takes the place of S; and, under way, the carry and, in column u, dk."""
    LOW: gl.constexpr = s_shared.dtype
    L: gl.constexpr = carry.type.layout
    THIN: gl.constexpr = tile_layout(gl.num_warps(), 8, True)
    d = carry
    if CLIP:
        d = clamp(d, clip, True)
    if HAS_DY:
        d = d + rows(qs, u, BK, L) * columns(dys, u, BV, L)
    du = multiply(d.to(LOW), s_shared.load(L))
    later = warpgroup_mma(left_operand(du), Wt, gate(fs, u, L) * d, is_async=True)
    nothing = gl.full((BK, 8), 0.0, gl.float32, THIN)
    dk = warpgroup_mma(left_operand_of(du, THIN), v_of, nothing, use_acc=False, is_async=True)
    return d, du, later, dk


@gluon.jit
def df_of(d, e_shared, BK: gl.constexpr, BV: gl.constexpr):
    """Each thread's part of df."""
    return sum_own(d * to_float(e_shared.load(d.type.layout)), BK, BV)


@gluon.jit
def add_up(dW, h_shared, du_shared, k_of, BV: gl.constexpr):
    """Under way: dW + Hᵀ dU, and dUᵀ k in the column of its step."""
    THIN: gl.constexpr = tile_layout(gl.num_warps(), 8, True)
    dW = warpgroup_mma(h_shared.permute((1, 0)), du_shared, dW, is_async=True)
    nothing = gl.full((BV, 8), 0.0, gl.float32, THIN)
    return dW, warpgroup_mma(du_shared.permute((1, 0)), k_of, nothing, use_acc=False, is_async=True)


@gluon.jit
def pick(x0, x1, x2, x3):
    """Column u of xu."""
    col = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, x0.type.layout)), 0)
    return gl.where(col == 0, x0, gl.where(col == 1, x1, gl.where(col == 2, x2, x3)))


@gluon.jit
def stage_group(i, t, left, first, block, qs, dys, fs, q_at, q_st, q_sk, dy_at, dy_st, dy_sv, f_at, f_st,
                K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, HAS_DY: gl.constexpr,
                ):  # fmt: skip
    """Begin copying the inputs of four steps from t to place i."""
    stage_gate(fs.index(i), f_at, f_st, first + t, left, 4)
    if HAS_DY:
        stage_rows(qs.index(i), q_at, q_st, q_sk, first + t, left, block * BK, K, 4, BK)
        stage_rows(dys.index(i), dy_at, dy_st, dy_sv, first + t, left, 0, V, 4, BV)
    async_copy.commit_group()


@gluon.jit
def undo_all(
    first, length, block, c_first, groups_in_all, k_tiles, v_tiles, qs, dys, fs, W, hs, es, ss, full, empty,
    k_at, k_st, k_sk, v_at, v_st, v_sv, q_at, q_st, q_sk, dy_at, dy_st, dy_sv, f_at, f_st,
    carry_ptr, dW_ptr, dk_at, dk_st, dv_at, dv_st, df_at, df_st, clip,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr,
    PLANNED: gl.constexpr, HAS_DY: gl.constexpr, CLIP: gl.constexpr,
):  # fmt: skip
    """carry_ptr and dW_ptr: of this state; dk_at, dv_at and df_at: its lines of time 0."""
    NW: gl.constexpr = gl.num_warps()
    L: gl.constexpr = tile_layout(NW, BV, True)
    THIN: gl.constexpr = tile_layout(NW, 8, True)
    i = row_of(gl.expand_dims(gl.arange(0, BK, gl.SliceLayout(1, L)), 1), BK) + block * BK
    j = column_of(gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(0, L)), 0), BV)
    carry_at = carry_ptr + i * V + j
    in_state = (i < K) & (j < V)
    if PLANNED:  # a program without a walk leaves the state of sequence 0 alone, which another may have
        in_state = in_state & (groups_in_all > 0)
    carry = gl.load(carry_at, mask=in_state, other=0.0)
    wi = column_of(gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(1, L)), 1), BV)
    in_W = (wi < V) & (j < V)
    if PLANNED:
        in_W = in_W & (groups_in_all > 0)
    dW_at = dW_ptr + wi * V + j
    dW = gl.load(dW_at, mask=in_W, other=0.0)
    Wt = W.permute((1, 0))

    STEP: gl.constexpr = gl.BlockedLayout([1], [32], [NW], [0])
    df_step = gl.arange(0, 4, STEP)
    line = gl.arange(0, 8, gl.SliceLayout(0, THIN))
    v_col = column_of(gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(1, THIN)), 1), BV)
    dv_offset = gl.expand_dims(line, 0) * dv_st + v_col

    t = c_first * C + (groups_in_all - 1) * 4
    in_group = gl.where(groups_in_all > 0, gl.minimum(length - t, 4), 0)
    k_next = load_lines(k_at, k_st, k_sk, first + t, in_group, block * BK, K, 8, BK)
    v_next = load_lines(v_at, v_st, v_sv, first + t, in_group, 0, V, 8, BV)
    if groups_in_all > 0:
        stage_group(
            0, t, length - t, first, block, qs, dys, fs, q_at, q_st, q_sk, dy_at, dy_st, dy_sv, f_at, f_st,
            K, V, BK, BV, HAS_DY,
        )  # fmt: skip
    for count in range(0, groups_in_all):
        slot = count % 2
        t = c_first * C + (groups_in_all - 1 - count) * 4
        steps = length - t
        before = gl.where(count < groups_in_all - 1, 4, 0)
        stage_group(
            1 - slot, t - 4, before, first, block, qs, dys, fs, q_at, q_st, q_sk, dy_at, dy_st, dy_sv, f_at, f_st,
            K, V, BK, BV, HAS_DY,
        )  # fmt: skip
        k_tiles.index(slot).store(rows_by_position(k_next, 8, BK))
        v_tiles.index(slot).store(columns_by_position(v_next, 8, BV))
        fence_async_shared()
        k_next = load_lines(k_at, k_st, k_sk, first + t - 4, before, block * BK, K, 8, BK)
        v_next = load_lines(v_at, v_st, v_sv, first + t - 4, before, 0, V, 8, BV)
        async_copy.wait_group(1)
        finish_gate(fs.index(slot), steps, 4)
        q_now = steps_of(qs.index(slot), 4, BK)
        dy_now = steps_of(dys.index(slot), 4, BV)
        f_now = steps_of(fs.index(slot), 4, 1)
        k_of = k_tiles.index(slot).permute((1, 0))
        v_of = v_tiles.index(slot).permute((1, 0))
        mbarrier.wait(full.index(slot), count // 2 % 2)
        i0 = slot * 4
        i1 = slot * 4 + 1
        i2 = slot * 4 + 2
        i3 = slot * 4 + 3
        # What is added up of a step is under way while the next one is undone.
        d, du, later, dk3 = undo(carry, es.index(i3), ss.index(i3), q_now, f_now, dy_now, 3, Wt, v_of, clip,
                                 BK, BV, CLIP, HAS_DY)  # fmt: skip
        ss.index(i3).store(du)
        fence_async_shared()
        df3 = df_of(d, es.index(i3), BK, BV)
        carry = warpgroup_mma_wait(1, [later])
        d, du, later, dk2 = undo(carry, es.index(i2), ss.index(i2), q_now, f_now, dy_now, 2, Wt, v_of, clip,
                                 BK, BV, CLIP, HAS_DY)  # fmt: skip
        dW_later, dv3 = add_up(dW, hs.index(i3), ss.index(i3), k_of, BV)
        ss.index(i2).store(du)
        fence_async_shared()
        df2 = df_of(d, es.index(i2), BK, BV)
        carry = warpgroup_mma_wait(3, [later])
        d, du, later, dk1 = undo(carry, es.index(i1), ss.index(i1), q_now, f_now, dy_now, 1, Wt, v_of, clip,
                                 BK, BV, CLIP, HAS_DY)  # fmt: skip
        dW_later, dv2 = add_up(dW_later, hs.index(i2), ss.index(i2), k_of, BV)
        ss.index(i1).store(du)
        fence_async_shared()
        df1 = df_of(d, es.index(i1), BK, BV)
        carry = warpgroup_mma_wait(3, [later])
        d, du, later, dk0 = undo(carry, es.index(i0), ss.index(i0), q_now, f_now, dy_now, 0, Wt, v_of, clip,
                                 BK, BV, CLIP, HAS_DY)  # fmt: skip
        dW_later, dv1 = add_up(dW_later, hs.index(i1), ss.index(i1), k_of, BV)
        ss.index(i0).store(du)
        fence_async_shared()
        df0 = df_of(d, es.index(i0), BK, BV)
        dW_later, dv0 = add_up(dW_later, hs.index(i0), ss.index(i0), k_of, BV)
        df = gl.join(gl.join(df0, df2), gl.join(df1, df3)).reshape((32 * NW, 4))  # join's last axis is the fastest
        df = gl.convert_layout(gl.sum(df, 0), STEP)
        carry, dW, dk0, dk1, dk2, dk3, dv0, dv1, dv2, dv3 = warpgroup_mma_wait(
            0, [later, dW_later, dk0, dk1, dk2, dk3, dv0, dv1, dv2, dv3]
        )
        mbarrier.arrive(empty.index(slot))
        dk = pick(dk0, dk1, dk2, dk3)
        dv = pick(dv0, dv1, dv2, dv3)
        out = t.to(gl.int64)
        store_lines(dk_at + out * dk_st, dk, 0, gl.minimum(steps, 4), dk_st, block * BK, K, BK)
        gl.store(df_at + out * df_st + df_step * df_st, df, mask=df_step < steps)
        gl.store(dv_at + out * dv_st + dv_offset, dv.to(dv_at.dtype.element_ty),
                 mask=gl.expand_dims(line < gl.minimum(steps, 4), 0) & (v_col < V))  # fmt: skip
    async_copy.wait_group(0)
    gl.store(carry_at, carry, mask=in_state)
    gl.store(dW_at, dW, mask=in_W)


@gluon.jit(do_not_specialize=["T", "NC", "chunk_first", "chunk_last", "window", "f_sb", "f_st", "df_skb"])
def scan_backward_wide_kernel(
    q_ptr, k_ptr, v_ptr, f_ptr, W_ptr, dy_ptr, cu_ptr, walks_ptr, ckpt_ptr, scratch_ptr,
    carry_ptr, dW_ptr, dq_ptr, dk_ptr, dv_ptr, df_ptr,
    T, NC, chunk_first, chunk_last, window, clip,
    q_sb, q_st, q_sn, q_sk, k_sb, k_st, k_sn, k_sk, v_sb, v_st, v_sn, v_sv, f_sb, f_st, f_sn,
    dy_sb, dy_st, dy_sn, dy_sv,
    dv_skb, df_skb,  # elements between the partial sums of two blocks of rows
    N: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    Gq: gl.constexpr, Gk: gl.constexpr, Gv: gl.constexpr, Gf: gl.constexpr, Gw: gl.constexpr,
    BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr,
    PACKED: gl.constexpr, PLANNED: gl.constexpr, HAS_DY: gl.constexpr, CLIP: gl.constexpr,
):  # fmt: skip
    LOW: gl.constexpr = v_ptr.dtype.element_ty
    NW: gl.constexpr = gl.num_warps()
    L: gl.constexpr = tile_layout(NW, BV, True)
    block = gl.program_id(1)
    s = (gl.program_id(0) // N).to(gl.int64)
    n = (gl.program_id(0) % N).to(gl.int64)
    if PLANNED:
        walk_at = walks_ptr + s * 4
        s = gl.load(walk_at).to(gl.int64)
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
        if PLANNED:
            c_first = gl.load(walk_at + 1)
            c_last = gl.load(walk_at + 2)
            origin = (gl.load(walk_at + 3) - c_first).to(gl.int64) * C
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
    dys = gl.allocate_shared_memory(LOW, [C // 8, 8, BV], SWIZZLED)
    group_k = gl.allocate_shared_memory(LOW, [2, 8, BK], SWIZZLED)
    group_v = gl.allocate_shared_memory(LOW, [2, 8, BV], SWIZZLED)
    group_q = gl.allocate_shared_memory(LOW, [2, 4, BK], ROW_MAJOR)
    group_dy = gl.allocate_shared_memory(LOW, [2, 4, BV], ROW_MAJOR)
    group_f = gl.allocate_shared_memory(gl.float32, [2, 4], LINE)
    hs = gl.allocate_shared_memory(LOW, [8, BK, BV], SWIZZLED)
    es = gl.allocate_shared_memory(gl.float16, [8, BK, BV], SWIZZLED)
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
    program = sn * gl.num_programs(1) + block
    if PLANNED:  # programs of one window, not states, have a scratch each
        program = gl.program_id(0).to(gl.int64) * gl.num_programs(1) + block
    scratch = scratch_ptr + program * (C // 4 * BK * BV)
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
                dk_at, N * K, dv_at, N * V, df_at, N, clip, K, V, BK, BV, C, PLANNED, HAS_DY, CLIP,
            )),
        ],
        [4], [256],
    )  # fmt: skip
