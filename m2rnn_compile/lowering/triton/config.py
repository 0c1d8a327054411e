# SPDX-License-Identifier: Apache-2.0
"""Pinned launch configurations: a pure function of shape class and number of multiprocessors, never of T.

Why these values: docs/kernel-notes.md, dated.
"""

from __future__ import annotations

from typing import NamedTuple


class LaunchConfig(NamedTuple):
    """Rows of the state per program, warps per program, and the most registers of a thread (None: the compiler's)."""

    rows: int
    warps: int
    registers: int | None = None


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def forward_config(scans: int, K: int, BV: int, multiprocessors: int) -> LaunchConfig:
    """`scans` = sequences × heads. Few scans: split K further, so that every scheduler has a warp."""
    if BV <= 32:
        rows = 32 if scans >= 2 * multiprocessors else 16
        return LaunchConfig(min(rows, max(16, next_power_of_2(K))), 1)
    return LaunchConfig(16, 1 if BV <= 64 else 4)


def backward_config(scans: int, K: int, BV: int, multiprocessors: int) -> LaunchConfig:
    """Backward holds dW (BV × BV) in registers beside the state, so wide V spreads over more warps.

    168 registers let three warps of 32 rows live on a scheduler; what spills is outside the loops over steps.
    """
    if BV <= 16:
        rows = 32 if scans >= 2 * multiprocessors else 16
        rows = min(rows, max(16, next_power_of_2(K)))
        return LaunchConfig(rows, 1, 168 if rows == 32 else None)
    return LaunchConfig(16, {32: 1, 64: 4}.get(BV, 8))
