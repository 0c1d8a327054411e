# SPDX-License-Identifier: Apache-2.0
"""`python -m bench op`: time and memory of the scan, implementations side by side."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from m2rnn_compile.testing import ScanInputs, make_inputs

from . import floors, impls
from .shapes import Shape
from .timing import CudaClock, Variant, WallClock, measure_interleaved

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class OpConfig:
    """What to measure."""

    shapes: Sequence[Shape]
    dtypes: Sequence[torch.dtype]
    impl_names: Sequence[str] | None
    passes: Sequence[str]
    device: torch.device
    baseline: str | None = None
    clip: float | None = 1.0
    runs: int = 20
    min_runs: int = 3
    budget_s: float = 30.0
    seed: int = 0
    xma: str | None = None


def rotations(nbytes: int, l2_bytes: int) -> int:
    """How many copies of the inputs to go round, so that the last-level cache never still holds the next one's."""
    return max(2, min(16, math.ceil(2 * l2_bytes / max(nbytes, 1))))


def make_variant(scan: impls.Scan, sets: Sequence[ScanInputs], which: str) -> Variant:
    """One call of a pass on the next set of inputs. Training passes record the graph; only backward also runs it."""
    leaves = [
        {n: x.detach().requires_grad_(which != "inference") for n, x in s.named_inputs().items()} for s in sets
    ]

    def call(number: int) -> object:
        inputs, args = sets[number % len(sets)], leaves[number % len(sets)]
        with torch.set_grad_enabled(which != "inference"):
            result = scan(**args, cu_seqlens=inputs.cu_seqlens, state_grad_clip=inputs.state_grad_clip)
            if which != "forward+backward":
                return result
            return result, torch.autograd.grad(result[0], list(args.values()), inputs.dy)

    return call


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Largest amount of GPU memory a call holds beyond what was allocated before it; None on a CPU."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def run(
    config: OpConfig, on_run: Callable[[str, int, int], None] = lambda what, done, total: None
) -> list[dict[str, Any]]:
    """Measure everything asked for. One row for each shape, dtype, pass and implementation.

    Raises:
        ValueError: an implementation or baseline that cannot be had.
    """
    rows: list[dict[str, Any]] = []
    for shape in config.shapes:
        for dtype in config.dtypes:
            inputs = make_inputs(
                **shape.make_inputs_arguments(),
                dtype=dtype,
                device=config.device,
                seed=config.seed,
                state_grad_clip=config.clip,
                dfinal_state=False,
            )
            scans = impls.resolve(config.impl_names, inputs, config.xma)
            baseline = choose_baseline(config.baseline, list(scans))
            sets = _copies(inputs, config.device)
            for which in config.passes:
                rows += _measure_pass(config, shape, dtype, which, scans, sets, baseline, on_run)
    return rows


def choose_baseline(asked: str | None, names: Sequence[str]) -> str:
    """What ratios refer to: what was asked for, else upstream, else the autograd loop, else the first."""
    if asked is not None and asked not in names:
        raise ValueError(f"--baseline {asked!r} is not among the implementations to run: {', '.join(names)}")
    return asked or next((name for name in ("xma", "reference") if name in names), names[0])


def _copies(inputs: ScanInputs, device: torch.device) -> list[ScanInputs]:
    if device.type != "cuda":
        return [inputs]
    tensors = [x for x in (*inputs.named_inputs().values(), inputs.dy) if x is not None]
    l2 = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 * MIB))
    count = rotations(sum(x.nbytes for x in tensors), l2)

    def clone() -> ScanInputs:
        fields: dict[str, Any] = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
        fields = {n: x.clone() if isinstance(x, Tensor) else x for n, x in fields.items()}
        return ScanInputs(**fields)

    return [inputs, *(clone() for _ in range(count - 1))]


def _measure_pass(
    config: OpConfig,
    shape: Shape,
    dtype: torch.dtype,
    which: str,
    scans: dict[str, impls.Scan],
    sets: Sequence[ScanInputs],
    baseline: str,
    on_run: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    variants: dict[str, Variant] = {}
    peaks: dict[str, int | None] = {}
    failed: dict[str, str] = {}
    for name, scan in scans.items():
        variant = make_variant(scan, sets, which)
        on_run(f"{shape.name} {which}: {name}, first call", 0, 1)
        try:
            variant(0)  # compiles; the second call's memory is the steady state's
            peaks[name] = peak_extra_bytes(lambda variant=variant: variant(1), config.device)  # type: ignore[misc]
        except torch.OutOfMemoryError:
            failed[name] = "out of memory"
            torch.cuda.empty_cache()
        else:
            variants[name] = variant
    timings = measure_interleaved(
        variants,
        CudaClock() if config.device.type == "cuda" else WallClock(),
        runs=config.runs,
        min_runs=config.min_runs,
        budget_s=config.budget_s,
        warmup=1,
        on_run=lambda name, done, total: on_run(f"{shape.name} {which}: {name}", done, total),
    )
    known = floors.find_device(torch.cuda.get_device_name(config.device)) if config.device.type == "cuda" else None
    floor = floors.floor_of_pass(shape, impls.dtype_name(dtype), which, known)
    common: dict[str, Any] = {
        "shape": shape.as_dict(),
        "dtype": impls.dtype_name(dtype),
        "pass": which,
        "device": config.device.type,
        "clip": config.clip,
        "baseline": baseline,
        "input_sets": len(sets),
        "floor_ms": floor[0] if floor else None,
        "floor_bound": floor[1] if floor else None,
    }
    rows = []
    for name in scans:
        if name in failed:
            rows.append({**common, "impl": name, "error": failed[name]})
            continue
        timing, peak = timings[name], peaks[name]
        base = timings.get(baseline)
        rows.append(
            {
                **common,
                "impl": name,
                "runs": len(timing.samples_ms),
                "median_ms": timing.median_ms,
                "min_ms": timing.min_ms,
                "max_ms": timing.max_ms,
                "samples_ms": list(timing.samples_ms),
                "speedup": base.median_ms / timing.median_ms if base else None,
                "peak_extra_mib": None if peak is None else peak / MIB,
                "floor_fraction": floor[0] / timing.median_ms if floor else None,
            }
        )
    return rows
