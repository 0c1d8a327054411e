# SPDX-License-Identifier: Apache-2.0
"""Records of GPU test runs: one JSON document with the environment and the outcome of every test."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import environment

RESULTS = environment.ROOT / "bench" / "results"
SCHEMA = 1
KINDS = ("op", "check", "test-gpu")  # op and check are read only: such runs write rows now (bench/files.py)


def make_record(
    kind: str, argv: Sequence[str], rows: list[dict[str, Any]], *, commit: str | None = None, **extra: Any
) -> dict[str, Any]:
    """A record of one run: what was asked (`argv`), where it ran, and the outcomes."""
    if kind not in KINDS:
        raise ValueError(f"record kind must be one of {', '.join(KINDS)}, got {kind!r}")
    status = environment.git("status", "--porcelain")
    return {
        "schema": SCHEMA,
        "kind": kind,
        "command": shlex.join(argv) if len(argv) > 1 else argv[0],
        "date": environment.now(),
        "git": {
            "commit": environment.git("rev-parse", "HEAD") or commit,
            "dirty": None if status is None else bool(status),
            "source_sha256": environment.source_hash(),
        },
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu": environment.cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": environment.version("triton"),
        **extra,
        "rows": rows,
    }


def write(record: dict[str, Any], path: Path) -> Path:
    """Write a record (atomically) and return where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(record, indent=1, allow_nan=True) + "\n")
    partial.replace(path)
    return path


def load(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        ValueError: no such file, not JSON, or not a record of this program.
    """
    try:
        record = json.loads(path.read_text())
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror})") from e
    except ValueError as e:
        raise ValueError(f"{path}: not a JSON file ({e})") from e
    if not isinstance(record, dict) or record.get("kind") not in KINDS or not isinstance(record.get("rows"), list):
        raise ValueError(f"{path}: not a benchmark record; expected the keys kind ({', '.join(KINDS)}) and rows")
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{path}: record schema {record.get('schema')!r}, this program reads {SCHEMA}")
    for number, row in enumerate(record["rows"], 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: row {number}: expected a mapping, got {type(row).__name__}")
        bad = [name for name in ("test", "outcome", "message") if not isinstance(row.get(name), str)]
        if record["kind"] == "test-gpu" and bad:
            raise ValueError(f"{path}: row {number}: {', '.join(bad)} must be text")
    return record
