# SPDX-License-Identifier: Apache-2.0
"""What the recipes share: their options, progress, records and plots. Not a recipe itself."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

PLAIN_WIDTH = 140  # of tables where there is no terminal
SEEDS = 10**5  # test words are drawn with greater ones


class Refused(Exception):
    """What was asked for cannot be done; the message is for the user."""


# -- options -----------------------------------------------------------------------------------------------------------


def parser(recipe: str, description: str, presets: dict[str, str]) -> argparse.ArgumentParser:
    """Options that every recipe has."""
    made = argparse.ArgumentParser(
        prog=f"python examples/{recipe}.py", description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    lines = "\n".join(f"{name}: {what}" for name, what in presets.items())
    made.add_argument("--preset", choices=list(presets), default="cpu", help=f"{lines}\ndefault: cpu")
    made.add_argument("--list", action="store_true", help="print the runs of the preset and end")
    made.add_argument(
        "--out",
        type=Path,
        metavar="FILE.jsonl",
        help="the record: a JSON line a run, as it goes;\na file that is there is never written over",
    )
    made.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the record's plot (needs matplotlib)")
    made.add_argument("--from-record", type=Path, metavar="FILE.jsonl", nargs="+", help="train nothing: show records")
    made.add_argument(
        "--only",
        type=_pattern,
        metavar="REGEX",
        action="append",
        help="only runs whose name, without its seed, matches (all of them)",
    )
    made.add_argument("--seeds", type=_seed, nargs="+", metavar="SEED", help="default: the preset's")
    made.add_argument("--steps", type=_positive, default=1.0, metavar="FACTOR", help="scale the number of steps")
    made.add_argument("--minutes", type=_positive, help="start no further run after so many minutes")
    return made


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= SEEDS:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {SEEDS - 1}, got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _check(args: argparse.Namespace) -> None:
    """What is better known before hours of training than after."""
    if args.seeds and len(set(args.seeds)) < len(args.seeds):
        given = " ".join(map(str, args.seeds))
        raise Refused(f"--seeds {given}: give each seed once, else the spread over them is a fiction")
    if args.from_record and args.out:
        raise Refused("--from-record trains nothing, so there is nothing for --out; give one of them")
    if args.plot is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise Refused("--plot needs matplotlib: pip install 'm2rnn-compile[plot]', or draw it later with --from-record")
    if args.plot.suffix not in (".svg", ".png", ".pdf"):
        raise Refused(f"--plot {args.plot}: the name must end in .svg, .png or .pdf")
    if args.plot.is_dir() or not _can_be_made(args.plot):
        raise Refused(f"--plot {args.plot}: cannot be written there")


def _can_be_made(path: Path) -> bool:
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    return os.access(there, os.W_OK) and (there == path or there.is_dir())


def matches(title: str, patterns: Sequence[re.Pattern[str]] | None) -> bool:
    """Whether a run's name matches all of ``--only``."""
    return all(pattern.search(title) for pattern in patterns or ())


def main(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    kind: str,
    measure: Callable[[argparse.Namespace, Console], list[dict[str, Any]]],
    tables: Callable[[list[dict[str, Any]], Console], None],
    plot: Callable[[list[dict[str, Any]], Path], None],
) -> int:
    """The program of a recipe: run or read records, then show them. Returns its exit code."""
    args = parser.parse_args(argv)
    asked = os.environ.get("COLUMNS", "").isdecimal()
    console = Console(width=None if sys.stdout.isatty() or asked else PLAIN_WIDTH)
    complain = Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print
    try:
        _check(args)
        if args.from_record:
            rows = [row for file in args.from_record for row in read_record(file, kind)[1]]
        else:
            rows = measure(args, console)
    except Refused as error:
        complain(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        kept = f"; {args.out} has what was done, --from-record shows it" if args.out and args.out.exists() else ""
        complain(f"interrupted{kept}")
        return 130
    if rows:
        tables(rows, console)
    if rows and args.plot is not None:
        plot(rows, args.plot)
    return 0


def device_of(preset: str) -> torch.device:
    """The preset's device."""
    if preset.startswith("cpu"):
        threads = os.environ.get("OMP_NUM_THREADS", "")
        torch.set_num_threads(int(threads) if threads.isdecimal() and int(threads) else 2)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise Refused(f"--preset {preset} needs a CUDA device and there is none; --preset cpu runs anywhere")
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, also for the GRU
    return torch.device("cuda")


# -- records -----------------------------------------------------------------------------------------------------------


class Record:
    """JSON lines: first the run itself (command, machine, versions), then a row for each result, flushed at once."""

    def __init__(self, path: Path | None, recipe: str, device: torch.device, **facts: Any) -> None:
        self.rows: list[dict[str, Any]] = []
        self.head = dict(
            kind=f"reproduction-{recipe}",
            command=shlex.join(["python", *(str(a) for a in sys.argv)]),
            date=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            git=_revision(),
            source_sha256=_source_hash(),
            device=torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {os.cpu_count()} cores",
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            python=platform.python_version(),
            **facts,
        )
        self.finished: list[str] = []  # titles of the runs
        self._path, self._file = path, None
        if path is not None:
            self._file = _new_file(path)
            self._file.write(json.dumps(self.head) + "\n")

    def add(self, title: str, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.finished.append(title)
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")

    def close(self, **facts: Any) -> None:
        """Write the last line: what is known only at the end. A record without a row is none: its file goes."""
        if self._file is None or self._path is None:
            return
        self._file.write(json.dumps(dict(end=True, **facts)) + "\n")
        self._file.close()
        if not self.rows and self._path.is_file():
            self._path.unlink()


def _new_file(path: Path) -> IO[str]:
    """Open for writing, with its folders; what is there already is somebody's measurement, and stays."""
    if path.exists() and not path.is_char_device():  # /dev/null is no file to lose
        way_out = "give another name, or move it away (--from-record shows what is in it)"
        raise Refused(f"--out {path} is there already, and records are not written over; {way_out}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w" if path.exists() else "x", buffering=1)
    except OSError as error:
        raise Refused(f"--out {path}: cannot be written ({error.strerror})") from error


def read_record(path: Path, kind: str | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first line and the rows of a record, also of one that was cut off while a line was written."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path}: cannot be read ({getattr(error, 'strerror', 'no text')})") from error
    found: list[Any] = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number == 1 or number < len(lines):
                raise Refused(f"{path}: line {number} is no JSON; expected a record that a recipe wrote") from error
    if not found or not all(isinstance(row, dict) for row in found) or "kind" not in found[0]:
        raise Refused(f"{path} is no record of a recipe: its first line has no kind")
    head, *rows = found
    if kind is not None and head["kind"] != f"reproduction-{kind}":
        raise Refused(f"{path} is of kind {head['kind']}, expected reproduction-{kind}; show it with its own recipe")
    return head, [row for row in rows if "end" not in row]


def save_weights(state: dict[str, Any], file: Path) -> None:
    """All or nothing: an interruption leaves no half of a file under this name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.part")
    torch.save(state, partial)
    partial.replace(file)


def load_weights(file: Path, expected: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What `save_weights` wrote, if its entry "of" is `expected`: no run goes on from, or tests, another's weights."""
    short = lambda x: textwrap.shorten(str(x), 60)
    try:
        state = torch.load(file, map_location=device)
        found = state.get("of", {})
    except Exception as error:  # of torch.load, whatever a broken file makes it raise
        raise Refused(f"{file}: cannot be read as weights ({type(error).__name__}); remove it") from error
    for name, value in expected.items():
        if found.get(name) != value:
            got = f"{name} {short(found[name])}" if name in found else f"no word of {name}"
            way_out = "give the folder of this preset and --steps, or an empty one"
            raise Refused(f"{file} was trained with {got}, expected {short(value)}; {way_out}")
    return dict(state)


def _revision() -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or os.environ.get("M2RNN_COMMIT", "unknown")


def _source_hash() -> str:
    """Of the package's and the recipes' sources: says what ran, also in a copy without history."""
    digest = hashlib.sha256()
    for folder in ("m2rnn_compile", "examples"):
        for path in sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cpp")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


# -- runs --------------------------------------------------------------------------------------------------------------


def run_jobs(
    jobs: Sequence[tuple[str, Callable[[], Any]]],
    record: Record,
    console: Console,
    device: torch.device,
    *,
    concurrent: int,
    deadline: float | None = None,
) -> None:
    """Run jobs (title, function that makes the generator), `concurrent` at a time, and record what they return.

    One thread takes turns among them. On a GPU each has a stream of its own, so that small models share the device; a
    job's arithmetic does not depend on the others. After the deadline (of `time.monotonic`) none is started, but for
    the first.
    """
    waiting = list(jobs)
    said_of: dict[str, int] = {}  # without a terminal: a line every fifth of a run
    running: list[tuple[str, Any, Any, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[said]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_interactive) as progress:
        total = progress.add_task("[bold]all runs", total=len(waiting), said="")
        while waiting or running:
            if (running or record.rows) and deadline is not None and time.monotonic() > deadline:
                waiting = []
            while waiting and len(running) < concurrent:
                title, start = waiting.pop(0)
                stream = torch.cuda.Stream() if device.type == "cuda" else None
                running.append((title, start(), stream, progress.add_task(title, total=1, said="")))
            still = []
            for title, job, stream, task in running:
                try:
                    with torch.cuda.stream(stream):
                        fraction, said = next(job)
                    progress.update(task, completed=fraction, said=said)
                    if not console.is_interactive and int(5 * fraction) > said_of.get(title, 0):
                        said_of[title] = int(5 * fraction)
                        console.print(f"{title}: {fraction:.0%}, {said}", highlight=False, soft_wrap=True)
                    still.append((title, job, stream, task))
                except StopIteration as end:
                    record.add(title, end.value)
                    progress.remove_task(task)
                    progress.advance(total)
                    said = end.value.get("summary", "")
                    console.print(f"[green]done[/] {title}: {said}", highlight=False, soft_wrap=True)
            running = still


def measure(
    args: argparse.Namespace,
    console: Console,
    recipe: str,
    device: torch.device,
    jobs: Sequence[tuple[str, Callable[[], Any]]],
    *,
    concurrent: int = 1,
    **facts: Any,
) -> list[dict[str, Any]]:
    """Run jobs into the record that was asked for, and return its rows. However that ends, it has its last line."""
    record = Record(args.out, recipe, device, preset=args.preset, **facts)
    started, busy = time.monotonic(), time.process_time()
    deadline = None if args.minutes is None else started + 60 * args.minutes
    stopped: dict[str, str] = {}
    try:
        run_jobs(jobs, record, console, device, concurrent=concurrent, deadline=deadline)
    except BaseException as error:
        stopped["stopped_by"] = type(error).__name__
        raise
    finally:
        left_out = [title for title, _ in jobs if title not in record.finished]
        seconds, busy = time.monotonic() - started, time.process_time() - busy  # which tells of other jobs beside it
        record.close(seconds=round(seconds, 1), cpu_seconds=round(busy, 1), left_out=left_out, **stopped)
        console.print(f"{len(record.rows)} runs in {seconds:.0f} s; {len(left_out)} left out", highlight=False)
    return record.rows


def listed(titles: Sequence[str], args: argparse.Namespace, console: Console) -> bool:
    """Whether the runs were only to be listed, which is done then.

    Raises:
        Refused: there are none.
    """
    if not titles:
        asked = " ".join(f"--only {shlex.quote(pattern.pattern)}" for pattern in args.only or ())
        raise Refused(f"{asked}: no run of --preset {args.preset} has such a name; --list, without --only, prints all")
    if args.list:
        console.print("\n".join(titles), markup=False, highlight=False, soft_wrap=True)
    return bool(args.list)


# -- plots -------------------------------------------------------------------------------------------------------------


def figure(columns: int, rows: int = 1, width: float = 4.6, height: float = 3.6) -> tuple[Any, list[Any]]:
    """A matplotlib figure and its axes, without a display."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "m2rnn"  # the same record draws the same bytes
    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return made, list(made.subplots(rows, columns, squeeze=False).flat)


def save_figure(made: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
