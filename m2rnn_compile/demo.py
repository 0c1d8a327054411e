# SPDX-License-Identifier: Apache-2.0
"""The commands demo, generate and check-export; the arguments are in ``__main__``."""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import os
import subprocess
import sys
import sysconfig
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .cli import UserError, need_compiler
from .models import AttentionConfig, HybridLM, LMConfig, M2RNNConfig, stream, weights
from .models.checkpoint import CHECKPOINTS, CheckpointError, list_steps, load, restore_model
from .models.data import SEPARATOR, ByteData, DataError, load_folder
from .models.display import TrainingView, duration
from .models.train import TrainConfig, Trainer, bits_per_byte, stop_on_signals
from .models.weights import CONFIG
from .text import RUN, ByteText, TokenText, to_tokens, tokenizer_of

MODEL = LMConfig(
    vocab_size=256,
    hidden_size=128,
    pattern="MMAM",
    mlp_size=256,
    m2rnn=M2RNNConfig(num_heads=8, key_dim=32, value_dim=16),
    attention=AttentionConfig(num_heads=4),
)
STEPS = 1100
HELD_OUT_BYTES = 250_000
RUNS = Path("runs")
EXPORTED, EXPECTED = "model.pt2", "expected.safetensors"
PROMPT = "class Reader:\n    def __init__(self, path, encoding=None):\n"


# -- demo ------------------------------------------------------------------------------------------------------------


def run_demo(args: argparse.Namespace, console: Console) -> int:
    """Train, score, generate, export and check; see ``--help``."""
    if not args.eager:
        need_compiler()
    started = time.perf_counter()
    out = _run_folder(args)
    trainer = _start(args, console, out)
    first = trainer.step
    config = trainer.config
    with stop_on_signals() as stop, TrainingView(console, config, first) as view:
        finished = trainer.run(view.on_step, stop=stop)
    if not finished:
        console.print(
            f"[bold]stopped[/] after step {trainer.step} of {config.steps}; nothing is lost. Go on with\n"
            f"  python -m m2rnn_compile demo --resume --out {escape(str(out))}",
            soft_wrap=True,
        )
        return 130
    trainer.model.eval()
    _print_scores(console, trainer)
    _print_continuation(console, trainer)
    agrees = _export_and_check(console, trainer, out)
    files = f"checkpoint, log and exported model are in [bold]{escape(str(out))}[/]"
    again = f"python -m m2rnn_compile generate {escape(str(out))} --prompt 'import '"
    verdict = "[green]all well[/]" if agrees else "[bold red]the exported model disagrees[/]"
    took = duration(time.perf_counter() - started)
    console.print(Panel(f"{verdict} in {took}; {files}\n{again}", title="done", expand=False))
    return 0 if agrees else 1


def _run_folder(args: argparse.Namespace) -> Path:
    """The folder of this run: as given, the newest to resume, or a new one. Never one that would be overwritten."""
    if args.resume:
        if args.out is not None:
            return Path(args.out)
        runs = [p for p in RUNS.glob("demo-*") if list_steps(p / CHECKPOINTS)]
        if not runs:
            raise UserError(
                f"nothing to resume: no run with a checkpoint below {str(RUNS)!r}; start one without --resume, "
                "or give --out"
            )
        return max(runs, key=lambda p: p.stat().st_mtime)
    out = RUNS / time.strftime("demo-%Y%m%d-%H%M%S") if args.out is None else Path(args.out)
    if list_steps(out / CHECKPOINTS):
        raise UserError(f"{str(out)!r} already holds a run; go on with it by --resume, or give another --out")
    return out


def _create(out: Path, source: str | None) -> None:
    """Make the folder of a new run and note where its data is."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / RUN).write_text(json.dumps({"data": source}) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to the folder {str(out)!r}: {error.strerror}; give another --out") from error


def _start(args: argparse.Namespace, console: Console, out: Path) -> Trainer:
    """A trainer at its first step, or where the checkpoint left it."""
    if args.resume:
        model_config, config, source = _saved_run(out, args)
    else:
        threads = args.threads or min(2, os.cpu_count() or 1)
        steps = args.steps or STEPS
        config = TrainConfig(
            steps=steps,
            batch_size=8,
            seq_len=256,
            learning_rate=6e-3,
            warmup=50,
            checkpoint_every=min(200, steps),
            seed=args.seed or 0,
            threads=threads,
            compile=not args.eager,
        )
        model_config, source = MODEL, args.data
    data = _load_data(source)
    if len(data.train) <= config.seq_len:
        raise DataError(
            f"the training files hold {len(data.train)} bytes in all, fewer than one window of "
            f"{config.seq_len + 1}; give more text"
        )
    trainer = Trainer(model_config, config, data, out)
    if args.resume:
        trainer.resume()
    else:
        source = None if source is None else str(Path(source).resolve())
        _create(out, source)
        if args.minutes is not None:
            with console.status("compiling, then timing a step ..."):
                # A tenth for what is not forward and backward: optimizer, data, display.
                steps = max(1, round(args.minutes * 60 / (1.1 * trainer.seconds_per_step())))
            trainer.config = replace(config, steps=steps, checkpoint_every=max(1, min(200, steps)))
    _print_start(console, trainer, source)
    return trainer


def _saved_run(out: Path, args: argparse.Namespace) -> tuple[LMConfig, TrainConfig, str | None]:
    """Configs and data path of the run in `out`; options that would change its course are refused."""
    saved = load(out)
    try:
        model_config = LMConfig.from_dict(saved.state["model"])
        values = dict(saved.state["train"])
        config = TrainConfig(**(values | {"betas": tuple(values["betas"])}))
        HybridLM(model_config, device="meta")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {str(saved.path)!r} holds no usable config: {error}; start afresh with another --out"
        ) from error
    given = {
        "--steps": (args.steps, config.steps),
        "--seed": (args.seed, config.seed),
        "--threads": (args.threads, config.threads),
    }
    for option, (new, old) in given.items():
        if new is not None and new != old:
            raise UserError(
                f"{option} {new} cannot be combined with --resume: the run was started with {old}; leave it "
                "out, or start afresh"
            )
    if args.minutes is not None:
        raise UserError(
            f"--minutes cannot be combined with --resume: the run has {config.steps} steps; leave it out, or "
            "start afresh"
        )
    if args.eager == config.compile:
        raise UserError(
            f"the run was started {'without' if config.compile else 'with'} --eager; resume it so, or start afresh"
        )
    source = args.data
    if source is None:
        try:
            source = json.loads((out / RUN).read_text())["data"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{str(out / RUN)!r} is missing or damaged, so the data folder is unknown; give it as --data"
            ) from error
    return model_config, config, source


def _load_data(source: str | None) -> ByteData:
    if source is not None:
        return load_folder(source, max_held_out_bytes=HELD_OUT_BYTES)
    # The library's own tests are half of its bytes and not installed everywhere.
    return load_folder(
        sysconfig.get_path("stdlib"), suffixes=(".py",), exclude=("test",), max_held_out_bytes=HELD_OUT_BYTES
    )


def _print_start(console: Console, trainer: Trainer, source: str | None) -> None:
    data, config, model = trainer.data, trainer.config, trainer.model_config
    table = Table.grid(padding=(0, 2))
    where = f"Python {sys.version_info.major}.{sys.version_info.minor} standard library" if source is None else source
    table.add_row("[dim]text[/]", escape(where))
    table.add_row("[dim]training[/]", f"{len(data.train_files):,} files, {len(data.train) / 1e6:.2f} MB")
    table.add_row(
        "[dim]held out[/]", f"{len(data.held_out_files):,} files, {len(data.held_out) / 1e6:.2f} MB, never trained on"
    )
    unused = [s for s in data.skipped if s.reason != "empty"]
    if unused:
        named = ", ".join(f"{s.path} ({s.reason})" for s in unused[:2])
        more = f", and {len(unused) - 2} more" if len(unused) > 2 else ""
        table.add_row("[dim]skipped[/]", escape(named + more))
    table.add_row(
        "[dim]model[/]",
        f"{model.pattern} (M = M²RNN, A = attention), width {model.hidden_size}, "
        f"{trainer.model.num_parameters():,} parameters",
    )
    mode = "torch.compile(fullgraph=True)" if config.compile else "eager"
    table.add_row(
        "[dim]steps[/]",
        f"{config.steps} of {config.batch_size} × {config.seq_len} bytes, {mode}, {config.threads} threads, "
        f"seed {config.seed}",
    )
    table.add_row("[dim]folder[/]", escape(str(trainer.out)))
    title = f"resuming at step {trainer.step}" if trainer.step else "M²RNN demo"
    console.print(Panel(table, title=title, expand=False))


def _print_scores(console: Console, trainer: Trainer) -> None:
    """Held-out bits per byte, beside compressors and a unigram model on the same bytes."""
    held_out = trainer.data.held_out
    text = bytes(held_out[held_out != SEPARATOR].numpy())
    start = time.perf_counter()
    with console.status("scoring the held-out files ..."):
        ours, counted = bits_per_byte(trainer.model, held_out, seq_len=trainer.config.seq_len)
        counts = torch.bincount(trainer.data.train.long(), minlength=256).double() + 1
        log2 = (counts / counts.sum()).log2()
        unigram = -float(log2[torch.frombuffer(bytearray(text), dtype=torch.uint8).long()].mean())
        rows = [
            ("unigram (byte frequencies of the training files)", unigram),
            ("gzip -9", 8 * len(gzip.compress(text, 9)) / len(text)),
            ("xz -9", 8 * len(lzma.compress(text, preset=9)) / len(text)),
            ("this model", ours),
        ]
    table = Table(title=f"held-out text, {counted:,} bytes of {len(trainer.data.held_out_files)} files")
    table.add_column("")
    table.add_column("bits per byte", justify="right")
    table.add_column("of gzip", justify="right")
    for name, value in sorted(rows, key=lambda row: -row[1]):
        style = "bold green" if name == "this model" else ""
        table.add_row(name, f"{value:.3f}", f"{value / rows[1][1]:.0%}", style=style)
    console.print(table)
    console.print(f"[dim]scored in {time.perf_counter() - start:.1f} s[/]")


def _print_continuation(console: Console, trainer: Trainer, new_bytes: int = 300) -> None:
    prompt = to_tokens(PROMPT)
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(trainer.config.seed)
    new = [
        int(t) for t in stream(trainer.model, prompt, max_new_tokens=new_bytes, temperature=0.5, generator=generator)
    ]
    rate = len(new) / (time.perf_counter() - start)
    text = Text(PROMPT, style="dim") + Text(bytes(new).replace(bytes([SEPARATOR]), b"\n\n").decode(errors="replace"))
    console.print(Panel(text, title="a continuation", subtitle=f"cached decoder, {rate:.0f} bytes/s", expand=False))


def _export_and_check(console: Console, trainer: Trainer, out: Path) -> bool:
    """Export, then let a fresh process load the file and compare with outputs of the model in memory."""
    held_out = trainer.data.held_out.long()
    samples = [held_out[: b * t].view(b, t) for b, t in _sample_shapes(len(held_out))]
    with console.status("torch.export with dynamic batch and time ..."), torch.inference_mode():
        program = export_model(trainer.model)
        torch.export.save(program, out / EXPORTED)
        expected = {f"tokens.{i}": x.clone() for i, x in enumerate(samples)}
        expected |= {f"logits.{i}": trainer.model(x).clone() for i, x in enumerate(samples)}
        save_file(expected, out / EXPECTED)
    command = [sys.executable, "-m", __package__, "check-export", str(out / EXPORTED), str(out / EXPECTED)]
    command += ["--threads", str(trainer.config.threads)]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    }
    with console.status("a fresh process loads the exported model ..."):
        result = subprocess.run(command, capture_output=True, text=True, env=env)
    console.print(f"exported with torch.export to [bold]{escape(str(out / EXPORTED))}[/]; a fresh process says:")
    console.print(escape((result.stdout + (result.stderr if result.returncode else "")).rstrip()))
    return result.returncode == 0


def _sample_shapes(available: int) -> list[tuple[int, int]]:
    """Batch and time unlike those the model was exported with, as far as the data goes."""
    shapes = [(1, 300), (3, 64), (5, 1)]
    return [(b, t) for b, t in shapes if b * t <= available] or [(1, 1)]


def export_model(model: HybridLM) -> torch.export.ExportedProgram:
    """`model`'s uncached forward as an exported program, batch and time dynamic."""
    example = torch.zeros(2, 16, dtype=torch.int64)
    shapes = {"tokens": {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}}
    return torch.export.export(model.eval(), (example,), dynamic_shapes=shapes)


# -- check-export ----------------------------------------------------------------------------------------------------


def run_check_export(args: argparse.Namespace, console: Console) -> int:
    """Compare an exported program with recorded outputs: at most 256 roundings of fp32 at the largest logit apart."""
    torch.set_num_threads(args.threads)
    from . import ops  # noqa: F401  (loading a program needs the op to be registered)

    try:
        expected = load_file(args.expected)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {args.expected!r}: {error}; export again") from error
    if not zipfile.is_zipfile(args.program):  # torch would log a page before it says so
        there = "not an exported program, or cut short" if Path(args.program).is_file() else "there is no such file"
        raise UserError(f"cannot load {args.program!r}: {there}; export again")
    try:
        program = torch.export.load(args.program)
    except Exception as error:  # torch.export.load has no error type of its own for a damaged file
        raise UserError(f"cannot load {args.program!r}: {type(error).__name__}: {error}; export again") from error
    module = program.module()
    agrees = True
    with torch.inference_mode():
        for i in range(sum(name.startswith("tokens.") for name in expected)):
            tokens, logits = expected[f"tokens.{i}"], expected[f"logits.{i}"]
            difference = float((module(tokens) - logits).abs().max())
            allowed = 256 * torch.finfo(torch.float32).eps * float(logits.abs().max())
            ok = difference <= allowed  # False for NaN
            agrees &= ok
            shape = "×".join(map(str, tokens.shape))
            console.print(
                f"  tokens {shape}: max abs difference {difference:.2e}, allowed {allowed:.2e}: "
                f"{'agrees' if ok else 'DIFFERS'}"
            )
    return 0 if agrees else 1


# -- generate --------------------------------------------------------------------------------------------------------


def run_generate(args: argparse.Namespace, console: Console) -> int:
    """Stream a continuation of a prompt to stdout."""
    torch.set_num_threads(args.threads)
    model = load_model(args.checkpoint)
    found = tokenizer_of(args.checkpoint, args.tokenizer)
    text: ByteText | TokenText = ByteText() if found is None else TokenText(*found)
    if found is not None and text.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer {found[0]!r} has {text.vocab_size:,} tokens, and the model an embedding of "
            f"{model.config.vocab_size:,}; give the one that it was trained with as --tokenizer"
        )
    generator = torch.Generator().manual_seed(args.seed)
    sys.stdout.write(text.shown(args.prompt))
    for token in stream(
        model,
        text.encode(args.prompt),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        eos_id=text.separator,
        generator=generator,
    ):
        if int(token) == text.separator:
            break
        sys.stdout.write(text.decode(int(token)))
        sys.stdout.flush()
    sys.stdout.write(text.rest() + "\n")
    return 0


def load_model(path: str | Path) -> HybridLM:
    """The trained model of a run or checkpoint folder, or of a folder of `weights.save_model`, in eval mode.

    Raises:
        CheckpointError: missing, damaged, or of a model that this version cannot build.
    """
    if (Path(path) / CONFIG).exists():
        return weights.load_model(path)
    saved = load(path)
    config: Any = saved.state.get("model")
    try:
        model = HybridLM(LMConfig.from_dict(config))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {str(saved.path)!r}: its model config cannot be built: {error}; train again"
        ) from error
    restore_model(saved, model)
    return model.eval()
