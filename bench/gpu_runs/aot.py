# SPDX-License-Identifier: Apache-2.0
"""Which AOTInductor packages load in a process of their own: a linear layer, our layer as it is, our layer fused.

    python -m bench.gpu_runs.aot --out aot.jsonl     # all three side by side, a minute or two each, mostly compiling

One row a package: seconds to compile it, and how the process that loads it ended, with CUDA started before or not.
Where that process dies and gdb or cuda-gdb is installed, the row holds the innermost frames.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from m2rnn_compile import M2RNN, enable_fusion

from ..environment import of_row

MODELS = {
    "linear": lambda **options: torch.nn.Linear(128, 128, **options),
    "layer": lambda **options: M2RNN(128, num_heads=12, **options),
    "layer, fused": lambda **options: M2RNN(128, num_heads=12, **options),
}
LOAD = """
import sys, torch
import m2rnn_compile
package, pairs, early = sys.argv[1:]
if early == "early":
    torch.cuda.init()
model = torch._inductor.aoti_load_package(package)
print("loaded", flush=True)
for x, y in torch.load(pairs):
    assert (model(x) - y).norm() <= 1e-4 * y.norm()
print("agrees", flush=True)
"""


def package(name: str, device: str, folder: Path) -> float:
    """Write model.pt2 and pairs.pt (inputs and results) to the folder; returns the seconds it took."""
    enable_fusion(name.endswith("fused"), devices=(device,))
    torch.manual_seed(0)
    model = MODELS[name](device=device).eval()
    x = torch.randn(3, 40, 128, device=device)
    begin = time.perf_counter()
    with torch.no_grad():
        dims = {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}
        program = torch.export.export(model, (x,), dynamic_shapes=(dims,))
        other = x[:2, :33].contiguous()
        torch.save([(x, model(x)), (other, model(other))], folder / "pairs.pt")
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    return time.perf_counter() - begin


def load(folder: Path, early: bool) -> dict[str, Any]:
    """How a process that loads and runs the package ends."""
    command = [sys.executable, "-X", "faulthandler", "-c", LOAD]
    command += [str(folder / "model.pt2"), str(folder / "pairs.pt"), "early" if early else "late"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return {"returncode": None, "said": ["still", "running", "after", "120", "s"]}
    row: dict[str, Any] = {"returncode": done.returncode, "said": done.stdout.split()}
    if done.returncode != 0:
        row["stderr"] = done.stderr[-2000:]
        debugger = shutil.which("gdb") or shutil.which("cuda-gdb")
        if done.returncode < 0 and debugger:
            debug = [debugger, "-batch", "-ex", "run", "-ex", "bt 25", "--args", *command]
            frames = subprocess.run(["timeout", "120", *debug], capture_output=True, text=True)
            row["frames"] = frames.stdout[-4000:]
    return row


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_runs.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--only", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="MODEL", help="of these"
    )
    parser.add_argument("--commit", help="where the copy has no history")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu runs anywhere")
    if len(args.only) > 1:  # each in a process of its own, side by side
        rest = ["--device", args.device, *(["--commit", args.commit] if args.commit else [])]
        rest += ["--out", str(args.out)] if args.out else []
        me = [sys.executable, "-m", "bench.gpu_runs.aot", *rest]
        return max(abs(p.wait()) for p in [subprocess.Popen([*me, "--only", name]) for name in args.only])
    (name,) = args.only
    with tempfile.TemporaryDirectory() as folder:
        seconds = package(name, args.device, Path(folder))
        row: dict[str, Any] = {"kind": "aot", "model": name, "compile_s": round(seconds, 1)}
        row["late"] = load(Path(folder), early=False)
        if args.device == "cuda":
            row["early"] = load(Path(folder), early=True)
    line = json.dumps(row | of_row(torch.device(args.device), args.commit))
    if args.out:
        with args.out.open("a") as file:
            file.write(line + "\n")
    print(line, flush=True)
    return int(row["late"]["returncode"] != 0)


if __name__ == "__main__":
    raise SystemExit(main())
