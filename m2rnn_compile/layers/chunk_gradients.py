# SPDX-License-Identifier: Apache-2.0
"""Gradients within the chunks of the delta rule as batched products, where flash-linear-attention's kernel is wrong.

Its kernel for them gives wrong results on Hopper GPUs with Triton from 3.4.0 to before 3.7.1 (its issue 640; in 0.6.0
it refuses to run there). All it computes are products within one chunk, so here they are left to cuBLAS.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.validation import accumulation_dtype
from .opaque import Packing


def chunk_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    h: Tensor,
    dh: Tensor,
    w: Tensor,
    g: Tensor,
    dv: Tensor,
    scale: float,
    *,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, w and the running sum of g, from what the state's own backward has found.

    In a chunk that starts with state h, with v = u − w h the corrected values and G the running sum of g:
    ``o = (e^G q) h + tril(q kᵀ e^{G_i − G_j}) v`` and the state after it ``e^{G_C} h + Σ_j e^{G_C − G_j} k_j v_jᵀ``.

    Args:
        q, k, w: ``[B, T, H, K]``.  v, do, dv: ``[B, T, H, V]``.  g: G, ``[B, T, H]``.
        h, dh: state before each chunk, gradient of the state after it, ``[B, chunks, H, K, V]``.
        scale: of q.
        cu_seqlens: packed sequences; a chunk never crosses a boundary.

    Returns:
        ``(dq, dk, dw, dG)`` in the dtypes of q, k, w and fp32.
    """
    C, T = chunk_size, q.shape[1]
    chunks = _Chunks(cu_seqlens, T, C, q.device)
    Q, K, V, dO, dV = (chunks.cut(x) for x in (q, k, v, do, dv))
    G = chunks.cut(g[..., None].to(accumulation_dtype(g.dtype)))[..., 0]
    last = (chunks.lengths - 1).clamp_min(0)
    G_end = G.take_along_dim(last[None, :, None, None], -1)
    G = torch.where(chunks.real[None, :, None, :], G, G_end)

    lower = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    decay = torch.where(lower, G[..., :, None] - G[..., None, :], float("-inf")).exp()
    ds = (_mm(dO, V.mT) * decay * scale).to(q.dtype)
    dk_state = _mm(V, dh.mT) * (G_end - G).exp()[..., None]
    dq = _mm(dO, h.mT) * (G.exp()[..., None] * scale) + _mm(ds, K)
    dk = dk_state + _mm(ds.mT, Q)
    dw = -_mm(dV, h.mT)
    dG = (dq * Q).sum(-1) - (dk * K).sum(-1)
    flat = lambda x: x.flatten(-2)
    carried = _mm(flat(h)[..., None, :], flat(dh)[..., :, None])[..., 0, 0] * G_end[..., 0].exp()
    at_end = carried + (dk_state * K).sum((-1, -2))
    dG = dG.scatter_add(-1, last[None, :, None, None].expand_as(G_end), at_end[..., None])
    join = lambda x, like: chunks.join(x, T).to(like.dtype)
    return join(dq, q), join(dk, k), join(dw, w), chunks.join(dG[..., None], T)[..., 0]


class _Chunks:
    """``[B, T, H, D]`` cut into ``[B, chunks, H, C, D]``, zeros where a chunk is not full, and back."""

    def __init__(self, cu_seqlens: Tensor | None, T: int, C: int, device: torch.device) -> None:
        self.C = C
        if cu_seqlens is None:
            self.slots = None
            count = -(-T // C)
            starts = torch.arange(count, device=device) * C
            self.lengths = (T - starts).clamp_max(C)
        else:
            packing = Packing(cu_seqlens, T)
            lengths = cu_seqlens.diff().to(torch.int64)
            per_sequence = (lengths + C - 1) // C
            first = per_sequence.cumsum(0) - per_sequence
            self.slots = (first[packing.row] + packing.step // C) * C + packing.step % C
            count = int(per_sequence.sum())
            self.lengths = torch.zeros(count, dtype=torch.int64, device=device)
            self.lengths.index_add_(0, self.slots // C, torch.ones_like(self.slots))
        self.count = count
        self.real = torch.arange(C, device=device)[None, :] < self.lengths[:, None]

    def cut(self, x: Tensor) -> Tensor:
        size = self.count * self.C
        if self.slots is None:
            extra = size - x.shape[1]
            x = torch.cat([x, x.new_zeros(x.shape[0], extra, *x.shape[2:])], 1) if extra else x
        else:
            x = x.new_zeros(1, size, *x.shape[2:]).index_copy_(1, self.slots, x)
        return x.unflatten(1, (self.count, self.C)).transpose(2, 3)

    def join(self, x: Tensor, T: int) -> Tensor:
        x = x.transpose(2, 3).flatten(1, 2)
        return (x[:, :T] if self.slots is None else x[:, self.slots]).contiguous()


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """A batched product of 16-bit operands, summed and returned in fp32."""
    if a.dtype == torch.float64:
        return a @ b
    if a.device.type != "cuda" or a.dtype == torch.float32:
        return a.float() @ b.float()
    b = b.to(a.dtype)
    out = torch.bmm(a.flatten(0, 2), b.flatten(0, 2), out_dtype=torch.float32)
    return out.unflatten(0, a.shape[:3])
