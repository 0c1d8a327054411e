# SPDX-License-Identifier: Apache-2.0
"""Records of schema 1 (one JSON document a run, before there was one row schema) as rows."""

from __future__ import annotations

from typing import Any

from .rows import Row, from_dict
from .timing import Timing

HEADS = ("Nq", "Nk", "Nv", "Nf", "Nw")


def _common(record: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    shape, git = row["shape"], record["git"]
    on_gpu = row["device"] == "cuda" if "device" in row else bool(record["gpus"])
    return {
        "kernel": "op",
        "provider": row["impl"],
        "dtype": row["dtype"],
        **{name: shape[name] for name in "BTNKV"},
        "shape": shape["name"],
        "device": record["gpus"][0] if on_gpu and record["gpus"] else record["cpu"],
        "torch": record["torch"],
        "triton": record["triton"],
        "python": record["python"],
        "git": (git["commit"] or "unknown")[:12] + ("+" if git["dirty"] else ""),
        "date": record["date"],
    }


def _also(record: dict[str, Any]) -> dict[str, Any]:
    return {"threads": record.get("threads"), "command": record["command"]}


def _timed(record: dict[str, Any], row: dict[str, Any]) -> Row:
    config = {"clip": row["clip"], **{name: row["shape"][name] for name in HEADS}, **_also(record)}
    common = {**_common(record, row), "mode": row["pass"], "config": config, "gate": "none: schema 1 had no gate"}
    if "error" in row:
        return Row(**common, status="oom" if "memory" in row["error"] else "failed", note=row["error"])
    timing = Timing(tuple(row["samples_ms"]))
    return Row(
        **common,
        median_ms=row["median_ms"],
        p20_ms=timing.quantile_ms(0.2),
        p80_ms=timing.quantile_ms(0.8),
        min_ms=row["min_ms"],
        runs=row["runs"],
        peak_mib=row["peak_extra_mib"],
        tokens_per_s=1e3 * row["shape"]["B"] * row["shape"]["T"] / row["median_ms"],
        floor_ms=row["floor_ms"],
        floor_bound=row["floor_bound"],
        of_floor=row["floor_fraction"],
        samples_ms=timing.samples_ms,
    )


def _checked(record: dict[str, Any], row: dict[str, Any]) -> Row:
    config = {
        "clip": row["clip"],
        **{name: row["shape"][name] for name in HEADS},
        **{name: row[name] for name in ("repeats", "different_repeats", "tensors")},
        **_also(record),
    }
    return Row(
        **_common(record, row),
        mode="check",
        status="ok" if row["ok"] else "refused",
        gate=f"fp64 oracle ({row['oracle']})",
        error_ratio=max(entry["worst_ratio"] for entry in row["tensors"].values()),
        config=config,
    )


def rows_of_record(record: dict[str, Any]) -> list[Row]:
    """Rows of a record of kind op or check.

    Raises:
        ValueError: a record that does not hold what such records held.
    """
    convert = {"op": _timed, "check": _checked}[record["kind"]]
    try:
        return [from_dict(convert(record, row).to_dict()) for row in record["rows"]]
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as e:
        raise ValueError(f"a record of schema 1 with a row that cannot be read ({type(e).__name__}: {e})") from e
