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
import time
from functools import partial
from pathlib import Path
from typing import Any

import layer_swap
import recipes
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from m2rnn_compile.layers import param_groups
from m2rnn_compile.models import HybridLM, LMConfig
from m2rnn_compile.models.data import ByteData

TIMES = (1, 4, 16)
KEYS, VALUES, NOISE = 64, 64, 64  # three ranges of tokens
PAIRS, RECALL_LENGTH = 8, 64

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
        yield from layer_swap.train(model, seed, size, data, device, weights, weights)
    yield 0.9, "reading"
    saved = torch.load(file, map_location=device)
    config = LMConfig.from_dict(saved["config"])
    if config != layer_swap.config_of(model, size) or saved["size"] != size.seq_len:
        raise SystemExit(f"{file} was trained with another preset; give the folder of this one, or an empty one")
    lm = HybridLM(config).to(device).eval()
    lm.load_state_dict(saved["state"])
    bits = by_position(lm, data.held_out, size.seq_len, windows, device)
    said = f"bits per byte within the training length {bits[2]:.3f}, from 8 to 16 times it {bits[-1]:.3f}"
    return dict(probe="position", model=model, seed=seed, seq_len=size.seq_len, bits=bits, summary=said)


# -- retrieval ---------------------------------------------------------------------------------------------------------


def recall(
    batch: int, pairs: int, length: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Tokens ``[batch, length + 2 pairs]`` and targets, -100 but at the queries.

    Of the first `length` tokens 2·pairs are keys, each followed by its value, the rest noise; then all keys again in
    another order, each followed by its value.
    """
    rand = partial(torch.rand, generator=generator)
    keys = rand(batch, KEYS).argsort(1)[:, :pairs]
    values = torch.randint(KEYS, KEYS + VALUES, (batch, pairs), generator=generator)
    body = torch.randint(KEYS + VALUES, KEYS + VALUES + NOISE, (batch, length), generator=generator)
    places = rand(batch, length // 2).argsort(1)[:, :pairs] * 2
    body.scatter_(1, places, keys).scatter_(1, places + 1, values)
    order = rand(batch, pairs).argsort(1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], 2).flatten(1)
    tokens = torch.cat([body, asked], 1)
    targets = torch.full_like(tokens, -100)
    targets[:, length::2] = asked[:, 1::2]
    return tokens.to(device), targets.to(device)


def retrieve(model: str, seed: int, size: layer_swap.Size, steps: int, tests: int, device: torch.device) -> Any:
    """A job: train on recall, then test further out."""
    torch.manual_seed(seed)
    config = dataclasses.replace(layer_swap.config_of(model, size), vocab_size=KEYS + VALUES + NOISE)
    lm = HybridLM(config).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(param_groups(lm, 0.1), lr=2e-3, betas=(0.9, 0.95))
    losses: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50, 0.05 + 1.5 * (1 - step / steps))
        pairs = 1 + step % PAIRS
        tokens, targets = recall(32, pairs, RECALL_LENGTH, generator, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=size.bf16):
            loss = lm.loss(tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 9:
            yield step / steps, f"loss {sum(losses[-20:]) / len(losses[-20:]):.3f}"
    row: dict[str, Any] = dict(probe="recall", model=model, seed=seed, steps=steps, train_length=RECALL_LENGTH)
    for name, pairs in (("mqar", PAIRS), ("needle", 1)):
        row[name] = {t: accuracy(lm.eval(), pairs, t * RECALL_LENGTH, tests, size.bf16, device) for t in TIMES}
    row["summary"] = "MQAR {}, needle {}, at 1, 4, 16 times the training length".format(
        *(" / ".join(f"{x:.0%}" for x in row[name].values()) for name in ("mqar", "needle"))
    )
    return row


@torch.no_grad()
def accuracy(lm: HybridLM, pairs: int, length: int, tests: int, bf16: bool, device: torch.device) -> float:
    """Share of queries answered right, on sequences that no training seed draws."""
    generator = torch.Generator().manual_seed(10**6)
    right, asked = 0, 0
    for start in range(0, tests, 50):
        tokens, targets = recall(min(50, tests - start), pairs, length, generator, device)
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
        table = Table(title=f"retrieval in %, at 1, 4 and 16 times the training length ({RECALL_LENGTH})")
        for column in ("model", "seed", *(f"{name} ×{t}" for name in ("MQAR", "needle") for t in TIMES)):
            table.add_column(column, justify="left" if column == "model" else "right")
        for row in probes:
            cells = [f"{100 * x:.1f}" for name in ("mqar", "needle") for x in row[name].values()]
            table.add_row(row["model"], str(row["seed"]), *cells)
        console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    made, axes = recipes.figure(3, width=4.4)
    names = list(dict.fromkeys(row["model"] for row in rows))
    for row in rows:
        colour = f"C{names.index(row['model'])}"
        label = row["model"] if row["seed"] == 0 else None
        if row["probe"] == "position":
            axes[0].plot(SPANS, row["bits"], marker="o", color=colour, label=label)
        else:
            for axis, name in zip(axes[1:], ("mqar", "needle"), strict=True):
                axis.plot([f"×{t}" for t in TIMES], list(row[name].values()), marker="o", color=colour, label=label)
    axes[0].set(title="loss by position", xlabel="up to times the training length", ylabel="bits per byte")
    for axis, title in zip(axes[1:], (f"MQAR, {PAIRS} pairs", "needle"), strict=True):
        axis.set(title=title, xlabel="times the training length", ylabel="right answers", ylim=(-0.03, 1.03))
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="x-small")
    recipes.save_figure(made, path)


PRESETS = {
    "cpu": "the models of layer_swap.py's preset of this name; recall for 60 steps: shows the way; under 5 minutes",
    "h200": "the same with 20M parameters; recall for 1500 steps; on one GPU: --probe and --only pick, --minutes ends",
    "cpu-long": "the same with 1M parameters; recall for 600 steps; about an hour on 2 cores",
}
RECALL_STEPS = {"cpu": 60, "h200": 1500, "cpu-long": 600}


def main(argv: list[str] | None = None) -> int:
    parser = recipes.parser("long_context", __doc__ or "", PRESETS)
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="of layer_swap.py (default: train afresh)")
    parser.add_argument("--probe", choices=("position", "recall"), help="only this one")
    args = parser.parse_args(argv)
    console = Console()
    if args.from_record is None:
        rows = measure(args, console)
    else:
        rows = [row for file in args.from_record for row in recipes.read_record(file)[1]]
    tables(rows, console)
    if rows and args.plot is not None:
        plot(rows, args.plot)
    return 0


def measure(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    device = recipes.device_of(args.preset, console)
    size = layer_swap.SIZES[args.preset]
    size = layer_swap.scaled(size, args.steps)
    steps = max(1, round(RECALL_STEPS[args.preset] * args.steps))
    tests = max(2, round(min(1, args.steps) * 200))
    record = recipes.Record(args.out, "long-context", device, preset=args.preset)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        weights = args.weights or Path(folder)
        jobs: list[tuple[str, Any]] = []
        if args.probe != "recall":
            data = layer_swap.load_text(size.text, size.held_out)
            windows = max(1, round(min(1, args.steps) * (8 if device.type == "cpu" else 32)))
            jobs += [
                (f"{model}, seed {seed}", partial(read_long, model, seed, size, data, device, weights, windows))
                for model, seed in layer_swap.runs(layer_swap.MODELS, args.seeds or [0], args.only)
            ]
        if args.probe != "position":
            jobs += [
                (f"recall, {model}, seed {seed}", partial(retrieve, model, seed, size, steps, tests, device))
                for model, seed in layer_swap.runs(layer_swap.MODELS, args.seeds or [0], args.only)
            ]
        deadline = None if args.minutes is None else started + 60 * args.minutes
        left_out = recipes.run_jobs(jobs, record, console, device, concurrent=1, deadline=deadline)
    record.close(seconds=round(time.monotonic() - started, 1), left_out=left_out)
    return record.rows


if __name__ == "__main__":
    sys.exit(main())
