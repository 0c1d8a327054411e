# SPDX-License-Identifier: Apache-2.0
"""The live view of a training run (rich)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

from .train import Step, TrainConfig

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 48) -> str:
    """Averages of `width` equal parts of `values` as block characters, the lowest the shortest."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [i * len(values) // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((m - low) * scale)] for m in means)


def duration(seconds: float) -> str:
    """1:05, 2:03:04."""
    s = max(0, round(seconds))
    return f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}" if s >= 3600 else f"{s // 60}:{s % 60:02d}"


class TrainingView:
    """A panel that follows a run: progress, loss, bits per byte, tokens/s, time left, the loss so far.

    On a console that is not a terminal it prints one line every tenth of the run instead.
    """

    def __init__(self, console: Console, config: TrainConfig, first_step: int = 0, unit: str = "byte") -> None:
        self.console, self.config, self.first_step, self.unit = console, config, first_step, unit
        self.losses: list[float] = []
        self.smooth: float | None = None
        self.seconds: float | None = None
        self.last: Step | None = None
        self.started = time.perf_counter()
        self._live = Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None

    def __enter__(self) -> TrainingView:
        if self._live is not None:
            self._live.start()
            self._live.update(self._panel())
        else:
            if self.config.compile:
                self.console.print("compiling the training step ...")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self._panel(), refresh=True)
            self._live.stop()

    def on_step(self, step: Step) -> None:
        """Take in one step."""
        self.losses.append(step.loss)
        self.smooth = step.loss if self.smooth is None else 0.95 * self.smooth + 0.05 * step.loss
        if len(self.losses) > 1:  # the first step compiles: it says nothing about speed
            self.seconds = step.seconds if self.seconds is None else 0.9 * self.seconds + 0.1 * step.seconds
        self.last = step
        if self._live is not None:
            self._live.update(self._panel())
        elif step.step % max(1, self.config.steps // 10) == 0 or step.step == self.config.steps:
            self.console.print("  ".join(f"{name} {value}" for name, value in self._figures()))

    def _figures(self) -> list[tuple[str, str]]:
        if self.last is None or self.smooth is None:
            return [("step", f"{self.first_step}/{self.config.steps}")]
        rows = [
            ("step", f"{self.last.step}/{self.config.steps}"),
            ("loss", f"{self.smooth:.3f}"),
            (f"bits/{self.unit}", f"{self.smooth / 0.6931471805599453:.3f}"),
        ]
        if self.seconds is not None:
            rate = self.config.tokens_per_step / self.seconds
            left = (self.config.steps - self.last.step) * self.seconds
            rows += [("tokens/s", f"{rate:,.0f}"), ("left", duration(left))]
        return rows

    def _panel(self) -> Panel:
        table = Table.grid(padding=(0, 3), expand=False)
        figures = self._figures()
        table.add_row(*(f"[dim]{name}[/]" for name, _ in figures))
        table.add_row(*(f"[bold]{value}[/]" for _, value in figures))
        layout = Table.grid(padding=(0, 0), expand=False)
        done = self.first_step if self.last is None else self.last.step
        layout.add_row(ProgressBar(total=self.config.steps, completed=done, width=56))
        layout.add_row(table)
        waiting = "compiling (the first step takes a while) ..." if self.config.compile else "the first step ..."
        text = sparkline(self.losses) if self.losses else waiting
        layout.add_row(f"[cyan]{text}[/]" if self.losses else f"[dim]{text}[/]")
        elapsed = duration(time.perf_counter() - self.started)
        return Panel(layout, title="training", subtitle=f"{elapsed}, Ctrl-C saves and stops", expand=False)
