# SPDX-License-Identifier: Apache-2.0
"""`python -m bench`: what happens around a run: progress, files, tables, exit codes."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from . import (
    arguments,
    check,
    compare,
    environment,
    files,
    info,
    measure,
    memory,
    output,
    plots,
    predict,
    record,
    report,
    tables,
)
from .parser import build_parser
from .providers import PROVIDERS, add_checkout
from .rows import Row
from .shapes import CHECK_SHAPES, GPU_PRESETS, PRESETS, Shape

OK, FAILED, BAD_ARGUMENTS, INTERRUPTED = 0, 1, 2, 130
DEFAULT_MODES = {
    "op": ("forward", "backward", "forward+backward"),
    "step": ("inference",),
    "layer": ("forward", "backward", "forward+backward"),
    "model": ("train", "generate"),
}


def _print(parts: Sequence[Table | Text]) -> None:
    output.put(output.make_console(), parts)


def _default_path(kind: str, device: torch.device) -> Path:
    """bench/results/KIND-DEVICE-DATE.jsonl."""
    name = environment.device_name(device) if device.type == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    stamp = re.sub(r"[^0-9]", "", environment.now()[:19])
    return record.RESULTS / f"{kind}-{slug}-{stamp}.jsonl"


def _prepare(args: argparse.Namespace) -> torch.device:
    device = arguments.device(args.device)
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    if args.xma is not None:
        add_checkout(args.xma)
    # fp32 means IEEE fp32 for everyone: cuDNN's RNNs would take TF32 by default.
    torch.backends.cudnn.allow_tf32 = False
    return device


def _is_about_a_gpu(args: argparse.Namespace, shapes: Sequence[Shape], device: torch.device) -> bool:
    return device.type == "cuda" or (args.device is None and any(shape.name in GPU_PRESETS for shape in shapes))


def _plan(args: argparse.Namespace, device: torch.device) -> measure.Plan:
    on_gpu = device.type == "cuda"
    default = [PRESETS["A" if on_gpu else "cpu"]]
    shapes = arguments.shapes(args.preset, args.shape, args.T, default)
    if args.dry_run:  # of a preset for GPUs, wherever it is asked for
        on_gpu = _is_about_a_gpu(args, shapes, device)
    else:
        arguments.refuse_gpu_presets_on_cpu(shapes, device, args.device)
    if args.runs < 1 or args.min_runs < 1 or not 0 < args.budget < math.inf:
        raise ValueError("--runs and --min-runs must be at least 1, --budget finite and above 0")
    if args.gate_steps is not None and args.gate_steps < 1:
        raise ValueError(f"--gate-steps must be at least 1, got {args.gate_steps}")
    arguments.one_of(args.against, [p.name for p in PROVIDERS], "--against")
    layers = getattr(args, "layers", None)
    return measure.Plan(
        kernel=args.command,
        shapes=shapes,
        dtypes=arguments.dtypes(args.dtype or ("bf16" if on_gpu else "fp32")),
        providers=None if args.provider is None else arguments.items(args.provider, "--provider"),
        modes=arguments.modes(args.mode, args.command, DEFAULT_MODES[args.command]),
        device=device,
        clip=args.clip,
        seed=args.seed,
        runs=args.runs,
        min_runs=args.min_runs,
        budget_s=args.budget,
        gate_steps=args.gate_steps,
        layers=layers,
        pattern=arguments.pattern(getattr(args, "pattern", None), layers),
        commit=args.commit,
    )


def _collect(kind: str, args: argparse.Namespace, device: torch.device, made: Iterator[Row]) -> tuple[list[Row], int]:
    """Take rows as they come and write each at once. Ctrl-C or a lost GPU ends the run, not what is finished.

    Returns:
        The rows, and OK or the exit code of what ended the run.
    """
    rows: list[Row] = []
    ended = OK
    # The path is tried before the first measurement: a wrong one must not cost a run.
    with files.Writer(args.out or [_default_path(kind, device)]) as writer:
        try:
            for row in made:
                rows.append(row)
                writer.append(row)
        except KeyboardInterrupt:
            output.fail(f"interrupted; {len(rows)} finished rows are kept")
            ended = INTERRUPTED
        except measure.DeviceLost as e:
            output.fail(f"{e}; {len(rows)} finished rows are kept")
            ended = FAILED
    return rows, ended


def _show_collected(rows: list[Row], args: argparse.Namespace, paths: Sequence[Path]) -> None:
    if args.json:
        for row in rows:
            print(files.to_jsonl(row))
        return
    where = Text("rows: " + ", ".join(map(str, paths)), style="dim")
    _print([*tables.parts_of(rows, getattr(args, "against", None)), where])


def _measure(args: argparse.Namespace) -> int:
    device = _prepare(args)
    plan = _plan(args, device)
    if args.fail_above is not None and args.baseline is None:
        raise ValueError("--fail-above needs --baseline FILE to compare with")
    if args.any_device and args.baseline is None:
        raise ValueError("--any-device needs --baseline FILE to compare with")
    arguments.ratio(args.fail_above, "--fail-above")
    baseline = files.read(args.baseline) if args.baseline else None
    if args.dry_run:
        _print(predict.parts_of(plan, "cuda" if _is_about_a_gpu(args, plan.shapes, device) else "cpu"))
        return OK
    args.out = args.out or [_default_path(args.command, device)]
    with output.progress() as on_run, memory.failing_when_full(device):
        rows, ended = _collect(args.command, args, device, measure.run(plan, on_run))
    if rows:
        _show_collected(rows, args, args.out)
    if ended != OK:
        return ended
    code = OK if any(row.status == "ok" for row in rows) else FAILED
    if any(row.status == "refused" for row in rows):
        code = FAILED  # something computes the wrong thing, whoever else is right
    if baseline is not None:
        code = max(code, _judge(baseline, rows, args))
    return code


def _judge(baseline: list[Row], rows: list[Row], args: argparse.Namespace) -> int:
    """Compare with a baseline; with --fail-above, slower rows and rows that went missing are a failure."""
    result = compare.compare(baseline, rows, asked_only=True, any_device=args.any_device)
    if not args.json:
        _print(compare.parts_of(result, f"against {args.baseline}"))
    if args.fail_above is None:
        return OK
    problems = [
        f"{change.after.describe()} is {change.ratio:.2f}x its baseline (limit {args.fail_above:g}x)"
        for change in result.slower_than(args.fail_above)
    ]
    problems += [f"{row.describe()} is in the baseline and has no time now" for row, _ in result.missing]
    if not result.changes and not result.missing:
        problems.append(_nothing_compared(result, f"{args.baseline} has no row of what was measured"))
    _tell(problems, result)
    return FAILED if problems else OK


def _nothing_compared(result: compare.Comparison, otherwise: str) -> str:
    """Why a limit on ratios has none to look at, which is no success."""
    if not result.incomparable:
        return f"--fail-above: nothing to compare: {otherwise}"
    return (
        f"--fail-above: nothing to compare: the baseline was measured elsewhere ({'; '.join(result.places)}); measure "
        "one here, with as many --threads, or compare all the same with --any-device"
    )


def _tell(problems: Sequence[str], result: compare.Comparison) -> None:
    """What a limit on ratios found, and how much of it was out of its sight."""
    for problem in problems:
        output.fail(problem)
    if result.changes and result.incomparable:
        count = len(result.incomparable)
        print(f"warning: {count} not comparable and not judged ({'; '.join(result.places)})", file=sys.stderr)


def _check(args: argparse.Namespace) -> int:
    device = _prepare(args)
    if args.repeats < 0:
        raise ValueError(f"--repeats must be at least 0, got {args.repeats}")
    default_dtypes = "fp32,bf16,fp16" if device.type == "cuda" else "fp32,bf16"
    shapes = arguments.shapes(args.preset, args.shape, args.T, CHECK_SHAPES)
    arguments.refuse_gpu_presets_on_cpu(shapes, device, args.device)
    plan = check.CheckPlan(
        shapes=shapes,
        dtypes=arguments.dtypes(args.dtype or default_dtypes),
        providers=None if args.provider is None else arguments.items(args.provider, "--provider"),
        clips=arguments.clips(args.clip),
        device=device,
        repeats=args.repeats,
        seed=args.seed,
        commit=args.commit,
    )
    args.out = args.out or [_default_path("check", device)]
    with output.progress() as on_run, memory.failing_when_full(device):
        rows, ended = _collect("check", args, device, check.run(plan, on_run))
    if rows:
        _show_collected(rows, args, args.out)
    if ended != OK:
        return ended
    return OK if all(row.status == "ok" for row in rows) else FAILED


def _compare(args: argparse.Namespace) -> int:
    arguments.ratio(args.fail_above, "--fail-above")
    if args.rev is None:
        if len(args.files) != 2:
            raise ValueError(
                f"compare takes two files, or --rev REVISION and a run after --; got {len(args.files)} files"
            )
        before, after = (files.read(Path(path)) for path in args.files)
    else:
        inner = args.files
        if not inner or inner[0] not in DEFAULT_MODES:
            raise ValueError(
                f"compare --rev: say what to run after --, starting with {', '.join(DEFAULT_MODES)}; "
                "for example: compare --rev HEAD~1 -- op --preset cpu --provider cpp"
            )
        parsed = build_parser().parse_args(inner)
        taken = ("dry_run", "out", "commit", "json", "baseline", "fail_above", "any_device")
        if any(getattr(parsed, name) for name in taken):
            raise ValueError(
                "compare --rev: the run after -- takes no --dry-run, --out, --commit, --json, --baseline, "
                "--fail-above or --any-device; the --fail-above of the comparison goes before --"
            )
        print(f"running {args.rev} ...", file=sys.stderr, flush=True)
        before = compare.run_revision(args.rev, inner)
        print("running this tree ...", file=sys.stderr, flush=True)
        device = _prepare(parsed)
        with output.progress() as on_run, memory.failing_when_full(device):
            after = list(measure.run(_plan(parsed, device), on_run))
    result = compare.compare(before, after, any_device=args.any_device)
    if not any(result):
        raise ValueError("compare: no timings in either")
    _print(compare.parts_of(result))
    if args.fail_above is None:
        return OK
    problems = [
        f"{change.after.describe()} is {change.ratio:.2f}x what it was (limit {args.fail_above:g}x)"
        for change in result.slower_than(args.fail_above)
    ]
    problems += [f"{row.describe()} is missing{why and f' ({why})'}" for row, why in result.missing]
    if not result.changes and not result.missing:
        problems.append(_nothing_compared(result, "no row before has a time"))
    _tell(problems, result)
    return FAILED if problems else OK


def _report(args: argparse.Namespace) -> int:
    rows = [row for path in args.file for row in files.read(path)]
    if all(row.mode == "check" for row in rows):
        raise ValueError("report: no timings in these files; `show` prints checks")
    there = list(dict.fromkeys(row.provider for row in rows))
    arguments.one_of(args.against, there, "--against")
    if args.provider is not None:
        there = arguments.items(args.provider, "--provider")
        for name in there:
            arguments.one_of(name, sorted({row.provider for row in rows}), "--provider")
        rows = [row for row in rows if row.provider in there]
    text = report.summary(rows, there) if args.summary else report.markdown(rows, args.against)
    if args.out is None:
        sys.stdout.write(text)
    else:
        try:
            args.out.write_text(text, encoding="utf-8")
        except OSError as e:
            raise ValueError(f"--out {args.out}: cannot be written ({e.strerror})") from e
    if args.plot is not None:
        for path in (plots.draw_summary if args.summary else plots.draw)(rows, args.plot):
            print(f"wrote {path}", file=sys.stderr)
    return OK


def _show(args: argparse.Namespace) -> int:
    for path in args.file:
        if path.suffix == ".json" and (document := record.load(path))["kind"] == "test-gpu":
            _print(tables.test_tables(document))
        else:
            _print(tables.parts_of(files.read(path), args.against))
    return OK


def _info(args: argparse.Namespace) -> int:
    if args.xma is not None:
        add_checkout(args.xma)
    print(info.block())
    return OK


COMMANDS = {
    "info": _info,
    "op": _measure,
    "step": _measure,
    "layer": _measure,
    "model": _measure,
    "check": _check,
    "compare": _compare,
    "report": _report,
    "show": _show,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the CLI. Exit codes: see `parser.EXIT_CODES`."""
    return output.ending_quietly(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # M² on an ASCII terminal
    try:
        args = build_parser().parse_args(sys.argv[1:] if argv is None else argv)
    except SystemExit as e:
        return int(e.code or 0)
    try:
        return COMMANDS[args.command](args)
    except SystemExit as e:  # of the run after `compare --rev ... --`
        return int(e.code or 0)
    except (ValueError, argparse.ArgumentTypeError) as e:
        output.fail(str(e))
        return BAD_ARGUMENTS
    except KeyboardInterrupt:
        output.fail("interrupted")
        return INTERRUPTED
