# SPDX-License-Identifier: Apache-2.0
"""The tolerance rule: error against the fp64 oracle ≤ 2 × that of a low-precision eager run, whole and per time slice.

Added to the right-hand side is one eps of the result's dtype: rounding every element of an exact result to that dtype
gives a relative Frobenius error of at most eps / 2, and such a result must pass even where the eager run is luckier.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

TIME_MAJOR = ("y", "dq", "dk", "dv", "df", "dx")  # results with a time dimension (1), judged per slice too
FACTOR = 2.0


class Comparison(NamedTuple):
    """One tensor (or one time slice of it) against the oracle; errors are relative to the oracle's norm (if not 0)."""

    name: str
    slice: str
    error: float
    eager_error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed < math.inf  # False for NaN, and where the eager run sets no bar at all


def compare(
    got: dict[str, Tensor], truth: dict[str, Tensor], eager: dict[str, Tensor], *, slices: int = 8
) -> list[Comparison]:
    """Judge every tensor of `truth`, and `slices` equal parts of time of those that have time."""
    rows: list[Comparison] = []
    for name, t in truth.items():
        if not got[name].shape == eager[name].shape == t.shape:  # would broadcast below
            shapes = ", ".join(f"{who} {tuple(x[name].shape)}" for who, x in (("got", got), ("eager", eager)))
            rows.append(Comparison(name, f"shape: {shapes}, truth {tuple(t.shape)}", math.nan, 0.0, 0.0))
            continue
        parts = [("all", slice(None))]
        if name in TIME_MAJOR and t.shape[1] >= slices:
            edges = [i * t.shape[1] // slices for i in range(slices + 1)]
            parts += [(f"t {a}:{b}", slice(a, b)) for a, b in zip(edges, edges[1:], strict=False)]
        for label, part in parts:
            pick = (slice(None), part) if label != "all" else ()
            a, b, c = (x[name][pick].double().to(t.device) for x in (got, eager, truth))
            size = float(c.norm())
            norm = size if size != 0 else 1.0
            rounding = torch.finfo(got[name].dtype).eps if size != 0 else 0.0  # zero is not rounded
            eager_error = float((b - c).norm()) / norm
            rows.append(
                Comparison(name, label, float((a - c).norm()) / norm, eager_error, FACTOR * eager_error + rounding)
            )
    return rows


def assert_accurate(
    got: dict[str, Tensor], truth: dict[str, Tensor], eager: dict[str, Tensor], *, slices: int = 8
) -> None:
    """Raise AssertionError naming every tensor and slice that breaks the rule."""
    bad = [row for row in compare(got, truth, eager, slices=slices) if not row.ok]
    if bad:
        lines = (
            f"{r.name} [{r.slice}]: error {r.error:.3e}, allowed {r.allowed:.3e}, eager {r.eager_error:.3e}"
            for r in bad
        )
        raise AssertionError("less accurate than the rule allows:\n  " + "\n  ".join(lines))
