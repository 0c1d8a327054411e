# SPDX-License-Identifier: Apache-2.0
"""Timing side by side: interleaved rounds, so that clock drift and other load hit every variant alike."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

Variant = Callable[[int], object]  # called with a running number, to pick the next of several input buffers


@dataclasses.dataclass(frozen=True)
class Timing:
    """Samples of one variant, in milliseconds."""

    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def min_ms(self) -> float:
        return min(self.samples_ms)

    @property
    def max_ms(self) -> float:
        return max(self.samples_ms)


class Clock(Protocol):
    """Runs a function once and says how long it took."""

    def measure(self, fn: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        ...


class WallClock:
    """For CPUs."""

    def measure(self, fn: Callable[[], object]) -> float:
        start = time.perf_counter_ns()
        fn()
        return (time.perf_counter_ns() - start) * 1e-6


class CudaClock:
    """For GPUs: the time between two events on the stream.

    The stream is first kept busy for about half a millisecond, so that the launches are queued before the first event
    fires: in training the queue runs ahead too, and the time of a launch from Python is not the kernel's.
    """

    HEAD_START_CYCLES = 1_000_000

    def measure(self, fn: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(self.HEAD_START_CYCLES)
        start.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


def planned_runs(cost_ms: float, *, runs: int, min_runs: int, budget_s: float) -> int:
    """How often to run a variant that takes `cost_ms` once: `runs`, or as many as fit the budget but `min_runs`."""
    affordable = int(budget_s * 1e3 / cost_ms) if cost_ms > 0 else runs
    return max(min(runs, min_runs), min(runs, affordable))


def measure_interleaved(
    variants: Mapping[str, Variant],
    clock: Clock,
    *,
    runs: int = 20,
    min_runs: int = 3,
    budget_s: float = 30.0,
    warmup: int = 2,
    on_run: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, Timing]:
    """Time every variant `runs` times, one call of each a round, the order rotating from round to round.

    A variant so slow that `runs` of it would exceed `budget_s` seconds runs less often (at least `min_runs` times), its
    runs spread evenly over the rounds. The first warm-up call compiles; the last one says what a call costs.

    Args:
        variants: name → function of a running number.
        clock: what measures one call.
        on_run: told (name, runs done, runs planned) of all variants together, for a progress bar.
    """
    if runs < 1 or min_runs < 1 or warmup < 1:
        raise ValueError(f"runs, min_runs and warmup must be at least 1, got {runs}, {min_runs}, {warmup}")
    calls = dict.fromkeys(variants, 0)

    def call(name: str) -> float:
        number = calls[name]
        calls[name] += 1
        return clock.measure(lambda: variants[name](number))

    plan = {}
    for name in variants:
        cost = [call(name) for _ in range(warmup)][-1]
        plan[name] = planned_runs(cost, runs=runs, min_runs=min_runs, budget_s=budget_s)
    rounds, total, done = max(plan.values(), default=0), sum(plan.values()), 0
    samples: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for r in range(rounds):
        first = r % len(names)
        for name in names[first:] + names[:first]:
            due = (r + 1) * plan[name] // rounds > r * plan[name] // rounds
            if due:
                samples[name].append(call(name))
                done += 1
                on_run(name, done, total)
    return {name: Timing(tuple(values)) for name, values in samples.items()}
