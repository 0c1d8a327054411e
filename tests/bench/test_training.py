# SPDX-License-Identifier: Apache-2.0
"""Presets trained side by side: the step is the library's, a fault of one model costs no other, lines are straight."""

import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
import torch

from bench.training import __main__ as command
from bench.training.depth import extrapolate, line
from bench.training.trainee import Trainee
from m2rnn_compile.models import miniature, preset

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def make(name, compiled=None):
    return Trainee(miniature(preset(name)), batch=2, seq_len=12, device=CPU, compiled=compiled)


@pytest.mark.parametrize("name", ["hybrid-gated-deltanet+1-410m", "m2rnn-7b"])
def test_the_loss_is_that_of_the_model(name):
    trainee = make(name)
    tokens, targets = trainee.data[0, :, :-1], trainee.data[0, :, 1:]
    expected = trainee.model.loss(tokens, targets)
    assert torch.equal(trainee.loss(tokens, targets), expected)
    assert expected.item() > 5  # of 256 tokens: about log 256


def test_steps_learn_and_forward_backward_alone_changes_nothing():
    trainee = make("m2rnn-410m")
    before = [p.detach().clone() for p in trainee.model.parameters()]
    trainee.forward_backward()
    assert all(torch.equal(a, b) for a, b in zip(before, trainee.model.parameters(), strict=True))
    assert all(p.grad is None for p in trainee.model.parameters())
    trainee.data = trainee.data[:1].expand_as(trainee.data)
    for _ in range(20):
        trainee.step()
    first, last = trainee.first_and_last_loss()
    assert last < first
    assert trainee.tokens == 24


def test_alike_blocks_are_compiled_once():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for name in ("m2rnn-410m", "hybrid-m2rnn-410m"):
        make(name, {"fullgraph": True, "dynamic": False, "backend": counter}).step()
    assert counter.frame_count == 3  # M, A, and the head


def test_lines():
    costs = {2: 14.0, 4: 24.0, 6: 34.0}
    assert line(costs) == (4.0, 5.0, 0.0)
    bent = line({2: 14.0, 4: 24.0, 6: 40.0})
    assert bent.layer == 6.5
    assert bent.miss == pytest.approx(34 / 40 - 1)
    assert line({1: 3.0, 3: 7.0}).miss is None
    with pytest.raises(ValueError, match="two depths, got \\[2\\]"):
        line({2: 1.0})
    assert extrapolate("MMA", {"M": line(costs), "A": line({2: 6.0, 4: 8.0})}) == pytest.approx(4.0 + 5 + 5 + 1)
    assert extrapolate("MG", {"M": line(costs)}) is None


def run(tmp_path, *more):
    out = tmp_path / "deep" / "rows.jsonl"
    options = ["--miniature", "--eager", "--device", "cpu", "--batch", "2", "--deep-batch", "1", "--seq-len", "8"]
    assert command.main([*options, "--runs", "2", "--depths", "1,2,3", "--out", str(out), *more]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def of_kind(rows, kind):
    return [row for row in rows if row["kind"] == kind]


def test_the_command_measures_all_six_and_extrapolates(tmp_path, capsys):
    rows = run(tmp_path)
    presets = of_kind(rows, "preset")
    assert [row["model"] for row in presets] == list(command.PRESETS)
    for row in presets:
        assert row["status"] == "ok"
        assert len(row["samples_ms"]) == 4
        assert row["tokens_per_s"] == pytest.approx(16 / row["median_ms"] * 1e3)
    assert {row["what"] for row in of_kind(rows, "ratio")} == {"pass 1", "pass 2", "all"}
    assert len(of_kind(rows, "ratio")) == 3 * len(command.RATIOS)
    assert [(r["model"], r["layers"]) for r in of_kind(rows, "depth")] == [
        (name, n) for name in command.DEEP for n in (1, 2, 3)
    ]
    assert [row["model"] for row in of_kind(rows, "extrapolated")] == list(command.EXTRAPOLATED)
    assert rows[-1]["kind"] == "end"
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_a_model_that_fails_and_a_peer_that_refuses_cost_no_other(tmp_path, monkeypatch):
    warm_up = Trainee.warm_up

    def fail(self):
        if set(self.config.pattern) == {"A"}:
            raise RuntimeError("no kernel for this")
        return warm_up(self)

    monkeypatch.setattr(Trainee, "warm_up", fail)
    monkeypatch.setattr(command, "fla_gate", lambda run: "refuses to run on this Triton")
    rows = run(tmp_path, "--passes", "1")
    status = {row["model"]: (row["status"], row.get("note")) for row in of_kind(rows, "preset")}
    assert status["softmax-410m"] == ("failed", "RuntimeError: no kernel for this")
    assert status["hybrid-gated-deltanet+1-410m"] == ("refused", "refuses to run on this Triton")
    assert status["m2rnn-410m"][0] == status["hybrid-m2rnn-410m"][0] == "ok"
    assert [row["model"] for row in of_kind(rows, "extrapolated")] == ["m2rnn-7b"]


def test_a_model_that_fails_while_timed_is_dropped(tmp_path, monkeypatch):
    step = Trainee.step

    def fail(self):
        if self.config.pattern == "M" * 8 and self.steps > 3:
            raise RuntimeError("broke down")
        step(self)

    monkeypatch.setattr(Trainee, "step", fail)
    monkeypatch.setattr(command, "deep", lambda run, gdn_is_out: None)
    rows = run(tmp_path, "--presets", "m2rnn-410m,softmax-410m")
    assert {row["model"]: row["status"] for row in of_kind(rows, "preset")} == {
        "m2rnn-410m": "failed",
        "softmax-410m": "ok",
    }


def test_memory_that_does_not_hold_all_is_tried_in_halves_then_with_fewer_rows(tmp_path, monkeypatch):
    alive = []
    warm_up = Trainee.warm_up

    def fail(self):
        alive.append(self)
        if "A" in self.config.pattern and self.tokens > 8 and len(set(self.config.pattern)) == 1:
            raise torch.OutOfMemoryError("full")
        return warm_up(self)

    monkeypatch.setattr(Trainee, "warm_up", fail)
    monkeypatch.setattr(command, "deep", lambda run, gdn_is_out: None)
    rows = run(tmp_path, "--passes", "1")
    assert [(len(row["models"]), row["batch"]) for row in of_kind(rows, "out of memory")] == [(6, 2), (3, 2)]
    assert [(row["model"], row["batch"]) for row in of_kind(rows, "preset")] == [
        (name, 2 if i < 3 else 1) for i, name in enumerate(command.PRESETS)
    ]


def test_a_spent_budget_starts_nothing(tmp_path):
    rows = run(tmp_path, "--budget", "0")
    assert {row["status"] for row in rows if "status" in row and row["kind"] != "fla"} == {"no time"}
    assert not of_kind(rows, "extrapolated")


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--runs", "0"], "--runs must be at least 1, got 0"), (["--presets", "m2rnn-410"], "did you mean m2rnn-410m")],
)
def test_bad_arguments(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--out", str(tmp_path / "x.jsonl"), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "/proc/x/y"], "error: --out /proc/x/y: cannot be written"),
        (["--device", "cuda"], "error: --device 'cuda': this machine has 0 CUDA device(s)"),
    ],
)
def test_what_cannot_be_had_is_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert command.main(["--out", str(tmp_path / "x.jsonl"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)
    assert not (tmp_path / "x.jsonl").exists()


def test_commands_in_the_docs_are_taken():
    for name in ("docs/models.md", "docs/benchmarks.md", "bench/gpu_runs/README.md"):
        text = (ROOT / name).read_text().replace("\\\n", " ")
        found = re.findall(r"python3? -m bench\.training((?: +[\w.,+/-]+)+)", text)
        given = [shlex.split(arguments) for arguments in found if "--" in arguments]
        assert given, name
        for arguments in given:
            command.parse(arguments)


def test_the_table_of_steps_says_what_its_record_says():
    text = (ROOT / "docs/models.md").read_text()
    (link,) = re.findall(r"16 steps of each \(\[record\]\((.*?)\), 1c84e12\)", text)
    rows = [json.loads(line) for line in (ROOT / "docs" / link).read_text().splitlines()]
    steps = {r["model"]: r["samples_ms"] for r in rows if r["kind"] == "preset"}
    peaks = {r["model"]: r["peak_gib"] for r in rows if r["kind"] == "warm"}
    assert len(steps) == 5
    for model, ms in steps.items():
        low, _, high = statistics.quantiles(ms, n=4, method="inclusive")
        middle = statistics.median(ms)
        wide = lambda a, b, m=middle: f"{a:.1f} – {b:.1f} ({100 * (b - a) / m:.1f} %)"
        cells = f"{16384e3 / middle:,.0f} | {middle:.1f} | {wide(low, high)} | {wide(min(ms), max(ms))}"
        row = rf"^\| `{re.escape(model)}`[^|]* \| {re.escape(cells)} \| {peaks[model]:.1f} \|$"
        assert re.search(row, text, re.MULTILINE), (model, cells)
    for slow, fast in command.RATIOS[0][:2], command.RATIOS[1][:2]:
        (said,) = (r for r in rows if r["kind"] == "ratio" and (r["what"], r["slow"], r["fast"]) == ("all", slow, fast))
        fastest = min(steps[slow]) / min(steps[fast])
        assert f"| {said['of_medians']:.3f} | {said['paired_median']:.3f} | {fastest:.3f} |" in text
    for name, commit in (("h200", "1c84e12"), ("h100", "284a0ab")):
        rows = (ROOT / f"bench/results/scripts/models-{name}-20261128.jsonl").read_text().splitlines()
        deep = [r for r in map(json.loads, rows) if r["kind"] in ("depth", "line") and r["model"] == "m2rnn-7b"]
        times = ", ".join(f"{r['step_ms']:.1f}" for r in deep if "step_ms" in r)
        (miss,) = (r["miss"] for r in deep if r.get("what") == "step_ms")
        assert f"| {name.upper()}, {commit} | {times} | {100 * miss:.1f} % |" in text
