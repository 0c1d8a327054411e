# SPDX-License-Identifier: Apache-2.0
"""Causal convolution of up to four taps and SiLU, one pass forward and one backward. See `ops/conv.py`.

A program walks STEPS steps of BC channels with the last three inputs in registers, four steps at a time, so that each
element is read once and several loads are in flight. Backward walks forward in time as well: da_t is added to the
gradients of x_t, x_{t-1}, x_{t-2}, x_{t-3}, of which the last is then complete. It reads three steps past its own for
that; what it sums for the weight stays in registers until the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import DTYPES, INTERPRETED, _on_device
from .config import stride_unit
from .fused_tail import logistic
from .math import multiple

MAX_WIDTH = 4
CHANNELS = 128  # per program of one warp: 8 bytes a thread and step in 16 bits
STEPS = 64
STEPS_BACKWARD = 128  # the longer, the fewer partial sums of dweight and the less is read twice


def unsupported(dtype: torch.dtype, width: int) -> str | None:
    if dtype not in DTYPES:
        return f"the convolution's kernel takes float32, bfloat16 and float16, not {dtype}"
    if width > MAX_WIDTH:
        return f"the convolution's kernel takes up to {MAX_WIDTH} taps, got {width}"
    return None


@triton.jit
def tap(w_ptr, c, ok, j: tl.constexpr, WIDTH: tl.constexpr):
    """The weight of x_{t-j}; zero for taps that are not there."""
    if j < WIDTH:
        return tl.load(w_ptr + c * WIDTH + (WIDTH - 1 - j), mask=ok, other=0.0).to(tl.float32)
    else:
        return c * 0.0


@triton.jit
def place(T, C: tl.constexpr, STEPS: tl.constexpr, BC: tl.constexpr):
    """(channels, block of steps, batch element) of a program. All on the grid's first axis: others end at 65,535."""
    blocks_c: tl.constexpr = (C + BC - 1) // BC
    blocks_t = tl.cdiv(T, STEPS)
    p = tl.program_id(0) // blocks_c
    c = tl.program_id(0) % blocks_c * BC + tl.arange(0, BC)
    return c, (p % blocks_t).to(tl.int64), (p // blocks_t).to(tl.int64)


@triton.jit
def within(x, t, position_ptr, j: tl.constexpr, T, PACKED: tl.constexpr):
    """x where step t may look back j steps; without positions x is zero there already."""
    if PACKED:
        position = tl.load(position_ptr + t, mask=t < T, other=-1)
        return tl.where(position >= j, x, 0.0)
    else:
        return x


@triton.jit
def in_range(ok, t, first, last):
    """The channels `ok` where first <= t < last. As blocks: the interpreter mixes no scalar into a mask."""
    ts = t + tl.zeros(ok.shape, tl.int64)
    return ok & (ts >= first) & (ts < last)


@triton.jit
def load_step(at, t, stride, T, ok):
    """Step t of a channel block in fp32; zero outside of [0, T)."""
    return tl.load(at + t * stride, mask=in_range(ok, t, 0, T), other=0.0).to(tl.float32)


@triton.jit
def convolve(x0, x1, x2, x3, t, w0, w1, w2, w3, position_ptr, T, PACKED: tl.constexpr):
    """(a_t, and the inputs as its four terms see them)."""
    x0 = within(x0, t, position_ptr, 0, T, PACKED)
    x1 = within(x1, t, position_ptr, 1, T, PACKED)
    x2 = within(x2, t, position_ptr, 2, T, PACKED)
    x3 = within(x3, t, position_ptr, 3, T, PACKED)
    return x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3, x0, x1, x2, x3


@triton.jit
def forward_step(x0, x1, x2, x3, t, w0, w1, w2, w3, position_ptr, y_at, T, last, ok,
                 C: tl.constexpr, PACKED: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    a, _, _, _, _ = convolve(x0, x1, x2, x3, t, w0, w1, w2, w3, position_ptr, T, PACKED)
    y = a * logistic(a, FAST)
    tl.store(y_at + t * C, y.to(y_at.dtype.element_ty), mask=in_range(ok, t, 0, last))


@triton.jit(do_not_specialize=["T", "x_sb"])
def conv_forward_kernel(
    x_ptr, w_ptr, position_ptr, y_ptr, T, x_sb, x_st,
    C: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr, FAST: tl.constexpr,
    STEPS: tl.constexpr, BC: tl.constexpr, X_UNIT: tl.constexpr,
):  # fmt: skip
    c, block, b = place(T, C, STEPS, BC)
    ok = c < C
    first = block * STEPS
    last = tl.minimum(first + STEPS, T)
    w0 = tap(w_ptr, c, ok, 0, WIDTH)
    w1 = tap(w_ptr, c, ok, 1, WIDTH)
    w2 = tap(w_ptr, c, ok, 2, WIDTH)
    w3 = tap(w_ptr, c, ok, 3, WIDTH)
    x_at = x_ptr + b * multiple(x_sb, X_UNIT) + c
    y_at = y_ptr + b * T * C + c
    x1 = load_step(x_at, first - 1, x_st, T, ok)
    x2 = load_step(x_at, first - 2, x_st, T, ok)
    x3 = load_step(x_at, first - 3, x_st, T, ok)
    for i in range(0, STEPS, 4):
        t = first + i
        n0 = load_step(x_at, t, x_st, T, ok)
        n1 = load_step(x_at, t + 1, x_st, T, ok)
        n2 = load_step(x_at, t + 2, x_st, T, ok)
        n3 = load_step(x_at, t + 3, x_st, T, ok)
        forward_step(n0, x1, x2, x3, t, w0, w1, w2, w3, position_ptr, y_at, T, last, ok, C, PACKED, FAST)
        forward_step(n1, n0, x1, x2, t + 1, w0, w1, w2, w3, position_ptr, y_at, T, last, ok, C, PACKED, FAST)
        forward_step(n2, n1, n0, x1, t + 2, w0, w1, w2, w3, position_ptr, y_at, T, last, ok, C, PACKED, FAST)
        forward_step(n3, n2, n1, n0, t + 3, w0, w1, w2, w3, position_ptr, y_at, T, last, ok, C, PACKED, FAST)
        x1, x2, x3 = n3, n2, n1


@triton.jit
def backward_step(x0, x1, x2, x3, dy, t, d1, d2, d3, s0, s1, s2, s3, w0, w1, w2, w3, position_ptr, dx_at, dx_st, T,
                  first, last, ok, PACKED: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """d1, d2, d3: what is known of dx_{t-1}, dx_{t-2}, dx_{t-3}. s0 to s3: sums for the weight, over own steps."""
    a, x0, x1, x2, x3 = convolve(x0, x1, x2, x3, t, w0, w1, w2, w3, position_ptr, T, PACKED)
    s = logistic(a, FAST)
    da = dy * s * (1.0 + a * (1.0 - s))
    own = tl.where(t < last, da, 0.0)
    s0 += own * x0
    s1 += own * x1
    s2 += own * x2
    s3 += own * x3
    d3 += within(da, t, position_ptr, 3, T, PACKED) * w3
    tl.store(dx_at + (t - 3) * dx_st, d3.to(dx_at.dtype.element_ty), mask=in_range(ok, t - 3, first, last))
    d2 += within(da, t, position_ptr, 2, T, PACKED) * w2
    d1 += within(da, t, position_ptr, 1, T, PACKED) * w1
    return within(da, t, position_ptr, 0, T, PACKED) * w0, d1, d2, s0, s1, s2, s3


@triton.jit(do_not_specialize=["T", "x_sb", "dx_sb"])
def conv_backward_kernel(
    dy_ptr, x_ptr, w_ptr, position_ptr, dx_ptr, dw_ptr, T, x_sb, x_st, dx_sb, dx_st,
    C: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr, FAST: tl.constexpr,
    STEPS: tl.constexpr, BC: tl.constexpr, X_UNIT: tl.constexpr, DX_UNIT: tl.constexpr,
):  # fmt: skip
    c, block, b = place(T, C, STEPS, BC)
    ok = c < C
    first = block * STEPS
    last = tl.minimum(first + STEPS, T)
    w0 = tap(w_ptr, c, ok, 0, WIDTH)
    w1 = tap(w_ptr, c, ok, 1, WIDTH)
    w2 = tap(w_ptr, c, ok, 2, WIDTH)
    w3 = tap(w_ptr, c, ok, 3, WIDTH)
    x_at = x_ptr + b * multiple(x_sb, X_UNIT) + c
    dy_at = dy_ptr + b * T * C + c
    dx_at = dx_ptr + b * multiple(dx_sb, DX_UNIT) + c
    x1 = load_step(x_at, first - 1, x_st, T, ok)
    x2 = load_step(x_at, first - 2, x_st, T, ok)
    x3 = load_step(x_at, first - 3, x_st, T, ok)
    d1 = tl.zeros((BC,), tl.float32)
    d2 = tl.zeros((BC,), tl.float32)
    d3 = tl.zeros((BC,), tl.float32)
    s0 = tl.zeros((BC,), tl.float32)
    s1 = tl.zeros((BC,), tl.float32)
    s2 = tl.zeros((BC,), tl.float32)
    s3 = tl.zeros((BC,), tl.float32)
    for i in range(0, STEPS + 4, 4):
        t = first + i
        n0 = load_step(x_at, t, x_st, T, ok)
        n1 = load_step(x_at, t + 1, x_st, T, ok)
        n2 = load_step(x_at, t + 2, x_st, T, ok)
        n3 = load_step(x_at, t + 3, x_st, T, ok)
        g0 = load_step(dy_at, t, C, T, ok)
        g1 = load_step(dy_at, t + 1, C, T, ok)
        g2 = load_step(dy_at, t + 2, C, T, ok)
        g3 = load_step(dy_at, t + 3, C, T, ok)
        d1, d2, d3, s0, s1, s2, s3 = backward_step(
            n0, x1, x2, x3, g0, t, d1, d2, d3, s0, s1, s2, s3, w0, w1, w2, w3, position_ptr, dx_at, dx_st, T,
            first, last, ok, PACKED, FAST)  # fmt: skip
        d1, d2, d3, s0, s1, s2, s3 = backward_step(
            n1, n0, x1, x2, g1, t + 1, d1, d2, d3, s0, s1, s2, s3, w0, w1, w2, w3, position_ptr, dx_at, dx_st, T,
            first, last, ok, PACKED, FAST)  # fmt: skip
        d1, d2, d3, s0, s1, s2, s3 = backward_step(
            n2, n1, n0, x1, g2, t + 2, d1, d2, d3, s0, s1, s2, s3, w0, w1, w2, w3, position_ptr, dx_at, dx_st, T,
            first, last, ok, PACKED, FAST)  # fmt: skip
        d1, d2, d3, s0, s1, s2, s3 = backward_step(
            n3, n2, n1, n0, g3, t + 3, d1, d2, d3, s0, s1, s2, s3, w0, w1, w2, w3, position_ptr, dx_at, dx_st, T,
            first, last, ok, PACKED, FAST)  # fmt: skip
        x1, x2, x3 = n3, n2, n1
    dw_at = dw_ptr + (b * tl.cdiv(T, STEPS) + block) * (WIDTH * C) + c
    tl.store(dw_at + (WIDTH - 1) * C, s0, mask=ok)
    if WIDTH > 1:
        tl.store(dw_at + (WIDTH - 2) * C, s1, mask=ok)
    if WIDTH > 2:
        tl.store(dw_at + (WIDTH - 3) * C, s2, mask=ok)
    if WIDTH > 3:
        tl.store(dw_at + (WIDTH - 4) * C, s3, mask=ok)


def _constants(x: Tensor, weight: Tensor, position: Tensor | None) -> dict[str, object]:
    """The hardware's exp where the result is rounded to 16 bits anyway."""
    fast = x.dtype != torch.float32 and not INTERPRETED
    unit = stride_unit(x.stride(0), x.stride(1))
    return dict(C=x.shape[2], WIDTH=weight.shape[1], PACKED=position is not None, FAST=fast, X_UNIT=unit)


def _by_channel(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def conv_silu(
    x: Tensor, weight: Tensor, position: Tensor | None, *, steps: int = STEPS, channels: int = CHANNELS, warps: int = 1
) -> Tensor:
    """x [B, T, C] with any strides, weight [C, width], position [T] or None; y contiguous, in x's dtype."""
    B, T, C = x.shape
    y = x.new_empty(B, T, C)
    x = _by_channel(x)
    if y.numel():
        with _on_device(x):
            conv_forward_kernel[(triton.cdiv(C, channels) * triton.cdiv(T, steps) * B,)](
                x, weight.contiguous(), x if position is None else position, y, T, x.stride(0), x.stride(1),
                **_constants(x, weight, position), STEPS=steps, BC=channels, num_warps=warps,
            )  # fmt: skip
    return y


def conv_silu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    position: Tensor | None,
    *,
    dx: Tensor | None = None,
    steps: int = STEPS_BACKWARD,
    channels: int = CHANNELS,
    warps: int = 1,
) -> tuple[Tensor, Tensor]:
    """(dx [B, T, C], dweight [C, width]): deterministic, sums over programs are taken by torch in a fixed order.

    Writes to `dx` if it is given: channels of a larger tensor, which lie side by side.
    """
    B, T, C = x.shape
    dx = x.new_empty(B, T, C) if dx is None else dx
    if dx.numel() == 0:
        return dx, torch.zeros_like(weight)
    x, dy = _by_channel(x), dy.contiguous()
    blocks = triton.cdiv(T, steps)
    dw = x.new_empty(B * blocks, weight.shape[1], C, dtype=torch.float32)
    with _on_device(x):
        conv_backward_kernel[(triton.cdiv(C, channels) * blocks * B,)](
            dy, x, weight.contiguous(), x if position is None else position, dx, dw, T, x.stride(0), x.stride(1),
            dx.stride(0), dx.stride(1), **_constants(x, weight, position),
            DX_UNIT=stride_unit(dx.stride(0), dx.stride(1)), STEPS=steps, BC=channels, num_warps=warps,
        )  # fmt: skip
    return dx, dw.sum(0).t().to(weight.dtype)
