# SPDX-License-Identifier: Apache-2.0
"""Forward scan. One program walks one sequence, one head and BK rows of its state, with the state in registers.

    program (s, n, block of rows)          rows of H never mix, so K splits over programs freely
      H = initial_state[s, n]
      for every chunk of C steps:
          checkpoints[slot] = H            (training only)
          for every step:
              H = f H + (1 - f) tanh(H W + k vᵀ)
              y[t, n] = Hᵀ q               (a sum over rows: with several blocks of rows, an fp32 partial each)

One warp per program keeps the chain of steps free of barriers: on 16-row tiles the accumulator of one product is,
register for register, the left operand of the next. Inputs of step t+1 are loaded before step t is computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import multiple, step


@triton.jit(do_not_specialize=["T", "NC", "q_sb", "k_sb", "v_sb", "f_sb", "f_st", "y_skb"])
def scan_forward_kernel(
    q_ptr, k_ptr, v_ptr, f_ptr, W_ptr, h0_ptr, cu_ptr, y_ptr, final_ptr, ckpt_ptr,
    T, NC,
    q_sb, q_st, q_sn, q_sk, k_sb, k_st, k_sn, k_sk, v_sb, v_st, v_sn, v_sv, f_sb, f_st, f_sn,
    y_skb,  # elements between the partial y of two blocks of rows (0 with one block: y itself)
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    Gq: tl.constexpr, Gk: tl.constexpr, Gv: tl.constexpr, Gf: tl.constexpr, Gw: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr, HAS_H0: tl.constexpr, SAVE: tl.constexpr,
    DOT: tl.constexpr, HARDWARE: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    # int64 from the first product on: pointers advance by strides, so no offset is ever computed in 32 bits
    block = tl.program_id(1).to(tl.int64)
    s = (tl.program_id(0) // N).to(tl.int64)
    n = (tl.program_id(0) % N).to(tl.int64)
    rows = tl.program_id(1) * BK + tl.arange(0, BK)
    cols = tl.arange(0, BV)
    in_rows = rows < K
    in_cols = cols < V
    in_state = in_rows[:, None] & in_cols[None, :]

    if PACKED:
        first = tl.load(cu_ptr + s).to(tl.int64)
        last = tl.load(cu_ptr + s + 1).to(tl.int64)
        first = tl.minimum(tl.maximum(first, 0), T)  # wrong values give wrong results, never a stray access
        last = tl.minimum(tl.maximum(last, first), T)
        length = (last - first).to(tl.int32)
        b = s * 0
        slot = first // C + s
    else:
        first = s * 0
        length = T
        b = s
        slot = s * NC

    q_at = q_ptr + b * multiple(q_sb, UNITS[0]) + first * q_st + (n // Gq) * q_sn + rows.to(tl.int64) * q_sk
    k_at = k_ptr + b * multiple(k_sb, UNITS[1]) + first * k_st + (n // Gk) * k_sn + rows.to(tl.int64) * k_sk
    v_at = v_ptr + b * multiple(v_sb, UNITS[2]) + first * v_st + (n // Gv) * v_sn + cols.to(tl.int64) * v_sv
    f_at = f_ptr + b * f_sb + first * f_st + (n // Gf) * f_sn
    y_at = y_ptr + block * multiple(y_skb, N * V) + ((b * T + first) * N + n) * V + cols
    state = rows[:, None] * V + cols[None, :]
    ckpt_at = ckpt_ptr + (slot * N + n) * (K * V) + state
    sn = s * N + n

    W = tl.load(
        W_ptr + (n // Gw) * (V * V) + cols[:, None] * V + cols[None, :],
        mask=in_cols[:, None] & in_cols[None, :], other=0.0,
    ).to(DOT)  # fmt: skip
    if HAS_H0:
        h = tl.load(h0_ptr + sn * (K * V) + state, mask=in_state, other=0.0)
    else:
        h = tl.zeros((BK, BV), tl.float32)

    some = length > 0
    k_next = tl.load(k_at, mask=rows < tl.where(some, K, 0), other=0.0)
    v_next = tl.load(v_at, mask=cols < tl.where(some, V, 0), other=0.0)
    q_next = tl.load(q_at, mask=rows < tl.where(some, K, 0), other=0.0)
    f_next = tl.load(f_at, mask=some, other=1.0)
    for t in range(0, length):
        if SAVE:
            if t % C == 0:
                tl.store(ckpt_at, h, mask=in_state)
                ckpt_at += N * K * V
        k, v, q, f = k_next.to(tl.float32), v_next.to(tl.float32), q_next.to(tl.float32), f_next.to(tl.float32)
        k_at += k_st
        v_at += v_st
        q_at += q_st
        f_at += f_st
        more = t + 1 < length
        k_next = tl.load(k_at, mask=rows < tl.where(more, K, 0), other=0.0)
        v_next = tl.load(v_at, mask=cols < tl.where(more, V, 0), other=0.0)
        q_next = tl.load(q_at, mask=rows < tl.where(more, K, 0), other=0.0)
        f_next = tl.load(f_at, mask=more, other=1.0)
        h, _ = step(h, k, v, f, W, DOT, HARDWARE)
        y = tl.sum(h * q[:, None], 0)
        tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=in_cols)
        y_at += N * V
    tl.store(final_ptr + sn * (K * V) + state, h, mask=in_state)
