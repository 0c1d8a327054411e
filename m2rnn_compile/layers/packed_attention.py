# SPDX-License-Identifier: Apache-2.0
"""Attention over packed sequences without a kernel for them: one call of SDPA a sequence.

A mask over the whole of T would cost T², and it lets what is not a number out of its sequence: a weight of 0 times NaN
is NaN. The lengths are values, which a graph cannot hold, so under `torch.compile` the calls are an op.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.validation import check_cu_seqlens_values
from .opaque import differentiate_once, gradients, no_autocast, refuse_transforms


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Causal attention inside each sequence.

    Args:
        q: ``[1, T, num_heads, head_dim]``.  k, v: ``[1, T, num_kv_heads, head_dim]``.
        cu_seqlens: ``[S + 1]``; its values are read, so it should be on the CPU.

    Returns:
        ``[1, T, num_heads, head_dim]``.

    Raises:
        ValueError: boundaries that do not run from 0 to T, or that go back.
        NotImplementedError: differentiating twice or in forward mode what was compiled.
    """
    if torch.compiler.is_compiling() or type(cu_seqlens) is not Tensor:
        refuse_transforms("packed_attention", q, k, v)
        return _op(q, k, v, cu_seqlens)
    return _each(q, k, v, cu_seqlens)


def _each(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    bounds = check_cu_seqlens_values(cu_seqlens, q.shape[1])
    grouped = q.shape[2] != k.shape[2]
    lengths = [end - start for start, end in pairwise(bounds) if end > start]
    heads_first = (x.transpose(1, 2).split(lengths, 2) for x in (q, k, v))
    parts = [
        F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=grouped)
        for a, b, c in zip(*heads_first, strict=True)
    ]
    return torch.cat(parts, 2).transpose(1, 2) if parts else q.clone()  # T = 0


INPUTS = "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens"


@torch.library.custom_op("m2rnn::packed_attention", mutates_args=(), schema=f"({INPUTS}) -> Tensor")
def _op(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    with no_autocast(q):
        return _each(q, k, v, cu_seqlens).contiguous()


@_op.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op(
    "m2rnn::packed_attention_backward", mutates_args=(), schema=f"(Tensor dy, {INPUTS}) -> (Tensor, Tensor, Tensor)"
)
def _backward_op(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with no_autocast(q):
        dq, dk, dv, _ = gradients(lambda *inputs: (_each(*inputs),), (q, k, v, cu_seqlens), (dy,))
    assert dq is not None
    assert dk is not None
    assert dv is not None
    return dq, dk, dv


@_backward_op.register_fake
def _backward_fake(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_op(dy, *ctx.saved_tensors), None


_op.register_autograd(_backward, setup_context=_save)
differentiate_once("packed_attention", _backward_op)
