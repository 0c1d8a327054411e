# SPDX-License-Identifier: Apache-2.0
"""`--dry-run`: shapes, who would run and how much memory that takes, without allocating any of it."""

from __future__ import annotations

from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from .measure import Plan
from .memory import MIB
from .providers import PROVIDERS, Provider
from .shapes import Shape
from .tables import heading, make_table


def input_bytes(shape: Shape, itemsize: int) -> int:
    """q, k, v, W and dy in the dtype, f in fp32."""
    token = (shape.Nq + shape.Nk) * shape.K + (shape.Nv + shape.N) * shape.V
    return shape.B * shape.T * (token * itemsize + 4 * shape.Nf) + shape.Nw * shape.V**2 * itemsize


def peak_bytes(provider: Provider, shape: Shape, itemsize: int) -> tuple[int, int]:
    """(forward, forward+backward) of the op beyond its inputs: result, what is kept, gradients of the inputs."""
    result = shape.B * shape.T * shape.N * shape.V * itemsize
    forward = result + provider.kept(shape, itemsize)
    dy = result
    return forward, forward + input_bytes(shape, itemsize) - dy


def _total_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return None


def parts_of(plan: Plan, device_type: str) -> list[Table | Text]:
    """One line for each shape, dtype and provider that would run on such a device, those that are missing included.

    Raises:
        ValueError: a provider that is unknown, or has no such kernel.
    """
    offered = {provider.name: provider for provider in PROVIDERS if plan.kernel in provider.build}
    names = plan.providers or [name for name, p in offered.items() if device_type in p.default_on]
    if list(names) == ["all"]:
        names = list(offered)
    unknown = [name for name in names if name not in offered]
    if unknown:
        raise ValueError(f"--provider: unknown for {plan.kernel}: {', '.join(unknown)}; known are {', '.join(offered)}")
    table = make_table()
    for column in ("shape", "sizes", "dtype", "provider"):
        table.add_column(column, no_wrap=True)
    for column in ("inputs MiB", "forward MiB", "forward+backward MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for shape in plan.shapes:
        for dtype in plan.dtypes:
            for name in names:
                first = (shape.name, str(shape), str(dtype).removeprefix("torch."))
                table.add_row(*first, *_cells(plan, device_type, offered[name], shape, dtype))
    note = "estimates: forward, forward+backward are the op's peak beyond its inputs"
    if plan.kernel != "op":
        note = f"memory is predicted for the op; {plan.kernel} adds to it"
    title = f"{plan.kernel} on {device_type}: {', '.join(plan.modes)}; nothing was run"
    return [heading(title), table, Text(note)]


def _cells(plan: Plan, device_type: str, provider: Provider, shape: Shape, dtype: torch.dtype) -> list[Any]:
    inputs = input_bytes(shape, dtype.itemsize)
    forward, both = peak_bytes(provider, shape, dtype.itemsize)
    total = _total_memory(plan.device)
    problem = provider.why_not(torch.device(device_type))
    too_large = total is not None and inputs + both > total
    note = Text("does not fit" if too_large else f"missing: {problem}" if problem else "")
    return [provider.name, *(f"{value / MIB:,.1f}" for value in (inputs, forward, both)), note]
