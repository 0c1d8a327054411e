# SPDX-License-Identifier: Apache-2.0
"""The command that times our kernels' launch configurations."""

from __future__ import annotations

import json

import pytest

from bench.gpu_runs import launches
from bench.shapes import Shape


def test_a_configuration_is_read() -> None:
    assert launches.choice("64,2") == ("64,2", (64, 2), None)
    assert launches.choice("32,1,168:12") == ("32,1,168:12", (32, 1, 168), 12)


@pytest.mark.parametrize("text", ["64", "64,0", "64,1:0", "a,b", "1,2,3,4", "64,2:x"])
def test_one_that_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launches.main(["--forward", text])
    assert "invalid choice value" in capsys.readouterr().err


def test_an_unknown_shape_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launches.main(["--shape", "A,Z"])
    assert "unknown shape Z; there are A" in capsys.readouterr().err


@pytest.mark.gpu
def test_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(launches.PRESETS, "A", Shape("A", 2, 70, 90, 64, 16))
    assert launches.main(["--shape", "A", "--forward", "64,1:1", "--backward", "32,1:1", "--runs", "3"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["direction"], r["config"]) for r in rows] == [
        ("forward", "pinned"), ("forward", "64,1:1"), ("backward", "pinned"), ("backward", "32,1:1"),
    ]  # fmt: skip
    assert all(r["median_ms"] > 0 and r["kernels_ms"] for r in rows)
    assert all(x < 5e-3 for r in rows[:2] for x in r["differs"])
