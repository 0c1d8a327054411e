# SPDX-License-Identifier: Apache-2.0
"""Backward scan: recompute a chunk from its checkpoint, then walk it backwards. One warp per program, as in forward.

    program (s, n, block of rows), chunks of the window from the last to the first
      1. from checkpoints[slot], redo the chunk and note H every 4 steps in a scratch row of this program (stays in L2)
      2. for every group of 4 steps from the last: redo it, keeping H and Z in registers, then with carry = dL/dH
             D  = clip(carry) + q dyᵀ
             dU = (1 - f) D ⊙ (1 - Z ⊙ Z)
             dq = H dy      dk = dU v      dv = dUᵀ k      df = Σ D ⊙ (H' - Z)      dW += H'ᵀ dU      (H' = H_{t-1})
             carry = f D + dU Wᵀ

Nothing is added atomically: what must be summed over heads or blocks of rows is written as partials and added in a
fixed order by `reduce.py`. The host calls this kernel for one window of time after the other, so that partials stay
small; carry and dW pass from window to window in memory. Of packed sequences that are too long for one window, a
program takes what `packed_windows.py` has planned for it: a walk over some chunks of one sequence, or none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import multiple, product, step


@triton.jit
def _load_step(k_at, v_at, f_at, k_st, v_st, f_st, t, ok, rows, cols, K, V):
    """k, v, f of one step in fp32. Steps past the end read f = 1 and k = 0 and leave the state where it is."""
    k = tl.load(k_at + t * k_st, mask=rows < tl.where(ok, K, 0), other=0.0).to(tl.float32)
    v = tl.load(v_at + t * v_st, mask=cols < tl.where(ok, V, 0), other=0.0).to(tl.float32)
    f = tl.load(f_at + t * f_st, mask=ok, other=1.0).to(tl.float32)
    return k, v, f


@triton.jit
def _step_back(
    carry, dW, h_before, z, h_after, k, v, f, Wt, t, ok,
    q_at, dy_at, dq_at, dk_at, dv_at, df_at, q_st, dy_st, dq_st, dk_st, dv_st, df_st, rows, cols, K, V,
    clip, CLIP: tl.constexpr, HAS_DY: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    D = carry
    if CLIP:  # PTX min and max drop a NaN operand; torch.clamp keeps it
        D = tl.clamp(carry, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
        D = tl.where(ok, D, carry)
    if HAS_DY:
        q = tl.load(q_at + t * q_st, mask=rows < tl.where(ok, K, 0), other=0.0).to(tl.float32)
        dy = tl.load(dy_at + t * dy_st, mask=cols < tl.where(ok, V, 0), other=0.0).to(tl.float32)
        D += q[:, None] * dy[None, :]
        dq = tl.sum(h_after * dy[None, :], 1)
        tl.store(dq_at + t * dq_st, dq.to(dq_at.dtype.element_ty), mask=rows < tl.where(ok, K, 0))
    dU = (1.0 - f) * D * (1.0 - z * z)  # not D - f D: with f near 1 that cancels
    df = tl.sum(D * (h_before - z))
    dk = tl.sum(dU * v[None, :], 1)
    dv = tl.sum(dU * k[:, None], 0)
    tl.store(df_at + t * df_st, df, mask=ok)
    tl.store(dk_at + t * dk_st, dk.to(dk_at.dtype.element_ty), mask=rows < tl.where(ok, K, 0))
    tl.store(dv_at + t * dv_st, dv.to(dv_at.dtype.element_ty), mask=cols < tl.where(ok, V, 0))
    dW = product(tl.trans(h_before), dU.to(DOT), dW, DOT)
    carry = product(dU, Wt, f * D, DOT)
    return carry, dW


@triton.jit(
    do_not_specialize=[
        "T", "NC", "chunk_first", "chunk_last", "window", "q_sb", "k_sb", "v_sb", "f_sb", "f_st", "dy_sb",
        "dv_skb", "df_skb",
    ]
)  # fmt: skip
def scan_backward_kernel(
    q_ptr, k_ptr, v_ptr, f_ptr, W_ptr, dy_ptr, cu_ptr, walks_ptr, ckpt_ptr,
    carry_ptr, dW_ptr, scratch_ptr, dq_ptr, dk_ptr, dv_ptr, df_ptr,
    T, NC, chunk_first, chunk_last, window, clip,
    q_sb, q_st, q_sn, q_sk, k_sb, k_st, k_sn, k_sk, v_sb, v_st, v_sn, v_sv, f_sb, f_st, f_sn,
    dy_sb, dy_st, dy_sn, dy_sv,
    dv_skb, df_skb,  # elements between the partials of two blocks of rows
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    Gq: tl.constexpr, Gk: tl.constexpr, Gv: tl.constexpr, Gf: tl.constexpr, Gw: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    SLOTS: tl.constexpr, PACKED: tl.constexpr, PLANNED: tl.constexpr, HAS_DY: tl.constexpr, CLIP: tl.constexpr,
    DOT: tl.constexpr, HARDWARE: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1).to(tl.int64)
    s = (tl.program_id(0) // N).to(tl.int64)
    if PLANNED:
        walk_at = walks_ptr + s * 4
        s = tl.load(walk_at).to(tl.int64)
        if tl.load(walk_at + 2) <= tl.load(walk_at + 1):  # no walk for this program
            return
    n = (tl.program_id(0) % N).to(tl.int64)
    rows = tl.program_id(1) * BK + tl.arange(0, BK)
    cols = tl.arange(0, BV)
    in_rows = rows < K
    in_cols = cols < V
    in_state = in_rows[:, None] & in_cols[None, :]
    in_W = in_cols[:, None] & in_cols[None, :]

    if PACKED:
        first = tl.load(cu_ptr + s).to(tl.int64)
        last = tl.load(cu_ptr + s + 1).to(tl.int64)
        first = tl.minimum(tl.maximum(first, 0), T)
        last = tl.minimum(tl.maximum(last, first), T)
        length = (last - first).to(tl.int32)
        b = s * 0
        slot = first // (SLOTS * C) + s
        c_last = (length + C - 1) // C
        c_first = 0
        origin = first  # partials of the only window start at time 0
        if PLANNED:
            c_first = tl.load(walk_at + 1)
            c_last = tl.load(walk_at + 2)
            origin = (tl.load(walk_at + 3) - c_first).to(tl.int64) * C
    else:
        first = s * 0
        length = T
        b = s
        slot = s * NC
        c_first = chunk_first
        c_last = chunk_last
        origin = first - chunk_first * C

    q_at = q_ptr + b * multiple(q_sb, UNITS[0]) + first * q_st + (n // Gq) * q_sn + rows.to(tl.int64) * q_sk
    k_at = k_ptr + b * multiple(k_sb, UNITS[1]) + first * k_st + (n // Gk) * k_sn + rows.to(tl.int64) * k_sk
    v_at = v_ptr + b * multiple(v_sb, UNITS[2]) + first * v_st + (n // Gv) * v_sn + cols.to(tl.int64) * v_sv
    f_at = f_ptr + b * f_sb + first * f_st + (n // Gf) * f_sn
    dy_at = dy_ptr + b * multiple(dy_sb, UNITS[3]) + first * dy_st + n * dy_sn + cols.to(tl.int64) * dy_sv
    part = (b * window + origin) * N + n  # [B, window, N, ...]: the partials of every head
    dq_at = dq_ptr + part * K + rows
    dk_at = dk_ptr + part * K + rows
    dv_at = dv_ptr + block * multiple(dv_skb, N * V) + part * V + cols
    df_at = df_ptr + block * df_skb + part
    state = rows[:, None] * V + cols[None, :]
    sn = s * N + n
    carry_at = carry_ptr + sn * (K * V) + state
    program = sn * tl.num_programs(1) + block
    dW_at = dW_ptr + program * (V * V) + cols[:, None] * V + cols[None, :]
    if PLANNED:  # programs of one window, not states, have a scratch row each
        program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + block
    scratch = scratch_ptr + program * (((C + 3) // 4) * BK * BV) + tl.arange(0, BK)[:, None] * BV + cols[None, :]

    W_at = W_ptr + (n // Gw) * (V * V)
    W = tl.load(W_at + cols[:, None] * V + cols[None, :], mask=in_W, other=0.0).to(DOT)
    Wt = tl.load(W_at + cols[None, :] * V + cols[:, None], mask=in_W, other=0.0).to(DOT)
    carry = tl.load(carry_at, mask=in_state, other=0.0)
    dW = tl.load(dW_at, mask=in_W, other=0.0)

    for i in range(0, c_last - c_first):
        c = c_last - 1 - i
        t0 = (c * C).to(tl.int64)
        groups = (tl.minimum(length - c * C, C) + 3) // 4
        # SLOTS = 2: two 16-bit states in the place of one in fp32, as forward_gluon.py writes them
        ckpt_at = ckpt_ptr + ((slot + c // SLOTS) * N + n) * (SLOTS * K * V) + c % SLOTS * (K * V)
        h = tl.load(ckpt_at + state, mask=in_state, other=0.0).to(tl.float32)
        tl.store(scratch, h)
        for g in range(0, groups - 1):  # full groups only: no masks on time
            for u in tl.static_range(4):
                t = t0 + (g * 4 + u)
                k, v, f = _load_step(k_at, v_at, f_at, k_st, v_st, f_st, t, t < length, rows, cols, K, V)
                h, _ = step(h, k, v, f, W, DOT, HARDWARE)
            tl.store(scratch + (g + 1) * (BK * BV), h)
        tl.debug_barrier()  # scratch is read by other threads of this program than those that wrote it
        for j in range(0, groups):
            g = groups - 1 - j
            ta = t0 + g * 4
            h0 = tl.load(scratch + g * (BK * BV)).to(tl.float32)
            ok0 = ta < length
            ok1 = ta + 1 < length
            ok2 = ta + 2 < length
            ok3 = ta + 3 < length
            k0, v0, f0 = _load_step(k_at, v_at, f_at, k_st, v_st, f_st, ta, ok0, rows, cols, K, V)
            k1, v1, f1 = _load_step(k_at, v_at, f_at, k_st, v_st, f_st, ta + 1, ok1, rows, cols, K, V)
            k2, v2, f2 = _load_step(k_at, v_at, f_at, k_st, v_st, f_st, ta + 2, ok2, rows, cols, K, V)
            k3, v3, f3 = _load_step(k_at, v_at, f_at, k_st, v_st, f_st, ta + 3, ok3, rows, cols, K, V)
            h1, z0 = step(h0, k0, v0, f0, W, DOT, HARDWARE)
            h2, z1 = step(h1, k1, v1, f1, W, DOT, HARDWARE)
            h3, z2 = step(h2, k2, v2, f2, W, DOT, HARDWARE)
            h4, z3 = step(h3, k3, v3, f3, W, DOT, HARDWARE)
            carry, dW = _step_back(
                carry, dW, h3, z3, h4, k3, v3, f3, Wt, ta + 3, ok3,
                q_at, dy_at, dq_at, dk_at, dv_at, df_at, q_st, dy_st, N * K, N * K, N * V, N, rows, cols, K, V,
                clip, CLIP, HAS_DY, DOT,
            )  # fmt: skip
            carry, dW = _step_back(
                carry, dW, h2, z2, h3, k2, v2, f2, Wt, ta + 2, ok2,
                q_at, dy_at, dq_at, dk_at, dv_at, df_at, q_st, dy_st, N * K, N * K, N * V, N, rows, cols, K, V,
                clip, CLIP, HAS_DY, DOT,
            )  # fmt: skip
            carry, dW = _step_back(
                carry, dW, h1, z1, h2, k1, v1, f1, Wt, ta + 1, ok1,
                q_at, dy_at, dq_at, dk_at, dv_at, df_at, q_st, dy_st, N * K, N * K, N * V, N, rows, cols, K, V,
                clip, CLIP, HAS_DY, DOT,
            )  # fmt: skip
            carry, dW = _step_back(
                carry, dW, h0, z0, h1, k0, v0, f0, Wt, ta, ok0,
                q_at, dy_at, dq_at, dk_at, dv_at, df_at, q_st, dy_st, N * K, N * K, N * V, N, rows, cols, K, V,
                clip, CLIP, HAS_DY, DOT,
            )  # fmt: skip
        tl.debug_barrier()  # and the next chunk overwrites it
    tl.store(carry_at, carry, mask=in_state)
    tl.store(dW_at, dW, mask=in_W)
