# SPDX-License-Identifier: Apache-2.0
"""Tables of rows: the same ones after a run and from a file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from .rows import Row
from .shapes import Shape


def make_table() -> Table:
    """A table that reads the same with and without colour."""
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)


def heading(text: str) -> Text:
    """The line above a table."""
    return Text(text, style="bold")


def milliseconds(value: float | None) -> str:
    """Three or four significant digits."""
    if value is None:
        return ""
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:,.1f}"


def mebibytes(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def thousands(value: float | None) -> str:
    """1234567 as 1.23M."""
    if value is None:
        return ""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def shape_of(row: Row) -> Shape:
    """The shape of a row, with its head counts."""
    heads = {name: row.config[name] for name in ("Nq", "Nk", "Nv", "Nf", "Nw") if row.config.get(name)}
    return Shape(row.shape, *row.sizes, **heads)


def title_of(row: Row) -> str:
    """Kernel, shape, layers of a model, dtype, clip."""
    name = f"{row.shape}: " if row.shape and "," not in row.shape else ""
    return f"{row.kernel} {name}{what_of(row)}"


def what_of(row: Row) -> str:
    """Sizes, layers of a model, dtype, clip."""
    depth = f", {row.depth}" if row.depth else ""
    clip = "" if row.kernel == "step" else f", clip {row.config.get('clip')}"
    return f"{shape_of(row)}{depth}, {row.dtype}{clip}"


def place_of(rows: Sequence[Row]) -> Callable[[Row], str]:
    """What to add to the title of a row: where it was measured, if the rows are of several places."""
    several = len({row.place for row in rows}) > 1
    return lambda row: f", {row.place}" if several and row.place else ""


def reference_of(rows: Sequence[Row], asked: str | None) -> str | None:
    """Whose time ratios refer to: who was asked for, else upstream, else the loop, else the first that ran."""
    names = [row.provider for row in rows if row.status == "ok"]
    return next((name for name in (asked, "xma", "reference", *names) if name in names), None)


def timing_tables(rows: Sequence[Row], against: str | None = None) -> list[Table | Text]:
    """One table for each kernel, shape, dtype and place; under it what peers compute and who is missing."""
    result: list[Table | Text] = []
    place = place_of(rows)
    for title, group in itertools.groupby(rows, key=lambda row: title_of(row) + place(row)):
        everything = list(group)
        present = [row for row in everything if row.status != "missing"]
        reference = reference_of(present, against)
        table = make_table()
        table.add_column("mode", no_wrap=True)
        table.add_column("provider", style="cyan", no_wrap=True)
        columns = ("median ms", "p20", "p80", f"vs {reference}" if reference else "vs", "compile s", "peak MiB")
        for column in (*columns, "kept MiB", "tokens/s", "TFLOP/s", "GB/s", "of floor", "error"):
            table.add_column(column, justify="right", no_wrap=True)
        previous = None
        for mode, same in itertools.groupby(present, key=lambda row: row.mode):
            timed = list(same)
            if previous is not None:
                table.add_section()
            base = next((row.median_ms for row in timed if row.provider == reference and row.status == "ok"), None)
            for row in timed:
                label, previous = ("" if mode == previous else mode), mode
                table.add_row(label, row.provider, *_cells(row, base))
        result += [heading(title), table, *_notes(everything), Text()]
    return result


def _cells(row: Row, base: float | None) -> list[Any]:
    if row.status != "ok":
        return [Text(row.status, style="red")]
    floor = "" if row.of_floor is None else f"{row.of_floor:.1%} {row.floor_bound}"
    return [
        milliseconds(row.median_ms),
        milliseconds(row.p20_ms),
        milliseconds(row.p80_ms),
        f"{base / row.median_ms:.2f}x" if base and row.median_ms else "",
        "" if row.compile_s is None else f"{row.compile_s:.1f}",
        mebibytes(row.peak_mib),
        mebibytes(row.kept_mib),
        thousands(row.tokens_per_s),
        "" if row.tflops_per_s is None else f"{row.tflops_per_s:.3g}",
        "" if row.gbytes_per_s is None else f"{row.gbytes_per_s:.3g}",
        floor,
        "" if row.error_ratio is None else f"{row.error_ratio:.2f}",
    ]


def what_it_computes(row: Row) -> str:
    """For the note below a table: the operator of a peer and its version; empty for M²RNN by this library."""
    version = row.config.get("version")
    if row.operator == "M²RNN" and not version:
        return ""
    return f"{row.provider}{f' ({version})' if version else ''} computes {row.operator}"


def _notes(rows: Sequence[Row]) -> list[Table | Text]:
    lines: dict[str, None] = {}
    for row in rows:
        if row.status == "missing":
            lines[f"missing {row.provider}: {row.note}"] = None
        elif row.status != "ok":
            lines[f"{row.provider} {row.mode}: {row.note}"] = None
        elif what := what_it_computes(row):
            lines[what] = None
    return [Text("\n".join(lines), style="dim")] if lines else []


LEGEND = (
    "compile s: first call less a warm one; what a cache on disk holds is not compiled again\n"
    "peak, kept: beyond the inputs; kept is the results and what backward needs\n"
    "of floor: lower bound of the hardware / median, and what sets it\n"
    "error: worst error / error the tolerance allows (peers, layers and models may err 4x; peers 8 roundings)"
)


def check_tables(rows: Sequence[Row]) -> list[Table | Text]:
    """One table a shape; a failed row names its tensors and their worst slices."""
    result: list[Table | Text] = []
    place = place_of(rows)
    for _, group in itertools.groupby(rows, key=lambda row: (row.shape, row.sizes, row.place)):
        checked = list(group)
        table = make_table()
        for column, justify in (("dtype", "left"), ("clip", "left"), ("provider", "left"), ("worst", "right")):
            table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        table.add_column("where")
        table.add_column("bits", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for row in checked:
            first = [row.dtype, str(row.config.get("clip")), row.provider]
            if "tensors" not in row.config:
                table.add_row(*first, "", Text(row.note), "", Text(row.status, style="bold red"))
                continue
            tensors = row.config["tensors"]
            name, worst = max(tensors.items(), key=lambda item: (not item[1]["ok"], item[1]["worst_ratio"]))
            failing = [f"{n} [{e['worst_slice']}]" for n, e in tensors.items() if not e["ok"]]
            repeats = row.config["repeats"]
            table.add_row(
                *first,
                f"{worst['worst_ratio']:.0%}",
                Text(", ".join(failing) or f"{name} [{worst['worst_slice']}]"),
                f"{repeats - row.config['different_repeats']}/{repeats}" if repeats else "-",
                Text("pass", style="green") if row.status == "ok" else Text("FAIL", style="bold red"),
            )
        title = f"{shape_of(checked[0])}{place(checked[0])}: error against the fp64 oracle, of what the rule allows"
        result += [heading(title), table, Text()]
    result.append(
        Text(
            "allowed: 2 x the error of a low-precision eager run + one rounding, per tensor and per time slice; "
            "bits: repeats equal to the first run",
            style="dim",
        )
    )
    return result


def test_tables(record: dict[str, Any]) -> list[Table | Text]:
    """Outcomes of a GPU test run: counts, and every test that did not pass."""
    counts: dict[str, int] = {}
    for row in record["rows"]:
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
    title = "GPU tests: " + (", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())) or "none ran")
    table = make_table()
    for column in ("test", "outcome", "why"):
        table.add_column(column)
    for row in record["rows"]:
        if row["outcome"] != "passed":
            table.add_row(Text(row["test"]), row["outcome"], Text(row["message"]))
    return [heading(title), table] if table.rows else [heading(title)]


def headline(rows: Sequence[Row]) -> str:
    """Where and with what rows were made; several lines where they differ."""
    places: dict[str, None] = {}
    for row in rows:
        triton = f", triton {row.triton}" if row.driver or "NVIDIA" in row.device else ""
        driver = f", driver {row.driver}" if row.driver else ""
        versions = f"torch {row.torch}{triton}, Python {row.python}, git {row.git}"
        places[f"{row.date[:10]}, {row.place}{driver}, {versions}"] = None
    return "\n".join(places)


def parts_of(rows: Sequence[Row], against: str | None = None) -> list[Table | Text]:
    """Everything there is to show of rows."""
    checks = [row for row in rows if row.mode == "check"]
    timings = [row for row in rows if row.mode != "check"]
    parts = timing_tables(timings, against) + (check_tables(checks) if checks else [])
    if timings:
        parts.append(Text(LEGEND, style="dim"))
    return [*parts, Text(headline(rows), style="dim")]
