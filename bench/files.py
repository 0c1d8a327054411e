# SPDX-License-Identifier: Apache-2.0
"""Files of rows: JSON lines, CSV and Markdown, written row by row so that an interrupted run keeps what it has."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from . import migrate, record, rows
from .rows import COLUMNS, Row

SUFFIXES = (".jsonl", ".csv", ".md")
_MARKDOWN = (
    ("kernel", "provider", "operator", "mode", "dtype", "B", "T", "N", "K", "V", "status")
    + ("median_ms", "p20_ms", "p80_ms", "compile_s", "peak_mib", "kept_mib", "tokens_per_s", "tflops_per_s")
    + ("gbytes_per_s", "floor_ms", "of_floor", "error_ratio", "note", "device", "git", "date")
)  # fmt: skip


def to_jsonl(row: Row) -> str:
    """One line, without its end."""
    return json.dumps(row.to_dict(), ensure_ascii=False)


def to_csv(row: Row) -> str:
    """One line, without its end; mappings and lists as JSON."""
    buffer = io.StringIO()
    values = row.to_dict()
    nested = {name: json.dumps(values[name], ensure_ascii=False) for name in ("config", "samples_ms")}
    csv.DictWriter(buffer, COLUMNS, lineterminator="").writerow(values | nested)
    return buffer.getvalue()


def cell(value: Any) -> str:
    """A value as a table shows it: four significant digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def markdown_line(values: Sequence[Any]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cell(value).replace("|", "\\|").replace("\n", " ") for value in values) + " |"


def to_markdown(row: Row) -> str:
    """One line of the wide table."""
    return markdown_line([getattr(row, name) for name in _MARKDOWN])


_FORMATS: dict[str, tuple[str, Callable[[Row], str]]] = {
    ".jsonl": ("", to_jsonl),
    ".csv": (",".join(COLUMNS) + "\n", to_csv),
    ".md": (markdown_line(_MARKDOWN) + "\n" + "|---" * len(_MARKDOWN) + "|\n", to_markdown),
}


class _File:
    """One file to be. Rows go to a file of another name beside it, which takes its place with the first row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header, self._convert = _FORMATS[path.suffix]
        # Where a link points; and told apart from what another run writes.
        self._target = path.resolve()
        self._partial: Path | None = self._target.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            if self._target.exists() and not (self._target.is_file() and os.access(self._target, os.W_OK)):
                raise ValueError(f"--out {path}: cannot be written (it is no file, or write-protected)")
            self._file = self._partial.open("w", encoding="utf-8", newline="")
        except OSError as e:
            raise ValueError(f"--out {path}: cannot be written ({e.strerror})") from e

    def append(self, row: Row) -> None:
        try:
            first = self._header if self._partial is not None else ""
            self._file.write(first + self._convert(row) + "\n")
            self._file.flush()
            if self._partial is not None:
                self._partial.replace(self._target)
                self._partial = None
        except OSError as e:
            raise ValueError(f"--out {self.path}: cannot be written ({e.strerror})") from e

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk was told at the write
            self._file.close()
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)


class Writer:
    """Writes each row to every file at once. Opening fails before any work is done; a failed write says which file.

    What was there under a name stays until there is a first row to put in its place: a run that ends before it, by an
    error or Ctrl-C, costs nobody a file.

    Raises:
        ValueError: an unknown suffix, or a file that cannot be written.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files: list[_File] = []
        for path in paths:
            if path.suffix not in _FORMATS:
                raise ValueError(f"--out {path}: the name must end in {', '.join(SUFFIXES)}")
        try:
            for path in dict.fromkeys(paths):
                self._files.append(_File(path))
        except ValueError:
            self.close()
            raise

    def append(self, row: Row) -> None:
        for file in self._files:
            file.append(row)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _from_csv(text: str) -> list[dict[str, Any]]:
    result = []
    types = {field.name: field.type for field in rows.dataclasses.fields(Row)}
    for values in csv.DictReader(io.StringIO(text), strict=True):
        parsed: dict[str, Any] = {}
        for name, value in values.items():
            if name is None or value is None:
                raise ValueError("a line with another number of columns than the header")
            kind = types.get(name, "str")
            if value == "" and "None" in kind:
                parsed[name] = None
            elif kind.startswith("int"):
                parsed[name] = int(value)
            elif kind.startswith("float"):
                parsed[name] = float(value)
            elif name in ("config", "samples_ms"):
                parsed[name] = json.loads(value or "null")
            else:
                parsed[name] = value
        result.append(parsed)
    return result


def _from_jsonl(text: str) -> list[Any]:
    result = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                result.append(json.loads(line))
            except ValueError as e:
                raise ValueError(f"line {number} is not JSON ({e})") from e
    return result


def read(path: Path) -> list[Row]:
    """Rows of a .jsonl, .csv or (schema 1) .json file.

    Raises:
        ValueError: one line that names the file and what is wrong with it.
    """
    if path.suffix == ".json":
        document = record.load(path)
        if document["kind"] == "test-gpu":
            raise ValueError(f"{path}: outcomes of GPU tests, not timings; print them with `python -m bench show`")
        try:
            return migrate.rows_of_record(document)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from e
    if path.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"{path}: rows are read from .jsonl, .csv and .json files")
    try:
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise ValueError("the file is empty")
        parsed = _from_csv(text) if path.suffix == ".csv" else _from_jsonl(text)
        if not parsed:
            raise ValueError("the file holds no rows")
        result = []
        for number, values in enumerate(parsed, 1):
            if not isinstance(values, dict):
                raise ValueError(f"row {number}: expected a mapping of columns, got {type(values).__name__}")
            try:
                result.append(rows.from_dict(values))
            except ValueError as e:
                raise ValueError(f"row {number}: {e}") from e
        return result
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror})") from e
    except (ValueError, csv.Error) as e:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{path}: not a file of benchmark rows ({e})") from e
