# SPDX-License-Identifier: Apache-2.0
"""The backward scan for 16-bit inputs on NVIDIA GPUs, in Gluon: what `backward.py` does, a warp to a tile.

    program (s, n, block of rows), chunks of C steps of the window from the last to the first
      1. from the chunk's checkpoint, redo its steps and note H every 4 steps in shared memory
      2. for every group of 4 steps from the last: redo it, keeping in shared memory H' = H_{t-1} and, in fp32,
         E = H' - Z, and in registers S = (1-f)(1 - Z ⊙ Z) as pairs of 16 bits; and dq = H dy
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

from .outer import (
    add_outer,
    held_by_all,
    in_blocks,
    load_columns,
    load_right,
    load_rows,
    load_W,
    only_column_at,
    only_step_at,
    outer,
    pick,
    store_steps,
)
from .shares import hand_over, share, wait_for
from .tile import (
    LINE,
    LINES,
    _powers,
    advance,
    again,
    clamp,
    finish_gate,
    left_layout,
    left_operand,
    multiply,
    right_layout,
    stage_gate,
    stage_rows,
    sum_own,
    tile_in_shared,
    tile_layout,
    to_cache,
    turned,
)  # fmt: skip


@gluon.jit
def by_thread(x, BK: gl.constexpr, BV: gl.constexpr):
    """The tile with what one thread holds side by side, four and four: stored and loaded 16 bytes at a time."""
    NW: gl.constexpr = gl.num_warps()
    x = x.reshape((BK // (16 * NW), NW, 2, 8, BV // 8, 4, 2)).permute((0, 4, 1, 3, 5, 2, 6))
    return x.reshape((BK * BV // (128 * NW), 32 * NW, 4))


@gluon.jit
def load_tile(shared, BK: gl.constexpr, BV: gl.constexpr, L: gl.constexpr):
    """What was stored `by_thread`."""
    NW: gl.constexpr = gl.num_warps()
    OWN: gl.constexpr = own_layout(BK, BV, NW)
    x = shared.load(OWN).reshape((BK // (16 * NW), BV // 8, NW, 8, 4, 2, 2)).permute((0, 2, 5, 3, 1, 4, 6))
    return gl.convert_layout(x.reshape((BK, BV)), L, assert_trivial=True)


@gluon.constexpr_function
def own_layout(BK, BV, NW):
    quads = BK * BV // (128 * NW)
    registers = [[0, 0, 1], [0, 0, 2]] + [[*b, 0, 0] for b in _powers(1, quads)]
    lanes = [[0, 1, 0], [0, 2, 0], [0, 4, 0], [0, 8, 0], [0, 16, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, *b, 0] for b in _powers(32, NW)], [], [quads, 32 * NW, 4])


@gluon.constexpr_function
def spread_layout():
    """[32, 4], four partial sums of every thread, so that a thread adds four of one step."""
    lanes = [[0, 1], [0, 2], [4, 0], [8, 0], [16, 0]]
    return gl.DistributedLinearLayout([[1, 0], [2, 0]], lanes, [], [], [32, 4])


@gluon.jit
def redo(h, h_low, k8, v8, f8, dy_right, e_shared, first, u: gl.constexpr, W, dq, BK: gl.constexpr, BV: gl.constexpr,
         HAS_DY: gl.constexpr):  # fmt: skip
    """One step forwards: the new state, what backward needs of it, and dq with its column filled in."""
    LOW: gl.constexpr = h_low.dtype
    L: gl.constexpr = h.type.layout
    f = pick(f8, u)
    h, z, e = advance(h, h_low, outer(k8, only_step_at(v8, first, u, BV), BK, BV, L), f, W)
    s = ((1.0 - z * z) * (1.0 - f)).to(LOW)  # rounded once: an error of 1 - f alone would be every element's
    h_low = h.to(LOW)
    if HAS_DY:
        dq = mma_v2(left_operand(h_low), only_column_at(dy_right, first + u, BV), dq)
    e_shared.index(u).store(by_thread(e, BK, BV))
    return h, h_low, s, dq


@gluon.jit
def undo(carry, h_before, e_shared, s, q8, f8, dy8, v_right, k_right, first, u: gl.constexpr, Wt, dk, dv, dWt, clip,
         BK: gl.constexpr, BV: gl.constexpr, CLIP: gl.constexpr, HAS_DY: gl.constexpr):  # fmt: skip
    """One step backwards from H_{t-1} in shared memory; also each thread's part of df, in fp32.

    The step's columns of dk [BK, 8] and of dv [BV, 8] are filled in.
    """
    LOW: gl.constexpr = s.dtype
    L: gl.constexpr = carry.type.layout
    d = carry
    if CLIP > 0:
        d = clamp(d, clip, CLIP == 2)
    if HAS_DY:
        d = add_outer(d, q8, only_step_at(dy8, first, u, BV), BK, BV)
    du = multiply(d.to(LOW), s)
    carry = mma_v2(left_operand(du), Wt, pick(f8, u) * d)
    dk = mma_v2(left_operand(du), only_column_at(v_right, first + u, BV), dk)
    df = sum_own(d * load_tile(e_shared.index(u), BK, BV, L), BK, BV)
    du_t = gl.convert_layout(turned(du, BK, BV).permute((1, 0)), left_layout(L), assert_trivial=True)
    dv = mma_v2(du_t, only_column_at(k_right, first + u, BK), dv)
    dWt = mma_v2(du_t, h_before.load(right_layout(L)), dWt)
    return carry, df, dk, dv, dWt


@gluon.jit(
    do_not_specialize=[
        "T", "NC", "chunk_first", "chunk_last", "window", "f_sb", "f_st", "df_skb", "scans", "units",
    ]
)  # fmt: skip
def scan_backward_gluon_kernel(
    q_ptr, k_ptr, v_ptr, f_ptr, W_ptr, dy_ptr, cu_ptr, walks_ptr, ckpt_ptr,
    carry_ptr, dW_ptr, dq_ptr, dk_ptr, dv_ptr, df_ptr,
    T, NC, chunk_first, chunk_last, window, clip,
    q_sb, q_st, q_sn, q_sk, k_sb, k_st, k_sn, k_sk, v_sb, v_st, v_sn, v_sv, f_sb, f_st, f_sn,
    dy_sb, dy_st, dy_sn, dy_sv,
    dv_skb, df_skb,  # elements between the partial sums of two blocks of rows
    flags_ptr, scans, units,  # if scans are shared out: see `shares.py`; a unit is a chunk, the window's last first
    N: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    Gq: gl.constexpr, Gk: gl.constexpr, Gv: gl.constexpr, Gf: gl.constexpr, Gw: gl.constexpr,
    BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr,
    PACKED: gl.constexpr, PLANNED: gl.constexpr, HAS_DY: gl.constexpr, CLIP: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    LOW: gl.constexpr = v_ptr.dtype.element_ty
    L: gl.constexpr = tile_layout(1, BV, False)
    BLOCKS: gl.constexpr = (K + BK - 1) // BK

    staged_k = gl.allocate_shared_memory(LOW, [C, BK], tile_in_shared(BK))
    staged_q = gl.allocate_shared_memory(LOW, [C, BK], tile_in_shared(BK))
    staged_v = gl.allocate_shared_memory(LOW, [C, BV], tile_in_shared(BV))
    staged_dy = gl.allocate_shared_memory(LOW, [C, BV], tile_in_shared(BV))
    staged_f = gl.allocate_shared_memory(gl.float32, [C], LINE)
    e_shared = gl.allocate_shared_memory(gl.float32, [4, BK * BV // 128, 32, 4], LINES)
    noted = gl.allocate_shared_memory(LOW, [C // 4, BK, BV], tile_in_shared(BV))
    h1_shared = gl.allocate_shared_memory(LOW, [BK, BV], tile_in_shared(BV))
    h2_shared = gl.allocate_shared_memory(LOW, [BK, BV], tile_in_shared(BV))
    h3_shared = gl.allocate_shared_memory(LOW, [BK, BV], tile_in_shared(BV))
    ks = in_blocks(staged_k, C, 8, BK)
    qs = in_blocks(staged_q, C, 8, BK)
    vs = in_blocks(staged_v, C, 8, BV)
    dys = in_blocks(staged_dy, C, 8, BV)
    fs = in_blocks(staged_f, C, 4, 1)
    GATES: gl.constexpr = held_by_all(4, 1)

    i = gl.expand_dims(gl.arange(0, BK, gl.SliceLayout(1, L)), 1)
    j = gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(0, L)), 0)
    state = i * V + j
    wi = gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(1, L)), 1)
    in_W = (wi < V) & (j < V)

    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    SPREAD: gl.constexpr = spread_layout()
    df_step = gl.arange(0, 4, gl.SliceLayout(0, SPREAD))

    piece_first = gl.program_id(0).to(gl.int64)
    piece_last = piece_first + 1
    if SHARED:
        piece_first, piece_last = share(piece_first, gl.num_programs(0), scans.to(gl.int64) * units)
    else:
        units = 1
    scan_last = (piece_last - 1) // units
    scans_here = (scan_last - piece_first // units + 1).to(gl.int32)
    if PLANNED:
        walk_at = walks_ptr + piece_first // (BLOCKS * N) * 4
        scans_here = gl.where(gl.load(walk_at + 2) > gl.load(walk_at + 1), scans_here, 0)
    for back_scan in range(0, scans_here):
        scan = scan_last - back_scan
        unit_first = (gl.maximum(piece_first, scan * units) - scan * units).to(gl.int32)
        unit_last = (gl.minimum(piece_last, (scan + 1) * units) - scan * units).to(gl.int32)
        block = (scan % BLOCKS).to(gl.int32)
        s = scan // BLOCKS // N
        n = scan // BLOCKS % N
        if PLANNED:
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

        sn = s * N + n
        own = state + block * (BK * V)
        in_state = (i + block * BK < K) & (j < V)
        carry_at = carry_ptr + sn * (K * V) + own
        if SHARED:
            c_first = gl.maximum(chunk_first, chunk_last - unit_last)
            c_last = chunk_last - unit_first
            if unit_first > 0:
                wait_for(flags_ptr + scan)
        carry = gl.load(carry_at, mask=in_state, other=0.0)
        W = load_W(W_ptr + (n // Gw) * (V * V), V, BV, False, right_layout(L)).to(LOW)
        Wt = load_W(W_ptr + (n // Gw) * (V * V), V, BV, True, right_layout(L)).to(LOW)
        dWt_at = dW_ptr + (sn * BLOCKS + block) * (V * V) + j * V + wi
        dWt = gl.load(dWt_at, mask=in_W, other=0.0)

        for back in range(0, c_last - c_first):
            c = c_last - 1 - back
            t0 = c * C
            left = length - t0
            zero = 0
            if SHARED:
                zero = again(back) - back
            stage_rows(staged_k, k_at, k_st, k_sk, first + t0, left, block * BK, K, C, BK, zero)
            stage_rows(staged_v, v_at, v_st, v_sv, first + t0, left, 0, V, C, BV, zero)
            stage_gate(staged_f, f_at, f_st, first + t0, left, C, zero)
            async_copy.commit_group()
            if HAS_DY:
                stage_rows(staged_q, q_at, q_st, q_sk, first + t0, left, block * BK, K, C, BK, zero)
                stage_rows(staged_dy, dy_at, dy_st, dy_sv, first + t0, left, 0, V, C, BV, zero)
                async_copy.commit_group()
            ckpt_at = ckpt_ptr + ((slot + c // 2) * N + n) * (2 * K * V) + c % 2 * (K * V)
            h_low = gl.load(ckpt_at + own, mask=in_state, other=0.0)
            before = gl.maximum(c - 1, 0)  # the chunk whose turn is next
            t_before = first + gl.minimum(before * C + lane % C, length - 1)
            to_cache(v_at + t_before * v_st)
            before_at = ckpt_ptr + ((slot + before // 2) * N + n) * (2 * K * V) + before % 2 * (K * V)
            to_cache(before_at + gl.minimum(block * (BK * V) + lane * (BK * V // 32), K * V - 1))
            if HAS_DY:
                to_cache(dy_at + t_before * dy_st)
                async_copy.wait_group(1)
            else:
                async_copy.wait_group(0)
            finish_gate(staged_f, left, C)
            groups = (gl.minimum(left, C) + 3) // 4
            h = h_low.to(gl.float32)
            noted.index(0).store(h_low)
            for g in range(0, groups - 1):
                k8 = load_rows(ks.index(g // 2), L)
                v8 = load_columns(vs.index(g // 2), BV)
                f4 = fs.index(g).load(GATES)
                for u in gl.static_range(4):
                    seed = outer(k8, only_step_at(v8, g % 2 * 4, u, BV), BK, BV, L)
                    h, _, _ = advance(h, h.to(LOW), seed, pick(f4, u), W)
                noted.index(g + 1).store(h.to(LOW))
            async_copy.wait_group(0)
            for back_8 in range(0, (groups + 1) // 2):
                o = (groups + 1) // 2 - 1 - back_8
                dq = gl.full((BK, 8), 0.0, gl.float32, L)
                dk = gl.full((BK, 8), 0.0, gl.float32, L)
                dv = gl.full((BV, 8), 0.0, gl.float32, L)
                steps = left - o * 8
                out = ((t0 + o * 8).to(gl.int64)) * N
                for back_g in range(0, gl.minimum(groups - 2 * o, 2)):
                    g = gl.minimum(groups - 1, 2 * o + 1) - back_g
                    u0 = g % 2 * 4
                    f4 = fs.index(g).load(GATES)
                    k8 = load_rows(ks.index(o), L)
                    v8 = load_columns(vs.index(o), BV)
                    dy_right = v8
                    if HAS_DY:
                        dy_right = load_right(dys.index(o), L)
                    h0 = gl.convert_layout(noted.index(g).load(left_layout(L)), L, assert_trivial=True)
                    h = h0.to(gl.float32)
                    h, h1, s0, dq = redo(h, h0, k8, v8, f4, dy_right, e_shared, u0, 0, W, dq, BK, BV, HAS_DY)
                    h1_shared.store(h1)
                    h, h2, s1, dq = redo(h, h1, k8, v8, f4, dy_right, e_shared, u0, 1, W, dq, BK, BV, HAS_DY)
                    h2_shared.store(h2)
                    h, h3, s2, dq = redo(h, h2, k8, v8, f4, dy_right, e_shared, u0, 2, W, dq, BK, BV, HAS_DY)
                    h3_shared.store(h3)
                    h, _, s3, dq = redo(h, h3, k8, v8, f4, dy_right, e_shared, u0, 3, W, dq, BK, BV, HAS_DY)
                    q8 = k8
                    dy8 = v8
                    if HAS_DY:
                        q8 = load_rows(qs.index(o), L)
                        dy8 = load_columns(dys.index(o), BV)
                    v_right = load_right(vs.index(o), L)
                    k_right = load_right(ks.index(o), L)
                    carry, df3, dk, dv, dWt = undo(
                        carry, h3_shared, e_shared, s3, q8, f4, dy8, v_right, k_right, u0, 3, Wt, dk, dv, dWt, clip,
                        BK, BV, CLIP, HAS_DY,
                    )  # fmt: skip
                    carry, df2, dk, dv, dWt = undo(
                        carry, h2_shared, e_shared, s2, q8, f4, dy8, v_right, k_right, u0, 2, Wt, dk, dv, dWt, clip,
                        BK, BV, CLIP, HAS_DY,
                    )  # fmt: skip
                    carry, df1, dk, dv, dWt = undo(
                        carry, h1_shared, e_shared, s1, q8, f4, dy8, v_right, k_right, u0, 1, Wt, dk, dv, dWt, clip,
                        BK, BV, CLIP, HAS_DY,
                    )  # fmt: skip
                    carry, df0, dk, dv, dWt = undo(
                        carry, noted.index(g), e_shared, s0, q8, f4, dy8, v_right, k_right, u0, 0,
                        Wt, dk, dv, dWt, clip,
                        BK, BV, CLIP, HAS_DY,
                    )  # fmt: skip
                    df = gl.join(gl.join(df0, df2), gl.join(df1, df3))  # the last axis of join is the fastest
                    df = gl.sum(gl.convert_layout(df.reshape((32, 4)), SPREAD), 0)
                    gl.store(df_at + (t0 + g * 4).to(gl.int64) * N + df_step * N, df, mask=df_step < left - g * 4)
                if HAS_DY:
                    store_steps(dq_at + out * K, dq, steps, N * K, block * BK, K, BK)
                store_steps(dk_at + out * K, dk, steps, N * K, block * BK, K, BK)
                store_steps(dv_at + out * V, dv, steps, N * V, 0, V, BV)
        if SHARED:
            # Or 24 registers would keep these addresses during the walk.
            here = again(block) - block
            i_now = i + here
            j_now = j + here
            w_now = wi + here
            carry_now = carry_ptr + sn * (K * V) + (i_now * V + j_now + block * (BK * V))
            gl.store(carry_now, carry, mask=(i_now + block * BK < K) & (j_now < V))
            dWt_now = dW_ptr + (sn * BLOCKS + block) * (V * V) + (j_now * V + w_now)
            gl.store(dWt_now, dWt, mask=(w_now < V) & (j_now < V))
        else:
            gl.store(carry_at, carry, mask=in_state)
            gl.store(dWt_at, dWt, mask=in_W)
        if SHARED:
            if unit_last < units:
                hand_over(flags_ptr + scan)
