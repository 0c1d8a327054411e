# SPDX-License-Identifier: Apache-2.0
"""Training: a resumed run is bit for bit the uninterrupted one; damaged checkpoints are told apart."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from m2rnn_compile.layers import param_groups
from m2rnn_compile.models import AttentionConfig, LMConfig, checkpoint, lm, swap_layer
from m2rnn_compile.models.checkpoint import CheckpointError
from m2rnn_compile.models.data import load_folder
from m2rnn_compile.models.display import duration, sparkline
from m2rnn_compile.models.train import LOG, TrainConfig, Trainer, TrainingError, bits_per_byte, stop_on_signals
from tests.models.helpers import CONFIG, largest_file, make_model, write_texts

TRAIN = TrainConfig(steps=6, batch_size=2, seq_len=24, warmup=2, checkpoint_every=2, compile=False, threads=1)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data(tmp_path):
    return load_folder(write_texts(tmp_path / "texts"))


def weights(trainer):
    state = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    for name, p in trainer.model.named_parameters():
        state |= {f"{key}.{name}": x.clone() for key, x in trainer.optimizer.state[p].items()}
    return state


def identical(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def stop_after(trainer, step):
    return lambda: trainer.step >= step


@pytest.mark.parametrize("compile,at", [(False, 3), (False, 4), pytest.param(True, 3, marks=pytest.mark.slow)])
def test_interrupted_and_resumed_equals_uninterrupted_bit_by_bit(tmp_path, data, compile, at):
    config = dataclasses.replace(TRAIN, compile=compile)
    whole = Trainer(CONFIG, config, data, tmp_path / "whole")
    assert whole.run()

    first = Trainer(CONFIG, config, data, tmp_path / "parts")
    assert not first.run(stop=stop_after(first, at))
    torch.manual_seed(99)  # a resumed run must not lean on what this process did before
    second = Trainer(CONFIG, config, data, tmp_path / "parts")
    second.resume()
    assert second.step == at
    assert second.run()
    assert identical(weights(second), weights(whole))
    strip = lambda line: {k: v for k, v in json.loads(line).items() if k != "seconds"}
    logs = [[strip(line) for line in (tmp_path / d / LOG).read_text().splitlines()] for d in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[0]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "compile,at", [(False, 2), (False, 3), (False, 4), pytest.param(True, 3, marks=pytest.mark.slow)]
)
def test_a_run_with_a_swapped_layer_resumes_bit_by_bit(tmp_path, data, compile, at):
    """Right after the swap (2) the new layer has no moments yet, and the checkpoint of that step is from before it."""
    train = dataclasses.replace(TRAIN, compile=compile)

    def swapped(out):
        trainer = Trainer(CONFIG, train, data, out)
        trainer.run(stop=stop_after(trainer, 2))
        swap_layer(trainer.model, 0, "A", optimizer=trainer.optimizer)
        return trainer

    whole = swapped(tmp_path / "whole")
    assert whole.run()

    first = swapped(tmp_path / "parts")
    first.run(stop=stop_after(first, at))
    saved = json.loads((checkpoint.step_folder(first.checkpoints, at) / checkpoint.STATE).read_text())
    config = LMConfig.from_dict(saved["state"]["model"])
    assert config.pattern == "AAM"
    second = Trainer(config, train, data, tmp_path / "parts")
    second.resume()
    assert second.step == at
    assert second.run()
    assert identical(weights(second), weights(whole))
    with pytest.raises(CheckpointError, match=r"another model config \(pattern: saved 'AAM', now 'MAM'\)"):
        Trainer(CONFIG, train, data, tmp_path / "parts").resume()


def test_a_layer_swapped_without_the_optimizer_is_not_trained_past(tmp_path, data):
    trainer = Trainer(CONFIG, TRAIN, data, tmp_path)
    trainer.train_step()
    before = trainer.save()
    swap_layer(trainer.model, 0, "A")
    for go_on in (trainer.train_step, trainer.train_step, trainer.save, trainer.run):
        with pytest.raises(TrainingError, match=r"hold transformer.h.0.*and 1 more, and 8 p.*optimizer=trainer.opt"):
            go_on()
    assert trainer.step == 1
    assert checkpoint.load(tmp_path).path == before
    trainer.optimizer = torch.optim.AdamW(param_groups(trainer.model, 0.1))  # the way out that the error names
    new = trainer.model.mixers[0].state_dict()
    old = {n: x.clone() for n, x in new.items()}
    trainer.train_step()
    trainer.save()
    assert not any(torch.equal(new[n], old[n]) for n in old)


def test_a_run_with_a_frozen_layer_swapped_can_be_resumed(tmp_path, data):
    """Its optimizer does not hold the new layer, that of a run that goes on does."""
    trainer = Trainer(CONFIG, TRAIN, data, tmp_path)
    trainer.train_step()
    trainer.model.requires_grad_(False)
    trainer.model.mixers[0].requires_grad_(True)
    swap_layer(trainer.model, 1, "M", optimizer=trainer.optimizer)
    trainer.save()
    again = Trainer(trainer.model_config, TRAIN, data, tmp_path)
    again.resume()
    assert identical(weights(again), weights(trainer))
    again.train_step()
    again.save()


def test_a_swap_in_a_frozen_model_trains_on(tmp_path, data):
    trainer = Trainer(CONFIG, TRAIN, data, tmp_path)
    trainer.model.requires_grad_(False)
    trainer.model.mixers[0].requires_grad_(True)
    swap_layer(trainer.model, 0, "A", optimizer=trainer.optimizer)
    old = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train_step()
    trainer.save()
    own = {id(p) for p in trainer.model.mixers[0].parameters()}
    for p, before in zip(trainer.model.parameters(), old, strict=True):
        assert torch.equal(p, before) == (id(p) not in own)


def test_sizes_remembered_of_a_kind_that_went_out_are_no_other_model(tmp_path, data):
    config = dataclasses.replace(CONFIG, attention=AttentionConfig())
    trainer = Trainer(config, TRAIN, data, tmp_path)
    swap_layer(trainer.model, 1, "M", optimizer=trainer.optimizer)
    assert trainer.model_config.sized == "A"
    trainer.save()
    Trainer(dataclasses.replace(config, pattern="MMM"), TRAIN, data, tmp_path).resume()


def _atomics_in(fn, *args):
    """Whether the code that Inductor writes for `fn` and its backward adds by atomics from several threads."""
    torch._dynamo.reset()
    _, codes = run_and_get_code(lambda: torch.compile(fn, fullgraph=True)(*args).backward())
    assert codes
    return any("atomic_add" in code for code in codes)


@pytest.mark.slow
def test_compiled_training_on_several_threads_adds_in_one_order(tmp_path, data):
    """Else the last bits of the embedding's gradients change from run to run."""
    tokens = torch.randint(0, 256, (2, 24))
    weight = torch.randn(256, 16, requires_grad=True)
    torch.set_num_threads(2)
    with torch._inductor.config.patch(force_disable_caches=True):
        assert _atomics_in(lambda t: torch.nn.functional.embedding(t, weight).sin().sum(), tokens)
        trainer = Trainer(CONFIG, dataclasses.replace(TRAIN, threads=2), data, tmp_path / "run")
        assert not _atomics_in(trainer.model.loss, tokens, tokens)


def test_a_forgotten_optimizer_state_would_be_seen(tmp_path, data, monkeypatch):
    whole = Trainer(CONFIG, TRAIN, data, tmp_path / "whole")
    whole.run()
    first = Trainer(CONFIG, TRAIN, data, tmp_path / "parts")
    first.run(stop=stop_after(first, 3))
    monkeypatch.setattr(checkpoint, "restore_optimizer", lambda *args: None)
    second = Trainer(CONFIG, TRAIN, data, tmp_path / "parts")
    second.resume()
    second.run()
    assert not identical(weights(second), weights(whole))


def test_killed_between_checkpoints_repeats_the_lost_steps(tmp_path, data):
    """A kill without warning: the log is ahead of the checkpoint, its last line cut short."""
    whole = Trainer(CONFIG, TRAIN, data, tmp_path / "whole")
    whole.run()
    killed = Trainer(CONFIG, TRAIN, data, tmp_path / "killed")

    def die(step):
        if step.step == 3:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        killed.run(die)
    with (tmp_path / "killed" / LOG).open("a") as log:
        log.write('{"step": 4, "lo')
    again = Trainer(CONFIG, TRAIN, data, tmp_path / "killed")
    again.resume()
    assert again.step == 2
    again.run()
    assert identical(weights(again), weights(whole))
    assert [json.loads(line)["step"] for line in (tmp_path / "killed" / LOG).read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop(tmp_path, data, number):
    trainer = Trainer(CONFIG, TRAIN, data, tmp_path / "run")
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        finished = trainer.run(lambda step: os.kill(os.getpid(), number) if step.step == 3 else None, stop=stop)
    assert not finished
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints") == [2, 3]
    assert signal.getsignal(number) is before


def test_training_learns_and_scores(tmp_path, data):
    config = dataclasses.replace(TRAIN, steps=60, learning_rate=1e-2, checkpoint_every=60)
    trainer = Trainer(CONFIG, config, data, tmp_path / "run")
    before, counted = bits_per_byte(trainer.model, data.held_out, seq_len=24)
    trainer.run()
    after, _ = bits_per_byte(trainer.model, data.held_out, seq_len=24)
    assert counted == int((data.held_out != 0).sum())
    assert 7.5 < before < 8.5  # untrained: about eight bits
    assert after < before - 2


def test_bits_per_byte_counts_every_byte_once_with_context():
    model, T = make_model(), 8
    data = torch.randint(1, 256, (37,), dtype=torch.uint8)
    got, counted = bits_per_byte(model, data, seq_len=T, batch_size=3)
    assert counted == 36
    nats = 0.0
    stream = data.long()[None]
    with torch.no_grad():
        for i in range(
            1, 37
        ):  # byte i is predicted in the window that starts at the last multiple of T/2 leaving half of it
            start = max(0, (i - 1) // (T // 2) * (T // 2) - T // 2)
            logits = model(stream[:, start:i])[0, -1]
            nats += float(torch.nn.functional.cross_entropy(logits, stream[0, i]))
    assert abs(got - nats / 36 / 0.6931471805599453) < 1e-9


@pytest.mark.parametrize("sizes", [dict(seq_len=0), dict(seq_len=-3), dict(seq_len=8, batch_size=0)])
def test_bits_per_byte_of_no_window_or_batch_are_refused(sizes):
    name, got = list(sizes.items())[-1]
    with pytest.raises(ValueError, match=f"bits_per_byte: `{name}` must be at least 1, got {got}"):
        bits_per_byte(make_model(), torch.randint(1, 256, (37,), dtype=torch.uint8), **sizes)


class LargestTensor(TorchDispatchMode):
    """How many elements the largest result of any operation has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in made if x.dim() and x._base is None)])
        return out


def test_scoring_makes_its_logits_in_slices(monkeypatch):
    """Those of a whole batch, twice in fp32, were more than training in bf16 makes."""
    model = make_model(dataclasses.replace(CONFIG, vocab_size=2000))
    held_out, batch = torch.randint(1, 2000, (333,), dtype=torch.int32), 3 * 32 * 2000
    score = lambda: bits_per_byte(model, held_out, seq_len=32, batch_size=3)
    monkeypatch.setattr(lm, "SCORING_LOGITS", batch)
    with LargestTensor() as largest:
        expected = score()
    assert largest.elements == batch
    monkeypatch.setattr(lm, "SCORING_LOGITS", 7 * 2000 + 5)  # 7 rows, and one that is left over
    with LargestTensor() as largest:
        got = score()
    assert largest.elements <= max(7 * 2000, 2000 * CONFIG.hidden_size)
    assert got[1] == expected[1] == 332
    assert abs(got[0] - expected[0]) < 1e-12 * expected[0]


def test_timing_a_step_changes_nothing(tmp_path, data):
    trainer = Trainer(CONFIG, TRAIN, data, tmp_path / "run")
    before = weights(trainer)
    assert trainer.seconds_per_step(repeats=2) > 0
    assert identical(weights(trainer), before)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, data):
    trainer = Trainer(CONFIG, TRAIN, data, tmp_path / "run")

    def poison(step):
        if step.step == 3:
            torch.nn.init.constant_(trainer.model.transformer.ln_f.weight, float("nan"))

    with pytest.raises(
        TrainingError, match=r"step 4: loss nan.*checkpoints in '.*run/checkpoints' are from before; st"
    ):
        trainer.run(poison)
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints") == [2]


def test_a_loss_that_is_not_finite_before_the_first_checkpoint_names_none(tmp_path, data):
    trainer = Trainer(CONFIG, TRAIN, data, tmp_path / "run")
    torch.nn.init.constant_(trainer.model.transformer.ln_f.weight, float("nan"))
    with pytest.raises(
        TrainingError, match=r"step 1: loss nan.*no checkpoint yet; start afresh with a lower"
    ) as caught:
        trainer.run()
    assert str(tmp_path) not in str(caught.value)


# -- damaged checkpoints -----------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, data):
    trainer = Trainer(CONFIG, TRAIN, data, tmp_path / "run")
    trainer.run()
    return trainer


def newest(run):
    return run.checkpoints / "step-00000006"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize(
    "damage, message",
    [(truncate, "is truncated or was changed"), (flip, "is corrupt"), (lambda p: p.unlink(), "is missing")],
)
def test_damage_names_file_fault_and_way_out(run, file, damage, message):
    damage(newest(run) / file)
    with pytest.raises(CheckpointError, match=f"{file}.*{message}.*delete the folder .* to go on from step-00000004"):
        run.resume()


@pytest.mark.parametrize(
    "content, message",
    [("{", "state.json' is damaged"), ("[]", "is damaged"), ("{}", "is damaged"), (None, "state.json' is missing")],
)
def test_damaged_state(run, content, message):
    path = newest(run) / "state.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(CheckpointError, match=message):
        run.resume()


def test_falls_back_when_told_to(run):
    shutil.rmtree(newest(run))
    run.resume()
    assert run.step == 4


def test_unfinished_checkpoints_are_not_seen(run):
    newest(run).rename(run.checkpoints / ".partial-step-00000006-1")
    assert checkpoint.load(run.checkpoints).path.name == "step-00000004"


def test_a_second_interruption_while_saving_leaves_nothing_half_written(run, monkeypatch):
    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_fsync", interrupt)
    run.step = 7
    with pytest.raises(KeyboardInterrupt):
        run.save()
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(5, "Input/output error")], ids=["Ctrl-C", "disk"])
@pytest.mark.parametrize("at", ["old", "new"])
def test_saving_a_step_again_never_loses_its_checkpoint(run, monkeypatch, error, at):
    shutil.rmtree(run.checkpoints / "step-00000004")
    rename = os.replace

    def fails(source, target):
        if Path(source).name.startswith(".partial-" if at == "new" else "step-"):
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "replace", fails)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        run.save()
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-00000006"]
    monkeypatch.undo()
    run.resume()
    run.save()
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-00000006"]


def test_a_checkpoint_put_aside_is_read_if_the_process_died_then(run):
    newest(run).rename(run.checkpoints / ".replaced-step-00000006")
    assert checkpoint.list_steps(run.checkpoints) == [4, 6]
    run.step = 0
    run.resume()
    assert run.step == 6
    run.save()
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-00000004", "step-00000006"]


def test_a_damaged_checkpoint_put_aside_is_not_its_own_way_out(run):
    aside = newest(run).rename(run.checkpoints / ".replaced-step-00000006")
    (aside / checkpoint.STATE).write_text("{")
    with pytest.raises(CheckpointError, match=r"replaced-step-00000006' to go on from step-00000004"):
        run.resume()


def test_a_run_that_ended_before_its_first_checkpoint_leaves_no_log(tmp_path, data):
    def die(step):
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        Trainer(CONFIG, TRAIN, data, tmp_path / "run").run(die)
    Trainer(CONFIG, TRAIN, data, tmp_path / "run").run()
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_only_the_newest_are_kept(run):
    assert checkpoint.list_steps(run.checkpoints) == [4, 6]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(model=dataclasses.replace(CONFIG, hidden_size=32)),
            "another model config .hidden_size: saved 16, now 32",
        ),
        (dict(train=dataclasses.replace(TRAIN, seed=7)), "another training config .seed: saved 0, now 7"),
    ],
)
def test_another_config_is_refused(run, data, change, message):
    other = Trainer(change.get("model", CONFIG), change.get("train", TRAIN), data, run.out)
    with pytest.raises(CheckpointError, match=message):
        other.resume()


def test_other_data_is_refused(run, tmp_path):
    (tmp_path / "texts" / "file03.txt").write_text("changed since")
    with pytest.raises(CheckpointError, match="another data"):
        Trainer(CONFIG, TRAIN, load_folder(tmp_path / "texts"), run.out).resume()


def test_misfits_are_named_and_leave_the_model_unchanged(run):
    saved = checkpoint.load(run.checkpoints)
    model = make_model(dataclasses.replace(CONFIG, pattern="MA", mlp_size=20))
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(
        CheckpointError,
        match=r"unexpected: transformer.h.2.*mis-shaped: .*c_fc.weight has shape \[48, 16\], expected \[40, 16\]",
    ):
        checkpoint.restore_model(saved, model)
    assert identical(dict(model.named_parameters()), before)
    with pytest.raises(CheckpointError, match=r"missing: transformer.h.3"):
        checkpoint.restore_model(saved, make_model(dataclasses.replace(CONFIG, pattern="MAMM")))


def test_nothing_there(tmp_path):
    for name in ("nowhere", "step-00000009"):
        with pytest.raises(CheckpointError, match="there is no such folder; check the path"):
            checkpoint.load(tmp_path / name)
    (tmp_path / "a file").write_text("text")
    with pytest.raises(CheckpointError, match="it is not a folder"):
        checkpoint.load(tmp_path / "a file")
    with pytest.raises(CheckpointError, match="expected a folder step-"):
        checkpoint.load(tmp_path)


def test_failed_write_leaves_the_old_checkpoints(run, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_fsync", full)
    run.step = 7
    with pytest.raises(CheckpointError, match="No space left on device; free space"):
        run.save()
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize("size", [1000, 60_000], ids=["model", "optimizer"])
def test_a_full_disk_leaves_the_old_checkpoints(run, size):
    """safetensors reports it by an error of its own, which is no OSError."""
    run.step = 7
    model, optimizer = ((newest(run) / f).stat().st_size for f in (checkpoint.MODEL, checkpoint.OPTIMIZER))
    assert size < model or model < size < optimizer
    with largest_file(size), pytest.raises(CheckpointError, match=r"File too large.*; free space or choose"):
        run.save()
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-00000004", "step-00000006"]


def test_display_helpers():
    assert sparkline([3, 2, 1], 3) == "█▅▁"
    assert sparkline([]) == ""
    assert sparkline([1.0] * 100, 10) == "▁" * 10
    assert duration(65) == "1:05"
    assert duration(7384) == "2:03:04"
