# SPDX-License-Identifier: Apache-2.0
"""Byte-level data from a folder of text files, split by file into training and held-out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# A file that holds byte 0 is not text and is skipped, so byte 0 is free to stand between documents.
SEPARATOR = 0
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", ".git", ".hg", ".svn", "node_modules"})


class DataError(ValueError):
    """The data cannot be used; the message says what was found and what is needed."""


class Skipped(NamedTuple):
    """A file that was not used (its name as it can be printed), and why."""

    path: str
    reason: str


class ByteData(NamedTuple):
    """Training and held-out bytes.

    Attributes:
        train, held_out: uint8; a separator (byte 0) before every document and after the last.
        train_files, held_out_files: names relative to the folder, in the order of their bytes.
        skipped: files left out, with the reason.
        fingerprint: hash of all names and bytes; a resumed run checks that it trains on the same data.
    """

    train: Tensor
    held_out: Tensor
    train_files: tuple[str, ...]
    held_out_files: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    fingerprint: str


def load_folder(
    folder: str | Path,
    *,
    suffixes: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    held_out_fraction: float = 0.05,
    max_held_out_bytes: int | None = None,
) -> ByteData:
    """Read every text file below `folder`.

    Whether a file is held out depends on the hash of its relative path only: the same on every machine, and unmoved by
    adding other files. If no file's hash falls on one of the two sides, the nearest file is taken, so both are
    non-empty.

    Args:
        folder: read recursively, in sorted order; hidden files, links and `SKIPPED_FOLDERS` are passed over.
        suffixes: e.g. (".py",); None takes every file.
        exclude: names of folders directly below `folder` to leave out.
        held_out_fraction: share of the files that is held out.
        max_held_out_bytes: use only the first held-out files, up to this size (the rest is not trained on either).

    Raises:
        DataError (a ValueError): the path is missing, not a folder, not readable, or holds fewer than two usable text
            files.
    """
    root = Path(folder)
    if not root.exists():
        raise DataError(f"data folder {str(root)!r} does not exist; give an existing folder of text files")
    if not root.is_dir():
        raise DataError(
            f"data path {str(root)!r} is not a folder; give the folder that holds your text files "
            "(two or more, since they are split by file into training and held-out)"
        )
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"`held_out_fraction` must be between 0 and 1, got {held_out_fraction}")
    wanted = None if suffixes is None else tuple(suffixes)
    documents: dict[str, bytes] = {}
    skipped: list[Skipped] = []
    for path in _walk(root, frozenset(exclude), skipped):
        name = path.relative_to(root).as_posix()
        if wanted is not None and path.suffix not in wanted:
            continue
        content = _read_text(path)
        if isinstance(content, str):
            skipped.append(Skipped(printable(name), content))
        else:
            documents[name] = content
    if len(documents) < 2:
        kinds = "any name" if wanted is None else f"names ending in {' or '.join(wanted)}"
        seen = "; skipped: " + ", ".join(f"{s.path} ({s.reason})" for s in skipped[:5]) if skipped else ""
        raise DataError(
            f"data folder {str(root)!r}: found {len(documents)} usable text file(s) with {kinds}, need at least two "
            f"(they are split by file into training and held-out){seen}"
        )

    rank = {name: _unit_hash(name) for name in documents}
    held_out = [n for n in documents if rank[n] < held_out_fraction] or [min(rank, key=rank.__getitem__)]
    train = [n for n in documents if n not in set(held_out)]
    if not train:
        train = [max(rank, key=rank.__getitem__)]
        held_out.remove(train[0])
    if max_held_out_bytes is not None:
        held_out = _first_files(sorted(held_out, key=rank.__getitem__), documents, max_held_out_bytes)
    digest = hashlib.sha256()
    for part in (train, held_out):
        for name in part:
            digest.update(name_bytes(name) + f"\0{len(documents[name])}\0".encode())
            digest.update(documents[name])
        digest.update(b"|")
    return ByteData(
        _join(documents[n] for n in train),
        _join(documents[n] for n in held_out),
        tuple(train),
        tuple(held_out),
        tuple(skipped),
        digest.hexdigest(),
    )


def _walk(root: Path, exclude: frozenset[str], skipped: list[Skipped]) -> Iterable[Path]:
    def refused(error: OSError) -> None:
        if Path(error.filename or root) == root:
            raise DataError(f"data folder {str(root)!r} cannot be read: {error.strerror}; check its permissions")
        skipped.append(Skipped(printable(str(error.filename)), f"unreadable folder: {error.strerror}"))

    for folder, folders, files in os.walk(root, onerror=refused):
        top = Path(folder) == root
        folders[:] = sorted(
            f for f in folders if f not in SKIPPED_FOLDERS and not f.startswith(".") and not (top and f in exclude)
        )
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and not path.is_symlink() and path.is_file():
                yield path


def _read_text(path: Path) -> bytes | str:
    """The file's bytes, or the reason why it is not used."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"unreadable: {error.strerror}"
    if not content:
        return "empty"
    if SEPARATOR in content:
        return "binary: holds a zero byte"
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 text: byte {error.start}"
    return content


def name_bytes(name: str) -> bytes:
    """The bytes of a file's name: Python holds those that are not UTF-8 as lone surrogates, which do not encode."""
    return name.encode("utf-8", "surrogateescape")


def printable(name: str) -> str:
    r"""A file's name as any terminal takes it, bytes that are not UTF-8 as ``\xe9``."""
    return name_bytes(name).decode("utf-8", "backslashreplace")


def _unit_hash(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name_bytes(name)).digest()[:8], "big") / 2**64


def _first_files(names: list[str], documents: dict[str, bytes], limit: int) -> list[str]:
    kept, size = names[:1], len(documents[names[0]])
    for name in names[1:]:
        if size + len(documents[name]) <= limit:
            kept.append(name)
            size += len(documents[name])
    return sorted(kept)


def _join(documents: Iterable[bytes]) -> Tensor:
    sep = bytes([SEPARATOR])
    return torch.frombuffer(bytearray(sep + sep.join(documents) + sep), dtype=torch.uint8)


def batch_at(data: Tensor, step: int, *, batch_size: int, seq_len: int, seed: int) -> tuple[Tensor, Tensor]:
    """The batch of one training step: random windows, a pure function of (data, seed, step).

    Having no state of its own, the position in the data survives an interruption as one integer.

    Returns:
        ``(tokens, targets)``, int64 ``[batch_size, seq_len]``; targets are the bytes one later.

    Raises:
        DataError (a ValueError): the data is shorter than one window.
    """
    if len(data) < seq_len + 1:
        raise DataError(
            f"the training data has {len(data)} bytes, fewer than one window of {seq_len + 1}; shorten `seq_len`"
        )
    # The generator looks at the low 32 bits of its seed only, so mix both numbers into them.
    mixed = hashlib.sha256(f"{seed}/{step}".encode()).digest()[:4]
    generator = torch.Generator().manual_seed(int.from_bytes(mixed, "big"))
    starts = torch.randint(0, len(data) - seq_len, (batch_size,), generator=generator)
    windows = data[starts[:, None] + torch.arange(seq_len + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
