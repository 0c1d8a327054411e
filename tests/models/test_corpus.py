# SPDX-License-Identifier: Apache-2.0
"""Token data for `train`: bytes and tokenizers, packing, and what users get wrong."""

import json
import os

import pytest
import torch

from m2rnn_compile.models.corpus import load_corpus, most_boundaries, pack
from m2rnn_compile.models.data import DataError
from tests.models.helpers import write_texts


def test_bytes_of_files_and_folders(tmp_path):
    folder = write_texts(tmp_path / "a", 6)
    single = tmp_path / "more.txt"
    single.write_text("one more, naïve")
    corpus = load_corpus([folder, single], held_out_fraction=0.3)
    documents = {f"a/{p.name}": p.read_bytes() for p in folder.iterdir()} | {"more.txt": single.read_bytes()}
    for tokens, names in ((corpus.train, corpus.train_files), (corpus.held_out, corpus.held_out_files)):
        assert bytes(tokens.numpy()).split(b"\0")[1:-1] == [documents[n] for n in names]
    assert set(corpus.train_files) | set(corpus.held_out_files) == set(documents)
    assert corpus.train_files
    assert corpus.held_out_files
    assert (corpus.vocab_size, corpus.separator, corpus.bytes_per_token) == (256, 0, 1.0)
    single.write_text("changed")
    assert load_corpus([folder, single]).fingerprint != corpus.fingerprint


def test_a_single_document_is_cut_between_letters(tmp_path):
    text = "é" * 300
    (tmp_path / "x.txt").write_text(text)
    corpus = load_corpus([tmp_path / "x.txt"], held_out_fraction=0.1)
    parts = [bytes(t.numpy()).strip(b"\0").decode() for t in (corpus.train, corpus.held_out)]
    assert parts == [text[:270], text[270:]]


def test_unusable_files_below_a_folder_are_named_skips(tmp_path):
    folder = write_texts(tmp_path / "a", 3)
    (folder / "image.bin").write_bytes(b"\x89PNG\0\0")
    (folder / "empty.txt").touch()
    skipped = dict(load_corpus([folder]).skipped)
    assert skipped == {"a/image.bin": "binary: holds a zero byte", "a/empty.txt": "empty"}


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda p: None, "does not exist; give text files, or folders"),
        (lambda p: p.touch(), "cannot be used: empty; give UTF-8 text"),
        (lambda p: p.write_bytes(b"a\0b"), "cannot be used: binary"),
        (lambda p: p.write_bytes(b"caf\xe9 x"), "cannot be used: not UTF-8 text: byte 3"),
        (lambda p: p.mkdir(), "no usable text in .*the folders are empty"),
        (lambda p: (p.mkdir(), (p / "x").write_bytes(b"\0")), r"no usable text in .*data/x \(binary"),
        (lambda p: p.write_text("x"), "too few to train on"),
    ],
)
def test_bad_data_is_named(tmp_path, prepare, message):
    prepare(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        load_corpus([tmp_path / "data"])


def test_unreadable_file(tmp_path, monkeypatch):
    from pathlib import Path

    (tmp_path / "x").write_text("text")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"'.*x' cannot be used: unreadable: Permission denied"):
        load_corpus([tmp_path / "x"])


def test_no_data_and_twice_the_same(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="name at least one text file"):
        load_corpus([])
    folder = write_texts(tmp_path / "a", 2)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for again in (folder, tmp_path / "link", "a", "../" + tmp_path.name + "/a", folder / "file01.txt", tmp_path):
        with pytest.raises(DataError, match=r"file01.txt' was named twice|file00.txt' was named twice"):
            load_corpus([folder, again])


def test_equal_names_are_told_apart_by_the_folders_above(tmp_path):
    """`--data p1/src p2/src` and `--data a/README.md b/README.md`: only what collides gets a longer name."""
    for name in ("p1/src/x.py", "p2/src/x.py", "p2/src/y.py", "a/README.md", "q/a/README.md", "other.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text of " + name)
    for name in ("p1/src/__init__.py", "r/src/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "r/src/z.py").write_text("text")
    names = lambda *paths: sorted(sum(load_corpus([tmp_path / p for p in paths])[5:7], ()))
    assert names("p1/src", "p2/src") == ["p1/src/x.py", "p2/src/x.py", "p2/src/y.py"]
    assert names("a/README.md", "q/a/README.md", "other.txt") == sorted(
        ["other.txt", f"{tmp_path.name}/a/README.md", "q/a/README.md"]
    )
    assert names("p1/src", "r/src") == ["src/x.py", "src/z.py"]  # files that are passed over collide with nothing
    assert names("p1", "p2/src/x.py") == ["p1/src/x.py", "x.py"]


def test_which_of_two_equal_names_holds_which_text_is_part_of_the_data(tmp_path):
    """A resumed run would notice that two projects changed places."""
    for folder in ("p1/src", "p2/src"):
        write_texts(tmp_path / folder, 3)
    (tmp_path / "p1/src/file01.txt").write_text("another text")
    paths = [tmp_path / "p1/src", tmp_path / "p2/src"]
    before = load_corpus(paths).fingerprint
    assert load_corpus(paths).fingerprint == before
    for folder, name in (("p1", "x"), ("p2", "p1"), ("x", "p2")):
        (tmp_path / folder).rename(tmp_path / name)
    assert load_corpus(paths).fingerprint != before


def test_a_file_name_that_is_not_utf8(tmp_path):
    """Such names come out of old archives; the text in them is good, and what is printed can be printed."""
    folder = write_texts(tmp_path / "a", 3)
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("un caf\u00e9")
    (folder / os.fsdecode(b"\xff.bin")).write_bytes(b"\0")
    corpus = load_corpus([folder])
    assert "a/caf\udce9.txt" in corpus.train_files + corpus.held_out_files
    assert dict(corpus.skipped) == {"a/\\xff.bin": "binary: holds a zero byte"}
    (folder / os.fsdecode(b"caf\xe9.txt")).rename(folder / os.fsdecode(b"caf\xe8.txt"))
    assert load_corpus([folder]).fingerprint != corpus.fingerprint
    (tmp_path / os.fsdecode(b"\xe9.txt")).write_text("")
    with pytest.raises(DataError, match=r"udce9.txt' cannot be used: empty") as caught:
        load_corpus([tmp_path / os.fsdecode(b"\xe9.txt")])
    str(caught.value).encode()


def test_what_is_no_regular_file_is_refused(tmp_path):
    """Reading a named pipe would wait for ever for somebody to write into it."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe' is neither a regular file nor a folder; give text files"):
        load_corpus([tmp_path / "pipe"])


@pytest.fixture
def tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["All work and no play makes a dull file. " * 5], trainer)
    path = tmp_path / "tokenizer.json"
    model.save(str(path))
    return path


def test_a_tokenizer_file(tmp_path, tokenizer):
    from tokenizers import Tokenizer

    corpus = load_corpus([write_texts(tmp_path / "a", 4)], tokenizer=tokenizer)
    loaded = Tokenizer.from_file(str(tokenizer))
    assert corpus.separator == loaded.token_to_id("<|endoftext|>")
    assert corpus.vocab_size == loaded.get_vocab_size() > 256
    assert int((corpus.train == corpus.separator).sum()) == len(corpus.train_files) + 1
    first = corpus.train[1 : 1 + int((corpus.train[1:] == corpus.separator).nonzero()[0])]
    assert first.tolist() == loaded.encode((tmp_path / corpus.train_files[0]).read_text()).ids
    assert corpus.bytes_per_token > 1.5
    other = load_corpus([tmp_path / "a"])
    assert other.fingerprint != corpus.fingerprint


def test_what_a_tokenizer_file_says_of_length_does_not_cut_documents(tmp_path, tokenizer):
    """transformers saves such settings; and ids may have gaps."""
    from tokenizers import Tokenizer

    folder = write_texts(tmp_path / "a", 4)
    whole = load_corpus([folder], tokenizer=tokenizer)
    for change in (lambda t: t.enable_truncation(3), lambda t: t.enable_padding(length=5000)):
        changed = Tokenizer.from_file(str(tokenizer))
        change(changed)
        changed.save(str(tmp_path / "changed.json"))
        assert torch.equal(load_corpus([folder], tokenizer=tmp_path / "changed.json").train, whole.train)
    content = json.loads(tokenizer.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 5000, "content": "<|far|>"})
    content["model"]["vocab"]["<|far|>"] = 5000
    (tmp_path / "gap.json").write_text(json.dumps(content))
    assert load_corpus([folder], tokenizer=tmp_path / "gap.json").vocab_size == 5001


def test_tokenizer_errors(tmp_path, tokenizer):
    folder = write_texts(tmp_path / "a", 2)
    for file, options, message in (
        (tmp_path / "nowhere.json", {}, "does not exist"),
        (folder / "file00.txt", {}, "cannot be read"),
        (tokenizer, dict(end_token="<stop>"), "has no token '<stop>'"),
    ):
        with pytest.raises(DataError, match=message):
            load_corpus([folder], tokenizer=file, **options)


def test_packing():
    tokens = torch.tensor([[0, 5, 6, 0, 7, 8], [3, 4, 0, 0, 9, 9]])
    packed, cu_seqlens = pack(tokens, 0, boundaries=2)
    assert torch.equal(packed, tokens.reshape(1, 12))
    assert cu_seqlens.tolist() == [0, 3, 6, 8, 9, 12, 12]
    stream = torch.tensor([0, 1, 0, 0, 2, 3, 0], dtype=torch.uint8)
    assert most_boundaries(stream, 0, 3) == 2
    assert most_boundaries(stream, 0, 7) == 4
