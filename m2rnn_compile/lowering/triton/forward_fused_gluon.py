# SPDX-License-Identifier: Apache-2.0
"""The forward scan of `forward_gluon.py` for inference, with what stands in front of and behind it, in Gluon.

A program walks all K rows of a head, so it has v, g and complete sums y of that head in its hands, and nobody else has:

    in front    v = SiLU(causal convolution of the projection's columns); inputs are staged 0, 1, 2 and 3 steps back
    behind      o = (y + D ⊙ v) · activation(g), and a norm over V; one over all heads takes a pass of its own over o

v is neither written nor read again, y is never written, and o is written once. Nothing is kept for a backward.
q and k are shared by many heads, so their convolution is not here (`prologue.py`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .forward_gluon import begin, parts_of, step
from .outer import held_by_all, in_blocks, load_columns, load_rows, load_W
from .shares import hand_over, share, wait_for
from .tile import (
    LINE,
    LINES,
    ROW_MAJOR,
    copy_to_shared,
    finish_gate,
    in_lines,
    lines_layout,
    right_layout,
    stage_gate,
    stage_rows,
    tile_in_shared,
    tile_layout,
    to_float,
)  # fmt: skip


@gluon.jit
def logistic(x):
    """1 / (1 + exp(-x)) by two instructions of the special-function unit, to some 1e-7 of its value."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; "
        "rcp.approx.ftz.f32 $0, t; }",
        "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def vectors(VEC, BD, NW):
    """[rows, BD], VEC elements of a row a thread."""
    lanes = min(32, BD // VEC)
    return gl.BlockedLayout([1, VEC], [32 // lanes, lanes], [NW, 1], [1, 0])


@gluon.jit
def stage_shifted(shared, ptr, stride_t, stride_d, t, before, left, D: gl.constexpr, S: gl.constexpr,
                  SHIFTS: gl.constexpr, VEC: gl.constexpr, BD: gl.constexpr):  # fmt: skip
    """Begin copying S steps from t of ptr[t, :BD] to shared, SHIFTS times, each a step further back than the last.

    Zeros for steps past `left`, and for those more than `before` steps before t.
    """
    L: gl.constexpr = vectors(VEC, BD, gl.num_warps())
    line = gl.expand_dims(gl.arange(0, SHIFTS * S, gl.SliceLayout(1, L)), 1)
    i = line % S
    back = line // S
    d = gl.expand_dims(gl.arange(0, BD, gl.SliceLayout(0, L)), 0)
    at = ptr + t.to(gl.int64) * stride_t + ((i - back).to(gl.int64) * stride_t + d * stride_d)
    ok = (i < left) & (back <= i + before)
    if D % BD != 0:
        ok = ok & (d < D)
    copy_to_shared(shared, at, mask=ok)


@gluon.jit
def load_taps(w_ptr, channel, WIDTH: gl.constexpr, V: gl.constexpr, BV: gl.constexpr, taps):
    """Weights [V, WIDTH] of a head's channels, as lines of shared memory; line j belongs to the input j steps back."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    c = gl.arange(0, BV, L)
    for j in gl.static_range(WIDTH):
        w = gl.load(w_ptr + (channel + c) * WIDTH + (WIDTH - 1 - j), mask=c < V, other=0.0)
        taps.index(j).store(w.to(gl.float32))


@gluon.jit
def convolve(v, raw, slot, taps, WIDTH: gl.constexpr, BV: gl.constexpr):
    """v = SiLU(Σ_j taps_j · raw_j), for the S steps of one slot of the ring."""
    VEC: gl.constexpr = 4
    L: gl.constexpr = vectors(VEC, BV, gl.num_warps())
    a = to_float(raw.index(slot * WIDTH).load(L)) * gl.expand_dims(taps.index(0).load(gl.SliceLayout(0, L)), 0)
    for j in gl.static_range(1, WIDTH):
        w = gl.expand_dims(taps.index(j).load(gl.SliceLayout(0, L)), 0)
        a += to_float(raw.index(slot * WIDTH + j).load(L)) * w
    v.store((a * logistic(a)).to(v.dtype))


@gluon.jit
def in_columns(y, BV: gl.constexpr):
    """[4, BV], summed lines of `in_lines`, with columns in their own order; registers stay where they are."""
    return y.reshape((4, 4, BV // 8, 2)).permute((0, 2, 1, 3)).reshape((4, BV))


@gluon.jit
def finish(y, v, g, D, weight, eps, V: gl.constexpr, BV: gl.constexpr,
           HAS_D: gl.constexpr, ACT: gl.constexpr, HEAD_NORM: gl.constexpr):  # fmt: skip
    """o of four steps from y by lines, v and g by columns."""
    u = in_columns(y, BV)
    N4: gl.constexpr = u.type.layout
    if HAS_D:
        u += D * to_float(v)
    if ACT != "none":
        x = to_float(g)
        s = logistic(x)
        if ACT == "silu":
            s *= x
        u *= s
    if HEAD_NORM:
        mean = gl.sum(u * u, 1) * (1.0 / V)
        r = gl.inline_asm_elementwise(
            "rsqrt.approx.f32 $0, $1;", "=f,f", [mean + eps], dtype=gl.float32, is_pure=True, pack=1
        )
        u *= gl.expand_dims(gl.convert_layout(r, gl.SliceLayout(1, N4)), 1) * weight
    return u


@gluon.jit(do_not_specialize=["T", "f_sb", "f_st", "scans", "units"])
def scan_forward_fused_kernel(
    q_ptr, k_ptr, v_ptr, f_ptr, W_ptr, h0_ptr, taps_ptr, D_ptr, g_ptr, weight_ptr, o_ptr, final_ptr,
    T, eps,
    q_sb, q_st, q_sn, q_sk, k_sb, k_st, k_sn, k_sk, v_sb, v_st, v_sn, v_sv, f_sb, f_st, f_sn, g_sb, g_st, g_sn, g_sv,
    flags_ptr, scans, units,  # if scans are shared out: see `shares.py`; a unit is C steps
    N: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    Gq: gl.constexpr, Gk: gl.constexpr, Gv: gl.constexpr, Gf: gl.constexpr, Gw: gl.constexpr, Gg: gl.constexpr,
    BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, G_SHIFT: gl.constexpr, WIDTH: gl.constexpr,
    HAS_H0: gl.constexpr, HAS_D: gl.constexpr, ACT: gl.constexpr, HEAD_NORM: gl.constexpr, HAS_WEIGHT: gl.constexpr,
    SHARED: gl.constexpr,
):  # fmt: skip
    """WIDTH: taps of the convolution that makes v; 0: v comes as it is. G_SHIFT: elements from g_ptr to g."""
    LOW: gl.constexpr = v_ptr.dtype.element_ty
    NW: gl.constexpr = gl.num_warps()
    L: gl.constexpr = tile_layout(NW, BV, False)
    S: gl.constexpr = 16  # steps that are staged at a time, in a ring of four
    PARTS: gl.constexpr = 2 if BK >= 32 * NW else 1
    BH: gl.constexpr = BK // PARTS
    SHIFTS: gl.constexpr = max(WIDTH, 1)
    G_VEC: gl.constexpr = 8 if G_SHIFT % 8 == 0 else 4 if G_SHIFT % 4 == 0 else 2

    ks = gl.allocate_shared_memory(LOW, [4, S, BK], tile_in_shared(BK))
    qs = gl.allocate_shared_memory(LOW, [4, S, BK], tile_in_shared(BK))
    vs = gl.allocate_shared_memory(LOW, [4, S, BV], ROW_MAJOR)
    gs = gl.allocate_shared_memory(LOW, [4, S, BV], ROW_MAJOR)
    fs = gl.allocate_shared_memory(gl.float32, [4, S], LINE)
    raws = gl.allocate_shared_memory(LOW, [4, SHIFTS * S, BV], ROW_MAJOR)
    taps = gl.allocate_shared_memory(gl.float32, [SHIFTS, BV], LINE)
    raw = in_blocks(raws, 4 * SHIFTS * S, S, BV)
    k_ring = in_blocks(ks, 4 * S, 8, BK)
    q_ring = in_blocks(qs, 4 * S, 8, BK)
    v_ring = in_blocks(vs, 4 * S, 8, BV)
    f_ring = in_blocks(fs, 4 * S, 8, 1)
    v_fours = in_blocks(vs, 4 * S, 4, BV)
    g_fours = in_blocks(gs, 4 * S, 4, BV)
    first_half = gl.allocate_shared_memory(gl.float32, [4, 8 * NW, BV], LINES)
    second_half = gl.allocate_shared_memory(gl.float32, [4, 8 * NW, BV], LINES)

    GATES: gl.constexpr = held_by_all(8, NW)

    i = gl.expand_dims(gl.arange(0, BH, gl.SliceLayout(1, L)), 1)
    j = gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(0, L)), 0)
    state = i * V + j
    in_a = (i < K) & (j < V)
    in_b = (i + BH < K) & (j < V)

    Y8: gl.constexpr = lines_layout(BV, NW)
    nothing = in_columns(gl.sum(gl.full((4, 8 * NW, BV), 0.0, gl.float32, Y8), 1), BV)
    N4: gl.constexpr = nothing.type.layout
    o_step = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(1, N4)), 1)
    o_col = gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(0, N4)), 0)
    o_offset = o_step * (N * V) + o_col
    in_o = o_col < V

    piece_first = gl.program_id(0).to(gl.int64)
    piece_last = piece_first + 1
    if SHARED:
        piece_first, piece_last = share(piece_first, gl.num_programs(0), scans.to(gl.int64) * units)
    else:
        units = 1
    scan_last = (piece_last - 1) // units
    for down in range(0, (scan_last - piece_first // units + 1).to(gl.int32)):
        scan = scan_last - down
        unit_first = (gl.maximum(piece_first, scan * units) - scan * units).to(gl.int32)
        unit_last = (gl.minimum(piece_last, (scan + 1) * units) - scan * units).to(gl.int32)
        b = scan // N
        n = scan % N
        q_at = q_ptr + b * q_sb + (n // Gq) * q_sn
        k_at = k_ptr + b * k_sb + (n // Gk) * k_sn
        v_at = v_ptr + b * v_sb + (n // Gv) * v_sn
        f_at = f_ptr + b * f_sb + (n // Gf) * f_sn
        g_at = g_ptr + b * g_sb + (n // Gg) * g_sn + G_SHIFT

        final_at = final_ptr + scan * (K * V) + state
        ha = gl.full((BH, BV), 0.0, gl.float32, L)
        hb = ha
        if HAS_H0:
            h0_at = h0_ptr + scan * (K * V) + state
            ha = gl.load(h0_at, mask=in_a, other=0.0)
            hb = ha
            if PARTS == 2:
                hb = gl.load(h0_at + BH * V, mask=in_b, other=0.0)
        c_first = 0
        stages = (T + S - 1) // S
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
        D = gl.full((1, BV), 0.0, gl.float32, N4)
        if HAS_D:
            D = gl.load(D_ptr + n * V + o_col, mask=in_o, other=0.0).to(gl.float32)
        weight = gl.full((1, BV), 1.0, gl.float32, N4)
        if HAS_WEIGHT:
            weight = gl.load(weight_ptr + n * V + o_col, mask=in_o, other=0.0).to(gl.float32)
        if WIDTH > 0:
            load_taps(taps_ptr, (n // Gv) * V, WIDTH, V, BV, taps)

        # The four steps before the first are none: o is stored four steps late.
        o_at = o_ptr + ((b * T + c_first * S - 4) * N + n) * V

        begun = b * 0
        for c3 in gl.static_range(3):
            near = c_first + c3
            t_next = begun + near * S
            slot = near % 4
            left = T - near * S
            stage_rows(ks.index(slot), k_at, k_st, k_sk, t_next, left, 0, K, S, BK)
            stage_rows(qs.index(slot), q_at, q_st, q_sk, t_next, left, 0, K, S, BK)
            if WIDTH > 0:
                stage_shifted(raws.index(slot), v_at, v_st, v_sv, t_next, near * S, left, V, S, SHIFTS, 8, BV)
            else:
                stage_rows(vs.index(slot), v_at, v_st, v_sv, t_next, left, 0, V, S, BV)
            if ACT != "none":
                stage_shifted(gs.index(slot), g_at, g_st, g_sv, t_next, near * S, left, V, S, 1, G_VEC, BV)
            stage_gate(fs.index(slot), f_at, f_st, t_next, left, S)
            async_copy.commit_group()
        async_copy.wait_group(2)
        finish_gate(fs.index(c_first % 4), T - c_first * S, S)
        if WIDTH > 0:
            convolve(vs.index(c_first % 4), raw, c_first % 4, taps, WIDTH, BV)
        g_first = c_first * (S // 8) % (4 * S // 8)
        ka, kb = parts_of(load_rows(k_ring.index(g_first), L), BK, PARTS, L)
        qa, qb = parts_of(load_rows(q_ring.index(g_first), L), BK, PARTS, L)
        v8 = load_columns(v_ring.index(g_first), BV)
        f8 = f_ring.index(g_first).load(GATES)
        pa = begin(ha, ka, v8, 0, W, BH, BV)
        second_half.store(gl.full((4, 8 * NW, BV), 0.0, gl.float32, Y8))
        v_late = gl.full((4, BV), 0.0, LOW, N4)
        g_late = v_late
        for c in range(c_first, c_last):
            left = T - c * S
            later = (c + 3) % 4
            t_next = begun + (c + 3) * S
            stage_rows(ks.index(later), k_at, k_st, k_sk, t_next, left - 3 * S, 0, K, S, BK)
            stage_rows(qs.index(later), q_at, q_st, q_sk, t_next, left - 3 * S, 0, K, S, BK)
            if WIDTH > 0:
                stage_shifted(raws.index(later), v_at, v_st, v_sv, t_next, SHIFTS, left - 3 * S, V, S, SHIFTS, 8, BV)
            else:
                stage_rows(vs.index(later), v_at, v_st, v_sv, t_next, left - 3 * S, 0, V, S, BV)
            if ACT != "none":
                stage_shifted(gs.index(later), g_at, g_st, g_sv, t_next, SHIFTS, left - 3 * S, V, S, 1, G_VEC, BV)
            stage_gate(fs.index(later), f_at, f_st, t_next, left - 3 * S, S)
            async_copy.commit_group()
            async_copy.wait_group(2)
            finish_gate(fs.index((c + 1) % 4), left - S, S)
            if WIDTH > 0:
                convolve(vs.index((c + 1) % 4), raw, (c + 1) % 4, taps, WIDTH, BV)
            for g in range(0, S // 8):
                t = g * 8
                four = (c * (S // 4) + 2 * g) % (4 * S // 4)
                y = second_half.load(Y8)
                ha, hb, pa, p0 = step(ha, hb, pa, ka, kb, ka, v8, v8, qa, qb, f8, 0, W, BH, BV, PARTS)
                ha, hb, pa, p1 = step(ha, hb, pa, ka, kb, ka, v8, v8, qa, qb, f8, 1, W, BH, BV, PARTS)
                o = finish(gl.sum(y, 1), v_late, g_late, D, weight, eps, V, BV, HAS_D, ACT, HEAD_NORM)
                ok = (o_step < left - t + 4) & in_o & (c * S + t > c_first * S)
                gl.store(o_at + o_offset, o.to(o_ptr.dtype.element_ty), mask=ok)
                ha, hb, pa, p2 = step(ha, hb, pa, ka, kb, ka, v8, v8, qa, qb, f8, 2, W, BH, BV, PARTS)
                ha, hb, pa, p3 = step(ha, hb, pa, ka, kb, ka, v8, v8, qa, qb, f8, 3, W, BH, BV, PARTS)
                first_half.store(in_lines(p0, p1, p2, p3, BV))
                y = first_half.load(Y8)
                v_now = v_late
                g_now = g_late
                if HAS_D:
                    v_now = v_fours.index(four).load(N4)
                    v_late = v_fours.index(four + 1).load(N4)
                if ACT != "none":
                    g_now = g_fours.index(four).load(N4)
                    g_late = g_fours.index(four + 1).load(N4)
                ahead = (c * (S // 8) + g + 1) % (4 * S // 8)
                ka_next, kb_next = parts_of(load_rows(k_ring.index(ahead), L), BK, PARTS, L)
                qa_next, qb_next = parts_of(load_rows(q_ring.index(ahead), L), BK, PARTS, L)
                v_next = load_columns(v_ring.index(ahead), BV)
                f_next = f_ring.index(ahead).load(GATES)
                o_at += 4 * N * V
                ha, hb, pa, p0 = step(ha, hb, pa, ka, kb, ka, v8, v8, qa, qb, f8, 4, W, BH, BV, PARTS)
                ha, hb, pa, p1 = step(ha, hb, pa, ka, kb, ka, v8, v8, qa, qb, f8, 5, W, BH, BV, PARTS)
                o = finish(gl.sum(y, 1), v_now, g_now, D, weight, eps, V, BV, HAS_D, ACT, HEAD_NORM)
                gl.store(o_at + o_offset, o.to(o_ptr.dtype.element_ty), mask=(o_step < left - t) & in_o)
                ha, hb, pa, p2 = step(ha, hb, pa, ka, kb, ka, v8, v8, qa, qb, f8, 6, W, BH, BV, PARTS)
                ha, hb, pa, p3 = step(ha, hb, pa, ka, kb, ka_next, v8, v_next, qa, qb, f8, 7, W, BH, BV, PARTS)
                second_half.store(in_lines(p0, p1, p2, p3, BV))
                o_at += 4 * N * V
                ka = ka_next
                kb = kb_next
                qa = qa_next
                qb = qb_next
                v8 = v_next
                f8 = f_next
        async_copy.wait_group(0)
        o = finish(gl.sum(second_half.load(Y8), 1), v_late, g_late, D, weight, eps, V, BV, HAS_D, ACT, HEAD_NORM)
        ok = (o_step < T - (c_last * S - 4)) & in_o & (c_last > c_first)
        gl.store(o_at + o_offset, o.to(o_ptr.dtype.element_ty), mask=ok)
        gl.store(final_at, ha, mask=in_a)
        if PARTS == 2:
            gl.store(final_at + BH * V, hb, mask=in_b)
        if SHARED:
            if unit_last < units:
                hand_over(flags_ptr + scan)
