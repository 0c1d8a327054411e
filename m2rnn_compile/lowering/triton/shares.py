# SPDX-License-Identifier: Apache-2.0
"""Scans shared out evenly among programs, in Gluon: a scan may begin in one program and be finished by another.

A GPU runs so many warps at once, say P, and a batch may have 1.27 P scans: with a program for each, some schedulers
walk three scans while others walk two, and all wait for the slowest. Instead P programs take P equal shares of all
scans' time, laid end to end:

    share p = units [p U R / P, (p + 1) U R / P)  of R scans, U units of time each, unit r U + u = unit u of scan r

A share is the end of one scan, maybe whole scans, and the beginning of another. It is walked from its last scan to its
first: so the beginning that another program waits for comes first, and a program waits only for one of lower number,
which is started before it. The state is handed over in fp32 through memory, so bits are those of an undivided scan.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def share(p, programs, total):
    """[first, last) of program p, of `total` units."""
    return p * total // programs, (p + 1) * total // programs


@gluon.jit
def all_threads():
    """Every thread's writes before this are seen by all before its writes after, and likewise for reads."""
    NW: gl.constexpr = gl.num_warps()
    lane = gl.arange(0, 32 * NW, gl.BlockedLayout([1], [32], [NW], [0]))
    gl.inline_asm_elementwise(
        "{ fence.acq_rel.gpu; bar.sync 0; mov.b32 $0, $1; }", "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def hand_over(flag):
    """What this program stored may be read by whoever waits for `flag`."""
    all_threads()
    gl.atomic_xchg(flag, 1)


@gluon.jit
def wait_for(flag):
    while gl.atomic_add(flag, 0) == 0:
        pass
    all_threads()
