# SPDX-License-Identifier: Apache-2.0
"""The fused scan on a GPU: the scan's own kernel, then one pass that adds its partial sums and does all of the tail.

What this saves, and what it does not. The scan splits the rows of the state over programs, so y leaves it as partial
sums, and some kernel has to add them: here that kernel goes on to o, and y is neither written (in inference) nor read
again. In backward the sums over positions (dD, the norm's weight) ride along in the pass that makes dy and dg. The tail
is not inside of the scan's kernel: the partial sums still make one trip through memory.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import INTERPRETED, _multiprocessors, _on_device, _unit
from . import fused_inference as inference
from . import scan as partial_scan
from .config import next_power_of_2
from .fused_tail import tail_backward_kernel, tail_forward_kernel
from .gluon import strides
from .reduce import pitch

MAX_FEATURES = 16384  # N·V of a norm over all heads: a position must fit into one tile in registers
TILE = 2048  # features of a tile where heads are independent
ROWS = 2  # positions per program in forward
PROGRAMS_PER_MULTIPROCESSOR = 2  # in backward: enough to hide latency, few enough partial sums of dD and dw


def unsupported(N: int, V: int, norm: str) -> str | None:
    """Why the tail cannot run here, or None. Looks at sizes only, so the compiler's pass can ask before it rewrites."""
    features = next_power_of_2(N) * next_power_of_2(V)
    if norm == "all" and features > MAX_FEATURES:
        return (
            f"a norm over all N·V features takes up to {MAX_FEATURES} of them (N and V rounded up to powers of two), "
            f"got {features}"
        )
    return None


def _tile(N: int, V: int, norm: str) -> tuple[int, int, int]:
    """(BN, BV, warps) of the forward pass: 32 elements a thread. Backward holds more and takes four times the warps."""
    BV = next_power_of_2(V)
    BN = next_power_of_2(N)
    if norm != "all":
        BN = min(BN, max(1, TILE // BV))
    return BN, BV, min(16, max(1, BN * BV // 1024))


def _aligned_base(x: Tensor) -> tuple[Tensor, int]:
    """(x from the last 16-byte boundary on, elements skipped): kernels load in vectors only from what is aligned.

    g is a view of the projection's result at an offset that is a multiple of 8 bytes only (1,556 elements in the
    released 410M model). A constant in the address tells the compiler as much; the pointer alone would not.
    """
    shift = x.data_ptr() % 16 // x.element_size()
    if shift == 0 or shift > x.storage_offset():
        return x, 0
    return x.as_strided(x.shape, x.stride(), x.storage_offset() - shift), shift


def _resident(warps: int) -> dict[str, int]:
    """Launch options with which all programs of backward are resident at once, where 128 registers allow it.

    With dg at an odd offset the compiler takes 147 registers for 8 warps: one program a multiprocessor, twice the time.
    """
    registers = min(255, 65536 // (32 * warps * PROGRAMS_PER_MULTIPROCESSOR))
    return dict(num_warps=warps) if registers < 128 or INTERPRETED else dict(num_warps=warps, maxnreg=registers)


def _check(N: int, V: int, norm: str) -> None:
    reason = unsupported(N, V, norm)
    if reason is not None:
        raise ValueError(f"m2rnn: impl='triton': {reason}; use norm='none' and norm the result in torch")


def fused_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    W: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    state_grad_clip: float | None,
    chunk: int,
    D: Tensor | None,
    g: Tensor | None,
    norm_weight: Tensor | None,
    activation: str,
    norm: str,
    norm_eps: float,
    out_dtype: torch.dtype,
    *,
    rows_per_program: int = ROWS,
    warps: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, final state, y, rstd, checkpoints) as `ops/fused.py` specifies; f is the forget factor already."""
    N, V = max(x.shape[2] for x in (q, k, v, f)), v.shape[3]
    N = max(N, W.shape[0])
    _check(N, V, norm)
    saves = chunk > 0
    parts, final, checkpoints = partial_scan(
        q, k, v, f, W, initial_state, cu_seqlens, state_grad_clip, chunk, add_partials=False
    )
    blocks, B, T = parts.shape[:3]
    has_tail = D is not None or g is not None or norm != "none"
    rstd = v.new_empty((B, T, {"none": 0, "all": 1, "head": N}[norm]) if saves else (0,), dtype=torch.float32)
    if blocks == 1 and not has_tail and out_dtype == v.dtype:
        return parts[0], final, v.new_empty(0), rstd, checkpoints
    o = v.new_empty(B, T, N, V, dtype=out_dtype)
    y = v.new_empty(0)
    writes_y = saves and has_tail and blocks > 1
    if saves and has_tail:
        y = v.new_empty(B, T, N, V) if writes_y else parts[0]
    rows = B * T
    if rows * N == 0:
        return o, final, y, rstd, checkpoints
    BN, BV, tile_warps = _tile(N, V, norm)
    v_base, v_shift = _aligned_base(v)
    g_base, g_shift = _aligned_base(g) if g is not None else (v_base, v_shift)
    with _on_device(v):
        tail_forward_kernel[(triton.cdiv(rows, rows_per_program), triton.cdiv(N, BN))](
            parts, v_base, parts if D is None else D.contiguous(), g_base,
            parts if norm_weight is None else norm_weight.contiguous(), o, y, rstd,
            rows, T, norm_eps, parts.stride(0), *strides(v, time=True), *strides(v if g is None else g, time=True),
            N=N, V=V, Gv=N // v.shape[2], Gg=1 if g is None else N // g.shape[2], BLOCKS=blocks,
            V_SHIFT=v_shift, G_SHIFT=g_shift,
            HAS_D=D is not None, HAS_G=g is not None, HAS_W=norm_weight is not None,
            SAVE_Y=writes_y, SAVE_RSTD=saves, ACT=activation, NORM=norm, FAST=_fast(out_dtype),
            BN=BN, BV=BV, ROWS=rows_per_program, V_UNIT=_unit(v), G_UNIT=_unit(v if g is None else g),
            num_warps=warps or tile_warps,
        )  # fmt: skip
    return o, final, y, rstd, checkpoints


def forget_gate(f: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, forget: str) -> Tensor:
    """The forget factor in fp32, or f if it is one: one launch."""
    return inference.before_scan(None, None, f, A_log, dt_bias, forget)[1]


fused_scan_conv = inference.fused_scan_conv


def fused_tail_backward(
    do: Tensor,
    y: Tensor,
    v: Tensor,
    D: Tensor | None,
    g: Tensor | None,
    norm_weight: Tensor | None,
    rstd: Tensor,
    activation: str,
    norm: str,
    *,
    dy: Tensor | None = None,
    dg: Tensor | None = None,
    programs: int | None = None,
    warps: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dy, dg for all N heads, dD, dnorm_weight) as `ops/fused.py` specifies.

    Writes to `dy` and `dg` [B, T, N, V] if they are given: columns of a contiguous tensor [B, T, P].
    """
    B, T, N, V = y.shape
    _check(N, V, norm)
    dy = v.new_empty(B, T, N, V) if dy is None else dy
    if dg is None:
        dg = y.new_empty(0) if g is None else g.new_empty(B, T, N, V)
    dy_base, dy_shift = _aligned_base(dy)
    dg_base, dg_shift = _aligned_base(dg)
    rows = B * T
    BN, BV, tile_warps = _tile(N, V, norm)
    programs = programs or PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(y.device)
    per_program = max(1, triton.cdiv(rows, programs))
    programs = triton.cdiv(rows, per_program)
    sums = lambda x: y.new_empty(0 if x is None else programs, N, V, dtype=torch.float32)
    dD, dw = sums(D), sums(norm_weight)
    if rows * N > 0:
        y = y.contiguous()
        v_base, v_shift = _aligned_base(v)
        g_base, g_shift = _aligned_base(g) if g is not None else (v_base, v_shift)
        with _on_device(v):
            tail_backward_kernel[(programs, triton.cdiv(N, BN))](
                do, y, v_base, y if D is None else D.contiguous(), g_base,
                y if norm_weight is None else norm_weight.contiguous(), rstd.contiguous(), dy_base, dg_base, dD, dw,
                rows, T, per_program, *strides(do, time=True), *strides(v, time=True),
                *strides(v if g is None else g, time=True),
                pitch(dy), 0 if g is None else pitch(dg),
                N=N, V=V, Gv=N // v.shape[2], Gg=1 if g is None else N // g.shape[2],
                V_SHIFT=v_shift, G_SHIFT=g_shift, DY_SHIFT=dy_shift, DG_SHIFT=dg_shift,
                HAS_D=D is not None, HAS_G=g is not None, HAS_W=norm_weight is not None,
                ACT=activation, NORM=norm, FAST=_fast(y.dtype), BN=BN, BV=BV,
                DO_UNIT=_unit(do), V_UNIT=_unit(v), G_UNIT=_unit(v if g is None else g),
                **_resident(warps or min(16, 4 * tile_warps)),
            )  # fmt: skip
    return (
        dy,
        dg,
        y.new_empty(0) if D is None else dD.sum(0).to(D.dtype),
        y.new_empty(0) if norm_weight is None else dw.sum(0).to(norm_weight.dtype),
    )


def _fast(dtype: torch.dtype) -> bool:
    """The hardware's exp where the result is rounded to 16 bits anyway."""
    return dtype != torch.float32 and not INTERPRETED
