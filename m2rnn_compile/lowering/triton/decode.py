# SPDX-License-Identifier: Apache-2.0
"""The fused decoding step in two launches. See `ops/decode.py` for what it computes.

    decode_kernel         program (row b, head n)          reads the conv window of its channels and its state,
                                                           writes its state and o before the norm
    decode_finish_kernel  program (row b, 0)               norms row b of o in place
                          program (row b, block)           moves a block of channels of the conv window on by one step

Channels of q and k (and of v, where heads share it) are read by many programs of the first launch, so none of them may
move the window. The boundary between the launches is what they would otherwise need a counter for: every window is read
before any is written, and nothing has to be left in memory for the next call. The norm over all heads needs that same
boundary, so moving the windows costs no launch of its own.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from . import DTYPES, MAX_V, _numerics, _on_device
from .config import LaunchConfig, next_power_of_2
from .math import INTERPRETED, step

FINISH_CHANNELS = 1024  # of the conv window, per program
FINISH_FEATURES = 4096  # of a row to be normed, in registers at a time
FINISH_WARPS = 4


# By width of the padded tile of W: rows of the state in registers at a time, and warps. The step is bound by memory, so
# a program should hold few registers. Compiled for sm_90, only fp32 at V = 128 spills. V = 16 and 64 in 16 bits were
# measured on an H200 (docs/kernel-notes.md, 11). One choice for every batch: a token's bits do not depend on its batch.
CONFIGS_16_BIT = {16: LaunchConfig(16, 1), 32: LaunchConfig(64, 2), 64: LaunchConfig(16, 1), 128: LaunchConfig(16, 4)}
CONFIGS_32_BIT = {16: LaunchConfig(64, 1), 32: LaunchConfig(32, 2), 64: LaunchConfig(16, 8), 128: LaunchConfig(16, 16)}


def decode_config(K: int, BV: int, itemsize: int) -> LaunchConfig:
    rows, warps, _ = (CONFIGS_16_BIT if itemsize == 2 else CONFIGS_32_BIT)[BV]
    return LaunchConfig(min(rows, max(16, next_power_of_2(K))), warps)


def _slots_are_contiguous(x: Tensor) -> bool:
    """x[i].is_contiguous() for all i, without making a view each time a token is decoded."""
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def unsupported(tensors: list[Tensor], shape: Any) -> str | None:
    """`tensors`: the op's, up to state_indices."""
    qkv, conv_state, state = tensors[0], tensors[9], tensors[10]
    if qkv.dtype not in DTYPES:
        return f"impl='triton' takes float32, bfloat16 and float16, not {qkv.dtype}"
    if shape.V > MAX_V:
        return f"impl='triton' holds W in registers and takes V up to {MAX_V}, got V = {shape.V}"
    names = ("conv_weight", "A_log", "dt_bias", "W", "D", "norm_weight")
    dense = dict(zip(names, tensors[3:9], strict=True))
    for name, x in dense.items():
        if not x.is_contiguous():
            return f"impl='triton' takes a contiguous `{name}`, got strides {x.stride()}"
    for name, x in {"conv_state": conv_state, "state": state}.items():
        if not _slots_are_contiguous(x):
            return f"impl='triton' takes a `{name}` whose slots are contiguous each, got strides {x.stride()}"
    for name, x in {**dense, "x_f": tensors[1], "g": tensors[2], "conv_state": conv_state}.items():
        if x.dtype not in DTYPES:
            return f"impl='triton' takes float32, bfloat16 and float16, not `{name}` in {x.dtype}"
    return None


@triton.jit
def exponential(x):
    """exp to 2 ulp; the fast one is off by more for large |x|."""
    if INTERPRETED:
        return tl.exp(x)
    else:
        return libdevice.exp(x)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) without losing the small side: at dt = 1e-3 a rounded 1 + exp(x) would cost four digits."""
    return tl.maximum(x, 0.0) + log1p_of(exponential(-tl.abs(x)))


@triton.jit
def softplus_and_slope(x):
    """softplus and its derivative, 1 / (1 + exp(-x))."""
    u = exponential(-tl.abs(x))
    return tl.maximum(x, 0.0) + log1p_of(u), tl.div_rn(tl.where(x < 0.0, u, 1.0), 1.0 + u)


@triton.jit
def log1p_of(u):
    if INTERPRETED:
        w = 1.0 + u
        return tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
    else:
        return libdevice.log1p(u)


@triton.jit
def silu(x, HARDWARE: tl.constexpr):
    """The exact forms cost a fifth of the kernel's instructions; the fast ones err by some 1e-6, far below 16 bits."""
    if HARDWARE:
        return x / (1.0 + tl.exp(-x))
    else:
        return tl.div_rn(x, 1.0 + exponential(-x))


@triton.jit
def conv_silu(
    x_at, window_at, weight_at, channel, mask, x_sc, C: tl.constexpr, WIDTH: tl.constexpr, HARDWARE: tl.constexpr
):
    """SiLU of the causal conv's output at this step, for some channels of one row. Taps as in `layers/conv.py`."""
    acc = tl.load(x_at + channel * x_sc, mask=mask, other=0.0).to(tl.float32) * tl.load(
        weight_at + channel * WIDTH + (WIDTH - 1), mask=mask, other=0.0
    ).to(tl.float32)
    for j in tl.static_range(WIDTH - 1):
        x = tl.load(window_at + j * C + channel, mask=mask, other=0.0).to(tl.float32)
        acc += x * tl.load(weight_at + channel * WIDTH + j, mask=mask, other=0.0).to(tl.float32)
    return silu(acc, HARDWARE)


@triton.jit(do_not_specialize=["slots"])
def decode_kernel(
    qkv_ptr, x_f_ptr, g_ptr, conv_weight_ptr, A_log_ptr, dt_bias_ptr, W_ptr, D_ptr, conv_state_ptr, state_ptr,
    indices_ptr, o_ptr,
    slots, qkv_sb, qkv_sc, x_f_sb, x_f_sn, g_sb, g_sc, conv_ss, state_ss, indices_sb,
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    Nq: tl.constexpr, Nk: tl.constexpr, Nv: tl.constexpr, Nf: tl.constexpr, Ng: tl.constexpr, Nw: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, INDEXED: tl.constexpr, DOT: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    # int64 from the first product on: a pool may hold more than 2^31 elements
    b = (tl.program_id(0) // N).to(tl.int64)
    n = (tl.program_id(0) % N).to(tl.int64)
    cols = tl.arange(0, BV)
    in_cols = cols < V
    o_at = o_ptr + (b * N + n) * V + cols
    slot = b
    if INDEXED:
        slot = tl.load(indices_ptr + b * indices_sb).to(tl.int64)
        if (slot < 0) | (slot >= slots):  # never clamped: no other slot may be touched
            nothing = tl.where(slot == -1, 0.0, float("nan"))
            tl.store(o_at, tl.zeros((BV,), tl.float32) + nothing, mask=in_cols)
            return

    W = tl.load(
        W_ptr + (n // (N // Nw)) * (V * V) + cols[:, None] * V + cols[None, :],
        mask=in_cols[:, None] & in_cols[None, :], other=0.0,
    ).to(DOT)  # fmt: skip
    x_at = qkv_ptr + b * qkv_sb
    window_at = conv_state_ptr + slot * conv_ss
    v_channel = (Nq + Nk) * K + (n // (N // Nv)) * V + cols
    v = conv_silu(x_at, window_at, conv_weight_ptr, v_channel, in_cols, qkv_sc, C, WIDTH, HARDWARE)
    n_f = n // (N // Nf)
    dt = tl.load(x_f_ptr + b * x_f_sb + n_f * x_f_sn).to(tl.float32) + tl.load(dt_bias_ptr + n_f).to(tl.float32)
    f = exponential(-exponential(tl.load(A_log_ptr + n_f).to(tl.float32)) * softplus(dt))

    y = tl.zeros((BV,), tl.float32)
    for first in range(0, K, BK):  # rows of H never mix: any K goes through the same registers
        rows = first + tl.arange(0, BK)
        in_rows = rows < K
        in_state = in_rows[:, None] & in_cols[None, :]
        state_at = state_ptr + slot * state_ss + n * (K * V) + rows[:, None] * V + cols[None, :]
        h = tl.load(state_at, mask=in_state, other=0.0)
        q_channel = (n // (N // Nq)) * K + rows
        k_channel = Nq * K + (n // (N // Nk)) * K + rows
        q = conv_silu(x_at, window_at, conv_weight_ptr, q_channel, in_rows, qkv_sc, C, WIDTH, HARDWARE)
        k = conv_silu(x_at, window_at, conv_weight_ptr, k_channel, in_rows, qkv_sc, C, WIDTH, HARDWARE)
        h, _ = step(h, k, v, f, W, DOT, HARDWARE)
        tl.store(state_at, h, mask=in_state)
        y += tl.sum(h * q[:, None], 0)

    D = tl.load(D_ptr + n * V + cols, mask=in_cols, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + b * g_sb + ((n // (N // Ng)) * V + cols) * g_sc, mask=in_cols, other=0.0).to(tl.float32)
    tl.store(o_at, ((y + D * v) * silu(g, HARDWARE)).to(o_ptr.dtype.element_ty), mask=in_cols)


@triton.jit(do_not_specialize=["slots"])
def decode_finish_kernel(
    o_ptr, norm_weight_ptr, qkv_ptr, conv_state_ptr, indices_ptr,
    slots, eps, qkv_sb, qkv_sc, conv_ss, indices_sb,
    F: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    BF: tl.constexpr, BC: tl.constexpr, BW: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    slot = b
    if INDEXED:
        slot = tl.load(indices_ptr + b * indices_sb).to(tl.int64)
        if (slot < 0) | (slot >= slots):
            return
    if tl.program_id(1) == 0:
        features = tl.arange(0, BF)
        squares = tl.zeros((BF,), tl.float32)
        for first in range(0, F, BF):
            o = tl.load(o_ptr + b * F + first + features, mask=first + features < F, other=0.0).to(tl.float32)
            squares += o * o
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, 0) / F + eps))
        for first in range(0, F, BF):
            mask = first + features < F
            o = tl.load(o_ptr + b * F + first + features, mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(norm_weight_ptr + first + features, mask=mask, other=0.0).to(tl.float32)
            tl.store(o_ptr + b * F + first + features, (o * rstd * weight).to(o_ptr.dtype.element_ty), mask=mask)
    else:
        channel = ((tl.program_id(1) - 1) * BC + tl.arange(0, BC)).to(tl.int64)[None, :]
        tap = tl.arange(0, BW)[:, None]
        window_at = conv_state_ptr + slot * conv_ss + tap * C + channel
        element = conv_state_ptr.dtype.element_ty
        older = tl.load(window_at + C, mask=(tap < WIDTH - 2) & (channel < C), other=0.0)
        now = tl.load(qkv_ptr + b * qkv_sb + channel * qkv_sc, mask=channel < C, other=0.0)
        tl.debug_barrier()  # an element is read and written by different threads: all have read before any writes
        tl.store(window_at, tl.where(tap < WIDTH - 2, older, now.to(element)), mask=(tap < WIDTH - 1) & (channel < C))


def decode_step(
    qkv: Tensor,
    x_f: Tensor,
    g: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    W: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    state_indices: Tensor | None,
    num_q_heads: int,
    num_k_heads: int,
    norm_eps: float,
    *,
    config: LaunchConfig | None = None,
    hardware_tanh: bool | None = None,
) -> Tensor:
    """The op's arguments without `impl`; the keyword arguments are for tuning and tests."""
    (B, C), (slots, N, K, V), width = qkv.shape, state.shape, conv_weight.shape[2]
    o = qkv.new_empty(B, N * V)
    if B == 0:
        return o
    BV = max(16, next_power_of_2(V))
    config = config or decode_config(K, BV, qkv.element_size())
    indexed = state_indices is not None
    indices, indices_sb = (state_indices, state_indices.stride(0)) if state_indices is not None else (qkv, 0)
    BC = min(FINISH_CHANNELS, next_power_of_2(C))
    windows = triton.cdiv(C, BC) if width > 1 else 0
    with _on_device(qkv):
        decode_kernel[(B * N,)](
            qkv, x_f, g, conv_weight, A_log, dt_bias, W, D, conv_state, state, indices, o,
            slots, *qkv.stride(), *x_f.stride(), *g.stride(), conv_state.stride(0), state.stride(0), indices_sb,
            N=N, K=K, V=V, C=C, WIDTH=width,
            Nq=num_q_heads, Nk=num_k_heads, Nv=(C - (num_q_heads + num_k_heads) * K) // V,
            Nf=x_f.shape[1], Ng=g.shape[1] // V, Nw=W.shape[0],
            BK=config.rows, BV=BV, INDEXED=indexed, **_numerics(qkv, hardware_tanh), num_warps=config.warps,
        )  # fmt: skip
        decode_finish_kernel[(B, 1 + windows)](
            o, norm_weight, qkv, conv_state, indices,
            slots, norm_eps, *qkv.stride(), conv_state.stride(0), indices_sb,
            F=N * V, C=C, WIDTH=width,
            BF=min(FINISH_FEATURES, next_power_of_2(N * V)), BC=BC, BW=max(2, next_power_of_2(max(1, width - 1))),
            INDEXED=indexed, num_warps=FINISH_WARPS,
        )  # fmt: skip
    return o
