# SPDX-License-Identifier: Apache-2.0
"""The hybrid language model: an embedding, pre-norm blocks with one mixer each, a tied head."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Block, Cache, MoE, RMSNorm, SequenceMixer, SwiGLU
from ..ops.validation import accumulation_dtype
from .config import LMConfig
from .mixers import build_mixer

SCORING_LOGITS = 2**26  # at once, where only losses are wanted: 256 MiB of fp32


class Trunk(nn.Module):
    """Embedding, blocks, final norm: what the released checkpoints call ``transformer``. `HybridLM` runs them."""

    def __init__(self, wte: nn.Embedding, h: nn.ModuleList, ln_f: RMSNorm) -> None:
        super().__init__()
        self.wte, self.h, self.ln_f = wte, h, ln_f


class HybridLM(nn.Module):
    """A language model over token ids; parameter names as in the released checkpoints, head tied to the embedding.

    Args:
        config: see `LMConfig`; `preset(name)` gives the paper's.
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
        self.config, self.impl = config, impl
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        blocks = [
            Block(
                config.hidden_size,
                build_mixer(letter, config, impl=impl, **factory),
                _build_mlp(config, factory),
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

    @property
    def mixers(self) -> list[SequenceMixer]:
        """The sequence mixer of every layer."""
        return [cast(Block, block).sequence_mixer for block in self.transformer.h]

    def init_cache(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Cache, ...]:
        """Empty decode caches, one a layer, for `batch_size` sequences."""
        return tuple(mixer.init_cache(batch_size, device=device, dtype=dtype) for mixer in self.mixers)

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
        if logits_to_keep is not None and logits_to_keep < 1:
            raise ValueError(f"HybridLM: `logits_to_keep` must be at least 1 or None, got {logits_to_keep}")
        x, new_cache, _ = self._run(tokens, cache, cu_seqlens=cu_seqlens, attention_mask=attention_mask)
        if logits_to_keep is not None:
            x = x[:, -logits_to_keep:]
        logits = self._head(x)
        return logits if cache is None else (logits, new_cache)

    def _run(
        self,
        tokens: Tensor,
        cache: tuple[Cache, ...] | None,
        *,
        states: list[Tensor] | None = None,
        **layout: Tensor | None,
    ) -> tuple[Tensor, tuple[Cache, ...], list[Tensor]]:
        """The residual stream after the last block, the new caches, and the blocks' auxiliary losses.

        What goes into every block is appended to `states`, if that is given.
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
        x = self.transformer.wte(tokens)
        new_cache: list[Cache] = []
        aux_losses: list[Tensor] = []
        for i, block in enumerate(self.transformer.h):
            if states is not None:
                states.append(x)
            out = block(x, cache=None if cache is None else cache[i], **layout)
            x = out.x
            if cache is not None:
                new_cache.append(out.cache)
            if out.aux_loss is not None:
                aux_losses.append(out.aux_loss)
        return x, tuple(new_cache), aux_losses

    def _head(self, x: Tensor) -> Tensor:
        return F.linear(self.transformer.ln_f(x), self.transformer.wte.weight)

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

        In training mode a mixture of experts adds its auxiliary loss to the mean or the sum (there once a target).
        Without gradients, "none" makes its logits in slices of `SCORING_LOGITS`, so it needs less memory than training.

        Args:
            tokens: ``[B, T]``.  targets: int64 ``[B, T]``, the token after each; -100 is left out.
            reduction: "mean", "sum" or "none" (``[B, T]``, without the auxiliary loss).
        """
        x, _, aux_losses = self._run(tokens, None, cu_seqlens=cu_seqlens, attention_mask=attention_mask)
        rows, wanted = x.flatten(0, 1), targets.flatten()
        if reduction == "none" and not torch.is_grad_enabled():
            size = max(1, SCORING_LOGITS // self.config.vocab_size)
            slices = zip(rows.split(size), wanted.split(size), strict=True)
            return torch.cat([self._cross_entropy(x, y, reduction) for x, y in slices]).view_as(targets)
        nll = self._cross_entropy(rows, wanted, reduction)
        if reduction == "none":
            return nll.view_as(targets)
        if aux_losses and self.config.moe is not None:
            count = 1 if reduction == "mean" else (targets != -100).sum()
            nll = nll + self.config.moe.aux_loss_weight * torch.stack(aux_losses).sum() * count
        return nll

    def _cross_entropy(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        logits = self._head(x)
        logits = logits.to(accumulation_dtype(logits.dtype))
        return F.cross_entropy(logits, targets, reduction=reduction)

    def num_parameters(self) -> int:
        """Parameters, tied ones once."""
        return sum(p.numel() for p in self.parameters())

    def num_active_parameters(self) -> int:
        """Parameters that one token meets: of the routed experts, `top_k` of `num_experts`."""
        idle = 0
        for module in self.modules():
            if isinstance(module, MoE):
                experts = module.c_fc.weight.numel() + module.c_proj.weight.numel()
                idle += experts // module.num_experts * (module.num_experts - module.top_k)
        return self.num_parameters() - idle


def _build_mlp(config: LMConfig, factory: dict[str, Any]) -> nn.Module:
    if config.moe is None:
        return SwiGLU(config.hidden_size, config.mlp_size, init_num_layers=config.num_layers, **factory)
    options = dataclasses.asdict(config.moe)
    del options["aux_loss_weight"]
    return MoE(config.hidden_size, **options, init_num_layers=config.num_layers, **factory)
