# SPDX-License-Identifier: Apache-2.0
"""A deep model's cost from shallow ones: a straight line in the depth for each kind of layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

ASSUMED = (
    "time and peak memory are linear in the number of layers of a kind; a layer costs the same wherever it stands; the "
    "attention of hybrids costs what the transformer's does, which has RoPE; one "
    "card holding everything (no sharding, offloading or recomputation, no communication), whether or not it would fit"
)


class Line(NamedTuple):
    """``base + layer · depth`` through the shallowest and the deepest model measured.

    Attributes:
        base: what does not grow (embedding, head and loss, their share of the optimizer).
        layer: of one layer.
        miss: by how much, relatively, the line through the two shallowest misses the deepest: a trial of
            extrapolating; None if there were only two.
    """

    base: float
    layer: float
    miss: float | None


def line(measured: Mapping[int, float]) -> Line:
    """The line through costs by depth.

    Raises:
        ValueError: fewer than two depths.
    """
    if len(measured) < 2:
        raise ValueError(f"a line takes two depths, got {sorted(measured)}")
    first, second, *_ = sorted(measured)
    deepest = max(measured)
    slope = lambda to: (measured[to] - measured[first]) / (to - first)
    foretold = measured[first] + (deepest - first) * slope(second)
    miss = foretold / measured[deepest] - 1 if len(measured) > 2 else None
    return Line(measured[first] - first * slope(deepest), slope(deepest), miss)


def extrapolate(pattern: str, lines: Mapping[str, Line]) -> float | None:
    """The cost of a model, the base being the mean of its kinds weighted by their layers; None if a kind is unknown."""
    if not set(pattern) <= set(lines):
        return None
    return sum(lines[letter].layer + lines[letter].base / len(pattern) for letter in pattern)
