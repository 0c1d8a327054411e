# SPDX-License-Identifier: Apache-2.0
"""Bits over 50 repeats: results and all gradients, on a GPU while a second stream is busy.

    python -m bench.gpu_runs.repeats                                       # A to D, on a GPU
    python -m bench.gpu_runs.repeats B1,T64,N2,K16,V16 --impl cpp --device cpu
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import torch

from m2rnn_compile.testing import make_inputs, run

from ..shapes import GPU_PRESETS, Shape, parse_shape


def repeat(shape: Shape, repeats: int, impl: str, device: torch.device) -> dict[str, object]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    arguments = shape.make_inputs_arguments()
    x = make_inputs(**arguments, dtype=dtype, device=device, state_grad_clip=1.0, seed=1)
    side = torch.cuda.Stream() if device.type == "cuda" else None
    square = torch.randn(4096, 4096, device=device) if side is not None else None
    first, differ = run(x, impl=impl), set()
    for _ in range(repeats):
        if side is not None and square is not None:
            with torch.cuda.stream(side):
                square @ square
        again = run(x, impl=impl)
        differ |= {name for name in first if not torch.equal(first[name], again[name])}
    finite = all(bool(torch.isfinite(r).all()) for r in first.values())
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {
        "kind": "repeats", "shape": str(shape), "dtype": str(dtype), "impl": impl, "repeats": repeats,
        "differ": sorted(differ), "finite": finite, "device": name, "torch": torch.__version__,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_runs.repeats", description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", default=list(GPU_PRESETS), metavar="SHAPE", help="presets or sizes")
    parser.add_argument("--impl", default="triton")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args(argv)
    try:
        shapes = [parse_shape(text) for text in args.shapes]
    except ValueError as e:
        parser.error(str(e))
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu with an --impl of the CPU runs anywhere")
    failed = False
    for shape in shapes:
        row = repeat(shape, args.repeats, args.impl, args.device)
        print(json.dumps(row), flush=True)
        failed |= bool(row["differ"]) or not row["finite"]
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
