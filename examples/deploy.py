# SPDX-License-Identifier: Apache-2.0
"""Compile a model that `make demo` trained and exported ahead of time, and run it without this library:

    make demo ARGS="--out runs/demo"
    python examples/deploy.py runs/demo

Writes model.aoti.pt2 (AOTInductor: the compiled model with its weights) and libm2rnn_runtime.so (the op, in C++) into
the folder. Then a fresh process, in which m2rnn_compile cannot be imported, loads the two and compares the logits with
those that the demo recorded in training's process.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch

import m2rnn_compile  # noqa: F401  registers the op that the exported program calls
from m2rnn_compile.deploy import build_runtime

SERVE = """
import sys, time
sys.modules["m2rnn_compile"] = None  # an import of it would fail
import torch
from safetensors.torch import load_file
folder = sys.argv[1]
torch.ops.load_library(folder + "/libm2rnn_runtime.so")
model = torch._inductor.aoti_load_package(folder + "/model.aoti.pt2")
recorded = load_file(folder + "/expected.safetensors")
for i in range(len(recorded) // 2):
    tokens, expected = recorded[f"tokens.{i}"], recorded[f"logits.{i}"]
    start = time.perf_counter()
    logits = model(tokens)
    ms = 1e3 * (time.perf_counter() - start)
    print(f"{list(tokens.shape)}: max abs difference {float((logits - expected).abs().max()):.1e}, {ms:.1f} ms")
"""


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1], "model.pt2").is_file():
        sys.exit("usage: python examples/deploy.py FOLDER, the folder of a finished `make demo` (it holds model.pt2)")
    folder = Path(sys.argv[1])
    start = time.perf_counter()
    program = torch.export.load(folder / "model.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.aoti.pt2"))
    print(f"compiled ahead of time in {time.perf_counter() - start:.0f} s: {folder / 'model.aoti.pt2'}")
    start = time.perf_counter()
    build_runtime(folder / "libm2rnn_runtime.so")
    print(f"built the op in {time.perf_counter() - start:.0f} s: {folder / 'libm2rnn_runtime.so'}")
    print("a process without m2rnn_compile says:", flush=True)
    subprocess.run([sys.executable, "-c", SERVE, str(folder)], check=True)


if __name__ == "__main__":
    main()
