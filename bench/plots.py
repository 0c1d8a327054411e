# SPDX-License-Identifier: Apache-2.0
"""Plots of rows (extra `plot`): latency and memory against T, tokens/s against context, fraction of the floor."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .rows import Row
from .tables import place_of, shape_of, what_of

Value = Callable[[Row], float | None]


def _latest(rows: Sequence[Row]) -> list[Row]:
    return list({row.figure: row for row in rows if row.status == "ok" and row.mode != "check"}.values())


def _panels(rows: Sequence[Row], keep: Callable[[Row], bool], value: Value) -> dict[str, list[Row]]:
    """Title → rows that differ in T and provider only."""
    panels: dict[str, list[Row]] = {}
    place = place_of(rows)
    clips = len({row.config.get("clip") for row in rows}) > 1
    for row in rows:
        if keep(row) and value(row) is not None:
            sizes = re.sub(r" T\d+", "", str(shape_of(row)))
            parts = [f"{row.kernel} {row.mode}", row.model, sizes, row.depth, row.dtype]
            parts += [f"clip {row.config.get('clip')}"] * (clips and row.kernel != "step")
            panels.setdefault(", ".join(filter(None, parts)) + place(row), []).append(row)
    return panels


def _lines(path: Path, rows: Sequence[Row], keep: Callable[[Row], bool], value: Value, x: str, y: str) -> Path | None:
    """One panel for each problem, one line for each provider, both axes logarithmic.

    Problems that were measured at one length are left out if another was measured at several.
    """
    panels = _panels(rows, keep, value)
    if not panels:
        return None
    lengths = {title: len({row.T for row in members}) for title, members in panels.items()}
    enough = min(2, max(lengths.values()))
    panels = {title: members for title, members in panels.items() if lengths[title] >= enough}
    colour = _colours(rows)
    figure, axes = _figure(len(panels))
    for axis, (title, members) in zip(axes, sorted(panels.items()), strict=True):
        _against_length(axis, members, value, colour, title, x, y)
    return _save(figure, path)


def _against_length(
    axis: Any, members: Sequence[Row], value: Value, colour: Mapping[str, str], title: str, x: str, y: str
) -> None:
    """One line for each provider, both axes logarithmic, the lengths as ticks."""
    for provider in dict.fromkeys(row.provider for row in members):
        points = sorted((row.T, value(row)) for row in members if row.provider == provider)
        axis.plot([t for t, _ in points], [v for _, v in points], marker="o", label=provider, color=colour[provider])
    lengths = sorted({row.T for row in members})
    axis.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
    axis.set_xticks(lengths, [f"{T:,}" for T in lengths])
    axis.set_xticks([], minor=True)
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.yaxis.set_minor_formatter("")
    axis.grid(True, which="both", alpha=0.3)
    axis.legend(fontsize="small")


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """The same colour for a provider in every panel."""
    return {provider: f"C{number}" for number, provider in enumerate(sorted({row.provider for row in rows}))}


def _bars(path: Path, rows: Sequence[Row]) -> Path | None:
    """Fraction of the floor: one panel for each problem, one bar for each provider."""
    panels: dict[str, list[Row]] = {}
    place = place_of(rows)
    for row in rows:
        if row.of_floor is not None:
            model = f"{row.model}: " if row.model else ""
            panels.setdefault(f"{row.kernel} {row.mode}, {model}{what_of(row)}{place(row)}", []).append(row)
    if not panels:
        return None
    colour = _colours(rows)
    figure, axes = _figure(len(panels))
    for axis, (title, members) in zip(axes, panels.items(), strict=True):
        names = [row.provider for row in members]
        bars = axis.barh(names, [row.of_floor for row in members], color=[colour[name] for name in names])
        axis.bar_label(bars, [f"{row.of_floor:.0%} {row.floor_bound}" for row in members], fontsize="small")
        axis.set(title=title, xlabel="lower bound / median", xlim=(0, 1.3))
        axis.invert_yaxis()
    return _save(figure, path)


def _figure(panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    columns = min(2, panels)
    lines = -(-panels // columns)
    figure = Figure(figsize=(6.5 * columns, 4.2 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.remove()
    return figure, axes[:panels]


def _save(figure: Any, path: Path) -> Path:
    if path.suffix == ".svg":  # the same rows give the same file
        from matplotlib import rc_context

        with rc_context({"svg.hashsalt": path.name}):
            figure.savefig(path, metadata={"Date": None})
        path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    else:
        figure.savefig(path, dpi=120)
    return path


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the plots that the rows have figures for and return their paths.

    Raises:
        ValueError: matplotlib is not installed, the folder cannot be written, or there is nothing to draw.
    """
    _need_matplotlib()
    rows = _latest(rows)
    generating: Callable[[Row], bool] = lambda row: row.mode == "generate" or row.kernel == "step"
    passes: Callable[[Row], bool] = lambda row: not generating(row)
    median: Value = lambda row: row.median_ms
    memory: Value = lambda row: row.peak_mib
    tokens: Value = lambda row: row.tokens_per_s
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = [
            _lines(folder / "latency.png", rows, passes, median, "T", "median ms"),
            _lines(folder / "tokens.png", rows, generating, tokens, "context", "tokens/s"),
            _lines(folder / "memory.png", rows, passes, memory, "T", "peak MiB beyond the inputs"),
            _bars(folder / "floor.png", rows),
        ]
    except OSError as e:
        raise ValueError(f"--plot {folder}: cannot be written ({e.strerror})") from e
    paths = [path for path in written if path is not None]
    if not paths:
        raise ValueError("--plot: no row has a figure to draw")
    return paths


def draw_summary(rows: Sequence[Row], folder: Path) -> list[Path]:
    """One plot, summary.svg: time and peak memory against T of the problem that was measured at the most lengths.

    Raises:
        ValueError: matplotlib is not installed, the folder cannot be written, or nothing was measured at two lengths.
    """
    _need_matplotlib()
    rows = [row for row in _latest(rows) if row.kernel == "op"]
    panels = _panels(rows, lambda row: True, lambda row: row.median_ms)
    # Of several modes at as many lengths the one that trains.
    order = ("forward+backward", "forward", "inference", "backward")
    rank = lambda item: (-len({row.T for row in item[1]}), order.index(item[1][0].mode))
    what, members = min(panels.items(), key=rank, default=("", []))
    if len({row.T for row in members}) < 2:
        raise ValueError("--summary --plot: no problem of the op was measured at two lengths or more (--T)")
    colour = _colours(rows)
    figure, (time, memory) = _figure(2)
    _against_length(time, members, lambda row: row.median_ms, colour, what, "T", "median ms")
    told = [row for row in members if row.peak_mib is not None]
    title = f"{members[0].device}, torch {members[0].torch}"
    _against_length(memory, told, lambda row: row.peak_mib, colour, title, "T", "peak MiB beyond the inputs")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [_save(figure, folder / "summary.svg")]
    except OSError as e:
        raise ValueError(f"--plot {folder}: cannot be written ({e.strerror})") from e


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise ValueError("--plot needs matplotlib: pip install 'm2rnn-compile[plot]', or pip install matplotlib") from e
