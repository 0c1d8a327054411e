# SPDX-License-Identifier: Apache-2.0
"""The hybrid language model: an embedding, pre-norm blocks with one mixer each, a tied head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import M2RNN, Attention, Block, Cache, RMSNorm, SequenceMixer, SwiGLU
from .config import LMConfig


def _m2rnn(config: LMConfig, impl: str, factory: dict[str, Any]) -> SequenceMixer:
    return M2RNN(
        config.hidden_size,
        **dataclasses.asdict(config.m2rnn),
        norm_eps=config.norm_eps,
        init_num_layers=config.num_layers,
        impl=impl,
        **factory,
    )


def _attention(config: LMConfig, impl: str, factory: dict[str, Any]) -> SequenceMixer:
    return Attention(
        config.hidden_size, **dataclasses.asdict(config.attention), init_num_layers=config.num_layers, **factory
    )


# Letter of a pattern -> builder (config, impl of the recurrence, factory keywords) -> mixer. A mixer joins by one
# entry.
MIXERS: dict[str, Callable[[LMConfig, str, dict[str, Any]], SequenceMixer]] = {"M": _m2rnn, "A": _attention}


def build_mixer(
    letter: str,
    config: LMConfig,
    *,
    impl: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SequenceMixer:
    """The mixer that `letter` stands for.

    Raises:
        ValueError: no mixer has that letter, or the config does not fit it.
    """
    if letter not in MIXERS:
        raise ValueError(f"pattern {config.pattern!r}: no mixer has the letter {letter!r}; known are {sorted(MIXERS)}")
    return MIXERS[letter](config, impl, dict(device=device, dtype=dtype))


class Trunk(nn.Module):
    """Embedding, blocks, final norm: what the released checkpoints call ``transformer``. `HybridLM` runs them."""

    def __init__(self, wte: nn.Embedding, h: nn.ModuleList, ln_f: RMSNorm) -> None:
        super().__init__()
        self.wte, self.h, self.ln_f = wte, h, ln_f


class HybridLM(nn.Module):
    """A language model over token ids; parameter names as in the released checkpoints, head tied to the embedding.

    Args:
        config: see `LMConfig`.
        impl: implementation of the M²RNN recurrence, see `m2rnn`.
        device, dtype: of the parameters (decay gates stay fp32). "meta" builds without memory.
    """

    def __init__(
        self,
        config: LMConfig,
        *,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        blocks = [
            Block(
                config.hidden_size,
                build_mixer(letter, config, impl=impl, **factory),
                SwiGLU(config.hidden_size, config.mlp_size, init_num_layers=config.num_layers, **factory),
                norm_eps=config.norm_eps,
                **factory,
            )
            for letter in config.pattern
        ]
        self.transformer = Trunk(
            nn.Embedding(config.vocab_size, config.hidden_size, **factory),
            nn.ModuleList(blocks),
            RMSNorm(config.hidden_size, eps=config.norm_eps, **factory),
        )
        nn.init.normal_(self.transformer.wte.weight, std=0.02)

    def init_cache(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Cache, ...]:
        """Empty decode caches, one a layer, for `batch_size` sequences."""
        mixers = [cast(Block, block).sequence_mixer for block in self.transformer.h]
        return tuple(mixer.init_cache(batch_size, device=device, dtype=dtype) for mixer in mixers)

    def forward(
        self,
        tokens: Tensor,
        *,
        cache: tuple[Cache, ...] | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        logits_to_keep: int | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Cache, ...]]:
        """Logits of the next token after each position.

        Args:
            tokens: integer ids ``[B, T]``.
            cache: from `init_cache` or an earlier call; continue from it. Never modified.
            cu_seqlens: ``[S + 1]``, packed documents (B = 1).
            attention_mask: ``[B, T]``, False on left padding.
            logits_to_keep: only of the last so many positions (a long prefill needs one).

        Returns:
            logits ``[B, T, vocab_size]``, or ``(logits, new_cache)`` if a cache was given.

        Raises:
            TypeError, ValueError: arguments that do not fit.
        """
        if tokens.dim() != 2 or tokens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"HybridLM: `tokens` must be integers [B, T], int32 or int64, got {tokens.dtype} of shape "
                f"{tuple(tokens.shape)}"
            )
        if cache is not None and len(cache) != len(self.transformer.h):
            raise ValueError(
                f"HybridLM: `cache` must hold one entry for each of the {len(self.transformer.h)} layers, got "
                f"{len(cache)}; start from init_cache"
            )
        if logits_to_keep is not None and logits_to_keep < 1:
            raise ValueError(f"HybridLM: `logits_to_keep` must be at least 1 or None, got {logits_to_keep}")
        x = self.transformer.wte(tokens)
        new_cache: list[Cache] = []
        for i, block in enumerate(self.transformer.h):
            layout: dict[str, Any] = dict(cu_seqlens=cu_seqlens, attention_mask=attention_mask)
            if cache is None:
                x = block(x, **layout)
            else:
                x, layer_cache = block(x, cache=cache[i], **layout)
                new_cache.append(layer_cache)
        if logits_to_keep is not None:
            x = x[:, -logits_to_keep:]
        logits = F.linear(self.transformer.ln_f(x), self.transformer.wte.weight)
        return logits if cache is None else (logits, tuple(new_cache))

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Cross-entropy in nats, taken in fp32 (fp64 for fp64 models).

        Args:
            tokens: ``[B, T]``.  targets: int64 ``[B, T]``, the token after each; -100 is left out.
            reduction: "mean", "sum" or "none" (``[B, T]``).
        """
        logits = self(tokens, cu_seqlens=cu_seqlens, attention_mask=attention_mask)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        return nll.view_as(targets) if reduction == "none" else nll

    def num_parameters(self) -> int:
        """Parameters, tied ones once."""
        return sum(p.numel() for p in self.parameters())
