# SPDX-License-Identifier: Apache-2.0
"""The one row schema: every figure of every subcommand is a `Row`, whatever file it is written to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from .shapes import WIDTHS

MODES = ("inference", "forward", "backward", "forward+backward", "train", "generate", "check")
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
        return self.kernel, self.mode, self.dtype, *self.sizes, heads, self.config.get("clip"), self.model, self.depth

    @property
    def model(self) -> str:
        """Of a layer or model, the preset that sets its width (and MLP and vocabulary), which the sizes do not say."""
        return self.shape if self.kernel in ("layer", "model") and self.shape in WIDTHS else ""

    @property
    def depth(self) -> str:
        """Of a model, its layers where they are not the preset's."""
        layers = self.config.get("layers")
        return self.config.get("pattern") or (f"{layers} layers" if layers else "")

    @property
    def threads(self) -> int | None:
        """Threads that the times depend on: those of a CPU; None of a GPU, and where a row does not say."""
        return None if self.driver or "NVIDIA" in self.device else self.config.get("threads")

    @property
    def place(self) -> str:
        """The machine, as far as times depend on it: the device, and on a CPU the number of threads."""
        return self.device + (f", {self.threads} thread{'s' * (self.threads > 1)}" if self.threads else "")

    def place_against(self, other: Row) -> str:
        """In what the places of two rows differ; empty if in nothing."""
        differ = []
        if self.device != other.device:
            differ.append(f"device {self.device or 'unknown'} against {other.device or 'unknown'}")
        if self.threads != other.threads:
            differ.append(f"threads {self.threads or 'unknown'} against {other.threads or 'unknown'}")
        return ", ".join(differ)

    @property
    def key(self) -> tuple[Any, ...]:
        """What was asked and who answered: what two runs are compared by, wherever they ran."""
        return self.provider, *self.problem

    @property
    def figure(self) -> tuple[Any, ...]:
        """What identifies a figure: of two rows with the same, the later one counts."""
        return self.place, *self.key

    def describe(self) -> str:
        """The key in words."""
        return f"{self.kernel} {self.provider} {self.mode} {self.describe_sizes()} {self.dtype}"

    def describe_sizes(self) -> str:
        sizes = (f"{name}{size}" for name, size in zip("BTNKV", self.sizes, strict=True))
        return " ".join([*sizes, *filter(None, (self.model, self.depth))])

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"samples_ms": list(self.samples_ms)}


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
_REQUIRED = tuple(field.name for field in dataclasses.fields(Row)[:9])
_TYPES = {field.name: str(field.type) for field in dataclasses.fields(Row)}
_HEADS = ("Nq", "Nk", "Nv", "Nf", "Nw")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any, *, finite: bool = True) -> bool:
    """A number that is not negative. NaN is none: nothing is ever above it, or below."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return float(value) >= 0 and (math.isfinite(value) or not finite)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _check_column(name: str, value: Any) -> None:
    """One column by itself."""
    kind = _TYPES[name]
    if value is None and "None" in kind:
        return
    if kind.startswith("str"):
        fits, expected = isinstance(value, str), "text"
    elif name in ("config", "samples_ms"):
        return  # below
    elif kind.startswith("int"):
        fits, expected = _whole(value, 1), "a whole number of at least 1"
    else:
        fits, expected = _number(value), "a number, finite and not below 0"
    if not fits:
        raise ValueError(f"{name} is {value!r}, expected {expected}")


def _check_config(config: Any, N: int) -> None:
    if not isinstance(config, dict):
        raise ValueError(f"config is {config!r}, expected a mapping")

    def expect(name: str, what: str, fits: Callable[[Any], bool]) -> None:
        value = config.get(name)
        if value is not None and not fits(value):
            raise ValueError(f"config.{name} is {value!r}, expected {what}")

    for name in _HEADS:
        expect(name, f"a number of heads that divides N = {N}", lambda n: _whole(n, 1) and N % n == 0)
    expect("clip", "a number ≥ 0 or null", lambda x: _number(x, finite=False))
    for name in ("threads", "layers"):
        expect(name, "a whole number of at least 1", lambda n: _whole(n, 1))
    for name in ("pattern", "version"):
        expect(name, "text", lambda x: isinstance(x, str))
    if "tensors" in config:
        _check_tensors(config)


def _check_tensors(config: Mapping[str, Any]) -> None:
    """What a check found; a ratio may be NaN or infinite there: it fails the check."""
    for name in ("repeats", "different_repeats"):
        if not _whole(config.get(name), 0):
            raise ValueError(f"config.{name} is {config.get(name)!r}, expected a whole number of at least 0")
    tensors = config["tensors"]
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError(f"config.tensors is {tensors!r}, expected a mapping of what was judged")
    for name, entry in tensors.items():
        ratio = entry.get("worst_ratio") if isinstance(entry, dict) else None
        if (
            not (_number(ratio, finite=False) or (isinstance(ratio, float) and math.isnan(ratio)))
            or not isinstance(entry.get("ok"), bool)
            or not isinstance(entry.get("worst_slice"), str)
        ):
            raise ValueError(f"config.tensors[{name!r}] is {entry!r}, expected ok, worst_ratio and worst_slice")


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
    for name, value in values.items():
        _check_column(name, value)
    status, mode = values.get("status", "ok"), values["mode"]
    if status not in STATUSES:
        raise ValueError(f"status is {status!r}, expected one of {', '.join(STATUSES)}")
    if mode not in (*MODES, *[""] * (status == "missing")):
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
    _check_config(values.get("config", {}), values["N"])
    samples = values.get("samples_ms") or []
    if not isinstance(samples, (list, tuple)) or not all(map(_number, samples)):
        raise ValueError(f"samples_ms is {samples!r}, expected a list of numbers, finite and not below 0")
    if status == "ok" and mode != "check" and not values.get("median_ms"):
        raise ValueError("a row with status ok has no median_ms")
    return Row(**{**values, "samples_ms": tuple(samples)})
