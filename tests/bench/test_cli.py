# SPDX-License-Identifier: Apache-2.0
"""The command line: arguments, exit codes, records."""

import json
import re
import sys

import pytest
from rich.console import Console

from bench import check, cli, impls, record, show
from bench.shapes import parse_shape
from m2rnn_compile import m2rnn
from m2rnn_compile.testing import make_inputs, oracle, run_low_precision

SMALL = ["--shape", "B1,T5,N2,K3,V4", "--device", "cpu"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["op", "--shape", "Z"], "expected a preset"),
        (["op", *SMALL, "--impl", "cuda-c"], "there is no|unknown|cannot run here"),
        (["op", *SMALL, "--impl", "triton"], "runs on cuda tensors"),
        (["op", *SMALL, "--impl", "xma"], "CUDA tensors only"),
        (["op", *SMALL, "--impl", "eager", "--baseline", "cpp"], "not among the implementations"),
        (["op", *SMALL, "--pass", "sideways"], "sideways: unknown"),
        (["op", *SMALL, "--dtype", "int8"], "'int8' is unknown"),
        (["op", *SMALL, "--clip", "-1"], "neither a number"),
        (["op", *SMALL, "--runs", "0"], "at least 1"),
        (["op", *SMALL, "--threads", "0"], "at least 1"),
        (["op", "--device", "tpu"], "--device"),
        (["op", "--device", "cuda:99"], "CUDA device"),
        (["check", *SMALL, "--repeats", "-1"], "at least 0"),
        (["show", "/nonexistent.json"], "cannot be read"),
        (["fly"], "invalid choice"),
        ([], "required"),
    ],
)
def test_bad_arguments_exit_with_2_and_say_why(argv, message, capsys):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(message, captured.err), captured.err


def test_a_wrong_checkout_of_upstream_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give the root of a checkout"):
        impls.load_xma(str(tmp_path))
    broken = tmp_path / "xma/layers/m2rnn/op.py"
    broken.parent.mkdir(parents=True)
    for folder in (tmp_path / "xma", tmp_path / "xma/layers", broken.parent):
        (folder / "__init__.py").write_text("")
    broken.write_text("import nothing_of_that_name")
    with pytest.raises(ValueError, match="ModuleNotFoundError: No module named 'nothing_of_that_name'"):
        impls.load_xma(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "xma"]:
        del sys.modules[name]


def test_an_impossible_implementation_lists_all_with_reasons(capsys):
    assert cli.main(["op", *SMALL, "--impl", "triton"]) == 2
    error = capsys.readouterr().err
    for name in ("reference", "eager", "cpp", "triton", "xma"):
        assert f"\n  {name}" in error


@pytest.mark.parametrize("command", [[], ["op"], ["check"], ["show"]])
def test_help_exits_with_0(command, capsys):
    assert cli.main([*command, "--help"]) == 0
    assert "python -m bench" in capsys.readouterr().out


def test_op_writes_a_record_that_show_prints_again(tmp_path, capsys):
    path = tmp_path / "deep" / "op.json"
    argv = ["op", *SMALL, "--impl", "reference,eager", "--runs", "2", "--out", str(path), "--commit", "abc"]
    assert cli.main(argv) == 0
    table = capsys.readouterr().out
    made = record.load(path)
    assert made["kind"] == "op"
    assert made["command"].startswith("python -m bench op --shape")
    assert {(row["impl"], row["pass"]) for row in made["rows"]} == {
        (impl, which) for impl in ("reference", "eager") for which in ("forward", "forward+backward")
    }
    for row in made["rows"]:
        assert row["runs"] == len(row["samples_ms"]) == 2
        assert row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert row["baseline"] == "reference"
        assert row["floor_ms"] is row["peak_extra_mib"] is None
    assert all(made[key] for key in ("date", "cpu", "torch", "python", "platform"))
    assert made["git"]["source_sha256"] == record.source_hash()
    assert cli.main(["show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown.strip()
    assert shown.strip() in table


def test_json_prints_the_record(tmp_path, capsys):
    path = tmp_path / "op.json"
    assert cli.main(["op", *SMALL, "--impl", "eager", "--runs", "1", "--json", "--out", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == record.load(path)


def test_check_passes_for_the_eager_path(tmp_path, capsys):
    argv = ["check", *SMALL, "--impl", "reference,eager", "--repeats", "1", "--out", str(tmp_path / "c.json")]
    assert cli.main(argv) == 0
    assert "pass" in capsys.readouterr().out


def test_check_exits_with_1_on_a_fault(tmp_path, monkeypatch, capsys):
    def wrong(*args, state_grad_clip=None, **options):
        return m2rnn(*args, impl="eager", **options)  # forgets the clip

    monkeypatch.setattr("bench.check.impls.resolve", lambda names, inputs, xma: {"wrong": wrong})
    argv = ["check", *SMALL, "--clip", "0.1", "--repeats", "1", "--out", str(tmp_path / "c.json")]
    assert cli.main(argv) == 1
    assert "FAIL" in capsys.readouterr().out


def test_check_sees_bits_that_differ_from_run_to_run():
    inputs = make_inputs(**parse_shape("B1,T5,N2,K3,V4").make_inputs_arguments(), initial_state=True)
    calls = []

    def flaky(*args, **options):
        calls.append(None)
        y, state = m2rnn(*args, impl="eager", **options)
        return y * (1 + 2**-23 * (len(calls) > 1)), state

    row = check.check_scan(inputs, flaky, oracle(inputs), run_low_precision(inputs), repeats=2)
    assert row["accurate"]
    assert row["different_repeats"] == 2
    assert not row["ok"]


def test_check_does_not_take_nan_for_accurate():
    inputs = make_inputs(**parse_shape("B1,T5,N2,K3,V4").make_inputs_arguments(), initial_state=True)

    def poisoned(*args, **options):
        y, state = m2rnn(*args, impl="eager", **options)
        return y * float("nan"), state

    row = check.check_scan(inputs, poisoned, oracle(inputs), run_low_precision(inputs), repeats=1)
    assert not row["tensors"]["y"]["ok"]
    assert row["different_repeats"] == 0  # the same NaNs are the same bits


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not a JSON file"),
        ("[]", "not a benchmark record"),
        ('{"kind": "op"}', "not a benchmark record"),
        ('{"kind": "op", "rows": [], "schema": 0}', "schema 0"),
    ],
)
def test_a_bad_record_is_refused(content, message, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        record.load(path)


def test_failed_measurements_are_shown_as_such(tmp_path, capsys):
    shape = parse_shape("cpu").as_dict()
    row = {"shape": shape, "dtype": "float32", "pass": "forward", "clip": 1.0, "baseline": "eager", "impl": "eager"}
    made = record.make_record("op", ["op"], [{**row, "error": "out of memory"}])
    record.write(made, tmp_path / "r.json")
    assert cli.main(["show", str(tmp_path / "r.json")]) == 0
    assert "out of memory" in capsys.readouterr().out


def test_gpu_test_reports_can_be_shown(capsys):
    rows = [
        {"test": "t.py::a", "outcome": "passed", "message": ""},
        {"test": "t.py::b", "outcome": "failed", "message": "x"},
    ]
    show.render(record.make_record("test-gpu", ["make test-gpu"], rows), Console(width=120))
    out = capsys.readouterr().out
    assert "1 failed, 1 passed" in out
    assert "t.py::b" in out


def test_committed_records_can_all_be_read():
    for path in sorted(record.RESULTS.glob("*.json")):
        record.load(path)
