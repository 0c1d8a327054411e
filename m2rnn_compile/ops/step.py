# SPDX-License-Identifier: Apache-2.0
"""`m2rnn::step`: one step of the recurrence for decoding, functional like the scan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import registry
from .library import LIB, fold_vmap_into_heads, register_autocast, unfold_vmap_from_heads
from .validation import check_step, state_dtype

LIB.define(
    "step(Tensor q, Tensor k, Tensor v, Tensor f, Tensor W, Tensor initial_state, str impl) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_step = torch.ops.m2rnn.step.default


@torch.library.impl(LIB, "step", "CompositeExplicitAutograd")
def _step_kernel(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor, W: Tensor, initial_state: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    check_step(q, k, v, f, W, initial_state)
    lowering = registry.lowering_for(impl, q.device, (q, k, v, f, W, initial_state, None))
    result = lowering.step(q, k, v, f, W, initial_state)
    return result


@torch.library.register_fake("m2rnn::step", lib=LIB)
def _step_fake(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor, W: Tensor, initial_state: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    B, _, N, K, V, _ = check_step(q, k, v, f, W, initial_state)
    registry.check_name(impl)
    return v.new_empty(B, N, V), v.new_empty(B, N, K, V, dtype=state_dtype(v))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.impl = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _step_vjp(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Any, ...]:
    """A step is a scan with T = 1 whose only checkpoint is the state it started from."""
    q, k, v, f, W, h0 = ctx.saved_tensors
    if dy is None and dstate is None:
        return (None,) * 7
    dq, dk, dv, df, dW, dh0 = torch.ops.m2rnn.scan_backward.default(
        None if dy is None else dy.unsqueeze(1), dstate, q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1),
        f.unsqueeze(1), W, h0, None, h0.to(state_dtype(v)).unsqueeze(1).contiguous(), None, 1, ctx.impl,
    )  # fmt: skip
    return dq.squeeze(1), dk.squeeze(1), dv.squeeze(1), df.squeeze(1), dW, dh0.to(h0.dtype), None


torch.library.register_autograd("m2rnn::step", _step_vjp, setup_context=_save_for_backward, lib=LIB)

register_autocast("step", _step, low=(0, 1, 2, 4))

_STEP_HEAD_AXES = (1, 1, 1, 1, 0, 1)


@torch.library.register_vmap("m2rnn::step", lib=LIB)
def _step_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    n = info.batch_size
    folded = [fold_vmap_into_heads(n, x, d, a) for x, d, a in zip(args[:6], in_dims[:6], _STEP_HEAD_AXES, strict=True)]
    y, state = _step(*folded, args[6])
    return (unfold_vmap_from_heads(n, y, 1), unfold_vmap_from_heads(n, state, 1)), (0, 0)


def step(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor, W: Tensor, initial_state: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    y, state = _step(q, k, v, f, W, initial_state, impl)
    return y, state
