# SPDX-License-Identifier: Apache-2.0
"""Replace one layer's mixer in an existing model, and keep everything else."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex

import torch

from ..layers import Cache, SequenceMixer
from .config import LMConfig, MixerConfig
from .lm import HybridLM
from .mixers import MIXERS, build_mixer
from .presets import paper_sizes
from .swap_groups import Exchange


class Swap(NamedTuple):
    """What `swap_layer` changed; printing it says so.

    Attributes:
        layer: its index.
        old, new: letters of the mixer before and after.
        pattern: of the model now.
        removed, added: parameter names.
        parameters: of the model now; `difference` is how many more than before.
        cache: the given caches, as they were given, with that layer's emptied; or None.
    """

    layer: int
    old: str
    new: str
    pattern: str
    removed: tuple[str, ...]
    added: tuple[str, ...]
    parameters: int
    difference: int
    cache: Any

    def __str__(self) -> str:
        return (
            f"layer {self.layer}: {MIXERS[self.old].title} -> {MIXERS[self.new].title}; pattern {self.pattern}; "
            f"{len(self.removed)} tensors out, {len(self.added)} in; {self.parameters:,} parameters "
            f"({self.difference:+,})"
        )


def swap_layer(
    model: HybridLM,
    index: int,
    letter: str,
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    cache: Any = None,
    impl: str | None = None,
    sizes: MixerConfig | None = None,
) -> Swap:
    """Put a newly initialised mixer into layer `index` of `model`, in place.

    All other weights stay the same tensors; the layer's norm and MLP too. Device, dtype, training mode and
    ``requires_grad`` are the old mixer's. `model.config` follows: its pattern, and the sizes of that kind of layer.

    The new layer has the sizes of the model's layers of its kind, the one it replaces among them. Without any, those
    that the model's config was given, which is all that differs from the defaults or stood in the model before; else
    the paper's for a model as wide as this one.

    Args:
        letter: see `models.MIXERS`.
        optimizer: drop the old mixer's parameters and their state from it and add the new ones; everything else in it
            stays. Of the groups of the right kind (with or without weight decay) a parameter joins the one that held
            the old mixer's, else the rest of that layer's, else the first. In a group whose parameters stand in the
            model's order the new ones take their places in it, so that `optimizer.state_dict()` fits an optimizer made
            afresh for the swapped model. Where the model has several optimizers, give all of them.
        cache: decode caches of the model, a tuple with one a layer or a `models.hf.HybridCache`; come back in the
            result with this layer's emptied. The given ones stay as they are.
        impl: of the M²RNN recurrence; default the model's.
        sizes: of the new layer, such as ``M2RNNConfig(num_heads=132)``.

    Raises:
        TypeError: `index` is no integer, `sizes` are of another kind of layer, or `cache` holds no caches.
        IndexError: there is no such layer.
        ValueError: no mixer has that letter; its sizes are not known, or not those of the model's other layers of that
            kind; `cache` is not of as many layers; or a group of the optimizer for the new parameters is missing, or
            several could be it. The model and the optimizer then are as before.
    """
    config = model.config
    if isinstance(index, bool) or not isinstance(index, SupportsIndex):
        raise TypeError(f"swap_layer: `index` must be an integer from 0 to {config.num_layers - 1}, got {index!r}")
    if not 0 <= index < config.num_layers:
        raise IndexError(f"swap_layer: `index` must be from 0 to {config.num_layers - 1}, got {index}")
    block: Any = model.transformer.h[index]
    old = block.sequence_mixer
    weight = next(p for p in old.parameters() if p.dim() == 2)
    pattern = config.pattern[:index] + letter + config.pattern[index + 1 :]
    new_config = dataclasses.replace(config, pattern=pattern)
    if letter in MIXERS:  # `build_mixer` says so where it is none
        chosen: Any = {MIXERS[letter].field: _sizes(config, index, letter, sizes)}
        new_config = dataclasses.replace(new_config, **chosen, sized=_sized(config, pattern))
    new = build_mixer(letter, new_config, impl=impl or model.impl, device=weight.device, dtype=weight.dtype)
    new.train(old.training).requires_grad_(weight.requires_grad)
    cache = _emptied(cache, index, config.num_layers, new)
    exchange = Exchange(model, block, old, new, optimizer)
    before, removed = model.num_parameters(), _names(model, old)
    block.sequence_mixer = new
    exchange.carry_out()
    model.config = new_config
    return Swap(
        layer=index,
        old=config.pattern[index],
        new=letter,
        pattern=pattern,
        removed=removed,
        added=_names(model, new),
        parameters=model.num_parameters(),
        difference=model.num_parameters() - before,
        cache=cache,
    )


def _names(model: torch.nn.Module, mixer: torch.nn.Module) -> tuple[str, ...]:
    """What the model calls the mixer's parameters: a block under torch.compile has a part of its own in them."""
    own = {id(p) for p in mixer.parameters()}
    return tuple(name for name, p in model.named_parameters() if id(p) in own)


def _emptied(cache: Any, index: int, num_layers: int, new: SequenceMixer) -> Any:
    """`cache` with an empty one of `new` for layer `index`."""
    if cache is None or (hasattr(cache, "layers") and cache.layers is None):  # before the first tokens
        return cache
    layers: tuple[Cache, ...] = getattr(cache, "layers", cache)
    if not isinstance(layers, tuple | list):
        raise TypeError(
            "swap_layer: `cache` must be a tuple with one cache a layer, as `init_cache` gives it, or a HybridCache, "
            f"got {type(cache).__name__}"
        )
    if len(layers) != num_layers:
        raise ValueError(
            f"swap_layer: `cache` must hold one entry for each of the {num_layers} layers, got {len(layers)}; start "
            "from init_cache"
        )
    rows = [x.shape[0] for x in torch.utils._pytree.tree_leaves(layers) if isinstance(x, torch.Tensor) and x.dim()]
    if not rows:
        raise TypeError("swap_layer: `cache` holds no tensors; start from init_cache")
    layers = (*layers[:index], new.init_cache(rows[0]), *layers[index + 1 :])
    if not hasattr(cache, "layers"):
        return layers
    wrapped = copy.copy(cache)
    wrapped.layers = layers
    return wrapped


def _sized(config: LMConfig, pattern: str) -> str:
    """`LMConfig.sized` of the model once its pattern is `pattern`: the sizes of a kind that leaves are still known."""
    known = {
        letter: MIXERS[letter].field for letter in sorted({*config.pattern, *config.sized}) if letter not in pattern
    }
    return "".join(
        letter
        for letter, field in known.items()
        if (told := getattr(config, field)) == type(told)() and told != paper_sizes(field, config.hidden_size)
    )


def _sizes(config: LMConfig, index: int, letter: str, given: MixerConfig | None) -> MixerConfig:
    """The sizes of a new layer `index`; a config holds the 410M's for kinds that nobody sized."""
    others = config.pattern[:index] + config.pattern[index + 1 :]
    field = MIXERS[letter].field
    told: MixerConfig = getattr(config, field)
    kind = type(told)
    if given is not None:
        if not isinstance(given, kind):
            raise TypeError(
                f"swap_layer: `sizes` of a layer {letter!r} must be a {kind.__name__}, got {type(given).__name__}"
            )
        if letter in others and given != told:
            raise ValueError(
                f"swap_layer: all layers {letter!r} of a model have the same sizes, {told}, but `sizes` are {given}; "
                "leave them out"
            )
        return given
    if letter in config.pattern + config.sized or told != kind():
        return told
    known = paper_sizes(field, config.hidden_size)
    if known is None:
        raise ValueError(
            f"swap_layer: the model has no other layer {letter!r}, its config gives none of their sizes, and the paper "
            f"has none of hidden size {config.hidden_size}; give them, for example sizes={kind.__name__}(num_heads=...)"
        )
    return known
