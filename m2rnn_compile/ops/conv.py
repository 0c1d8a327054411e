# SPDX-License-Identifier: Apache-2.0
"""`m2rnn::conv_silu`: the short causal convolution in front of the scan with its SiLU, and its backward.

    a_t = Σ_j weight[:, width - 1 - j] · x_{t-j}        depthwise; terms with j > position_t are left out
    y_t = a_t · sigmoid(a_t)

Nobody has to call it: plain torch code of this form (`layers/conv.py` is) becomes this op when `torch.compile` fuses
what stands around a scan. A compiler makes four passes of the backward, of
which each reads x or dy again; the kernel makes one. In fp32 (fp64 for fp64 inputs), rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import LIB
from .validation import state_dtype

LIB.define("conv_silu(Tensor x, Tensor weight, Tensor? position) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIB.define(
    "conv_silu_backward(Tensor dy, Tensor x, Tensor weight, Tensor? position) -> (Tensor dx, Tensor dweight)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_backward = torch.ops.m2rnn.conv_silu_backward.default


def check_conv(x: Tensor, weight: Tensor, position: Tensor | None) -> None:
    """x [B, T, C], weight [C, width], position [T] of integers or None."""
    if x.dim() != 3 or not x.dtype.is_floating_point:
        raise ValueError(f"m2rnn: `x` must be floating point of shape [B, T, C], got {x.dtype} {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise ValueError(f"m2rnn: `weight` must have shape [C = {x.shape[2]}, width >= 1], got {tuple(weight.shape)}")
    if position is not None and (position.dim() != 1 or position.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"m2rnn: `position` must be int32 or int64 [T], got {position.dtype} {tuple(position.shape)}")
    if position is not None and position.shape[0] != x.shape[1]:
        raise ValueError(f"m2rnn: `position` must have length T = {x.shape[1]}, got {position.shape[0]}")


# ---- the equations --------------------------------------------------------------------------------------------------


def _shifted(x: Tensor, j: int, position: Tensor | None) -> Tensor:
    """x_{t-j}, zero before the start of a sequence; for j < 0 what a term of lag -j sends back."""
    T = x.shape[1]
    if j >= 0:
        moved = F.pad(x, (0, 0, j, 0))[:, :T]
        return moved if position is None else torch.where((position >= j)[None, :, None], moved, 0)
    kept = x if position is None else torch.where((position >= -j)[None, :, None], x, 0)
    return F.pad(kept, (0, 0, 0, -j))[:, -j:]


def _convolve(x: Tensor, w: Tensor, position: Tensor | None) -> Tensor:
    width = w.shape[1]
    a = _shifted(x, 0, position) * w[:, width - 1]
    for j in range(1, width):
        a = a + _shifted(x, j, position) * w[:, width - 1 - j]
    return a


def conv_silu(x: Tensor, weight: Tensor, position: Tensor | None) -> Tensor:
    acc = state_dtype(x)
    return F.silu(_convolve(x.to(acc), weight.to(acc), position)).to(x.dtype)


def conv_silu_backward(dy: Tensor, x: Tensor, weight: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor]:
    """With w_j = weight[:, width - 1 - j], s = sigmoid(a):
    da = dy s (1 + a (1 - s)),  dx_t = Σ_j w_j da_{t+j},  dw_j = Σ_t da_t x_{t-j}.
    """
    acc, width = state_dtype(x), weight.shape[1]
    x_, w = x.to(acc), weight.to(acc)
    a = _convolve(x_, w, position)
    s = torch.sigmoid(a)
    da = dy.to(acc) * s * (1 + a * (1 - s))
    dx = torch.zeros_like(da)
    taps = []
    for j in range(width):
        dx = dx + _shifted(da, -j, position) * w[:, width - 1 - j]
        taps.append((da * _shifted(x_, j, position)).sum((0, 1)))
    return dx.to(x.dtype).contiguous(), torch.stack(taps[::-1], 1).to(weight.dtype)


# ---- kernels, fakes, autograd ---------------------------------------------------------------------------------------


def _lowering(x: Tensor, weight: Tensor) -> Any:
    """The module with kernels where they run, else None: other devices, dtypes and widths take the equations above."""
    if x.device.type != "cuda":
        return None
    from ..lowering.triton import conv

    return conv if conv.unsupported(x.dtype, weight.shape[1]) is None else None


@torch.library.impl(LIB, "conv_silu", "CompositeExplicitAutograd")
def run(x: Tensor, weight: Tensor, position: Tensor | None) -> Tensor:
    """The op's kernel."""
    check_conv(x, weight, position)
    lowering = _lowering(x, weight)
    y = conv_silu(x, weight, position) if lowering is None else lowering.conv_silu(x, weight, position)
    return y.contiguous()


@torch.library.impl(LIB, "conv_silu_backward", "CompositeExplicitAutograd")
def run_backward(dy: Tensor, x: Tensor, weight: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor]:
    """The backward op's kernel."""
    check_conv(x, weight, position)
    lowering = _lowering(x, weight)
    backward = conv_silu_backward if lowering is None else lowering.conv_silu_backward
    dx, dweight = backward(dy, x, weight, position)
    return dx, dweight.contiguous()


@torch.library.register_fake("m2rnn::conv_silu", lib=LIB)
def _conv_fake(x: Tensor, weight: Tensor, position: Tensor | None) -> Tensor:
    check_conv(x, weight, position)
    return x.new_empty(x.shape)


@torch.library.register_fake("m2rnn::conv_silu_backward", lib=LIB)
def _conv_backward_fake(dy: Tensor, x: Tensor, weight: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor]:
    check_conv(x, weight, position)
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _vjp(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dx, dweight = _backward(dy, *ctx.saved_tensors)
    return dx, dweight, None


def _no_double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    raise NotImplementedError(
        "m2rnn: the fused convolution cannot be differentiated twice (its backward has no derivative). "
        "m2rnn_compile.enable_fusion(False) leaves the convolution to torch"
    )


torch.library.register_autograd("m2rnn::conv_silu", _vjp, setup_context=_save, lib=LIB)
torch.library.register_autograd("m2rnn::conv_silu_backward", _no_double_backward, lib=LIB)
