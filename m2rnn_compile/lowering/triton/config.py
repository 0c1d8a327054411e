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


def stride_unit(outer: int, inner: int) -> int:
    """What the stride of the batch is known to be a multiple of at any T: that of a step is, and has T of them."""
    return 16 if outer % 16 == 0 and inner % 16 == 0 else 1


def forward_config(
    scans: int, K: int, BV: int, multiprocessors: int, gluon: bool = False, wide: bool = False
) -> LaunchConfig:
    """`scans` = sequences × heads. Few scans: split K further, so that every scheduler has a warp.

    A Gluon program may have several warps and adds up their parts of y itself, so that no partial sums of y are needed:
    two of 32 rows, which is best where there are scans enough, or, with few, two of 16 rows, which cost 5 % of time at
    long T beside two programs of one, and halve what the partial sums of y take of the memory.
    wide: the kernel of two warpgroups, which takes 64 rows.
    """
    if wide:
        return LaunchConfig(64, 4)
    few = scans < 2 * multiprocessors
    if BV <= 32:
        most = (32 if few else 64) if gluon else (16 if few else 32)
        rows = min(most, max(16, next_power_of_2(K)))
        return LaunchConfig(rows, max(1, rows // (16 if few else 32)))
    if BV <= 64 and gluon:
        rows = min(64, max(16, next_power_of_2(K)))
        return LaunchConfig(rows, rows // 16)
    return LaunchConfig(16, 1 if BV <= 64 else 4)


def shared_programs(scans: int, warps: int, BV: int, multiprocessors: int, hopper: bool) -> int | None:
    """How many programs share all scans out among them (`shares.py`), or None for a program to each scan.

    `scans` = sequences × heads × blocks of rows. Two warps of up to 255 registers live on a scheduler; with more scans
    than that, some schedulers would walk three while others walk two. Measured at V = 16 on an H200.
    """
    programs = 8 * multiprocessors // warps
    return programs if hopper and BV == 16 and scans > programs else None


def backward_config(scans: int, K: int, BV: int, multiprocessors: int, wide: bool = False) -> LaunchConfig:
    """Backward holds dW (BV × BV) in registers beside the state, so wide V spreads over more warps.

    wide: the kernel of two warpgroups, which takes 64 rows.
    """
    if wide:
        return LaunchConfig(64, 4)
    if BV <= 16:
        rows = 32 if scans >= 2 * multiprocessors else 16
        rows = min(rows, max(16, next_power_of_2(K)))
        return LaunchConfig(rows, 1)
    return LaunchConfig(16, {32: 1, 64: 4}.get(BV, 8))
