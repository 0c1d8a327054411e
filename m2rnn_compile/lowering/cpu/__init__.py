# SPDX-License-Identifier: Apache-2.0
"""The ops on a CPU: one C++ file, built at first use and called through ctypes (which releases the GIL).

The kernel reads q, k, v, f and dy in their own dtype through their strides, so nothing of size T is copied here. Work
is split over (sequence, head) on `torch.get_num_threads()` threads; the bits of the result do not depend on how many.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from ...ops.validation import check_cu_seqlens_values, new_checkpoints, state_dtype
from .build import availability, library

__all__ = ["availability", "scan", "scan_backward", "step", "unsupported"]

_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class _Strided(ctypes.Structure):
    """`struct Strided` of kernel.cpp: x[b, t, head, element] with strides in elements."""

    _fields_ = [("data", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("dtype", "heads", "stride_b", "stride_t", "stride_h", "stride_e")
    ]


class _Args(ctypes.Structure):
    """`struct Args` of kernel.cpp, field by field."""

    _fields_ = (
        [(name, _Strided) for name in ("q", "k", "v", "f", "y", "dq", "dk", "dv", "df")]
        + [
            (name, ctypes.c_void_p)
            for name in ("W", "initial", "final_state", "checkpoints", "dfinal", "dW", "dinitial", "bounds")
        ]
        + [(name, ctypes.c_int64) for name in ("B", "T", "S", "N", "Nw", "K", "V", "C", "NC", "threads", "is_double")]
        + [("clip", ctypes.c_double)]
    )


def _strided(x: Tensor) -> _Strided:
    """Describe [B, T, heads, elements], or [B, T, heads]."""
    stride = x.stride()
    return _Strided(x.data_ptr(), _DTYPE_CODES[x.dtype], x.shape[2], *stride, *((0,) if len(stride) == 3 else ()))


def _plain(x: Tensor) -> Tensor:
    """Without the lazy negation bit, which raw pointers would miss (a no-op for nearly every tensor)."""
    return x.resolve_neg()


def _dense(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """States and weights: contiguous, in the state's dtype."""
    return None if x is None else x.to(dtype).contiguous().resolve_neg()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _call(name: str, args: _Args) -> None:
    lib = library()
    if lib.m2rnn_args_size() != ctypes.sizeof(_Args):
        raise RuntimeError(
            f"m2rnn: the C++ kernel expects arguments of {lib.m2rnn_args_size()} bytes and was given "
            f"{ctypes.sizeof(_Args)}; kernel.cpp and __init__.py do not belong together, reinstall m2rnn_compile"
        )
    if getattr(lib, name)(ctypes.addressof(args)) != 0:
        raise MemoryError("m2rnn: the C++ kernel could not allocate its buffers; use a smaller chunk or fewer threads")


def _common(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor, W: Tensor, cu_seqlens: Tensor | None, chunk: int
) -> tuple[_Args, list[object]]:
    """The arguments that forward and backward share, and what must stay alive during the call."""
    q, k, v, f = (_plain(x) for x in (q, k, v, f))
    W_ = _dense(W, state_dtype(v))
    assert W_ is not None
    B, T, K, V = q.shape[0], q.shape[1], q.shape[3], v.shape[3]
    alive: list[object] = [q, k, v, f, W_]
    args = _Args(q=_strided(q), k=_strided(k), v=_strided(v), f=_strided(f), W=W_.data_ptr())
    args.B, args.T, args.K, args.V, args.S = B, T, K, V, B
    args.N = max(q.shape[2], k.shape[2], v.shape[2], f.shape[2], W.shape[0])
    args.Nw = W.shape[0]
    if cu_seqlens is not None:
        bounds = check_cu_seqlens_values(cu_seqlens, T)  # they become addresses: never trusted
        array = (ctypes.c_int64 * len(bounds))(*bounds)
        alive.append(array)
        args.bounds, args.S = ctypes.addressof(array), len(bounds) - 1
    args.C = chunk
    args.threads, args.is_double = torch.get_num_threads(), v.dtype == torch.float64
    args.clip = math.inf
    return args, alive


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward: y [B, T, N, V], final state [S, N, K, V], checkpoints [B, NC, N, K, V]."""
    acc = state_dtype(v)
    args, _alive = _common(q, k, v, f, W, cu_seqlens, chunk)
    initial = _dense(initial_state, acc)
    y = v.new_empty(args.B, args.T, args.N, args.V)
    final_state = v.new_empty(args.S, args.N, args.K, args.V, dtype=acc)
    checkpoints = new_checkpoints(v, args.N, args.K, args.S, chunk, cu_seqlens is not None)
    args.NC = checkpoints.shape[1]
    args.y = _strided(y)
    args.initial, args.final_state, args.checkpoints = _pointer(initial), final_state.data_ptr(), checkpoints.data_ptr()
    _call("m2rnn_forward", args)
    return y, final_state, checkpoints


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward: dq, dk, dv, df, dW like their inputs, dinitial_state [S, N, K, V] in the state's dtype."""
    if chunk <= 0:
        raise ValueError(f"m2rnn: the backward pass needs checkpoints, so `chunk` must be at least 1, got {chunk}")
    acc = state_dtype(v)
    args, _alive = _common(q, k, v, f, W, cu_seqlens, chunk)
    states = _dense(checkpoints, acc)
    args.NC = checkpoints.shape[1]
    dfinal = _dense(dfinal_state, acc)
    dq, dk, dv, df = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, f))
    dW = v.new_empty(W.shape, dtype=acc)
    dinitial = v.new_empty(args.S, args.N, args.K, args.V, dtype=acc)
    if dy is not None:
        dy = _plain(dy)
        args.y = _strided(dy)
    args.dq, args.dk, args.dv, args.df = _strided(dq), _strided(dk), _strided(dv), _strided(df)
    args.checkpoints, args.dfinal = _pointer(states), _pointer(dfinal)
    args.dW, args.dinitial = dW.data_ptr(), dinitial.data_ptr()
    if state_grad_clip is not None:
        args.clip = state_grad_clip
    _call("m2rnn_backward", args)
    return dq, dk, dv, df, dW.to(W.dtype), dinitial


def step(q: Tensor, k: Tensor, v: Tensor, f: Tensor, W: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """One decoding step, a scan of length 1: y [B, N, V] in v's dtype, state [B, N, K, V]."""
    q, k, v, f = (x.unsqueeze(1) for x in (q, k, v, f))
    y, state, _ = scan(q, k, v, f, W, initial_state, None, None, 0)
    return y.squeeze(1), state


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why the kernel cannot run on these tensors (q, k, v, f, W, initial_state, cu_seqlens), or None.

    Looks at metadata only.
    """
    for x in tensors:
        if x is None:
            continue
        if x.device.type != "cpu":
            return f"the C++ kernel runs on CPU tensors, got one on {x.device}"
        if x.layout != torch.strided:
            return f"the C++ kernel needs strided (dense) tensors, got layout {x.layout}"
        if x.is_floating_point() and x.dtype not in _DTYPE_CODES:
            return f"the C++ kernel supports float32, float64, bfloat16 and float16, got {x.dtype}"
    return None
