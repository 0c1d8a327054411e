# SPDX-License-Identifier: Apache-2.0
"""Gated DeltaNet: the chunked and the decoding kernel of flash-linear-attention, heads of K 256 and V 512."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m2rnn_compile.layers import GatedDeltaNet

from ..floors import Work
from ..problem import Leaves, Problem
from ..shapes import Shape
from . import layers
from .inputs import normal
from .peers import moved, peer_problem, results_only, step_problem, tolerated, version_of, why_not_importable
from .registry import Context, Provider

MODULE = "fla.ops.gated_delta_rule"


def sizes(shape: Shape) -> tuple[int, int, int]:
    """(heads, K, V) for a residual width: the paper's 2 heads of 256 x 512 at 1024, 3 at 1536; below, one smaller."""
    V = min(512, shape.width)
    return max(1, shape.width // V), V // 2, V


def _step(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """(S, o) after one token; vectors are [B, H, dim], g and beta [B, H], S [B, H, K, V]."""
    S = S * g.exp()[..., None, None]
    old = (k[..., None] * S).sum(-2)
    S = S + k[..., None] * (beta[..., None] * (v - old))[..., None, :]
    return S, (q[..., None] * S).sum(-2) * q.shape[-1] ** -0.5


def _naive(given: Leaves) -> tuple[Tensor, ...]:
    q, k, v, g, beta = (given[name] for name in ("q", "k", "v", "g", "beta"))
    S = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        S, o = _step(S, q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t])
        outputs.append(o)
    return (torch.stack(outputs, 1),)


def _naive_step(given: Leaves) -> tuple[Tensor, ...]:
    q, k, v, g, beta = (given[name][:, 0] for name in ("q", "k", "v", "g", "beta"))
    return (_step(given["state"], q, k, v, g, beta)[1][:, None],)


def _leaves(context: Context, T: int) -> dict[str, Tensor]:
    B, (H, K, V) = context.shape.B, sizes(context.shape)
    unit = [F.normalize(normal(context, B, T, H, K, salt=i).detach().float(), dim=-1).to(context.dtype) for i in (1, 2)]
    decay = torch.rand(B, T, H, generator=context.generator(), device=context.device)
    tensors = {
        "q": unit[0],
        "k": unit[1],
        "v": normal(context, B, T, H, V, salt=3).detach(),
        "g": (-decay * 0.2).float(),
        "beta": normal(context, B, T, H, salt=4).detach().sigmoid(),
    }
    return {name: x.requires_grad_() for name, x in tensors.items()}


def _operator(shape: Shape) -> str:
    H, K, V = sizes(shape)
    return f"Gated DeltaNet, {H} heads of K {K} V {V}"


def _work(context: Context, T: int) -> tuple[float, float, float]:
    """(multiply-adds of the recurrence x 2, elements in, elements out): k S, the rank-one update and q S a token."""
    B, (H, K, V) = context.shape.B, sizes(context.shape)
    return 6.0 * B * T * H * K * V, B * T * H * (2 * K + V + 2), B * T * H * V


def _chunked_work(context: Context) -> dict[str, Work]:
    """The chunked form breaks the chain over time: no sequential bound."""
    flops, inputs, outputs = _work(context, context.shape.T)
    traffic = moved(context.itemsize, inputs, outputs)
    return {
        "forward": Work(0, flops, traffic["forward"], 1),
        "backward": Work(0, 2 * flops, traffic["backward"], 1),
    }


def _build(context: Context) -> Problem:
    s, (H, _, V) = context.shape, sizes(context.shape)
    kernel: Any = importlib.import_module(MODULE).chunk_gated_delta_rule

    def call(given: Leaves) -> tuple[Tensor, ...]:
        return (kernel(given["q"], given["k"], given["v"], given["g"], given["beta"])[0],)

    work = _chunked_work(context)
    timed = ("q", "k", "v", "g", "beta")
    return peer_problem(context, _operator(s), _leaves(context, s.T), call, _naive, (s.B, s.T, H, V), timed, work)


def _build_layer(context: Context) -> Problem:
    """`layers.GatedDeltaNet` on the chunked kernel, judged by its chunks in torch."""
    s, (H, K, V) = context.shape, sizes(context.shape)
    options = dict(hidden_size=s.width, num_heads=H, key_dim=K, value_dim=V)
    module = layers.seeded(context, GatedDeltaNet, **options, impl="torch" if context.sizes_only else "fla")
    eager = layers.seeded(context, GatedDeltaNet, **options, impl="torch")
    problem = layers.layer_problem(context, module, eager, _operator(s), False, _chunked_work(context))
    return dataclasses.replace(problem, tolerated=tolerated(context))


def _build_step(context: Context) -> Problem:
    s, (H, K, V) = context.shape, sizes(context.shape)
    kernel: Any = importlib.import_module(MODULE).fused_recurrent_gated_delta_rule
    state = torch.randn(s.B, H, K, V, generator=context.generator(), device=context.device) * 0.1

    def call(given: Leaves) -> tuple[Tensor, ...]:
        names = ("q", "k", "v", "g", "beta")
        y = kernel(**{n: given[n] for n in names}, initial_state=given["state"], output_final_state=True)[0]
        return (y,)

    flops, inputs, outputs = _work(context, 1)
    moved_bytes = context.itemsize * (inputs + outputs) + 2 * 4 * state.numel()
    work = {"forward": Work(0, flops, moved_bytes, 1)}
    leaves = {**_leaves(context, 1), "state": state}
    return step_problem(context, _operator(s) + ", one token", leaves, call, _naive_step, work)


def _why_not(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "its Triton kernels run on CUDA tensors only"
    return why_not_importable(MODULE, "pip install flash-linear-attention, or PYTHONPATH with a checkout")


GATED_DELTA_NET = Provider(
    name="fla-gdn",
    about="Gated DeltaNet (flash-linear-attention)",
    default_on=("cuda",),
    why_not=_why_not,
    build={"op": _build, "step": _build_step, "layer": _build_layer},
    kept=results_only,
    version=functools.partial(version_of, "fla"),
)
