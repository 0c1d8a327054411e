# SPDX-License-Identifier: Apache-2.0
"""The command that times what `torch.compile` makes of a layer, on a CPU."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from bench.gpu_runs import fusion
from bench.providers.authors_layer import of_the_authors_op
from m2rnn_compile import M2RNN, m2rnn


def test_the_authors_parts_compute_the_same_layer() -> None:
    torch.manual_seed(0)
    layer = M2RNN(32, num_heads=4, key_dim=8, value_dim=4)
    assert layer.conv1d is not None
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = torch.randn(2, 19, 32)

    def scan(*inputs: Tensor, state_grad_clip: float | None) -> tuple[Tensor, Tensor]:
        y, state = m2rnn(*inputs, state_grad_clip=state_grad_clip, output_final_state=True, impl="eager")
        assert state is not None
        return y, state

    torch.testing.assert_close(of_the_authors_op(layer, x, scan), layer(x))


def test_layer_rows_of_a_small_layer(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["layer", "--device", "cpu", "--hidden", "32", "--heads", "4", "--shape", "1,16", "--budget", "0.2"]
    assert fusion.main([*command, "--settings", "off;fused"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["kind"], r["setting"]) for r in rows] == [
        (f"layer, {kind}", setting) for kind in ("inference", "training") for setting in ("off", "fused")
    ]
    assert all(r["differs"] < 1e-5 and r["median_ms"] > 0 and r["runs"] >= 20 for r in rows)


def test_a_setting_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        fusion.main(["layer", "--device", "cpu", "--settings", "of"])
    assert e.value.code == 2
    assert "unknown setting of; there are off; fused" in capsys.readouterr().err
