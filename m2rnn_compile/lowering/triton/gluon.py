# SPDX-License-Identifier: Apache-2.0
"""Whether the Gluon kernels can be used, and their import at first use.

Gluon is experimental API of Triton and its layouts are NVIDIA's; where it is missing the portable kernel runs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


@functools.lru_cache(None)
def _import_error() -> str | None:
    try:
        from . import backward_gluon, backward_wide, forward_fused_gluon, forward_gluon, forward_wide  # noqa: F401
    except (ImportError, AttributeError) as e:
        return f"this Triton has no usable Gluon: {e}"
    return None


@functools.lru_cache(None)
def _device_reason(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return "Gluon kernels are written for NVIDIA GPUs"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "mma.m16n8k16 needs compute capability 8.0"
    return None


def gluon_unsupported(v: Tensor, K: int, chunk: int) -> str | None:
    """Why the portable kernel must run instead of the Gluon forward, or None."""
    V = v.shape[-1]
    if v.dtype not in (torch.bfloat16, torch.float16):
        return "the products are of 16-bit operands"
    if V > 64:
        return "wider V does not fit the registers of one warp"
    if K % 16 or V % 16:
        return "inputs are copied 16 bytes at a time, aligned"
    if chunk not in (0, 64):
        return "a chunk is two of 32 steps: a checkpoint of the op holds two 16-bit states"
    return _device_reason(v.device) or _import_error()


def warpgroups(device: torch.device, BV: int) -> bool:
    """Whether kernels of two warpgroups run: at V = 64 on Hopper, where one state fills a multiprocessor."""
    return BV == 64 and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def clip_mode(device: torch.device) -> int:
    """2 where the clip is one instruction (min.xorsign.abs, from compute capability 8.6 on), 1 where it takes two."""
    return 2 if torch.cuda.get_device_capability(device) >= (8, 6) else 1


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it where its last dimension is strided or its lines do not start at 16 bytes."""
    lines = [s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s % 16 == 0 for s in lines):
        return x
    return x.contiguous()


def strides(x: Tensor, *, time: bool = False) -> tuple[int, ...]:
    """Strides with 0 for dimensions of size 1, whose stride means nothing but would count as unaligned.

    time: but for time's that of the batch, which holds one step then: a 0 would count as aligned where it is not at any
    other T, and compile a kernel for T = 1.
    """
    found = [s if n > 1 else 0 for n, s in zip(x.shape, x.stride(), strict=True)]
    found[-1] = x.stride(-1)
    if time and x.shape[1] == 1:
        found[1] = x.stride(0)
    return tuple(found)


def forward_gluon_kernel() -> Any:
    from .forward_gluon import scan_forward_gluon_kernel

    return scan_forward_gluon_kernel


def backward_gluon_kernel() -> Any:
    from .backward_gluon import scan_backward_gluon_kernel

    return scan_backward_gluon_kernel


def backward_wide_kernel() -> Any:
    from .backward_wide import scan_backward_wide_kernel

    return scan_backward_wide_kernel


def forward_wide_kernel() -> Any:
    from .forward_wide import scan_forward_wide_kernel

    return scan_forward_wide_kernel


def forward_fused_kernel() -> Any:
    from .forward_fused_gluon import scan_forward_fused_kernel

    return scan_forward_fused_kernel
