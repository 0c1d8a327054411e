# SPDX-License-Identifier: Apache-2.0
"""Causal softmax attention through torch's scaled_dot_product_attention, heads of 64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..floors import Work, attention_work
from ..problem import Leaves, Problem
from . import layers, lm
from .inputs import normal
from .peers import peer_problem, results_only, step_problem
from .registry import Context, Provider

D = 64


def _naive(given: Leaves) -> tuple[Tensor, ...]:
    q, k, v = (given[name].transpose(1, 2) for name in ("q", "k", "v"))
    scores = q @ k.mT * D**-0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + scores.shape[-1] - q.shape[-2])
    return ((scores.masked_fill(later, float("-inf")).softmax(-1) @ v).transpose(1, 2),)


def _build(context: Context) -> Problem:
    s = context.shape
    H = s.width // D
    size = (s.B, s.T, H, D)

    def call(given: Leaves) -> tuple[Tensor, ...]:
        q, k, v = (given[name].transpose(1, 2) for name in ("q", "k", "v"))
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2),)

    work = attention_work(s, H, D, context.dtype_name)
    leaves = {name: normal(context, *size, salt=i) for i, name in enumerate(("q", "k", "v"), 1)}
    operator = f"causal softmax attention, {H} heads of {D}"
    return peer_problem(context, operator, leaves, call, _naive, size, ("q", "k", "v"), work)


def _build_step(context: Context) -> Problem:
    s = context.shape
    H = s.width // D
    leaves = {
        "q": normal(context, s.B, 1, H, D, salt=1),
        "k": normal(context, s.B, s.T, H, D, salt=2),
        "v": normal(context, s.B, s.T, H, D, salt=3),
    }

    def call(given: Leaves) -> tuple[Tensor, ...]:
        q, k, v = (given[name].transpose(1, 2) for name in ("q", "k", "v"))
        return (F.scaled_dot_product_attention(q, k, v).transpose(1, 2),)

    scores = s.B * H * s.T
    work = {"forward": Work(scores, 4 * scores * D, context.itemsize * 2 * scores * D, 1)}
    operator = f"softmax attention, {H} heads of {D}, one query over {s.T} cached keys"
    return step_problem(context, operator, leaves, call, _naive, work)


SDPA = Provider(
    name="sdpa",
    about="softmax attention (torch scaled_dot_product_attention)",
    default_on=("cpu", "cuda"),
    why_not=lambda device: None,
    build={
        "op": _build,
        "step": _build_step,
        "layer": layers.attention_layer,
        "model": lambda context: lm.language_model(context, "A", "auto", compiled=False),
    },
    kept=results_only,
)
