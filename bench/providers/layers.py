# SPDX-License-Identifier: Apache-2.0
"""Whole layers: projections, conv, gates, norm and the mixer between them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from m2rnn_compile.layers import M2RNN, Attention

from ..floors import Work, attention_work, layer_work, scan_work
from ..problem import Leaves, Problem
from .inputs import normal
from .registry import Context

GATE_STEPS = 256
HEAD_DIM = 64
# Of the tolerance, for layers and models: a gradient of a bias is one sum over all tokens, and what one order of
# summation errs says little about another; Inductor and BLAS choose theirs.
SLACK = 4.0
Layer = TypeVar("Layer", bound=nn.Module)


def weights_of(module: nn.Module) -> int:
    """Elements of the matrices that every token is multiplied with."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def layer_problem(
    context: Context, module: nn.Module, eager: nn.Module, family: str, compiled: bool, mixer: dict[str, Work]
) -> Problem:
    """`module` on random inputs, judged by `eager`, which has the same parameters and runs plain loops."""
    shape = context.shape
    x = normal(context, shape.B, shape.T, shape.width, salt=1)
    dy = normal(context, shape.B, shape.T, shape.width, salt=2).detach()
    parameters = dict(module.named_parameters())
    run: Callable[..., Any] = torch.compile(module, fullgraph=True, dynamic=False) if compiled else module
    double = copy.deepcopy(eager).double()

    def call(given: Leaves) -> tuple[Tensor, ...]:
        return (run(given["x"]),)

    def eager_call(given: Leaves, steps: int | None) -> tuple[Tensor, ...]:
        target = double if given["x"].dtype == torch.float64 else eager
        weights = {name: p for name, p in given.items() if name != "x"}
        return (functional_call(target, weights, (given["x"],)),)

    return Problem(
        operator=f"layer {family}, width {shape.width}",
        leaves={"x": x, **parameters},
        call=call,
        naive=eager_call,
        yardstick=eager_call,
        family=f"layer {family}",
        dy=dy,
        timed=frozenset(("x",)),
        steps=shape.T,
        gate_steps=min(shape.T, GATE_STEPS),
        slack=SLACK,
        work=layer_work(mixer, shape.B * shape.T, shape.width, weights_of(module), context.dtype_name),
        tokens=shape.B * shape.T,
    )


def seeded(context: Context, make: Callable[..., Layer], **options: Any) -> Layer:
    """A module with the parameters that this context's seed gives."""
    with torch.random.fork_rng(devices=[context.device] if context.device.type == "cuda" else []):
        torch.manual_seed(context.seed)
        return make(**options, device=context.device, dtype=context.dtype)


def m2rnn_sizes(context: Context) -> dict[str, Any]:
    """Arguments of `layers.M2RNN`: heads of q, k, v, f and W as in the shape."""
    s = context.shape
    sizes: dict[str, Any] = dict(num_heads=s.N, key_dim=s.K, value_dim=s.V, num_q_heads=s.Nq, num_k_heads=s.Nk)
    sizes |= dict(num_v_heads=s.Nv, num_f_heads=s.Nf, num_w_heads=s.Nw, state_grad_clip=context.clip)
    return sizes | dict(hidden_size=s.width)


def runnable(context: Context, impl: str) -> str:
    """`impl`; on the meta device `eager`, whose op keeps for backward what the kernels keep."""
    return "eager" if context.sizes_only else impl


def m2rnn_layer(context: Context, impl: str, *, compiled: bool) -> Problem:
    """`layers.M2RNN`."""
    sizes = m2rnn_sizes(context)
    impl, compiled = runnable(context, impl), compiled and not context.sizes_only
    module = seeded(context, M2RNN, **sizes, impl=impl)
    eager = seeded(context, M2RNN, **sizes, impl="eager")
    return layer_problem(context, module, eager, "M²RNN", compiled, scan_work(context.shape, context.dtype_name))


def attention_layer(context: Context) -> Problem:
    """`layers.Attention`, heads of 64, no positions; judged by its own fp64 run (SDPA's plain form)."""
    width = context.shape.width
    options = dict(hidden_size=width, num_heads=width // HEAD_DIM)
    module, eager = seeded(context, Attention, **options), seeded(context, Attention, **options)
    mixer = attention_work(context.shape, width // HEAD_DIM, HEAD_DIM, context.dtype_name)
    return layer_problem(context, module, eager, "softmax attention", False, mixer)
