# SPDX-License-Identifier: Apache-2.0
"""Runs the `interpreted_` files under Triton's interpreter, each in a process where nothing else imported Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("cases", ["interpreted_fused.py", "interpreted_mixer.py"])
def test_kernels_under_the_interpreter(cases: str) -> None:
    pytest.importorskip("triton")
    file = Path(__file__).with_name(cases)
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
