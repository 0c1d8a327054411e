# SPDX-License-Identifier: Apache-2.0
"""Find what stands around a scan in an FX graph of torch calls (Dynamo's, before autograd) or of aten ops.

Walks from the scan along its single user, part by part, and stops at the first thing it does not know: what was
recognised up to there can move into the op, the rest stays as it is. Casts on the way are absorbed (the fused op works
in fp32 and rounds once), views between [B, T, N, V] and [B, T, N·V] too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from . import obstacles
from .nodes import (
    arguments,
    cast_after,
    is_number,
    is_view,
    label,
    name,
    only_user,
    operand,
    operands,
    other,
    same,
    scan_arguments,
    shape_of,
    uncast,
    unlike,
    users,
    value,
)


@dataclasses.dataclass
class Match:
    """What can move into the op. `last` is the node that the op's output o takes the place of."""

    scan: Node
    last: Node | None = None
    forget: str = "none"
    x_f: Node | None = None
    A_log: Node | None = None
    dt_bias: Node | None = None
    D: Node | None = None
    g: Node | None = None
    activation: str = "silu"
    norm: str = "none"
    norm_weight: Node | None = None
    norm_eps: float | Node = 1e-5  # a node where Dynamo made an input of the module's attribute
    qkv: Node | None = None  # of which q, k and v are consecutive slices
    stopped: str = ""  # why the tail ends where it does
    prologue_stopped: str = ""

    def tail_parts(self) -> list[str]:
        names = {"silu": "SiLU(g)", "sigmoid": "sigmoid(g)", "gelu": "GELU(g)", "gelu_tanh": "GELU(g)"}
        parts = ["D ⊙ v"] if self.D is not None else []
        parts += [names[self.activation]] if self.g is not None else []
        return parts + {"none": [], "all": ["RMSNorm over N·V"], "head": ["RMSNorm per head"]}[self.norm]

    def prologue_parts(self) -> list[str]:
        return {"none": [], "decay": ["decay gate"], "sigmoid": ["sigmoid forget gate"]}[self.forget]

    def extra_inputs(self) -> list[Node]:
        fields = (self.x_f, self.A_log, self.dt_bias, self.D, self.g, self.norm_weight, self.norm_eps)
        return [x for x in fields if isinstance(x, Node)]

    def without_prologue(self, why: str) -> Match:
        return dataclasses.replace(self, forget="none", x_f=None, A_log=None, dt_bias=None, prologue_stopped=why)

    def absorbed(self) -> set[Node]:
        """The nodes whose work the op does: from its own inputs to `last`."""
        assert self.last is not None
        q, k, v, f, W, initial_state, cu_seqlens, *_ = scan_arguments(self.scan)
        extra: set[Node] = set()
        inputs = {W, initial_state, cu_seqlens, *self.extra_inputs()}
        inputs |= {f} if self.x_f is None else set()
        if self.qkv is not None:
            inputs |= {self.qkv}
        elif self.D is None:
            inputs |= {q, k, v}
        else:  # v may have been recognised below casts and views, of which D ⊙ v has its own
            extra, root = obstacles.same_views(v)
            inputs |= {q, k, root}
        return extra | obstacles.computes(self.last, [x for x in inputs if x is not None])

    def obstacle(self) -> str | None:
        """Why the nodes may not change places, or None."""
        assert self.last is not None
        if obstacles.depends_on(self.extra_inputs(), self.scan):
            return "what it would take in depends on the scan's own result"
        absorbed = self.absorbed()
        reason = obstacles.obstacle(absorbed, self.last) or obstacles.watched(absorbed - {self.last})
        if reason is None and obstacles.needs_gradient(self.last):
            reason = obstacles.written_later(self.extra_inputs(), self.last)
        if reason is None and scan_arguments(self.scan).chunk == 0 and obstacles.needs_gradient(self.last):
            reason = "the scan keeps nothing for a backward (its own inputs need no gradient), and this needs one"
        return reason


# ---- small parts -----------------------------------------------------------------------------------------------------


def _unrepeat(n: Any, N: int) -> Any:
    """x of `x.repeat_interleave(r, -2)` that gives N heads, as heads are shared; else n itself."""
    given = arguments(n) if name(n) == "repeat_interleave" else {}
    if given.keys() != {"input", "repeats", "dim"} or not isinstance(given["repeats"], int):
        return n
    shape = shape_of(given["input"])
    if shape is None or len(shape) != 4 or given["dim"] not in (2, -2) or shape[2] * given["repeats"] != N:
        return n
    return given["input"]


def _of(n: Any, function: str) -> Any:
    """x of function(x) with nothing else given; else None."""
    given = arguments(n) if name(n) == function else {}
    return given["input"] if given.keys() == {"input"} else None


# ---- the forget gate ------------------------------------------------------------------------------------------------


def _factors(n: Any) -> tuple[int, list[Any]]:
    """(sign, factors) of a product with negations anywhere in it."""
    n = uncast(n)
    if name(n) in ("neg", "negative"):
        sign, factors = _factors(operand(n))
        return -sign, factors
    pair = operands(n, "mul")
    if pair is not None:
        (s, a), (t, b) = (_factors(x) for x in pair)
        return s * t, a + b
    if isinstance(n, (int, float)) and abs(n) == 1:
        return int(n), []
    return 1, [n]


def match_prologue(m: Match) -> None:
    inputs = scan_arguments(m.scan)
    f, v = uncast(inputs.f), inputs.v
    found = _forget_gate(f)
    if found is None:
        m.prologue_stopped = f"f comes from `{label(f) or f.op}`"
        return
    m.forget, m.x_f, m.A_log, m.dt_bias = found
    for title, x in (("what it is of", m.x_f), ("A_log", m.A_log), ("dt_bias", m.dt_bias)):
        why = None if x is None else unlike(x, value(v))
        if why is not None:
            m.forget, m.x_f, m.A_log, m.dt_bias = "none", None, None, None
            m.prologue_stopped = f"{title} {why}"
            return


def _forget_gate(f: Node) -> tuple[str, Node, Node | None, Node | None] | None:
    """(forget, x_f, A_log, dt_bias) of f."""
    shape = shape_of(f)
    x = _of(f, "sigmoid")
    if isinstance(x, Node):
        return "sigmoid", uncast(x), None, None
    sign, factors = _factors(_of(f, "exp"))
    if sign != -1 or len(factors) != 2 or shape is None:
        return None
    for rate, dt in (factors, factors[::-1]):
        A_log, pair = uncast(_of(rate, "exp")), operands(uncast(_of(dt, "softplus")), "add")
        for x, bias in () if pair is None else (pair, pair[::-1]):
            x, bias = uncast(x), uncast(bias)
            if shape_of(x) == shape and shape_of(bias) == shape_of(A_log) == shape[-1:]:
                return "decay", x, A_log, bias
    return None


# ---- q | k | v ------------------------------------------------------------------------------------------------------


def match_packed(m: Match) -> None:
    """q, k, v that are the three parts of one tensor [B, T, C], in this order, and of nothing else."""
    parts: list[Node] = []
    heads = scan_arguments(m.scan)[:3]
    for x in heads:
        part: Any = operand(x) if is_view(x) else None
        if name(part) != "getitem" or name(part.args[0]) not in ("split", "split_with_sizes"):
            return
        parts.append(part)
    source: Any = parts[0].args[0]
    qkv = operand(source)
    shape = shape_of(qkv)
    if any(p.args != (source, i) for i, p in enumerate(parts)) or shape is None or len(shape) != 3:
        return
    if any((shape_of(x) or ())[:2] != shape[:2] for x in heads):  # the views moved steps between sequences
        return
    widths = [shape_of(p) for p in parts]
    if all(w is not None and len(w) == 3 for w in widths) and sum(w[2] for w in widths if w) == shape[2]:
        m.qkv = qkv


# ---- the tail -------------------------------------------------------------------------------------------------------


class _Tail:
    """A walk from y on. `at` is the last node that is understood, `flat` whether it is [B, T, N·V]."""

    def __init__(self, m: Match, y: Node) -> None:
        self.m, self.at, self.flat, self.why = m, y, False, ""
        self.v: Tensor = value(scan_arguments(m.scan).v)
        shape = shape_of(y)
        assert shape is not None
        self.B, self.T, self.N, self.V = shape

    def forms(self) -> Iterator[tuple[Node, bool]]:
        """The value in hand in each form that it takes: itself, then through casts and views with a single user."""
        at, flat = self.at, self.flat
        yield at, flat
        while (user := only_user(at)) is not None:
            if cast_after(at) is user:
                at = user
            elif is_view(user) and operand(user) is at and self._layout(user) is not None:
                at, flat = user, bool(self._layout(user))
            else:
                return
            yield at, flat

    def _layout(self, n: Node) -> bool | None:
        """True for [B, T, N·V], False for [B, T, N, V], None for anything else."""
        shape = shape_of(n)
        if shape is None or shape[:2] != (self.B, self.T):
            return None
        return {(self.N * self.V,): True, (self.N, self.V): False}.get(shape[2:])

    def run(self) -> None:
        """Each part at most once, in the op's order."""
        for part in (self.add_D, self.multiply_gate, self.norm):
            for at, flat in list(self.forms()):
                if part(at, flat):
                    self._absorb_casts()
                    break
        *_, (end, _) = self.forms()
        following = users(end)
        if self.why:
            self.m.stopped = self.why
        elif len(following) == 1:
            self.m.stopped = f"`{label(following[0]) or following[0].op}` follows"
        elif self.m.last is None:
            self.m.stopped = f"y is used {len(following)} times"

    def _take(self, n: Node, flat: bool) -> None:
        self.at, self.flat, self.m.last = n, flat, n

    def _absorb_casts(self) -> None:
        """A cast that follows joins the op, unless it makes the result larger: that is the next kernel's to do."""
        while (cast := cast_after(self.at)) is not None and value(cast).itemsize <= value(self.at).itemsize:
            self._take(cast, self.flat)

    def _refuse(self, title: str, x: Any) -> bool:
        """Whether the op could not take x; the reason is noted."""
        why = unlike(x, self.v)
        if why is not None:
            self.why = f"{title} {why}"
        return why is not None

    # -- parts: true if the node after `at` is it; then `self.at` stands behind it

    def add_D(self, at: Node, flat: bool) -> bool:
        user = only_user(at)
        pair = operands(uncast(other(user, at, "add")), "mul")
        if user is None or pair is None or self._layout(user) is not flat:
            return False
        for D, v in (pair, pair[::-1]):
            D, v = uncast(D), uncast(v)
            shape = shape_of(D)
            if self._is_v(v, flat) and shape is not None and self._fits_features(shape, flat):
                if self._refuse("D", D):
                    return False
                self.m.D = D
                self._take(user, flat)
                return True
        return False

    def _is_v(self, v: Any, flat: bool) -> bool:
        if flat:
            v = operand(v) if is_view(v) else v
        return same(uncast(_unrepeat(v, self.N)), uncast(scan_arguments(self.m.scan).v))

    def _fits_features(self, shape: tuple[Any, ...], flat: bool) -> bool:
        """A parameter that broadcasts over B and T and has, for each head and column, one value."""
        own = (self.N * self.V,) if flat else (self.N, self.V)
        lead, tail = shape[: max(0, len(shape) - len(own))], shape[-len(own) :] if shape else ()
        if any(size != 1 for size in lead):
            return False
        if flat:
            return tail == own
        return all(size in (1, full) for size, full in zip(tail, own[len(own) - len(tail) :], strict=True))

    def multiply_gate(self, at: Node, flat: bool) -> bool:
        user = only_user(at)
        gate = other(user, at, "mul")
        if user is None or gate is None or self._layout(user) is not flat or shape_of(gate) != shape_of(at):
            return False
        found = self._activation(gate)
        if found is None:
            return False
        activation, g = found
        g = uncast(g)
        if self._layout(g) is None or self._refuse("g", _unrepeat(g, self.N)):
            return False
        self.m.activation, self.m.g = activation, _unrepeat(g, self.N)
        self._take(user, flat)
        return True

    def _activation(self, gate: Any) -> tuple[str, Node] | None:
        """(name, g) from below casts, views and the repetition of shared heads."""
        gate = uncast(gate)
        while is_view(gate) and self._layout(operand(gate)) is not None:
            gate = uncast(operand(gate))
        kind, given = name(gate), arguments(gate) if isinstance(gate, Node) else {}
        g = given.pop("input", None)
        if kind in ("silu", "sigmoid") and isinstance(g, Node):
            return None if any(given.values()) else (kind, g)  # inplace=True
        if kind == "gelu" and isinstance(g, Node):
            approximate = given.pop("approximate", "none")
            return None if given else ("gelu_tanh" if approximate == "tanh" else "gelu", g)
        pair = operands(gate, "mul")  # x · sigmoid(x)
        for x, s in () if pair is None else (pair, pair[::-1]):
            if isinstance(x, Node) and uncast(_of(uncast(s), "sigmoid")) is uncast(x):
                return "silu", x
        return None

    def norm(self, at: Node, flat: bool) -> bool:
        found = self._rms_norm_call(at) or self._rms_norm_by_hand(at)
        if found is None:
            return False
        end, size, weight, eps = found
        x = value(end)
        if not isinstance(x, Tensor) or self._layout(end) is None or not is_number(eps):
            return False
        if size == (self.V,) and not flat:
            kind = "head"
        elif size == ((self.N * self.V,) if flat else (self.N, self.V)):
            kind = "all"
        else:
            return False
        if weight is not None:
            shape = shape_of(weight)
            if shape is None or math.prod(shape) != math.prod(size) or self._refuse("the norm's weight", weight):
                return False
        self.m.norm, self.m.norm_weight = kind, weight
        self.m.norm_eps = eps if isinstance(eps, Node) else float(eps)
        self._take(end, flat)
        return True

    def _rms_norm_call(self, at: Node) -> tuple[Node, tuple[Any, ...], Node | None, float | Node] | None:
        user = only_user(at)
        given = arguments(user) if user is not None and name(user) == "rms_norm" else {}
        if user is None or given.get("input") is not at:
            return None
        eps = given.get("eps")
        if eps is None:  # the documentation says at.dtype's; what is added is that of the dtype torch computes in
            eps = torch.finfo(torch.promote_types(value(at).dtype, torch.float32)).eps
        return user, tuple(given["normalized_shape"]), given.get("weight"), eps

    def _rms_norm_by_hand(self, at: Node) -> tuple[Node, tuple[Any, ...], Node | None, float | Node] | None:
        """x · rsqrt(mean(x², dims) + eps) [· weight], x in one dtype or two."""
        squares = [u for u in users(at) if self._is_square(u, at)]
        if len(squares) != 1:
            return None
        mean = only_user(squares[0])
        dims = self._mean_dims(mean)
        eps_node = only_user(mean)
        eps: Any = None if mean is None else other(eps_node, mean, "add")
        rsqrt = only_user(eps_node)
        if dims is None or not is_number(eps) or rsqrt is None or _of(rsqrt, "rsqrt") is not eps_node:
            return None
        scaled = only_user(rsqrt)
        x = uncast(other(scaled, rsqrt, "mul"))
        if scaled is None or x is not uncast(at) or not set(users(at)) <= {squares[0], scaled}:
            return None
        end: Node = scaled
        weight: Node | None = None
        shape = shape_of(at) or ()
        size = tuple(shape[d] for d in sorted(d % len(shape) for d in dims))
        if tuple(shape[len(shape) - len(size) :]) != size:
            return None
        for candidate in self._through_casts(scaled):
            following = only_user(candidate)
            w = uncast(other(following, candidate, "mul"))
            w_shape = shape_of(w)
            if following is not None and w_shape is not None and w_shape == size:
                end, weight = following, w
                break
        return end, size, weight, eps

    @staticmethod
    def _is_square(n: Node, x: Node) -> bool:
        given = arguments(n)
        if name(n) == "pow":
            return given.get("input") is x and given.get("exponent") == 2
        return _of(n, "square") is x or operands(n, "mul") == (x, x)

    @staticmethod
    def _mean_dims(n: Node | None) -> tuple[int, ...] | None:
        """The dimensions of a mean that keeps them."""
        given = arguments(n) if n is not None and name(n) == "mean" else {}
        if not given.keys() <= {"input", "dim", "keepdim", "dtype"} or not given.get("keepdim"):
            return None
        if given.get("dtype") not in (None, torch.float32):
            return None
        dim = given.get("dim")
        return (dim,) if isinstance(dim, int) else tuple(dim) if isinstance(dim, (list, tuple)) else None

    @staticmethod
    def _through_casts(n: Node) -> Iterator[Node]:
        at: Node | None = n
        while at is not None:
            yield at
            at = cast_after(at)


def match(scan: Node) -> Match:
    """Everything around one scan that could move into the op. `last` is None where nothing follows that could."""
    m = Match(scan)
    match_prologue(m)
    match_packed(m)
    outputs = [u.args[1] if name(u) == "getitem" else None for u in scan.users]
    if any(i not in (0, 1, 2) for i in outputs):
        m.stopped = "the scan's results are used as a tuple"
        return m
    if outputs.count(0) != 1:
        m.stopped = f"y is used {outputs.count(0)} times" if 0 in outputs else "y is not used"
        return m
    y = list(scan.users)[outputs.index(0)]
    shape = shape_of(y)
    if shape is None or not all(isinstance(size, int) for size in shape[2:]):
        m.stopped = "the number of heads or of columns is not a constant of the graph"
        return m
    _Tail(m, y).run()
    return m
