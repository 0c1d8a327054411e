# SPDX-License-Identifier: Apache-2.0
"""Arguments of `python -m bench`, and what happens around a run: progress bar, table, record, exit code."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from . import check, floors, impls, op, record, show
from .shapes import CHECK_SHAPES, PRESETS, parse_shape

OK, FAILED, BAD_ARGUMENTS = 0, 1, 2

EXAMPLES = """examples:
  python -m bench op --shape cpu                           every CPU implementation, side by side
  python -m bench op --shape A,B,C,D --dtype bf16 --xma ~/accelerated-model-architectures
  python -m bench op --shape B4,T512,N8,K32,V16 --impl eager,cpp --baseline eager
  python -m bench check                                    accuracy and determinism; exit code 1 on failure
  python -m bench check --shape A --dtype bf16 --impl triton --repeats 50
  python -m bench show bench/results/*.json
"""


class RichParser(argparse.ArgumentParser):
    """argparse with headings, options and examples set off in colour, on a terminal."""

    def print_help(self, file: IO[str] | None = None) -> None:  # type: ignore[override]
        text = Text(self.format_help())
        text.highlight_regex(r"(?m)^\w[\w ]*:", "bold yellow")
        text.highlight_regex(r"(?<![\w-])--?[a-z][\w-]*", "cyan")
        text.highlight_regex(re.escape("python -m bench"), "green")
        Console(file=file, highlight=False, soft_wrap=True).print(text)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = RichParser(
        prog="python -m bench",
        description="Benchmarks and numerical checks of m2rnn_compile. Every run leaves a record in bench/results/.",
        epilog=EXAMPLES,
        formatter_class=formatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=RichParser)
    presets = "\n".join(f"  {name:<4} {shape}" for name, shape in PRESETS.items())
    notation = "B4,T512,N8,K32,V16, with Nq2 and so on for head counts other than 1 (q, k) and N (v, f, W)"
    shapes_help = f"shapes:\n{presets}\n  or   {notation}"

    timed = commands.add_parser(
        "op",
        help="time and memory of the scan, side by side",
        description="Times forward and forward+backward: interleaved rounds in one process, medians with min and max.",
        epilog=f"{shapes_help}\n\npasses:\n  inference         under no_grad\n  forward           with what "
        "backward needs kept\n  forward+backward  gradients of q, k, v, f and W for a given dy\n",
        formatter_class=formatter,
    )
    _add_common(timed, dtype="bf16 on a GPU, fp32 on a CPU")
    timed.add_argument("--pass", dest="passes", default="forward,forward+backward", help="default: %(default)s")
    timed.add_argument("--clip", type=_clip, default=1.0, metavar="C", help="state-gradient clip, or none (default: 1)")
    timed.add_argument("--baseline", metavar="IMPL", help="what speed-ups refer to (default: xma, else reference)")
    timed.add_argument("--runs", type=int, default=20, help="runs of each implementation (default: %(default)s)")
    timed.add_argument("--min-runs", type=int, default=3, help="runs even of what exceeds the budget (default: 3)")
    timed.add_argument("--budget", type=float, default=30.0, metavar="SECONDS", help="per variant (default: 30)")

    checked = commands.add_parser(
        "check",
        help="accuracy against the fp64 oracle, and bitwise determinism",
        description="Error against the fp64 oracle: at most 2 × that of a low-precision eager run, for every output\n"
        "and gradient, per time slice; and the same bits on every repeat. Exit code 1 on failure.",
        epilog=f"{shapes_help}\nby default three small awkward shapes: {'; '.join(map(str, CHECK_SHAPES))}",
        formatter_class=formatter,
    )
    _add_common(checked, dtype="fp32 and bf16, and fp16 on a GPU")
    checked.add_argument("--clip", default="none,1,0.1", help="state-gradient clips (default: %(default)s)")
    checked.add_argument("--repeats", type=int, default=3, help="repeats compared bit for bit (default: %(default)s)")

    shown = commands.add_parser("show", help="print the table of a record again", formatter_class=formatter)
    shown.add_argument("file", nargs="+", type=Path, metavar="FILE")
    return parser


def _add_common(parser: argparse.ArgumentParser, *, dtype: str) -> None:
    names = ", ".join(impls.NAMES)
    parser.add_argument("--shape", action="append", help="a preset, several (A,B), or sizes; repeatable")
    parser.add_argument("--dtype", metavar="LIST", help=f"of bf16, fp16, fp32, fp64 (default: {dtype})")
    parser.add_argument("--impl", metavar="LIST", help=f"of {names} (default: all that fit the device)")
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda where there is one)")
    parser.add_argument("--xma", metavar="PATH", help="also run upstream: an accelerated-model-architectures checkout")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="recorded as the commit where this copy has no git history")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the record goes (default: bench/results/...)")
    parser.add_argument("--json", action="store_true", help="print the record instead of the table")


def _clip(text: str) -> float | None:
    if text.lower() == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number ≥ 0 nor 'none'")
    return value


def _items(text: str) -> list[str]:
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise ValueError(f"{text!r}: an empty item in a list")
    return items


def _shapes(given: Sequence[str] | None, default: Sequence[Any]) -> list[Any]:
    if not given:
        return list(default)
    shapes = []
    for text in given:
        names = text.split(",")
        shapes += [PRESETS[n] for n in names] if all(n in PRESETS for n in names) else [parse_shape(text)]
    return shapes


def _device(text: str | None) -> torch.device:
    try:
        device = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as e:
        raise ValueError(f"--device {text!r}: {str(e).splitlines()[0]}") from e
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {text!r}: timings are implemented for cpu and cuda")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"--device {text!r}: this machine has {count} CUDA device(s)")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def _run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    device = _device(args.device)
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    on_gpu = device.type == "cuda"
    impl_names = _items(args.impl) if args.impl else None
    common: dict[str, Any] = {"impl_names": impl_names, "device": device, "seed": args.seed, "xma": args.xma}
    work: Callable[[Callable[[str, int, int], None]], list[dict[str, Any]]]
    if args.command == "op":
        passes = _items(args.passes)
        unknown = [p for p in passes if p not in floors.PASSES]
        if unknown:
            raise ValueError(f"--pass {', '.join(unknown)}: unknown; expected {', '.join(floors.PASSES)}")
        if args.runs < 1 or args.min_runs < 1 or not args.budget > 0:
            raise ValueError("--runs and --min-runs must be at least 1, --budget above 0")
        timed = op.OpConfig(
            shapes=_shapes(args.shape, [PRESETS["A" if on_gpu else "cpu"]]),
            dtypes=[impls.parse_dtype(t) for t in _items(args.dtype or ("bf16" if on_gpu else "fp32"))],
            passes=passes,
            baseline=args.baseline,
            clip=args.clip,
            runs=args.runs,
            min_runs=args.min_runs,
            budget_s=args.budget,
            **common,
        )
        work = lambda on_run: op.run(timed, on_run)
    else:
        if args.repeats < 0:
            raise ValueError(f"--repeats must be at least 0, got {args.repeats}")
        checked = check.CheckConfig(
            shapes=_shapes(args.shape, CHECK_SHAPES),
            dtypes=[impls.parse_dtype(t) for t in _items(args.dtype or ("fp32,bf16,fp16" if on_gpu else "fp32,bf16"))],
            clips=[_clip(t) for t in _items(args.clip)],
            repeats=args.repeats,
            **common,
        )
        work = lambda on_run: check.run(checked, on_run)

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task("inputs", total=None)
        rows = work(lambda what, done, total: progress.update(task, description=what, completed=done, total=total))
    ran_xma = any(row["impl"] == "xma" for row in rows)
    extra = {"xma_sha256": impls.fingerprint(args.xma)} if ran_xma else {}
    made = record.make_record(args.command, argv, rows, commit=args.commit, **extra)
    path = record.write(made, args.out)
    if args.json:
        print(json.dumps(made, indent=1))
    else:
        console = Console()
        show.render(made, console)
        console.print(Text(f"record: {path}", style="dim"))
    return FAILED if args.command == "check" and not all(row["ok"] for row in rows) else OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run the CLI; returns the exit code: 0, 1 when a check failed, 2 for bad arguments."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as e:
        return int(e.code or 0)
    try:
        if args.command == "show":
            for file in args.file:
                show.render(record.load(file), Console())
            return OK
        return _run(args, argv)
    except (ValueError, argparse.ArgumentTypeError) as e:
        Console(stderr=True, highlight=False, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), str(e)))
        return BAD_ARGUMENTS
