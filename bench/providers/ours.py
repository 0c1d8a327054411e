# SPDX-License-Identifier: Apache-2.0
"""The implementations of this library, plain and under torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from m2rnn_compile import m2rnn, m2rnn_step
from m2rnn_compile.ops import reference, registry
from m2rnn_compile.ops.scan import DEFAULT_CHUNK
from m2rnn_compile.ops.validation import num_checkpoints
from m2rnn_compile.testing import low_precision_eager

from ..floors import scan_work, step_work
from ..problem import Leaves, Problem
from ..shapes import Shape
from . import layers, lm
from .inputs import scan_inputs
from .registry import Context, Provider

ORACLE_STEPS = 16384  # beyond, the tolerance comes from a part of the sequence
GRAPH_BYTES = 2**30  # above this the oracle keeps checkpoints instead of the autograd graph of the whole loop
BACKWARD_WINDOW = 144 * 2**20  # WINDOW_BYTES of lowering/triton: partial sums of gradients, window of time by window
STEPS_A_GRAPH = 8  # of the compiled reference: a loop over all of T would compile for hours


def state_elements(shape: Shape) -> int:
    return shape.B * shape.T * shape.N * shape.K * shape.V


def oracle_impl(shape: Shape) -> str:
    """How to run the oracle: through autograd where its graph fits (six fp64 states a step), else checkpointed."""
    return "reference" if 6 * 8 * state_elements(shape) <= GRAPH_BYTES else "eager"


def scan_problem(
    context: Context, call: Callable[..., Tensor], *, slack: float = 1.0, tolerated: float = 0.0
) -> Problem:
    """The scan, computed by `call(q, k, v, f, W, state_grad_clip=...)`, which returns y."""
    leaves = scan_inputs(context)
    dy, clip, shape = leaves.pop("dy"), context.clip, context.shape
    long = shape.T > ORACLE_STEPS

    def naive(given: Leaves, steps: int | None) -> tuple[Tensor, ...]:
        arguments: dict[str, Any] = dict(given)
        return (m2rnn(**arguments, state_grad_clip=clip, impl=oracle_impl(shape)).y,)

    def yardstick(given: Leaves, steps: int | None) -> tuple[Tensor, ...]:
        arguments: dict[str, Any] = dict(given)
        return (low_precision_eager(**arguments, state_grad_clip=clip)[0],)

    return Problem(
        operator="M²RNN",
        leaves=leaves,
        call=lambda given: (call(**given, state_grad_clip=clip),),
        naive=naive,
        yardstick=yardstick,
        family="scan",
        dy=dy,
        timed=frozenset(("q", "k", "v", "f")),
        steps=shape.T,
        gate_steps=shape.T,
        yardstick_steps=ORACLE_STEPS // 4 if long else None,
        slack=slack,
        tolerated=tolerated,
        work=scan_work(shape, context.dtype_name),
        tokens=shape.B * shape.T,
    )


def step_problem(
    context: Context, call: Callable[..., tuple[Tensor, Tensor]], *, slack: float = 1.0, tolerated: float = 0.0
) -> Problem:
    """One decoding step, computed by `call(q, k, v, f, W, initial_state=...)`, which returns (y, state)."""

    def make() -> dict[str, Tensor]:
        short = Context("op", context.shape.with_length(1), context.dtype, context.device, context.seed)
        leaves = {name: x.detach() for name, x in scan_inputs(short).items() if name != "dy"}
        leaves = {name: x if name == "W" else x[:, 0].contiguous() for name, x in leaves.items()}
        s = context.shape
        size = (s.B, s.N, s.K, s.V)
        state = torch.randn(*size, generator=context.generator(), device=context.device) * 0.5
        return {**leaves, "initial_state": state.to(leaves["f"].dtype)}

    def naive(given: Leaves, steps: int | None) -> tuple[Tensor, ...]:
        return tuple(m2rnn_step(**given, impl="reference"))

    def yardstick(given: Leaves, steps: int | None) -> tuple[Tensor, ...]:
        longer: dict[str, Any] = {
            name: x if name in ("W", "initial_state") else x[:, None] for name, x in given.items()
        }
        y, state = low_precision_eager(**longer)
        return y[:, 0], state

    return Problem(
        operator="M²RNN",
        leaves=dict(context.once("step", make)),
        call=lambda given: tuple(call(**given)),
        naive=naive,
        yardstick=yardstick,
        family="step",
        outputs=("y", "final_state"),
        slack=slack,
        tolerated=tolerated,
        work=step_work(context.shape, context.dtype_name),
        tokens=context.shape.B,
    )


def _scan(impl: str, **given: Any) -> Tensor:
    return m2rnn(**given, output_final_state=False, impl=impl).y


def _step(impl: str, **given: Any) -> tuple[Tensor, Tensor]:
    return m2rnn_step(**given, impl=impl)


def _reference_in_pieces(q: Tensor, k: Tensor, v: Tensor, f: Tensor, W: Tensor, *, state_grad_clip: Any) -> Tensor:
    """The reference loop compiled for a few steps at a time: dynamo unrolls loops."""
    compiled = _compiled(reference.reference)
    state, ys = None, []
    for first in range(0, q.shape[1], STEPS_A_GRAPH):
        part = slice(first, first + STEPS_A_GRAPH)
        y, state = compiled(q[:, part], k[:, part], v[:, part], f[:, part], W, state, None, state_grad_clip)
        ys.append(y)
    return torch.cat(ys, 1)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _why_not(impl: str, device: torch.device) -> str | None:
    row = registry.IMPLEMENTATIONS[impl]
    if row.devices is not None and device.type not in row.devices:
        return f"runs on {' or '.join(row.devices)}, not on {device.type}"
    if row.module == reference.__name__:
        return None
    try:
        availability: str | None = registry.load(impl).availability()
    except ImportError as e:
        return f"cannot be imported: {e}"
    return availability


def state_bytes(shape: Shape, itemsize: int) -> int:
    """One state of every sequence and head: fp32, fp64 for fp64 inputs."""
    return max(4, itemsize) * state_elements(shape.with_length(1))


def checkpoint_bytes(shape: Shape, itemsize: int) -> int:
    """The states that forward keeps. Kernels of 16-bit inputs fill the same bytes with twice as many, of 16 bits."""
    return num_checkpoints(shape.B, shape.T, shape.B, DEFAULT_CHUNK, packed=False) * state_bytes(shape, itemsize)


def _kept(shape: Shape, itemsize: int) -> int:
    return checkpoint_bytes(shape, itemsize) + state_bytes(shape, itemsize)  # and the final state


def _in_backward(impl: str, shape: Shape, itemsize: int) -> int:
    """Of the Triton kernels: partial sums of q, k, v and f, dW of every sequence, the carried gradient."""
    if impl != "triton":
        return 0
    partials = shape.B * shape.T * shape.N * (itemsize * (2 * shape.K + shape.V) + 4)
    dW = 4 * shape.B * shape.N * shape.V**2
    return min(BACKWARD_WINDOW, partials) + dW + state_bytes(shape, itemsize)


def _graph(shape: Shape, itemsize: int) -> int:
    return 5 * 4 * state_elements(shape)  # h, u, z and the two products of the blend, in fp32


def implementation(impl: str, *, default_on: tuple[str, ...], about: str) -> Provider:
    """One value of `m2rnn(impl=...)`."""
    return Provider(
        name=impl,
        about=about,
        default_on=default_on,
        why_not=functools.partial(_why_not, impl),
        build={
            "op": lambda context: scan_problem(context, functools.partial(_scan, impl)),
            "step": lambda context: step_problem(context, functools.partial(_step, impl)),
            "layer": lambda context: layers.m2rnn_layer(context, impl, compiled=False),
            "model": lambda context: lm.language_model(context, "M", impl, compiled=False),
        },
        kept=_graph if impl == "reference" else _kept,
        in_backward=functools.partial(_in_backward, impl),
    )


def compiled(impl: str, *, default_on: tuple[str, ...]) -> Provider:
    """The same under torch.compile."""

    def scan(context: Context) -> Problem:
        if impl == "reference":
            return scan_problem(context, _reference_in_pieces)
        return scan_problem(context, torch.compile(functools.partial(_scan, impl), fullgraph=True, dynamic=False))

    def step(context: Context) -> Problem:
        return step_problem(context, torch.compile(functools.partial(_step, impl), fullgraph=True, dynamic=False))

    build: dict[str, Callable[[Context], Problem]] = {"op": scan, "step": step}
    if impl != "reference":  # a layer or model of unrolled loops compiles for hours
        build["layer"] = lambda context: layers.m2rnn_layer(context, impl, compiled=True)
        build["model"] = lambda context: lm.language_model(context, "M", impl, compiled=True)
    about = f"torch.compile of {impl}" + (f", {STEPS_A_GRAPH} steps a graph" if impl == "reference" else "")
    return Provider(
        name=f"{impl}-compile",
        about=about,
        default_on=default_on,
        why_not=functools.partial(_why_not, impl),
        build=build,
        kept=_graph if impl == "reference" else _kept,
        in_backward=functools.partial(_in_backward, impl),
    )
