# SPDX-License-Identifier: Apache-2.0
"""``python -m m2rnn_compile models``: the presets as a table, or one of them in detail (rich)."""

from __future__ import annotations

import argparse
import dataclasses
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cli import UserError
from .models.config import LMConfig
from .models.mixers import MIXERS
from .models.presets import PRESETS, preset
from .models.statistics import statistics


def short_pattern(pattern: str) -> str:
    """Runs of a letter with their length: "4G A 7G"."""
    runs = [(letter, len(list(run))) for letter, run in groupby(pattern)]
    return " ".join(letter if n == 1 else f"{n}{letter}" for letter, n in runs)


def run_models(args: argparse.Namespace, console: Console) -> int:
    """List the presets, or describe the one named by ``args.name``."""
    if args.name is None:
        console.print(presets_table(args.context))
        letters = ", ".join(f"{letter} = {mixer.title}" for letter, mixer in MIXERS.items())
        console.print(f"[dim]{letters}. Details: python -m m2rnn_compile models NAME[/]", soft_wrap=True)
        return 0
    try:
        config = preset(args.name)
    except ValueError as error:
        raise UserError(str(error)) from error
    console.print(details(args.name, config, args.context))
    return 0


def presets_table(context: int) -> Table:
    """One row a preset, narrow enough for 80 columns."""
    table = Table(title=f"Presets. FLOPs: forward, at {context:,} tokens of context", box=SIMPLE_HEAD)
    table.add_column("name\n[dim]pattern[/]")
    for column in ("parameters\n[dim]active[/]", "state a stream\n[dim]+ a token[/]", "GFLOPs\n[dim]a token[/]"):
        table.add_column(column, justify="right", no_wrap=True)
    size = None
    for name, config in PRESETS.items():
        if size not in (None, config.hidden_size):
            table.add_section()
        size = config.hidden_size
        s = statistics(config, context=context)
        table.add_row(
            f"[bold]{name}[/]\n[dim]{short_pattern(config.pattern)}[/]",
            f"{s.parameters:,}\n[dim]{s.active_parameters:,}[/]",
            f"{s.state_bytes / 2**20:.2f} MiB\n[dim]{s.bytes_per_token / 2**10:.1f} KiB[/]",
            f"{s.flops_per_token / 1e9:.3f}",
        )
    return table


def details(name: str, config: LMConfig, context: int) -> Table:
    """Everything about one model."""
    s = statistics(config, context=context)
    table = Table(title=escape(name), show_header=False)
    table.add_column(style="dim")
    table.add_column()
    table.add_row("pattern", config.pattern)
    table.add_row("width, vocabulary", f"{config.hidden_size:,}, {config.vocab_size:,}")
    for letter in sorted(set(config.pattern)):
        mixer = MIXERS[letter]
        options = dataclasses.asdict(getattr(config, mixer.field))
        given = ", ".join(f"{key} {value}" for key, value in options.items() if value is not None)
        table.add_row(f"{letter}: {config.pattern.count(letter)} × {mixer.title}", escape(given))
        if letter in s.state_elements:
            table.add_row("", f"state of {s.state_elements[letter]:,} elements in fp32")
    if config.moe is None:
        table.add_row("MLP", f"SwiGLU {config.mlp_size:,}")
    else:
        m = config.moe
        table.add_row(
            "MLP", f"{m.num_experts} experts of {m.expert_size}, top {m.top_k}, shared expert {m.shared_size}"
        )
    table.add_row("parameters", f"{s.parameters:,} (embeddings tied), {s.active_parameters:,} active")
    total = s.state_bytes + context * s.bytes_per_token
    table.add_row(
        "state a stream",
        f"{s.state_bytes:,} bytes + {s.bytes_per_token:,} a token = {total / 2**20:.1f} MiB at {context:,} tokens",
    )
    table.add_row("FLOPs a token", f"{s.flops_per_token / 1e9:.3f} G forward at {context:,} tokens of context")
    return table
