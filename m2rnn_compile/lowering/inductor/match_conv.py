# SPDX-License-Identifier: Apache-2.0
"""Recognise a causal depthwise convolution with SiLU, written as shifted multiply-adds, in front of a scan.

    padded = F.pad(x, (0, 0, past, 0))
    y = silu(padded[:, past : past + T] * w[:, -1] + padded[:, past - 1 : past - 1 + T] * w[:, -2] + ...)

with casts anywhere, in any order of terms; with packed sequences each shifted input stands in a
``torch.where((position >= j)[None, :, None], ..., 0)``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.fx import Node

from .nodes import arguments, label, name, operands, shape_of, uncast, unlike, value
from .obstacles import computes, obstacle, watched

ALL = slice(None, None, None)


@dataclasses.dataclass
class Conv:
    """y = `last` is the SiLU of the convolution of x [B, T, C] with weight [C, width]."""

    x: Node
    weight: Node
    position: Node | None
    last: Node


@dataclasses.dataclass
class _Term:
    x: Node
    lag: int
    position: Node | None
    weight: Node
    column: int


def _terms(n: Any) -> list[Any]:
    """The operands of a sum, however it is nested."""
    pair = operands(uncast(n), "add")
    return [n] if pair is None else _terms(pair[0]) + _terms(pair[1])


def _index(n: Any) -> tuple[Node, tuple[Any, ...]] | None:
    """(x, index) of x[index] with a tuple of plain entries."""
    if name(n) != "getitem" or len(n.args) != 2 or not isinstance(n.args[1], tuple) or not isinstance(n.args[0], Node):
        return None
    return n.args[0], n.args[1]


def _column(n: Any) -> tuple[Node, int] | None:
    """(weight [C, width], i) of weight[:, i]."""
    found = _index(uncast(n))
    if found is None or len(found[1]) != 2 or found[1][0] != ALL or not isinstance(found[1][1], int):
        return None
    weight, i = uncast(found[0]), found[1][1]
    shape = shape_of(weight)
    if shape is None or len(shape) != 2 or not isinstance(shape[1], int) or not -shape[1] <= i < shape[1]:
        return None
    return weight, i % shape[1]


def _masked(n: Node) -> tuple[Any, int | None, Node | None]:
    """(inside, j, position) of where((position >= j)[None, :, None], inside, 0); (n, None, None) of anything else."""
    if name(n) != "where" or len(n.args) != 3 or n.kwargs or n.args[2] != 0:
        return n, None, None
    mask = _index(n.args[0])
    pair = operands(mask[0], "ge") if mask is not None and mask[1] == (None, ALL, None) else None
    if pair is None or not isinstance(pair[0], Node) or not isinstance(pair[1], int):
        return n, None, None
    return n.args[1], pair[1], pair[0]


def _shift(n: Any) -> tuple[Node, int, Node | None] | None:
    """(x, lag, position) of x shifted by `lag` steps, zeros coming in."""
    n = uncast(n)
    if not isinstance(n, Node):
        return None
    inside, j, position = _masked(n)
    moved = uncast(inside)
    found = _index(moved)
    if found is None or len(found[1]) != 2 or found[1][0] != ALL or not isinstance(found[1][1], slice):
        return None
    padded, span = uncast(found[0]), found[1][1]
    if name(padded) not in ("pad", "constant_pad_nd") or span.step is not None:
        return None
    given = arguments(padded)
    x, amounts = given.pop("input", None), tuple(given.pop("pad", ()))
    constant = list(given.values())
    if len(amounts) != 4 or amounts[:2] != (0, 0) or amounts[3] != 0 or not isinstance(amounts[2], int):
        return None
    if any(c not in ("constant", None, 0) for c in constant) or not isinstance(x, Node):
        return None
    start = 0 if span.start is None else span.start
    # As many steps as x has: then the slice ends where it should.
    if not isinstance(start, int) or start < 0 or str(shape_of(moved)) != str(shape_of(x)):
        return None
    lag = amounts[2] - start
    if lag < 0 or (j is not None and j != lag):
        return None
    return x, lag, position


def _term(n: Any) -> _Term | None:
    pair = operands(uncast(n), "mul")
    if pair is None:
        return None
    for shifted, tap in (pair, pair[::-1]):
        found, column = _shift(shifted), _column(tap)
        if found is not None and column is not None:
            return _Term(*found, *column)
    return None


def match_conv(last: Any) -> Conv | str:
    """The convolution that ends in the SiLU `last`, or why there is none."""
    given = arguments(last) if name(last) == "silu" else {}
    x = given.pop("input", None)
    if not isinstance(last, Node) or x is None or any(given.values()):
        return f"q | k | v come from `{label(last) or getattr(last, 'op', '')}`, not from a SiLU"
    terms = [_term(n) for n in _terms(x)]
    found = [t for t in terms if t is not None]
    if not found or len(found) != len(terms):
        return "what SiLU is taken of is not a sum of shifted inputs of one padding, times a column of a weight each"
    a = found[0]
    shape = shape_of(a.weight)
    assert shape is not None
    width = shape[1]
    if any((t.x, t.weight, t.position) != (a.x, a.weight, a.position) for t in found):
        return "the terms of the convolution read different inputs, weights or positions"
    if sorted(t.lag for t in found) != list(range(width)) or any(t.column != width - 1 - t.lag for t in found):
        return "the terms of the convolution are not one for each tap, the last tap on the current step"
    if shape_of(last) != shape_of(a.x) or value(last).dtype != value(a.x).dtype:
        return "the convolution's result has another dtype than its input"
    for title, tensor in (("input", a.x), ("weight", a.weight)):
        why = unlike(tensor, value(a.x))
        if why is not None:
            return f"the convolution's {title} {why}"
    inputs = [n for n in (a.x, a.weight, a.position) if n is not None]
    own = computes(last, inputs)
    why = obstacle(own, last) or watched(own - {last})
    return f"the convolution: {why}" if why is not None else Conv(a.x, a.weight, a.position, last)
