# SPDX-License-Identifier: Apache-2.0
"""The command line: arguments, exit codes, files, what goes to stdout and what to stderr."""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from bench import check, cli, compare, files, floors, measure, memory, record
from bench.providers import Provider, add_checkout, upstream
from bench.shapes import parse_shape
from m2rnn_compile import m2rnn
from m2rnn_compile.models import MIXERS
from m2rnn_compile.testing import make_inputs, oracle, run_low_precision

RECORD = str(record.RESULTS / "op-h200-20261124.json")
SMALL = ["--shape", "B1,T5,N2,K3,V4", "--device", "cpu"]


@pytest.fixture
def run(capsys, tmp_path):
    """Run the command line; rows go to a folder of the test. Returns (exit code, stdout, stderr)."""

    def call(*argv, out=True):
        written = ["--out", str(tmp_path / "rows.jsonl")] if out else []
        code = cli.main([*argv, *written])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    call.rows = lambda: files.read(tmp_path / "rows.jsonl")
    call.path = tmp_path / "rows.jsonl"
    return call


@pytest.mark.parametrize(
    "argv, message",
    [
        (["op", "--preset", "Z"], "--preset 'Z' is unknown; expected A, B, C, D, cpu"),
        (["op", "--shape", "Z"], "expected a preset"),
        (["op", "--shape", "B1,T5,N4,K3,V4,Nq3"], "Nq must divide N = 4, got 3"),
        (["op", *SMALL, "--T", "0"], "a length must be at least 1"),
        (["op", *SMALL, "--T", "many"], "expected whole numbers"),
        (["op", *SMALL, "--provider", "cuda-c"], r"unknown provider cuda-c; .*cpp: available"),
        (["op", *SMALL, "--provider", "triton"], "triton cannot run here"),
        (["op", *SMALL, "--provider", "xma"], "CUDA tensors only"),
        (["layer", *SMALL, "--provider", "lstm"], "lstm: has no layer"),
        (["op", *SMALL, "--mode", "sideways"], "sideways: unknown for op"),
        (["step", *SMALL, "--mode", "backward"], "unknown for step"),
        (["op", *SMALL, "--dtype", "int8"], "'int8' is unknown"),
        (["op", *SMALL, "--dtype", "fp32,"], "--dtype 'fp32,': an empty item"),
        (["op", *SMALL, "--provider", ""], "--provider '': an empty item"),
        (["op", *SMALL, "--against", "nobody"], "--against 'nobody' is unknown; expected reference"),
        (["op", *SMALL, "--gate-steps", "0"], "--gate-steps must be at least 1, got 0"),
        (["op", *SMALL, "--seed", "x"], "invalid int value"),
        (["op", *SMALL, "--clip", "-1"], "neither a number"),
        (["op", *SMALL, "--runs", "0"], "at least 1"),
        (["op", *SMALL, "--budget", "nan"], "above 0"),
        (["op", *SMALL, "--budget", "inf"], "--budget finite and above 0"),
        (["op", *SMALL, "--threads", "0"], "at least 1"),
        (["op", *SMALL, "--xma", "/nonexistent"], "give the root of a checkout"),
        (["op", *SMALL, "--fail-above", "1.1"], "needs --baseline"),
        (["op", *SMALL, "--fail-above", "0", "--baseline", "x.jsonl"], "must be above 0"),
        (["op", *SMALL, "--baseline", "/nonexistent.jsonl"], "cannot be read"),
        (["op", *SMALL, "--any-device"], "--any-device needs --baseline"),
        (["op", *SMALL, "--out", "rows.xlsx"], "must end in"),
        (["op", *SMALL, "--out", "/dev/null/rows.jsonl"], "cannot be written"),
        (["op", "--device", "tpu"], "--device"),
        (["op", "--device", "cuda:99"], "CUDA device"),
        (["model", *SMALL, "--pattern", "MXA"], r"--pattern 'MXA': expected a letter a layer, of M .*, G .*, A .*, 2 "),
        (["model", *SMALL, "--pattern", "MA", "--layers", "3"], "--layers and --pattern: give one"),
        (["model", *SMALL, "--layers", "0"], "--layers must be at least 1"),
        (["check", *SMALL, "--repeats", "-1"], "at least 0"),
        (["check", *SMALL, "--provider", "lstm"], "unknown provider lstm"),
        (["check", *SMALL, "--clip", "soft"], "--clip: 'soft' is neither a number"),
        (["check", *SMALL, "--clip", "1,"], "--clip '1,': an empty item"),
        (["show", "/nonexistent.json"], "cannot be read"),
        (["report", "/nonexistent.jsonl"], "cannot be read"),
        (["report", RECORD, "--against", "nobody"], "--against 'nobody' is unknown; expected triton, xma"),
        (["report", RECORD, "--provider", "triton,nobody"], "--provider 'nobody' is unknown; expected triton, xma"),
        (["compare", "one.jsonl"], "compare takes two files"),
        (["compare", RECORD, RECORD, "--fail-above", "nan"], "--fail-above must be above 0, got nan"),
        (["compare", "--rev", "HEAD", "--", "op", *SMALL, "--json"], "takes no .*--json"),
        (["compare", "--rev", "HEAD", "--", "fly"], "say what to run after --"),
        (["compare", "--rev", "no-such-revision", "--", "op", *SMALL], "git knows no such revision"),
        (["fly"], "invalid choice"),
        ([], "required"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_line_that_says_why(argv, message, run):
    code, out, err = run(*argv, out=False)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if not line.startswith("running ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0])


def test_a_preset_for_gpus_is_refused_where_there_is_none(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run("op", "--preset", "A")
    assert code == 2
    assert "preset A is meant for a GPU and torch sees none" in err
    assert not run.path.exists()


def test_a_wrong_checkout_of_upstream_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give the root of a checkout"):
        add_checkout(str(tmp_path))
    broken = tmp_path / "xma/layers/m2rnn/op.py"
    broken.parent.mkdir(parents=True)
    for folder in (tmp_path / "xma", tmp_path / "xma/layers", broken.parent):
        (folder / "__init__.py").write_text("")
    broken.write_text("import nothing_of_that_name")
    before = list(sys.path)
    try:
        add_checkout(str(tmp_path))
        assert "ModuleNotFoundError: No module named 'nothing_of_that_name'" in upstream.why_not_importable()
    finally:
        sys.path[:] = before
        for name in [name for name in sys.modules if name.partition(".")[0] == "xma"]:
            del sys.modules[name]


@pytest.mark.parametrize(
    "command", [[], *([name] for name in (*cli.DEFAULT_MODES, "info", "check", "compare", "report", "show"))]
)
def test_help_is_plain_text(command, run):
    code, out, err = run(*command, "--help", out=False)
    assert (code, err) == (0, "")
    assert "python -m bench" in out
    assert "\x1b" not in out


def test_info_names_versions_caches_and_every_provider(run):
    code, out, _ = run("info", out=False)
    assert code == 0
    assert torch.__version__ in out
    for name in ("platform", "cpu", "git", "cache: Triton", "cache: C++ kernel", "provider xma", "provider cpp"):
        assert re.search(rf"^{re.escape(name)} ", out, re.MULTILINE), name


def test_the_cpu_preset_runs_with_every_default_provider(run):
    code, out, err = run("op", "--preset", "cpu", "--device", "cpu", "--runs", "2")
    assert code == 0
    rows = [row for row in run.rows() if row.status != "missing"]
    assert {row.provider for row in rows} >= {"reference", "cpp", "cpp-compile", "sdpa", "lstm", "gru"}
    assert {row.mode for row in rows} == {"forward", "backward", "forward+backward"}
    for row in rows:
        assert row.status == "ok", (row.provider, row.mode, row.note)
        assert row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.gate.startswith("fp64 of an independent run")
        assert row.error_ratio is not None
        assert row.tokens_per_s == pytest.approx(1e3 * 4 * 512 / row.median_ms)
        assert row.tflops_per_s
        assert row.gbytes_per_s
        assert all((row.device, row.torch, row.python, row.git, row.date))
    assert "median ms" in out
    assert "forward: cpp" in err  # progress
    assert "\x1b" not in out + err


def test_check_passes(run):
    code, out, _ = run("check", "--device", "cpu")
    assert code == 0
    assert "FAIL" not in out
    assert {row.provider for row in run.rows()} >= {"reference", "eager", "cpp"}
    assert {row.mode for row in run.rows()} == {"check"}


@pytest.mark.parametrize(
    "argv, modes",
    [
        (["step"], {"inference"}),
        (["layer"], {"forward", "backward", "forward+backward"}),
        (["model", "--pattern", "MA"], {"train", "generate"}),
    ],
)
def test_other_kernels_run_at_a_small_shape(argv, modes, run):
    code, _, _ = run(*argv, "--shape", "B2,T9,N4,K8,V16", "--device", "cpu", "--provider", "eager,sdpa", "--runs", "1")
    assert code == 0
    assert {(row.provider, row.mode) for row in run.rows()} == {(p, m) for p in ("eager", "sdpa") for m in modes}
    for row in run.rows():
        assert row.status == "ok", (row.provider, row.mode, row.note)


@pytest.mark.parametrize("letter", MIXERS)
def test_a_model_may_have_every_mixer(letter, run):
    shape = ["--shape", "B2,T9,N4,K8,V16", "--device", "cpu", "--mode", "inference,train,generate", "--runs", "1"]
    assert run("model", "--pattern", f"M{letter}", *shape, "--provider", "eager")[0] == 0
    assert [(row.mode, row.status, row.note) for row in run.rows()] == [
        (mode, "ok", "") for mode in ("inference", "train", "generate")
    ]
    assert f"language model M{letter}, width 64" in run.rows()[0].operator
    assert (run.rows()[0].floor_ms is None) == (letter not in "MA" or floors.host(torch.get_num_threads()) is None)


def test_show_prints_the_tables_of_the_run_again(run):
    code, table, _ = run("op", *SMALL, "--provider", "reference,eager", "--runs", "2", "--commit", "abc")
    assert code == 0
    assert [row.git for row in run.rows()] == ["abc"] * 6
    code, shown, _ = run("show", str(run.path), out=False)
    assert code == 0
    assert shown.strip()
    assert shown.strip() in table


def test_json_prints_the_rows(run):
    code, out, _ = run("op", *SMALL, "--provider", "eager", "--runs", "1", "--json")
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == [row.to_dict() for row in run.rows()]


def test_colour_and_width_follow_the_terminal(monkeypatch, tmp_path):
    """On a terminal of 40 columns no figure is cut; NO_COLOR drops the colours."""

    class Terminal:
        encoding = "utf-8"

        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm-256color")
    path = record.RESULTS / "op-h200-20261124.json"
    for variable, value, coloured in (("NO_COLOR", "", True), ("NO_COLOR", "1", False)):
        monkeypatch.setenv(variable, value)
        monkeypatch.setattr(sys, "stdout", Terminal())
        assert cli.main(["show", str(path)]) == 0
        text = sys.stdout.text
        assert "…" not in text
        assert re.search("median ms +p20 +p80 +vs xma", re.sub(r"\x1b\[[0-9;]*m", "", text))
        assert ("\x1b[" in text) is coloured


@pytest.mark.parametrize("variable", [{"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}])
def test_a_file_gets_neither_colours_nor_a_bar_whatever_is_forced(variable, run, monkeypatch):
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    code, out, err = run("op", *SMALL, "--provider", "eager", "--runs", "1", "--mode", "forward")
    assert code == 0
    assert "\x1b" not in out + err
    assert err.splitlines()[-1] == "B1,T5,N2,K3,V4 forward: eager"  # lines, not a bar


@pytest.mark.parametrize(
    "argv, closed, unbuffered",
    [
        (["show", RECORD], "stdout", ""),  # in the middle of tables
        (["show", RECORD], "stdout", "1"),
        (["report", RECORD], "stdout", ""),  # at the last flush
        (["check", *SMALL, "--provider", "eager", "--dtype", "fp32", "--repeats", "0", "--json"], "stdout", "1"),
        (["op", *SMALL, "--provider", "eager", "--runs", "1"], "stderr", ""),  # progress
    ],
)
def test_a_reader_that_has_seen_enough_ends_it_quietly(argv, closed, unbuffered, tmp_path):
    """As `| head -1` does: without a traceback, and with the code of a program that SIGPIPE ended."""
    written = ["--out", str(tmp_path / "rows.jsonl")] if argv[0] in ("op", "check") else []
    reads, writes = os.pipe()
    os.close(reads)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, closed: writes}
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "bench", *argv, *written]
    try:
        done = subprocess.run(command, cwd=Path(cli.__file__).parents[1], env=environment, text=True, **streams)
    finally:
        os.close(writes)
    assert done.returncode == 141
    said = done.stderr if closed == "stdout" else done.stdout
    assert "Error" not in said
    assert "Traceback" not in said


def test_output_that_is_closed_from_the_start_is_dropped(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["op", *SMALL, "--provider", "eager", "--runs", "1", "--out", str(run.path)]) == 0
    assert len(run.rows()) == 3


def test_dry_run_shows_memory_and_runs_nothing(run, monkeypatch):
    monkeypatch.setattr(measure, "run", lambda *given: pytest.fail("it ran"))
    code, out, _ = run("op", "--preset", "A,C", "--dtype", "bf16", "--dry-run")
    assert code == 0
    assert not run.path.exists()
    assert "nothing was run" in out
    (xma,) = [line.split() for line in out.splitlines() if line.startswith("A ") and " xma " in line]
    forward, both = (float(xma[xma.index("xma") + i].replace(",", "")) for i in (2, 3))
    assert forward < 100
    assert both > 5000  # MiB: every state in bf16
    assert out.count("missing xma: ") == 1  # once, whatever the number of shapes


def test_dry_run_of_a_step_predicts_a_step(run):
    code, out, _ = run("step", "--preset", "cpu", "--provider", "cpp,sdpa", "--dry-run")
    assert code == 0
    cpp, sdpa = (line.split() for line in out.splitlines() if line.startswith("cpu "))
    assert [float(x) for x in cpp[-2:]] == [0.07, 0.06]  # MiB: a state of 64 KiB and a token in, a state and y out
    assert sdpa[-1] == "sdpa"


def test_only_who_is_asked_for_is_looked_for(run, monkeypatch):
    """Looking for a peer imports its package, which takes seconds."""
    (eager,) = [provider for provider in measure.PROVIDERS if provider.name == "eager"]
    other = dataclasses.replace(eager, name="other", why_not=lambda device: pytest.fail("looked for"))
    monkeypatch.setattr(measure, "PROVIDERS", [other, eager])
    assert run("op", *SMALL, "--provider", "eager", "--runs", "1", "--mode", "forward")[0] == 0


def test_without_a_terminal_each_thing_that_is_done_is_a_line_once(run):
    two = ["--shape", "B1,T5,N2,K3,V4", "--T", "5,6", "--device", "cpu"]
    code, _, err = run("op", *two, "--provider", "eager,reference", "--runs", "4", "--mode", "forward")
    assert code == 0
    name = "B1,T5,N2,K3,V4"
    lines = err.splitlines()
    assert lines.count(f"{name} forward: eager") == lines.count(f"{name} forward: reference") == 2
    assert [line for line in lines if line.endswith("inputs")] == [f"{name} T5: inputs", f"{name} T6: inputs"]
    assert len(lines) == 2 * 7


def test_a_peer_is_held_to_our_rule_by_name_only(monkeypatch):
    checked = []
    monkeypatch.setattr(check, "choose", lambda known, names, kernel, device: (checked.append(names), {}))
    every = [dataclasses.replace(provider, why_not=lambda device: None) for provider in check.checkable()]
    monkeypatch.setattr(check, "checkable", lambda: every)
    assert list(check.run(check.CheckPlan([], [], None, [], torch.device("cuda")))) == []
    assert checked == [["triton"]]


def test_what_is_named_twice_is_run_once(run):
    shape = ["--shape", "B1,T5,N2,K3,V4", "--shape", "B1,T5,N2,K3,V4", "--T", "5,5", "--device", "cpu"]
    asked = ["--provider", "eager,eager", "--dtype", "fp32,float32", "--mode", "forward,forward", "--runs", "1"]
    assert run("op", *shape, *asked)[0] == 0
    assert len(run.rows()) == 1


def test_a_gate_on_fewer_steps_is_told_in_the_row(run):
    argv = ["op", *SMALL, "--provider", "eager", "--runs", "1", "--mode", "forward"]
    assert run(*argv, "--gate-steps", "3")[0] == 0
    assert [row.gate for row in run.rows()] == ["fp64 of an independent run, first 3 steps"]
    assert run(*argv, "--gate-steps", "5")[0] == 0
    assert [row.gate for row in run.rows()] == ["fp64 of an independent run, all steps"]


@pytest.mark.parametrize("columns", ["many", "0", "-3", ""])
def test_a_width_that_is_none_is_ignored(columns, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert run("show", RECORD, out=False)[0] == 0


def test_a_peer_that_fails_does_not_claim_to_compute_ours(run, monkeypatch):
    from bench.providers import ours

    def raises(**given):
        raise RuntimeError("no kernel")

    def peer(context):
        return dataclasses.replace(ours.scan_problem(context, raises), operator="another one")

    def not_built(context):
        raise ValueError("wrong dtype")

    monkeypatch.setattr(measure, "PROVIDERS", [_provider("peer", peer), _provider("none", not_built)])
    assert run("op", *SMALL, "--provider", "peer,none", "--mode", "forward")[0] == 1
    assert [(row.operator, row.status, row.note) for row in run.rows()] == [
        ("another one", "failed", "RuntimeError: no kernel"),
        ("", "failed", "ValueError: wrong dtype"),
    ]


def _provider(name, build):
    return Provider(name, name, ("cpu",), lambda device: None, {"op": build}, lambda shape, itemsize: 0)


def test_out_of_memory_is_a_row_and_the_run_goes_on(run, monkeypatch):
    def too_large(context):
        raise torch.OutOfMemoryError("Tried to allocate more than there is")

    (eager,) = [provider for provider in measure.PROVIDERS if provider.name == "eager"]
    monkeypatch.setattr(measure, "PROVIDERS", [_provider("huge", too_large), eager])
    code, out, _ = run("op", *SMALL, "--provider", "huge,eager", "--runs", "1", "--mode", "forward")
    assert code == 0
    assert [(row.provider, row.status, row.note) for row in run.rows()] == [
        ("huge", "oom", "out of memory"),
        ("eager", "ok", ""),
    ]
    assert "huge forward: out of memory" in out


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the free memory is not known")
def test_a_shape_beyond_the_free_memory_is_a_row_and_the_next_shape_is_run(run, monkeypatch):
    """Without a limit Linux would grant the allocation and kill the process."""
    monkeypatch.setattr(memory, "_available_bytes", lambda: 200 << 20)
    large, small = "B8,T4096,N16,K16,V64", "B1,T5,N2,K3,V4"
    argv = ["op", "--shape", large, "--shape", small, "--device", "cpu", "--provider", "eager", "--mode", "forward"]
    code, _, _ = run(*argv, "--runs", "1")
    assert code == 0
    assert [(row.T, row.status) for row in run.rows()] == [(4096, "oom"), (5, "ok")]
    torch.empty(400 << 20, dtype=torch.uint8)  # the limit is gone


def test_what_fails_the_gate_is_not_timed(run, monkeypatch):
    from bench.providers import ours

    wrong = lambda context: ours.scan_problem(context, lambda **given: m2rnn(**given, impl="eager").y * 1.1)
    monkeypatch.setattr(measure, "PROVIDERS", [_provider("wrong", wrong)])
    code, out, _ = run("op", *SMALL, "--provider", "wrong", "--mode", "forward")
    assert code == 1
    (row,) = run.rows()
    assert (row.status, row.median_ms) == ("refused", None)
    assert "correctness gate: y errs" in out


def _forgets_the_clip(context):
    from bench.providers import ours

    return ours.scan_problem(context, lambda state_grad_clip, **given: m2rnn(**given, impl="eager").y)


def test_a_refused_row_is_a_failure_whoever_else_is_right(run, monkeypatch):
    (eager,) = [provider for provider in measure.PROVIDERS if provider.name == "eager"]
    monkeypatch.setattr(measure, "PROVIDERS", [_provider("forgetful", _forgets_the_clip), eager])
    argv = ["op", *SMALL, "--clip", "0.01", "--provider", "forgetful,eager", "--runs", "1", "--mode"]
    assert run(*argv, "backward")[0] == 1
    assert [(row.provider, row.status) for row in run.rows()] == [("forgetful", "refused"), ("eager", "ok")]
    assert run(*argv, "forward")[0] == 0  # nothing is wrong with its outputs
    assert [(row.provider, row.status) for row in run.rows()] == [("forgetful", "ok"), ("eager", "ok")]


def test_a_revision_that_had_rows_refused_is_compared_by_the_others(run, monkeypatch):
    def ran(command, **options):
        before = files.Writer([Path(command[command.index("--out") + 1])])
        before.append(row)
        before.append(dataclasses.replace(row, mode="backward", status="refused", median_ms=None))
        before.close()
        return subprocess.CompletedProcess(command, 1, "", "error: a reason")

    argv = ["op", *SMALL, "--provider", "eager", "--runs", "1", "--mode", "forward"]
    assert run(*argv)[0] == 0
    (row,) = run.rows()
    monkeypatch.setattr(compare, "worktree", lambda revision: contextlib.nullcontext((Path.cwd(), "abc")))
    monkeypatch.setattr(compare.subprocess, "run", ran)
    assert [r.status for r in compare.run_revision("HEAD", argv)] == ["ok", "refused"]
    row = dataclasses.replace(row, status="refused", median_ms=None)
    with pytest.raises(ValueError, match="ended with code 1: error: a reason"):
        compare.run_revision("HEAD", argv)


def test_a_row_shows_the_error_of_what_its_mode_computes(run, monkeypatch):
    monkeypatch.setattr(measure, "PROVIDERS", [_provider("forgetful", _forgets_the_clip)])
    argv = ["op", *SMALL, "--clip", "0.01", "--provider", "forgetful", "--runs", "1"]
    run(*argv, "--mode", "inference,forward,backward")
    error = {row.mode: row.error_ratio for row in run.rows()}
    assert 0 < error["inference"] == error["forward"] <= 1 < error["backward"]


@pytest.mark.parametrize("command", [[], ["op"], ["model"]])
def test_help_says_what_the_exit_codes_mean(command, run):
    _, out, _ = run(*command, "--help", out=False)
    assert "1    a row was refused by the correctness gate" in out


@pytest.mark.parametrize("kernel", ["op", "layer", "model"])
def test_what_computes_something_else_without_gradients_gets_no_time_for_inference(kernel, run, monkeypatch):
    (eager,) = [provider for provider in measure.PROVIDERS if provider.name == "eager"]

    def build(context):
        problem = eager.build[kernel](context)

        def call(given):
            y = problem.call(given)
            return y if torch.is_grad_enabled() else tuple(torch.zeros_like(x) for x in y)

        return dataclasses.replace(problem, call=call)

    cheat = dataclasses.replace(eager, name="cheat", build={kernel: build})
    monkeypatch.setattr(measure, "PROVIDERS", [cheat, eager])
    run(kernel, *SMALL, "--provider", "cheat,eager", "--mode", "inference,forward", "--runs", "1")
    assert [(row.provider, row.mode, row.status) for row in run.rows()] == [
        ("cheat", "inference", "refused"),
        ("eager", "inference", "ok"),
        ("cheat", "forward", "ok"),
        ("eager", "forward", "ok"),
    ]
    assert "correctness gate: y errs" in run.rows()[0].note


def test_ctrl_c_keeps_finished_rows(run, monkeypatch):
    original = measure.run

    def interrupted(plan, on_run):
        for number, row in enumerate(original(plan, on_run)):
            if number == 1:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(measure, "run", interrupted)
    code, out, err = run("op", *SMALL, "--provider", "eager", "--runs", "1")
    assert code == 130
    assert "interrupted; 1 finished rows are kept" in err
    assert "median ms" in out
    assert len(run.rows()) == 1


def test_a_lost_gpu_ends_the_run_in_one_line_and_keeps_what_is_finished(run, monkeypatch):
    original = measure.run

    def lost(plan, on_run):
        yield next(original(plan, on_run))
        raise measure.DeviceLost("xma left the GPU unusable")

    monkeypatch.setattr(measure, "run", lost)
    code, out, err = run("op", *SMALL, "--provider", "eager", "--runs", "1")
    assert code == 1
    assert "xma left the GPU unusable; 1 finished rows are kept" in err
    assert "Traceback" not in err
    assert "median ms" in out
    assert len(run.rows()) == 1


def test_a_kernel_that_breaks_the_context_is_named(monkeypatch):
    error = RuntimeError("CUDA error: an illegal memory access was encountered")

    def broken():
        raise error

    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    shape = parse_shape("B1,T32768,N132,K64,V16")
    plan = measure.Plan("op", [shape], [torch.bfloat16], None, ["forward"], torch.device("cuda"))
    group = types.SimpleNamespace(plan=plan, shape=shape, failed={}, problems={})
    with pytest.raises(measure.DeviceLost, match=r"^xma left the GPU unusable .*T32768.*without this shape$"):
        measure._Group.fail(group, "xma", error)


def test_an_interrupted_run_without_rows_leaves_no_file(run, monkeypatch):
    def interrupted(plan, on_run):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(measure, "run", interrupted)
    assert run("op", *SMALL, "--provider", "eager")[0] == 130
    assert not run.path.exists()


@pytest.mark.parametrize(
    "mistake",
    [
        ["op", *SMALL, "--provider", "nonsense"],
        ["op", *SMALL, "--provider", "triton"],  # not on a CPU
        ["op", *SMALL, "--provider", "eager", "--out", "/proc/y.csv"],
        ["op", *SMALL, "--provider", "eager", "--out", "rows.xlsx"],
        ["check", *SMALL, "--provider", "nonsense"],
    ],
)
def test_a_mistake_leaves_the_file_that_out_names_as_it_was(mistake, run):
    run.path.write_text("figures of last year\n")
    command, *rest = mistake
    assert run(command, "--out", str(run.path), *rest, out=False)[0] == 2
    assert run.path.read_text() == "figures of last year\n"
    assert [path.name for path in run.path.parent.iterdir()] == [run.path.name]


def test_ctrl_c_before_the_first_row_leaves_the_file_that_out_names_as_it_was(run, monkeypatch):
    def interrupted(plan, on_run):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(measure, "run", interrupted)
    run.path.write_text("figures of last year\n")
    assert run("op", *SMALL, "--provider", "eager")[0] == 130
    assert run.path.read_text() == "figures of last year\n"
    assert [path.name for path in run.path.parent.iterdir()] == [run.path.name]


def test_fail_above_judges_against_a_baseline(run, tmp_path):
    argv = ["op", *SMALL, "--provider", "eager", "--runs", "1", "--mode", "forward"]
    assert run(*argv)[0] == 0
    (row,) = run.rows()
    for name, factor in (("fast", 1e-3), ("slow", 1e3)):
        scaled = {n: getattr(row, n) * factor for n in ("median_ms", "p20_ms", "p80_ms")}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row.to_dict() | scaled) + "\n")
    code, out, err = run(*argv, "--fail-above", "1.2", "--baseline", str(tmp_path / "fast.jsonl"))
    assert code == 1
    assert re.search(r"error: op eager forward .* is [\d.]+x its baseline \(limit 1.2x\)", err)
    assert "slower" in out
    assert run(*argv, "--fail-above", "1.2", "--baseline", str(tmp_path / "slow.jsonl"))[0] == 0
    other = json.dumps(row.to_dict() | {"T": 6})
    (tmp_path / "other.jsonl").write_text(other + "\n")
    code, _, err = run(*argv, "--fail-above", "1.2", "--baseline", str(tmp_path / "other.jsonl"))
    assert code == 1
    assert "nothing to compare" in err


def test_a_limit_that_had_nothing_to_look_at_is_a_failure(run, tmp_path):
    """A gate is not green because its baseline is of another machine."""
    argv = ["op", *SMALL, "--provider", "eager", "--runs", "1", "--mode", "forward"]
    assert run(*argv)[0] == 0
    (row,) = run.rows()
    threads = row.config["threads"]
    for columns, why in (
        ({"config": row.config | {"threads": threads + 2}}, f"threads {threads + 2} against {threads}"),
        ({"device": "abacus"}, f"device abacus against {row.device}"),
    ):
        path = tmp_path / "elsewhere.jsonl"
        slow = {n: getattr(row, n) * 1e3 for n in ("median_ms", "p20_ms", "p80_ms")}
        path.write_text(json.dumps(row.to_dict() | slow | columns) + "\n")
        limit = ["--fail-above", "1.2", "--baseline", str(path)]
        code, out, err = run(*argv, *limit)
        assert code == 1
        assert f"not comparable: {row.describe()}: {why}" in out
        assert f"error: --fail-above: nothing to compare: the baseline was measured elsewhere ({why})" in err
        assert run(*argv, *limit, "--any-device")[0] == 0
        assert run(*argv, "--baseline", str(path))[0] == 0  # no limit was asked for

        files_of = ["compare", str(path), str(run.path)]
        assert run(*files_of, out=False)[0] == 0
        code, out, err = run(*files_of, "--fail-above", "2", out=False)
        assert (code, "nothing to compare" in err) == (1, True)
        code, out, _ = run(*files_of, "--fail-above", "2", "--any-device", out=False)
        assert code == 0
        assert "faster" in out

    backward = dataclasses.replace(row, mode="backward")
    both, now = tmp_path / "both.jsonl", tmp_path / "now.jsonl"
    for path, other in ((both, dataclasses.replace(backward, device="abacus")), (now, backward)):
        path.write_text(files.to_jsonl(other) + "\n" + files.to_jsonl(row))
    code, _, err = run("compare", str(both), str(now), "--fail-above", "2", out=False)
    assert code == 0
    assert f"warning: 1 not comparable and not judged (device abacus against {row.device})" in err


def test_two_files_are_compared(run, tmp_path):
    argv = ["op", *SMALL, "--provider", "eager", "--runs", "1", "--mode", "forward"]
    assert run(*argv)[0] == 0
    (row,) = run.rows()
    slower = tmp_path / "slower.csv"
    with files.Writer([slower]) as writer:
        writer.append(
            dataclasses.replace(row, median_ms=3 * row.median_ms, p20_ms=3 * row.p20_ms, p80_ms=3 * row.p80_ms)
        )
    code, out, _ = run("compare", str(run.path), str(slower), out=False)
    assert code == 0
    assert "3.000" in out
    assert "slower" in out
    code, _, err = run("compare", str(run.path), str(slower), "--fail-above", "2", out=False)
    assert code == 1
    assert "3.00x what it was (limit 2x)" in err
    assert run("compare", str(slower), str(run.path), "--fail-above", "2", out=False)[0] == 0


def test_a_report_is_markdown(run, tmp_path):
    argv = ["report", str(record.RESULTS / "op-h200-20261124.json")]
    code, out, _ = run(*argv, out=False)
    assert code == 0
    assert "## op, B8 T4096 N84 K64 V16, bfloat16, clip 1.0" in out
    code, nothing, _ = run(*argv, "--out", str(tmp_path / "report.md"), out=False)
    assert (code, nothing) == (0, "")
    assert (tmp_path / "report.md").read_text() == out


def test_plots_need_matplotlib_and_say_so(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = ["report", str(record.RESULTS / "op-h200-20261124.json"), "--plot", str(tmp_path / "plots")]
    code, _, err = run(*argv, out=False)
    assert code == 2
    assert "--plot needs matplotlib: pip install" in err


def test_make_test_installs_what_draws_plots():
    """Else the tests below are skipped where everything is tested."""
    root = Path(cli.__file__).parents[1]
    _, _, extras = (root / "pyproject.toml").read_text().partition("\ndev = [")
    assert '"matplotlib>=' in extras.partition("\n]")[0]
    pinned = re.findall(r"^([\w-]+)==", (root / "constraints.txt").read_text(), re.MULTILINE)
    brought = "contourpy cycler fonttools kiwisolver numpy packaging pillow pyparsing python-dateutil tzdata"
    assert {"matplotlib", *brought.split()} <= set(pinned)


def test_plots_are_drawn(run, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib (extras: plot, dev) is not installed")
    folder = tmp_path / "plots"
    assert run("report", str(record.RESULTS / "op-h200-20261124.json"), "--plot", str(folder), out=False)[0] == 0
    assert {path.name for path in folder.iterdir()} == {"latency.png", "memory.png", "floor.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())


def test_a_summary_is_one_table_and_one_plot(run, tmp_path, monkeypatch):
    code, out, _ = run("report", RECORD, "--summary", "--provider", "triton,xma", out=False)
    assert code == 0
    assert [line.split(" | ")[2:] for line in out.splitlines() if line.startswith("| A: ")] == [
        ["1.484 (429)", "4.112 (91), 2.77x |"],
        ["6.717 (495)", "18.56 (5,578), 2.76x |"],
    ]
    apart = tmp_path / "apart.jsonl"
    with files.Writer([apart]) as writer:
        for row in files.read(record.RESULTS / "op-h200-20261124.json"):
            if (row.provider == "xma") == (row.shape == "D"):
                writer.append(row)
    code, _, err = run("report", str(apart), "--summary", out=False)
    assert code == 2
    assert "no problem was measured with two providers" in err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("report", RECORD, "--summary", "--plot", str(tmp_path), out=False)
    assert code == 2
    assert "--plot needs matplotlib: pip install" in err


def test_the_plot_of_a_summary_needs_lengths_and_is_the_same_every_time(run, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib (extras: plot, dev) is not installed")
    rows = [row for row in files.read(record.RESULTS / "op-h200-20261124.json") if row.shape == "C"]
    path = tmp_path / "sweep.jsonl"
    argv = ["report", str(path), "--summary", "--plot", str(tmp_path / "plots")]
    for lengths, expected in ((1, 2), (2, 0), (2, 0)):
        with files.Writer([path]) as writer:
            for T in (16384, 32768)[:lengths]:
                for row in rows:
                    writer.append(dataclasses.replace(row, T=T))
        code, _, err = run(*argv, out=False)
        assert code == expected, err
    plot = tmp_path / "plots/summary.svg"
    first = plot.read_bytes()
    assert b"<svg" in first
    assert run(*argv, out=False)[0] == 0
    assert plot.read_bytes() == first


def test_check_exits_with_1_on_a_fault(run, monkeypatch):
    def wrong(*args, state_grad_clip=None, **options):
        return m2rnn(*args, impl="eager", **options)  # forgets the clip

    monkeypatch.setattr(check, "scan_of", lambda name: wrong)
    code, out, _ = run("check", *SMALL, "--clip", "0.1", "--repeats", "1", "--provider", "eager")
    assert code == 1
    assert "FAIL" in out
    assert {row.status for row in run.rows()} == {"refused"}


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


def test_gpu_test_reports_can_be_shown(run, tmp_path):
    rows = [
        {"test": "t.py::a", "outcome": "passed", "message": ""},
        {"test": "t.py::b", "outcome": "failed", "message": "x"},
    ]
    path = record.write(record.make_record("test-gpu", ["make test-gpu"], rows), tmp_path / "gpu.json")
    code, out, _ = run("show", str(path), out=False)
    assert code == 0
    assert "1 failed, 1 passed" in out
    assert "t.py::b" in out


@pytest.mark.parametrize("path", sorted(record.RESULTS.glob("*.json*")), ids=lambda path: path.name)
def test_committed_results_can_be_shown(path, run):
    code, out, _ = run("show", str(path), out=False)
    assert code == 0
    assert out.strip()
