# SPDX-License-Identifier: Apache-2.0
"""Carry exported models to processes that do not import `m2rnn_compile`.

An exported program, and an AOTInductor package made of one, call the op `m2rnn::scan` (decoding: `m2rnn::step`) by
name. Whoever runs them registers these ops first, in one of two ways:

- Python with this library: ``import m2rnn_compile``. The only way on CUDA, where the kernels are Triton's.
- Python or C++ without it, on a CPU: load the shared library that `build_runtime` makes.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import torch

from .lowering.cpu.build import BASE_FLAGS, BUILD_TIMEOUT_S, BuildError, find_compiler

SOURCE = Path(__file__).parent / "lowering" / "cpu" / "runtime.cpp"


def build_runtime(path: str | os.PathLike[str], *, native: bool = True) -> Path:
    """Build the shared library with the ops that inference on a CPU needs. Takes about half a minute.

    Load it with ``torch.ops.load_library(path)``, or from C++ with dlopen, in a process whose torch has the version
    that this one has, and that does not import `m2rnn_compile` (which registers the same ops).

    Args:
        path: of the library, for example ``libm2rnn_runtime.so``; its folder must exist.
        native: for this machine's CPU. False: for any of its kind, slower.

    Raises:
        BuildError: no C++ compiler, or it failed; the message holds what it said.
    """
    target, root = Path(path).absolute(), Path(torch.__file__).parent
    # torch's headers ask for C++20 from 2.13 on; older compilers call it c++2a.
    flags = [flag for flag in BASE_FLAGS if not flag.startswith("-std=")]
    command = [
        *find_compiler(), "-std=c++20", *flags, *(["-march=native"] if native else []), "-fopenmp", "-w",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}",
        str(SOURCE), "-o", str(target), f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as e:
        raise BuildError(f"`{shlex.join(command)}` could not be run: {type(e).__name__}: {e}") from e
    if done.returncode != 0:
        raise BuildError(f"`{shlex.join(command)}` failed: {(done.stderr or done.stdout).strip()}")
    return target
