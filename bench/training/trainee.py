# SPDX-License-Identifier: Apache-2.0
"""One model in training: what a step is, and what it holds in memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from m2rnn_compile.layers import Block, param_groups
from m2rnn_compile.models import HybridLM, LMConfig
from m2rnn_compile.models.lm import Trunk

GRAD_CLIP = 1.0
GIB = 2**30
# Random tokens that the steps take in turns: enough that no step sees what the one before it learnt by heart.
BATCHES = 8


def head_loss(trunk: Trunk, x: Tensor, targets: Tensor) -> Tensor:
    """Norm, tied head and cross-entropy as in `HybridLM.loss`."""
    logits = F.linear(trunk.ln_f(x), trunk.wte.weight)
    return F.cross_entropy(logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten())


class Trainee:
    """A model, its optimizer, and a step: forward and backward in bf16 autocast, gradient clip 1, AdamW; weights fp32.

    Each block is compiled on its own, and the head with its loss: models of one process share the code of blocks that
    are alike, and 24 layers start in the time of two. What would fuse across blocks is given up, by all alike.

    Args:
        compiled: how `torch.compile` is called; None for eager.
    """

    def __init__(
        self, config: LMConfig, *, batch: int, seq_len: int, device: torch.device, compiled: dict[str, object] | None
    ) -> None:
        torch.manual_seed(0)
        self.config, self.device = config, device
        self.model = HybridLM(config, device=device)
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            param_groups(self.model, 0.1), lr=3e-4, betas=(0.9, 0.95), eps=1e-10, fused=fused
        )
        self.data = torch.randint(config.vocab_size, (BATCHES, batch, seq_len + 1), device=device)
        self.tokens = batch * seq_len
        self.steps = 0
        self.losses: list[Tensor] = []
        self._head: Callable[..., Tensor] = head_loss
        if compiled is not None:
            for block in self.model.transformer.h:
                block.compile(**compiled)
            self._head = torch.compile(head_loss, **compiled)  # type: ignore[call-overload]

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """`HybridLM.loss`, put together from the parts that are compiled."""
        trunk = self.model.transformer
        x = trunk.wte(tokens)
        aux = []
        for block in trunk.h:
            out = cast(Block, block)(x)
            x = out.x
            if out.aux_loss is not None:
                aux.append(out.aux_loss)
        loss = self._head(trunk, x, targets)
        if aux and self.config.moe is not None:
            loss = loss + self.config.moe.aux_loss_weight * torch.stack(aux).sum()
        return loss

    def forward_backward(self) -> None:
        """Without the optimizer; the gradients are dropped."""
        self._gradients()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One optimizer step."""
        self._gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _gradients(self) -> None:
        data = self.data[self.steps % BATCHES]
        self.steps += 1
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.loss(data[:, :-1], data[:, 1:])
        loss.backward()
        self.losses.append(loss.detach())

    def warm_up(self) -> float:
        """Two steps; the seconds they took, compilation and autotuning being most of it."""
        start = time.perf_counter()
        for _ in range(2):
            self.step()
        synchronize(self.device)
        return time.perf_counter() - start

    def peak_gib(self) -> tuple[float, float] | None:
        """(most memory in a step, of it weights and optimizer), as if no other model were there; None off a GPU."""
        if self.device.type != "cuda":
            return None
        own = sum(p.nbytes for p in self.model.parameters())
        own += sum(x.nbytes for entry in self.optimizer.state.values() for x in entry.values())
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.step()
        torch.cuda.synchronize(self.device)
        return (torch.cuda.max_memory_allocated(self.device) - before + own) / GIB, own / GIB

    def first_and_last_loss(self) -> list[float]:
        return [float(self.losses[0]), float(self.losses[-1])]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back what models that were let go of held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
