# SPDX-License-Identifier: Apache-2.0
"""Device functions that the kernels share: tanh in two accuracies, the product in the dtype asked for, one step."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def multiple(x, UNIT: tl.constexpr):
    """x, a multiple of UNIT: the compiler loads in vectors only from addresses that it knows to be aligned.

    A launch could tell it (Triton looks at every number), but for strides that T decides on it would compile another
    kernel whenever the answer changed. UNIT does not depend on T (`stride_unit`).
    """
    return (x // UNIT).to(tl.int64) * UNIT


@triton.jit
def tanh_by_series(x):
    """tanh to a few ulp of fp32 from what the interpreter has: 1 - 2e / (1 + e), e = exp(-2|x|), or its odd series."""
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    big = 1.0 - tl.div_rn(2.0 * e, 1.0 + e)
    s = x * x
    p = -929569.0 / 638512875
    p = 21844.0 / 6081075 + s * p
    p = -1382.0 / 155925 + s * p
    p = 62.0 / 2835 + s * p
    p = -17.0 / 315 + s * p
    p = 2.0 / 15 + s * p
    p = -1.0 / 3 + s * p
    small = a + a * (s * p)
    r = tl.where(a < 0.5, small, big)
    return tl.where(x < 0, -r, r)


@triton.jit
def tanh_exact(x):
    """CUDA's tanhf on a GPU: the approximate exp there is biased, and with f near 1 a bias adds up over many steps."""
    if INTERPRETED:
        return tanh_by_series(x)
    else:
        return libdevice.tanh(x)


@triton.jit
def tanh_hardware(x):
    """The special-function unit's tanh: one instruction, absolute error up to 2^-11 (PTX ISA, tanh.approx.f32)."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def tanh(x, HARDWARE: tl.constexpr):
    if HARDWARE:
        return tanh_hardware(x)
    else:
        return tanh_exact(x)


@triton.jit
def product(a, b, acc, DOT: tl.constexpr):
    """acc + a b with operands rounded to DOT and fp32 accumulation; fp32 operands are never rounded to TF32.

    For 16-bit operands the sum starts at acc, which is free. In fp32 every term would then round at the size of acc
    (with f near 1, f D is a thousand times dU Wᵀ), so there the products are summed first.
    """
    if DOT == tl.float32:  # noqa: SIM300
        r = tl.dot(a, b, acc=tl.zeros_like(acc), input_precision="ieee")
        return tl.fma(r, tl.full(acc.shape, 1.0, tl.float32), acc)  # Triton turns acc + dot(a, b) into dot(a, b, acc)
    else:
        return tl.dot(a.to(DOT), b, acc=acc)


@triton.jit
def step(h, k, v, f, W, DOT: tl.constexpr, HARDWARE: tl.constexpr):
    """(H_t, Z_t) from H_{t-1}. The outer product seeds the accumulator, so it costs the chain of steps no latency."""
    z = tanh(product(h, W, k[:, None] * v[None, :], DOT), HARDWARE)
    return f * h + (1.0 - f) * z, z  # not z + f (h - z): with f near 1 that cancels
