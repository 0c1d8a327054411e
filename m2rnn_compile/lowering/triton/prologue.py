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
from .config import next_power_of_2, stride_unit
from .decode import exponential, softplus
from .fused_tail import logistic
from .math import multiple

CHANNELS = 128  # per program
STEPS = 32
WARPS = 4


@triton.jit
def convolve(x_at, w_ptr, y_at, t, c, T, x_st, C: tl.constexpr, WIDTH: tl.constexpr, FAST: tl.constexpr,
             STEPS: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Steps t of channels c; x_at and y_at are where their sequence begins."""
    in_time = (t < T)[:, None]
    in_channels = (c < C)[None, :]
    a = tl.zeros((STEPS, BC), tl.float32)
    for j in tl.static_range(WIDTH):
        w = tl.load(w_ptr + c * WIDTH + (WIDTH - 1 - j), mask=c < C, other=0.0).to(tl.float32)
        ok = (t >= j)[:, None] & in_time & in_channels
        x = tl.load(x_at + (t - j)[:, None] * x_st + c[None, :], mask=ok, other=0.0)
        a += x.to(tl.float32) * w[None, :]
    y = a * logistic(a, FAST)
    tl.store(y_at + t[:, None] * C + c[None, :], y.to(y_at.dtype.element_ty), mask=in_time & in_channels)


@triton.jit
def gates(x_at, A_log_ptr, dt_bias_ptr, f_at, t, n, T, f_st, f_sn, NF: tl.constexpr, FORGET: tl.constexpr):
    """The factor from its raw input. Exact exp: f near 1 is taken to a power of thousands of steps."""
    ok = (t < T)[:, None] & (n < NF)[None, :]
    x = tl.load(x_at + t[:, None] * f_st + n[None, :] * f_sn, mask=ok, other=0.0).to(tl.float32)
    if FORGET == "decay":
        A_log = tl.load(A_log_ptr + n, mask=n < NF, other=0.0).to(tl.float32)[None, :]
        dt_bias = tl.load(dt_bias_ptr + n, mask=n < NF, other=0.0).to(tl.float32)[None, :]
        f = exponential(-exponential(A_log) * softplus(x + dt_bias))
    else:
        f = tl.div_rn(1.0, 1.0 + exponential(-x))
    tl.store(f_at + t[:, None] * NF + n[None, :], f, mask=ok)


@triton.jit(do_not_specialize=["T", "x_sb", "f_sb"])
def prologue_kernel(
    x_ptr, w_ptr, y_ptr, x_f_ptr, A_log_ptr, dt_bias_ptr, f_ptr,
    T, x_sb, x_st, f_sb, f_st, f_sn,
    C: tl.constexpr, WIDTH: tl.constexpr, NF: tl.constexpr, FORGET: tl.constexpr, FAST: tl.constexpr,
    STEPS: tl.constexpr, BC: tl.constexpr, BF: tl.constexpr, X_UNIT: tl.constexpr, F_UNIT: tl.constexpr,
):  # fmt: skip
    """To STEPS steps of a batch element, programs for a block of the C channels each, then one for the gates.

    All on the grid's first axis: the others end at 65,535.
    """
    GATES: tl.constexpr = FORGET != "none"
    blocks: tl.constexpr = (C + BC - 1) // BC + GATES
    p = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    t = (p % tl.cdiv(T, STEPS)).to(tl.int64) * STEPS + tl.arange(0, STEPS)
    b = (p // tl.cdiv(T, STEPS)).to(tl.int64)
    if block * BC < C:
        c = block * BC + tl.arange(0, BC)
        convolve(x_ptr + b * multiple(x_sb, X_UNIT), w_ptr, y_ptr + b * T * C, t, c, T, x_st, C, WIDTH, FAST, STEPS, BC)
    else:
        n = tl.arange(0, BF)
        f_at = f_ptr + b * T * NF
        x_f_at = x_f_ptr + b * multiple(f_sb, F_UNIT)
        gates(x_f_at, A_log_ptr, dt_bias_ptr, f_at, t, n, T, f_st, f_sn, NF, FORGET)


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
        prologue_kernel[(blocks * triton.cdiv(T, steps) * B,)](
            f if x is None else x, f if weight is None else weight.contiguous(), f if y is None else y,
            f, f if A_log is None else A_log.contiguous(), f if dt_bias is None else dt_bias.contiguous(), factor,
            T, *xs, *f.stride(), C=C, WIDTH=width, NF=Nf, FORGET=forget,
            FAST=f.dtype != torch.float32 and not INTERPRETED,
            STEPS=steps, BC=CHANNELS, BF=next_power_of_2(Nf),
            X_UNIT=stride_unit(*xs), F_UNIT=stride_unit(f.stride(0), f.stride(1)), num_warps=warps,
        )  # fmt: skip
    return y, factor
