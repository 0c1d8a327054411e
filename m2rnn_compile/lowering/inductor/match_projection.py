# SPDX-License-Identifier: Apache-2.0
"""Recognise that q | k | v, the forget gate's input and g are columns of one tensor x, and of nothing else's.

    qkv, x_f, g = F.linear(...).split([...], -1)        or slices [..., a:b]

Then one op can take x, and its backward gives the gradient of x in one piece.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.fx import Node

from . import obstacles
from .match import Match
from .match_conv import Conv
from .nodes import arguments, is_view, name, only_user, operand, scan_arguments, shape_of, users, value

ALL = slice(None, None, None)


@dataclasses.dataclass(frozen=True)
class Projection:
    """x [B, T, P], and the op's `sizes`: [Nq, Nk, Nv, K, V, Nf, Ng, first column of q | k | v, of x_f, of g]."""

    x: Node
    sizes: list[int]


@dataclasses.dataclass(frozen=True)
class _Columns:
    x: Node
    first: Any
    width: Any


def _columns(n: Any) -> _Columns | None:
    """Which columns of which tensor [B, T, P] n is."""
    if name(n) != "getitem" or len(n.args) != 2:
        return None
    source, index = n.args
    if name(source) in ("split", "split_with_sizes"):
        given = arguments(source)
        x, sizes, dim = given.get("input"), given.get("split_sizes", given.get("split_size")), given.get("dim", 0)
        shape = shape_of(x)
        if not isinstance(x, Node) or shape is None or len(shape) != 3 or dim not in (-1, 2):
            return None
        if isinstance(sizes, int):
            return _Columns(x, index * sizes, (shape_of(n) or (None,))[-1])
        return _Columns(x, sum(sizes[:index]), sizes[index]) if isinstance(sizes, (list, tuple)) else None
    shape, own = shape_of(source), shape_of(n)
    if shape is None or own is None or len(shape) != 3 or not isinstance(index, tuple) or len(own) != 3:
        return None
    *before, last = index
    if before not in ([Ellipsis], [ALL, ALL]) or not isinstance(last, slice) or last.step is not None:
        return None
    first = 0 if last.start is None else last.start
    return _Columns(source, first if isinstance(first, int) and first >= 0 else None, own[2])


def _readers(columns: list[Node]) -> set[Node]:
    """The columns themselves and the splits that they are of."""
    splits = {n.args[0] for n in columns if name(n.args[0]) in ("split", "split_with_sizes")}
    return {*columns, *(n for n in splits if isinstance(n, Node))}


def match_projection(m: Match, conv: Conv | None) -> Projection | str:
    """Of what everything in `m` is made, or why not of one tensor. `conv` stands in front of `m.qkv`, if given."""
    given, qkv = scan_arguments(m.scan), m.qkv if conv is None else conv.x
    assert qkv is not None
    if m.last is None:
        return "nothing follows the scan"
    if conv is not None:
        reason = obstacles.obstacle({conv.last}, m.last)
        if only_user(m.qkv) is None or reason is not None:
            return reason or "the convolution's result has other uses"
    g: Any = m.g
    while g is not None and is_view(g):
        if len(users(g)) > 1:
            return "g has other uses"
        g = operand(g)
    pieces: list[Any] = [qkv, given.f if m.x_f is None else m.x_f, *([] if g is None else [g])]
    found = [_columns(n) for n in pieces]
    if any(c is None or c.x is not (found[0] and found[0].x) for c in found):
        return "q | k | v, f and g are not columns of one tensor"
    columns = [c for c in found if c is not None]
    x = columns[0].x
    q, k, v = (value(n) for n in given[:3])
    g_heads = 0 if g is None else columns[2].width // v.shape[3]
    at_g = 0 if g is None else columns[2].first
    sizes = [
        q.shape[2], k.shape[2], v.shape[2], q.shape[3], v.shape[3], columns[1].width, g_heads,
        columns[0].first, columns[1].first, at_g,
    ]  # fmt: skip
    if not all(type(n) is int for n in sizes):
        return "its columns are not constants of the graph"
    spans = sorted((c.first, c.first + c.width) for c in columns)
    if any(start < end for (_, end), (start, _) in zip(spans, spans[1:], strict=False)):
        return f"parts of `{x.name}` overlap"
    if value(x).dtype != value(m.scan)[0].dtype:
        return f"autocast rounds q, k and v to {value(m.scan)[0].dtype}; the op would round f and g too"
    readers = _readers(pieces)
    own = obstacles.computes(conv.last, [conv.x]) if conv is not None else set()
    for piece in pieces:
        allowed = own if piece is qkv and conv is not None else users(piece)[:1]
        if any(user not in allowed for user in users(piece)):
            return f"`{piece.name}` has other uses"
    for reader in readers:
        if any(user not in readers and users(user) for user in users(reader) if reader not in pieces):
            return f"other columns of `{x.name}` are used too"
    if any(user not in readers for user in users(x)):
        return f"`{x.name}` has other uses"
    reason = obstacles.obstacle(_from(x, m, conv), m.last) or obstacles.written_later([x], m.last)
    return Projection(x, sizes) if reason is None else reason


def _from(x: Node, m: Match, conv: Conv | None) -> set[Node]:
    """What makes `m.last` of x: the cutting too, for a part that is cut without a gradient has none."""
    assert m.last is not None
    given = scan_arguments(m.scan)
    others = [given.W, given.initial_state, given.cu_seqlens, m.A_log, m.dt_bias, m.D, m.norm_weight]
    if conv is not None:
        others += [conv.weight, conv.position]
    return obstacles.computes(m.last, [x, *(n for n in others if n is not None)])
