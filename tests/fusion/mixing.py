# SPDX-License-Identifier: Apache-2.0
"""The arguments of `m2rnn::fused_mixer`, and the same thing composed: slices of x, the convolution, `compose`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m2rnn_compile.layers.mixer import positions_in_sequence
from m2rnn_compile.ops import conv
from m2rnn_compile.ops.fused import unpack
from m2rnn_compile.ops.fused_mixer import parts
from m2rnn_compile.ops.library import name_of
from tests.fusion.composed import CASES, Fused, compose, make_fused

# In which order the parts stand in x, and how many columns of no use follow each.
ORDERS: dict[str, tuple[str, int]] = {"the layer's": ("qfg", 0), "padded": ("qfg", 3), "turned": ("gfq", 1)}


def make_mixer(case: str, *, taps: int | None = 4, order: str = "padded", **options: Any) -> Fused:
    """A case of `composed.CASES` with q, k, v, f and g in one tensor x, and the weight of a convolution."""
    made = make_fused(**{**CASES[case], **options})
    q, k, v, f = (made.tensors[n] for n in ("q", "k", "v", "f"))
    g = made.tensors.get("g")
    (B, T, Nq, K), V = q.shape, v.shape[3]
    columns = {"q": torch.cat([t.flatten(2) for t in (q, k, v)], -1), "f": f.to(v.dtype)}
    columns["g"] = v.new_empty(B, T, 0) if g is None else g.flatten(2)
    letters, gap = ORDERS[order]
    at, first, pieces = {}, 0, []
    for letter in letters:
        at[letter] = first
        pieces += [columns[letter], torch.full((B, T, gap), 7.0, dtype=v.dtype)]
        first += columns[letter].shape[2] + gap
    sizes = [Nq, k.shape[2], v.shape[2], K, V, f.shape[2], 0 if g is None else g.shape[2], *(at[n] for n in "qfg")]
    tensors = {"x": torch.cat(pieces, -1)}
    position = None
    if taps is not None:
        made_w = torch.Generator().manual_seed(2)
        weight = torch.randn(columns["q"].shape[2], taps, generator=made_w, dtype=torch.float64) / taps**0.5
        tensors["conv_weight"] = weight.to(v.dtype)
        cu = made.options["cu_seqlens"]
        position = None if cu is None else positions_in_sequence(cu, T)[0]
    tensors |= {n: t for n, t in made.tensors.items() if n not in ("q", "k", "v", "f", "g")}
    return Fused(tensors, {**made.options, "sizes": sizes, "position": position}, made.do, made.dfinal_state)


def arguments(*, impl: str = "auto", chunk: int = 64, **given: Any) -> tuple[Any, ...]:
    """In the op's order; what is not given is None."""
    names = [a.name for a in torch.ops.m2rnn.fused_mixer.default._schema.arguments]
    given |= dict(out_dtype=name_of(given["x"].dtype), impl=impl, chunk=chunk)
    return tuple(given.get(n) for n in names)


def mixer(**given: Any) -> tuple[Tensor, Tensor]:
    """(o, final state) of the op."""
    o, state, *_ = torch.ops.m2rnn.fused_mixer(*arguments(**given))
    return o, state


def composed_mixer(
    *, x: Tensor, sizes: list[int], position: Tensor | None, conv_weight: Tensor | None = None, **given: Any
) -> tuple[Tensor, Tensor | None]:
    """The same of `conv.conv_silu` in torch and `compose`."""
    raw, f, g = parts(x, sizes)
    qkv = raw if conv_weight is None else conv.conv_silu(raw, conv_weight, position)
    return compose(*unpack(qkv, sizes[:5]), f, g=g, **given)
