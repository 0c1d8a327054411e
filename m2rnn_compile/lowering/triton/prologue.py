# SPDX-License-Identifier: Apache-2.0
"""What stands in front of the scan and belongs to no head of it: the convolution with SiLU of q | k, the forget gate.

One launch for inference. q and k are shared by many heads, so each is made once here, and not by every program of the
scan; f is [B, T, Nf] in fp32, whatever the input's dtype. The convolution of v is in `forward_fused_gluon.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import INTERPRETED, _on_device
from .config import next_power_of_2
from .decode import exponential, softplus
from .fused_tail import logistic

CHANNELS = 128  # per program
STEPS = 32
WARPS = 4


@triton.jit
def forget(x, A_log, dt_bias, FORGET: tl.constexpr):
    """The factor from its raw input. Exact exp: f near 1 is taken to a power of thousands of steps."""
    if FORGET == "sigmoid":
        return tl.div_rn(1.0, 1.0 + exponential(-x))
    else:
        return exponential(-exponential(A_log) * softplus(x + dt_bias))


@triton.jit(do_not_specialize=["T"])
def prologue_kernel(
    x_ptr, w_ptr, y_ptr, x_f_ptr, A_log_ptr, dt_bias_ptr, f_ptr,
    T, x_sb, x_st, f_sb, f_st, f_sn,
    C: tl.constexpr, WIDTH: tl.constexpr, NF: tl.constexpr, FORGET: tl.constexpr, FAST: tl.constexpr,
    STEPS: tl.constexpr, BC: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Programs of the first axis: a block of the C channels each, then one for the gates."""
    t = tl.program_id(1).to(tl.int64) * STEPS + tl.arange(0, STEPS)
    b = tl.program_id(2).to(tl.int64)
    if tl.program_id(0) * BC < C:
        c = tl.program_id(0) * BC + tl.arange(0, BC)
        a = tl.zeros((STEPS, BC), tl.float32)
        for j in tl.static_range(WIDTH):
            w = tl.load(w_ptr + c * WIDTH + (WIDTH - 1 - j), mask=c < C, other=0.0).to(tl.float32)
            ok = ((t >= j) & (t < T))[:, None] & (c < C)[None, :]
            x = tl.load(x_ptr + b * x_sb + (t - j)[:, None] * x_st + c[None, :], mask=ok, other=0.0)
            a += x.to(tl.float32) * w[None, :]
        y = a * logistic(a, FAST)
        ok = (t < T)[:, None] & (c < C)[None, :]
        tl.store(y_ptr + (b * T + t)[:, None] * C + c[None, :], y.to(y_ptr.dtype.element_ty), mask=ok)
    else:
        n = tl.arange(0, BF)
        ok = (t < T)[:, None] & (n < NF)[None, :]
        x = tl.load(x_f_ptr + b * f_sb + t[:, None] * f_st + n[None, :] * f_sn, mask=ok, other=0.0).to(tl.float32)
        A_log = tl.zeros((1, BF), tl.float32)
        dt_bias = A_log
        if FORGET == "decay":
            A_log = tl.load(A_log_ptr + n, mask=n < NF, other=0.0).to(tl.float32)[None, :]
            dt_bias = tl.load(dt_bias_ptr + n, mask=n < NF, other=0.0).to(tl.float32)[None, :]
        tl.store(f_ptr + (b * T + t)[:, None] * NF + n[None, :], forget(x, A_log, dt_bias, FORGET), mask=ok)


def before_scan(
    x: Tensor | None,
    weight: Tensor | None,
    f: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    forget: str,
    *,
    steps: int = STEPS,
    warps: int = WARPS,
) -> tuple[Tensor | None, Tensor]:
    """(SiLU of the convolution of x [B, T, C], contiguous, or None; the forget factor in fp32, or f if it is one)."""
    B, T, Nf = f.shape
    C, width = (0, 1) if x is None or weight is None else (x.shape[2], weight.shape[1])
    y = None if x is None else x.new_empty(B, T, C)
    factor = f if forget == "none" else f.new_empty(B, T, Nf, dtype=torch.float32)
    blocks = triton.cdiv(C, CHANNELS) + (forget != "none")
    if blocks == 0 or B * T == 0:
        return y, factor
    if x is not None and x.stride(2) != 1:
        x = x.contiguous()
    xs = (0, 0) if x is None else x.stride()[:2]
    with _on_device(f):
        prologue_kernel[(blocks, triton.cdiv(T, steps), B)](
            f if x is None else x, f if weight is None else weight.contiguous(), f if y is None else y,
            f, f if A_log is None else A_log.contiguous(), f if dt_bias is None else dt_bias.contiguous(), factor,
            T, *xs, *f.stride(), C=C, WIDTH=width, NF=Nf, FORGET=forget,
            FAST=f.dtype != torch.float32 and not INTERPRETED,
            STEPS=steps, BC=CHANNELS, BF=next_power_of_2(Nf), num_warps=warps,
        )  # fmt: skip
    return y, factor
