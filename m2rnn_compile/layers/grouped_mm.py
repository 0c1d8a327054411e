# SPDX-License-Identifier: Apache-2.0
"""A matrix product with another weight for each group of rows, as an op on top of torch's grouped product.

`torch.nn.functional.grouped_mm` takes bf16 only when it is compiled (its meta function says so, torch 2.13), wants rows
whose bytes are a multiple of 16, and refuses gradients that are not contiguous. The op below takes what eager torch
takes, adds fp64, and has a backward of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .opaque import refuse_transforms

ALIGNMENT = 16  # bytes


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``F.linear`` of each group of rows with its own weight.

    Args:
        x: ``[R, I]``, rows in order of their group.
        weight: ``[E, O, I]``, one a group; the same dtype as x.
        ends: int32 ``[E]``, where each group's rows end (ascending, the last one being R); groups may be empty.

    Returns:
        ``[R, O]``.

    Raises:
        NotImplementedError: forward-mode differentiation, torch.func.grad and its kin.
    """
    refuse_transforms("grouped_linear", x, weight)
    return _op(x, weight, ends)


def _aligned(*widths: int, dtype: torch.dtype) -> bool:
    return all(w * dtype.itemsize % ALIGNMENT == 0 for w in widths)


def _row_groups(rows: int, ends: Tensor) -> Tensor:
    return torch.searchsorted(ends, torch.arange(rows, device=ends.device, dtype=ends.dtype), right=True)


@torch.library.custom_op(
    "m2rnn::grouped_linear", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor ends) -> Tensor"
)
def _op(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if x.dtype == torch.float64:  # torch has none; for tests, so the memory of a weight a row does not matter
        return torch.einsum("ri,roi->ro", x, weight[_row_groups(x.shape[0], ends)])
    O, I = weight.shape[1:]
    if not _aligned(O, I, dtype=x.dtype):
        step = ALIGNMENT // x.dtype.itemsize
        x, weight = F.pad(x, (0, -I % step)), F.pad(weight, (0, -I % step, 0, -O % step))
    if not (weight.is_contiguous() or weight.mT.is_contiguous()):
        weight = weight.contiguous()
    return F.grouped_mm(x.contiguous(), weight.mT, offs=ends)[:, :O].contiguous()


@_op.register_fake
def _fake(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op(
    "m2rnn::grouped_linear_weight_gradient", mutates_args=(), schema="(Tensor dy, Tensor x, Tensor ends) -> Tensor"
)
def _weight_gradient(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """``dyᵀ x`` of each group's rows, ``[E, O, I]``; zero for an empty group."""
    (O, I), E = (dy.shape[1], x.shape[1]), ends.shape[0]
    if x.dtype == torch.float64:
        rows = dy[:, :, None] * x[:, None, :]
        return dy.new_zeros(E, O, I).index_add_(0, _row_groups(x.shape[0], ends), rows)
    if not _aligned(O, I, dtype=x.dtype):
        step = ALIGNMENT // x.dtype.itemsize
        dy, x = F.pad(dy, (0, -O % step)), F.pad(x, (0, -I % step))
    dW = F.grouped_mm(dy.contiguous().mT, x.contiguous(), offs=ends)[:, :O, :I]
    empty = ends.diff(prepend=ends.new_zeros(1)) == 0  # nothing is written there on some devices
    return torch.where(empty[:, None, None], 0, dW).contiguous()


@_weight_gradient.register_fake
def _weight_gradient_fake(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return dy.new_empty(ends.shape[0], dy.shape[1], x.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    dx = _op(dy, weight.mT, ends) if ctx.needs_input_grad[0] else None
    dW = _weight_gradient(dy, x, ends) if ctx.needs_input_grad[1] else None
    return dx, dW, None


_op.register_autograd(_backward, setup_context=_save)


def _weight_gradient_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    dy, x, ends = ctx.saved_tensors
    ddy = _op(x, grad, ends) if ctx.needs_input_grad[0] else None
    dx = _op(dy, grad.mT, ends) if ctx.needs_input_grad[1] else None
    return ddy, dx, None


_weight_gradient.register_autograd(_weight_gradient_backward, setup_context=_save)
