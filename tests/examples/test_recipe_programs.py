# SPDX-License-Identifier: Apache-2.0
"""The recipes as programs: what they refuse before anything runs, and what is left of runs that end early."""

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RECORDS = ROOT / "bench" / "results" / "reproduction"
NAMES = ("state_tracking", "layer_swap", "long_context")


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    """Tables with whole names, also where there is no terminal to be wide."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module", autouse=True)
def modules():
    sys.path.insert(0, str(EXAMPLES))
    import layer_swap
    import long_context
    import recipes
    import state_tracking

    yield dict(recipes=recipes, state_tracking=state_tracking, layer_swap=layer_swap, long_context=long_context)
    sys.path.remove(str(EXAMPLES))


@pytest.fixture
def swap(modules, monkeypatch):
    """layer_swap with the shortest of texts."""
    text = torch.randint(1, 256, (50_000,), dtype=torch.uint8)
    data = modules["layer_swap"].ByteData(text, text[:20_000], ("a",), ("b",), (), "fingerprint")
    monkeypatch.setattr(modules["layer_swap"], "load_text", lambda *_: data)
    return modules["layer_swap"]


def call(module, *arguments):
    try:
        return module.main([str(a) for a in arguments])
    except SystemExit as end:  # of argparse
        return end.code


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- refused before anything runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", NAMES)
@pytest.mark.parametrize(
    "options, said",
    [
        (["--seeds", "-1"], "expected a whole number from 0 to 99999, got '-1'"),
        (["--seeds", "one"], "got 'one'"),
        (["--seeds", "1000000"], "got '1000000'"),  # the words, text and keys of the tests are drawn with it
        (["--seeds", "0", "0"], "--seeds 0 0: give each seed once"),
        (["--steps", "0"], "expected a number above 0, got '0'"),
        (["--steps", "-1"], "got '-1'"),
        (["--steps", "nan"], "got 'nan'"),
        (["--minutes", "0"], "expected a number above 0, got '0'"),
        (["--minutes", "inf"], "got 'inf'"),
        (["--only", "("], "is no regular expression"),
        (["--only", "no such model"], "--only 'no such model': no run of --preset cpu has such a name"),
        (["--only", "no such model", "--list"], "no run of --preset cpu has such a name"),
        (["--from-record", "/nowhere.jsonl"], "/nowhere.jsonl: cannot be read"),
        (["--from-record", "a.jsonl", "--out", "b.jsonl"], "nothing for --out"),
        (["--plot", "plot.txt"], "must end in .svg, .png or .pdf"),
        (["--plot", "/dev/null/plot.svg"], "cannot be written there"),
    ],
)
def test_bad_options_end_in_one_line(modules, recipe, options, said, capsys, monkeypatch):
    monkeypatch.setattr(modules["recipes"].importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(modules["recipes"], "run_jobs", lambda *_, **__: pytest.fail("it ran"))
    assert call(modules[recipe], *options) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.splitlines()[-1].count("error: ") == 1
    assert not shown.out


def test_a_missing_matplotlib_is_told_before_training(modules, monkeypatch, capsys):
    monkeypatch.setattr(modules["recipes"].importlib.util, "find_spec", lambda name: None)
    assert call(modules["layer_swap"], "--plot", "plot.svg") == 2
    assert "pip install 'm2rnn-compile[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["layer_swap", "long_context"])
@pytest.mark.parametrize(
    "train, held_out, said", [(900, 9000, "900 bytes to train on"), (9000, 4096, "4096 bytes to hold")]
)
def test_a_machine_with_too_little_text_is_told(modules, recipe, train, held_out, said, monkeypatch, capsys):
    """Positions that no text reaches would have a loss of zero."""
    text = lambda size: torch.ones(size, dtype=torch.uint8)
    data = modules["layer_swap"].ByteData(text(train), text(held_out), ("a",), ("b",), (), "fingerprint")
    monkeypatch.setattr(modules["layer_swap"], "load_text", lambda *_: data)
    monkeypatch.setattr(modules["recipes"], "run_jobs", lambda *_, **__: pytest.fail("it ran"))
    assert call(modules[recipe]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("recipe", NAMES)
def test_a_missing_gpu_is_told(modules, recipe, tmp_path, capsys):
    assert call(modules[recipe], "--preset", "h200", "--out", tmp_path / "a.jsonl") == 2
    assert "--preset h200 needs a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_concurrent_runs_are_one_or_more(modules, capsys):
    for number in ("0", "-1"):
        assert call(modules["state_tracking"], "--concurrent", number) == 2
        assert "invalid choice" in capsys.readouterr().err


# -- what can be asked for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe, runs", [("state_tracking", 4), ("layer_swap", 8), ("long_context", 12)])
def test_list_prints_the_runs_and_trains_nothing(modules, recipe, runs, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(modules["recipes"], "run_jobs", lambda *_, **__: pytest.fail("it ran"))
    assert call(modules[recipe], "--list", "--out", tmp_path / "a.jsonl") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) == runs
    assert all(re.search(r"seed \d$", line) for line in lines)
    assert call(modules[recipe], "--list", "--only", "gated deltanet", "--seeds", 7) == 0
    found = capsys.readouterr().out.splitlines()
    assert found
    assert all("gated deltanet" in line and line.endswith("seed 7") for line in found)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("preset", ["h200", "cpu-long"])
def test_every_model_and_variant_of_the_claim_can_be_run(modules, preset, capsys):
    assert call(modules["state_tracking"], "--preset", preset, "--list") == 0
    listed = capsys.readouterr().out
    for task in ("S3", "A5", "S5", "parity"):
        for seed in range(3):
            assert f"{task}, m2rnn, for state tracking, seed {seed}\n" in listed
    for model in (
        *("m2rnn, the paper's block", "bare recurrence", "tracking, W identity", "tracking, W orthogonal"),
        *("tracking, no gate", "tracking, no residual", "tracking, no norm", "tracking, exact tanh", "tracking, fp32"),
        *("tracking, fp32, approximate tanh", "gru", "gated deltanet", "gated deltanet [-1, 1]"),
        "softmax attention, 2 layers",
    ):
        assert f"S3, {model}, seed 0" in listed, model


def test_fp32_runs_on_a_gpu_when_named_only(modules, monkeypatch):
    tracking, asked = modules["state_tracking"], []
    monkeypatch.setattr(modules["recipes"], "device_of", lambda preset: torch.device("cpu"))
    measure = lambda args, console, recipe, device, jobs, **_: asked.extend(title for title, _ in jobs) or []
    monkeypatch.setattr(modules["recipes"], "measure", measure)
    assert call(tracking, "--preset", "h200", "--only", "^S3, tracking") == 0
    assert "S3, tracking, exact tanh, seed 0" in asked
    assert not any("fp32" in title for title in asked)
    asked.clear()
    assert call(tracking, "--preset", "h200", "--only", "fp32") == 0
    assert asked == ["S3, tracking, fp32, seed 0", "S3, tracking, fp32, approximate tanh, seed 0"]


# -- records -----------------------------------------------------------------------------------------------------------


def trained(row):
    """A job that takes one turn, and trains nothing."""

    def train(model, seed, *_):
        yield 0.5, "half of it"
        return row | dict(model=model, seed=seed)

    return train


ROW = dict(pattern="M", parameters=1, bits_per_byte=1.0, tokens_per_s=1, steps=1, loss=[1.0], summary="done")


def test_a_record_is_never_written_over(swap, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(swap, "train", trained(ROW))
    out = tmp_path / "new" / "folder" / "record.jsonl"
    assert call(swap, "--only", "^m2rnn", "--out", out) == 0
    before = out.read_text()
    assert [row.get("model") for row in lines_of(out)] == [None, "m2rnn", None]
    assert call(swap, "--only", "^gated", "--out", out) == 2
    assert f"--out {out} is there already" in capsys.readouterr().err
    assert out.read_text() == before
    assert call(swap, "--only", "^m2rnn", "--out", "/dev/null") == 0  # no file to lose


def test_a_place_that_cannot_be_written_is_told_before_training(swap, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(swap, "train", lambda *_: pytest.fail("it ran"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "record.jsonl", tmp_path):
        assert call(swap, "--out", out) == 2
        assert f"--out {out}" in capsys.readouterr().err


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (RuntimeError, None)])
def test_a_run_that_is_cut_off_keeps_what_it_has(swap, error, code, monkeypatch, tmp_path, capsys):
    def train(model, seed, *rest):
        if model == "hybrid m2rnn":
            yield 0.1, "a while"
            raise error
        return (yield from trained(ROW)(model, seed))

    monkeypatch.setattr(swap, "train", train)
    out = tmp_path / "record.jsonl"
    if code is None:
        with pytest.raises(error):
            call(swap, "--out", out)
    else:
        assert call(swap, "--out", out) == code
        assert f"interrupted; {out} has what was done" in capsys.readouterr().err
    _, *rows, end = lines_of(out)
    assert [row["model"] for row in rows] == list(swap.MODELS)[:2]
    assert end["stopped_by"] == error.__name__
    assert len(end["left_out"]) == 6
    assert "hybrid m2rnn, seed 0" in end["left_out"]
    assert call(swap, "--from-record", out) == 0
    assert "hybrid gated deltanet + 1 m2rnn" in capsys.readouterr().out


def test_a_run_without_a_row_leaves_no_file_in_the_way(swap, monkeypatch, tmp_path):
    def train(*_):
        yield 0.1, "a while"
        raise KeyboardInterrupt

    monkeypatch.setattr(swap, "train", train)
    assert call(swap, "--out", tmp_path / "record.jsonl") == 130
    assert not list(tmp_path.iterdir())


def test_minutes_start_one_run_at_least_and_name_the_others(swap, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(swap, "train", trained(ROW))
    out = tmp_path / "record.jsonl"
    assert call(swap, "--minutes", 1e-9, "--out", out) == 0
    _, row, end = lines_of(out)
    assert row["model"] == "hybrid gated deltanet"
    assert len(end["left_out"]) == 7
    assert "1 runs in 0 s; 7 left out" in capsys.readouterr().out


def test_a_record_tells_work_from_waiting(swap, monkeypatch, tmp_path):
    def train(model, seed, *rest):
        start = time.process_time()
        while time.process_time() < start + 0.3:
            pass
        time.sleep(0.5)
        return (yield from trained(ROW)(model, seed))

    monkeypatch.setattr(swap, "train", train)
    assert call(swap, "--only", "^m2rnn", "--out", tmp_path / "record.jsonl") == 0
    end = lines_of(tmp_path / "record.jsonl")[-1]
    assert 0.3 <= end["cpu_seconds"] <= end["seconds"] - 0.4


def test_records_that_are_none_are_told_and_half_a_last_line_is_borne(modules, tmp_path, capsys):
    swap, file = modules["layer_swap"], tmp_path / "record.jsonl"
    whole = (RECORDS / "layer-swap-cpu.jsonl").read_text()
    for content, said in (
        ("", "is no record of a recipe"),
        ("[1]\n", "is no record of a recipe"),
        ("text\n", "line 1 is no JSON"),
        (whole.replace("\n", "\n{half\n", 1), "line 2 is no JSON"),
        ((RECORDS / "state-tracking-cpu.jsonl").read_text(), "expected reproduction-layer-swap"),
    ):
        file.write_text(content)
        assert call(swap, "--from-record", file) == 2
        assert said in capsys.readouterr().err
    file.write_text("\n".join(whole.splitlines()[:3]) + '\n{"model": "hyb')  # killed while it wrote
    assert call(swap, "--from-record", file) == 0
    assert "hybrid gated deltanet" in capsys.readouterr().out


# -- kept weights ------------------------------------------------------------------------------------------------------


def test_weights_of_another_training_are_refused_before_anything_runs(swap, modules, tmp_path, monkeypatch, capsys):
    long = modules["long_context"]
    options = ("--only", "^m2rnn", "--seeds", 0, "--weights", tmp_path)
    assert call(swap, *options, "--steps", 0.02) == 0
    (file,) = tmp_path.iterdir()
    assert file.name == "m2rnn, seed 0.pt"
    monkeypatch.setattr(modules["recipes"], "run_jobs", lambda *_, **__: pytest.fail("it ran"))
    for more, said in (((), "steps 2, expected 90"), (("--preset", "cpu-long", "--steps", 0.002), "batch_size 4")):
        assert call(long, *options, *more) == 2
        assert said in capsys.readouterr().err
    torch.save(dict(state={}), file)
    assert call(long, *options) == 2
    assert "no word of seq_len" in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:100])
    assert call(long, *options) == 2
    assert f"{file}: cannot be read as weights" in capsys.readouterr().err


def test_long_context_reads_the_weights_that_the_swap_kept(swap, modules, tmp_path, monkeypatch):
    options = ("--only", "^m2rnn", "--seeds", 0, "--weights", tmp_path, "--steps", 0.02)
    assert call(swap, *options) == 0
    monkeypatch.setattr(swap, "train", lambda *_: pytest.fail("it trains again"))
    monkeypatch.setattr(modules["long_context"], "TIMES", (1,))
    assert call(modules["long_context"], *options, "--probe", "position", "--out", tmp_path / "a.jsonl") == 0
    assert len(lines_of(tmp_path / "a.jsonl")[1]["bits"]) == 7


def test_an_interrupted_save_leaves_no_half_of_the_weights(modules, tmp_path, monkeypatch):
    recipes, file = modules["recipes"], tmp_path / "weights.pt"
    recipes.save_weights(dict(of={}, x=1), file)

    def save(state, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes.torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        recipes.save_weights(dict(of={}, x=2), file)
    assert torch.load(file)["x"] == 1


def test_a_run_from_kept_weights_has_the_same_row(modules, tmp_path, monkeypatch, capsys):
    tracking = modules["state_tracking"]
    measured = {key: dict.fromkeys((128, 512, 1024, 4096), 0.5) for key in ("exact", "token", "last")}
    weight_of = lambda model: sum(p.double().sum().item() for p in model.parameters())
    monkeypatch.setattr(tracking, "test", lambda model, *_: measured | dict(weight=weight_of(model)))
    options = ("--only", "S3, m2rnn, the paper", "--weights", tmp_path / "weights")
    rows = []
    for name in ("first", "again"):
        assert call(tracking, *options, "--steps", 0.02, "--out", tmp_path / name) == 0
        rows.append(lines_of(tmp_path / name)[1])
    assert [row.pop("kept_weights") for row in rows] == [False, True]
    for row in rows:
        del row["seconds"]
    assert rows[0] == rows[1]
    assert rows[0]["steps"] == 25
    assert rows[0]["reached"]
    capsys.readouterr()
    assert call(tracking, *options, "--steps", 0.1) == 2
    assert "was trained with steps 25, expected 75" in capsys.readouterr().err


# -- what is printed ---------------------------------------------------------------------------------------------------


def show(*command, terminal, **environment):
    """What a program prints to a pipe, or to a terminal of 140 columns."""
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"} | environment
    if not terminal:
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True).stdout
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, env=env | {"COLUMNS": "140"}, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # the end, on Linux
        pass
    os.close(ours)
    assert process.wait(timeout=120) == 0
    return shown.decode()


def test_tables_are_whole_without_a_terminal_and_have_no_colours_where_none_are_wanted():
    recipe, record = EXAMPLES / "state_tracking.py", RECORDS / "state-tracking-h200-20261127.jsonl"
    command = (sys.executable, str(recipe), "--from-record", str(record))
    piped = show(*command, terminal=False)
    assert "\x1b" not in piped
    assert "gated deltanet [-1, 1], 2 layers" in piped
    assert "…" not in piped.replace(" … ", "")  # nothing is cut short; spreads have one, too
    coloured, plain = (show(*command, terminal=True, **more) for more in ({}, {"NO_COLOR": "1"}))
    colour = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
    assert colour.search(coloured)
    assert not colour.search(plain)
