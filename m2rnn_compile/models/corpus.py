# SPDX-License-Identifier: Apache-2.0
"""Token data from files and folders: bytes or a `tokenizers` file, split by document into training and held-out."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .data import SEPARATOR, DataError, Skipped, _read_text, _unit_hash, _walk, name_bytes, printable

END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # looked for, in this order


class Corpus(NamedTuple):
    """Training and held-out tokens.

    Attributes:
        train, held_out: int32 (uint8 for bytes); a separator before every document and after the last.
        separator: id of the separator; targets that are one are counted like any other.
        vocab_size: ids lie below it.
        bytes_per_token: of the held-out text (separators left out), to give results in bits per byte.
        train_files, held_out_files: names, in the order of their tokens.
        skipped: files of folders that were left out, with the reason.
        fingerprint: hash of all names, bytes and the tokenizer; a resumed run checks that it trains on the same data.
    """

    train: Tensor
    held_out: Tensor
    separator: int
    vocab_size: int
    bytes_per_token: float
    train_files: tuple[str, ...]
    held_out_files: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    fingerprint: str


def load_corpus(
    paths: Sequence[str | Path],
    *,
    tokenizer: str | Path | None = None,
    end_token: str | None = None,
    held_out_fraction: float = 0.01,
) -> Corpus:
    """Read and tokenise documents, one a file.

    A file that is named must be usable; below a folder, files that are not text are passed over and listed. Which
    documents are held out depends on the hash of their name only. A single document is cut: its end is held out. The
    name is the last part of the given path and what lies below it; where two would be equal (``p1/src p2/src``), the
    folders above are added to both, as many as are needed.

    Args:
        paths: files and folders (read recursively, in sorted order; hidden files and links are passed over).
        tokenizer: a ``tokenizer.json`` of the package `tokenizers`; None for bytes.
        end_token: the tokenizer's token that stands between documents; default: the first known one of END_TOKENS.
        held_out_fraction: share of the documents (or of the single document's bytes).

    Raises:
        DataError (a ValueError): a path is missing, empty, binary, unreadable, not a regular file or named twice;
            nothing usable is left; or the tokenizer cannot be used. The message names the path, the fault and the way
            out.
    """
    documents, skipped = _collect(paths)
    digest = hashlib.sha256()
    for name, content in documents.items():
        digest.update(name_bytes(name) + f"\0{len(content)}\0".encode() + content)
    train, held_out = _split(documents, held_out_fraction)
    encode: Callable[[list[bytes]], list[Any]]
    if tokenizer is None:
        encode, separator, vocab_size = list, SEPARATOR, 256
    else:
        loaded, separator = load_tokenizer(Path(tokenizer), end_token)
        vocab_size = 1 + max(loaded.get_vocab().values())  # not their number: ids may have gaps
        encode = lambda texts: [
            e.ids for e in loaded.encode_batch([t.decode() for t in texts], add_special_tokens=False)
        ]
        digest.update(Path(tokenizer).read_bytes() + str(separator).encode())
    parts = [_join(encode(list(part.values())), separator, vocab_size) for part in (train, held_out)]
    held_out_bytes = sum(map(len, held_out.values()))
    held_out_tokens = len(parts[1]) - len(held_out) - 1
    return Corpus(
        train=parts[0],
        held_out=parts[1],
        separator=separator,
        vocab_size=vocab_size,
        bytes_per_token=held_out_bytes / max(1, held_out_tokens),
        train_files=tuple(train),
        held_out_files=tuple(held_out),
        skipped=tuple(skipped),
        fingerprint=digest.hexdigest(),
    )


def _collect(paths: Sequence[str | Path]) -> tuple[dict[str, bytes], list[Skipped]]:
    if not paths:
        raise DataError("no data: name at least one text file, or a folder of them")
    found: list[tuple[int, str, bytes | str]] = []  # (which path, what follows it in the name, content or reason)
    skipped: list[Skipped] = []
    known: set[Path] = set()
    for i, path in enumerate(map(Path, paths)):
        if not path.exists():
            raise DataError(f"data path {str(path)!r} does not exist; give text files, or folders of them")
        if not path.is_dir() and not path.is_file():  # a pipe would be waited for, a device has no end
            raise DataError(
                f"data path {str(path)!r} is neither a regular file nor a folder; give text files, or folders of them"
            )
        root = path.resolve()
        for file in _walk(path, frozenset(), skipped) if path.is_dir() else [path]:
            below = file.relative_to(path)
            if root / below in known:
                raise DataError(f"data file {str(file)!r} was named twice, by itself or in a folder; name it once")
            known.add(root / below)
            content = _read_text(file)
            if isinstance(content, str) and not path.is_dir():
                raise DataError(
                    f"data file {str(file)!r} cannot be used: {content}; give UTF-8 text, or a folder, in which such "
                    "files are passed over"
                )
            found.append((i, below.as_posix(), content))
    name = _naming([os.path.abspath(p) for p in paths], [f[:2] for f in found if isinstance(f[2], bytes)])
    documents = {name(i, below): text for i, below, text in found if isinstance(text, bytes)}
    skipped += [Skipped(printable(name(i, below)), reason) for i, below, reason in found if isinstance(reason, str)]
    if not documents:
        seen = ", ".join(f"{s.path} ({s.reason})" for s in skipped[:5]) or "the folders are empty"
        raise DataError(f"no usable text in {', '.join(repr(str(p)) for p in paths)}: {seen}; give other files")
    return documents, skipped


def _naming(paths: list[str], files: list[tuple[int, str]]) -> Callable[[int, str], str]:
    """How files are called: by the last part of the path they came by, or as many as tell each from the others.

    Args:
        paths: absolute.
        files: those that must differ: (index of the path, what lies below it, or "."), none twice.
    """
    parts = [Path(p).parts[1:] for p in paths]
    kept = [1] * len(paths)

    def name(i: int, below: str) -> str:
        return Path(*parts[i][-kept[i] :], below).as_posix()

    while True:
        count = Counter(name(i, below) for i, below in files)
        longer = {i for i, below in files if count[name(i, below)] > 1 and kept[i] < len(parts[i])}
        if not longer:
            return name
        for i in longer:
            kept[i] += 1


def _split(documents: dict[str, bytes], fraction: float) -> tuple[dict[str, bytes], dict[str, bytes]]:
    if not 0 < fraction < 1:
        raise ValueError(f"load_corpus: `held_out_fraction` must be between 0 and 1, got {fraction}")
    if len(documents) == 1:
        ((name, content),) = documents.items()
        text = content.decode()
        cut = len(text) - max(1, round(fraction * len(text)))
        if cut < 1:
            raise DataError(f"data file {name!r} holds {len(content)} byte(s), too few to train on; give more text")
        return {name: text[:cut].encode()}, {name: text[cut:].encode()}
    rank = {name: _unit_hash(name) for name in documents}
    held_out = {n for n in documents if rank[n] < fraction} or {min(rank, key=rank.__getitem__)}
    if len(held_out) == len(documents):
        held_out.remove(max(rank, key=rank.__getitem__))
    pick = lambda held: {n: c for n, c in documents.items() if (n in held_out) == held}
    return pick(False), pick(True)


def load_tokenizer(path: Path, end_token: str | None = None) -> tuple[Any, int]:
    """A tokenizer of the package `tokenizers`, and the id of its token between documents; see `load_corpus`.

    Raises:
        DataError: the package or the file is missing, or has no such token.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DataError(
            "a tokenizer file needs the package `tokenizers`; run: pip install 'm2rnn-compile[train]', or train on "
            "bytes"
        ) from error
    if not path.is_file():
        raise DataError(f"tokenizer file {str(path)!r} does not exist; give a tokenizer.json, or train on bytes")
    try:
        loaded = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise DataError(f"tokenizer file {str(path)!r} cannot be read ({error}); fetch it again") from error
    # A file saved for another use may say so; here it would drop most of every document, or train on padding.
    loaded.no_truncation()
    loaded.no_padding()
    candidates = END_TOKENS if end_token is None else (end_token,)
    separator = next((i for t in candidates if (i := loaded.token_to_id(t)) is not None), None)
    if separator is None:
        raise DataError(
            f"tokenizer file {str(path)!r} has no token {' or '.join(map(repr, candidates))} to stand between "
            "documents; name one of its tokens as the end token"
        )
    return loaded, separator


def _join(documents: Iterable[Any], separator: int, vocab_size: int) -> Tensor:
    if vocab_size <= 256:
        sep = bytes([separator])
        joined = bytearray(sep + sep.join(map(bytes, documents)) + sep)
        return torch.frombuffer(joined, dtype=torch.uint8)
    parts = [torch.tensor([separator], dtype=torch.int32)]
    for ids in documents:
        parts += [torch.tensor(ids, dtype=torch.int32), parts[0]]
    return torch.cat(parts)


def most_boundaries(tokens: Tensor, separator: int, seq_len: int) -> int:
    """The most separators that any window of `seq_len` tokens holds."""
    counts = torch.cat([torch.zeros(1, dtype=torch.int64), (tokens == separator).cumsum(0)])
    return int((counts[seq_len:] - counts[:-seq_len]).max())


def pack(tokens_BT: Tensor, separator: int, boundaries: int) -> tuple[Tensor, Tensor]:
    """Rows end to end as packed documents: a new one starts with every row and at every separator.

    Args:
        tokens_BT: int64 ``[B, T]``.
        boundaries: most separators in a row; the number of documents is padded (with empty ones at the end) to what it
            can be at most, so that shapes do not depend on the data.

    Returns:
        ``(tokens [1, B·T], cu_seqlens int32 [B · (1 + boundaries) + 1])``.
    """
    B, T = tokens_BT.shape
    starts = tokens_BT == separator
    starts[:, 0] = True
    found = starts.flatten().nonzero()[:, 0]
    cu_seqlens = torch.full((B * (1 + boundaries) + 1,), B * T, dtype=torch.int32)
    cu_seqlens[: len(found)] = found.to(torch.int32)
    return tokens_BT.reshape(1, B * T), cu_seqlens
