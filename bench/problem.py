# SPDX-License-Identifier: Apache-2.0
"""One provider on one shape: the call to time, its inputs, and what it is judged against."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .floors import Work
from .timing import Variant

Leaves = Mapping[str, Tensor]
Call = Callable[[Leaves], tuple[Tensor, ...]]
Naive = Callable[[Leaves, int | None], tuple[Tensor, ...]]  # with how many steps of time it is given, None for all


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call with its inputs.

    Attributes:
        operator: what it computes, for the row.
        leaves: differentiable inputs by name.
        call: leaves → outputs, named by `outputs`; the first one gets the gradient `dy`.
        dy: random gradient of the first output.
        naive: an independent implementation of the same, run in fp64 as the truth.
        yardstick: a careful eager run in the problem's dtype; its error sets the tolerance.
        timed: names of leaves that have time as dimension 1.
        steps: length of the time dimension of the first output, None if it has none.
        gate_steps: how many of them the gate looks at; by causality later ones do not matter for these.
        yardstick_steps: measure the yardstick on so many steps only, because all would take too long.
        family: problems of one family share inputs and truth.
        slack: how often the tolerance a *peer* may err; what we ship gets 1.
        tolerated: relative error that a *peer* may have whatever the tolerance is; what we ship gets 0.
        rounding: of a *peer*: the error is told relative to at least this, for it rounds to its dtype on the way
            whatever the dtype of a leaf.
        work: lower bounds of work by pass, empty if unknown.
        tokens: per call, for tokens/s.
        modes: others than the four of `differentiate`.
        tokens_of_mode: where a mode's tokens differ from `tokens`.
        extra_gate: mode → function that gives (result, truth, yardstick) of what only that mode runs.
    """

    operator: str
    leaves: dict[str, Tensor]
    call: Call
    naive: Naive
    yardstick: Naive
    family: str
    dy: Tensor | None = None
    outputs: tuple[str, ...] = ("y",)
    timed: frozenset[str] = frozenset()
    steps: int | None = None
    gate_steps: int | None = None
    yardstick_steps: int | None = None
    slack: float = 1.0
    tolerated: float = 0.0
    rounding: float = 0.0
    work: dict[str, Work] = dataclasses.field(default_factory=dict)
    tokens: int = 0
    modes: dict[str, Variant] = dataclasses.field(default_factory=dict)
    tokens_of_mode: dict[str, int] = dataclasses.field(default_factory=dict)
    extra_gate: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]] = dataclasses.field(default_factory=dict)

    def warm(self) -> None:
        """The first call, forward and (where there is a gradient) backward: compiles and tunes."""
        differentiate(self.call, self.leaves, self.dy, self.outputs)

    def variant(self, mode: str) -> Variant:
        """The call that a mode times. backward runs its forward before the clock starts."""
        if mode in self.modes:
            return self.modes[mode]
        if mode == "inference":
            frozen = {name: x.detach() for name, x in self.leaves.items()}

            def inference() -> object:
                with torch.no_grad():
                    return self.call(frozen)

            return lambda: inference
        leaves = list(self.leaves.values())
        if mode == "forward":
            return lambda: lambda: self.call(self.leaves)
        if mode == "backward":

            def backward() -> Callable[[], object]:
                y = self.call(self.leaves)[0]
                return lambda: torch.autograd.grad(y, leaves, self.dy, allow_unused=True)

            return backward
        if mode == "forward+backward":
            return lambda: lambda: torch.autograd.grad(self.call(self.leaves)[0], leaves, self.dy, allow_unused=True)
        raise ValueError(f"mode {mode!r} is unknown; expected {', '.join(available_modes(self))}")


def available_modes(problem: Problem) -> list[str]:
    """Modes that `variant` knows for this problem."""
    usual = ["inference"] if problem.dy is None else ["inference", "forward", "backward", "forward+backward"]
    return [*usual, *problem.modes]


def differentiate(call: Call, leaves: Leaves, dy: Tensor | None, outputs: tuple[str, ...]) -> dict[str, Tensor]:
    """Run forward and, where there is a gradient, backward; everything by name, detached."""
    if dy is None:
        with torch.no_grad():
            return dict(zip(outputs, call(leaves), strict=True))
    results = call(leaves)
    gradients = torch.autograd.grad(results[0], list(leaves.values()), dy.to(results[0].dtype), allow_unused=True)
    named = {name: x.detach() for name, x in zip(outputs, results, strict=True)}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        named[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient.detach()
    return named
