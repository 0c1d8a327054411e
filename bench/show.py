# SPDX-License-Identifier: Apache-2.0
"""Tables of records: the same ones after a run and from a file."""

from __future__ import annotations

import itertools
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .shapes import Shape


def headline(record: dict[str, Any]) -> str:
    """Where and with what the record was made, in one line."""
    git = record["git"]
    commit = (git["commit"] or "no git")[:12] + {True: " + uncommitted changes", False: "", None: ""}[git["dirty"]]
    gpu = any(row.get("device") == "cuda" for row in record["rows"])
    where = record["gpus"][0] if gpu and record["gpus"] else f"{record['cpu']}, {record['threads']} threads"
    triton = f", triton {record['triton']}" if gpu else ""
    return f"{record['date']} · {where} · torch {record['torch']}{triton}, Python {record['python']} · {commit}"


def milliseconds(value: float) -> str:
    """Three or four significant digits."""
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:,.1f}"


def op_tables(record: dict[str, Any]) -> list[Table]:
    """One table a shape and dtype."""
    tables = []
    key = lambda row: (str(row["shape"]), row["dtype"])
    for _, group in itertools.groupby(record["rows"], key=key):
        rows = list(group)
        shape, first = Shape(**rows[0]["shape"]), rows[0]
        name = "" if "," in shape.name else f"{shape.name}: "
        table = Table(
            title=f"{name}{shape}, {first['dtype']}, clip {first['clip']}",
            title_justify="left",
            title_style="bold",
            caption=f"speed-up against {first['baseline']}, by medians",
            caption_justify="left",
        )
        with_memory = any(row.get("peak_extra_mib") is not None for row in rows)
        with_floor = any(row.get("floor_ms") is not None for row in rows)
        table.add_column("pass")
        table.add_column("impl", style="cyan")
        for column in ("median ms", "min", "max", "runs", "speed-up"):
            table.add_column(column, justify="right")
        if with_memory:
            table.add_column("extra peak MiB", justify="right")
        if with_floor:
            table.add_column("floor ms", justify="right")
            table.add_column("of floor", justify="right")
        previous = None
        for row in rows:
            if previous not in (None, row["pass"]):
                table.add_section()
            label, previous = ("" if previous == row["pass"] else row["pass"]), row["pass"]
            if "error" in row:
                table.add_row(label, row["impl"], Text(row["error"], style="red"))
                continue
            cells = [
                label,
                row["impl"],
                milliseconds(row["median_ms"]),
                milliseconds(row["min_ms"]),
                milliseconds(row["max_ms"]),
                str(row["runs"]),
                "" if row["speedup"] is None else f"{row['speedup']:.2f}×",
            ]
            if with_memory:
                cells.append("" if row["peak_extra_mib"] is None else f"{row['peak_extra_mib']:,.0f}")
            if with_floor:
                cells += [f"{milliseconds(row['floor_ms'])} ({row['floor_bound']})", f"{row['floor_fraction']:.0%}"]
            table.add_row(*cells)
        tables.append(table)
    return tables


def check_tables(record: dict[str, Any]) -> list[Table]:
    """One table a shape; a failed row names its tensors and their worst slices."""
    tables = []
    for _, group in itertools.groupby(record["rows"], key=lambda row: str(row["shape"])):
        rows = list(group)
        table = Table(
            title=f"{Shape(**rows[0]['shape'])}: error against the fp64 oracle, of what the rule allows",
            title_justify="left",
            title_style="bold",
        )
        table.add_column("dtype", no_wrap=True)
        table.add_column("clip", no_wrap=True)
        table.add_column("impl", style="cyan", no_wrap=True)
        table.add_column("worst", justify="right", no_wrap=True)
        table.add_column("where")
        table.add_column("bits", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for row in rows:
            name, worst = max(row["tensors"].items(), key=lambda item: (not item[1]["ok"], item[1]["worst_ratio"]))
            failing = [f"{n} [{e['worst_slice']}]" for n, e in row["tensors"].items() if not e["ok"]]
            repeats = row["repeats"]
            table.add_row(
                row["dtype"],
                str(row["clip"]),
                row["impl"],
                f"{worst['worst_ratio']:.0%}",
                Text(", ".join(failing) or f"{name} [{worst['worst_slice']}]"),
                f"{repeats - row['different_repeats']}/{repeats}" if repeats else "–",
                Text("pass", style="green") if row["ok"] else Text("FAIL", style="bold red"),
            )
        tables.append(table)
    tables[-1].caption = (
        "allowed: 2 × the error of a low-precision eager run + one rounding, per tensor and per time slice; "
        "bits: repeats equal to the first run"
    )
    return tables


def test_tables(record: dict[str, Any]) -> list[Table]:
    """Outcomes of a GPU test run: counts, and every test that did not pass."""
    counts: dict[str, int] = {}
    for row in record["rows"]:
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
    title = "GPU tests: " + (", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())) or "none ran")
    table = Table(title=title, title_justify="left", title_style="bold", min_width=70)
    table.add_column("test")
    table.add_column("outcome")
    table.add_column("why")
    for row in record["rows"]:
        if row["outcome"] != "passed":
            table.add_row(Text(row["test"]), row["outcome"], Text(row["message"]))
    return [table]


def render(record: dict[str, Any], console: Console) -> None:
    """Print a record."""
    tables = {"op": op_tables, "check": check_tables, "test-gpu": test_tables}[record["kind"]](record)
    console.print()
    for table in tables:
        console.print(table, "")
    console.print(Text(headline(record), style="dim"))
    console.print(Text(record["command"], style="dim"))
