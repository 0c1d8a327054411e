# SPDX-License-Identifier: Apache-2.0
"""Find what stands around a scan in an FX graph of torch calls (Dynamo's, before autograd) or of aten ops.

Walks from the scan along its single user, part by part, and stops at the first thing it does not know: what was
recognised up to there can move into the op, the rest stays as it is. Casts on the way are absorbed (the fused op works
in fp32 and rounds once), views between [B, T, N, V] and [B, T, N·V] too.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...ops.library import DTYPES

SCAN = torch.ops.m2rnn.scan.default
CASTS = ("to", "_to_copy", "float", "half", "bfloat16", "type_as", "convert_element_type")
VIEWS = ("flatten", "unflatten", "reshape", "view", "_unsafe_view")


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


# ---- reading one node -----------------------------------------------------------------------------------------------


def name(n: Any) -> str:
    """The operation's bare name, whether it is a method, a torch function, an operator or an aten overload."""
    if not isinstance(n, Node):
        return ""
    if n.op == "call_method":
        return str(n.target)
    if n.op != "call_function":
        return ""
    if isinstance(n.target, torch._ops.OpOverload):
        return str(n.target._schema.name.split("::")[-1])
    return str(getattr(n.target, "__name__", ""))


def value(n: Node) -> Any:
    """The fake tensor that tracing left: Dynamo calls it example_value, export val."""
    return n.meta.get("example_value", n.meta.get("val"))


def _shape(n: Any) -> tuple[Any, ...] | None:
    x = value(n) if isinstance(n, Node) else None
    return tuple(x.shape) if isinstance(x, Tensor) else None


def _is_cast(n: Any) -> bool:
    """Between float dtypes that the ops know, on one device. A rounding to eight bits is meant, and stays."""
    if name(n) not in CASTS or not n.args or not isinstance(n.args[0], Node):
        return False
    before, after = value(n.args[0]), value(n)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    floats = before.dtype in DTYPES.values() and after.dtype in DTYPES.values()
    narrows_fp64 = before.dtype != after.dtype and torch.float64 in (before.dtype, after.dtype)
    return floats and not narrows_fp64 and before.device == after.device


def uncast(n: Any) -> Any:
    while _is_cast(n):
        n = n.args[0]
    return n


def _plain_args(n: Node, count: int) -> bool:
    return len(n.args) == count and not n.kwargs


def _operands(n: Any, *names: str) -> tuple[Any, Any] | None:
    """The two operands of a binary operation of one of these names, without alpha and the like."""
    return (n.args[0], n.args[1]) if name(n) in names and _plain_args(n, 2) else None


def _other(n: Any, x: Node, *names: str) -> Any:
    """The operand of `n` beside x, if n is such an operation on x."""
    pair = _operands(n, *names)
    if pair is None or (pair[0] is x) == (pair[1] is x):
        return None
    return pair[1] if pair[0] is x else pair[0]


def _same(a: Any, b: Any) -> bool:
    """The same tensor: one node, or the same views of the same."""
    if a is b:
        return True
    if not (isinstance(a, Node) and isinstance(b, Node)) or name(a) not in VIEWS or name(a) != name(b):
        return False
    rest = a.args[1:] == b.args[1:] and a.kwargs == b.kwargs
    return rest and _same(a.args[0], b.args[0])


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) or (isinstance(x, Node) and isinstance(value(x), (float, torch.SymFloat)))


def _unrepeat(n: Any, N: int) -> Any:
    """x of `x.repeat_interleave(r, -2)` that gives N heads, as heads are shared; else n itself."""
    if name(n) != "repeat_interleave" or n.kwargs or len(n.args) != 3 or not isinstance(n.args[1], int):
        return n
    shape = _shape(n.args[0])
    if shape is None or len(shape) != 4 or n.args[2] not in (2, -2) or shape[2] * n.args[1] != N:
        return n
    return n.args[0]


# ---- the forget gate ------------------------------------------------------------------------------------------------


def _factors(n: Any) -> tuple[int, list[Any]]:
    """(sign, factors) of a product with negations anywhere in it."""
    n = uncast(n)
    if name(n) in ("neg", "negative"):
        sign, factors = _factors(n.args[0])
        return -sign, factors
    pair = _operands(n, "mul")
    if pair is not None:
        (s, a), (t, b) = (_factors(x) for x in pair)
        return s * t, a + b
    if isinstance(n, (int, float)) and abs(n) == 1:
        return int(n), []
    return 1, [n]


def match_prologue(m: Match) -> None:
    f = uncast(m.scan.args[3])
    if not isinstance(f, Node):
        return
    shape = _shape(f)
    if name(f) == "sigmoid" and isinstance(f.args[0], Node):
        m.forget, m.x_f = "sigmoid", uncast(f.args[0])
        return
    m.prologue_stopped = f"f comes from `{name(f) or f.op}`"
    if name(f) != "exp":
        return
    sign, factors = _factors(f.args[0])
    if sign != -1 or len(factors) != 2:
        return
    for rate, dt in (factors, factors[::-1]):
        pair = _operands(uncast(dt.args[0]), "add") if name(dt) == "softplus" and _plain_args(dt, 1) else None
        if name(rate) != "exp" or pair is None or shape is None:
            continue
        A_log = uncast(rate.args[0])
        for x, bias in (pair, pair[::-1]):
            x, bias = uncast(x), uncast(bias)
            if _shape(x) == shape and _shape(bias) == _shape(A_log) == shape[-1:]:
                m.forget, m.x_f, m.A_log, m.dt_bias, m.prologue_stopped = "decay", x, A_log, bias, ""
                return


# ---- q | k | v ------------------------------------------------------------------------------------------------------


def match_packed(m: Match) -> None:
    """q, k, v that are the three parts of one tensor [B, T, C], in this order, and of nothing else."""
    parts = []
    for x in m.scan.args[:3]:
        if name(x) not in VIEWS:
            return
        x = x.args[0]
        if name(x) != "getitem" or name(x.args[0]) not in ("split", "split_with_sizes"):
            return
        parts.append(x)
    source = parts[0].args[0]
    shape = _shape(source.args[0])
    if any(p.args != (source, i) for i, p in enumerate(parts)) or shape is None or len(shape) != 3:
        return
    widths = [_shape(p) for p in parts]
    if all(w is not None and len(w) == 3 for w in widths) and sum(w[2] for w in widths if w) == shape[2]:
        m.qkv = source.args[0]


# ---- the tail -------------------------------------------------------------------------------------------------------


class _Tail:
    """A walk from y on. `at` is the last node that is understood, `flat` whether it is [B, T, N·V]."""

    def __init__(self, m: Match, y: Node) -> None:
        self.m, self.at, self.flat = m, y, False
        shape = _shape(y)
        assert shape is not None
        self.B, self.T, self.N, self.V = shape

    def forms(self) -> Iterator[tuple[Node, bool]]:
        """The value in hand in each form that it takes: itself, then through casts and views with a single user."""
        at, flat = self.at, self.flat
        yield at, flat
        while len(at.users) == 1:
            (user,) = at.users
            if _is_cast(user):
                at = user
            elif name(user) in VIEWS and user.args and user.args[0] is at and self._layout(user) is not None:
                at, flat = user, bool(self._layout(user))
            else:
                return
            yield at, flat

    def _layout(self, n: Node) -> bool | None:
        """True for [B, T, N·V], False for [B, T, N, V], None for anything else."""
        shape = _shape(n)
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
        users = list(self.at.users)
        if self.m.last is None and len(users) != 1:
            self.m.stopped = f"y is used {len(users)} times"
        elif len(users) == 1:
            self.m.stopped = f"`{name(users[0]) or users[0].op}` follows"

    def _take(self, n: Node, flat: bool) -> None:
        self.at, self.flat, self.m.last = n, flat, n

    def _absorb_casts(self) -> None:
        """A cast that follows joins the op, unless it makes the result larger: that is the next kernel's to do."""
        user = self._only_user(self.at)
        while user is not None and _is_cast(user) and value(user).itemsize <= value(self.at).itemsize:
            self._take(user, self.flat)
            user = self._only_user(user)

    # -- parts: true if the node after `at` is it; then `self.at` stands behind it

    def add_D(self, at: Node, flat: bool) -> bool:
        if len(at.users) != 1:
            return False
        (user,) = at.users
        pair = _operands(uncast(_other(user, at, "add")), "mul")
        if pair is None or self._layout(user) is not flat:
            return False
        for D, v in (pair, pair[::-1]):
            D, v = uncast(D), uncast(v)
            shape = _shape(D)
            if self._is_v(v, flat) and shape is not None and self._fits_features(shape, flat):
                self.m.D = D
                self._take(user, flat)
                return True
        return False

    def _is_v(self, v: Any, flat: bool) -> bool:
        if flat:
            v = v.args[0] if name(v) in VIEWS and v.args else v
        return _same(uncast(_unrepeat(v, self.N)), uncast(self.m.scan.args[2]))

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
        if len(at.users) != 1:
            return False
        (user,) = at.users
        gate = _other(user, at, "mul")
        if gate is None or self._layout(user) is not flat or _shape(gate) != _shape(at):
            return False
        found = self._activation(gate)
        if found is None:
            return False
        activation, g = found
        g = uncast(g)
        layout = self._layout(g)
        heads = _unrepeat(g, self.N)
        if layout is None:
            return False
        self.m.activation, self.m.g = activation, heads
        self._take(user, flat)
        return True

    def _activation(self, gate: Any) -> tuple[str, Node] | None:
        """(name, g) from below casts, views and the repetition of shared heads."""
        gate = uncast(gate)
        while name(gate) in VIEWS and isinstance(gate.args[0], Node) and self._layout(gate.args[0]) is not None:
            gate = uncast(gate.args[0])
        if not isinstance(gate, Node) or not gate.args or not isinstance(gate.args[0], Node):
            return None
        kind = name(gate)
        if kind in ("silu", "sigmoid"):
            others = [*gate.args[1:], *gate.kwargs.values()]
            return None if any(others) else (kind, gate.args[0])  # inplace=True
        if kind == "gelu":
            approximate = gate.kwargs.get("approximate", gate.args[1] if len(gate.args) > 1 else "none")
            return ("gelu_tanh" if approximate == "tanh" else "gelu"), gate.args[0]
        pair = _operands(gate, "mul")  # x · sigmoid(x)
        if pair is not None:
            for x, s in (pair, pair[::-1]):
                if name(uncast(s)) == "sigmoid" and uncast(uncast(s).args[0]) is uncast(x) and isinstance(x, Node):
                    return "silu", x
        return None

    def norm(self, at: Node, flat: bool) -> bool:
        found = self._rms_norm_call(at) or self._rms_norm_by_hand(at)
        if found is None:
            return False
        end, size, weight, eps = found
        x = value(end)
        if not isinstance(x, Tensor) or self._layout(end) is None or not _is_number(eps):
            return False
        if size == (self.V,) and not flat:
            kind = "head"
        elif size == ((self.N * self.V,) if flat else (self.N, self.V)):
            kind = "all"
        else:
            return False
        if weight is not None and (_shape(weight) is None or math.prod(_shape(weight) or ()) != math.prod(size)):
            return False
        self.m.norm, self.m.norm_weight = kind, weight
        self.m.norm_eps = eps if isinstance(eps, Node) else float(eps)
        self._take(end, flat)
        return True

    def _rms_norm_call(self, at: Node) -> tuple[Node, tuple[Any, ...], Node | None, float | Node] | None:
        if len(at.users) != 1:
            return None
        (user,) = at.users
        if name(user) != "rms_norm" or not user.args or user.args[0] is not at:
            return None
        named = {**dict(zip(("input", "normalized_shape", "weight", "eps"), user.args, strict=False)), **user.kwargs}
        eps = named.get("eps")
        if eps is None:  # what torch then takes has changed between versions
            return None
        return user, tuple(named["normalized_shape"]), named.get("weight"), eps

    def _rms_norm_by_hand(self, at: Node) -> tuple[Node, tuple[Any, ...], Node | None, float | Node] | None:
        """x · rsqrt(mean(x², dims) + eps) [· weight], x in one dtype or two."""
        squares = [u for u in at.users if self._is_square(u, at)]
        if len(squares) != 1:
            return None
        mean = self._only_user(squares[0])
        dims, keepdim = self._mean_dims(mean)
        eps_node = self._only_user(mean)
        eps = None if mean is None else _other(eps_node, mean, "add")
        rsqrt = self._only_user(eps_node)
        if dims is None or not keepdim or not _is_number(eps) or name(rsqrt) != "rsqrt":
            return None
        scaled = self._only_user(rsqrt)
        x = uncast(_other(scaled, rsqrt, "mul")) if rsqrt is not None else None
        if scaled is None or x is not uncast(at) or not set(at.users) <= {squares[0], scaled}:
            return None
        end, weight = scaled, None
        shape = _shape(at) or ()
        size = tuple(shape[d] for d in sorted(d % len(shape) for d in dims))
        if tuple(shape[len(shape) - len(size) :]) != size:
            return None
        for candidate in self._through_casts(scaled):
            following = self._only_user(candidate)
            w = uncast(_other(following, candidate, "mul"))
            w_shape = _shape(w)
            if w_shape is not None and w_shape == size:
                end, weight = following, w
                break
        assert end is not None
        return end, size, weight, eps

    @staticmethod
    def _is_square(n: Node, x: Node) -> bool:
        if name(n) == "square":
            return True
        if name(n) == "pow":
            return n.args[0] is x and n.args[1] == 2
        return name(n) == "mul" and n.args[0] is x and n.args[1] is x

    @staticmethod
    def _only_user(n: Node | None) -> Node | None:
        return next(iter(n.users)) if n is not None and len(n.users) == 1 else None

    @staticmethod
    def _mean_dims(n: Node | None) -> tuple[tuple[int, ...] | None, bool]:
        if n is None or name(n) != "mean":
            return None, False
        named = {**dict(zip(("input", "dim", "keepdim"), n.args, strict=False)), **n.kwargs}
        dim = named.get("dim")
        dims = (dim,) if isinstance(dim, int) else tuple(dim) if isinstance(dim, (list, tuple)) else None
        return dims, bool(named.get("keepdim", False))

    def _through_casts(self, n: Node) -> Iterator[Node]:
        yield n
        following = self._only_user(n)
        while following is not None and _is_cast(following):
            yield following
            following = self._only_user(following)


def _mutation(n: Node) -> str | None:
    """The name of an operation in place, or None."""
    kind = name(n)
    in_place = (kind.endswith("_") and not kind.endswith("__")) or kind == "setitem" or "out" in n.kwargs
    if n.op == "call_function" and getattr(operator, kind, None) is n.target and kind in _IN_PLACE_OPERATORS:
        in_place = True
    return kind if in_place or n.kwargs.get("inplace") else None


_IN_PLACE_OPERATORS = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imatmul", "iand", "ior", "ixor"}


def _depends_on(nodes: list[Node], source: Node) -> bool:
    todo, seen = list(nodes), set()
    while todo:
        n = todo.pop()
        if n is source:
            return True
        if n not in seen:
            seen.add(n)
            todo += n.all_input_nodes
    return False


def _obstacle(m: Match) -> str | None:
    """Why nodes may not change places here, or None."""
    assert m.last is not None
    n = m.scan
    while n is not m.last:
        n = n.next
        kind = _mutation(n)
        if kind is not None:
            return f"`{kind}` between the scan and the end of its tail writes in place"
        if name(n) in ("_enter_autocast", "_exit_autocast"):
            return "an autocast region begins or ends between the scan and the end of its tail"
    if _depends_on(m.extra_inputs(), m.scan):
        return "what it would take in depends on the scan's own result"
    return None


def match(scan: Node) -> Match:
    """Everything around one scan that could move into the op. `last` is None where nothing follows that could."""
    m = Match(scan)
    outputs = {u.args[1]: u for u in scan.users if name(u) == "getitem"}
    match_prologue(m)
    match_packed(m)
    y = outputs.get(0)
    shape = _shape(y)
    if y is None or shape is None:
        m.stopped = "y is not used"
        return m
    if not all(isinstance(size, int) for size in shape[2:]):
        m.stopped = "the number of heads or of columns is not a constant of the graph"
        return m
    _Tail(m, y).run()
    if m.last is not None:
        obstacle = _obstacle(m)
        if obstacle is not None:
            return Match(scan, stopped=obstacle, prologue_stopped=m.prologue_stopped)
    return m
