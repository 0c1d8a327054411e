# SPDX-License-Identifier: Apache-2.0
"""From shapes and providers to rows: build, gate, measure memory, time side by side."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from . import environment, floors, memory
from .gate import Judge, Verdict
from .problem import Problem, available_modes
from .providers import PROVIDERS, Context, Provider, choose
from .rows import Row
from .shapes import Shape
from .timing import Timing, Variant, clock_for, measure_interleaved

HEADS = ("Nq", "Nk", "Nv", "Nf", "Nw")
Progress = Callable[[str, int, int], None]


class DeviceLost(RuntimeError):
    """A kernel read or wrote where it must not: CUDA then refuses everything that this process asks for."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure."""

    kernel: str
    shapes: Sequence[Shape]
    dtypes: Sequence[torch.dtype]
    providers: Sequence[str] | None
    modes: Sequence[str]
    device: torch.device
    clip: float | None = 1.0
    seed: int = 0
    runs: int = 20
    min_runs: int = 3
    budget_s: float = 30.0
    gate_steps: int | None = None
    layers: int | None = None
    pattern: str | None = None
    commit: str | None = None


def _reason(error: BaseException) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"


def _is_oom(error: BaseException) -> bool:
    """CUDA's allocator raises its own type; the CPU's says it in words."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


def why_failed(error: BaseException) -> dict[str, Any]:
    """The columns status and note of a row that an exception ended."""
    if _is_oom(error):
        return {"status": "oom", "note": "out of memory"}
    return {"status": "failed", "note": _reason(error)}


class _Group:
    """One shape and dtype: the problems that could be built, what the gate said, and the rows of the rest."""

    def __init__(self, plan: Plan, shape: Shape, dtype: torch.dtype, chosen: Sequence[Provider]) -> None:
        self.plan, self.shape, self.dtype = plan, shape, dtype
        self.context = Context(plan.kernel, shape, dtype, plan.device, plan.seed, plan.clip, plan.layers, plan.pattern)
        self.common: dict[str, Any] = {
            "kernel": plan.kernel,
            "dtype": self.context.dtype_name,
            **{name: getattr(shape, name) for name in "BTNKV"},
            "shape": shape.name,
            "config": {
                "clip": plan.clip,
                **{name: getattr(shape, name) for name in HEADS},
                "seed": plan.seed,
                "threads": torch.get_num_threads(),
                **({"layers": plan.layers} if plan.layers else {}),
                **({"pattern": plan.pattern} if plan.pattern else {}),
            },
            **environment.of_row(plan.device, plan.commit),
        }
        self.chosen = list(chosen)
        self.problems: dict[str, Problem] = {}
        self.operators: dict[str, str] = {}  # of the problems that could be built, whatever became of them
        self.verdicts: dict[str, Verdict] = {}
        self.compile_s: dict[str, float] = {}
        self.failed: dict[str, tuple[str, str]] = {}  # provider → status, note

    def seconds(self, problem: Problem) -> float:
        """Of one call, forward and backward."""
        start = time.perf_counter()
        problem.warm()
        if self.plan.device.type == "cuda":
            torch.cuda.synchronize(self.plan.device)
        return time.perf_counter() - start

    def fail(self, name: str, error: BaseException) -> None:
        """Note why a provider gives no figures, and let go of what it held."""
        columns = why_failed(error)
        self.failed[name] = columns["status"], columns["note"]
        self.problems.pop(name, None)
        if self.plan.device.type == "cuda":
            try:
                torch.cuda.empty_cache()
            except RuntimeError as e:
                raise DeviceLost(
                    f"{name} left the GPU unusable to this process at {self.shape} ({columns['note']}); "
                    f"nothing more can be measured. Start again without it or without this shape"
                ) from e

    def build_and_gate(self, on_run: Progress) -> None:
        judges: dict[str, Judge] = {}
        for number, provider in enumerate(self.chosen):
            name = provider.name
            on_run(f"{self.shape.name} {self.context.dtype_name} {name}: gate", number, len(self.chosen))
            try:
                problem = at_most(self.plan.gate_steps, provider.build[self.plan.kernel](self.context))
                self.problems[name], self.operators[name] = problem, problem.operator
                if problem.family not in judges:
                    judges[problem.family] = Judge(problem)
                self.compile_s[name] = max(0.0, self.seconds(problem) - self.seconds(problem))
                self.verdicts[name] = judges[problem.family](problem)
                if "inference" in self.plan.modes:
                    self.verdicts[f"{name} inference"] = judges[problem.family].of_inference(problem)
            except Exception as e:  # a peer may raise anything; the run goes on without it
                self.fail(name, e)
        judges.clear()

    def rows_of_mode(self, mode: str, clock: Any, on_run: Progress) -> Iterator[Row]:
        variants: dict[str, Variant] = {}
        peaks: dict[str, int | None] = {}
        kept: dict[str, int] = {}
        skipped: dict[str, tuple[str, str]] = {}
        for name, problem in list(self.problems.items()):
            if mode not in available_modes(problem):
                skipped[name] = ("failed", f"has no mode {mode}; it has {', '.join(available_modes(problem))}")
                continue
            verdict = self.verdict_of(name, mode)
            on_run(f"{self.shape.name} {mode}: {name}, memory", 0, 1)
            try:
                if mode in problem.extra_gate:
                    verdict = extra_verdict(problem, mode)
                    self.verdicts[f"{name} {mode}"] = verdict
                if not verdict.allows(mode):
                    skipped[name] = ("refused", f"correctness gate: {verdict.failing}")
                    continue
                variant = problem.variant(mode)
                variant()()  # compiles what this mode needs beyond the gate
                peaks[name] = memory.peak_bytes(variant(), self.plan.device)
                if problem.dy is not None and mode in ("forward", "forward+backward"):
                    kept[name] = memory.kept_bytes(
                        problem.variant("forward")(), list(problem.leaves.values()), self.plan.device
                    )
            except Exception as e:
                self.fail(name, e)
                continue
            variants[name] = variant

        def on_error(name: str, error: Exception) -> bool:
            self.fail(name, error)
            return True

        timings = measure_interleaved(
            variants,
            clock,
            runs=self.plan.runs,
            min_runs=self.plan.min_runs,
            budget_s=self.plan.budget_s,
            warmup=1,
            on_run=lambda name, done, total: on_run(f"{self.shape.name} {mode}: {name}", done, total),
            on_error=on_error,
        )
        for provider in self.chosen:
            name = provider.name
            if name in timings:
                yield self.timed_row(name, mode, timings[name], peaks[name], kept.get(name))
            else:
                status, note = skipped.get(name) or self.failed[name]
                columns = {**self.common, **self.gate_columns(name, mode)}
                columns["operator"] = self.operators.get(name, "")
                yield Row(**columns, provider=name, mode=mode, status=status, note=note)

    def verdict_of(self, name: str, mode: str) -> Verdict:
        """What the gate said of what a mode runs."""
        return self.verdicts.get(f"{name} {mode}") or self.verdicts[name]

    def gate_columns(self, name: str, mode: str) -> dict[str, Any]:
        if name not in self.verdicts:
            return {}
        verdict = self.verdict_of(name, mode)
        ratio = verdict.ratio_of(mode)
        return {"gate": verdict.against, "error_ratio": ratio if math.isfinite(ratio) else None}

    def config_of(self, name: str) -> dict[str, Any]:
        """What was chosen, and the version of the package of a peer."""
        version = next(provider.version for provider in self.chosen if provider.name == name)
        return {**self.common["config"], **({"version": version()} if version else {})}

    def timed_row(self, name: str, mode: str, timing: Timing, peak: int | None, kept: int | None) -> Row:
        problem = self.problems[name]
        seconds = timing.median_ms * 1e-3
        floor = floors.floor_of_mode(
            problem.work, self.context.dtype_name, mode, floors.device_at_hand(self.plan.device)
        )
        flops = moved = None
        if problem.work:
            parts = floors.work_of_mode(problem.work, mode)
            flops, moved = sum(part.flops for part in parts), sum(part.bytes for part in parts)
        return Row(
            **{**self.common, "config": self.config_of(name)},
            provider=name,
            mode=mode,
            operator=problem.operator,
            median_ms=timing.median_ms,
            p20_ms=timing.quantile_ms(0.2),
            p80_ms=timing.quantile_ms(0.8),
            min_ms=timing.min_ms,
            runs=len(timing.samples_ms),
            compile_s=self.compile_s[name],
            peak_mib=None if peak is None else peak / memory.MIB,
            kept_mib=None if kept is None else kept / memory.MIB,
            tokens_per_s=problem.tokens_of_mode.get(mode, problem.tokens) / seconds,
            tflops_per_s=None if flops is None else flops / seconds * 1e-12,
            gbytes_per_s=None if moved is None else moved / seconds * 1e-9,
            floor_ms=floor[0] if floor else None,
            floor_bound=floor[1] if floor else None,
            of_floor=floor[0] / timing.median_ms if floor else None,
            **self.gate_columns(name, mode),
            samples_ms=timing.samples_ms,
        )

    def missing_row(self, name: str, reason: str) -> Row:
        return Row(**self.common, provider=name, mode="", operator="", status="missing", note=reason)


def at_most(steps: int | None, problem: Problem) -> Problem:
    """The problem with a gate that looks at so many steps at most."""
    if steps is None or problem.steps is None or steps >= (problem.gate_steps or problem.steps):
        return problem
    yardstick = problem.yardstick_steps if problem.yardstick_steps and problem.yardstick_steps < steps else None
    return dataclasses.replace(problem, gate_steps=steps, yardstick_steps=yardstick)


def extra_verdict(problem: Problem, mode: str) -> Verdict:
    """The gate of what only one mode runs (a decoding step of a model)."""
    from m2rnn_compile.testing import compare

    got, truth, yardstick = problem.extra_gate[mode]()
    (row,) = compare({"logits": got}, {"logits": truth}, {"logits": yardstick})
    ratio = row.error / row.allowed if row.allowed > 0 else math.inf
    against = "fp64 of an uncached run over a short context"
    return Verdict(row.ok, row.ok, ratio, ratio, against, "" if row.ok else f"logits err {ratio:.1f}x what is allowed")


def run(plan: Plan, on_run: Progress = lambda what, done, total: None) -> Iterator[Row]:
    """Rows as they are finished: one for each shape, dtype, mode and provider, and one for each missing provider.

    Raises:
        ValueError: a provider that cannot be had; at once, not with the first row.
    """
    return _rows(plan, on_run, *choose(PROVIDERS, plan.providers, plan.kernel, plan.device))


def _rows(plan: Plan, on_run: Progress, chosen: list[Provider], missing: dict[str, str]) -> Iterator[Row]:
    clock = clock_for(plan.device)
    for shape in plan.shapes:
        for dtype in plan.dtypes:
            on_run(f"{shape.name} T{shape.T}: inputs", 0, 1)
            group = _Group(plan, shape, dtype, chosen)
            group.build_and_gate(on_run)
            for mode in plan.modes:
                yield from group.rows_of_mode(mode, clock, on_run)
            for name, reason in missing.items():
                yield group.missing_row(name, reason)
            del group
            if plan.device.type == "cuda":
                torch.cuda.empty_cache()
