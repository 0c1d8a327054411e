# SPDX-License-Identifier: Apache-2.0
"""Random inputs, drawn on the device they are needed on; distributions as in m2rnn_compile.testing.make_inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import Context


def scan_inputs(context: Context) -> dict[str, Tensor]:
    """q, k, v, f, W as leaves and dy. f is fp32 on the grid of the dtype: a peer that casts it computes the same."""

    def make() -> dict[str, Tensor]:
        s, g = context.shape, context.generator()

        def randn(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=g, device=context.device, dtype=torch.float32)

        acc = torch.float64 if context.dtype == torch.float64 else torch.float32
        rates = torch.logspace(-3, 0.5, s.Nf, device=context.device)
        f = torch.exp(-torch.rand(s.B, s.T, s.Nf, generator=g, device=context.device) * rates)
        noise = randn(s.Nw, s.V, s.V) * (0.3 * s.V**-0.5)
        tensors = {
            "q": (randn(s.B, s.T, s.Nq, s.K) * s.K**-0.5).to(context.dtype),
            "k": randn(s.B, s.T, s.Nk, s.K).to(context.dtype),
            "v": randn(s.B, s.T, s.Nv, s.V).to(context.dtype),
            "f": f.to(context.dtype).to(acc),
            "W": (torch.eye(s.V, device=context.device) + noise).to(context.dtype),
        }
        leaves = {name: x.requires_grad_() for name, x in tensors.items()}
        return {**leaves, "dy": randn(s.B, s.T, s.N, s.V).to(context.dtype)}

    return dict(context.once("scan", make))


def normal(context: Context, *sizes: int, scale: float = 1.0, salt: int = 0) -> Tensor:
    """A leaf of normal numbers. `salt` tells the tensors of one problem apart."""
    g = context.generator(context.seed * 1000 + salt)
    x = torch.randn(*sizes, generator=g, device=context.device) * scale
    return x.to(context.dtype).requires_grad_()
