# SPDX-License-Identifier: Apache-2.0
"""Read one node of an FX graph of torch calls (Dynamo's, before autograd) or of aten ops."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node

from ...ops.library import DTYPES

SCAN = torch.ops.m2rnn.scan.default
CASTS = ("to", "_to_copy", "float", "half", "bfloat16", "type_as", "convert_element_type")
VIEWS = ("flatten", "unflatten", "reshape", "view", "_unsafe_view")
NAMESPACES = ("aten", "prims", "m2rnn")

# Parameters beyond the first, of the functions and methods that the rewrite reads; an overload has its schema.
_BINARY, _SPLIT = ("input", "other"), ("input", "split_sizes", "dim")
PARAMETERS: dict[str, tuple[str, ...]] = {
    "add": _BINARY, "mul": _BINARY, "ge": _BINARY, "pow": ("input", "exponent"), "silu": ("input", "inplace"),
    "gelu": ("input", "approximate"), "softplus": ("input", "beta", "threshold"), "mean": ("input", "dim", "keepdim"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"), "split": _SPLIT, "split_with_sizes": _SPLIT,
    "repeat_interleave": ("input", "repeats", "dim"), "where": ("condition", "input", "other"),
    "linear": ("input", "weight", "bias"),
    "pad": ("input", "pad", "mode", "value"), "constant_pad_nd": ("input", "pad", "value"),
}  # fmt: skip
# Names that torch takes for, or a schema gives to, the same parameter.
SYNONYMS = {"self": "input", "tensor": "input", "a": "input", "x": "input", "x1": "input", "x2": "other"}
SYNONYMS |= {"axis": "dim", "keepdims": "keepdim"}


class ScanArguments(NamedTuple):
    """The arguments of `m2rnn::scan`."""

    q: Node
    k: Node
    v: Node
    f: Node
    W: Node
    initial_state: Node | None
    cu_seqlens: Node | None
    state_grad_clip: Any
    chunk: int
    impl: str


def label(n: Any) -> str:
    """The bare name of whatever is called, for messages and for what needs no proof that it is torch's."""
    if not isinstance(n, Node):
        return ""
    if isinstance(n.target, str):
        return n.target if n.op == "call_method" else ""
    if isinstance(n.target, (OpOverload, OpOverloadPacket)):
        return _qualified(n.target)[1]
    return str(getattr(n.target, "__name__", ""))


def name(n: Any) -> str:
    """The bare name of a method of a tensor, an operator, a function of torch or an op of NAMESPACES; else "".

    Others may have a function or an op of the same name, which computes something else.
    """
    if not isinstance(n, Node) or n.op not in ("call_method", "call_function"):
        return ""
    if n.op == "call_method":
        return str(n.target)
    target, found = n.target, label(n)
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        return found if _qualified(target)[0] in NAMESPACES else ""
    return found if _is_torch_function(target, found) else ""


def _qualified(op: OpOverload | OpOverloadPacket) -> tuple[str, str]:
    """("aten", "mul") of aten.mul.Tensor and of aten.mul."""
    whole = op._schema.name if isinstance(op, OpOverload) else op._qualified_op_name
    namespace, _, bare = whole.partition("::")
    return namespace, bare


def _is_torch_function(target: Any, bare: str) -> bool:
    return any(getattr(module, bare, None) is target for module in (torch, F, torch._C._nn, operator) if bare)


def arguments(n: Node) -> dict[str | int, Any]:
    """What a call was given, by the parameters' names however it was passed; by position where we know no name.

    The first parameter is "input", whatever the function calls it. What was not given is not there.
    """
    if isinstance(n.target, OpOverload):
        names = tuple(SYNONYMS.get(a.name, a.name) for a in n.target._schema.arguments)
    else:
        names = PARAMETERS.get(name(n), ("input",))
    given: dict[str | int, Any] = {names[i] if i < len(names) else i: x for i, x in enumerate(n.args)}
    return given | {SYNONYMS.get(key, key): x for key, x in n.kwargs.items()}


def operand(n: Any) -> Any:
    """The first argument of a call."""
    return arguments(n).get("input") if isinstance(n, Node) else None


def scan_arguments(scan: Node) -> ScanArguments:
    given: dict[Any, Any] = arguments(scan)
    return ScanArguments(**given)


def value(n: Node) -> Any:
    """The fake tensor that tracing left: Dynamo calls it example_value, export val."""
    return n.meta.get("example_value", n.meta.get("val"))


def shape_of(n: Any) -> tuple[Any, ...] | None:
    x = value(n) if isinstance(n, Node) else None
    return tuple(x.shape) if isinstance(x, Tensor) else None


def is_cast(n: Any) -> bool:
    """Between float dtypes that the ops know, on one device. A rounding to eight bits is meant, and stays."""
    source = operand(n) if name(n) in CASTS else None
    if not isinstance(source, Node):
        return False
    before, after = value(source), value(n)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    floats = before.dtype in DTYPES.values() and after.dtype in DTYPES.values()
    narrows_fp64 = before.dtype != after.dtype and torch.float64 in (before.dtype, after.dtype)
    return floats and not narrows_fp64 and before.device == after.device


def uncast(n: Any) -> Any:
    while is_cast(n):
        n = operand(n)
    return n


def is_view(n: Any) -> bool:
    """Another shape for the same numbers: `view` with a dtype reads the bits anew."""
    source = operand(n) if name(n) in VIEWS else None
    if not isinstance(source, Node):
        return False
    before, after = value(source), value(n)
    return isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype == after.dtype


def unview(n: Any) -> Any:
    """Below all views and casts."""
    while is_view(n) or is_cast(n):
        n = operand(n)
    return n


def operands(n: Any, *names: str) -> tuple[Any, Any] | None:
    """The two operands of a binary operation of one of these names, without alpha and the like."""
    given = arguments(n) if name(n) in names else {}
    return (given["input"], given["other"]) if given.keys() == {"input", "other"} else None


def other(n: Any, x: Node, *names: str) -> Any:
    """The operand of `n` beside x, if n is such an operation on x."""
    pair = operands(n, *names)
    if pair is None or (pair[0] is x) == (pair[1] is x):
        return None
    return pair[1] if pair[0] is x else pair[0]


def same(a: Any, b: Any) -> bool:
    """The same tensor: one node, or the same views of the same."""
    if a is b:
        return True
    if not (is_view(a) and is_view(b)) or name(a) != name(b):
        return False
    of_a, of_b = arguments(a), arguments(b)
    return same(of_a.pop("input"), of_b.pop("input")) and of_a == of_b


def is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) or (isinstance(x, Node) and isinstance(value(x), (float, torch.SymFloat)))


def is_check(n: Node) -> bool:
    """What export puts in front of each `.to`: it looks at a tensor's dtype and gives nothing."""
    return label(n) == "_assert_tensor_metadata" and not n.users


def users(n: Node) -> list[Node]:
    """Who uses the numbers of `n`."""
    return [user for user in n.users if not is_check(user)]


def only_user(n: Node | None) -> Node | None:
    found = [] if n is None else users(n)
    return found[0] if len(found) == 1 else None


def cast_after(n: Node | None) -> Node | None:
    """The only user of n where it is a cast of n (`x.type_as(n)` is none)."""
    user = only_user(n)
    return user if is_cast(user) and operand(user) is n else None


def unlike(x: Any, v: Tensor) -> str | None:
    """Why the fused op could not take the node x beside v, in words that follow x's name; or None."""
    tensor = value(x) if isinstance(x, Node) else None
    if not isinstance(tensor, Tensor):
        return "is not a tensor"
    if tensor.dtype not in DTYPES.values():
        return f"is {tensor.dtype}, which the op does not take"
    if tensor.dtype == torch.float64 != v.dtype:
        return "is torch.float64, and the op computes in float32"
    if tensor.device != v.device or tensor.layout != v.layout:
        return f"is on {tensor.device} in layout {tensor.layout}, and v on {v.device} in layout {v.layout}"
    return None


def function_parameter(target: Callable[..., Any], parameter: str, n: Node) -> Any:
    """What a function written in Python was given for `parameter`, or None."""
    code = getattr(target, "__code__", None)
    declared = () if code is None else code.co_varnames[: code.co_argcount]
    if parameter in declared and declared.index(parameter) < len(n.args):
        return n.args[declared.index(parameter)]
    return n.kwargs.get(parameter)
