# SPDX-License-Identifier: Apache-2.0
"""`m2rnn::fused_scan_conv` on a GPU: three launches, of which the second is nearly all of the time.

prologue.py              the convolution with SiLU of q | k, the forget gate
forward_fused_gluon.py   the convolution with SiLU of v, the scan, the tail
norm_kernel              a norm over all heads, in place: one program of the scan has one head only
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import GLUON_CHUNK, INTERPRETED, _groups, _multiprocessors, _on_device, _shared_programs
from .config import LaunchConfig, next_power_of_2
from .conv import MAX_WIDTH
from .fused_tail import norm_kernel
from .gluon import aligned, forward_fused_kernel, gluon_unsupported, strides
from .prologue import before_scan

MAX_ROWS = 64  # of a state in one program
NORM_ROWS, NORM_WARPS = 2, 4


def config_for(scans: int, K: int, multiprocessors: int) -> LaunchConfig:
    """All rows in one program, 32 to a warp; 16 where there are few scans."""
    rows = max(16, next_power_of_2(K))
    few = scans < 2 * multiprocessors
    return LaunchConfig(rows, max(1, rows // (16 if few else 32)))


def unsupported(v: Tensor, K: int, g: Tensor | None, activation: str, out_dtype: torch.dtype) -> str | None:
    """Why the scan's kernel does not take what surrounds it, or None."""
    if INTERPRETED:
        return "Gluon is not interpreted"
    if v.shape[3] > 32 or K > MAX_ROWS:
        return f"a program holds a state of up to {MAX_ROWS} rows and 32 columns"
    if g is not None and activation not in ("silu", "sigmoid"):
        return f"{activation} is left to the tail's own kernel"
    if out_dtype != v.dtype or (g is not None and g.dtype != v.dtype):
        return "o and g have another dtype than v"
    return gluon_unsupported(v, K, 0)


def _gate(g: Tensor) -> tuple[Tensor, int]:
    """(g from its last 16-byte boundary on, elements skipped): cp.async takes 4, 8 or 16 bytes that are aligned so.

    In the released 410M model g is a slice of the projection 8 bytes behind such a boundary.
    """
    lines = [s for n, s in zip(g.shape[:-1], g.stride()[:-1], strict=True) if n > 1]
    shift = g.data_ptr() % 16 // g.element_size()
    if g.stride(-1) != 1 or any(s % 16 for s in lines) or shift % 2 or shift > g.storage_offset():
        return g.contiguous(), 0
    return g.as_strided(g.shape, g.stride(), g.storage_offset() - shift), shift


def walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    W: Tensor,
    initial_state: Tensor | None,
    taps: Tensor | None,
    D: Tensor | None,
    g: Tensor | None,
    norm_weight: Tensor | None,
    activation: str,
    norm: str,
    norm_eps: float,
    *,
    config: LaunchConfig | None = None,
    shared: bool = True,
    norm_rows: int = NORM_ROWS,
    norm_warps: int = NORM_WARPS,
) -> tuple[Tensor, Tensor]:
    """(o, final state). taps: weights [Nv·V, width] of the convolution that makes v, which then comes without it."""
    (B, T, _, K), V = q.shape, v.shape[3]
    N = max(q.shape[2], k.shape[2], v.shape[2], f.shape[2], W.shape[0])
    o = v.new_empty(B, T, N, V)
    final = v.new_empty(B, N, K, V, dtype=torch.float32)
    scans, BV = B * N, next_power_of_2(V)
    if scans == 0:
        return o, final
    h0 = None if initial_state is None else initial_state.to(torch.float32).contiguous()
    q, k, v, f, W = aligned(q), aligned(k), aligned(v), f.float(), W.contiguous()
    g_base, shift = (v, 0) if g is None else _gate(g)
    config = config or config_for(scans, K, _multiprocessors(v.device))
    programs = _shared_programs(v, scans, config.warps, BV) if shared else None
    flags = v.new_zeros(scans, dtype=torch.int32) if programs else W
    with _on_device(v):
        forward_fused_kernel()[(programs or scans,)](
            q, k, v, f, W, W if h0 is None else h0, W if taps is None else taps.contiguous(),
            W if D is None else D.contiguous(), g_base, W if norm_weight is None else norm_weight.contiguous(),
            o, final, T, norm_eps, *strides(q), *strides(k), *strides(v), *strides(f), *strides(g_base),
            flags, scans, triton.cdiv(T, GLUON_CHUNK),
            N=N, K=K, V=V, **_groups(N, q, k, v, f, W), Gg=N // g_base.shape[2],
            BK=config.rows, BV=BV, C=GLUON_CHUNK, G_SHIFT=shift, WIDTH=0 if taps is None else taps.shape[1],
            HAS_H0=h0 is not None, HAS_D=D is not None, ACT="none" if g is None else activation,
            HEAD_NORM=norm == "head", HAS_WEIGHT=norm == "head" and norm_weight is not None,
            SHARED=programs is not None, num_warps=config.warps, maxnreg=config.registers,
        )  # fmt: skip
        if norm == "all" and T:
            norm_kernel[(triton.cdiv(B * T, norm_rows),)](
                o, o if norm_weight is None else norm_weight.contiguous(), B * T, norm_eps,
                F=N * V, HAS_W=norm_weight is not None, BF=next_power_of_2(N * V), ROWS=norm_rows, num_warps=norm_warps,
            )  # fmt: skip
    return o, final


def fused_scan_conv(
    qkv: Tensor,
    conv_weight: Tensor | None,
    position: Tensor | None,
    sizes: list[int],
    f: Tensor,
    W: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    D: Tensor | None,
    g: Tensor | None,
    norm_weight: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    forget: str,
    activation: str,
    norm: str,
    norm_eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor] | None:
    """(o, final state); None where this cannot run, and the composition of kernels has to."""
    Nq, Nk, Nv, K, V = sizes
    qk, v = qkv[..., : (Nq + Nk) * K], qkv[..., (Nq + Nk) * K :].unflatten(-1, (Nv, V))
    if cu_seqlens is not None or position is not None or unsupported(v, K, g, activation, out_dtype) is not None:
        return None
    taps = None
    if conv_weight is not None:
        N = max(Nq, Nk, Nv, f.shape[2], W.shape[0])
        if Nv != N or conv_weight.shape[1] > MAX_WIDTH:
            return None  # a v that heads share would be convolved by each of them
        taps = conv_weight[(Nq + Nk) * K :]
    convolved, factor = before_scan(
        None if taps is None else qk, None if conv_weight is None else conv_weight[: (Nq + Nk) * K],
        f, A_log, dt_bias, forget,
    )  # fmt: skip
    q, k = (qk if convolved is None else convolved).split([Nq * K, Nk * K], -1)
    return walk(
        q.unflatten(-1, (Nq, K)), k.unflatten(-1, (Nk, K)), v, factor, W, initial_state, taps,
        D, g, norm_weight, activation, norm, norm_eps,
    )  # fmt: skip
