# SPDX-License-Identifier: Apache-2.0
"""`--dry-run`: shapes, who would run and how much memory that takes, without allocating any of it."""

from __future__ import annotations

import torch
from rich.table import Table
from rich.text import Text

from m2rnn_compile.ops.registry import IMPLEMENTATIONS

from .ledger import META, FlashAttention, Ledger
from .measure import Plan
from .memory import MIB
from .providers import PROVIDERS, Context, Provider, lm, ours
from .shapes import Shape
from .tables import heading, make_table

COLUMNS = {
    "op": ("inputs", "forward", "forward+backward"),
    "step": ("inputs", "step"),
    "layer": ("inputs", "forward", "forward+backward"),
    "model": ("inputs", "forward", "forward+backward", "train", "generate"),
}
NOTES = {
    "op": "estimates of the op's peak beyond its inputs; a peer of another kind may need several times as much,\n"
    "and with few sequences and heads forward on a GPU also holds partial sums of y, twice its size",
    "step": "estimates: what a step allocates beyond its inputs; of peers' steps no memory is predicted",
    "layer": "inputs: x, the gradient of y, the parameters; the others are peaks beyond these, counted operation by\n"
    "operation of the uncompiled layer (projections, conv, gates, scan with checkpoints, tail, every gradient);\n"
    "what a kernel allocates inside is not counted",
    "model": "inputs: the parameters and a weight for each loss; the others are peaks beyond these, counted operation\n"
    "by operation of the uncompiled model (all layers, logits and losses, every gradient); train adds the two moments\n"
    "that AdamW keeps of each parameter; generate is the cache of T tokens and one token more; what a kernel\n"
    "allocates inside is not counted",
}


def input_bytes(shape: Shape, itemsize: int) -> int:
    """q, k, v, W and dy in the dtype, f in fp32."""
    token = (shape.Nq + shape.Nk) * shape.K + (shape.Nv + shape.N) * shape.V
    return shape.B * shape.T * (token * itemsize + 4 * shape.Nf) + shape.Nw * shape.V**2 * itemsize


def peak_bytes(provider: Provider, shape: Shape, itemsize: int) -> tuple[int, int]:
    """(forward, forward+backward) of the op beyond its inputs: result, what is kept, what backward adds."""
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
    for column in COLUMNS[plan.kernel]:
        table.add_column(f"{column} MiB", justify="right", no_wrap=True)
    table.add_column("")
    cells_of = {"op": _cells, "step": _step_cells}.get(plan.kernel, _whole_cells)
    missing = {name: offered[name].why_not(torch.device(device_type)) for name in names}
    for shape in plan.shapes:
        for dtype in plan.dtypes:
            for name in names:
                first = (shape.name, str(shape), str(dtype).removeprefix("torch."))
                cells = cells_of(plan, offered[name], shape, dtype)
                table.add_row(*first, *cells[:-1], Text("missing" if missing[name] else cells[-1]))
    title = f"{plan.kernel} on {device_type}: {', '.join(plan.modes)}; nothing was run"
    lines = [NOTES[plan.kernel], *(f"missing {name}: {reason}" for name, reason in missing.items() if reason)]
    return [heading(title), table, Text("\n".join(lines))]


def whole_bytes(plan: Plan, provider: Provider, shape: Shape, dtype: torch.dtype) -> dict[str, int]:
    """Column → bytes of a layer or model, counted on the meta device.

    inputs: leaves (x and the parameters) and the gradient that is given. The others are peaks beyond these, of train
    with AdamW's two moments of every parameter, of generate with the cache of T tokens.

    Raises:
        ValueError: a shape that the provider cannot do.
    """
    context = Context(plan.kernel, shape, dtype, META, plan.seed, plan.clip, plan.layers, plan.pattern)
    problem = provider.build[plan.kernel](context)
    leaves = list(problem.leaves.values())
    assert problem.dy is not None
    given = [*leaves, problem.dy]
    ledger = Ledger(given)
    with ledger, FlashAttention():
        y = problem.call(problem.leaves)[0]
        forward = ledger.peak
        gradients = torch.autograd.grad(y, leaves, problem.dy.to(y.dtype), allow_unused=True)
    both = ledger.peak
    if provider.name == "reference":  # a graph of the loop in the place of checkpoints
        recurrent = 1 if plan.kernel == "layer" else lm.config_of(context, "M").pattern.count("M")
        graph = recurrent * (provider.kept(shape, dtype.itemsize) - ours.checkpoint_bytes(shape, dtype.itemsize))
        forward, both = forward + graph, both + graph
    del y, gradients
    result = {"inputs": sum(x.nbytes for x in given), "forward": forward, "forward+backward": both}
    if plan.kernel == "model":
        result["train"] = both + 2 * sum(x.nbytes for x in leaves)
        ledger = Ledger(given)
        with ledger, FlashAttention():
            step = problem.variant("generate")()
            ledger.peak = ledger.now  # the cache; what filled it is gone
            step()
        result["generate"] = ledger.peak
    return result


def _whole_cells(plan: Plan, provider: Provider, shape: Shape, dtype: torch.dtype) -> list[str]:
    try:
        found = whole_bytes(plan, provider, shape, dtype)
    except ValueError as e:
        return [provider.name, *[""] * len(COLUMNS[plan.kernel]), str(e)]
    largest = max(value for column, value in found.items() if column != "inputs")
    figures = [f"{found[column] / MIB:,.1f}" for column in COLUMNS[plan.kernel]]
    return [provider.name, *figures, _fits(plan, found["inputs"] + largest)]


def _step_cells(plan: Plan, provider: Provider, shape: Shape, dtype: torch.dtype) -> list[str]:
    name = provider.name
    known = name == "xma" or name.removesuffix("-compile") in IMPLEMENTATIONS
    figures = [f"{value / MIB:,.2f}" for value in step_bytes(shape, dtype.itemsize)] if known else ["", ""]
    return [name, *figures, ""]


def _cells(plan: Plan, provider: Provider, shape: Shape, dtype: torch.dtype) -> list[str]:
    inputs = input_bytes(shape, dtype.itemsize)
    forward, both = peak_bytes(provider, shape, dtype.itemsize)
    figures = [f"{value / MIB:,.1f}" for value in (inputs, forward, both)]
    return [provider.name, *figures, _fits(plan, inputs + both)]


def _fits(plan: Plan, needed: int) -> str:
    total = _total_memory(plan.device)
    return "does not fit" if total is not None and needed > total else ""
