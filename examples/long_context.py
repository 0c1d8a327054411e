# SPDX-License-Identifier: Apache-2.0
"""Long context: loss by position far beyond the training length, and two retrieval probes.

    python examples/layer_swap.py --preset cpu --weights runs/swap
    python examples/long_context.py --preset cpu --weights runs/swap

1. *Loss by position*: the models of layer_swap.py (from --weights; missing ones are trained first, as it trains them)
   read held-out text up to 16 times their training length in one piece.
2. *Retrieval*: models of the same shapes, trained on multi-query associative recall. Keys with their values stand at
   random places among noise; at the end come keys again, and the model says their values. Tested at 1, 4 and 16 times
   the training length, with as many pairs as in training (MQAR) and with a single one (a needle).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import layer_swap
import recipes
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from m2rnn_compile.layers import param_groups
from m2rnn_compile.models import HybridLM
from m2rnn_compile.models.data import ByteData

TIMES = (1, 4, 16)

# -- loss by position --------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_position(model: HybridLM, text: Tensor, length: int, windows: int, device: torch.device) -> list[float]:
    """Bits per byte in the spans of positions up to 1/4, 1/2, 1, 2, 4, 8 and 16 times `length`."""
    longest = 16 * length
    count = max(1, min(windows, (len(text) - 1) // longest))
    edges = [0, length // 4, length // 2, *(length * 2**i for i in range(5))]
    nats = torch.zeros(longest, dtype=torch.float64)
    for i in range(count):
        piece = text[i * longest : (i + 1) * longest + 1].long().to(device)[None]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            nats[: piece.shape[1] - 1] += model.loss(piece[:, :-1], piece[:, 1:], reduction="none")[0].double().cpu()
    nats /= count * math.log(2)
    return [round(float(nats[a:b].mean()), 4) for a, b in zip(edges, edges[1:], strict=False)]


def read_long(
    model: str, seed: int, size: layer_swap.Size, data: ByteData, device: torch.device, weights: Path, windows: int
) -> Any:
    """A job: loss by position of one model."""
    file = weights / f"{model}, seed {seed}.pt"
    if not file.exists():
        little = data._replace(held_out=data.held_out[: size.seq_len + 1])  # the swap's own test is not wanted here
        yield from layer_swap.train(model, seed, size, little, device, weights, weights)
    yield 0.9, "reading"
    saved = recipes.load_weights(file, layer_swap.made_by(model, size), device)
    lm = HybridLM(layer_swap.config_of(model, size)).to(device).eval()
    lm.load_state_dict(saved["state"])
    bits = by_position(lm, data.held_out, size.seq_len, windows, device)
    said = f"bits per byte within the training length {bits[2]:.3f}, from 8 to 16 times it {bits[-1]:.3f}"
    return dict(probe="position", model=model, seed=seed, seq_len=size.seq_len, bits=bits, summary=said)


# -- retrieval ---------------------------------------------------------------------------------------------------------


class Recall(NamedTuple):
    """The task, and how long it is trained. Keys, values and noise are three ranges of tokens."""

    steps: int
    keys: int = 64
    values: int = 64
    noise: int = 64
    pairs: int = 8
    length: int = 64
    learning_rate: float = 2e-3
    tests: int = 200


RECALL = {
    "cpu": Recall(120, keys=8, values=8, noise=8, pairs=2, length=16, learning_rate=5e-3, tests=100),
    "h200": Recall(1500),
    "cpu-long": Recall(600),
}


def recall(
    task: Recall, batch: int, pairs: int, length: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Tokens ``[batch, length + 2 pairs]`` and targets, -100 but at the queries.

    Of the first `length` tokens 2·pairs are keys, each followed by its value, the rest noise; then all keys again in
    another order, each followed by its value.
    """
    rand = partial(torch.rand, generator=generator)
    keys = rand(batch, task.keys).argsort(1)[:, :pairs]
    noise = task.keys + task.values
    values = torch.randint(task.keys, noise, (batch, pairs), generator=generator)
    body = torch.randint(noise, noise + task.noise, (batch, length), generator=generator)
    places = rand(batch, length // 2).argsort(1)[:, :pairs] * 2
    body.scatter_(1, places, keys).scatter_(1, places + 1, values)
    order = rand(batch, pairs).argsort(1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], 2).flatten(1)
    tokens = torch.cat([body, asked], 1)
    targets = torch.full_like(tokens, -100)
    targets[:, length::2] = asked[:, 1::2]
    return tokens.to(device), targets.to(device)


def retrieve(model: str, seed: int, size: layer_swap.Size, task: Recall, device: torch.device) -> Any:
    """A job: train on recall, then test further out."""
    torch.manual_seed(seed)
    config = layer_swap.config_of(model, size)
    lm = HybridLM(dataclasses.replace(config, vocab_size=task.keys + task.values + task.noise)).to(device)
    generator = torch.Generator().manual_seed(seed)
    peak = task.learning_rate
    optimizer = torch.optim.AdamW(param_groups(lm, 0.1), lr=peak, betas=(0.9, 0.95))
    losses: list[float] = []
    for step in range(task.steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, (step + 1) / 50, 0.05 + 1.5 * (1 - step / task.steps))
        pairs = 1 + step % task.pairs
        tokens, targets = recall(task, 32, pairs, task.length, generator, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=size.bf16):
            loss = lm.loss(tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 9:
            yield step / task.steps, f"loss {sum(losses[-20:]) / len(losses[-20:]):.3f}"
    row: dict[str, Any] = dict(probe="recall", model=model, seed=seed, task=task._asdict(), loss=round(losses[-1], 4))
    for name, pairs in (("mqar", task.pairs), ("needle", 1)):
        row[name] = {t: accuracy(lm.eval(), task, pairs, t * task.length, size.bf16, device) for t in TIMES}
    row["summary"] = "MQAR {}, needle {}, at 1, 4, 16 times the training length".format(
        *(" / ".join(f"{x:.0%}" for x in row[name].values()) for name in ("mqar", "needle"))
    )
    return row


@torch.no_grad()
def accuracy(lm: HybridLM, task: Recall, pairs: int, length: int, bf16: bool, device: torch.device) -> float:
    """Share of queries answered right, on sequences that no training seed draws."""
    generator = torch.Generator().manual_seed(10**6)
    right, asked = 0, 0
    for start in range(0, task.tests, 50):
        tokens, targets = recall(task, min(50, task.tests - start), pairs, length, generator, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            found = lm(tokens, logits_to_keep=2 * pairs).argmax(-1)
        wanted = targets[:, -2 * pairs :]
        right += int((found == wanted)[wanted != -100].sum())
        asked += int((wanted != -100).sum())
    return round(right / asked, 4)


# -- tables, plot ------------------------------------------------------------------------------------------------------

SPANS = ("¼", "½", "1", "2", "4", "8", "16")


def tables(rows: list[dict[str, Any]], console: Console) -> None:
    position = [row for row in rows if row["probe"] == "position"]
    if position:
        table = Table(title=f"bits per byte up to so many times the training length ({position[0]['seq_len']})")
        for column in ("model", "seed", *SPANS):
            table.add_column(column, justify="left" if column == "model" else "right")
        for row in position:
            table.add_row(row["model"], str(row["seed"]), *(f"{b:.3f}" for b in row["bits"]))
        console.print(table)
    probes = [row for row in rows if row["probe"] == "recall"]
    if probes:
        task = Recall(**probes[0]["task"])
        at = f"at {', '.join(map(str, TIMES))} times the training length ({task.length})"
        table = Table(title=f"retrieval in %, {at}; chance is {100 / task.values:.1f}")
        for column in ("model", "seed", *(f"{name} ×{t}" for name in ("MQAR", "needle") for t in TIMES)):
            table.add_column(column, justify="left" if column == "model" else "right")
        for row in probes:
            cells = [f"{100 * x:.1f}" for name in ("mqar", "needle") for x in row[name].values()]
            table.add_row(row["model"], str(row["seed"]), *cells)
        console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for the text, if it was read, and one for each of the probes, if they were made."""
    position = [row for row in rows if row["probe"] == "position"]
    probes = [row for row in rows if row["probe"] == "recall"]
    made, axes = recipes.figure(bool(position) + 2 * bool(probes), width=4.4)
    names = list(dict.fromkeys(row["model"] for row in rows))
    panels: list[tuple[list[dict[str, Any]], str, dict[str, Any]]] = []
    if position:
        labels = dict(title="loss by position", xlabel="up to times the training length", ylabel="bits per byte")
        panels.append((position, "bits", labels))
    if probes:
        task = Recall(**probes[0]["task"])
        both = dict(xlabel="times the training length", ylabel="right answers", ylim=(-0.03, 1.03))
        panels += [(probes, "mqar", both | dict(title=f"MQAR, {task.pairs} pairs"))]
        panels += [(probes, "needle", both | dict(title="needle"))]
    for axis, (of, key, labels) in zip(axes, panels, strict=True):
        labelled: set[str] = set()
        for row in of:
            x, y = (SPANS, row[key]) if key == "bits" else ([f"×{t}" for t in TIMES], list(row[key].values()))
            label = None if row["model"] in labelled else row["model"]
            labelled.add(row["model"])
            axis.plot(x, y, marker="o", color=f"C{names.index(row['model'])}", label=label)
        if key != "bits":
            axis.axhline(1 / task.values, color="grey", linestyle=":")
        axis.set(**labels)
        axis.grid(alpha=0.3)
    made.legend(*axes[0].get_legend_handles_labels(), fontsize="small", loc="outside lower center", ncols=2 * len(axes))
    recipes.save_figure(made, path)


PRESETS = {
    "cpu": "the models of layer_swap.py's preset of this name; recall of 2 pairs among 16 tokens: shows the way;\n"
    "     under 5 minutes on 2 cores",
    "h200": "the same with 20M parameters; recall of 8 pairs among 64 tokens, 1500 steps; on one GPU: --probe and\n"
    "      --only pick, --minutes ends",
    "cpu-long": "the same with 1M parameters; recall of 8 pairs, 600 steps; about an hour on 2 cores",
}


def main(argv: list[str] | None = None) -> int:
    parser = recipes.parser("long_context", __doc__ or "", PRESETS)
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="of layer_swap.py (default: train afresh)")
    parser.add_argument("--probe", choices=("position", "recall"), help="only this one")
    return recipes.main(parser, argv, "long-context", measure, tables, plot)


def measure(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    models = list(layer_swap.runs(layer_swap.MODELS, args.seeds or [0], args.only))
    probes = [("position", ""), ("recall", "recall, ")]
    wanted = [
        (f"{prefix}{model}, seed {seed}", probe, model, seed)
        for probe, prefix in probes
        if args.probe in (None, probe)
        for model, seed in models
    ]
    if recipes.listed([title for title, *_ in wanted], args, console):
        return []
    device = recipes.device_of(args.preset)
    size = layer_swap.scaled(layer_swap.SIZES[args.preset], args.steps)
    task = RECALL[args.preset]
    shorter = min(1, args.steps)
    task = task._replace(steps=max(1, round(task.steps * args.steps)), tests=max(2, round(task.tests * shorter)))
    with tempfile.TemporaryDirectory() as folder:
        weights = args.weights or Path(folder)
        facts: dict[str, Any] = {}
        if args.probe != "recall":
            for model, seed in models:
                file = weights / f"{model}, seed {seed}.pt"
                if file.exists():  # refused before anything runs
                    recipes.load_weights(file, layer_swap.made_by(model, size), torch.device("cpu"))
            data = layer_swap.text_for(size)
            windows = max(1, round(shorter * (8 if device.type == "cpu" else 32)))
            facts = dict(held_out_bytes=len(data.held_out), fingerprint=data.fingerprint, windows=windows)
        jobs: list[tuple[str, Any]] = [
            (title, partial(read_long, model, seed, size, data, device, weights, windows))
            if probe == "position"
            else (title, partial(retrieve, model, seed, size, task, device))
            for title, probe, model, seed in wanted
        ]
        return recipes.measure(args, console, "long-context", device, jobs, **facts)


if __name__ == "__main__":
    sys.exit(main())
