# SPDX-License-Identifier: Apache-2.0
"""The forward scan for 16-bit inputs on NVIDIA GPUs, in Gluon: `forward.py` with every layout chosen by hand.

Why beside the portable kernel: Triton puts the constant W in shared memory, reads it back every step, and passes every
row of y through shared memory behind a barrier. Here W, H and every input stay in registers, no barrier is left in the
chain of steps, and the sum over rows of four steps is taken at once.

Rows of H never mix, so which row sits at which position of the tile is free. Position j * 8 + g holds row
g * (BK / 8) + j: the rows of one thread are then neighbours in memory and its part of k or q is one load.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2


@gluon.jit
def tanh_hardware(x):
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def load_rows(ptr, offsets, ok, EVEN: gl.constexpr, BK: gl.constexpr, LAYOUT: gl.constexpr):
    """[8, BK / 8], neighbours in one thread, -> [BK] in the order of positions."""
    if EVEN:
        x = gl.load(ptr + offsets)
    else:
        x = gl.load(ptr + offsets, mask=ok, other=0.0)
    return gl.convert_layout(x.permute((1, 0)).reshape((BK,)), LAYOUT)


@gluon.jit
def load_step(t, length, k_at, v_at, q_at, f_at, k_st, v_st, q_st, f_st, ks, vs, qs, row_ok, col_ok,
              EVEN: gl.constexpr, BK: gl.constexpr, ROW: gl.constexpr):  # fmt: skip
    """k, v, q, f of step t. Past the end: the last step's inputs with f = 1, which leaves H where it is."""
    at = gl.maximum(gl.minimum(t, length - 1), 0).to(gl.int64)
    k = load_rows(k_at + at * k_st, ks, row_ok, EVEN, BK, ROW)
    q = load_rows(q_at + at * q_st, qs, row_ok, EVEN, BK, ROW)
    if EVEN:
        v = gl.load(v_at + at * v_st + vs)
    else:
        v = gl.load(v_at + at * v_st + vs, mask=col_ok, other=0.0)
    f = gl.load(f_at + at * f_st)
    return k, v, q, f


@gluon.jit
def advance(h, k, v, f, W, A: gl.constexpr, MMA: gl.constexpr):
    """H_t from H_{t-1}: the accumulator layout of one product is, register for register, the operand of the next."""
    kf = gl.expand_dims(k.to(gl.float32), 1)
    vf = gl.expand_dims(v.to(gl.float32), 0)
    u = mma_v2(gl.convert_layout(h.to(W.dtype), A), W, kf * vf)
    return f * h + (1.0 - f) * tanh_hardware(u)


@gluon.jit
def keep(f, left, u: gl.constexpr):
    """f of step u of a group of which `left` steps exist: 1 past the end."""
    return gl.where(u < left, f.to(gl.float32), 1.0)


@gluon.jit
def rows_in_thread(h, q, BK: gl.constexpr, BV: gl.constexpr):
    """H ⊙ q summed over the rows that one thread holds: [8, BV], no communication."""
    p = h * gl.expand_dims(q.to(gl.float32), 1)
    return gl.sum(p.reshape((BK // 8, 8, BV)), 0)


@gluon.jit(do_not_specialize=["T", "NC"])
def scan_forward_gluon_kernel(
    q_ptr, k_ptr, v_ptr, f_ptr, W_ptr, h0_ptr, cu_ptr, y_ptr, final_ptr, ckpt_ptr,
    T, NC,
    q_sb, q_st, q_sn, q_sk, k_sb, k_st, k_sn, k_sk, v_sb, v_st, v_sn, v_sv, f_sb, f_st, f_sn,
    y_skb,
    N: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    Gq: gl.constexpr, Gk: gl.constexpr, Gv: gl.constexpr, Gf: gl.constexpr, Gw: gl.constexpr,
    BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr,
    PACKED: gl.constexpr, HAS_H0: gl.constexpr, SAVE: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    COL: gl.constexpr = gl.SliceLayout(0, MMA)
    J: gl.constexpr = BK // 8
    NEIGHBOURS: gl.constexpr = gl.BlockedLayout([1, J], [8, 4], [1, 1], [1, 0])
    EVEN: gl.constexpr = (K % BK == 0) and (V == BV)

    block = gl.program_id(1).to(gl.int64)
    s = (gl.program_id(0) // N).to(gl.int64)
    n = (gl.program_id(0) % N).to(gl.int64)

    tile_rows = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(1, NEIGHBOURS)), 1) * J + gl.expand_dims(
        gl.arange(0, J, gl.SliceLayout(0, NEIGHBOURS)), 0
    )
    tile_rows = tile_rows + gl.program_id(1) * BK
    position = gl.arange(0, BK, ROW)
    rows = (position % 8) * J + position // 8 + gl.program_id(1) * BK
    cols = gl.arange(0, BV, COL)
    row_ok = tile_rows < K
    col_ok = cols < V
    state = gl.expand_dims(rows, 1) * V + gl.expand_dims(cols, 0)
    in_state = gl.expand_dims(rows < K, 1) & gl.expand_dims(cols < V, 0)

    if PACKED:
        first = gl.load(cu_ptr + s).to(gl.int64)
        last = gl.load(cu_ptr + s + 1).to(gl.int64)
        first = gl.minimum(gl.maximum(first, 0), T)
        last = gl.minimum(gl.maximum(last, first), T)
        length = (last - first).to(gl.int32)
        first = gl.minimum(first, T - 1)  # an empty sequence at the end prefetches too
        b = s * 0
        slot = first // C + s
    else:
        first = s * 0
        length = T
        b = s
        slot = s * NC

    q_at = q_ptr + b * q_sb + first * q_st + (n // Gq) * q_sn
    k_at = k_ptr + b * k_sb + first * k_st + (n // Gk) * k_sn
    v_at = v_ptr + b * v_sb + first * v_st + (n // Gv) * v_sn
    f_at = f_ptr + b * f_sb + first * f_st + (n // Gf) * f_sn
    if WIDE:  # strides inside one step so large that an offset passes 2^31 elements
        qs = tile_rows.to(gl.int64) * q_sk
        ks = tile_rows.to(gl.int64) * k_sk
        vs = cols.to(gl.int64) * v_sv
    else:
        qs = tile_rows * q_sk
        ks = tile_rows * k_sk
        vs = cols * v_sv
    ckpt_at = ckpt_ptr + (slot * N + n) * (K * V)
    sn = s * N + n

    # Four rows of y at a time: [8, BV] per step, joined to [8, BV, 2, 2], turned so that a thread holds all 8.
    Y4: gl.constexpr = gl.BlockedLayout([8, 2, 1, 1], [1, 8, 2, 2], [1, 1, 1, 1], [1, 0, 2, 3])
    YS: gl.constexpr = gl.SliceLayout(0, Y4)
    yc = gl.expand_dims(gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(1, gl.SliceLayout(2, YS))), 1), 2)
    ya = gl.expand_dims(gl.expand_dims(gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, YS))), 0), 2)
    yb = gl.expand_dims(gl.expand_dims(gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, YS))), 0), 1)
    y_step = ya + 2 * yb  # join(join(p0, p1), join(p2, p3)): the last axis picks the pair
    y_offset = y_step * (N * V) + yc
    y_at = y_ptr + block * y_skb + ((b * T + first) * N + n) * V

    at = gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(1, B)), 1) * V + gl.expand_dims(
        gl.arange(0, BV, gl.SliceLayout(0, B)), 0
    )
    W_ok = gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(1, B)) < V, 1) & gl.expand_dims(
        gl.arange(0, BV, gl.SliceLayout(0, B)) < V, 0
    )
    W = gl.load(W_ptr + (n // Gw) * (V * V) + at, mask=W_ok, other=0.0).to(q_ptr.dtype.element_ty)
    if HAS_H0:
        h = gl.load(h0_ptr + sn * (K * V) + state, mask=in_state, other=0.0)
    else:
        h = gl.full((BK, BV), 0.0, gl.float32, MMA)

    groups = (length + 3) // 4
    k0, v0, q0, f0 = load_step(
        0, length, k_at, v_at, q_at, f_at, k_st, v_st, q_st, f_st, ks, vs, qs, row_ok, col_ok, EVEN, BK, ROW
    )
    k1, v1, q1, f1 = load_step(
        1, length, k_at, v_at, q_at, f_at, k_st, v_st, q_st, f_st, ks, vs, qs, row_ok, col_ok, EVEN, BK, ROW
    )
    k2, v2, q2, f2 = load_step(
        2, length, k_at, v_at, q_at, f_at, k_st, v_st, q_st, f_st, ks, vs, qs, row_ok, col_ok, EVEN, BK, ROW
    )
    k3, v3, q3, f3 = load_step(
        3, length, k_at, v_at, q_at, f_at, k_st, v_st, q_st, f_st, ks, vs, qs, row_ok, col_ok, EVEN, BK, ROW
    )
    for g in range(0, groups):
        if SAVE:
            if g % (C // 4) == 0:
                gl.store(ckpt_at + state, h, mask=in_state)
                ckpt_at += N * K * V
        left = length - g * 4
        kn0, vn0, qn0, fn0 = load_step(
            g * 4 + 4, length, k_at, v_at, q_at, f_at, k_st, v_st, q_st, f_st, ks, vs, qs, row_ok, col_ok, EVEN, BK, ROW
        )
        kn1, vn1, qn1, fn1 = load_step(
            g * 4 + 5, length, k_at, v_at, q_at, f_at, k_st, v_st, q_st, f_st, ks, vs, qs, row_ok, col_ok, EVEN, BK, ROW
        )
        kn2, vn2, qn2, fn2 = load_step(
            g * 4 + 6, length, k_at, v_at, q_at, f_at, k_st, v_st, q_st, f_st, ks, vs, qs, row_ok, col_ok, EVEN, BK, ROW
        )
        kn3, vn3, qn3, fn3 = load_step(
            g * 4 + 7, length, k_at, v_at, q_at, f_at, k_st, v_st, q_st, f_st, ks, vs, qs, row_ok, col_ok, EVEN, BK, ROW
        )
        h = advance(h, k0, v0, keep(f0, left, 0), W, A, MMA)
        p0 = rows_in_thread(h, q0, BK, BV)
        h = advance(h, k1, v1, keep(f1, left, 1), W, A, MMA)
        p1 = rows_in_thread(h, q1, BK, BV)
        h = advance(h, k2, v2, keep(f2, left, 2), W, A, MMA)
        p2 = rows_in_thread(h, q2, BK, BV)
        h = advance(h, k3, v3, keep(f3, left, 3), W, A, MMA)
        p3 = rows_in_thread(h, q3, BK, BV)
        y = gl.sum(gl.convert_layout(gl.join(gl.join(p0, p1), gl.join(p2, p3)), Y4), 0)
        gl.store(y_at + y_offset, y.to(y_ptr.dtype.element_ty), mask=(y_step < left) & (yc < V))
        y_at += 4 * N * V
        k0, v0, q0, f0 = kn0, vn0, qn0, fn0
        k1, v1, q1, f1 = kn1, vn1, qn1, fn1
        k2, v2, q2, f2 = kn2, vn2, qn2, fn2
        k3, v3, q3, f3 = kn3, vn3, qn3, fn3
    gl.store(final_ptr + sn * (K * V) + state, h, mask=in_state)
