# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: top-k routing, SwiGLU experts as grouped products, a shared expert, an auxiliary loss."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.validation import accumulation_dtype
from .grouped_mm import grouped_linear
from .mixer import check_sizes

Z_LOSS = 0.1  # weight of the router's z-loss inside of the auxiliary loss, as in the released models


class MoEOutput(NamedTuple):
    """`y` in x's shape; `aux_loss` a scalar in training mode (see `MoE`), else None."""

    y: Tensor
    aux_loss: Tensor | None


class Experts(nn.Module):
    """The weights of one projection of all experts, ``[E, out, in]``."""

    def __init__(self, num_experts: int, in_size: int, out_size: int, init_std: float, **factory: Any) -> None:
        super().__init__()
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(num_experts, out_size, in_size, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x ``[R, in]``, sorted by expert, expert e's rows ending at ``ends[e]``, gives ``[R, out]``."""
        if torch.is_autocast_enabled(x.device.type):
            low = torch.get_autocast_dtype(x.device.type)
            return grouped_linear(x.to(low), self.weight.to(low), ends)
        return grouped_linear(x, self.weight, ends)


class MoE(nn.Module):
    """Each token goes through the `top_k` of its `num_experts` experts that the router likes best, and the shared one.

    An expert is a SwiGLU; ``c_fc`` holds ``[up; gate]`` halves per expert. Rows are sorted by expert, so that all
    experts run as one grouped product: no loop over experts, no capacity, no token dropped; sums have a fixed order.

    The auxiliary loss, computed in training mode, is ``E · Σ_e p_e n_e + 0.1 · mean(logsumexp(logits)²)`` with p_e the
    mean router probability and n_e the share of choices that fell on e: 1 where experts are used evenly. Padding counts
    in neither.

    Args:
        hidden_size: width of the residual stream.
        num_experts, top_k: E, and how many a token uses.
        expert_size, shared_size: intermediate width of an expert and of the shared one; ``shared_size=0`` for none.
        normalize_top_k: softmax over the chosen logits (weights sum to one) instead of over all of them.
        init_num_layers: layers L of the model; the projections back start at 0.02 / sqrt(2 L).

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int = 128,
        top_k: int = 8,
        expert_size: int = 256,
        shared_size: int = 1024,
        normalize_top_k: bool = True,
        init_std: float = 0.02,
        init_num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("MoE", hidden_size=hidden_size, num_experts=num_experts, top_k=top_k, expert_size=expert_size)
        if top_k > num_experts:
            raise ValueError(f"MoE: `top_k` must be at most `num_experts` = {num_experts}, got {top_k}")
        self.hidden_size, self.num_experts, self.top_k, self.normalize_top_k = (
            hidden_size,
            num_experts,
            top_k,
            normalize_top_k,
        )
        self.init_std = init_std
        self.init_std_out = init_std / math.sqrt(2 * init_num_layers)
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.gate = nn.Linear(hidden_size, num_experts, bias=False, **factory)
        self.c_fc = Experts(num_experts, hidden_size, 2 * expert_size, init_std, **factory)
        self.c_proj = Experts(num_experts, expert_size, hidden_size, self.init_std_out, **factory)
        self.has_shared = shared_size > 0
        if self.has_shared:
            self.c_fc_shared = nn.Linear(hidden_size, 2 * shared_size, bias=False, **factory)
            self.c_proj_shared = nn.Linear(shared_size, hidden_size, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate.weight, std=self.init_std)
        self.c_fc.reset_parameters()
        self.c_proj.reset_parameters()
        if self.has_shared:
            nn.init.normal_(self.c_fc_shared.weight, std=self.init_std)
            nn.init.normal_(self.c_proj_shared.weight, std=self.init_std_out)

    def forward(self, x: Tensor, *, attention_mask: Tensor | None = None) -> MoEOutput:
        """Route and transform.

        Args:
            x: ``[B, T, hidden_size]``.
            attention_mask: ``[B, T]``, False on padding, which is left out of the auxiliary loss.
        """
        tokens = x.flatten(0, 1)
        R, k, E = tokens.shape[0], self.top_k, self.num_experts
        logits = self.gate(tokens)
        wide = logits.to(accumulation_dtype(logits.dtype))
        chosen, experts = wide.topk(k, -1)
        weights = chosen.softmax(-1) if self.normalize_top_k else wide.softmax(-1).gather(-1, experts)

        by_expert, order = experts.flatten().sort(stable=True)
        place = order.argsort()
        ends = torch.searchsorted(by_expert, torch.arange(E, device=x.device), right=True, out_int32=True)
        rows = _Permute.apply(
            tokens[:, None].expand(R, k, self.hidden_size).reshape(R * k, self.hidden_size), order, place
        )
        up, gate = self.c_fc(rows, ends).chunk(2, -1)
        rows = _Permute.apply(self.c_proj(up * F.silu(gate), ends), place, order)
        y = (rows.unflatten(0, (R, k)) * weights.to(rows.dtype)[..., None]).sum(1)
        if self.has_shared:
            up, gate = self.c_fc_shared(tokens).chunk(2, -1)
            y = y + self.c_proj_shared(up * F.silu(gate))
        aux_loss = self._aux_loss(wide, experts, attention_mask) if self.training else None
        return MoEOutput(y.view_as(x), aux_loss)

    def _aux_loss(self, logits_RE: Tensor, experts_Rk: Tensor, attention_mask: Tensor | None) -> Tensor:
        R, E = logits_RE.shape
        real = logits_RE.new_ones(R) if attention_mask is None else attention_mask.flatten().to(logits_RE.dtype)
        count = real.sum().clamp_min(1)
        used = torch.zeros_like(logits_RE).scatter(1, experts_Rk, 1.0)  # a token's experts are distinct
        share = (used * real[:, None]).sum(0) / (count * self.top_k)
        probability = (logits_RE.softmax(-1) * real[:, None]).sum(0) / count
        z = (logits_RE.logsumexp(-1).square() * real).sum() / count
        return E * (probability * share).sum() + Z_LOSS * z

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, top_k={self.top_k}, normalize_top_k={self.normalize_top_k}"


class _Permute(torch.autograd.Function):
    """Rows in another order. Autograd's own backward of indexing adds rows up, by atomics on a GPU; this one reads."""

    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return x[order]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return dy[inverse], None, None
