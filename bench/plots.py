# SPDX-License-Identifier: Apache-2.0
"""Plots of rows (extra `plot`): latency and memory against T, tokens/s against context, fraction of the floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .rows import Row
from .tables import shape_of

Value = Callable[[Row], float | None]


def _latest(rows: Sequence[Row]) -> list[Row]:
    return list({row.key: row for row in rows if row.status == "ok" and row.mode != "check"}.values())


def _family(row: Row) -> tuple[str, str, str]:
    """What a panel shows: rows that differ in T and provider only."""
    sizes = " ".join(f"{name}{getattr(row, name)}" for name in "BNKV")
    return f"{row.kernel} {row.mode}", sizes, row.dtype


def _panels(rows: Sequence[Row], keep: Callable[[Row], bool], value: Value) -> dict[tuple[str, str, str], list[Row]]:
    panels: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if keep(row) and value(row) is not None:
            panels.setdefault(_family(row), []).append(row)
    return panels


def _lines(path: Path, rows: Sequence[Row], keep: Callable[[Row], bool], value: Value, x: str, y: str) -> Path | None:
    """One panel for each family, one line for each provider, both axes logarithmic.

    Families that were measured at one length are left out if another was measured at several.
    """
    panels = _panels(rows, keep, value)
    if not panels:
        return None
    lengths = {family: sorted({row.T for row in members}) for family, members in panels.items()}
    enough = min(2, max(map(len, lengths.values())))
    panels = {family: members for family, members in panels.items() if len(lengths[family]) >= enough}
    colour = _colours(rows)
    figure, axes = _figure(len(panels))
    for axis, (family, members) in zip(axes, sorted(panels.items()), strict=True):
        for provider in sorted({row.provider for row in members}):
            points = sorted((row.T, value(row)) for row in members if row.provider == provider)
            where, values = [t for t, _ in points], [v for _, v in points]
            axis.plot(where, values, marker="o", label=provider, color=colour[provider])
        axis.set(title=", ".join(family), xlabel=x, ylabel=y, xscale="log", yscale="log")
        axis.set_xticks(lengths[family], [f"{T:,}" for T in lengths[family]])
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.yaxis.set_minor_formatter("")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize="small")
    return _save(figure, path)


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """The same colour for a provider in every panel."""
    return {provider: f"C{number}" for number, provider in enumerate(sorted({row.provider for row in rows}))}


def _bars(path: Path, rows: Sequence[Row]) -> Path | None:
    """Fraction of the floor: one panel for each problem, one bar for each provider."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        if row.of_floor is not None:
            panels.setdefault(f"{row.kernel} {row.mode}, {shape_of(row)}, {row.dtype}", []).append(row)
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
    figure.savefig(path, dpi=120)
    return path


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the plots that the rows have figures for and return their paths.

    Raises:
        ValueError: matplotlib is not installed, the folder cannot be written, or there is nothing to draw.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise ValueError("--plot needs matplotlib: pip install 'm2rnn-compile[plot]', or pip install matplotlib") from e
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
