# SPDX-License-Identifier: Apache-2.0
"""`--dry-run`: shapes, who would run and how much memory that takes, without allocating any of it."""

from __future__ import annotations

import torch
from rich.table import Table
from rich.text import Text

from m2rnn_compile.ops.registry import IMPLEMENTATIONS

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
    dy = result = result_bytes(shape, itemsize)
    forward = result + provider.kept(shape, itemsize)
    return forward, forward + provider.in_backward(shape, itemsize) + input_bytes(shape, itemsize) - dy


def step_bytes(shape: Shape, itemsize: int) -> tuple[int, int]:
    """(inputs, what the call adds) of one decoding step of M²RNN: states in fp32, f in fp32, one token of the rest."""
    state = 4 * shape.B * shape.N * shape.K * shape.V
    return state + input_bytes(shape.with_length(1), itemsize) - result_bytes(shape.with_length(1), itemsize), (
        state + result_bytes(shape.with_length(1), itemsize)
    )


def result_bytes(shape: Shape, itemsize: int) -> int:
    """y, and as much dy."""
    return shape.B * shape.T * shape.N * shape.V * itemsize


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
    step = plan.kernel == "step"
    for column in ("inputs MiB", "step MiB") if step else ("inputs MiB", "forward MiB", "forward+backward MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    missing = {name: offered[name].why_not(torch.device(device_type)) for name in names}
    for shape in plan.shapes:
        for dtype in plan.dtypes:
            for name in names:
                first = (shape.name, str(shape), str(dtype).removeprefix("torch."))
                cells = _step_cells(name, shape, dtype) if step else _cells(plan, offered[name], shape, dtype)
                table.add_row(*first, *cells[:-1], Text("missing" if missing[name] else cells[-1]))
    note = "estimates of the op's peak beyond its inputs; a peer of another kind may need several times as much"
    if step:
        note = "estimates: what a step allocates beyond its inputs; of peers' steps no memory is predicted"
    elif plan.kernel != "op":
        note = f"memory is predicted for the op; {plan.kernel} adds to it"
    title = f"{plan.kernel} on {device_type}: {', '.join(plan.modes)}; nothing was run"
    lines = [note, *(f"missing {name}: {reason}" for name, reason in missing.items() if reason)]
    return [heading(title), table, Text("\n".join(lines))]


def _step_cells(name: str, shape: Shape, dtype: torch.dtype) -> list[str]:
    known = name == "xma" or name.removesuffix("-compile") in IMPLEMENTATIONS
    figures = [f"{value / MIB:,.2f}" for value in step_bytes(shape, dtype.itemsize)] if known else ["", ""]
    return [name, *figures, ""]


def _cells(plan: Plan, provider: Provider, shape: Shape, dtype: torch.dtype) -> list[str]:
    inputs = input_bytes(shape, dtype.itemsize)
    forward, both = peak_bytes(provider, shape, dtype.itemsize)
    total = _total_memory(plan.device)
    too_large = total is not None and inputs + both > total
    note = "does not fit" if too_large else ""
    return [provider.name, *(f"{value / MIB:,.1f}" for value in (inputs, forward, both)), note]
