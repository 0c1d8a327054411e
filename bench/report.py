# SPDX-License-Identifier: Apache-2.0
"""`python -m bench report`: Markdown to paste into a document."""

from __future__ import annotations

from collections.abc import Sequence

from .files import markdown_line
from .rows import Row
from .shapes import PRESETS
from .tables import (
    headline,
    mebibytes,
    milliseconds,
    place_of,
    reference_of,
    shape_of,
    thousands,
    what_it_computes,
    what_of,
)

_HEADER = (
    ("provider", "ms (p20 to p80)", "vs", "peak MiB", "kept MiB", "tokens/s", "TFLOP/s", "GB/s", "of floor", "error")
)  # fmt: skip


def _line(row: Row, base: float | None) -> str:
    if row.status != "ok":
        return markdown_line([row.provider, f"{row.status}: {row.note}", *[""] * (len(_HEADER) - 2)])
    spread = f"{milliseconds(row.median_ms)} ({milliseconds(row.p20_ms)} to {milliseconds(row.p80_ms)})"
    return markdown_line(
        [
            row.provider,
            spread,
            f"{base / row.median_ms:.2f}x" if base and row.median_ms else "",
            mebibytes(row.peak_mib),
            mebibytes(row.kept_mib),
            thousands(row.tokens_per_s),
            row.tflops_per_s,
            row.gbytes_per_s,
            "" if row.of_floor is None else f"{row.of_floor:.0%} ({row.floor_bound})",
            "" if row.error_ratio is None else f"{row.error_ratio:.2f}",
        ]
    )


def markdown(rows: Sequence[Row], against: str | None = None) -> str:
    """A heading for each kernel, shape, dtype and place; a table for each mode; environments at the end.

    Rows of checks are left out; of rows with the same key and place, the last counts.
    """
    latest = {row.figure: row for row in rows if row.mode != "check"}
    present = [row for row in latest.values() if row.status != "missing"]
    lines: list[str] = ["# Benchmark report", ""]
    sections: dict[str, dict[str, list[Row]]] = {}
    place = place_of(present)
    for row in present:
        model = f"{row.model}: " if row.model else ""
        heading = f"{row.kernel}, {model}{what_of(row)}{place(row)}"
        sections.setdefault(heading, {}).setdefault(row.mode, []).append(row)
    for heading, modes in sections.items():
        lines += [f"## {heading}", ""]
        everything = [row for group in modes.values() for row in group]
        reference = reference_of(everything, against)
        for mode, group in modes.items():
            base = next((row.median_ms for row in group if row.provider == reference and row.status == "ok"), None)
            header = [f"vs {reference}" if name == "vs" and reference else name for name in _HEADER]
            lines += [f"{mode}:", "", markdown_line(header), "|---" * len(_HEADER) + "|"]
            lines += [*(_line(row, base) for row in group), ""]
        notes = dict.fromkeys(filter(None, (what_it_computes(row) for row in everything if row.status == "ok")))
        lines += [f"- {note}" for note in notes] + [""] * bool(notes)
    absent = {row.provider: row.note for row in latest.values() if row.status == "missing"}
    if absent:
        lines += ["## Missing", "", *(f"- {provider}: {note}" for provider, note in absent.items()), ""]
    lines += ["## Where and with what", "", *(f"- {line}" for line in headline(present).splitlines())]
    return "\n".join(lines) + "\n"


def _summary_cell(row: Row | None, base: Row) -> str:
    if row is None:
        return ""
    if row.status != "ok" or row.median_ms is None:
        return row.status
    faster = ""
    if row is not base and row.operator == base.operator and base.median_ms:
        faster = f", {row.median_ms / base.median_ms:.2f}x"
    peak = "" if row.peak_mib is None else f" ({mebibytes(row.peak_mib)})"
    return f"{milliseconds(row.median_ms)}{peak}{faster}"


def summary(rows: Sequence[Row], providers: Sequence[str]) -> str:
    """One table: a line for each problem and mode, a column for each provider; then what they compute, and where.

    A time of the same operator is followed by how often the first provider's it is. Left out are lines that have one
    provider only, backward (it is a part of another mode), and presets at lengths that are not their own, if there are
    others: a sweep over T is for the plot.

    Raises:
        ValueError: nothing is left.
    """
    latest = {row.figure: row for row in rows if row.mode not in ("check", "backward") and row.status != "missing"}
    if own := {key: row for key, row in latest.items() if row.shape not in PRESETS or row.T == PRESETS[row.shape].T}:
        latest = own
    lines: dict[tuple[str, str, str], dict[str, Row]] = {}
    place = place_of(list(latest.values()))
    for row in latest.values():
        what = f"{row.kernel}, {row.dtype}" + ("" if row.kernel == "step" else f", clip {row.config.get('clip')}")
        what += (f", {row.depth}" if row.depth else "") + place(row)
        name = f"{row.shape}: " if row.shape in PRESETS else ""
        lines.setdefault((what, f"{name}{shape_of(row)}", row.mode), {})[row.provider] = row
    providers = [name for name in providers if any(name in line for line in lines.values())]
    used: list[Row] = []
    table = [markdown_line(["problem", "mode", *providers]), "|---" * (2 + len(providers)) + "|"]
    lines = {key: line for key, line in lines.items() if len(line) >= min(2, len(providers))}
    if not lines:
        raise ValueError(
            "--summary: no problem was measured with two providers; name one with --provider, or leave it out"
        )
    kinds = list(dict.fromkeys(what for what, _, _ in lines))
    for (what, title, mode), line in lines.items():
        title = title if len(kinds) == 1 else f"{what}, {title}"  # else the caption says it
        base = next(line[name] for name in providers if name in line)
        table.append(markdown_line([title, mode, *(_summary_cell(line.get(name), base) for name in providers)]))
        used += line.values()
    first = f"; of the same operator, time / that of {providers[0]}" if len(providers) > 1 else ""
    caption = f"{kinds[0]}: m" if len(kinds) == 1 else "M"
    caption += f"edian ms (peak MiB beyond the inputs){first}."
    notes = dict.fromkeys(filter(None, (_without_sizes(what_it_computes(row)) for row in used if row.status == "ok")))
    bullets = [f"- {line}" for line in (*notes, *headline(used).splitlines())]
    return "\n".join([caption, "", *table, "", *bullets]) + "\n"


def _without_sizes(note: str) -> str:
    """What a peer computes, without the number of tokens, which differs from line to line."""
    return note.partition("; tokens ")[0]
