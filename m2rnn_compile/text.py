# SPDX-License-Identifier: Apache-2.0
"""What a trained model reads and writes: bytes, or tokens of a tokenizer that goes with its folder."""

from __future__ import annotations

import codecs
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cli import UserError
from .models.corpus import load_tokenizer
from .models.data import SEPARATOR

RUN, MODEL = "run.json", "model"  # in the folder of a run: how it was started, and what came out
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"  # beside a model, as transformers has them


class ByteText:
    """Bytes as tokens; a letter cut in two is held back until it is whole."""

    separator, vocab_size = SEPARATOR, 256

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def encode(self, prompt: str) -> Tensor:
        return to_tokens(prompt)

    def shown(self, prompt: str) -> str:
        return self._decode(prompt.encode(errors="surrogateescape"))

    def decode(self, token: int) -> str:
        return self._decode(bytes([token]))

    def rest(self) -> str:
        return self._decode(b"", final=True)


class TokenText:
    """Tokens of a `tokenizers` file."""

    def __init__(self, path: str, end_token: str | None) -> None:
        self.tokenizer, self.separator = load_tokenizer(Path(path), end_token)
        self.vocab_size = 1 + max(self.tokenizer.get_vocab().values())  # not their number: ids may have gaps
        self._ids: list[int] = []
        self._written = ""

    def encode(self, prompt: str) -> Tensor:
        self._ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        self._written = self.tokenizer.decode(self._ids)
        return torch.tensor([[self.separator, *self._ids]])

    def shown(self, prompt: str) -> str:
        return prompt

    def decode(self, token: int) -> str:
        """What the text has more than before; nothing while a letter is incomplete."""
        self._ids.append(token)
        whole = self.tokenizer.decode(self._ids)
        if whole.endswith("\ufffd"):
            return ""
        more, self._written = whole[len(self._written) :], whole
        return more

    def rest(self) -> str:
        return self.tokenizer.decode(self._ids)[len(self._written) :]


def to_tokens(text: str) -> Tensor:
    """A document's start and the bytes of `text`, [1, T]."""
    return torch.tensor([[SEPARATOR, *text.encode(errors="surrogateescape")]])


def keep_tokenizer(folder: Path, tokenizer: str | None, end_token: str | None) -> None:
    """Copy a run's tokenizer beside its model, which so can be moved; for a run on bytes there is none.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        if tokenizer is None:
            for name in (TOKENIZER, TOKENIZER_CONFIG):
                (folder / name).unlink(missing_ok=True)
            return
        loaded, separator = load_tokenizer(Path(tokenizer), end_token)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": loaded.id_to_token(separator)}
        contents = {TOKENIZER: Path(tokenizer).read_bytes(), TOKENIZER_CONFIG: json.dumps(config, indent=1).encode()}
        for name, content in contents.items():
            partial = folder / f".partial-{name}"
            partial.write_bytes(content)
            os.replace(partial, folder / name)
    except OSError as error:
        raise UserError(f"cannot write the tokenizer to {str(folder)!r}: {error.strerror}; free space") from error


def tokenizer_of(folder: str | Path, given: str | Path | None = None) -> tuple[str, str | None] | None:
    """The tokenizer file and end token of the model in `folder`, or of the run that it belongs to; None for bytes.

    Args:
        given: this file instead.

    Raises:
        UserError: the run's tokenizer lies elsewhere now.
    """
    if given is not None:
        found = _beside(Path(folder)) or _of_run(Path(folder))
        return str(given), found and found[1]
    return _beside(Path(folder)) or _existing(_of_run(Path(folder)))


def _beside(folder: Path) -> tuple[str, str | None] | None:
    if not (folder / TOKENIZER).is_file():
        return None
    try:
        config: Any = json.loads((folder / TOKENIZER_CONFIG).read_text())
    except (OSError, ValueError):
        config = None
    end = config.get("eos_token") if isinstance(config, dict) else None
    if isinstance(end, dict):  # transformers may write all about it
        end = end.get("content")
    return str(folder / TOKENIZER), end if isinstance(end, str) else None


def _of_run(folder: Path) -> tuple[str, str | None] | None:
    for place in (folder, folder.parent, folder.parent.parent):  # a run, its model, one of its checkpoints
        try:
            options = json.loads((place / RUN).read_text())
        except (OSError, ValueError):
            continue
        if isinstance(options, dict) and options.get("tokenizer") is not None:
            return _beside(place / MODEL) or (options["tokenizer"], options.get("end_token"))
        return None
    return None


def _existing(found: tuple[str, str | None] | None) -> tuple[str, str | None] | None:
    if found is not None and not Path(found[0]).is_file():
        raise UserError(f"the run's tokenizer {found[0]!r} does not exist here; give the file as --tokenizer")
    return found
