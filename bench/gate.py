# SPDX-License-Identifier: Apache-2.0
"""The correctness gate before every timing: same inputs, random output gradients, memory poisoned beforehand.

Truth is an independent implementation in fp64. The tolerance is derived, not picked: twice the error of a careful eager
run in the timed dtype, plus one rounding (m2rnn_compile.testing), for every tensor and every time slice.

Outputs and gradients are judged on the call that forward and backward time. Where inference is timed, its outputs are
too: nothing says that a provider runs the same without gradients.

Where the whole truth would take too long, the gate looks at the first steps of the timed call only: the output
gradient is zero after them, so by causality outputs and gradients up to there are those of a short problem, and
gradients after them must be exactly zero.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from m2rnn_compile.testing import Comparison, compare

from .memory import poisoned
from .problem import Problem, differentiate

OUTPUTS_ONLY = ("inference", "forward")


class Verdict(NamedTuple):
    """`ratio` is the worst error / allowed error of outputs and gradients, `ratio_forward` that of outputs alone."""

    ok: bool
    ok_forward: bool
    ratio: float
    ratio_forward: float
    against: str
    failing: str

    def allows(self, mode: str) -> bool:
        return self.ok_forward if mode in OUTPUTS_ONLY else self.ok

    def ratio_of(self, mode: str) -> float:
        """Of what a mode computes: forward has no gradients that could err."""
        return self.ratio_forward if mode in OUTPUTS_ONLY else self.ratio


class Judge:
    """Holds the truth of one family of problems and judges each of its providers."""

    def __init__(self, problem: Problem) -> None:
        self.steps = problem.gate_steps if problem.gate_steps != problem.steps else None
        short = {name: self._cut(name, x, problem).detach() for name, x in problem.leaves.items()}
        dy = problem.dy if problem.dy is None or self.steps is None else problem.dy[:, : self.steps]
        names = problem.outputs

        def run(naive: object, dtype: torch.dtype | None) -> dict[str, Tensor]:
            leaves = {n: x.to(dtype) if dtype else x.clone() for n, x in short.items()}
            if dy is not None:
                leaves = {n: x.requires_grad_() for n, x in leaves.items()}
            return differentiate(lambda given: naive(given, self.steps), leaves, dy, names)  # type: ignore[operator]

        self.truth = run(problem.naive, torch.float64)
        steps = "" if problem.steps is None else ", all steps" if self.steps is None else f", first {self.steps} steps"
        self.against = "fp64 of an independent run" + steps
        if problem.yardstick_steps is None:
            self.eager = run(problem.yardstick, None)
        else:
            errors = Judge(
                dataclasses.replace(problem, yardstick_steps=None, gate_steps=problem.yardstick_steps)
            ).errors
            # A tensor whose relative error against the truth is what was measured, in every slice.
            self.eager = {name: x * (1 + errors[name]) for name, x in self.truth.items()}
            self.against += f", tolerance from {problem.yardstick_steps}"

    @property
    def errors(self) -> dict[str, float]:
        """Relative error of the yardstick, by tensor."""
        rows = compare(self.eager, self.truth, self.eager)
        return {row.name: row.error for row in rows if row.slice == "all"}

    def _has_time(self, name: str, problem: Problem) -> bool:
        return name in problem.timed or (name == problem.outputs[0] and problem.steps is not None)

    def _cut(self, name: str, x: Tensor, problem: Problem) -> Tensor:
        return x[:, : self.steps] if self.steps is not None and self._has_time(name, problem) else x

    def _negligible(self, row: Comparison, got: dict[str, Tensor]) -> bool:
        """A slice whose error is below a rounding of the whole: its own truth may be zero (dq of the first token)."""
        if not row.slice.startswith("t "):
            return False
        first, end = map(int, row.slice[2:].split(":"))
        truth = self.truth[row.name]
        error = float((got[row.name][:, first:end].double() - truth[:, first:end]).norm())
        return error <= torch.finfo(got[row.name].dtype).eps * float(truth.norm())

    def __call__(self, problem: Problem) -> Verdict:
        """Run the provider once, forward and backward, on poisoned memory and compare."""
        dy = problem.dy
        if dy is not None and self.steps is not None:
            dy = dy.clone()
            dy[:, self.steps :] = 0
        with self._poisoned(problem):
            got = differentiate(problem.call, problem.leaves, dy, problem.outputs)
        return self._verdict(problem, got)

    def of_inference(self, problem: Problem) -> Verdict:
        """Judge the outputs of what the mode inference times: without gradients a provider may run something else."""
        call = problem.variant("inference")()
        call()  # compiles and tunes before memory is poisoned
        with self._poisoned(problem):
            got = call()
        return self._verdict(problem, dict(zip(problem.outputs, cast(tuple[Tensor, ...], got), strict=True)))

    def _poisoned(self, problem: Problem) -> contextlib.AbstractContextManager[None]:
        device = next(iter(self.truth.values())).device
        return poisoned(device, 4 * sum(x.nbytes for x in problem.leaves.values()))

    def _verdict(self, problem: Problem, got: dict[str, Tensor]) -> Verdict:
        wrong: dict[str, float] = {}
        ratios: dict[str, float] = dict.fromkeys(got, 0.0)  # the worst slice's
        short: dict[str, Tensor] = {}
        for name, x in got.items():
            source = name if name in problem.outputs else name[1:]
            short[name] = self._cut(source, x, problem)
            rest = x[:, self.steps :] if self.steps is not None and self._has_time(source, problem) else x[:0]
            if not bool(torch.isfinite(x).all()) or (name not in problem.outputs and bool(rest.any())):
                wrong[name] = ratios[name] = math.inf
        for row in compare(short, {name: self.truth[name] for name in short}, self.eager):
            if self._negligible(row, short):
                continue
            allowed = max(row.allowed * problem.slack, problem.tolerated)
            counted = max(row.allowed, problem.rounding)
            ratio = row.error / counted if counted > 0 else (0.0 if row.error == 0 else math.inf)
            if not ratio <= ratios[row.name]:  # NaN wins
                ratios[row.name] = ratio
            if not row.error <= allowed < math.inf:
                wrong[row.name] = max(wrong.get(row.name, 0.0), math.inf if math.isnan(ratio) else ratio)
        forward = not set(wrong) & set(problem.outputs)
        outputs = [ratios[name] for name in problem.outputs]
        failing = ", ".join(
            f"{name} errs {'without bound' if r == math.inf else f'{r:.1f}x what is allowed'}"
            for name, r in wrong.items()
        )
        slack = "" if problem.slack == 1 else f", peer: {problem.slack:g} x the tolerance or {problem.tolerated:.2g}"
        return Verdict(not wrong, forward, _worst(ratios.values()), _worst(outputs), self.against + slack, failing)


def _worst(ratios: Iterable[float]) -> float:
    """The largest; NaN if there is one."""
    values = list(ratios)
    return math.nan if any(map(math.isnan, values)) else max(values)
