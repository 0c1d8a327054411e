# SPDX-License-Identifier: Apache-2.0
"""Comparing rows with earlier ones: ratios, regressions, rows that went missing; and runs of another revision."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from . import environment, files
from .rows import Row
from .tables import heading, headline, make_table, mebibytes, milliseconds


class Change(NamedTuple):
    """One row before and after. `ratio` is after / before: above 1 is slower."""

    before: Row
    after: Row

    @property
    def ratio(self) -> float:
        assert self.after.median_ms is not None  # both are rows with status ok
        assert self.before.median_ms is not None
        return self.after.median_ms / self.before.median_ms

    @property
    def within_noise(self) -> bool:
        """The ranges p20 to p80 overlap."""
        a, b = self.before, self.after
        if None in (a.p20_ms, a.p80_ms, b.p20_ms, b.p80_ms):
            return False
        return a.p20_ms <= b.p80_ms and b.p20_ms <= a.p80_ms  # type: ignore[operator]


class Comparison(NamedTuple):
    """What two runs have in common, and what they have not.

    Attributes:
        changes: both sides have a time.
        missing: were there before and are not now, with the reason if there is one.
        new: have no row before.
        incomparable: before and after of the same question at different places, see `Row.place`: no ratio says anything
            about the code.
    """

    changes: list[Change]
    missing: list[tuple[Row, str]]
    new: list[Row]
    incomparable: list[tuple[Row, Row]]

    def slower_than(self, ratio: float) -> list[Change]:
        return [change for change in self.changes if change.ratio > ratio]

    @property
    def places(self) -> list[str]:
        """In what the places of rows differ that were not compared."""
        return sorted({a.place_against(b) for a, b in self.incomparable})


def compare(
    before: Sequence[Row], after: Sequence[Row], *, asked_only: bool = False, any_device: bool = False
) -> Comparison:
    """Match rows by what was asked, who answered and where. The last row of a figure counts.

    Args:
        asked_only: leave out what `after` did not ask for: other kernels, shapes, dtypes and modes, and providers that
            have no row at all in `after`; and other places, where `after` has a row of its own or none.
        any_device: where no row is of the same place, take one of another.
    """
    here = {row.place for row in after}
    old = {row.figure: row for row in before if row.status == "ok" and row.mode != "check"}
    now = {row.figure: row for row in after if row.mode != "check" and row.status != "missing"}
    keys = {row.key for row in now.values()}
    elsewhere = {row.key: row for figure, row in now.items() if figure not in old}
    absent = {row.provider: row.note for row in after if row.status == "missing"}
    problems = {row.problem for row in now.values()}
    providers = {row.provider for row in now.values()} | set(absent)
    changes: list[Change] = []
    missing: list[tuple[Row, str]] = []
    incomparable: list[tuple[Row, Row]] = []
    paired: set[tuple[object, ...]] = set()
    for figure, row in old.items():
        if asked_only and (row.problem not in problems or row.provider not in providers):
            continue
        match = now.get(figure)
        if match is None and row.key in elsewhere:
            match = elsewhere[row.key]
            paired.add(match.figure)
            if not any_device:
                incomparable.append((row, match))
                continue
        if match is None and asked_only and row.place not in here and (row.key in keys or not any_device):
            continue
        if match is None:
            missing.append((row, absent.get(row.provider, "")))
        elif match.status != "ok":
            missing.append((row, f"{match.status}: {match.note}"))
        else:
            changes.append(Change(row, match))
    new = [row for figure, row in now.items() if figure not in old and figure not in paired and row.status == "ok"]
    return Comparison(changes, missing, new, incomparable)


def parts_of(result: Comparison, title: str = "before and after") -> list[Table | Text]:
    """What changed; below 1 is faster."""
    table = make_table()
    for column in ("kernel", "shape", "dtype", "mode", "provider"):
        table.add_column(column, no_wrap=True)
    for column in ("before ms", "after ms", "ratio", "", "kept before", "after"):
        table.add_column(column, justify="right", no_wrap=True)
    for change in result.changes:
        a, b = change
        verdict = (
            Text("same")
            if change.within_noise
            else Text("slower", "red")
            if change.ratio > 1
            else Text("faster", "green")
        )
        table.add_row(
            b.kernel,
            b.describe_sizes(),
            b.dtype,
            b.mode,
            b.provider,
            milliseconds(a.median_ms),
            milliseconds(b.median_ms),
            f"{change.ratio:.3f}",
            verdict,
            mebibytes(a.kept_mib),
            mebibytes(b.kept_mib),
        )
    lines = [f"missing now: {row.describe()}" + (f" ({why})" if why else "") for row, why in result.missing]
    lines += [f"new: {row.describe()}" for row in result.new]
    lines += [f"not comparable: {b.describe()}: {a.place_against(b)}" for a, b in result.incomparable]
    places = sorted({change.before.place_against(change.after) for change in result.changes} - {""})
    lines += [f"{where}: the ratios are of the machines too" for where in places]
    versions = sorted({(c.before.torch, c.after.torch) for c in result.changes if c.before.torch != c.after.torch})
    lines += [f"another torch: {a or 'unknown'} before, {b or 'unknown'} after" for a, b in versions]
    if result.changes:
        lines += [f"before: {line}" for line in headline([change.before for change in result.changes]).splitlines()]
        lines += [f"after: {line}" for line in headline([change.after for change in result.changes]).splitlines()]
        lines.append("same: the ranges from p20 to p80 overlap")
    return [heading(title), *([table] if result.changes else []), Text("\n".join(lines))]


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[tuple[Path, str]]:
    """A checkout of a revision in a temporary folder, and its commit; removed afterwards.

    Raises:
        ValueError: no git, or no such revision.
    """
    commit = environment.git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if commit is None:
        raise ValueError(f"--rev {revision!r}: git knows no such revision in {environment.ROOT}")
    with tempfile.TemporaryDirectory(prefix="m2rnn-bench-") as folder:
        tree = Path(folder) / "tree"
        if environment.git("worktree", "add", "--detach", "--quiet", str(tree), commit) is None:
            raise ValueError(f"--rev {revision!r}: git worktree add failed")
        try:
            yield tree, commit[:12]
        finally:
            environment.git("worktree", "remove", "--force", str(tree))


def run_revision(revision: str, arguments: Sequence[str]) -> list[Row]:
    """Rows of `python -m bench ARGUMENTS` with the package of another revision and the bench of this tree.

    A process of its own, with its own import path: the two packages never meet.

    Raises:
        ValueError: no such revision, or its run failed.
    """
    with worktree(revision) as (tree, commit), tempfile.TemporaryDirectory(prefix="m2rnn-bench-") as folder:
        path = Path(folder)
        (path / "m2rnn_compile").symlink_to(tree / "m2rnn_compile")
        (path / "bench").symlink_to(environment.ROOT / "bench")
        out = path / "rows.jsonl"
        kept = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        own = {str(environment.ROOT), ""}
        search = [str(path), *(entry for entry in kept if str(Path(entry or ".").resolve()) not in own and entry)]
        command = [sys.executable, "-P", "-m", "bench", *arguments, "--out", str(out), "--commit", commit]
        if sys.version_info < (3, 11):
            command.remove("-P")  # the working directory is a folder without packages anyway
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(search)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        # 1 says that something was refused: what else has a time can be compared.
        rows = files.read(out) if done.returncode in (0, 1) and out.exists() else []
        if not any(row.status == "ok" for row in rows):
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"--rev {revision!r}: its run ended with code {done.returncode}: {last}")
        return rows
