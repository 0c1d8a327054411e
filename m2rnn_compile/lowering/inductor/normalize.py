# SPDX-License-Identifier: Apache-2.0
"""Write every call of the scan in the one form that the matcher reads."""

from __future__ import annotations

import torch
from torch.fx import Graph

from .nodes import SCAN


def normalize(graph: Graph) -> None:
    """A call through the packet `torch.ops.m2rnn.scan`, or by keyword: `scan.default`, each argument in its place."""
    names = [a.name for a in SCAN._schema.arguments]
    for n in graph.nodes:
        if n.op == "call_function" and n.target in (SCAN, torch.ops.m2rnn.scan):
            n.target = SCAN
            n.args = (*n.args, *(n.kwargs[name] for name in names[len(n.args) :]))
            n.kwargs = {}
