# SPDX-License-Identifier: Apache-2.0
"""Facts of the machine and the code at hand: what every row of figures carries, and what `info` prints."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def now() -> str:
    """UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


@functools.cache
def cpu_model() -> str:
    """Name of the processor, as Linux or the platform module knows it."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def git(*arguments: str) -> str | None:
    """What git says about this checkout, or None where there is no git or no history."""
    return _output("git", "-C", str(ROOT), *arguments)


def revision(commit: str | None = None) -> str:
    """The commit, with a + for uncommitted changes. `commit` says it for a copy without history."""
    if commit:
        return commit
    head, status = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain")
    return "unknown" if head is None else head + ("+" if status else "")


def source_hash() -> str:
    """SHA-256 over the package's sources: says what ran even in a copy without git, or with uncommitted changes."""
    import m2rnn_compile

    digest = hashlib.sha256()
    package = Path(m2rnn_compile.__file__).parent
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".cpp")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def nvidia_smi(fields: str) -> list[list[str]]:
    """One list of values a GPU; empty where nvidia-smi is not there or does not answer."""
    text = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    return [[value.strip() for value in line.split(",")] for line in (text or "").splitlines()]


def driver() -> str | None:
    """Version of the NVIDIA driver."""
    answer = nvidia_smi("driver_version")
    return answer[0][0] if answer else None


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def of_row(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """The columns of a row that say where and with what it was made."""
    return {
        "device": device_name(device),
        "driver": driver() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "git": revision(commit),
        "date": now(),
    }


def cache_folders() -> dict[str, str]:
    """Where compiled code is kept: delete these for a cold start."""
    from m2rnn_compile.lowering.cpu.build import cache_dir

    triton = os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache")
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if inductor is None:
        try:
            from torch._inductor.runtime.cache_dir_utils import cache_dir as inductor_cache_dir

            inductor = inductor_cache_dir()
        except ImportError:  # a private module of torch: it may move
            inductor = "unknown"
    return {"C++ kernel": str(cache_dir()), "Triton": triton, "Inductor": inductor}
