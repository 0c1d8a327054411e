# SPDX-License-Identifier: Apache-2.0
"""The baselines' recurrences step by step, straight from their papers, no shared code: the oracle in fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_rnn(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, state: Tensor | None = None, delta: bool = True
) -> tuple[Tensor, Tensor]:
    """Gated DeltaNet (2412.06464, eq. 10) or the plain gated sum; one outer product at a time."""
    B, T, H, V = v.shape
    K = q.shape[-1]
    eye = torch.eye(K, dtype=v.dtype)
    S = [[state[b, h] if state is not None else v.new_zeros(K, V) for h in range(H)] for b in range(B)]
    rows = []
    for b in range(B):
        heads = []
        for h in range(H):
            M, ys = S[b][h], []
            for t in range(T):
                k_t, v_t, step = k[b, t, h], v[b, t, h], beta[b, t, h]
                transition = eye - step * torch.outer(k_t, k_t) if delta else eye
                M = torch.exp(g[b, t, h]) * (transition @ M) + step * torch.outer(k_t, v_t)
                ys.append(q[b, t, h] @ M)
            S[b][h] = M
            heads.append(torch.stack(ys) if ys else v.new_zeros(0, V))
        rows.append(torch.stack(heads, 1))
    return torch.stack(rows), torch.stack([torch.stack(row) for row in S])


def gru(x: Tensor, x_f: Tensor, x_r: Tensor, weight: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """h of every step, head by head."""
    B, T, N, V = x.shape
    W, W_f, W_r = weight[:N], weight[N : 2 * N], weight[2 * N :]
    columns = []
    last = []
    for n in range(N):
        h, hs = (x.new_zeros(B, V) if state is None else state[:, n]), []
        for t in range(T):
            f = 1 / (1 + torch.exp(-(h @ W_f[n] + x_f[:, t, n])))
            r = 1 / (1 + torch.exp(-(h @ W_r[n] + x_r[:, t, n])))
            h = f * h + (1 - f) * torch.tanh((r * h) @ W[n] + x[:, t, n])
            hs.append(h)
        columns.append(torch.stack(hs, 1))
        last.append(h)
    return torch.stack(columns, 2), torch.stack(last, 1)
