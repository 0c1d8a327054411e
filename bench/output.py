# SPDX-License-Identifier: Apache-2.0
"""Consoles and progress: colour and a bar on a terminal, plain lines elsewhere and under NO_COLOR."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from . import measure

PLAIN_WIDTH = 180  # of text where there is no terminal
CLOSED_PIPE = 141  # what a shell says of a program that SIGPIPE ended: 128 + 13


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Rich would exit with 1, which here is a failed measurement: let `ending_quietly` have it."""
        raise BrokenPipeError


def make_console(file: TextIO | None = None, *, stderr: bool = False) -> Console:
    """A console for a stream: no escape codes at all unless it is a terminal and NO_COLOR is unset.

    Whatever FORCE_COLOR and TTY_COMPATIBLE say: to rich they would make a file a terminal, with colours and a bar.
    """
    stream = file or (sys.stderr if stderr else sys.stdout)
    plain = bool(os.environ.get("NO_COLOR")) or not stream.isatty()
    asked = os.environ.get("COLUMNS", "")
    terminal = None if stream.isatty() else False  # None: rich looks, and knows terminals that cannot do it
    width = None if stream.isatty() else int(asked) if asked.isdecimal() and int(asked) else PLAIN_WIDTH
    options: dict[str, Any] = {"color_system": None, "no_color": True} if plain else {}
    return _Console(
        file=stream,
        force_terminal=terminal,
        width=width,
        highlight=False,
        soft_wrap=False,
        legacy_windows=False,
        **options,
    )


@contextlib.contextmanager
def progress() -> Iterator[measure.Progress]:
    """Tell of progress on stderr: a bar on a terminal, else a line for each thing that is done, once a problem."""
    console = make_console(stderr=True)
    if not console.is_terminal:
        told: set[str] = set()

        def line(what: str, done: int, total: int) -> None:
            if what.endswith(": inputs"):  # the next problem
                told.clear()
            if what not in told:
                told.add(what)
                print(what, file=sys.stderr, flush=True)

        yield line
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("inputs", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def put(console: Console, parts: Sequence[Table | Text]) -> None:
    """Print tables and lines, without the spaces that fill up lines.

    A table is as wide as it needs to be whatever the terminal's width: figures cut to "med…" are none, while a line
    that the terminal wraps can still be read, and copied.
    """
    width = console.width
    for part in parts:
        is_text = isinstance(part, Text)
        if not is_text:
            unbounded = console.options.update(width=10_000)
            console.width = max(1, Measurement.get(console, unbounded, part).maximum)
        with console.capture() as capture:
            console.print(part, soft_wrap=is_text)
        console.width = width
        lines = capture.get().split("\n")
        console.file.write("\n".join(line.rstrip() for line in lines))


def ending_quietly(command: Callable[[], int]) -> int:
    """Run a command and return its exit code, or CLOSED_PIPE once nobody reads its output (`head` has seen enough).

    Output that was closed from the start (`>&-`) is dropped.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for good)
    try:
        code = command()
        sys.stdout.flush()  # here, not at the interpreter's end, where an error cannot be caught
        return code
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                with contextlib.suppress(OSError):  # what is left in the buffer must go somewhere at the end
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return CLOSED_PIPE


def fail(message: str) -> None:
    """One line on stderr."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
