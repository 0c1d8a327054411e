# SPDX-License-Identifier: Apache-2.0
"""``python -m m2rnn_compile train``; the arguments are in ``__main__``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from .cli import UserError, need_compiler
from .models.checkpoint import CHECKPOINTS, list_steps, load
from .models.config import LMConfig
from .models.corpus import Corpus, load_corpus
from .models.display import TrainingView, duration
from .models.presets import miniature, preset
from .models.train import TrainConfig, Trainer, bits_per_byte, stop_on_signals
from .models.weights import save_model
from .models_command import short_pattern
from .text import MODEL, RUN, keep_tokenizer

RUNS = Path("runs")
MINIATURE_WIDTH = 128
# Given with --resume, these must be what the run was started with; so they are stored in its run.json.
FIXED = ["preset", "miniature", "layers", "data", "tokenizer", "end_token", "steps", "batch_size", "seq_len"]
FIXED += ["grad_accumulation", "learning_rate", "warmup", "checkpoint_every", "precision", "no_packing", "device"]
FIXED += ["eager", "seed", "threads"]
MOVABLE = ("data", "tokenizer")  # may lie elsewhere later: the checkpoint has a hash of what is in them
DEFAULTS: dict[str, Any] = dict(
    steps=1000,
    batch_size=8,
    seq_len=512,
    grad_accumulation=1,
    learning_rate=3e-4,
    checkpoint_every=200,
    seed=0,
    threads=2,
)


def run_train(args: argparse.Namespace, console: Console) -> int:
    """Train to the end, or until Ctrl-C; see ``--help``."""
    started = time.perf_counter()
    out = _folder(args)
    options = _resumed(args, out) if args.resume else _new(args)
    if not options["eager"] and options["device"] == "cpu":
        need_compiler()
    trainer = _trainer(options, out)
    if args.resume:
        trainer.resume()
    _create(out, options)  # of a resumed run too: its data may have moved
    _print_start(console, trainer, options)
    unit = "byte" if options["tokenizer"] is None else "token"
    with stop_on_signals() as stop, TrainingView(console, trainer.config, trainer.step, unit) as view:
        finished = trainer.run(view.on_step, stop=stop)
    if not finished:
        console.print(
            f"[bold]stopped[/] after step {trainer.step} of {trainer.config.steps}; nothing is lost. Go on with\n"
            f"  python -m m2rnn_compile train --resume --out {escape(str(out))}",
            soft_wrap=True,
        )
        return 130
    save_model(trainer.model, out / MODEL)
    keep_tokenizer(out / MODEL, options["tokenizer"], options["end_token"])
    _print_end(console, trainer, time.perf_counter() - started)
    return 0


# -- options -----------------------------------------------------------------------------------------------------------


def _folder(args: argparse.Namespace) -> Path:
    if args.resume:
        if args.out is None:
            raise UserError("--resume needs --out, the folder of the run to go on with")
        return Path(args.out)
    # With the process's number: runs of a sweep begin in the same second.
    own = RUNS / f"{time.strftime('train-%Y%m%d-%H%M%S')}-{os.getpid()}"
    out = own if args.out is None else Path(args.out)
    if list_steps(out / CHECKPOINTS):
        raise UserError(f"{str(out)!r} already holds a run; go on with it by --resume, or give another --out")
    return out


def _new(args: argparse.Namespace) -> dict[str, Any]:
    """All options of a new run, defaults filled in."""
    for name in ("preset", "data"):
        if getattr(args, name) is None:
            raise UserError(f"--{name} is needed to start a run (or --resume --out DIR to go on with one)")
    if args.end_token is not None and args.tokenizer is None:
        raise UserError(f"--end-token {args.end_token!r} names a token of a --tokenizer, and none was given")
    options = {name: getattr(args, name) for name in FIXED}
    for name, value in DEFAULTS.items():
        if options[name] is None:
            options[name] = value
    if options["device"] is None:
        options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if options["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu")
    options["precision"] = options["precision"] or ("bf16" if options["device"] == "cuda" else "fp32")
    options["warmup"] = options["warmup"] or max(1, options["steps"] // 10)
    options["checkpoint_every"] = min(options["checkpoint_every"], options["steps"])
    for name in MOVABLE:
        options[name] = _absolute(options[name])
    return options


def _absolute(paths: Any) -> Any:
    """One path, several or none, as run.json has them. Links stay: their names are the documents'."""
    if isinstance(paths, list):
        return [_absolute(p) for p in paths]
    return None if paths is None else str(Path(paths).absolute())


def _check_names(old: list[str], new: list[str]) -> None:
    """Refuse data elsewhere whose documents have other names for certain; the content is compared later."""
    names = [[Path(os.path.abspath(p)).name for p in paths] for paths in (old, new)]
    if names[0] != names[1]:
        was, now = (", ".join(map(repr, n)) for n in names)
        raise UserError(
            f"--data: the last part of each path belongs to the documents' names; it was {was}, and is {now} now. "
            "Rename it back, or give a link of that name (ln -s), in the same order"
        )


def _resumed(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Options of the run in `out`; given ones that would change its course are refused."""
    load(out)  # says what is wrong with the folder, if anything
    try:
        options: dict[str, Any] = json.loads((out / RUN).read_text())
        missing = [name for name in FIXED if name not in options]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{str(out / RUN)!r} is missing or damaged ({error}); start afresh in another folder"
        ) from error
    if missing:
        raise UserError(f"{str(out / RUN)!r} is not of `train` (no {missing[0]!r}); was it `demo` that made this run?")
    for name in FIXED:
        given = getattr(args, name)
        if name in MOVABLE and given is not None and options[name] is not None:
            if name == "data":
                _check_names(options[name], given)
            options[name] = _absolute(given)
            continue
        if given is not None and given is not False and given != options[name]:  # seed 0 is given, and equals False
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{option} {given} cannot be combined with --resume: the run was started with {options[name]}; leave "
                "it out, or start afresh"
            )
    for name, paths in (("data", options["data"]), ("tokenizer", [options["tokenizer"]])):
        gone = [p for p in paths if p is not None and not Path(p).exists()]
        if gone:
            raise UserError(
                f"the run's {name} {gone[0]!r} does not exist here; give the place where it is now as --{name} (the "
                "content must be the same)"
            )
    if options["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"the run in {str(out)!r} was started with --device cuda, and torch sees no CUDA device here; go on where "
            "there is one, or start afresh with --device cpu"
        )
    return options


def _trainer(options: dict[str, Any], out: Path) -> Trainer:
    corpus = load_corpus(options["data"], tokenizer=options["tokenizer"], end_token=options["end_token"])
    model = _model_config(options, corpus)
    config = TrainConfig(
        compile=not options["eager"],
        packed=not options["no_packing"],
        **{name: options[name] for name in (*DEFAULTS, "warmup", "precision", "device")},
    )
    if len(corpus.train) <= config.seq_len:
        raise UserError(
            f"the training text holds {len(corpus.train)} tokens in all, fewer than one row of {config.seq_len + 1}; "
            "give more text, or a shorter --seq-len"
        )
    return Trainer(model, config, corpus, out)


def _model_config(options: dict[str, Any], corpus: Corpus) -> LMConfig:
    try:
        config = preset(options["preset"])
    except ValueError as error:
        raise UserError(str(error)) from error
    if options["miniature"]:
        config = miniature(config, hidden_size=MINIATURE_WIDTH, vocab_size=corpus.vocab_size)
    elif options["tokenizer"] is None:
        config = dataclasses.replace(config, vocab_size=corpus.vocab_size)
    elif corpus.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {corpus.vocab_size:,} tokens, {options['preset']} an embedding of "
            f"{config.vocab_size:,}; use the tokenizer of the released models, or --miniature"
        )
    if options["layers"] is not None:
        if options["layers"] > config.num_layers:
            raise UserError(f"--layers {options['layers']}: {options['preset']} has only {config.num_layers} here")
        config = dataclasses.replace(config, pattern=config.pattern[: options["layers"]])
    return config


def _create(out: Path, options: dict[str, Any]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        partial = out / f".partial-{RUN}"
        partial.write_text(json.dumps(options, indent=1) + "\n")
        os.replace(partial, out / RUN)
    except OSError as error:
        raise UserError(f"cannot write to the folder {str(out)!r}: {error.strerror}; give another --out") from error


# -- what is shown -----------------------------------------------------------------------------------------------------


def _print_start(console: Console, trainer: Trainer, options: dict[str, Any]) -> None:
    data, config, model = trainer.data, trainer.config, trainer.model_config
    assert isinstance(data, Corpus)
    unit = "bytes" if options["tokenizer"] is None else f"tokens of {Path(options['tokenizer']).name}"
    table = Table.grid(padding=(0, 2))
    table.add_row("[dim]training[/]", f"{len(data.train_files):,} documents, {len(data.train):,} {unit}")
    table.add_row("[dim]held out[/]", f"{len(data.held_out_files):,} documents, {len(data.held_out):,} {unit}")
    unused = [s for s in data.skipped if s.reason != "empty"]
    if unused:
        more = f", and {len(unused) - 2} more" if len(unused) > 2 else ""
        named = ", ".join(f"{s.path} ({s.reason})" for s in unused[:2])
        table.add_row("[dim]skipped[/]", escape(named + more))
    scaled = ", scaled down" if options["miniature"] else ""
    table.add_row(
        "[dim]model[/]",
        f"{options['preset']}{scaled}: {short_pattern(model.pattern)}, width {model.hidden_size}, "
        f"{trainer.model.num_parameters():,} parameters",
    )
    mode = "torch.compile(fullgraph=True)" if config.compile else "eager"
    packed = "packed documents" if config.packed else "documents run on"
    table.add_row(
        "[dim]steps[/]",
        f"{config.steps:,} of {config.grad_accumulation} × {config.batch_size} × {config.seq_len} tokens, {packed}",
    )
    table.add_row("[dim]how[/]", f"{config.device}, {config.precision}, {mode}, seed {config.seed}")
    table.add_row("[dim]folder[/]", escape(str(trainer.out)))
    title = f"resuming at step {trainer.step}" if trainer.step else "training"
    console.print(Panel(table, title=title, expand=False))


def _print_end(console: Console, trainer: Trainer, seconds: float) -> None:
    data = trainer.data
    assert isinstance(data, Corpus)
    with console.status("scoring the held-out documents ..."):
        bits, counted = bits_per_byte(
            trainer.model,
            data.held_out,
            seq_len=trainer.config.seq_len,
            batch_size=min(16, trainer.config.batch_size),  # what fitted while training fits here
            separator=data.separator,
        )
    per_byte = bits / data.bytes_per_token
    console.print(
        Panel(
            f"held out: {bits * math.log(2):.4f} nats a token over {counted:,}, {per_byte:.4f} bits a byte\n"
            f"model: [bold]{escape(str(trainer.out / MODEL))}[/] (models.weights.load_model, or transformers)",
            title=f"done in {duration(seconds)}",
            expand=False,
        )
    )
