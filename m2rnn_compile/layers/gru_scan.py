# SPDX-License-Identifier: Apache-2.0
"""The GRU's recurrence as one op: a loop over time in torch, and the same loop again for the backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..ops.validation import accumulation_dtype
from .opaque import Packing, differentiate_once, gradients, no_autocast, refuse_transforms


def gru_scan(
    x: Tensor,
    x_f: Tensor,
    x_r: Tensor,
    weight: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``f, r = sigmoid(h W_f + x_f), sigmoid(h W_r + x_r);  h ← f ⊙ h + (1 − f) ⊙ tanh((r ⊙ h) W + x)``.

    Args:
        x, x_f, x_r: ``[B, T, N, V]``.
        weight: W, W_f and W_r of every head, one after the other, ``[3 N, V, V]``.
        initial_state: ``[B, N, V]`` (packed: ``[S, N, V]``); None means zero.
        cu_seqlens: ``[S + 1]``, sequences packed along time; B must be 1.

    Returns:
        ``(h of every step in x's dtype, the last h in fp32 (fp64 for fp64 inputs))``.

    Raises:
        NotImplementedError: forward-mode differentiation, torch.func.grad and its kin, differentiating twice.
    """
    refuse_transforms("gru_scan", x, x_f, x_r, weight, initial_state)
    return _op(x, x_f, x_r, weight, initial_state, cu_seqlens)


def _loop(x: Tensor, x_f: Tensor, x_r: Tensor, weight: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    acc = accumulation_dtype(x.dtype)
    W, W_f, W_r = weight.to(acc).chunk(3)
    h = x.new_zeros(x.shape[0], *x.shape[2:], dtype=acc) if state is None else state.to(acc)
    times = lambda h_BNV, W_NVV: torch.einsum("bnv,nvw->bnw", h_BNV, W_NVV)
    hs = []
    for u, u_f, u_r in zip(*(s.to(acc).unbind(1) for s in (x, x_f, x_r)), strict=True):
        f, r = torch.sigmoid(times(h, W_f) + u_f), torch.sigmoid(times(h, W_r) + u_r)
        h = f * h + (1 - f) * torch.tanh(times(r * h, W) + u)
        hs.append(h)
    return (torch.stack(hs, 1) if hs else x).to(x.dtype, copy=True), h.clone()


def _run(
    x: Tensor, x_f: Tensor, x_r: Tensor, weight: Tensor, state: Tensor | None, cu: Tensor | None
) -> tuple[Tensor, Tensor]:
    if cu is None:
        return _loop(x, x_f, x_r, weight, state)
    packing = Packing(cu, x.shape[1])
    # On the filling, f must be 1 for the state to stay as it is.
    real = packing.pad(torch.ones_like(x[..., :1, :1]))
    h, last = _loop(
        packing.pad(x), packing.pad(x_f) + 1e4 * (1 - real), packing.pad(x_r), weight, state
    )  # fmt: skip
    return packing.pack(h), last


INPUTS = "Tensor x, Tensor x_f, Tensor x_r, Tensor weight, Tensor? initial_state, Tensor? cu_seqlens"


@torch.library.custom_op("m2rnn::gru_scan", mutates_args=(), schema=f"({INPUTS}) -> (Tensor, Tensor)")
def _op(
    x: Tensor, x_f: Tensor, x_r: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    with no_autocast(x):
        return _run(x, x_f, x_r, weight, initial_state, cu_seqlens)


@_op.register_fake
def _fake(
    x: Tensor, x_f: Tensor, x_r: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    acc = accumulation_dtype(x.dtype)
    return x.new_empty(x.shape), x.new_empty(sequences, *x.shape[2:], dtype=acc)


@torch.library.custom_op(
    "m2rnn::gru_scan_backward",
    mutates_args=(),
    schema=f"(Tensor dh, Tensor dlast, {INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(
    dh: Tensor,
    dlast: Tensor,
    x: Tensor,
    x_f: Tensor,
    x_r: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, x_f, x_r, the weight and the initial state (empty if there was none)."""
    with no_autocast(x):
        inputs = (x, x_f, x_r, weight, initial_state)
        *grads, d0 = gradients(functools.partial(_run, cu=cu_seqlens), inputs, (dh, dlast))
    dx, dx_f, dx_r, dW = (g for g in grads if g is not None)
    return dx, dx_f, dx_r, dW, x.new_empty(0) if d0 is None else d0


@_backward_op.register_fake
def _backward_fake(
    dh: Tensor,
    dlast: Tensor,
    x: Tensor,
    x_f: Tensor,
    x_r: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dx_f, dx_r, dW = (a.new_empty(a.shape) for a in (x, x_f, x_r, weight))
    return dx, dx_f, dx_r, dW, x.new_empty(0 if initial_state is None else initial_state.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dh: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing hands them out no second time
    *grads, d0 = _backward_op(dh, dlast, *saved)
    return *grads, None if saved[4] is None else d0, None


_op.register_autograd(_backward, setup_context=_save)
differentiate_once("gru_scan", _backward_op)
