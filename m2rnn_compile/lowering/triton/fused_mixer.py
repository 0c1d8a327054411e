# SPDX-License-Identifier: Apache-2.0
"""The backward of `m2rnn::fused_mixer` on a GPU: every kernel writes its gradient where it belongs in that of x.

tail_backward_kernel     dg into its columns of dx; dy
scan's backward          its sums of partials: dq, dk and dv side by side, D ⊙ dy added to dv
conv_backward_kernel     from these the columns of q | k | v in dx
gate_backward_kernel     the forget gate's, below
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops import conv as equations
from ...ops.fused import keeps_y, unpack
from ...ops.fused_mixer import BackwardArguments, parts, unused
from ...ops.reference import sum_shared_heads
from . import _multiprocessors, _on_device, conv, fused, scan_backward
from .config import next_power_of_2, stride_unit
from .decode import exponential, softplus_and_slope
from .math import multiple
from .reduce import pitch

GATE_ELEMENTS = 1024  # of a tile of the gate's kernel, 4 warps
GATE_PROGRAMS_PER_MULTIPROCESSOR = 16
WINDOW_BYTES = 112 * 2**20  # less than the scan by itself: more is alive here


@triton.jit(do_not_specialize=["rows", "T", "per_program", "x_sb"])
def gate_backward_kernel(
    df_ptr, x_ptr, A_log_ptr, dt_bias_ptr, dx_ptr, sums_ptr, rows, T, per_program, x_sb, x_st, x_sn, dx_row,
    N: tl.constexpr, FORGET: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, X_UNIT: tl.constexpr,
):  # fmt: skip
    """dz of z = x + dt_bias (or of x, "sigmoid"), and each program's sums for A_log and dt_bias, [programs, 2, N].

    See `ops/fused.py`, prologue_backward. Exact exp, as in forward.
    """
    n = tl.arange(0, BN)
    if FORGET == "decay":
        a = exponential(tl.load(A_log_ptr + n, mask=n < N, other=0.0).to(tl.float32))[None, :]
        bias = tl.load(dt_bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    dA_log = tl.zeros((BR, BN), tl.float32)  # added up over rows once, in the end
    dbias = tl.zeros((BR, BN), tl.float32)
    first = tl.program_id(0) * per_program  # 32 bits where rows are counted in them: a division by T in 64 is a call
    last = tl.minimum(first + per_program, rows)
    for start in range(first, last, BR):
        row = start + tl.arange(0, BR)
        b = (row // T).to(tl.int64)
        t = (row % T).to(tl.int64)
        r = row.to(tl.int64)
        mask = (row < last)[:, None] & (n < N)[None, :]
        x_at = (b * multiple(x_sb, X_UNIT) + t * x_st)[:, None] + (n * x_sn)[None, :]
        df = tl.load(df_ptr + (r * N)[:, None] + n[None, :], mask=mask, other=0.0)
        x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
        if FORGET == "decay":
            z = x + bias
            s, slope = softplus_and_slope(z)
            common = -df * exponential(-a * s) * a
            dz = common * slope
            dA_log += common * s
            dbias += dz
        else:
            s = tl.div_rn(1.0, 1.0 + exponential(-x))
            dz = df * s * (1.0 - s)
        tl.store(dx_ptr + (r * dx_row)[:, None] + n[None, :], dz.to(dx_ptr.dtype.element_ty), mask=mask)
    if FORGET == "decay":
        at = sums_ptr + tl.program_id(0) * (2 * N) + n
        tl.store(at, tl.sum(dA_log, 0), mask=n < N)
        tl.store(at + N, tl.sum(dbias, 0), mask=n < N)


def gate_backward(
    df: Tensor, x: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, forget: str, into: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(dA_log, ddt_bias) in fp32; dx to `into`, columns of a contiguous tensor [B, T, P]. df [B, T, Nf] in fp32."""
    B, T, N = x.shape
    if forget == "none":
        into.copy_(df)
        return None, None
    rows, BN = B * T, next_power_of_2(N)
    BR = max(1, GATE_ELEMENTS // BN)
    programs = GATE_PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(x.device)
    per_program = triton.cdiv(triton.cdiv(max(1, rows), programs), BR) * BR
    programs = triton.cdiv(rows, per_program)
    sums = x.new_empty(programs, 2, N, dtype=torch.float32)
    if programs:
        with _on_device(x):
            gate_backward_kernel[(programs,)](
                df.contiguous(), x, x if A_log is None else A_log.contiguous(),
                x if dt_bias is None else dt_bias.contiguous(), into, sums, rows, T, per_program, *x.stride(),
                pitch(into), N=N, FORGET=forget, BR=BR, BN=BN, X_UNIT=stride_unit(x.stride(0), x.stride(1)),
                num_warps=4,
            )  # fmt: skip
    if forget != "decay":
        return None, None
    dA_log, ddt_bias = sums.sum(0).unbind(0)
    return dA_log.clone(), ddt_bias.clone()  # an op's results share no memory


def _room_for_dy(d_raw: Tensor, y: Tensor, conv_weight: Tensor | None) -> Tensor | None:
    """Columns of q | k | v in dx, which the convolution's backward writes last: until then they can hold dy.

    A tensor of its own would add to the peak, which comes while the scan's backward runs.
    """
    N, V = y.shape[2:]
    if conv_weight is None or d_raw.shape[2] < N * V:
        return None
    return d_raw[..., : N * V].unflatten(-1, (N, V))


def fused_mixer_backward(given: BackwardArguments) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """(dx, gradients of `given.inputs()`); see `ops/fused_mixer.py`."""
    x, sizes, do, y, D, conv_weight = given.x, given.sizes, given.do, given.y, given.D, given.conv_weight
    raw, f, g = parts(x, sizes)
    q, k, v = given.qkv_of_scan()
    N = given.checkpoints.shape[2]
    dx = x.new_empty(x.shape)
    for first, end in unused(sizes, x.shape[2]):
        dx[..., first:end].zero_()
    d_raw, d_f, d_g = parts(dx, sizes)
    dqkv = d_raw if conv_weight is None else x.new_empty(raw.shape)
    dq, dk, dv = unpack(dqkv, sizes[:5])

    dy = dD = dw = None
    if do is not None and not keeps_y(D, g, given.norm, given.chunk):
        dy = do.to(v.dtype).contiguous()
    elif do is not None:
        own = d_g if g is not None and g.shape[2] == N else None
        dy, dg, dD, dw = fused.fused_tail_backward(
            do, y, v, D, g, given.norm_weight, given.rstd, given.activation, given.norm,
            dy=_room_for_dy(d_raw, y, conv_weight), dg=own,
        )  # fmt: skip
        if d_g is not None and own is None:
            d_g.copy_(sum_shared_heads(dg.float(), d_g.shape[2], 2))
    elif d_g is not None:
        d_g.zero_()

    factor = fused.forget_gate(f, given.A_log, given.dt_bias, given.forget)
    adds_D = D is not None and dy is not None
    in_sums = adds_D and v.shape[2] == N
    *_, df, dW, dh0 = scan_backward(
        dy, given.dfinal_state, q, k, v, factor, given.W, given.initial_state, given.cu_seqlens, given.checkpoints,
        given.state_grad_clip, given.chunk, into=(dq, dk, dv), D=D if in_sums else None, window_bytes=WINDOW_BYTES,
    )  # fmt: skip
    if adds_D and not in_sums:
        assert D is not None  # for the type checker
        assert dy is not None
        dv.copy_(dv.float() + sum_shared_heads(D.float() * dy.float(), v.shape[2], 2))
    dconv_weight = None
    if conv_weight is not None and conv.unsupported(x.dtype, conv_weight.shape[1]) is None:
        _, dconv_weight = conv.conv_silu_backward(dqkv, raw, conv_weight, given.position, dx=d_raw)
    elif conv_weight is not None:  # more taps than the kernel has; forward took the equations too
        dqkv, dconv_weight = equations.conv_silu_backward(dqkv, raw, conv_weight, given.position)
        d_raw.copy_(dqkv)
    dA_log, ddt_bias = gate_backward(df, f, given.A_log, given.dt_bias, given.forget, d_f)
    return dx, (dconv_weight, dW, dA_log, ddt_bias, dD, dw, dh0)
