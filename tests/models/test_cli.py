# SPDX-License-Identifier: Apache-2.0
"""The command line: the whole demo on a small model, and what users get wrong."""

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from m2rnn_compile.__main__ import main
from tests.models.helpers import CONFIG, write_texts

demo = pytest.importorskip("m2rnn_compile.demo")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _small(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "MODEL", CONFIG)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def texts(tmp_path):
    return str(write_texts(tmp_path / "texts", 20))


def trained(texts, *more):
    return main(["demo", "--data", texts, "--out", "run", "--eager", "--threads", "1", "--steps", "3", *more])


def test_the_whole_demo_then_generate(texts, capfd):
    assert trained(texts) == 0
    out = capfd.readouterr().out
    for word in ("training", "gzip -9", "unigram", "this model", "a continuation", "agrees", "all well"):
        assert word in out
    assert main(["generate", "run", "--prompt", "All work", "--max-new-tokens", "5", "--threads", "1"]) == 0
    assert capfd.readouterr().out.startswith("All work")


def test_a_differing_export_gives_status_one(texts, capfd, monkeypatch):
    good = demo.export_model

    def other_weights(model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.transformer.ln_f.weight.mul_(1.01)
        return good(other)

    monkeypatch.setattr(demo, "export_model", other_weights)
    assert trained(texts) == 1
    assert "DIFFERS" in capfd.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["demo", "--eager", "--data", "nowhere"], "'nowhere' does not exist"),
        (["demo", "--eager", "--resume", "--out", "nowhere"], "no checkpoint at 'nowhere'"),
        (["demo", "--eager", "--resume"], "nothing to resume"),
        (["generate", "nowhere"], "no checkpoint at 'nowhere'"),
        (["demo", "--eager", "--data", "texts", "--out", "texts/file00.txt"], "cannot write to the folder"),
        (["demo", "--eager", "--data", "texts", "--out", "/proc"], "cannot write to the folder '/proc'"),
        (["generate", "run/checkpoints/step-00000009"], "there is no such folder"),
        (["check-export", "nowhere.pt2", "nowhere.safetensors"], "cannot read 'nowhere.safetensors'"),
        (["check-export", "nowhere.pt2", "some.safetensors"], "cannot load 'nowhere.pt2': there is no such file"),
        (["check-export", "cut.pt2", "some.safetensors"], "cannot load 'cut.pt2': not an exported program, or cut"),
    ],
)
def test_user_errors_give_status_two_and_one_message(argv, message, texts, capfd):
    Path("cut.pt2").write_bytes(b"PK\3\4 and no more")
    demo.save_file({"tokens.0": torch.zeros(1, 1, dtype=torch.int64)}, "some.safetensors")
    before = sorted(Path().rglob("*"))
    assert main(argv) == 2
    captured = capfd.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err + captured.out
    assert sorted(Path().rglob("*")) == before  # no empty folder of a run that never was


def test_misuse_of_a_run_folder(texts, capfd):
    assert trained(texts) == 0
    for argv, message in (
        ([], "already holds a run; go on with it by --resume"),
        (["--resume", "--seed", "5"], "--seed 5 cannot be combined with --resume: the run was started with 0"),
        (["--resume"], None),  # a finished run: scores, generates, exports again
    ):
        status = trained(texts, *argv)
        assert status == (0 if message is None else 2)
        assert message is None or message in capfd.readouterr().err
    state = next(Path("run/checkpoints").glob("step-*/state.json"))
    good = state.read_text()
    state.write_text(good.replace('"MAM"', '"MZM"'))
    assert trained(texts, "--resume") == 2
    assert "no mixer has the letter 'Z'" in capfd.readouterr().err
    state.write_text(good)
    _generate_where_the_output_is_no_friend(capfd)
    Path(texts, "file03.txt").write_text("changed since")
    assert trained(texts, "--resume") == 2
    assert "another data" in capfd.readouterr().err
    model = next(Path("run/checkpoints").glob("step-*/model.safetensors"))
    model.write_bytes(model.read_bytes()[:100])
    assert main(["generate", "run"]) == 2
    assert "model.safetensors' is truncated" in capfd.readouterr().err


def _generate_where_the_output_is_no_friend(capfd):
    """In processes of their own: standard output is a pipe that closes early, or one that knows ASCII only."""
    command = [sys.executable, "-m", "m2rnn_compile", "generate", "run", "--threads", "1", "--max-new-tokens"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, "5000"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    env |= {"PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run([*command, "3", "--prompt", b"caf\xc3\xa9 \xff"], env=env, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"caf? ?")


def test_no_compiler_is_said_before_anything_else(monkeypatch, texts, capfd):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert main(["demo", "--data", texts, "--out", "run"]) == 2
    assert "needs a C++ compiler" in capfd.readouterr().err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["demo", "--steps", "0"], "must be a whole number, at least 1, got '0'"),
        (["demo", "--steps", "1.5"], "must be a whole number, at least 1, got '1.5'"),
        (["demo", "--minutes", "-1"], "must be a number greater than 0, got '-1'"),
        (["demo", "--minutes", "nan"], "must be a number greater than 0, got 'nan'"),
        (["demo", "--seed", "9" * 30], "must be a whole number from 0 to 2**63 - 1"),
        (["generate", "x", "--top-p", "2"], "must be a number in (0, 1], got '2'"),
        (["demo", "--out", ""], "argument --out: must be a path, got ''"),
        (["demo", "--data", ""], "argument --data: must be a path, got ''"),
        (["generate", ""], "must be a path, got ''"),
        ([], "required: COMMAND"),
    ],
)
def test_bad_options_give_status_two(argv, message, capfd):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert message in capfd.readouterr().err


def test_help_teaches(capfd):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    out = capfd.readouterr().out
    assert "examples:" in out
    assert "--resume" in out


def test_ctrl_c_saves_and_resume_ends_with_the_same_weights(texts, tmp_path):
    """In a process of its own: the signal comes from outside, at no particular moment."""
    options = ["--data", texts, "--eager", "--threads", "1"]
    command = [sys.executable, "-m", "m2rnn_compile", "demo"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}

    def start(*more):
        return subprocess.Popen([*command, *more], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    process = start(*options, "--steps", "6", "--out", "parts")
    log = Path("parts/log.jsonl")
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, (out, err)
    assert "nothing is lost" in out
    assert "Traceback" not in err
    for process in (start("--resume", "--out", "parts", "--eager"), start(*options, "--steps", "6", "--out", "whole")):
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, (out, err)
    a, b = (demo.load(folder) for folder in ("parts", "whole"))
    assert a.path.name == b.path.name == "step-00000006"
    assert all(torch.equal(a.model[n], b.model[n]) for n in b.model)
    assert all(torch.equal(a.optimizer[n], b.optimizer[n]) for n in b.optimizer)
