# SPDX-License-Identifier: Apache-2.0
"""Byte data: split by file, named skips, clear errors."""

import os

import pytest
import torch

from m2rnn_compile.models.data import DataError, batch_at, load_folder
from tests.models.helpers import write_texts


def test_split_is_by_file_disjoint_and_stable(tmp_path):
    folder = write_texts(tmp_path / "a", 40)
    data = load_folder(folder, held_out_fraction=0.2)
    assert set(data.train_files) | set(data.held_out_files) == {p.name for p in folder.iterdir()}
    assert not set(data.train_files) & set(data.held_out_files)
    assert load_folder(folder, held_out_fraction=0.2).fingerprint == data.fingerprint
    (folder / "another.txt").write_text("one more")
    more = load_folder(folder, held_out_fraction=0.2)
    assert set(data.held_out_files) <= set(more.held_out_files)  # no file changes sides
    assert set(data.train_files) <= set(more.train_files)
    assert more.fingerprint != data.fingerprint


def test_bytes_are_those_of_the_files(tmp_path):
    folder = write_texts(tmp_path, 5)
    data = load_folder(folder)
    for part, names in ((data.train, data.train_files), (data.held_out, data.held_out_files)):
        documents = bytes(part.numpy()).split(b"\0")
        assert documents[0] == documents[-1] == b""
        assert documents[1:-1] == [(folder / n).read_bytes() for n in names]


def test_two_files_give_one_side_each(tmp_path):
    data = load_folder(write_texts(tmp_path, 2))
    assert len(data.train_files) == len(data.held_out_files) == 1


def test_unusable_files_are_named_skips(tmp_path):
    folder = write_texts(tmp_path, 3)
    (folder / "empty.txt").touch()
    (folder / "image.bin").write_bytes(b"\x89PNG\0\0")
    (folder / "latin.txt").write_bytes(b"caf\xe9 au lait")
    os.mkfifo(folder / "pipe")
    (folder / "link.txt").symlink_to(folder / "nowhere")
    data = load_folder(folder)
    assert dict(data.skipped) == {
        "empty.txt": "empty",
        "image.bin": "binary: holds a zero byte",
        "latin.txt": "not UTF-8 text: byte 3",
    }
    assert len(data.train_files) + len(data.held_out_files) == 3


def test_file_names_that_are_not_utf8(tmp_path):
    folder = write_texts(tmp_path, 3)
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    (folder / os.fsdecode(b"\xff.txt")).touch()
    data = load_folder(folder)
    assert "caf\udce9.txt" in data.train_files + data.held_out_files
    assert dict(data.skipped) == {"\\xff.txt": "empty"}
    for path in folder.iterdir():
        path.write_text("")
    with pytest.raises(DataError, match=r"found 0 usable.*skipped: caf\\xe9.txt \(empty\), file00.txt"):
        load_folder(folder)


def test_unreadable_files_are_named_skips(tmp_path, monkeypatch):
    from pathlib import Path

    folder = write_texts(tmp_path, 3)
    good = Path.read_bytes

    def refuse(self):
        if self.name == "file01.txt":
            raise PermissionError(13, "Permission denied")
        return good(self)

    monkeypatch.setattr(Path, "read_bytes", refuse)  # tests may run as root, whom no permission bit stops
    assert dict(load_folder(folder).skipped) == {"file01.txt": "unreadable: Permission denied"}


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda p: None, "does not exist; give an existing folder"),
        (lambda p: p.write_text("a file"), "is not a folder"),
        (lambda p: p.mkdir(), "found 0 usable text file"),
        (lambda p: write_texts(p, 1), "found 1 usable text file.*need at least two"),
        (lambda p: (p.mkdir(), (p / "x").write_bytes(b"\0")), r"skipped: x \(binary: holds a zero byte\)"),
    ],
)
def test_errors_say_what_was_found_and_what_is_needed(tmp_path, prepare, message):
    prepare(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        load_folder(tmp_path / "data")


def test_suffixes_exclude_and_limit(tmp_path):
    folder = write_texts(tmp_path, 30)
    write_texts(folder / "test", 3)
    write_texts(folder / "__pycache__", 3)
    (folder / "code.py").write_text("import this")
    assert "code.py" in load_folder(folder).train_files + load_folder(folder).held_out_files
    data = load_folder(folder, suffixes=[".txt"], exclude=["test"], held_out_fraction=0.5, max_held_out_bytes=500)
    assert all(n.startswith("file") for n in data.train_files + data.held_out_files)
    assert len(data.held_out) <= 500 + len(data.held_out_files) + 1
    assert len(load_folder(folder, held_out_fraction=0.5).held_out) > 500


def test_batches_are_a_pure_function_of_seed_and_step():
    data = torch.arange(1, 201, dtype=torch.uint8)
    options = dict(batch_size=3, seq_len=7)
    x, y = batch_at(data, 5, seed=1, **options)
    assert torch.equal(y[:, :-1], x[:, 1:])
    assert all(map(torch.equal, batch_at(data, 5, seed=1, **options), (x, y)))
    assert not torch.equal(batch_at(data, 6, seed=1, **options)[0], x)
    assert not torch.equal(batch_at(data, 5, seed=2, **options)[0], x)
    starts = {int(s) for step in range(400) for s in batch_at(data, step, seed=0, **options)[0][:, 0]}
    assert {1, 200 - 7} <= starts  # the first and the last window do come up
    with pytest.raises(DataError, match="fewer than one window of 201"):
        batch_at(data, 0, batch_size=1, seq_len=200, seed=0)
