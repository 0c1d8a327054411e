# SPDX-License-Identifier: Apache-2.0
"""``train``: the options of real runs are bit-exact over an interruption, and mistakes are told."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("safetensors")

from m2rnn_compile.__main__ import main
from m2rnn_compile.models import HybridLM, miniature, preset
from m2rnn_compile.models.corpus import load_corpus
from m2rnn_compile.models.train import TrainConfig, Trainer
from m2rnn_compile.models.weights import load_model, save_model
from m2rnn_compile.text import keep_tokenizer, tokenizer_of
from tests.layers.equations import assert_same
from tests.models.helpers import write_texts
from tests.models.test_training import identical, weights

CONFIG = dataclasses.replace(miniature(preset("hybrid-gated-deltanet+5-7b")), pattern="MGA")
TRAIN = TrainConfig(
    steps=4, batch_size=2, seq_len=40, warmup=2, checkpoint_every=2, compile=False, threads=1, packed=True
)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def corpus(tmp_path):
    return load_corpus([write_texts(tmp_path / "texts")])


@pytest.mark.parametrize("options", [{}, dict(grad_accumulation=2, precision="bf16")], ids=["plain", "all"])
def test_packed_runs_resume_bit_by_bit(tmp_path, corpus, options):
    config = dataclasses.replace(TRAIN, **options)
    whole = Trainer(CONFIG, config, corpus, tmp_path / "whole")
    assert whole.run()
    first = Trainer(CONFIG, config, corpus, tmp_path / "parts")
    assert not first.run(stop=lambda: first.step >= 3)
    torch.manual_seed(99)
    second = Trainer(CONFIG, config, corpus, tmp_path / "parts")
    second.resume()
    assert second.step == 3
    assert second.run()
    assert identical(weights(second), weights(whole))


@pytest.mark.gpu
@pytest.mark.slow
def test_resume_on_a_gpu_is_bit_by_bit(tmp_path, corpus):
    config = dataclasses.replace(TRAIN, precision="bf16", device="cuda", compile=True)
    try:
        whole = Trainer(CONFIG, config, corpus, tmp_path / "whole")
        assert whole.run()
        first = Trainer(CONFIG, config, corpus, tmp_path / "parts")
        first.run(stop=lambda: first.step >= 3)
        second = Trainer(CONFIG, config, corpus, tmp_path / "parts")
        second.resume()
        assert second.run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert identical(weights(second), weights(whole))


def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path, corpus):
    dense = dataclasses.replace(CONFIG, moe=None, mlp_size=32)
    trainer = Trainer(dense, dataclasses.replace(TRAIN, grad_accumulation=3), corpus, tmp_path)
    losses = [trainer.forward_backward(i) for i in range(3)]
    got = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    trainer.optimizer.zero_grad()
    batches = [trainer.batch(i) for i in range(3)]
    offsets = [batch[2][:-1].long() + 80 * i for i, batch in enumerate(batches)]
    cu = torch.cat([*offsets, torch.tensor([240])])
    x, y = (torch.cat([b[k] for b in batches], 1) for k in (0, 1))
    loss = trainer.model.loss(x, y, cu_seqlens=cu)
    loss.backward()
    assert_same(torch.stack(losses).mean(), loss)
    assert_same(got, {n: p.grad for n, p in trainer.model.named_parameters()})


def test_documents_do_not_see_each_other(tmp_path, corpus):
    trainer = Trainer(CONFIG, TRAIN, corpus, tmp_path)
    number = next(i for i in range(50) if len(set(trainer.batch(i)[2].tolist())) > 3)
    tokens, _, cu = trainer.batch(number)
    end = int(cu[1])
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(tokens, cu_seqlens=cu)
        changed = tokens.clone()
        changed[0, :end] = 65
        assert torch.equal(trainer.model(changed, cu_seqlens=cu)[0, end:], logits[0, end:])


def test_one_compilation_for_all_packings(tmp_path, corpus):
    trainer = Trainer(CONFIG, TRAIN, corpus, tmp_path)
    counter = CompileCounterWithBackend("eager")
    trainer._loss = torch.compile(trainer.model.loss, fullgraph=True, dynamic=False, backend=counter)
    for i in range(6):
        trainer.forward_backward(i)
    assert counter.frame_count == 1


def test_bf16_trains_close_to_fp32(tmp_path, corpus):
    runs = [
        Trainer(CONFIG, dataclasses.replace(TRAIN, precision=p, learning_rate=1e-2), corpus, tmp_path / p)
        for p in ("fp32", "bf16")
    ]
    losses = [[trainer.train_step().loss for _ in range(4)] for trainer in runs]
    assert losses[0] != losses[1]
    assert all(abs(a - b) < 0.05 * a for a, b in zip(*losses, strict=True))
    assert all(p.dtype == torch.float32 for p in runs[1].model.parameters())


def options(tmp_path, *more):
    texts = str(write_texts(tmp_path / "texts"))
    small = ["--miniature", "--layers", "5", "--seq-len", "48", "--batch-size", "2", "--threads", "1", "--eager"]
    return ["train", "--preset", "hybrid-m2rnn-410m", "--data", texts, "--out", str(tmp_path / "run"), *small, *more]


def test_the_command_trains_and_resumes(tmp_path, capfd):
    assert main(options(tmp_path, "--steps", "3", "--grad-accumulation", "2", "--seed", "5")) == 0
    out = capfd.readouterr().out
    for text in ("4M A", "packed documents", "3 of 2 × 2 × 48 tokens", "held out:", "bits a byte"):
        assert text in out
    run = tmp_path / "run"
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert load_model(run / "model").config.pattern == "MMMMA"
    assert main(["train", "--resume", "--out", str(run), "--seed", "5"]) == 0  # finished: scores again
    for more, message in (
        (["--steps", "9"], "--steps 9 cannot be combined with --resume: the run was started with 3"),
        (["--preset", "m2rnn-410m"], "--preset m2rnn-410m cannot be combined"),
        (["--seed", "0"], "--seed 0 cannot be combined with --resume: the run was started with 5"),
    ):
        assert main(["train", "--resume", "--out", str(run), *more]) == 2
        assert message in capfd.readouterr().err
    assert main(options(tmp_path, "--steps", "3")) == 2
    assert "already holds a run" in capfd.readouterr().err
    (run / "run.json").write_text('{"data": null}')
    assert main(["train", "--resume", "--out", str(run)]) == 2
    assert "is not of `train`" in capfd.readouterr().err


def test_a_run_on_two_folders_of_one_name_resumes(tmp_path, capfd):
    """And is refused where the two have changed places since."""
    for folder in ("p1", "p2"):
        write_texts(tmp_path / folder / "src")
    (tmp_path / "p1/src/file00.txt").write_text("another text")
    more = ["--steps", "1", "--data", str(tmp_path / "p1/src"), str(tmp_path / "p2/src")]
    assert main(options(tmp_path, *more)) == 0
    resume = ["train", "--resume", "--out", str(tmp_path / "run")]
    assert main(resume) == 0
    for old, new in (("p1", "x"), ("p2", "p1"), ("x", "p2")):
        (tmp_path / old).rename(tmp_path / new)
    capfd.readouterr()
    assert main(resume) == 2
    assert "was written with another data" in capfd.readouterr().err


def test_a_run_resumes_with_its_data_elsewhere(tmp_path, capfd):
    """As on another machine; what is there must be the same, and then run.json knows the place."""
    assert main(options(tmp_path, "--steps", "1")) == 0
    run = tmp_path / "run"
    before = (run / "run.json").read_text()
    (tmp_path / "new").mkdir()
    (tmp_path / "texts").rename(tmp_path / "new/texts")
    resume = ["train", "--resume", "--out", str(run)]
    assert main(resume) == 2
    assert "texts' does not exist here; give the place where it is now as --data" in capfd.readouterr().err
    write_texts(tmp_path / "other/texts")
    (tmp_path / "other/texts/file00.txt").write_text("another text")
    assert main([*resume, "--data", str(tmp_path / "other/texts")]) == 2
    err = capfd.readouterr().err
    assert "was written with another data (the files, their names or tokenizer differ)" in err
    assert (run / "run.json").read_text() == before
    assert "the last part of a path and what lies below it), its content and the order must be as they were, or" in err
    assert main([*resume, "--data", str(tmp_path / "new/texts")]) == 0
    assert json.loads((run / "run.json").read_text())["data"] == [str(tmp_path / "new/texts")]
    assert main(resume) == 0
    assert main([*resume, "--tokenizer", "tokenizer.json"]) == 2  # it was bytes
    assert "--tokenizer tokenizer.json cannot be combined" in capfd.readouterr().err


def test_a_run_resumes_with_its_folder_renamed_by_a_link_of_the_old_name(tmp_path, capfd):
    assert main(options(tmp_path, "--steps", "1")) == 0
    run = tmp_path / "run"
    before = (run / "run.json").read_text()
    (tmp_path / "texts").rename(tmp_path / "corpus")
    capfd.readouterr()
    resume = ["train", "--resume", "--out", str(run), "--data"]
    assert main([*resume, str(tmp_path / "corpus")]) == 2
    err = capfd.readouterr().err
    assert "the last part of each path belongs to the documents' names; it was 'texts', and is 'corpus' now." in err
    assert "give a link of that name" in err
    assert (run / "run.json").read_text() == before
    (tmp_path / "links").mkdir()
    (tmp_path / "links/texts").symlink_to(tmp_path / "corpus")
    assert main([*resume, str(tmp_path / "links/texts")]) == 0
    assert json.loads((run / "run.json").read_text())["data"] == [str(tmp_path / "links/texts")]
    assert main(["train", "--resume", "--out", str(run)]) == 0


def test_a_run_started_through_a_link_is_called_by_it(tmp_path, capfd):
    write_texts(tmp_path / "texts")
    (tmp_path / "link").symlink_to(tmp_path / "texts")
    assert main(options(tmp_path, "--steps", "1", "--data", str(tmp_path / "link"))) == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["data"] == [str(tmp_path / "link")]
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--data", str(tmp_path / "link")]) == 0


def make_tokenizer(path, vocab_size=290):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        ["All work and no play makes a dull file. " * 5],
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=["</s>", "<end>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    model.save(str(path))
    return str(path)


def generates(folder, capfd, *more):
    capfd.readouterr()
    command = ["generate", str(folder), "--prompt", "All work", "--max-new-tokens", "6", "--threads", "1", *more]
    status = main(command)
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    assert status == 0, err
    assert out.startswith("All work")
    assert len(out) > len("All work\n")


def test_a_run_with_a_tokenizer_generates_text(tmp_path, capfd):
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json")
    assert main(options(tmp_path, "--tokenizer", tokenizer, "--steps", "2", "--seq-len", "16")) == 0
    assert "tokens of tokenizer.json" in capfd.readouterr().out
    elsewhere = tmp_path / "tokenizers" / "another-name.json"
    elsewhere.parent.mkdir()
    (tmp_path / "tokenizer.json").rename(elsewhere)
    resume = ["train", "--resume", "--out", str(tmp_path / "run")]
    assert main(resume) == 2
    assert "tokenizer.json' does not exist here; give the place where it is now as --token" in capfd.readouterr().err
    assert main([*resume, "--tokenizer", str(elsewhere)]) == 0
    for place in ("run", "run/model"):
        generates(tmp_path / place, capfd)


def test_a_tokenizer_goes_with_its_model(tmp_path, capfd):
    """And stays where it was lost, or replaced by another; its end token too."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json")
    more = ["--tokenizer", tokenizer, "--end-token", "<end>", "--steps", "2", "--seq-len", "16"]
    assert main(options(tmp_path, *more)) == 0
    run = tmp_path / "run"
    assert (run / "model/tokenizer.json").read_bytes() == Path(tokenizer).read_bytes()
    assert tokenizer_of(run) == tokenizer_of(run / "model") == (str(run / "model/tokenizer.json"), "<end>")
    Path(tokenizer).unlink()
    for place in (run, run / "checkpoints/step-00000002"):
        generates(place, capfd)
    (run / "model").rename(tmp_path / "moved")
    assert tokenizer_of(tmp_path / "moved") == (str(tmp_path / "moved/tokenizer.json"), "<end>")
    generates(tmp_path / "moved", capfd)
    assert main(["generate", str(run)]) == 2  # its own is gone, and the run's with it
    assert "tokenizer.json' does not exist here; give the file as --tokenizer" in capfd.readouterr().err
    generates(run, capfd, "--tokenizer", str(tmp_path / "moved/tokenizer.json"))
    other = make_tokenizer(tmp_path / "other.json", 300)
    model = HybridLM(dataclasses.replace(load_model(tmp_path / "moved").config, vocab_size=256))
    save_model(model, tmp_path / "bytes")
    assert main(["generate", str(tmp_path / "bytes"), "--tokenizer", other]) == 2
    err = capfd.readouterr().err
    assert "other.json' has" in err
    assert "and the model an embedding of 256; give the one" in err


def test_the_tokenizer_beside_a_model_is_read_by_transformers(tmp_path, capfd):
    transformers = pytest.importorskip("transformers")
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json")
    keep_tokenizer(tmp_path, tokenizer, "<end>")
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert loaded.eos_token == "<end>"
    assert loaded.decode(loaded("All work").input_ids) == "All work"
    keep_tokenizer(tmp_path, None, None)  # a run on bytes in the same folder
    assert tokenizer_of(tmp_path) is None


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--data", "x"], "--preset is needed"),
        (["--preset", "m2rnn-410m"], "--data is needed"),
        (["--preset", "m2rn-410m", "--data", "texts"], "no preset is called 'm2rn-410m'; did you mean m2rnn-410m"),
        (["--preset", "m2rnn-410m", "--data", "nowhere"], "nowhere' does not exist"),
        (
            ["--preset", "m2rnn-410m", "--data", "texts", "--end-token", "x"],
            "--end-token 'x' names a token of a --token",
        ),
        (["--resume"], "--resume needs --out"),
        (["--resume", "--out", "nowhere"], "no checkpoint at 'nowhere'"),
        (["--preset", "m2rnn-410m", "--miniature", "--layers", "9", "--data", "texts"], "has only 8 here"),
        (["--preset", "m2rnn-410m", "--data", "texts", "--seq-len", "99999"], "fewer than one row of 100000"),
    ],
)
def test_user_errors_give_status_two_and_leave_nothing(tmp_path, capfd, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    write_texts(Path("texts"))
    before = sorted(Path().rglob("*"))
    assert main(["train", "--eager", *argv]) == 2
    err = capfd.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert sorted(Path().rglob("*")) == before


def test_no_gpu_is_said(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(options(tmp_path, "--device", "cuda")) == 2
    assert "torch sees no CUDA device" in capfd.readouterr().err


def test_a_run_from_a_gpu_is_refused_without_one(tmp_path, capfd, monkeypatch, corpus):
    assert main(options(tmp_path, "--steps", "1")) == 0
    file = tmp_path / "run/run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"device": "cuda"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    capfd.readouterr()
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 2
    err = capfd.readouterr().err
    assert "was started with --device cuda, and torch sees no CUDA device here; go on where there is one" in err
    with pytest.raises(ValueError, match=r"`config.device` is 'cuda:1', and torch sees no CUDA device here"):
        Trainer(CONFIG, dataclasses.replace(TRAIN, device="cuda:1"), corpus, tmp_path)
