# SPDX-License-Identifier: Apache-2.0
"""Packed documents as transformers tells of them: `cu_seq_lens_q`, `position_ids` that start again, `seq_idx`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.validation import check_cu_seqlens_values

_WAY_OUT = "; see transformers.DataCollatorWithFlattening"


def document_bounds(input_ids: Tensor, real: Tensor | None, cached: bool, options: dict[str, Any]) -> Tensor | None:
    """Where documents begin and end, as `cu_seqlens` ``[S + 1]``; None for a single one, or rows of one each.

    Under torch.compile, `cu_seq_lens_q` is taken without looking at its values; positions break the graph.

    Args:
        input_ids: ``[B, T]``.
        real: bool ``[B, T]``, False on padding, whose positions mean nothing; None without any.
        cached: whether the tokens go on from a cache, which packed documents cannot.
        options: what the model's forward was given besides.

    Raises:
        ValueError: what is given is not consistent, or documents are packed where they cannot be.
    """
    told = {n: options[n] for n in ("cu_seq_lens_q", "cu_seq_lens_k") if options.get(n) is not None}
    if told and torch.compiler.is_compiling():
        return next(iter(told.values())).to(input_ids.device)
    if not told and options.get("position_ids") is None and options.get("seq_idx") is None:
        return None
    return _read(input_ids, real, cached, told, options)


@torch.compiler.disable
def _read(
    input_ids: Tensor, real: Tensor | None, cached: bool, told: dict[str, Tensor], options: dict[str, Any]
) -> Tensor | None:
    B, T = input_ids.shape
    found: dict[str, list[list[int]]] = {}  # by argument: the first tokens of the documents of each row
    for name, cu_seqlens in told.items():
        if B != 1:
            raise ValueError(f"`{name}` is of documents packed into one row, but `input_ids` have {B} rows{_WAY_OUT}")
        bounds = check_cu_seqlens_values(cu_seqlens, T)
        found[name] = [sorted(set(bounds) - {T})]
    for name in ("position_ids", "seq_idx"):
        if options.get(name) is not None:
            found[name] = _starts(name, _rows(name, options[name], B, T), real)
    first, *others = found
    for name in others:
        if found[name] != found[first]:
            raise ValueError(
                f"`{first}` and `{name}` do not tell of the same documents: by the former they start at tokens "
                f"{found[first]}, by the latter at {found[name]}; give one of them{_WAY_OUT}"
            )
    starts = found[first]
    if all(len(row) < 2 for row in starts):
        return None
    if B != 1 or cached or (real is not None and not bool(real.all())):
        fault = f"{B} rows" if B != 1 else "a cache" if cached else "padding"
        raise ValueError(
            f"`{first}` packs documents, which start at tokens {starts}, and there is {fault}: packed documents need "
            f"one row, no padding and no cache{_WAY_OUT}"
        )
    return torch.tensor([*starts[0], T], dtype=torch.int32, device=input_ids.device)


def _rows(name: str, x: Tensor, B: int, T: int) -> Tensor:
    if x.dim() not in (1, 2) or x.shape[-1] < T or (x.dim() == 2 and x.shape[0] not in (1, B)):
        raise ValueError(f"`{name}` must have shape [{B}, {T}], [1, {T}] or [{T}], got {list(x.shape)}")
    return x[..., -T:].expand(B, T)  # more, where `generate` passes those of the past too


def _starts(name: str, x_BT: Tensor, real: Tensor | None) -> list[list[int]]:
    before, after = x_BT[:, :-1], x_BT[:, 1:]
    new = after != before if name == "seq_idx" else after != before + 1
    if real is not None:
        new = new & real[:, :-1] & real[:, 1:]
    elif name == "position_ids" and bool((new & (after != x_BT[:, :1])).any()):
        raise ValueError(
            "`position_ids` must count up by one and start again where a document does, as in [0, 1, 2, 0, 1], got "
            f"{x_BT.tolist() if x_BT.numel() <= 64 else 'others'}{_WAY_OUT}"
        )
    return [[0, *(row.nonzero()[:, 0] + 1).tolist()] for row in new.cpu()]
