# SPDX-License-Identifier: Apache-2.0
"""The single-layer swap: language models over bytes of real text and code, alike but for their sequence mixers.

    python examples/layer_swap.py --preset cpu
    python examples/layer_swap.py --preset h200 --out bench/results/reproduction/layer-swap-h200.jsonl

Hybrid Gated DeltaNet with and without M²RNN in layer 0 are the decisive pair. All models see the same bytes in the same
order and have the same number of parameters (the MLP's width makes up for the mixers). The text is what this machine
has: Python's library, installed packages and documentation, without duplicates, whole packages held out.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import recipes
import torch
from rich.console import Console
from rich.table import Table

from m2rnn_compile.models import AttentionConfig, GatedDeltaNetConfig, HybridLM, LMConfig, M2RNNConfig, expand
from m2rnn_compile.models.data import SEPARATOR, ByteData
from m2rnn_compile.models.train import TrainConfig, Trainer, bits_per_byte

SUFFIXES = (".py", ".md", ".rst", ".txt")
PACKAGE_BYTES = 2_000_000  # of one package at most, so that no large one is half of the text

# -- the text ----------------------------------------------------------------------------------------------------------


def packages() -> dict[str, list[Path]]:
    """Files of text by package: folders (and single modules) of Python's library, of site-packages and of the docs."""
    found: dict[str, list[Path]] = {}
    for room in ("stdlib", "purelib"):
        root = Path(sysconfig.get_path(room))
        for top in sorted(root.iterdir()) if root.is_dir() else ():
            if top.name in ("site-packages", "dist-packages", "test", "__pycache__") or top.is_symlink():
                continue
            name = top.name.removesuffix(".py").split("-")[0].lower()  # a package and its .dist-info belong together
            files = sorted(top.rglob("*")) if top.is_dir() else [top]
            found.setdefault(name, []).extend(f for f in files if f.suffix in SUFFIXES and f.is_file())
    return {name: files for name, files in found.items() if files}


def load_text(limit: int, held_out_bytes: int) -> ByteData:
    """Up to `limit` bytes of training text, and held-out packages; which ones depends on their names' hashes only."""
    seen: set[bytes] = set()
    parts: dict[bool, dict[str, bytes]] = {True: {}, False: {}}
    room = {True: held_out_bytes, False: limit}
    rank = lambda name: hashlib.sha256(name.encode()).digest()
    for package, files in sorted(packages().items(), key=lambda item: rank(item[0])):
        held_out = rank(package)[-1] < 26  # one package in ten
        left = min(PACKAGE_BYTES, room[held_out])
        for file in files:
            if left < 200:
                break
            try:
                content = file.read_bytes()
                content.decode()
            except (OSError, UnicodeDecodeError):
                continue
            digest = hashlib.sha256(b"".join(content.split())).digest()  # blind to white space
            if not 200 <= len(content) <= left or SEPARATOR in content or digest in seen:
                continue
            seen.add(digest)
            parts[held_out][f"{package}/{file.name}"] = content
            left -= len(content)
            room[held_out] -= len(content)
    join = lambda texts: torch.frombuffer(bytearray(b"\0" + b"\0".join(texts) + b"\0"), dtype=torch.uint8)
    fingerprint = hashlib.sha256(b"".join(sorted(seen))).hexdigest()
    train, held = parts[False], parts[True]
    return ByteData(join(train.values()), join(held.values()), tuple(train), tuple(held), (), fingerprint)


# -- the models --------------------------------------------------------------------------------------------------------


class Size(NamedTuple):
    """Of the models of a preset, and of their training."""

    layers: int
    attention: str  # which layers are attention, as a rule
    width: int
    parameters: int
    m2rnn: M2RNNConfig
    deltanet: GatedDeltaNetConfig
    attention_heads: int
    steps: int
    batch_size: int
    seq_len: int
    text: int
    held_out: int
    bf16: bool = False
    compile: bool = False
    learning_rate: float = 3e-3


SIZES = {
    "cpu": Size(
        4, "A at 2", 96, 500_000, M2RNNConfig(num_heads=8, key_dim=16), GatedDeltaNetConfig(2, 24, 48), 4,
        steps=90, batch_size=4, seq_len=256, text=4_000_000, held_out=60_000,
    ),
    "cpu-long": Size(
        4, "A at 2", 128, 1_000_000, M2RNNConfig(num_heads=10, key_dim=16), GatedDeltaNetConfig(2, 32, 64), 4,
        steps=1000, batch_size=8, seq_len=256, text=12_000_000, held_out=250_000,
    ),
    "h200": Size(
        12, "A every 8 from 4", 384, 20_000_000, M2RNNConfig(num_heads=32), GatedDeltaNetConfig(2, 96, 192), 6,
        steps=300, batch_size=64, seq_len=1024, text=60_000_000, held_out=1_000_000, bf16=True, compile=True,
    ),
}  # fmt: skip
MODELS = {
    "hybrid gated deltanet": "{n}G, {A}",
    "hybrid gated deltanet + 1 m2rnn": "{n}G, {A}, M at 0",
    "hybrid m2rnn": "{n}M, {A}",
    "m2rnn": "{n}M",
    "gated deltanet": "{n}G",
    "softmax attention": "{n}A",
}
DECISIVE = tuple(MODELS)[:2]


def text_for(size: Size) -> ByteData:
    """The text of a preset.

    Raises:
        Refused: there is less than a batch to train on, or less held out than long_context.py reads in one piece.
    """
    data = load_text(size.text, size.held_out)
    for kind, text, least in (
        ("train on", data.train, size.batch_size * size.seq_len),
        ("hold out", data.held_out, 16 * size.seq_len),
    ):
        if len(text) <= least:
            raise recipes.Refused(
                f"Python's library and packages have {len(text)} bytes to {kind} here, expected more than {least}; "
                f"run it with a Python that has its library and packages as files"
            )
    return data


def config_of(model: str, size: Size) -> LMConfig:
    """The model's config, its MLP as wide as the number of parameters allows."""
    pattern = expand(MODELS[model].format(n=size.layers, A=size.attention))
    rope = 10_000.0 if set(pattern) == {"A"} else None  # only the transformer knows positions, as in the paper
    config = LMConfig(
        256, size.width, pattern, 8, size.m2rnn, AttentionConfig(size.attention_heads, rope_theta=rope),
        gated_deltanet=size.deltanet,
    )  # fmt: skip
    count = lambda width: HybridLM(dataclasses.replace(config, mlp_size=width), device="meta").num_parameters()
    at_8, each = count(8), count(9) - count(8)
    return dataclasses.replace(config, mlp_size=max(8, 8 + (size.parameters - at_8) // each // 8 * 8))


# -- training ----------------------------------------------------------------------------------------------------------


def train(
    model: str, seed: int, size: Size, data: ByteData, device: torch.device, folder: Path, weights: Path | None = None
) -> Any:
    """A job for `recipes.run_jobs`."""
    config = config_of(model, size)
    options = TrainConfig(
        steps=size.steps, batch_size=size.batch_size, seq_len=size.seq_len, learning_rate=size.learning_rate,
        warmup=max(1, min(50, size.steps // 10)), seed=seed, compile=size.compile, device=device.type,
        precision="bf16" if size.bf16 else "fp32", threads=torch.get_num_threads(),
    )  # fmt: skip
    yield 0.0, "building"
    trainer = Trainer(config, options, data, folder)
    seconds = []
    losses: list[float] = []
    for step in range(size.steps):
        done = trainer.train_step()
        seconds.append(done.seconds)
        losses.append(done.loss)
        if step % 10 == 9 or step == size.steps - 1:
            yield (step + 1) / size.steps, f"loss {sum(losses[-20:]) / len(losses[-20:]):.3f}"
    bits, counted = bits_per_byte(trainer.model, data.held_out, seq_len=size.seq_len)
    if weights is not None:
        state = dict(of=made_by(model, size), state=trainer.model.state_dict())
        recipes.save_weights(state, weights / f"{model}, seed {seed}.pt")
    steady = sorted(seconds[min(5, len(seconds) // 2) :])
    rate = size.batch_size * size.seq_len / steady[len(steady) // 2]
    return dict(
        model=model, seed=seed, pattern=config.pattern, parameters=trainer.model.num_parameters(),
        mlp_size=config.mlp_size, steps=size.steps, tokens=size.steps * size.batch_size * size.seq_len,
        seq_len=size.seq_len, held_out_bytes=counted, bits_per_byte=round(bits, 5), tokens_per_s=round(rate),
        seconds=round(sum(seconds), 1), loss=[round(x, 4) for x in losses[:: max(1, size.steps // 100)]],
        summary=f"{bits:.4f} bits per byte, {rate:,.0f} tokens/s",
    )  # fmt: skip


def made_by(model: str, size: Size) -> dict[str, Any]:
    """What weights depend on, besides their seed and the text."""
    training = ("seq_len", "steps", "batch_size", "learning_rate")
    return {name: getattr(size, name) for name in training} | dict(config=config_of(model, size).to_dict())


def runs(
    models: dict[str, str], seeds: list[int] | None, patterns: list[re.Pattern[str]] | None
) -> Iterator[tuple[str, int]]:
    """(model, seed): two seeds of the decisive models, one of the others, or those that were asked for."""
    for seed in seeds or [0, 1]:
        for model in models:
            wanted = recipes.matches(model, patterns)
            if wanted and (seed == 0 or model in DECISIVE or seeds is not None):
                yield model, seed


def table_of(rows: list[dict[str, Any]], console: Console) -> None:
    """Mean and spread over seeds."""
    table = Table(title="held-out bits per byte")
    for column in ("model", "pattern", "parameters", "bits per byte", "of each seed", "tokens/s"):
        table.add_column(column, justify="left" if column in ("model", "pattern") else "right")
    for model in dict.fromkeys(row["model"] for row in rows):
        of = [row for row in rows if row["model"] == model]
        bits = [row["bits_per_byte"] for row in of]
        each = ", ".join(f"{b:.4f}" for b in bits)
        rate = f"{sum(row['tokens_per_s'] for row in of) / len(of):,.0f}"
        count = f"{of[0]['parameters']:,}"
        table.add_row(model, of[0]["pattern"], count, f"{sum(bits) / len(bits):.4f}", each, rate)
    console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bits per byte of every run, and the loss over training."""
    made, (left, right) = recipes.figure(2, width=5.6)
    for i, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        of = [row for row in rows if row["model"] == model]
        left.plot([row["bits_per_byte"] for row in of], [i] * len(of), "o", color=f"C{i}")
        every = of[0]["steps"] / len(of[0]["loss"])
        smooth = _smooth(of[0]["loss"])
        right.plot([j * every for j in range(len(smooth))], smooth, color=f"C{i}", label=model, linewidth=1.2)
    names = list(dict.fromkeys(row["model"] for row in rows))
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.grid(alpha=0.3)
    left.set(xlabel="held-out bits per byte, one point a seed")
    right.set(xlabel="step", ylabel="training loss, nats per byte")
    right.legend(fontsize="x-small")
    right.grid(alpha=0.3)
    recipes.save_figure(made, path)


def _smooth(values: list[float]) -> list[float]:
    kept: list[float] = []
    for x in values:
        kept.append(x if not kept else 0.8 * kept[-1] + 0.2 * x)
    return kept


def main(argv: list[str] | None = None) -> int:
    parser = recipes.parser("layer_swap", __doc__ or "", {
        "cpu": "0.5M parameters, 4 layers, 0.1M bytes: shows the way, says nothing; under 5 minutes on 2 cores",
        "h200": "20M parameters, 12 layers, 20M bytes, bf16, compiled; minutes a run on one GPU: use --only, --minutes",
        "cpu-long": "1M parameters, 4 layers, 2M bytes; about an hour on 2 cores",
    })  # fmt: skip
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="save the models there, for long_context.py")
    return recipes.main(parser, argv, "layer-swap", measure, table_of, plot)


def scaled(size: Size, factor: float) -> Size:
    """`factor` times the steps; shortened runs are tested on less text, too."""
    held_out = max(20_000, round(min(1, factor) * size.held_out))
    return size._replace(steps=max(1, round(size.steps * factor)), held_out=held_out)


def measure(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    wanted = [(f"{model}, seed {seed}", model, seed) for model, seed in runs(MODELS, args.seeds, args.only)]
    if recipes.listed([title for title, *_ in wanted], args, console):
        return []
    device = recipes.device_of(args.preset)
    size = scaled(SIZES[args.preset], args.steps)
    data = text_for(size)
    console.print(
        f"{len(data.train) / 1e6:.1f} MB of {len(data.train_files)} files to train on, "
        f"{len(data.held_out) / 1e6:.2f} MB of {len(data.held_out_files)} files in other packages held out"
    )
    text = dict(train_bytes=len(data.train), held_out_bytes=len(data.held_out), fingerprint=data.fingerprint)
    sizes = json.loads(json.dumps(size._asdict(), default=dataclasses.asdict))
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            (title, partial(train, model, seed, size, data, device, Path(folder), args.weights))
            for title, model, seed in wanted
        ]
        return recipes.measure(args, console, "layer-swap", device, jobs, text=text, size=sizes)


if __name__ == "__main__":
    sys.exit(main())
