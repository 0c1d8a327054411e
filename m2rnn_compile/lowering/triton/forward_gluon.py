# SPDX-License-Identifier: Apache-2.0
"""The forward scan for 16-bit inputs on NVIDIA GPUs, in Gluon: `forward.py` with layouts and staging by hand.

W and H stay in registers. What limits a step is not the number of its instructions but what waits for what: tanh keeps
its unit busy for 128 of the cycles that a warp with 32 rows has, and loads from shared memory queue behind it. So

  - inputs are copied to shared memory 48 steps ahead, and loaded as operands of eight steps at once, a group ahead of
    their use; k vᵀ, and q handed to all threads of a row, are products of the tensor cores (`outer.py`);
  - a warp's rows are two halves, one half a step ahead: while one waits for tanh, the other has its products;
  - y is summed by each thread over its own rows, and finished through shared memory for four steps at once, four
    steps later.

Checkpoints are 16-bit states every C steps (as products see them), two in the place of one fp32 state every 2C steps.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from .outer import held_by_all, in_blocks, load_columns, load_rows, load_W, only_step, outer, pick, rows_of_step
from .shares import hand_over, share, wait_for
from .tile import (
    LINE,
    LINES,
    finish_gate,
    in_lines,
    left_operand,
    lines_layout,
    right_layout,
    stage_gate,
    stage_rows,
    tanh_hardware,
    tile_in_shared,
    tile_layout,
)  # fmt: skip


@gluon.jit
def begin(h, k8, v8, u: gl.constexpr, W, BH: gl.constexpr, BV: gl.constexpr):
    """H W + k vᵀ of step u of eight."""
    L: gl.constexpr = h.type.layout
    return mma_v2(left_operand(h.to(W.dtype)), W, outer(k8, only_step(v8, u, BV), BH, BV, L))


@gluon.jit
def end(h, p, f):
    """H of the step. H - (1-f)(H-Z) does not cancel where f is near 1; near f = 0 it errs by 2^-24 |H|."""
    return h - (1.0 - f) * (h - tanh_hardware(p))


@gluon.jit
def sum_own_rows(x, BH: gl.constexpr, BV: gl.constexpr, PARTS: gl.constexpr):
    """[8 NW, BV] in lines of threads: x [BH, BV, PARTS] summed over the rows that one thread holds."""
    NW: gl.constexpr = gl.num_warps()
    own: gl.constexpr = PARTS * BH // (8 * NW)
    x = x.reshape((BH // (16 * NW), NW, 2, 8, BV, PARTS)).permute((1, 3, 5, 0, 2, 4)).reshape((8 * NW, own, BV))
    # Columns of a thread side by side: lane 4g + c holds 8j + 2c and 8j + 2c + 1.
    return gl.sum(x, 1).reshape((8 * NW, BV // 8, 4, 2)).permute((0, 2, 1, 3)).reshape((8 * NW, BV))


@gluon.jit
def step(ha, hb, pa, ka, kb, k_next, v8, v_next, qa, qb, f8, u: gl.constexpr, W,
         BH: gl.constexpr, BV: gl.constexpr, PARTS: gl.constexpr):  # fmt: skip
    """Step u of eight: both halves of the state, the first half's next product, and each thread's part of y.

    With one part, b is not there, and everything of it is a's.
    """
    L: gl.constexpr = ha.type.layout
    f = pick(f8, u)
    if PARTS == 2:
        pb = begin(hb, kb, v8, u, W, BH, BV)
    ha = end(ha, pa, f)
    if u < 7:
        pa = begin(ha, ka, v8, u + 1, W, BH, BV)
    else:
        pa = begin(ha, k_next, v_next, 0, W, BH, BV)
    x = ha * rows_of_step(qa, u, BH, BV, L)
    if PARTS == 2:
        hb = end(hb, pb, f)
        x = gl.join(x, hb * rows_of_step(qb, u, BH, BV, L))
    else:
        hb = ha
    return ha, hb, pa, sum_own_rows(x, BH, BV, PARTS)


@gluon.jit
def parts_of(x, BK: gl.constexpr, PARTS: gl.constexpr, L: gl.constexpr):
    """[BK, 8] as its two halves of rows."""
    if PARTS == 2:
        a, b = x.reshape((2, BK // 2, 8)).permute((1, 2, 0)).split()
        return gl.convert_layout(a, L, assert_trivial=True), gl.convert_layout(b, L, assert_trivial=True)
    else:
        return x, x


@gluon.jit(do_not_specialize=["T", "NC", "f_sb", "f_st", "scans", "units"])
def scan_forward_gluon_kernel(
    q_ptr, k_ptr, v_ptr, f_ptr, W_ptr, h0_ptr, cu_ptr, y_ptr, final_ptr, ckpt_ptr,
    T, NC,
    q_sb, q_st, q_sn, q_sk, k_sb, k_st, k_sn, k_sk, v_sb, v_st, v_sn, v_sv, f_sb, f_st, f_sn,
    y_skb,  # elements between the partial sums of two blocks of rows
    flags_ptr, scans, units,  # if scans are shared out: see `shares.py`; a unit is C steps
    N: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    Gq: gl.constexpr, Gk: gl.constexpr, Gv: gl.constexpr, Gf: gl.constexpr, Gw: gl.constexpr,
    BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr,
    PACKED: gl.constexpr, HAS_H0: gl.constexpr, SAVE: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    LOW: gl.constexpr = v_ptr.dtype.element_ty
    NW: gl.constexpr = gl.num_warps()
    L: gl.constexpr = tile_layout(NW, BV, False)
    S: gl.constexpr = 16  # steps that are staged at a time, in a ring of four
    PARTS: gl.constexpr = 2 if BK >= 32 * NW else 1
    BH: gl.constexpr = BK // PARTS

    BLOCKS: gl.constexpr = (K + BK - 1) // BK

    ks = gl.allocate_shared_memory(LOW, [4, S, BK], tile_in_shared(BK))
    qs = gl.allocate_shared_memory(LOW, [4, S, BK], tile_in_shared(BK))
    vs = gl.allocate_shared_memory(LOW, [4, S, BV], tile_in_shared(BV))
    fs = gl.allocate_shared_memory(gl.float32, [4, S], LINE)
    k_ring = in_blocks(ks, 4 * S, 8, BK)
    q_ring = in_blocks(qs, 4 * S, 8, BK)
    v_ring = in_blocks(vs, 4 * S, 8, BV)
    f_ring = in_blocks(fs, 4 * S, 8, 1)
    first_half = gl.allocate_shared_memory(gl.float32, [4, 8 * NW, BV], LINES)
    second_half = gl.allocate_shared_memory(gl.float32, [4, 8 * NW, BV], LINES)

    GATES: gl.constexpr = held_by_all(8, NW)

    i = gl.expand_dims(gl.arange(0, BH, gl.SliceLayout(1, L)), 1)
    j = gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(0, L)), 0)
    state = i * V + j

    Y8: gl.constexpr = lines_layout(BV, NW)
    Y: gl.constexpr = gl.SliceLayout(1, Y8)
    y_step = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(1, Y)), 1)
    y_line = gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(0, Y)), 0)
    y_col = y_line % (BV // 4) // 2 * 8 + y_line // (BV // 4) * 2 + y_line % 2
    y_offset = y_step * (N * V) + y_col

    piece_first = gl.program_id(0).to(gl.int64)
    piece_last = piece_first + 1
    if SHARED:
        piece_first, piece_last = share(piece_first, gl.num_programs(0), scans.to(gl.int64) * units)
    else:
        units = 1
    scan_last = (piece_last - 1) // units
    for back in range(0, (scan_last - piece_first // units + 1).to(gl.int32)):
        scan = scan_last - back
        unit_first = (gl.maximum(piece_first, scan * units) - scan * units).to(gl.int32)
        unit_last = (gl.minimum(piece_last, (scan + 1) * units) - scan * units).to(gl.int32)
        block = (scan % BLOCKS).to(gl.int32)
        s = scan // BLOCKS // N
        n = scan // BLOCKS % N
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

        sn = s * N + n
        own = state + block * (BK * V)
        in_a = (i + block * BK < K) & (j < V)
        in_b = (i + block * BK + BH < K) & (j < V)
        final_at = final_ptr + sn * (K * V) + own
        ha = gl.full((BH, BV), 0.0, gl.float32, L)
        hb = ha
        if HAS_H0:
            h0_at = h0_ptr + sn * (K * V) + own
            ha = gl.load(h0_at, mask=in_a, other=0.0)
            hb = ha
            if PARTS == 2:
                hb = gl.load(h0_at + BH * V, mask=in_b, other=0.0)
        c_first = 0
        stages = (length + S - 1) // S
        c_last = stages
        if SHARED:
            c_first = unit_first * (C // S)
            c_last = gl.minimum(stages, unit_last * (C // S))
            if unit_first > 0:
                wait_for(flags_ptr + scan)
                ha = gl.load(final_at, mask=in_a, other=0.0)
                if PARTS == 2:
                    hb = gl.load(final_at + BH * V, mask=in_b, other=0.0)
                else:
                    hb = ha
        W = load_W(W_ptr + (n // Gw) * (V * V), V, BV, False, right_layout(L)).to(LOW)

        # The four steps before the first are none: y is stored four steps late.
        y_at = y_ptr + block.to(gl.int64) * y_skb + ((b * T + first + c_first * S - 4) * N + n) * V

        for c3 in gl.static_range(3):
            near = c_first + c3
            t_next = first + near * S
            stage_rows(ks.index(near % 4), k_at, k_st, k_sk, t_next, length - near * S, block * BK, K, S, BK)
            stage_rows(qs.index(near % 4), q_at, q_st, q_sk, t_next, length - near * S, block * BK, K, S, BK)
            stage_rows(vs.index(near % 4), v_at, v_st, v_sv, t_next, length - near * S, 0, V, S, BV)
            stage_gate(fs.index(near % 4), f_at, f_st, t_next, length - near * S, S)
            async_copy.commit_group()
        async_copy.wait_group(2)
        finish_gate(fs.index(c_first % 4), length - c_first * S, S)
        g_first = c_first * (S // 8) % (4 * S // 8)
        ka, kb = parts_of(load_rows(k_ring.index(g_first), L), BK, PARTS, L)
        qa, qb = parts_of(load_rows(q_ring.index(g_first), L), BK, PARTS, L)
        v8 = load_columns(v_ring.index(g_first), BV)
        f8 = f_ring.index(g_first).load(GATES)
        pa = begin(ha, ka, v8, 0, W, BH, BV)
        second_half.store(gl.full((4, 8 * NW, BV), 0.0, gl.float32, Y8))
        for c in range(c_first, c_last):
            left = length - c * S
            later = (c + 3) % 4
            t_next = first + (c + 3) * S
            stage_rows(ks.index(later), k_at, k_st, k_sk, t_next, left - 3 * S, block * BK, K, S, BK)
            stage_rows(qs.index(later), q_at, q_st, q_sk, t_next, left - 3 * S, block * BK, K, S, BK)
            stage_rows(vs.index(later), v_at, v_st, v_sv, t_next, left - 3 * S, 0, V, S, BV)
            stage_gate(fs.index(later), f_at, f_st, t_next, left - 3 * S, S)
            async_copy.commit_group()
            async_copy.wait_group(2)
            finish_gate(fs.index((c + 1) % 4), left - S, S)
            if SAVE:
                if c % (C // S) == 0:
                    at = ckpt_ptr + ((slot + c * S // (2 * C)) * N + n) * (2 * K * V) + c * S // C % 2 * (K * V) + own
                    gl.store(at, ha.to(LOW), mask=in_a)
                    if PARTS == 2:
                        gl.store(at + BH * V, hb.to(LOW), mask=in_b)
            for g in range(0, S // 8):
                t = g * 8
                y = second_half.load(Y8)
                ha, hb, pa, p0 = step(ha, hb, pa, ka, kb, ka, v8, v8, qa, qb, f8, 0, W, BH, BV, PARTS)
                ha, hb, pa, p1 = step(ha, hb, pa, ka, kb, ka, v8, v8, qa, qb, f8, 1, W, BH, BV, PARTS)
                y = gl.sum(y, 1).to(y_ptr.dtype.element_ty)
                gl.store(y_at + y_offset, y, mask=(y_step < left - t + 4) & (y_col < V) & (c * S + t > c_first * S))
                ha, hb, pa, p2 = step(ha, hb, pa, ka, kb, ka, v8, v8, qa, qb, f8, 2, W, BH, BV, PARTS)
                ha, hb, pa, p3 = step(ha, hb, pa, ka, kb, ka, v8, v8, qa, qb, f8, 3, W, BH, BV, PARTS)
                first_half.store(in_lines(p0, p1, p2, p3, BV))
                y = first_half.load(Y8)
                ahead = (c * (S // 8) + g + 1) % (4 * S // 8)
                ka_next, kb_next = parts_of(load_rows(k_ring.index(ahead), L), BK, PARTS, L)
                qa_next, qb_next = parts_of(load_rows(q_ring.index(ahead), L), BK, PARTS, L)
                v_next = load_columns(v_ring.index(ahead), BV)
                f_next = f_ring.index(ahead).load(GATES)
                y_at += 4 * N * V
                ha, hb, pa, p0 = step(ha, hb, pa, ka, kb, ka, v8, v8, qa, qb, f8, 4, W, BH, BV, PARTS)
                ha, hb, pa, p1 = step(ha, hb, pa, ka, kb, ka, v8, v8, qa, qb, f8, 5, W, BH, BV, PARTS)
                y = gl.sum(y, 1).to(y_ptr.dtype.element_ty)
                gl.store(y_at + y_offset, y, mask=(y_step < left - t) & (y_col < V))
                ha, hb, pa, p2 = step(ha, hb, pa, ka, kb, ka, v8, v8, qa, qb, f8, 6, W, BH, BV, PARTS)
                ha, hb, pa, p3 = step(ha, hb, pa, ka, kb, ka_next, v8, v_next, qa, qb, f8, 7, W, BH, BV, PARTS)
                second_half.store(in_lines(p0, p1, p2, p3, BV))
                y_at += 4 * N * V
                ka = ka_next
                kb = kb_next
                qa = qa_next
                qb = qb_next
                v8 = v_next
                f8 = f_next
        async_copy.wait_group(0)
        y = gl.sum(second_half.load(Y8), 1).to(y_ptr.dtype.element_ty)
        gl.store(y_at + y_offset, y, mask=(y_step < length - (c_last * S - 4)) & (y_col < V) & (c_last > c_first))
        gl.store(final_at, ha, mask=in_a)
        if PARTS == 2:
            gl.store(final_at + BH * V, hb, mask=in_b)
        if SHARED:
            if unit_last < units:
                hand_over(flags_ptr + scan)
