# SPDX-License-Identifier: Apache-2.0
"""What the recipes share: their options, progress, records and plots. Not a recipe itself."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

Job = Iterator[str]  # yields what it is doing, between chunks of work; its value is the row for the record


def parser(recipe: str, description: str, presets: dict[str, str]) -> argparse.ArgumentParser:
    """Options that every recipe has."""
    made = argparse.ArgumentParser(
        prog=f"python examples/{recipe}.py", description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    lines = "\n".join(f"{name}: {what}" for name, what in presets.items())
    made.add_argument("--preset", choices=list(presets), default="cpu", help=f"{lines}\ndefault: cpu")
    made.add_argument("--out", type=Path, metavar="FILE.jsonl", help="the record: a JSON line a run, as it goes")
    made.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the record's plot (needs matplotlib)")
    made.add_argument("--from-record", type=Path, metavar="FILE.jsonl", nargs="+", help="train nothing: show records")
    made.add_argument("--only", metavar="REGEX", action="append", help="only runs whose name matches (all of them)")
    made.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="default: the preset's")
    made.add_argument("--steps", type=float, default=1.0, metavar="FACTOR", help="scale the number of steps")
    made.add_argument("--minutes", type=float, help="start no further run after so many minutes")
    return made


def matches(title: str, patterns: Sequence[str] | None) -> bool:
    """Whether a run's name matches all of ``--only``."""
    return all(re.search(pattern, title) for pattern in patterns or ())


def device_of(preset: str, console: Console) -> torch.device:
    """The preset's device; ends the program in one line where there is none."""
    if preset.startswith("cpu"):
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
        return torch.device("cpu")
    if not torch.cuda.is_available():
        console.print(f"--preset {preset} needs a CUDA device and there is none; --preset cpu runs anywhere")
        raise SystemExit(2)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, also for the GRU
    return torch.device("cuda")


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
            torch=torch.__version__,
            python=platform.python_version(),
            **facts,
        )
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", buffering=1)
            self._file.write(json.dumps(self.head) + "\n")

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")

    def close(self, **facts: Any) -> None:
        """Write the last line: what is known only at the end."""
        if self._file is not None:
            self._file.write(json.dumps(dict(end=True, **facts)) + "\n")
            self._file.close()


def read_record(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first line and the rows of a record."""
    head, *rows = (json.loads(line) for line in path.read_text().splitlines())
    return head, [row for row in rows if "end" not in row]


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


def run_jobs(
    jobs: Sequence[tuple[str, Callable[[], Any]]],
    record: Record,
    console: Console,
    device: torch.device,
    *,
    concurrent: int,
    deadline: float | None = None,
) -> list[str]:
    """Run jobs (title, function that makes the generator), `concurrent` at a time, and record what they return.

    One thread takes turns among them. On a GPU each has a stream of its own, so that small models share the device; a
    job's arithmetic does not depend on the others.

    Returns:
        Titles of the jobs that the deadline (of `time.monotonic`) left out.
    """
    waiting = list(jobs)
    left_out: list[str] = []
    said_of: dict[str, int] = {}  # without a terminal: a line every fifth of a run
    running: list[tuple[str, Any, Any, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[said]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        total = progress.add_task("[bold]all runs", total=len(waiting), said="")
        while waiting or running:
            if waiting and deadline is not None and time.monotonic() > deadline:
                left_out += [title for title, _ in waiting]
                waiting = []
                continue
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
                    if not console.is_terminal and int(5 * fraction) > said_of.get(title, 0):
                        said_of[title] = int(5 * fraction)
                        console.print(f"{title}: {fraction:.0%}, {said}", highlight=False, soft_wrap=True)
                    still.append((title, job, stream, task))
                except StopIteration as end:
                    record.add(end.value)
                    progress.remove_task(task)
                    progress.advance(total)
                    said = end.value.get("summary", "")
                    console.print(f"[green]done[/] {title}: {said}", highlight=False, soft_wrap=True)
            running = still
    return left_out


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
