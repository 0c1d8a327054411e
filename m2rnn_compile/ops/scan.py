# SPDX-License-Identifier: Apache-2.0
"""`m2rnn::scan` and `m2rnn::scan_backward`: schema, kernels' entry, fake, autograd, autocast, vmap, FLOPs.

Contract in docs/design.md. Both are functional with positional arguments and a fixed number of tensor results; that is
what functionalization, sharding rules and export digest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import fusion_switch, registry
from .library import LIB, fold_vmap_into_heads, functorch_active, register_autocast, unfold_vmap_from_heads
from .validation import check_backward, check_clip, check_cu_seqlens_values, check_scan, num_checkpoints, state_dtype

# Steps between two stored states. 64 keeps the checkpoints at 1/64 of all states and a chunk in on-chip memory.
DEFAULT_CHUNK = 64
NO_BACKWARD = (
    "m2rnn: the scan ran with chunk = {chunk} (inference: no checkpoints), so it has no backward. m2rnn(...) chooses: "
    "it keeps checkpoints in grad mode, where an input requires a gradient. A program exported under torch.no_grad() "
    "keeps none: export it in grad mode to train it, or run it under torch.no_grad(). The op itself takes chunk = 64"
)

LIB.define(
    "scan(Tensor q, Tensor k, Tensor v, Tensor f, Tensor W, Tensor? initial_state, Tensor? cu_seqlens, "
    "float? state_grad_clip, int chunk, str impl) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIB.define(
    "scan_backward(Tensor? dy, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor f, Tensor W, "
    "Tensor? initial_state, Tensor? cu_seqlens, Tensor checkpoints, float? state_grad_clip, int chunk, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_scan = torch.ops.m2rnn.scan.default
_scan_backward = torch.ops.m2rnn.scan_backward.default


# ---- kernels: choose a lowering when the op really runs -------------------------------------------------------------


@torch.library.impl(LIB, "scan", "CompositeExplicitAutograd")
def _scan_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    W: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    state_grad_clip: float | None,
    chunk: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_scan(q, k, v, f, W, initial_state, cu_seqlens, state_grad_clip)
    _check_chunk(chunk)
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        check_cu_seqlens_values(cu_seqlens, q.shape[1])
    lowering = registry.lowering_for(impl, q.device, (q, k, v, f, W, initial_state, cu_seqlens))
    result = lowering.scan(q, k, v, f, W, initial_state, cu_seqlens, state_grad_clip, chunk)
    return result


@torch.library.impl(LIB, "scan_backward", "CompositeExplicitAutograd")
def _scan_backward_kernel(
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
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if chunk < 1:
        raise RuntimeError(NO_BACKWARD.format(chunk=chunk))
    shape = check_scan(q, k, v, f, W, initial_state, cu_seqlens, state_grad_clip)
    check_backward(shape, dy, dfinal_state, checkpoints, chunk, cu_seqlens is not None)
    lowering = registry.lowering_for(impl, q.device, (q, k, v, f, W, initial_state, cu_seqlens))
    result = lowering.scan_backward(
        dy, dfinal_state, q, k, v, f, W, initial_state, cu_seqlens, checkpoints, state_grad_clip, chunk
    )
    return result


def _check_chunk(chunk: int) -> None:
    if chunk < 0:
        raise ValueError(f"m2rnn: `chunk` must be >= 0 (0: inference, no checkpoints), got {chunk}")


# ---- fakes: shapes, dtypes, strides, and nothing else ---------------------------------------------------------------


@torch.library.register_fake("m2rnn::scan", lib=LIB)
def _scan_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    W: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    state_grad_clip: float | None,
    chunk: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, N, K, V, S = check_scan(q, k, v, f, W, initial_state, cu_seqlens, state_grad_clip)
    _check_chunk(chunk)
    registry.check_name(impl)
    if fusion_switch.WATCH is not None:
        fusion_switch.WATCH(v)
    acc = state_dtype(v)
    NC = num_checkpoints(B, T, S, chunk, cu_seqlens is not None)
    return (
        v.new_empty(B, T, N, V),
        v.new_empty(S, N, K, V, dtype=acc),
        v.new_empty(B, NC, N, K, V, dtype=acc),
    )


@torch.library.register_fake("m2rnn::scan_backward", lib=LIB)
def _scan_backward_fake(
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
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, _, N, K, V, S = check_scan(q, k, v, f, W, initial_state, cu_seqlens, state_grad_clip)
    dq, dk, dv, df, dW = (x.new_empty(x.shape) for x in (q, k, v, f, W))
    return dq, dk, dv, df, dW, v.new_empty(S, N, K, V, dtype=state_dtype(v))


# ---- autograd -------------------------------------------------------------------------------------------------------


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, f, W, initial_state, cu_seqlens, ctx.state_grad_clip, ctx.chunk, ctx.impl = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(q, k, v, f, W, initial_state, cu_seqlens, output[2])


def _scan_vjp(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None, _: None) -> tuple[Any, ...]:
    q, k, v, f, W, initial_state, cu_seqlens, checkpoints = ctx.saved_tensors
    if dy is None and dfinal_state is None:
        return (None,) * 10
    # With chunk = 0 this op raises when it runs. Not here: compilers trace a backward that may never be asked for, as
    # where a program exported for inference is compiled in grad mode.
    dq, dk, dv, df, dW, dh0 = _scan_backward(
        dy, dfinal_state, q, k, v, f, W, initial_state, cu_seqlens, checkpoints,
        ctx.state_grad_clip, ctx.chunk, ctx.impl,
    )  # fmt: skip
    dh0 = None if ctx.initial_dtype is None else dh0.to(ctx.initial_dtype)
    return dq, dk, dv, df, dW, dh0, None, None, None, None


torch.library.register_autograd("m2rnn::scan", _scan_vjp, setup_context=_save_for_backward, lib=LIB)


def _no_double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    raise NotImplementedError(
        "m2rnn: the scan cannot be differentiated twice (its backward has no derivative). "
        "Use impl='reference', whose loop torch autograd differentiates to any order, at the price of memory and speed"
    )


torch.library.register_autograd("m2rnn::scan_backward", _no_double_backward, lib=LIB)

register_autocast("scan", _scan, low=(0, 1, 2, 4))


# ---- vmap: the mapped dimension becomes the outermost part of the head dimension ------------------------------------

# The axis of the heads in each tensor argument, by position: q, k, v, f, W [N, V, V], initial_state [S, N, K, V].
_SCAN_HEAD_AXES = (2, 2, 2, 2, 0, 1)


def _no_vmap_over_cu_seqlens(bdim: int | None) -> None:
    if bdim is not None:
        raise ValueError("m2rnn: vmap over `cu_seqlens` is not possible; pack the samples into one sequence instead")


@torch.library.register_vmap("m2rnn::scan", lib=LIB)
def _scan_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    _no_vmap_over_cu_seqlens(in_dims[6])
    n = info.batch_size
    folded = [fold_vmap_into_heads(n, x, d, a) for x, d, a in zip(args[:6], in_dims[:6], _SCAN_HEAD_AXES, strict=True)]
    y, final, checkpoints = _scan(*folded, *args[6:])
    out = (
        unfold_vmap_from_heads(n, y, 2),
        unfold_vmap_from_heads(n, final, 1),
        unfold_vmap_from_heads(n, checkpoints, 2),
    )
    return out, (0, 0, 0)


@torch.library.register_vmap("m2rnn::scan_backward", lib=LIB)
def _scan_backward_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    _no_vmap_over_cu_seqlens(in_dims[8])
    n = info.batch_size
    axes = (2, 1, *_SCAN_HEAD_AXES)
    folded = [fold_vmap_into_heads(n, x, d, a) for x, d, a in zip(args[:8], in_dims[:8], axes, strict=True)]
    checkpoints = fold_vmap_into_heads(n, args[9], in_dims[9], 2)
    grads = _scan_backward(*folded, args[8], checkpoints, *args[10:])
    return tuple(unfold_vmap_from_heads(n, g, a) for g, a in zip(grads, _SCAN_HEAD_AXES, strict=True)), (0,) * 6


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    W: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    state_grad_clip: float | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Call the op, keeping checkpoints only when a gradient may be asked for."""
    check_clip(state_grad_clip)
    fusion_switch.guard()
    tensors = (q, k, v, f, W) if initial_state is None else (q, k, v, f, W, initial_state)
    # A tensor inside of vmap does not tell whether the one outside requires a gradient.
    wanted = torch.is_grad_enabled() and (any(x.requires_grad for x in tensors) or functorch_active())
    chunk = DEFAULT_CHUNK if wanted else 0
    y, final_state, _ = _scan(q, k, v, f, W, initial_state, cu_seqlens, state_grad_clip, chunk, impl)
    return y, final_state
