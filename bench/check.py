# SPDX-License-Identifier: Apache-2.0
"""`python -m bench check`: is every implementation as accurate as the contract says, and are its bits reproducible?

The rule (m2rnn_compile.testing.judge): for every output and gradient, as a whole and per time slice, the error against
the fp64 oracle is at most twice that of a low-precision eager run, plus one rounding of the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from m2rnn_compile.testing import ScanInputs, compare, make_inputs, oracle, run_low_precision
from m2rnn_compile.testing import run as run_scan

from . import impls
from .shapes import Shape

# Above this the oracle keeps checkpoints instead of the autograd graph of the whole loop.
GRAPH_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class CheckConfig:
    """What to check."""

    shapes: Sequence[Shape]
    dtypes: Sequence[torch.dtype]
    impl_names: Sequence[str] | None
    clips: Sequence[float | None]
    device: torch.device
    repeats: int = 3
    seed: int = 0
    xma: str | None = None


def oracle_impl(shape: Shape) -> str:
    """How to run the oracle: through autograd where its graph fits (six fp64 states a step), else checkpointed."""
    return "reference" if 6 * 8 * shape.B * shape.T * shape.N * shape.K * shape.V <= GRAPH_BYTES else "eager"


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal bit for bit, NaNs included."""
    return all(torch.equal(a[n].contiguous().view(torch.uint8), b[n].contiguous().view(torch.uint8)) for n in a)


def check_scan(
    inputs: ScanInputs, scan: impls.Scan, truth: dict[str, Tensor], eager: dict[str, Tensor], repeats: int
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


def run(
    config: CheckConfig, on_run: Callable[[str, int, int], None] = lambda what, done, total: None
) -> list[dict[str, Any]]:
    """Check everything asked for. One row for each shape, dtype, clip and implementation.

    Raises:
        ValueError: an implementation that cannot be had.
    """
    rows: list[dict[str, Any]] = []
    total = len(config.shapes) * len(config.dtypes) * len(config.clips)
    done = 0
    for shape in config.shapes:
        for dtype in config.dtypes:
            for clip in config.clips:
                inputs = make_inputs(
                    **shape.make_inputs_arguments(),
                    dtype=dtype,
                    device=config.device,
                    seed=config.seed,
                    initial_state=True,
                    state_grad_clip=clip,
                )
                scans = impls.resolve(config.impl_names, inputs, config.xma)
                where = f"{shape.name} {impls.dtype_name(dtype)} clip {clip}"
                on_run(f"{where}: oracle", done, total)
                truth, eager = oracle(inputs, impl=oracle_impl(shape)), run_low_precision(inputs)
                for name, scan in scans.items():
                    on_run(f"{where}: {name}", done, total)
                    common = {
                        "shape": shape.as_dict(),
                        "dtype": impls.dtype_name(dtype),
                        "clip": clip,
                        "device": config.device.type,
                        "impl": name,
                        "oracle": oracle_impl(shape),
                    }
                    rows.append({**common, **check_scan(inputs, scan, truth, eager, config.repeats)})
                done += 1
                on_run(where, done, total)
    return rows
