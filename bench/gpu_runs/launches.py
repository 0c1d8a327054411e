# SPDX-License-Identifier: Apache-2.0
"""Our kernels by themselves at the benchmark's shapes, launch configuration by launch configuration.

    python -m bench.gpu_runs.launches --shape A,B --forward 64,2 64,1:4 64,1:8 --backward 32,1 --out kernels.jsonl

A configuration is rows,warps[,registers][:programs a multiprocessor that share the scans out]. Times are medians, taken
as the benchmark takes them; the kernels of one call, by the profiler, stand beside them. Forward's
results are checked against the pinned configuration's: equal to the rounding of partial sums, or the row says how far.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from m2rnn_compile.testing import make_inputs

from ..environment import of_row
from ..shapes import PRESETS
from ..timing import clock_for, measure_interleaved
from .fusion import kernels_of


class Choice(NamedTuple):
    """A launch configuration, and how many programs of a multiprocessor share the scans out (None: as pinned)."""

    text: str
    config: tuple[int, ...]
    programs: int | None


def choice(text: str) -> Choice:
    """Read rows,warps[,registers][:programs].

    Raises:
        ValueError: it is none.
    """
    config, _, programs = text.partition(":")
    numbers = tuple(int(x) for x in config.split(","))
    if not 2 <= len(numbers) <= 3 or min(numbers) < 1 or (programs and int(programs) < 1):
        raise ValueError(text)
    return Choice(text, numbers, int(programs) if programs else None)


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from m2rnn_compile.lowering import triton as lowering

    clock = clock_for(torch.device("cuda"))
    pinned = lowering.shared_programs
    launched: list[int | None] = []  # how many programs share the scans out; None: one to a scan

    def shared(per: int | None, scans: int, warps: int, BV: int, multiprocessors: int, hopper: bool) -> int | None:
        programs = pinned(scans, warps, BV, multiprocessors, hopper)
        if per is not None:
            programs = per * multiprocessors // warps if hopper and scans > per * multiprocessors // warps else None
        launched.append(programs)
        return programs

    for name in args.shape:
        s = PRESETS[name]
        x = make_inputs(s.B, s.T, s.N, s.K, s.V, dtype=torch.bfloat16, device="cuda", state_grad_clip=1.0)
        inputs = (x.q, x.k, x.v, x.f, x.W, None, None)
        y, state, checkpoints = lowering.scan(*inputs, 1.0, 64)
        dy = torch.randn_like(y)
        for direction in ("forward", "backward"):
            for c in [None, *getattr(args, direction)]:
                config = c and lowering.LaunchConfig(*c.config)
                lowering.shared_programs = functools.partial(shared, c and c.programs)
                call: Callable[[], tuple[torch.Tensor, ...]]
                if direction == "forward":
                    call = functools.partial(lowering.scan, *inputs, 1.0, 64, config=config)
                else:
                    call = functools.partial(
                        lowering.scan_backward, dy, None, *inputs, checkpoints, 1.0, 64, config=config
                    )
                row: dict[str, Any] = {"kind": "kernels", "shape": name, "direction": direction}
                row["config"] = "pinned" if c is None else c.text
                try:
                    if direction == "forward":
                        got = call()
                        row["differs"] = [
                            ((a - b).norm() / b.norm()).item() for a, b in zip(got, (y, state), strict=False)
                        ]
                    variants = {"it": functools.partial(functools.partial, call)}
                    timed = measure_interleaved(variants, clock, runs=args.runs, budget_s=20.0)
                    row["median_ms"] = timed["it"].median_ms
                    times: dict[str, float] = {}
                    for kernel, us in kernels_of(call):
                        times[kernel[:40]] = times.get(kernel[:40], 0.0) + us / 1e3
                    row["programs"] = launched[-1] if launched else None
                    row["kernels_ms"] = {k: round(times[k], 4) for k in sorted(times, key=times.__getitem__)[:-5:-1]}
                except RuntimeError as e:  # registers or shared memory that a program cannot have
                    row["failed"] = f"{type(e).__name__}: {str(e).splitlines()[0]}"
                finally:
                    lowering.shared_programs = pinned
                yield row


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_runs.launches", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=lambda text: text.split(","), default=["A", "B"], metavar="A,B,C,D")
    for direction in ("forward", "backward"):
        parser.add_argument(
            f"--{direction}", type=choice, nargs="*", default=[], metavar="ROWS,WARPS[,REGISTERS][:PROGRAMS]"
        )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--commit", help="where the copy has no history")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    unknown = [name for name in args.shape if name not in PRESETS]
    if unknown:
        parser.error(f"unknown shape {', '.join(unknown)}; there are {', '.join(PRESETS)}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device here")
    machine = of_row(torch.device("cuda"), args.commit)
    for row in rows(args):
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps({**row, **machine}) + "\n")
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
