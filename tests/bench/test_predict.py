# SPDX-License-Identifier: Apache-2.0
"""Memory of layers and models is counted without running them, and is what running them takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench import cli, files, memory, predict, record
from bench.ledger import META, FlashAttention, Ledger, kernel
from bench.memory import MIB
from bench.providers import PROVIDERS, Context, ours
from bench.shapes import PRESETS

CPU = torch.device("cpu")


def test_a_ledger_counts_what_lives():
    x = torch.empty(256, 1024, device=META)  # 1 MiB
    with Ledger([x]) as ledger:
        y = x.view(-1)  # no memory of its own
        assert ledger.now == 0
        y = x + 1
        y = y + 1  # two at a time
        assert (ledger.now, ledger.peak) == (MIB, 2 * MIB)
        del y
        assert (ledger.now, ledger.peak) == (0, 2 * MIB)


def test_a_ledger_counts_what_is_kept_for_backward_and_gradients():
    x = torch.empty(256, 1024, device=META, requires_grad=True)
    with Ledger([x]) as ledger:
        y = x.sin().exp().sum()  # sin keeps x, exp its result
        kept = ledger.now
        assert MIB <= kept < MIB + 100
        (gradient,) = torch.autograd.grad(y, x)
        del y
        assert ledger.now == gradient.nbytes


def test_attention_keeps_no_scores():
    q = torch.empty(1, 1, 4096, 64, device=META, requires_grad=True)
    with Ledger([q]) as ledger, FlashAttention():
        y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        assert ledger.peak == y.nbytes == MIB
        torch.autograd.grad(y.sum(), q)
    assert ledger.peak < 6 * MIB  # scores would be 64


def test_a_kernel_has_memory_of_its_own_in_backward():
    x = torch.empty(256, 1024, device=META, requires_grad=True)
    dy = torch.empty(1024, device=META)
    with Ledger([x, dy]) as ledger:
        y = kernel((1024,), (x,), scratch=8 * 256 * 1024)
        assert ledger.peak == y.nbytes
        torch.autograd.grad(y, x, dy)
    assert ledger.peak == 8 * MIB + y.nbytes + MIB


RECORD = record.RESULTS / "op-h100-20261128.jsonl"


def of_record(provider, mode):
    return {row.shape: row for row in files.read(RECORD) if row.provider == provider and row.mode == mode}


@pytest.mark.parametrize("name", "ABCD")
def test_what_is_predicted_of_the_op_is_what_a_gpu_measured(name):
    """What docs/benchmarks.md says forward holds is what the record of an H100 has, to the byte but for rounding."""
    shape, (triton,) = PRESETS[name], [provider for provider in PROVIDERS if provider.name == "triton"]
    forward, both = (of_record("triton", mode)[name] for mode in ("forward", "forward+backward"))
    y = predict.result_bytes(shape, 2)
    assert forward.kept_mib == pytest.approx((y + ours.checkpoint_bytes(shape, 2)) / MIB, abs=0.01)
    predicted = [x / MIB for x in predict.peak_bytes(triton, shape, 2)]
    partials = 2 * y / MIB if name == "C" else 0.0
    assert forward.peak_mib == pytest.approx(predicted[0] + partials, abs=0.01)
    assert both.peak_mib == pytest.approx(predicted[1], rel=0.02)


def test_the_window_of_backward_is_the_kernels():
    pytest.importorskip("triton")
    from m2rnn_compile.lowering import triton

    assert triton.WINDOW_BYTES == ours.BACKWARD_WINDOW


def test_memory_in_readme_is_that_of_the_record():
    readme = (record.RESULTS.parents[1] / "README.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in readme.splitlines() if line.startswith("| ")]
    found, shape = {}, ""
    for first, mode, *cells in (line for line in lines if len(line) == 9):
        shape = first[0] if first else shape
        if mode in ("forward", "forward+backward"):
            found[shape, mode] = cells[-2:]
    assert found == {
        (name, mode): [f"{of_record(provider, mode)[name].peak_mib:,.0f}" for provider in ("triton", "xma")]
        for name in "ABCD"
        for mode in ("forward", "forward+backward")
    }


@pytest.mark.parametrize("kernel_name", ["layer", "model"])
@pytest.mark.parametrize("name", ["reference", "eager", "cpp", "sdpa"])
def test_what_is_predicted_is_what_runs(kernel_name, name, capsys):
    shape = PRESETS["cpu"].with_length(128)
    argv = ["--preset", "cpu", "--T", "128", "--device", "cpu", "--provider", name, "--dry-run"]
    assert cli.main([kernel_name, *argv]) == 0
    (line,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("cpu ")]
    inputs, forward, both, *of_model = (float(x.replace(",", "")) for x in line[line.index(name) + 1 :])
    (provider,) = [provider for provider in PROVIDERS if provider.name == name]
    problem = provider.build[kernel_name](Context(kernel_name, shape, torch.float32, CPU))
    leaves = list(problem.leaves.values())
    assert inputs == pytest.approx(sum(x.nbytes for x in [*leaves, problem.dy]) / MIB, abs=0.06)
    kept = memory.kept_bytes(problem.variant("forward")(), leaves, CPU) / MIB
    wide = 2.0 if name == "reference" else 1.25  # of its graph there is an estimate; of the others the peak is above
    assert kept / (2 if name == "reference" else 1) - 0.1 <= forward <= wide * kept
    parameters = sum(x.nbytes for n, x in problem.leaves.items() if n != "x") / MIB
    assert both >= forward
    assert both >= parameters
    if kernel_name == "model":
        train, generate = of_model
        assert train == pytest.approx(both + 2 * parameters, abs=0.2)
        keys = 2 * 2 * shape.B * shape.T * shape.width * 4 / MIB  # of two layers of attention
        assert (generate >= keys) == (name == "sdpa")


@pytest.mark.parametrize("argv", [["layer"], ["model", "--pattern", "MGA2RU"]])
def test_every_provider_is_predicted_and_peers_that_are_missing_too(argv, capsys):
    asked = ["--preset", "cpu", "--T", "64", "--device", "cpu", "--provider", "all", "--dry-run"]
    assert cli.main([*argv, *asked]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("cpu ")]
    offered = [provider.name for provider in PROVIDERS if argv[0] in provider.build]
    assert [line[7] for line in lines] == offered
    for line in lines:
        inputs, forward, both = map(float, line[8:11])
        assert 0 < inputs < forward < both
    if argv == ["layer"]:  # every state again, in backward only
        both = {line[7]: float(line[10]) for line in lines}
        assert both["xma"] > 4 * 4 * 64 * 8 * 32 * 16 / MIB > both["eager"]
