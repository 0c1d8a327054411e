# SPDX-License-Identifier: Apache-2.0
"""The letters of a pattern: which mixer each stands for, and how it is built from a config."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from ..layers import GRU, M2RNN, Attention, GatedDeltaNet, Mamba2, SequenceMixer, VectorRNN
from .config import LMConfig


class Mixer(NamedTuple):
    """A letter's mixer.

    Attributes:
        title: for people.
        layer: the module's class.
        field: of `LMConfig`, with the class's arguments.
        passes: which of "norm_eps" and "impl" the class takes.
    """

    title: str
    layer: type[SequenceMixer]
    field: str
    passes: tuple[str, ...]


# A mixer joins by one entry.
MIXERS: dict[str, Mixer] = {
    "M": Mixer("M²RNN", M2RNN, "m2rnn", ("norm_eps", "impl")),
    "G": Mixer("Gated DeltaNet", GatedDeltaNet, "gated_deltanet", ("norm_eps",)),
    "A": Mixer("softmax attention", Attention, "attention", ()),
    "2": Mixer("Mamba-2", Mamba2, "mamba2", ("norm_eps",)),
    "R": Mixer("vector RNN", VectorRNN, "vector_rnn", ("norm_eps", "impl")),
    "U": Mixer("GRU", GRU, "gru", ("norm_eps",)),
}


def build_mixer(
    letter: str,
    config: LMConfig,
    *,
    impl: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SequenceMixer:
    """The mixer that `letter` stands for.

    Args:
        impl: implementation of the M²RNN recurrence, see `m2rnn`.

    Raises:
        ValueError: no mixer has that letter, or the config does not fit it.
    """
    if letter not in MIXERS:
        raise ValueError(f"pattern {config.pattern!r}: no mixer has the letter {letter!r}; known are {sorted(MIXERS)}")
    mixer = MIXERS[letter]
    options: dict[str, Any] = dataclasses.asdict(getattr(config, mixer.field))
    options |= {name: value for name, value in (("norm_eps", config.norm_eps), ("impl", impl)) if name in mixer.passes}
    return mixer.layer(config.hidden_size, **options, init_num_layers=config.num_layers, device=device, dtype=dtype)
