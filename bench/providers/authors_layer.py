# SPDX-License-Identifier: Apache-2.0
"""The authors' layer: their op, conv1d and an eager tail around it, with the weights of `layers.M2RNN`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m2rnn_compile.layers import M2RNN

from ..floors import scan_work
from ..ledger import kernel
from ..problem import Problem
from . import layers
from .peers import tolerated
from .registry import Context

Scan = Callable[..., tuple[Tensor, Tensor]]


def of_the_authors_op(layer: M2RNN, x: Tensor, scan: Scan) -> Tensor:
    """The layer's weights around a scan, in the operations that the authors' layer is made of."""
    N, T = layer.num_heads, x.shape[1]
    qkv, x_f, g = F.linear(x, layer.input_projection.weight).split(layer.projection_sizes, -1)
    assert layer.conv1d is not None
    channels, past = qkv.shape[-1], layer.conv1d.width - 1
    qkv = F.conv1d(qkv.transpose(1, 2), layer.conv1d.weight, padding=past, groups=channels)[..., :T]
    q, k, v = F.silu(qkv).transpose(1, 2).split(layer.qkv_sizes, -1)
    q, k = q.unflatten(-1, (layer.num_q_heads, -1)), k.unflatten(-1, (layer.num_k_heads, -1))
    v, g = v.unflatten(-1, (layer.num_v_heads, -1)), g.unflatten(-1, (layer.num_g_heads, -1))
    gate, norm = layer.decay_gate, layer.g_norm
    f = torch.exp(-gate.A_log.float().exp() * F.softplus(x_f.float() + gate.dt_bias.float()))
    y, _ = scan(q, k, v, f, layer.state_weight, state_grad_clip=layer.state_grad_clip)
    o = (y + layer.D * _shared(v, N)) * F.silu(_shared(g, N))
    o = o.flatten(-2)
    o = F.rms_norm(o.float(), o.shape[-1:], eps=norm.eps).to(x.dtype) * norm.weight
    return F.linear(o, layer.output_projection.weight)


def _shared(x: Tensor, heads: int) -> Tensor:
    """Each head as often as heads of the result share it."""
    return x if x.shape[-2] == heads else x.repeat_interleave(heads // x.shape[-2], -2)


class AuthorsLayer(M2RNN):
    """`M2RNN` with another forward: the same parameters, and none of this library's kernels."""

    scan: Scan

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return of_the_authors_op(self, x, self.scan)


def _sizes_only(q: Tensor, k: Tensor, v: Tensor, f: Tensor, W: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Their op on the meta device: it keeps its inputs, and computes every state again in backward."""
    (B, T), N = q.shape[:2], max(x.shape[2] for x in (q, k, v, f))
    K, V = q.shape[-1], v.shape[-1]
    given = (q, k, v, f.to(q.dtype), W.to(q.dtype))
    return kernel((B, T, N, V), given, scratch=B * T * N * K * V), q.new_empty(B, N, K, V)


def layer_problem(context: Context, scan: Scan) -> Problem:
    """Uncompiled, as they run it, and judged like our layer, with a peer's leeway."""
    sizes = layers.m2rnn_sizes(context)
    module = layers.seeded(context, AuthorsLayer, **sizes)
    module.scan = _sizes_only if context.sizes_only else scan
    eager = layers.seeded(context, M2RNN, **sizes, impl="eager")
    mixer = scan_work(context.shape, context.dtype_name)
    problem = layers.layer_problem(context, module, eager, "M²RNN", False, mixer)
    return dataclasses.replace(problem, tolerated=tolerated(context))
