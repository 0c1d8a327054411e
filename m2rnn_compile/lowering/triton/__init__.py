# SPDX-License-Identifier: Apache-2.0
"""The scan on a GPU, in Triton. Functions as `ops/registry.py` asks for them; inputs are validated already."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.validation import new_checkpoints
from . import tuning
from .backward import scan_backward_kernel
from .config import LaunchConfig, backward_config, forward_config, next_power_of_2, shared_programs, stride_unit
from .forward import scan_forward_kernel
from .gluon import (
    aligned,
    backward_gluon_kernel,
    backward_wide_kernel,
    clip_mode,
    forward_gluon_kernel,
    forward_wide_kernel,
    gluon_unsupported,
    strides,
    warpgroups,
)
from .packed_windows import windows_of
from .reduce import Sum, add, add_all

INTERPRETED = triton.knobs.runtime.interpret
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
MAX_V = 128
FUSED = "m2rnn_compile.lowering.triton.fused"  # where the kernels of the fused scan's tail are, see ops/fused.py
MIXER = "m2rnn_compile.lowering.triton.fused_mixer"  # where the backward of the fused mixer is, see ops/fused_mixer.py
# Backward's partials of one window of time: larger is faster, and its size adds to the peak (docs/kernel-notes.md, 48).
WINDOW_BYTES = 144 * 2**20
# Steps between two states that the Gluon forward keeps: 16-bit, so two of them fill one fp32 checkpoint of the op.
GLUON_CHUNK = 32


def availability() -> str | None:
    """Importing this module needed Triton; whether there is a GPU, the tensors' device says."""
    return None


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor, W: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> str | None:
    if v.dtype not in DTYPES:
        return f"impl='triton' takes float32, bfloat16 and float16, not {v.dtype}"
    if v.shape[-1] > MAX_V:
        return f"impl='triton' holds W in registers and takes V up to {MAX_V}, got V = {v.shape[-1]}"
    return None


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _shared_programs(v: Tensor, scans: int, warps: int, BV: int) -> int | None:
    if v.shape[1] == 0:  # nothing to share out, and a share is counted in chunks of a scan
        return None
    hopper = v.device.type == "cuda" and torch.cuda.get_device_capability(v.device)[0] == 9
    return shared_programs(scans, warps, BV, _multiprocessors(v.device), hopper)


def pinned_config(
    direction: str, q: Tensor, k: Tensor, v: Tensor, f: Tensor, W: Tensor, chunk: int
) -> tuple[LaunchConfig, str]:
    """Without tuning, for an unpacked batch: the configuration, and of which kernel: portable, gluon or wide."""
    scans, K, V = q.shape[0] * max(x.shape[2] for x in (q, k, v, f)), q.shape[3], v.shape[3]
    BV, multiprocessors = max(16, next_power_of_2(V)), _multiprocessors(v.device)
    gluon = bool(_numerics(v, None)["HARDWARE"]) and gluon_unsupported(v, K, chunk) is None
    wide = gluon and warpgroups(v.device, BV)
    if direction == "forward":
        config = forward_config(scans, K, BV, multiprocessors, gluon, wide)
    else:
        config = backward_config(scans, K, BV, multiprocessors, wide)
        gluon = gluon and (wide or BV <= 32)
    return config, "wide" if wide else "gluon" if gluon else "portable"


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def _numerics(v: Tensor, hardware_tanh: bool | None) -> dict[str, Any]:
    """Operand dtype of the products, and which tanh: the hardware's for 16-bit inputs, the exact one for fp32."""
    hardware = v.dtype != torch.float32 if hardware_tanh is None else hardware_tanh
    # The interpreter computes bf16 products wrongly without a word, and has no inline PTX.
    return dict(DOT=tl.float32 if INTERPRETED else DTYPES[v.dtype], HARDWARE=hardware and not INTERPRETED)


def _check_chunk(chunk: int, T: int) -> None:
    """Backward walks a chunk in groups of four steps; a sequence of one chunk may end anywhere in it."""
    if chunk % 4 and chunk < T:
        raise ValueError(
            f"m2rnn: impl='triton' takes a `chunk` that is a multiple of 4 or no less than T = {T}, got {chunk}; "
            "pass 64, as `m2rnn` does"
        )


def _unit(x: Tensor | None) -> int:
    return 1 if x is None else stride_unit(*strides(x, time=True)[:2])


def _groups(N: int, q: Tensor, k: Tensor, v: Tensor, f: Tensor, W: Tensor) -> dict[str, int]:
    return dict(Gq=N // q.shape[2], Gk=N // k.shape[2], Gv=N // v.shape[2], Gf=N // f.shape[2], Gw=N // W.shape[0])


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    W: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    state_grad_clip: float | None,
    chunk: int,
    *,
    config: LaunchConfig | None = None,
    hardware_tanh: bool | None = None,
    gluon: bool | None = None,
    add_partials: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final state, checkpoints); see docs/design.md. The keyword arguments are for tuning and tests.

    With `add_partials=False` y comes as partial sums over blocks of rows, [blocks, B, T, N, V]: `fused.py` adds them.
    """
    B, T, _, K = q.shape
    _check_chunk(chunk, T)
    V = v.shape[3]
    N = max(q.shape[2], k.shape[2], v.shape[2], f.shape[2], W.shape[0])
    packed = cu_seqlens is not None
    S = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else B
    BV = max(16, next_power_of_2(V))
    numerics = _numerics(v, hardware_tanh)
    if gluon is None:
        gluon = numerics["HARDWARE"] and gluon_unsupported(v, K, chunk) is None
    wide = gluon and warpgroups(v.device, BV)
    config = config or tuning.chosen("forward", v.dtype, S * N, K, V)
    config = config or forward_config(S * N, K, BV, _multiprocessors(q.device), bool(gluon), wide)
    blocks = triton.cdiv(K, config.rows)

    y = v.new_empty(B, T, N, V) if add_partials or blocks == 1 or S * N == 0 else v.new_empty(0)
    final = v.new_empty(S, N, K, V, dtype=torch.float32)
    checkpoints = new_checkpoints(v, N, K, S, chunk, packed)
    NC = checkpoints.shape[1]
    if S * N == 0:
        return y if add_partials else y[None], final, checkpoints
    h0 = None if initial_state is None else initial_state.to(torch.float32).contiguous()
    W = W.contiguous()
    # Partial sums of y over blocks of rows; bf16 ones keep the error far inside the rule at half the traffic.
    y_part = y if blocks == 1 else v.new_empty(blocks, B, T, N, V, dtype=v.dtype if gluon else torch.float32)
    if gluon and chunk and triton.cdiv(T, GLUON_CHUNK) % 2:
        checkpoints[:, T // chunk].zero_()  # half of it stays unused
    if gluon:
        q, k, v, f = aligned(q), aligned(k), aligned(v), f.float()
    arguments = (
        q, k, v, f, W, h0 if h0 is not None else W, cu_seqlens if cu_seqlens is not None else W,
        y_part, final, checkpoints.view(v.dtype) if gluon else checkpoints,
        T, NC, *strides(q, time=not gluon), *strides(k, time=not gluon), *strides(v, time=not gluon), *strides(f),
        y_part.stride(0) if blocks > 1 else 0,
    )  # fmt: skip
    constants = dict(
        N=N, K=K, V=V, **_groups(N, q, k, v, f, W), BK=config.rows, BV=BV,
        PACKED=packed, HAS_H0=h0 is not None, SAVE=chunk > 0,
    )  # fmt: skip
    with _on_device(q):
        if gluon and wide:
            forward_wide_kernel()[(S * N, blocks)](*arguments, **constants, C=GLUON_CHUNK, num_warps=config.warps)
        elif gluon:
            warps = min(config.warps, config.rows // 16)
            programs = None if packed else _shared_programs(v, S * N * blocks, warps, BV)
            flags = v.new_zeros(S * N * blocks, dtype=torch.int32) if programs else W
            forward_gluon_kernel()[(programs or S * N * blocks,)](
                *arguments, flags, S * N * blocks, triton.cdiv(T, GLUON_CHUNK), **constants, C=GLUON_CHUNK,
                SHARED=programs is not None, num_warps=warps, maxnreg=config.registers,
            )  # fmt: skip
        else:
            scan_forward_kernel[(S * N, blocks)](
                *arguments, **constants, C=max(chunk, 1), **numerics,
                UNITS=(_unit(q), _unit(k), _unit(v)), num_warps=config.warps,
            )  # fmt: skip
        if not add_partials:
            return y_part if blocks > 1 else y[None], final, checkpoints
        if blocks > 1:
            add(Sum(y_part, y, 1, blocks), T, 0)
    return y, final, checkpoints


def scan_backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    W: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    state_grad_clip: float | None,
    chunk: int,
    *,
    config: LaunchConfig | None = None,
    hardware_tanh: bool | None = None,
    window_bytes: int = WINDOW_BYTES,
    gluon: bool | None = None,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
    D: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of everything, window of time by window; see docs/design.md and `backward.py`.

    For `fused_mixer.py`: `into` are dq, dk and dv to write, columns of a contiguous [B, T, P] each; with D [N, V] dv is
    that of v in y + D ⊙ v too, D ⊙ dy being added where its partials are. That takes a v with N heads, and dy,
    contiguous or such columns too.
    """
    B, T, _, K = q.shape
    _check_chunk(chunk, T)
    V = v.shape[3]
    N = max(q.shape[2], k.shape[2], v.shape[2], f.shape[2], W.shape[0])
    packed = cu_seqlens is not None
    S = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else B
    BV = max(16, next_power_of_2(V))
    numerics = _numerics(v, hardware_tanh)
    paired = numerics["HARDWARE"] and gluon_unsupported(v, K, chunk) is None  # what the forward left
    wide = paired and gluon is not False and warpgroups(v.device, BV)
    if gluon is None:
        gluon = paired and (BV <= 32 or wide)  # at V = 64 the registers of one warp do not hold dW
    config = config or tuning.chosen("backward", v.dtype, S * N, K, V)
    config = config or backward_config(S * N, K, BV, _multiprocessors(q.device), wide)
    blocks = triton.cdiv(K, config.rows)
    groups = _groups(N, q, k, v, f, W)

    empty = lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (dq, dk, dv), df = into or (empty(q), empty(k), empty(v)), empty(f)
    D, plus = (None, None) if D is None else (D.contiguous(), dy)
    carry = v.new_zeros(S, N, K, V, dtype=torch.float32)
    if dfinal_state is not None:
        carry.copy_(dfinal_state)
    dW_part = v.new_zeros(S, N, blocks, V, V, dtype=torch.float32)
    if S * N == 0 or T == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), df.zero_(), torch.zeros_like(W).contiguous(), carry

    W_ = W.contiguous()
    clips = state_grad_clip is not None and state_grad_clip != float("inf")
    if paired:
        chunk, checkpoints = GLUON_CHUNK, checkpoints.view(v.dtype)
    if gluon:
        q, k, v, f, dy = aligned(q), aligned(k), aligned(v), f.float(), None if dy is None else aligned(dy)
    low = v.dtype if gluon else torch.float32
    per_chunk = chunk * B * N * (low.itemsize * (2 * K + blocks * V) + 4 * blocks)
    chunks = triton.cdiv(T, chunk)
    step = min(chunks, max(1, window_bytes // max(1, per_chunk)))
    windows = [(max(0, last - step), last) for last in range(chunks, 0, -step)]
    walks = places = None
    if cu_seqlens is not None and len(windows) > 1:
        walks, places = windows_of(cu_seqlens, T, chunk, step)
        windows = [(0, 0)] * len(walks)  # the kernel looks at its walk instead
    width = min(T, step * chunk) if places is None else step * chunk
    sequences = S if walks is None else walks.shape[1]  # in one window
    parts = {
        "q": v.new_empty(B * width * N * K, dtype=low),
        "k": v.new_empty(B * width * N * K, dtype=low),
        "v": v.new_empty(blocks * B * width * N * V, dtype=low),
        "f": v.new_empty(blocks * B * width * N, dtype=torch.float32),
    }
    if not gluon:
        scratch = v.new_empty(sequences * N * blocks, triton.cdiv(chunk, 4), config.rows, BV, dtype=torch.float32)
    notes = [v.new_empty(sequences * N * blocks * (chunk // 4), config.rows * BV)] if wide else []  # every four steps
    if dy is None:
        dq.zero_()
    programs = _shared_programs(v, S * N * blocks, 1, BV) if gluon and not wide and not packed else None
    # Rows of a multiple of 16 bytes, or Triton would compile the kernel once more for the other rows.
    flags = v.new_zeros(len(windows), -(S * N * blocks // -4) * 4, dtype=torch.int32) if programs else None
    with _on_device(q):
        for i, (first, last) in enumerate(windows):
            t_first = first * chunk
            window = min(T, last * chunk) - t_first if places is None else width
            p_q = parts["q"][: B * window * N * K].view(1, B, window, N, K)
            p_k = parts["k"][: B * window * N * K].view(1, B, window, N, K)
            p_v = parts["v"][: blocks * B * window * N * V].view(blocks, B, window, N, V)
            p_f = parts["f"][: blocks * B * window * N].view(blocks, B, window, N)
            arguments = (
                p_q, p_k, p_v, p_f,
                T, checkpoints.shape[1], first, last, window, float(state_grad_clip or 0.0),
                *strides(q, time=not gluon), *strides(k, time=not gluon), *strides(v, time=not gluon), *strides(f),
                *(strides(dy, time=not gluon) if dy is not None else (0, 0, 0, 1)),
                p_v.stride(0), p_f.stride(0),
            )  # fmt: skip
            constants = dict(
                N=N, K=K, V=V, **groups, BK=config.rows, BV=BV, C=chunk,
                PACKED=packed, PLANNED=walks is not None, HAS_DY=dy is not None,
                CLIP=clip_mode(v.device) if clips and gluon else clips,
            )  # fmt: skip
            inputs = (
                q, k, v, f, W_, dy if dy is not None else q, cu_seqlens if cu_seqlens is not None else W_,
                W_ if walks is None else walks[i], checkpoints, *notes, carry, dW_part,
            )  # fmt: skip
            if gluon and wide:
                backward_wide_kernel()[(sequences * N, blocks)](*inputs, *arguments, **constants, num_warps=4)
            elif gluon:
                backward_gluon_kernel()[(programs or sequences * N * blocks,)](
                    *inputs, *arguments, W_ if flags is None else flags[i], sequences * N * blocks, last - first,
                    **constants, SHARED=programs is not None, num_warps=1, maxnreg=config.registers,
                )  # fmt: skip
            else:
                scan_backward_kernel[(sequences * N, blocks)](
                    *inputs, scratch, *arguments, **constants, SLOTS=2 if paired else 1, **numerics,
                    UNITS=(_unit(q), _unit(k), _unit(v), _unit(dy)), num_warps=config.warps,
                )  # fmt: skip
            sums = [Sum(p_q, dq, groups["Gq"], 1)] if dy is not None else []
            sums += [
                Sum(p_k, dk, groups["Gk"], 1),
                Sum(p_v, dv, groups["Gv"], blocks, D, plus),
                Sum(p_f, df, groups["Gf"], blocks),
            ]
            if places is None:
                add_all(sums, window, t_first)
            else:
                add_all(sums, chunk, 0, places[i])
    dW = dW_part.sum((0, 2)).unflatten(0, (W.shape[0], groups["Gw"])).sum(1).to(W.dtype)
    return dq, dk, dv, df, dW, carry


def step(q: Tensor, k: Tensor, v: Tensor, f: Tensor, W: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """One decoding step: the forward kernel with T = 1."""
    q, k, v, f = (x.unsqueeze(1) for x in (q, k, v, f))
    y, final, _ = scan(q, k, v, f, W, initial_state, None, None, 0)
    return y.squeeze(1), final
