# SPDX-License-Identifier: Apache-2.0
"""What a model costs: parameters, state a token stream carries, FLOPs a token; computed without allocating it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..layers import AttentionCache, Cache
from .config import LMConfig
from .lm import HybridLM


class ModelStatistics(NamedTuple):
    """Of one config.

    Attributes:
        parameters: tied ones once.
        active_parameters: that one token meets.
        state_bytes: what decoding one stream carries, however long it is.
        bytes_per_token: what it carries on top for each token of context (keys and values).
        flops_per_token: of the forward pass, at `context` tokens of context; a training step takes about three times
            as many.
        state_elements: recurrent state per layer (H, without the conv's inputs), by letter.
        context: where the FLOPs are taken.
    """

    parameters: int
    active_parameters: int
    state_bytes: int
    bytes_per_token: int
    flops_per_token: int
    state_elements: dict[str, int]
    context: int


def statistics(config: LMConfig, *, context: int = 4096, dtype: torch.dtype = torch.bfloat16) -> ModelStatistics:
    """Count a model's cost.

    FLOPs are two for each active parameter of a matrix (the tied head once; looking up an embedding is none), plus what
    each mixer does besides its projections; gates, norms and the width-4 convs do not count.

    Args:
        context: tokens of context at which attention is counted.
        dtype: of activations, and so of caches (recurrent states stay fp32).
    """
    model = HybridLM(config, device="meta", dtype=dtype)
    empty = model.init_cache(1)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() >= 2 and _is_product(name))
    idle = model.num_parameters() - model.num_active_parameters()
    mixing = sum(mixer.mixing_flops(context) for mixer in model.mixers)
    per_token = 0
    elements = {}
    for letter, cache in zip(config.pattern, empty, strict=True):
        if isinstance(cache, AttentionCache):
            heads, dim = cache.k.shape[2:]
            per_token += 2 * heads * dim * dtype.itemsize + torch.bool.itemsize  # keys, values, the mask
        else:
            elements[letter] = cache.state.numel()
    return ModelStatistics(
        parameters=model.num_parameters(),
        active_parameters=model.num_active_parameters(),
        state_bytes=_bytes(empty),
        bytes_per_token=per_token,
        flops_per_token=2 * (matrices - idle) + mixing,
        state_elements=elements,
        context=context,
    )


def _is_product(name: str) -> bool:
    """Whether each token is multiplied by this parameter as a matrix, outside of `mixing_flops`."""
    return not any(part in name for part in ("conv1d", "state_weight", ".D"))


def _bytes(cache: Cache) -> int:
    tensors = [x for x in torch.utils._pytree.tree_leaves(cache) if isinstance(x, Tensor)]
    return sum(x.numel() * x.dtype.itemsize for x in tensors)
