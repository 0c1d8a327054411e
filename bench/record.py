# SPDX-License-Identifier: Apache-2.0
"""Records of runs: one JSON file each, under bench/results/, with all that is needed to judge or repeat it."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SCHEMA = 1
KINDS = ("op", "check", "test-gpu")


def cpu_model() -> str:
    """Name of the processor, as Linux or the platform module knows it."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def source_hash() -> str:
    """SHA-256 over the package's sources: says what ran even in a copy without git, or with uncommitted changes."""
    digest = hashlib.sha256()
    package = ROOT / "m2rnn_compile"
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".cpp")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def environment(commit: str | None = None) -> dict[str, Any]:
    """Machine, versions and code of this run. `commit` stands in where there is no git history."""
    status = _git("status", "--porcelain")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git": {
            "commit": _git("rev-parse", "HEAD") or commit,
            "dirty": None if status is None else bool(status),
            "source_sha256": source_hash(),
        },
        "gpus": gpus,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
    }


def make_record(
    kind: str, argv: Sequence[str], rows: list[dict[str, Any]], *, commit: str | None = None, **extra: Any
) -> dict[str, Any]:
    """A record of one run: what was asked (`argv`), where it ran, and the rows of figures."""
    if kind not in KINDS:
        raise ValueError(f"record kind must be one of {', '.join(KINDS)}, got {kind!r}")
    command = argv[0] if kind == "test-gpu" else shlex.join(["python", "-m", "bench", *argv])
    return {"schema": SCHEMA, "kind": kind, "command": command, **environment(commit), **extra, "rows": rows}


def default_path(record: dict[str, Any]) -> Path:
    """bench/results/KIND-DEVICE-DATE.json; the device of the rows, else the first GPU."""
    on_gpu = any(row.get("device") == "cuda" for row in record["rows"])
    device = record["gpus"][0] if on_gpu and record["gpus"] else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    stamp = re.sub(r"[^0-9]", "", record["date"][:19])
    return RESULTS / f"{record['kind']}-{slug}-{stamp}.json"


def write(record: dict[str, Any], path: Path | None = None) -> Path:
    """Write a record (atomically) and return where."""
    path = path or default_path(record)
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
    return record
