# SPDX-License-Identifier: Apache-2.0
"""The command that says which AOTInductor packages load in another process, on a CPU."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from bench.gpu_runs import aot


@pytest.mark.slow
def test_a_package_that_loads(capsys: pytest.CaptureFixture[str]) -> None:
    assert aot.main(["--device", "cpu", "--only", "linear"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["late"] == {"returncode": 0, "said": ["loaded", "agrees"]}
    assert row["compile_s"] > 0


def test_a_process_that_dies_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        aot, "LOAD", f"print('loaded', flush=True); import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})"
    )
    monkeypatch.setattr(aot.shutil, "which", lambda _: None)
    row = aot.load(tmp_path, early=True)
    assert (row["returncode"], row["said"]) == (-signal.SIGSEGV, ["loaded"])
    assert "Segmentation fault" in row["stderr"]


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        aot.main([])
    assert "--device cpu runs anywhere" in capsys.readouterr().err
