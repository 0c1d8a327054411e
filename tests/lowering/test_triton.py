# SPDX-License-Identifier: Apache-2.0
"""Runs the files `interpreted_*.py` under Triton's interpreter, in processes where nothing else has imported Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("file", ["interpreted_triton.py", "interpreted_decode.py", "interpreted_reduce.py"])
def test_kernels_under_the_interpreter(file: str) -> None:
    pytest.importorskip("triton")
    cases = Path(__file__).with_name(file)
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
