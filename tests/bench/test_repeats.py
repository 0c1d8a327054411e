# SPDX-License-Identifier: Apache-2.0
"""The command that looks at bits over repeats: what it says of runs that agree, and of runs that do not."""

from __future__ import annotations

import json

import pytest
import torch

from bench.gpu_runs import repeats


def test_runs_that_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert repeats.main(["B1,T9,N2,K8,V4", "--impl", "eager", "--device", "cpu", "--repeats", "2"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["differ"], row["finite"], row["repeats"]) == ([], True, 2)


def test_one_different_bit_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []
    right = repeats.run

    def run(x: object, *, impl: str) -> dict[str, torch.Tensor]:
        calls.append(result := right(x, impl=impl))  # type: ignore[arg-type]
        if len(calls) == 3:
            result["dW"].view(-1)[0] = torch.nextafter(result["dW"].view(-1)[0], torch.tensor(1e9))
        return result

    monkeypatch.setattr(repeats, "run", run)
    assert repeats.main(["B1,T9,N2,K8,V4", "--impl", "eager", "--device", "cpu", "--repeats", "3"]) == 1
    assert json.loads(capsys.readouterr().out)["differ"] == ["dW"]


@pytest.mark.parametrize("arguments", [["B1"], ["nonsense"]])
def test_a_shape_that_is_none_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        repeats.main([*arguments, "--device", "cpu"])
    assert e.value.code == 2
    assert "--shape" in capsys.readouterr().err
