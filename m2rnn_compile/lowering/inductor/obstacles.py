# SPDX-License-Identifier: Apache-2.0
"""Why nodes may not change places: what stands between them and the place where their work is to be done.

An op that takes the place of nodes reads their inputs at the place of the last one, and runs under the modes in force
there. That is the same only if, from the first of these nodes on, nothing writes in place and no mode changes. Which
tensor is written is not asked: telling apart what shares memory is not possible here.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import GraphModule, Node

from .nodes import function_parameter, is_cast, is_view, label, operand, unview, value

_IN_PLACE_OPERATORS = {
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift",
    "irshift", "setitem", "delitem",
}  # fmt: skip
_MODES = {
    "_set_grad_enabled": "a region of another grad mode",
    "_enter_inference_mode": "an inference mode region",
    "_exit_inference_mode": "an inference mode region",
    "_enter_autocast": "an autocast region",
    "_exit_autocast": "an autocast region",
}
_OTHERS_PURE = ("torch", "math", "_operator", "builtins", "einops")  # top modules of functions that write nothing


def writes(n: Node) -> str | None:
    """The name of an operation that writes, or may write, into what it is given; or None."""
    if n.op in ("placeholder", "get_attr", "output"):
        return None
    called = label(n) or str(n.target)
    if n.op == "call_module":  # Dynamo leaves none; what is in it is not looked at
        return called
    in_place = called.endswith("_") and not called.endswith("__")
    if in_place or called.strip("_") in _IN_PLACE_OPERATORS or n.kwargs.get("out") is not None:
        return called
    if n.op == "call_method":
        return None
    return called if _function_writes(n) else None


def _function_writes(n: Node) -> bool:
    target = n.target
    if isinstance(target, OpOverload):
        return bool(target._schema.is_mutable)
    if isinstance(target, OpOverloadPacket):
        overloads = [getattr(target, o) for o in target.overloads() if "out" not in o]
        return any(o._schema.is_mutable for o in overloads)
    if isinstance(target, HigherOrderOperator):
        return label(n).endswith("_mutation") or any(writes(x) for body in _bodies(n) for x in body.graph.nodes)
    assert not isinstance(target, str)
    if function_parameter(target, "inplace", n):
        return True
    if getattr(operator, label(n), None) is target or getattr(torch, label(n), None) is target:
        return False
    return str(getattr(target, "__module__", None) or "torch").split(".")[0] not in _OTHERS_PURE


def _bodies(n: Node) -> Iterator[GraphModule]:
    root = n.graph.owning_module
    for x in n.all_input_nodes:
        if x.op == "get_attr" and root is not None:
            body = operator.attrgetter(str(x.target))(root)
            if isinstance(body, GraphModule):
                yield body


def changes_mode(n: Node) -> str | None:
    return _MODES.get(label(n)) if n.op == "call_function" else None


def computes(last: Node, inputs: Collection[Node]) -> set[Node]:
    """The nodes that make `last` of `inputs`. Sizes are left out: nothing that writes numbers changes them."""
    found: set[Node] = set()
    todo = [last]
    while todo:
        n = todo.pop()
        if n in found or n in inputs or isinstance(value(n), (bool, int, float, torch.SymInt, torch.SymFloat)):
            continue
        found.add(n)
        todo += n.all_input_nodes
    return found


def same_views(n: Node) -> tuple[set[Node], Node]:
    """(the casts and views that make n, what they are of)."""
    found = set()
    root = unview(n)
    while n is not root:
        assert is_view(n) or is_cast(n)
        found.add(n)
        n = operand(n)
    return found, root


def obstacle(nodes: Collection[Node], last: Node) -> str | None:
    """What stands between the first of `nodes` and `last`, or None."""
    begun = False
    for n in last.graph.nodes:
        if begun:
            writing, mode = writes(n), changes_mode(n)
            if writing is not None:
                return f"`{writing}` writes in place between what would move and where to"
            if mode is not None:
                return f"{mode} begins or ends between what would move and where to"
        begun = begun or n in nodes
        if n is last:
            break
    return None


def written_later(kept: Collection[Node], last: Node) -> str | None:
    """What writes into the memory of one of `kept` behind `last`, or None: an op that keeps them for its backward must
    not be there.

    Plain code may keep a copy or a result instead, as the convolution does that pads, and exp. Views share their
    storage in the fakes too. Behind a backward inside of the graph nothing is kept any more: optimizers may write.
    """
    behind = False
    for n in last.graph.nodes:
        if behind and n.target is torch.autograd.grad:
            return None
        if behind and writes(n) is not None and any(_shares_storage(x, of) for of in n.all_input_nodes for x in kept):
            return f"`{writes(n)}` writes in place into what the op keeps for its backward"
        behind = behind or n is last
    return None


def watched(nodes: Collection[Node]) -> str | None:
    """Which of the nodes has a hook on its gradient, or a gradient taken inside of the graph; or None.

    An op in their place has no such gradient: the hook would see what other users of the node send back, or nothing.
    """
    for n in nodes:
        for user in n.users:
            if user.target is torch.autograd.grad or "register_hook" in label(user):
                return f"a gradient of `{n.name}` is asked for (`{label(user)}`), which the op would not have"
    return None


def _shares_storage(a: Node, b: Node) -> bool:
    x, y = value(a), value(b)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or {x.layout, y.layout} != {torch.strided}:
        return False
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


def depends_on(nodes: Collection[Node], source: Node) -> bool:
    todo, seen = list(nodes), set()
    while todo:
        n = todo.pop()
        if n is source:
            return True
        if n not in seen:
            seen.add(n)
            todo += n.all_input_nodes
    return False


def needs_gradient(n: Node) -> bool:
    x = value(n)
    return isinstance(x, Tensor) and x.requires_grad
