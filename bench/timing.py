# SPDX-License-Identifier: Apache-2.0
"""Timing side by side: interleaved rounds, so that clock drift and other load hit every variant alike."""

from __future__ import annotations

import ctypes
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

# Called before each measurement, untimed, to set up; returns the call to time.
Variant = Callable[[], Callable[[], object]]


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

    def quantile_ms(self, p: float) -> float:
        """Interpolated linearly between samples, as numpy does."""
        ordered = sorted(self.samples_ms)
        position = p * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])


class Clock(Protocol):
    """Runs a function once and says how long it took."""

    def measure(self, fn: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        ...


class WallClock:
    """For CPUs. Before each call a buffer larger than usual caches is written, as the flush on a GPU.

    Not through torch: its threads would still be spinning when the call starts.
    """

    def __init__(self, flush_bytes: int = 32 << 20) -> None:
        self._flush = ctypes.create_string_buffer(flush_bytes)

    def measure(self, fn: Callable[[], object]) -> float:
        ctypes.memset(self._flush, 0, len(self._flush))
        start = time.perf_counter_ns()
        fn()
        return (time.perf_counter_ns() - start) * 1e-6


class CudaClock:
    """For GPUs: the time between two events on the stream, with a cold L2.

    First a buffer of four times the L2 cache is written, so that no call finds its inputs there. Then the stream is
    kept busy for about two milliseconds, so that the launches are queued before the first event fires: in training
    the queue runs ahead too, and the time of a launch from Python is not the kernel's.
    """

    HEAD_START_CYCLES = 4_000_000

    def __init__(self, device: torch.device, head_start_cycles: int = HEAD_START_CYCLES) -> None:
        self._head_start = head_start_cycles
        l2 = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 << 20))
        self._flush = torch.empty(4 * l2, dtype=torch.uint8, device=device)

    def measure(self, fn: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        torch.cuda.synchronize()
        torch.cuda._sleep(self._head_start)
        start.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


def clock_for(device: torch.device) -> Clock:
    """The clock that fits a device."""
    return CudaClock(device) if device.type == "cuda" else WallClock()


def planned_runs(cost_ms: float, *, runs: int, min_runs: int, budget_s: float) -> int:
    """How often to run a variant that takes `cost_ms` once: `runs`, or as many as fit the budget but `min_runs`."""
    affordable = int(min(runs, budget_s * 1e3 / cost_ms)) if cost_ms > 0 else runs
    return max(min(runs, min_runs), affordable)


def measure_interleaved(
    variants: Mapping[str, Variant],
    clock: Clock,
    *,
    runs: int = 20,
    min_runs: int = 3,
    budget_s: float = 30.0,
    warmup: int = 2,
    on_run: Callable[[str, int, int], None] = lambda name, done, total: None,
    on_error: Callable[[str, Exception], bool] = lambda name, error: False,
) -> dict[str, Timing]:
    """Time every variant `runs` times, one call of each a round, the order rotating from round to round.

    A variant so slow that `runs` of it would exceed `budget_s` seconds runs less often (at least `min_runs` times), its
    runs spread evenly over the rounds. The last warm-up call says what a call costs.

    Args:
        variants: name → function that prepares (untimed) and returns the call to time.
        clock: what measures one call.
        on_run: told (name, runs done, runs planned) of all variants together, for a progress bar.
        on_error: told of an exception of a variant; True drops the variant and goes on, False lets it rise.
    """
    if runs < 1 or min_runs < 1 or warmup < 1:
        raise ValueError(f"runs, min_runs and warmup must be at least 1, got {runs}, {min_runs}, {warmup}")
    dropped: set[str] = set()

    def call(name: str) -> float:
        try:
            return clock.measure(variants[name]())
        except Exception as e:
            if not on_error(name, e):
                raise
            dropped.add(name)
            return 0.0

    plan = {}
    for name in variants:
        cost = 0.0
        for _ in range(warmup):
            cost = call(name) if name not in dropped else 0.0
        plan[name] = planned_runs(cost, runs=runs, min_runs=min_runs, budget_s=budget_s)
    rounds, total, done = max(plan.values(), default=0), sum(plan.values()), 0
    samples: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for r in range(rounds):
        first = r % len(names)
        for name in names[first:] + names[:first]:
            due = (r + 1) * plan[name] // rounds > r * plan[name] // rounds
            if due:
                if name not in dropped:
                    samples[name].append(call(name))
                done += 1
                on_run(name, done, total)
    return {name: Timing(tuple(values)) for name, values in samples.items() if name not in dropped}
