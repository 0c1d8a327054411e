# SPDX-License-Identifier: Apache-2.0
"""`python -m bench check`: is every implementation as accurate as the contract says, and are its bits reproducible?

The rule (m2rnn_compile.testing.judge): for every output and gradient, as a whole and per time slice, the error against
the fp64 oracle is at most twice that of a low-precision eager run, plus one rounding of the result.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from m2rnn_compile import m2rnn
from m2rnn_compile.ops.registry import IMPLEMENTATIONS
from m2rnn_compile.testing import ScanInputs, compare, make_inputs, oracle, run_low_precision
from m2rnn_compile.testing import run as run_scan

from . import environment
from .measure import HEADS, why_failed
from .providers import PROVIDERS, Provider, choose, upstream
from .providers.ours import oracle_impl
from .rows import Row
from .shapes import Shape

Scan = Callable[..., tuple[Tensor, Tensor | None]]


@dataclasses.dataclass(frozen=True)
class CheckPlan:
    """What to check."""

    shapes: Sequence[Shape]
    dtypes: Sequence[torch.dtype]
    providers: Sequence[str] | None
    clips: Sequence[float | None]
    device: torch.device
    repeats: int = 3
    seed: int = 0
    commit: str | None = None


def scan_of(name: str) -> Scan:
    """The scan of a provider, with the arguments of `m2rnn`."""
    if name == "xma":
        return upstream.scan
    if name.endswith("-compile"):
        impl = name.removesuffix("-compile")
        return torch.compile(functools.partial(m2rnn, impl=impl), fullgraph=True, dynamic=False)
    return functools.partial(m2rnn, impl=name)


def checkable() -> list[Provider]:
    """Providers that compute M²RNN, initial and final state included."""
    names = {*IMPLEMENTATIONS, *(f"{impl}-compile" for impl in IMPLEMENTATIONS if impl != "reference"), "xma"}
    return [provider for provider in PROVIDERS if provider.name in names]


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal bit for bit, NaNs included."""
    return all(torch.equal(a[n].contiguous().view(torch.uint8), b[n].contiguous().view(torch.uint8)) for n in a)


def check_scan(
    inputs: ScanInputs, scan: Scan, truth: dict[str, Tensor], eager: dict[str, Tensor], repeats: int
) -> dict[str, Any]:
    """Judge one implementation on one set of inputs: per tensor the whole's error and the worst slice; determinism."""
    first = run_scan(inputs, scan)
    tensors: dict[str, dict[str, Any]] = {}
    for row in compare(first, truth, eager):
        entry = tensors.setdefault(row.name, {"ok": True, "worst_ratio": 0.0, "worst_slice": row.slice})
        if row.slice == "all":
            entry.update(error=row.error, eager_error=row.eager_error, allowed=row.allowed)
        # NaN fails the rule and must not lose against a number.
        ratio = row.error / row.allowed if row.allowed > 0 else (0.0 if row.error == 0 else float("inf"))
        if not ratio <= entry["worst_ratio"]:
            entry.update(worst_ratio=ratio, worst_slice=row.slice)
        entry["ok"] = entry["ok"] and row.ok
    different = sum(not same_bits(first, run_scan(inputs, scan)) for _ in range(repeats))
    return {
        "tensors": tensors,
        "accurate": all(entry["ok"] for entry in tensors.values()),
        "repeats": repeats,
        "different_repeats": different,
        "ok": all(entry["ok"] for entry in tensors.values()) and different == 0,
    }


def _row(plan: CheckPlan, shape: Shape, dtype: torch.dtype, clip: float | None, name: str) -> Row:
    """The row of one check, without its outcome."""
    return Row(
        kernel="op",
        provider=name,
        mode="check",
        dtype=str(dtype).removeprefix("torch."),
        **{size: getattr(shape, size) for size in "BTNKV"},
        shape=shape.name,
        config={"clip": clip, **{heads: getattr(shape, heads) for heads in HEADS}, "seed": plan.seed},
        **environment.of_row(plan.device, plan.commit),
    )


def run(plan: CheckPlan, on_run: Callable[[str, int, int], None] = lambda what, done, total: None) -> Iterator[Row]:
    """Check everything asked for. One row for each shape, dtype, clip and provider; status refused where it fails.

    Raises:
        ValueError: a provider that cannot be had; at once, not with the first row.
    """
    names = None if plan.providers is None else list(plan.providers)
    if names is None:  # ours: the rule is what we promise, a peer is held to it by name only
        # Eager is judged too, and compiling for each small shape would take most of the time.
        names = ["triton"] if plan.device.type == "cuda" else ["reference", "eager", "cpp"]
        known = {provider.name: provider for provider in checkable()}
        names = [name for name in names if known[name].why_not(plan.device) is None]
    chosen, _ = choose(checkable(), names, "op", plan.device)
    return _rows(plan, on_run, chosen)


def _rows(plan: CheckPlan, on_run: Callable[[str, int, int], None], chosen: Sequence[Provider]) -> Iterator[Row]:
    total = len(plan.shapes) * len(plan.dtypes) * len(plan.clips)
    done = 0
    for shape in plan.shapes:
        for dtype in plan.dtypes:
            for clip in plan.clips:
                inputs = make_inputs(
                    **shape.make_inputs_arguments(),
                    dtype=dtype,
                    device=plan.device,
                    seed=plan.seed,
                    initial_state=True,
                    state_grad_clip=clip,
                )
                where = f"{shape.name} {str(dtype).removeprefix('torch.')} clip {clip}"
                on_run(f"{where}: oracle", done, total)
                truth, eager = oracle(inputs, impl=oracle_impl(shape)), run_low_precision(inputs)
                for provider in chosen:
                    on_run(f"{where}: {provider.name}", done, total)
                    row = _row(plan, shape, dtype, clip, provider.name)
                    try:
                        outcome = check_scan(inputs, scan_of(provider.name), truth, eager, plan.repeats)
                    except Exception as e:  # out of memory, or inputs that a provider does not take
                        yield dataclasses.replace(row, **why_failed(e))
                        continue
                    ratio = max(entry["worst_ratio"] for entry in outcome["tensors"].values())
                    yield dataclasses.replace(
                        row,
                        status="ok" if outcome["ok"] else "refused",
                        gate=f"fp64 oracle ({oracle_impl(shape)})",
                        error_ratio=ratio if math.isfinite(ratio) else None,
                        config=row.config | {n: outcome[n] for n in ("repeats", "different_repeats", "tensors")},
                    )
                done += 1
                on_run(where, done, total)
