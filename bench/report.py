# SPDX-License-Identifier: Apache-2.0
"""`python -m bench report`: Markdown to paste into a document."""

from __future__ import annotations

from collections.abc import Sequence

from .files import markdown_line
from .rows import Row
from .tables import headline, mebibytes, milliseconds, reference_of, shape_of, thousands, what_it_computes

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
    """A heading for each kernel, shape and dtype; a table for each mode; environments at the end.

    Rows of checks are left out; of rows with the same key, the last counts.
    """
    latest = {row.key: row for row in rows if row.mode != "check"}
    present = [row for row in latest.values() if row.status != "missing"]
    lines: list[str] = ["# Benchmark report", ""]
    sections: dict[str, dict[str, list[Row]]] = {}
    for row in present:
        clip = "" if row.kernel == "step" else f", clip {row.config.get('clip')}"
        heading = f"{row.kernel}, {shape_of(row)}, {row.dtype}{clip}"
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
