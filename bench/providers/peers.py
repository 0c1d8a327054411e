# SPDX-License-Identifier: Apache-2.0
"""What problems of peers have in common: another operator at the same shape class, its truth an fp64 loop of ours."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..floors import Work
from ..problem import Call, Leaves, Problem
from ..shapes import Shape
from .inputs import normal
from .registry import Context

# A peer chooses its own precision (states in bf16, approximate exponentials). The gate is there to catch a wrong call,
# whose error is of order one; the row shows how the error compares with the tolerance for what we ship.
SLACK = 4.0
TOLERATED_ROUNDINGS = 8  # 6 % in bf16
GATE_STEPS = 192


def tolerated(context: Context) -> float:
    """Relative error that a peer may have in any case."""
    return TOLERATED_ROUNDINGS * torch.finfo(context.dtype).eps


def why_not_importable(module: str, advice: str) -> str | None:
    """The reason why a module cannot be imported, or None. Imports it: a broken build shows only then."""
    try:
        importlib.import_module(module)
    except Exception as e:  # whatever a peer's import raises is the reason to report
        first_line = (str(e).splitlines() or [""])[0]
        return f"import of {module} failed with {type(e).__name__}: {first_line}; {advice}"
    return None


def version_of(package: str) -> str:
    """What a package says its version is."""
    found = getattr(importlib.import_module(package), "__version__", None)
    return f"{package} {found or 'of unknown version'}"


def in_fp32(naive: Callable[..., tuple[Tensor, ...]]) -> Callable[[Leaves, int | None], tuple[Tensor, ...]]:
    """The yardstick of a peer: the loop in fp32, its result rounded to the inputs' dtype."""

    def run(given: Leaves, steps: int | None) -> tuple[Tensor, ...]:
        dtype = next(iter(given.values())).dtype
        wide = torch.promote_types(dtype, torch.float32)
        return tuple(y.to(dtype) for y in naive({name: x.to(wide) for name, x in given.items()}))

    return run


def peer_problem(
    context: Context,
    operator: str,
    leaves: dict[str, Tensor],
    call: Call,
    naive: Callable[[Leaves], tuple[Tensor, ...]],
    out: tuple[int, ...],
    timed: tuple[str, ...],
    work: dict[str, Work],
) -> Problem:
    """A sequence operator of a peer; `out` is the shape of its result, time in dimension 1."""
    shape = context.shape
    sizes = f"tokens B{shape.B} T{shape.T} as M²RNN N{shape.N} K{shape.K} V{shape.V}"
    return Problem(
        operator=f"{operator}; {sizes}",
        leaves=leaves,
        call=call,
        naive=lambda given, steps: naive(given),
        yardstick=in_fp32(naive),
        family=operator,
        dy=normal(context, *out, salt=99).detach(),
        timed=frozenset(timed),
        steps=shape.T,
        gate_steps=min(shape.T, GATE_STEPS),
        slack=SLACK,
        tolerated=tolerated(context),
        rounding=torch.finfo(context.dtype).eps,
        work=work,
        tokens=shape.B * shape.T,
    )


def step_problem(
    context: Context, operator: str, leaves: dict[str, Tensor], call: Call, naive: Any, work: dict[str, Work]
) -> Problem:
    """One decoding step of a peer, judged on its output."""
    return Problem(
        operator=operator,
        leaves=leaves,
        call=call,
        naive=lambda given, steps: naive(given),
        yardstick=in_fp32(naive),
        family=operator,
        slack=SLACK,
        tolerated=tolerated(context),
        rounding=torch.finfo(context.dtype).eps,
        work=work,
        tokens=context.shape.B,
    )


def moved(itemsize: int, inputs: float, outputs: float) -> dict[str, float]:
    """Bytes of forward and backward for element counts: backward reads inputs and dy, writes the inputs' gradients."""
    return {"forward": itemsize * (inputs + outputs), "backward": itemsize * (2 * inputs + outputs)}


def results_only(shape: Shape, itemsize: int) -> int:
    """Estimate of kept memory for peers that keep about their inputs' size again."""
    return shape.B * shape.T * 4 * shape.width * itemsize
