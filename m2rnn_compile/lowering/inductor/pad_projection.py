# SPDX-License-Identifier: Apache-2.0
"""Pad the product that makes a projection, where its width is none that fast products take.

Rows of 2900 16-bit numbers do not begin at multiples of 16 bytes, so Inductor would copy the gradient of such a result
into a padded one, and its passes that do so are the ones that `m2rnn::fused_mixer` spares. So the weight gets
rows of zeros, which is small, and the op leaves the columns that they make alone: their gradient is zero.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from .nodes import arguments, name, users, value

ALIGNED = 8  # columns of 16 bits in 16 bytes
MULTIPLE = 64  # columns of a tile


def wants_padding(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype.itemsize == 2 and x.shape[-1] % ALIGNED != 0


def pad_projection(graph: Graph, x: Node) -> None:
    """The same product with zeros in further columns, where x is a product that one op reads and padding pays."""
    given: dict[Any, Any] = arguments(x) if name(x) == "linear" else {}
    weight, bias = given.get("weight"), given.get("bias")
    fake = value(x)
    if not isinstance(weight, Node) or len(users(x)) != 1 or type(fake.shape[-1]) is not int or not wants_padding(fake):
        return  # a width that is a symbol (weights are inputs of a dynamic graph) is left alone
    extra = -fake.shape[-1] % MULTIPLE
    with graph.inserting_before(x):
        padded = _pad(graph, weight, (0, 0, 0, extra))
        bias = None if bias is None else _pad(graph, bias, (0, extra))
        made = graph.call_function(F.linear, (given["input"], padded, bias))
    made.meta = {**x.meta, "example_value": fake.new_empty(*fake.shape[:-1], fake.shape[-1] + extra)}
    x.replace_all_uses_with(made)
    for check in list(x.users):  # of its strides
        graph.erase_node(check)
    graph.erase_node(x)


def _pad(graph: Graph, x: Node, amounts: tuple[int, ...]) -> Node:
    made = graph.call_function(F.pad, (x, amounts))
    with torch.no_grad():
        made.meta["example_value"] = F.pad(value(x), amounts)
    return made
