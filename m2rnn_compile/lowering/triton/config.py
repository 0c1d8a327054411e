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


def forward_config(
    scans: int, K: int, BV: int, multiprocessors: int, gluon: bool = False, wide: bool = False
) -> LaunchConfig:
    """`scans` = sequences × heads. Few scans: split K further, so that every scheduler has a warp.

    A Gluon program may have several warps, of 16 rows at least, and adds up their parts of y itself. Two of 16 rows
    cost 5 % of time at long T beside two programs of one, and halve what the partial sums of y take of the memory.
    wide: the kernel of two warpgroups, which takes 64 rows.
    """
    if wide:
        return LaunchConfig(64, 4)
    few = scans < 2 * multiprocessors
    if BV <= 32:
        rows = min(16 if few and not gluon else 32, max(16, next_power_of_2(K)))
        return LaunchConfig(rows, rows // 16 if few else 1)
    if BV <= 64 and gluon:
        rows = min(64, max(16, next_power_of_2(K)))
        return LaunchConfig(rows, rows // 16)
    return LaunchConfig(16, 1 if BV <= 64 else 4)


def backward_config(scans: int, K: int, BV: int, multiprocessors: int, wide: bool = False) -> LaunchConfig:
    """Backward holds dW (BV × BV) in registers beside the state, so wide V spreads over more warps.

    168 registers let three warps of 32 rows live on a scheduler; what spills is outside the loops over steps.
    wide: the kernel of two warpgroups, which takes 64 rows.
    """
    if wide:
        return LaunchConfig(64, 4)
    if BV <= 16:
        rows = 32 if scans >= 2 * multiprocessors else 16
        rows = min(rows, max(16, next_power_of_2(K)))
        return LaunchConfig(rows, 1, 168 if rows == 32 else None)
    return LaunchConfig(16, {32: 1, 64: 4}.get(BV, 8))
