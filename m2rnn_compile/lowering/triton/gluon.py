# SPDX-License-Identifier: Apache-2.0
"""Whether the Gluon kernels can be used, and their import at first use.

Gluon is experimental API of Triton and its layouts are NVIDIA's; where it is missing the portable kernel runs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.lru_cache(None)
def _import_error() -> str | None:
    try:
        from . import forward_gluon  # noqa: F401
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


def gluon_unsupported(device: torch.device, V: int, chunk: int) -> str | None:
    """Why the portable kernel must run instead, or None."""
    if V > 64:
        return "wider V does not fit the registers of one warp"
    if chunk % 4:
        return "steps are taken in groups of four, so checkpoints must be too"
    return _device_reason(device) or _import_error()


def forward_gluon_kernel() -> Any:
    from .forward_gluon import scan_forward_gluon_kernel

    return scan_forward_gluon_kernel
