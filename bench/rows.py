# SPDX-License-Identifier: Apache-2.0
"""The one row schema: every figure of every subcommand is a `Row`, whatever file it is written to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

STATUSES = ("ok", "oom", "refused", "failed", "missing")


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement, or the reason why there is none. Times are milliseconds, memory is MiB.

    Attributes:
        kernel: op, step, layer or model.
        provider: who computed it.  operator: what it computes, as peers compute other things at the same shape class.
        mode: inference, forward, backward, forward+backward, train, generate or check.
        shape: name of the preset, or the sizes as given.
        status: ok; oom (out of memory); refused (by the correctness gate); failed (raised); missing (cannot run here).
        note: why, unless ok.
        compile_s: the first call less a warm one: compilation and tuning, as far as no cache on disk held them.
        peak_mib: the most memory a call holds beyond what was there before.  kept_mib: what lives from forward to
            backward, results included.
        floor_ms, floor_bound, of_floor: lower bound by bench/floors.py, what sets it, bound / median.
        gate: what the correctness gate compared with.  error_ratio: worst error / error the tolerance rule allows.
        config: everything else that was chosen (clip, head counts, seed, threads, version of a peer's package, ...).
    """

    kernel: str
    provider: str
    mode: str
    dtype: str
    B: int
    T: int
    N: int
    K: int
    V: int
    operator: str = "M²RNN"
    shape: str = ""
    status: str = "ok"
    note: str = ""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    min_ms: float | None = None
    runs: int | None = None
    compile_s: float | None = None
    peak_mib: float | None = None
    kept_mib: float | None = None
    tokens_per_s: float | None = None
    tflops_per_s: float | None = None
    gbytes_per_s: float | None = None
    floor_ms: float | None = None
    floor_bound: str | None = None
    of_floor: float | None = None
    gate: str = ""
    error_ratio: float | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    device: str = ""
    driver: str | None = None
    torch: str = ""
    triton: str | None = None
    python: str = ""
    git: str = ""
    date: str = ""
    samples_ms: tuple[float, ...] = ()

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.B, self.T, self.N, self.K, self.V

    @property
    def problem(self) -> tuple[Any, ...]:
        """What was asked, whoever answered: equal in two rows whose times may be compared."""
        heads = tuple(self.config.get(name) for name in ("Nq", "Nk", "Nv", "Nf", "Nw"))
        return self.kernel, self.mode, self.dtype, *self.sizes, heads, self.config.get("clip")

    @property
    def key(self) -> tuple[Any, ...]:
        """What identifies a row within a file."""
        return self.provider, *self.problem

    def describe(self) -> str:
        """The key in words."""
        sizes = " ".join(f"{name}{size}" for name, size in zip("BTNKV", self.sizes, strict=True))
        return f"{self.kernel} {self.provider} {self.mode} {sizes} {self.dtype}"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"samples_ms": list(self.samples_ms)}


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
_REQUIRED = tuple(field.name for field in dataclasses.fields(Row)[:9])
_NUMBERS = tuple(field.name for field in dataclasses.fields(Row) if field.type == "float | None")


def from_dict(values: Mapping[str, Any]) -> Row:
    """A row from the columns of a file.

    Raises:
        ValueError: naming the columns that are missing, unknown or of the wrong kind.
    """
    missing = [name for name in _REQUIRED if name not in values]
    unknown = sorted(set(values) - set(COLUMNS))
    if missing or unknown:
        problems = [f"no column {', '.join(missing)}"] * bool(missing) + [f"unknown {', '.join(unknown)}"] * bool(
            unknown
        )
        raise ValueError("; ".join(problems))
    for name in "BTNKV":
        if isinstance(values[name], bool) or not isinstance(values[name], int):
            raise ValueError(f"{name} is {values[name]!r}, expected a whole number")
    for name in _NUMBERS:
        if isinstance(values.get(name), bool) or not isinstance(values.get(name), (int, float, type(None))):
            raise ValueError(f"{name} is {values[name]!r}, expected a number")
    if values.get("status", "ok") not in STATUSES:
        raise ValueError(f"status is {values['status']!r}, expected one of {', '.join(STATUSES)}")
    if not isinstance(values.get("config", {}), dict):
        raise ValueError(f"config is {values['config']!r}, expected a mapping")
    if values.get("status", "ok") == "ok" and values["mode"] != "check" and not values.get("median_ms"):
        raise ValueError("a row with status ok has no median_ms")
    return Row(**{**values, "samples_ms": tuple(values.get("samples_ms") or ())})
