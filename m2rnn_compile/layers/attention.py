# SPDX-License-Identifier: Apache-2.0
"""Softmax attention with grouped queries, RoPE or no positions, a growing cache, packed documents and left padding."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.validation import accumulation_dtype
from .mixer import SequenceMixer, check_layout, check_rows, positions_in_sequence, sequence_ids, zero_pads
from .packed_attention import packed_attention


class AttentionCache(NamedTuple):
    """Keys and values of the L steps seen so far (RoPE already applied), and which of them are real.

    It grows by concatenation: the copy costs no more than attention's own reading of the cache, nothing can overflow,
    and its length is a shape, which `torch.compile` tracks without recompiling.

    Attributes:
        k: ``[B, L, num_kv_heads, head_dim]``.  v: the same.
        mask: bool ``[B, L]``, False on padding.
    """

    k: Tensor
    v: Tensor
    mask: Tensor


class Attention(SequenceMixer):
    """Causal multi-head attention through SDPA; packed sequences in 16 bits on a GPU through flash attention for them,
    whose cost is that of the sequences and not of their product, and on a CPU one by one.

    Packed in fp32 on a GPU they are masked, and there what is not finite in one of them reaches the others.

    ``c_attn`` gives q | k | v (heads of `head_dim` each), ``c_proj`` mixes the heads; no biases.

    Args:
        hidden_size: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of `num_heads` (grouped queries); default `num_heads`.
        head_dim: default ``hidden_size // num_heads``.
        rope_theta: base of the rotary embedding (10,000 in the transformer baseline); None for no positions (hybrids).
        init_num_layers: layers L of the model; c_proj starts at 0.02 / sqrt(2 L).

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float | None = None,
        init_std: float = 0.02,
        init_num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads != 0:
            raise ValueError(
                f"Attention: `num_kv_heads` must divide `num_heads` = {num_heads} and be at least 1, got {num_kv_heads}"
            )
        if head_dim is None:
            if hidden_size % num_heads != 0:
                raise ValueError(
                    f"Attention: `num_heads` = {num_heads} does not divide `hidden_size` = {hidden_size}; "
                    "choose another number of heads, or give `head_dim`"
                )
            head_dim = hidden_size // num_heads
        if rope_theta is not None and head_dim % 2 != 0:
            raise ValueError(
                f"Attention: RoPE rotates pairs, so `head_dim` must be even, got {head_dim}; or rope_theta=None"
            )
        self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim = (
            hidden_size,
            num_heads,
            num_kv_heads,
            head_dim,
        )
        self.rope_theta, self.init_std, self.init_num_layers = rope_theta, init_std, init_num_layers
        self.qkv_sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        self.c_attn = nn.Linear(hidden_size, sum(self.qkv_sizes), bias=False, device=device, dtype=dtype)
        self.c_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False, device=device, dtype=dtype)
        self._varlen = _find_varlen()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.c_attn.weight, std=self.init_std)
        nn.init.normal_(self.c_proj.weight, std=self.init_std / math.sqrt(2 * self.init_num_layers))

    def init_cache(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> AttentionCache:
        """A cache of length zero."""
        device, dtype = device or self.c_attn.weight.device, dtype or self.c_attn.weight.dtype
        empty = torch.empty(batch_size, 0, self.num_kv_heads, self.head_dim, device=device, dtype=dtype)
        return AttentionCache(empty, empty.clone(), torch.empty(batch_size, 0, device=device, dtype=torch.bool))

    def forward(
        self,
        x: Tensor,
        *,
        cache: AttentionCache | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, AttentionCache]:
        """Attend causally; arguments and results as `SequenceMixer` says. Outputs at pads are finite and mean nothing.

        Raises:
            TypeError, ValueError: arguments that do not fit; a cache together with `cu_seqlens`.
        """
        check_layout("Attention", x, self.hidden_size, cu_seqlens, attention_mask)
        x = zero_pads(x, attention_mask)
        if cache is not None and cu_seqlens is not None:
            raise ValueError(
                "Attention: a cache cannot be combined with packed sequences (`cu_seqlens`); "
                "prefill a left-padded batch with `attention_mask`, or one sequence at a time"
            )
        B, T = x.shape[0], x.shape[1]
        q, k, v = self.c_attn(x).split(self.qkv_sizes, -1)
        q = q.unflatten(-1, (self.num_heads, self.head_dim))
        k = k.unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = v.unflatten(-1, (self.num_kv_heads, self.head_dim))
        past = 0 if cache is None else cache.k.shape[1]
        if cache is not None:
            check_rows("Attention", "cache.k", cache.k, (B, past, self.num_kv_heads, self.head_dim))
        if self.rope_theta is not None:
            if cu_seqlens is not None:
                position, _ = positions_in_sequence(cu_seqlens, T)
            else:
                position = self._positions(T, past, x.device, cache, attention_mask)
            q, k = apply_rope(q, position, self.rope_theta), apply_rope(k, position, self.rope_theta)
        new_cache = None
        if cache is not None:
            if attention_mask is None:
                real = torch.ones(B, T, dtype=torch.bool, device=x.device)
            else:
                real = attention_mask.to(torch.bool)
            k, v = torch.cat([cache.k.to(k.dtype), k], 1), torch.cat([cache.v.to(v.dtype), v], 1)
            new_cache = AttentionCache(k, v, torch.cat([cache.mask, real], 1))

        if cu_seqlens is not None and self._varlen is not None and _suits_flash(q):
            repeat = self.num_heads // self.num_kv_heads
            k, v = (u if repeat == 1 else u.repeat_interleave(repeat, 2) for u in (k, v))
            bounds = cu_seqlens.to(torch.int32)
            varlen, causal = self._varlen
            return self.c_proj(varlen(q[0], k[0], v[0], bounds, bounds, T, T, **causal).flatten(1)[None])
        if cu_seqlens is not None and cu_seqlens.device.type == "cpu":  # elsewhere its values are not read back
            return self.c_proj(packed_attention(q, k, v, cu_seqlens).flatten(2))
        # Before the first token the cache knows of no padding: a prefill without any is plain causal attention.
        known = attention_mask if new_cache is None or past == 0 else new_cache.mask
        mask = self._mask(T, past, x.device, cu_seqlens, known)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        y = self.c_proj(y.transpose(1, 2).flatten(2))
        return y if new_cache is None else (y, new_cache)

    @staticmethod
    def _positions(
        T: int, past: int, device: torch.device, cache: AttentionCache | None, attention_mask: Tensor | None
    ) -> Tensor:
        """Where RoPE sees the T tokens, ``[T]`` or ``[B, T]``."""
        slots = torch.arange(T, device=device)
        if cache is None or (past == 0 and attention_mask is None):
            return slots  # left padding shifts a whole row, and RoPE sees differences only
        # A cache can have pads between its keys, from the padding of later calls: only what is real counts.
        before = cache.mask.sum(1, keepdim=True)
        return before + (slots if attention_mask is None else attention_mask.to(torch.bool).cumsum(1) - 1)

    @staticmethod
    def _mask(
        T: int, past: int, device: torch.device, cu_seqlens: Tensor | None, real_BL: Tensor | None
    ) -> Tensor | None:
        """Which of the past + T keys each query sees, broadcastable to [B, 1, T, past + T]; None: plain causal."""
        if cu_seqlens is None and real_BL is None:
            return None
        query, key = torch.arange(T, device=device)[:, None] + past, torch.arange(past + T, device=device)[None, :]
        causal = key <= query
        if cu_seqlens is not None:
            ids = sequence_ids(cu_seqlens, T)
            return (causal & (ids[:, None] == ids[None, :]))[None, None]
        assert real_BL is not None
        # A pad sees itself: a row with no key at all would be NaN, and NaN in one row can spread through gradients.
        return ((causal & real_BL.to(torch.bool)[:, None, :]) | (key == query))[:, None]

    def mixing_flops(self, context: int) -> int:
        """See `SequenceMixer.mixing_flops`: q kᵀ and the sum of values over all tokens up to this one."""
        return 4 * self.num_heads * self.head_dim * context

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}/{self.num_kv_heads}, head_dim={self.head_dim}, rope_theta={self.rope_theta}"


def _find_varlen() -> tuple[Callable[..., Any], dict[str, Any]] | None:
    """Torch's flash attention for packed sequences and how this version is told to be causal; None where it is not."""
    if not torch.cuda.is_available():
        return None
    from torch.nn.attention.varlen import varlen_attn  # imports much, Dynamo among it

    known = inspect.signature(varlen_attn).parameters
    if "is_causal" in known:
        return varlen_attn, dict(is_causal=True)
    return (varlen_attn, dict(window_size=(-1, 0))) if "window_size" in known else None


def _suits_flash(q: Tensor) -> bool:
    return q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256


def apply_rope(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotate x ``[B, T, heads, head_dim]`` by its position ``[T]`` or ``[B, T]``, angles in fp32.

    Pairs are (i, i + head_dim/2).
    """
    half = x.shape[-1] // 2
    acc = accumulation_dtype(x.dtype)
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=acc) / half)
    angle = position.to(acc)[..., None, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    a, b = x.to(acc).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
