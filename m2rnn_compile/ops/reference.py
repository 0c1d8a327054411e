# SPDX-License-Identifier: Apache-2.0
"""The recurrence in eager PyTorch, to be read line by line against the equations (arXiv 2603.14360).

    Z_t = tanh(H_{t-1} W + k_t v_tᵀ)
    H_t = f_t H_{t-1} + (1 - f_t) Z_t
    y_t = H_tᵀ q_t

Two forms of the same thing:

- `reference` walks the steps and lets torch autograd differentiate them. In fp64 it is the oracle of every other test.
- `scan` and `scan_backward` are the kernels of the op as torch loops: the backward equations written out by hand,
  states kept every C steps and recomputed. They run on any device that PyTorch runs on, and are `impl="eager"`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .validation import check_cu_seqlens_values, num_checkpoints, state_dtype


def expand_heads(x: Tensor, N: int, axis: int) -> Tensor:
    """Give every head of the result its own copy of the input head it reads: head n reads n // (N / N_x)."""
    return x if x.shape[axis] == N else x.repeat_interleave(N // x.shape[axis], dim=axis)


def sum_shared_heads(dx: Tensor, heads: int, axis: int) -> Tensor:
    """The adjoint of `expand_heads`: add up the gradients of the result heads that share an input head."""
    return dx if dx.shape[axis] == heads else dx.unflatten(axis, (heads, dx.shape[axis] // heads)).sum(axis + 1)


def one_step(h_BNKV: Tensor, k_BNK: Tensor, v_BNV: Tensor, f_BN: Tensor, W_NVV: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the recurrence: (H_t, Z_t) from H_{t-1}. All inputs have N heads and the state's dtype."""
    f = f_BN[:, :, None, None]
    z_BNKV = torch.tanh(h_BNKV @ W_NVV + k_BNK[..., :, None] * v_BNV[..., None, :])
    return f * h_BNKV + (1 - f) * z_BNKV, z_BNKV


def readout(h_BNKV: Tensor, q_BNK: Tensor) -> Tensor:
    """y_t = H_tᵀ q_t, a sum over the rows of the state."""
    return (h_BNKV * q_BNK[..., :, None]).sum(-2)


class _ClipGradient(torch.autograd.Function):
    """Identity whose gradient is clamped to [-c, c]: the clip of the *carried* state gradient.

    Tangents of forward-mode differentiation pass as they are: the clip is a rule of the backward pass.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, c: float) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.c = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].clamp(-ctx.c, ctx.c), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        tangent: Tensor = tangents[0]
        return tangent.view_as(tangent)


def _sequences(B: int, T: int, cu_seqlens: Tensor | None) -> Iterator[tuple[slice, int, int, int]]:
    """(rows of the batch, first step, end, first checkpoint slot × C) for each group of sequences walked together."""
    if cu_seqlens is None:
        yield slice(0, B), 0, T, 0
    else:
        bounds = check_cu_seqlens_values(cu_seqlens, T)
        for s, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            yield slice(s, s + 1), start, end, s


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    W: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    state_grad_clip: float | None,
) -> tuple[Tensor, Tensor]:
    """The scan as a loop over time that torch autograd differentiates (and differentiates again).

    Memory grows with T·K·V. Returns y [B, T, N, V] in v's dtype and the final state [S, N, K, V] in the state's dtype.
    """
    B, T, K, V = q.shape[0], q.shape[1], q.shape[3], v.shape[3]
    N = max(q.shape[2], k.shape[2], v.shape[2], f.shape[2], W.shape[0])
    S = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    acc = state_dtype(v)
    q_, k_, v_, f_ = (expand_heads(x.to(acc), N, 2) for x in (q, k, v, f))
    W_ = expand_heads(W.to(acc), N, 0)
    h0 = q_.new_zeros(S, N, K, V) if initial_state is None else initial_state.to(acc)

    ys, finals = [q_.new_zeros(B, 0, N, V)], []
    for states, start, end, _ in _sequences(B, T, cu_seqlens):
        h = h0[states].clone()
        for t in range(start, end):
            h, _ = one_step(h, k_[:, t], v_[:, t], f_[:, t], W_)
            ys.append(readout(h, q_[:, t])[:, None])
            if state_grad_clip is not None:
                h = _ClipGradient.apply(h, state_grad_clip)  # y_t reads H_t before the clip: only the carry is clipped
        finals.append(h)
    return torch.cat(ys, 1).to(v.dtype), torch.cat(finals)


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
    """Forward kernel of the op: (y, final state, checkpoints). Layouts in docs/design.md."""
    B, T, K, V = q.shape[0], q.shape[1], q.shape[3], v.shape[3]
    N = max(q.shape[2], k.shape[2], v.shape[2], f.shape[2], W.shape[0])
    S = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    acc = state_dtype(v)
    W_ = expand_heads(W.to(acc), N, 0)
    y = v.new_empty(B, T, N, V)
    final = q.new_empty(S, N, K, V, dtype=acc)
    NC = num_checkpoints(B, T, S, chunk, cu_seqlens is not None)
    checkpoints = q.new_zeros(B, NC, N, K, V, dtype=acc)
    for states, start, end, s in _sequences(B, T, cu_seqlens):
        h = q.new_zeros(final[states].shape, dtype=acc) if initial_state is None else initial_state[states].to(acc)
        slot = 0 if chunk == 0 else start // chunk + s
        for t in range(start, end):
            if chunk and (t - start) % chunk == 0:
                checkpoints[:, slot + (t - start) // chunk] = h
            q_t, k_t, v_t, f_t = (expand_heads(x[:, t].to(acc), N, 1) for x in (q, k, v, f))
            h, _ = one_step(h, k_t, v_t, f_t, W_)
            y[:, t] = readout(h, q_t).to(v.dtype)
        final[states] = h
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward kernel of the op: the equations of docs/numerics.md, chunk by chunk from the last to the first.

    D_t  = clip(carry_t) + q_t dy_tᵀ
    dq_t = H_t dy_t
    df_t = Σ D_t ⊙ (H_{t-1} - Z_t)
    dU_t = (1 - f_t) D_t ⊙ (1 - Z_t ⊙ Z_t)
    dk_t = dU_t v_t      dv_t = dU_tᵀ k_t      dW += H_{t-1}ᵀ dU_t
    carry_{t-1} = f_t D_t + dU_t Wᵀ
    """
    B, T, K, V = q.shape[0], q.shape[1], q.shape[3], v.shape[3]
    N = max(q.shape[2], k.shape[2], v.shape[2], f.shape[2], W.shape[0])
    S = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    acc = state_dtype(v)
    W_ = expand_heads(W.to(acc), N, 0)
    dq, dk, dv, df = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, f))
    dW_ = torch.zeros_like(W_, memory_format=torch.contiguous_format)
    dh0 = q.new_empty(S, N, K, V, dtype=acc)

    for states, start, end, s in _sequences(B, T, cu_seqlens):
        if dfinal_state is None:
            carry = q.new_zeros(dh0[states].shape, dtype=acc)
        else:
            carry = dfinal_state[states].to(acc)
        first_slot = start // chunk + s
        for first in reversed(range(start, end, chunk)):
            steps = range(first, min(first + chunk, end))
            h = checkpoints[:, first_slot + (first - start) // chunk]
            inputs, before, after, Z = [], [], [], []
            for t in steps:  # recompute the chunk from its checkpoint
                q_t, k_t, v_t, f_t = (expand_heads(x[:, t].to(acc), N, 1) for x in (q, k, v, f))
                inputs.append((q_t, k_t, v_t, f_t[:, :, None, None]))
                before.append(h)
                h, z = one_step(h, k_t, v_t, f_t, W_)
                after.append(h)
                Z.append(z)
            for i in reversed(range(len(steps))):
                t = steps[i]
                q_t, k_t, v_t, f_t = inputs[i]
                dy_t = q_t.new_zeros(B, N, V) if dy is None else dy[:, t].to(acc)
                D = carry if state_grad_clip is None else carry.clamp(-state_grad_clip, state_grad_clip)
                D = D + q_t[..., :, None] * dy_t[..., None, :]
                dU = (1 - f_t) * D * (1 - Z[i] * Z[i])
                dq[:, t] = sum_shared_heads((after[i] * dy_t[..., None, :]).sum(-1), q.shape[2], 1).to(q.dtype)
                df[:, t] = sum_shared_heads((D * (before[i] - Z[i])).sum((-1, -2)), f.shape[2], 1).to(f.dtype)
                dk[:, t] = sum_shared_heads((dU * v_t[..., None, :]).sum(-1), k.shape[2], 1).to(k.dtype)
                dv[:, t] = sum_shared_heads((dU * k_t[..., :, None]).sum(-2), v.shape[2], 1).to(v.dtype)
                dW_ += (before[i].mT @ dU).sum(0)
                carry = f_t * D + dU @ W_.mT
        dh0[states] = carry
    dW = sum_shared_heads(dW_, W.shape[0], 0).to(W.dtype)
    return dq, dk, dv, df, dW, dh0


def step(q: Tensor, k: Tensor, v: Tensor, f: Tensor, W: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """One decoding step, without time dimension: (y [B, N, V] in v's dtype, state [B, N, K, V])."""
    N = initial_state.shape[1]
    acc = state_dtype(v)
    q_, k_, v_, f_ = (expand_heads(x.to(acc), N, 1) for x in (q, k, v, f))
    h, _ = one_step(initial_state.to(acc), k_, v_, f_, expand_heads(W.to(acc), N, 0))
    return readout(h, q_).to(v.dtype).contiguous(), h.contiguous()


def availability() -> str | None:
    """Always there."""
    return None


def unsupported(*tensors: Tensor | None) -> str | None:
    """Nothing is: these loops run wherever PyTorch does."""
    return None
