# SPDX-License-Identifier: Apache-2.0
"""Launch configurations found by timing, for whoever asks for it: kept on disk, never looked for on their own.

Without `tune` or `load_tuned` the pinned configurations of `config.py` hold. What was found belongs to one GPU model,
one version of Triton and one version of the kernels' sources, which are in the file's name, and to a dtype and a number
of scans, K and V, which are the key; never to T, so that a new length never tunes anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.errors import TritonError

from ..cpu.build import cache_dir
from .config import LaunchConfig, next_power_of_2

FORMAT = 1
_found: dict[str, LaunchConfig] = {}


class Timed(NamedTuple):
    """One candidate: what it took, or why it was not taken."""

    direction: str  # "forward" or "backward"
    config: LaunchConfig
    ms: float | None
    problem: str | None
    pinned: bool
    chosen: bool


def key(direction: str, dtype: torch.dtype, scans: int, K: int, V: int) -> str:
    return f"{direction} {str(dtype).removeprefix('torch.')} scans{scans} K{K} V{V}"


def chosen(direction: str, dtype: torch.dtype, scans: int, K: int, V: int) -> LaunchConfig | None:
    """What `tune` or `load_tuned` put here for such scans."""
    return _found.get(key(direction, dtype, scans, K, V)) if _found else None


def forget() -> None:
    """Back to the pinned configurations, in this process."""
    _found.clear()


def candidates(direction: str, K: int, V: int, kernel: str) -> list[LaunchConfig]:
    """All that are right (each is tested) and could be the fastest somewhere; kernel: portable, gluon or wide."""
    BV = max(16, next_power_of_2(V))
    if kernel == "wide":
        return []  # two warpgroups to 64 rows, and nothing else
    if direction == "forward":
        splits = [(16, 1), (32, 1), (32, 2), (64, 2), (64, 4)] if kernel == "gluon" else [(16, 1), (32, 1)]
        splits += [(64, 1)] if kernel == "gluon" and BV == 16 else []
    else:
        splits = [(16, {16: 1, 32: 1, 64: 4}.get(BV, 8))] + ([(32, 1)] if BV == 16 else [])
    return [LaunchConfig(*s) for s in splits if s[0] <= max(16, next_power_of_2(K))]


@functools.lru_cache(None)
def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def default_path(device_name: str) -> Path:
    """Where configurations of this GPU model, Triton and these kernels are kept."""
    version = hashlib.sha256(repr((FORMAT, triton.__version__, _sources(), device_name)).encode()).hexdigest()[:16]
    return cache_dir() / f"tuned-{version}.json"


def save(path: Path) -> None:
    """Write all that this process knows, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump({"format": FORMAT, "configs": {k: list(c) for k, c in sorted(_found.items())}}, file, indent=1)
    os.replace(file.name, path)


def load(path: Path) -> int:
    """Take over what is in the file; returns how many configurations that were."""
    advice = "delete it and call m2rnn_compile.tune again"
    try:
        content = json.loads(path.read_text())
        configs = {str(k): LaunchConfig(*c) for k, c in content["configs"].items()}
        right = content["format"] == FORMAT and all(
            all(isinstance(x, int) for x in c[:2]) and (c[2] is None or isinstance(c[2], int)) for c in configs.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} holds no tuned configurations ({type(e).__name__}: {e}); {advice}") from e
    if not right:
        raise ValueError(f"{path} holds no tuned configurations of format {FORMAT}; {advice}")
    _found.update(configs)
    return len(configs)


def choose(
    direction: str,
    options: Sequence[LaunchConfig],
    pinned: LaunchConfig,
    run: Callable[[LaunchConfig], object],
    measure: Callable[[Callable[[], object]], float],
    problem: Callable[[object], str | None],
    margin: float = 0.02,
) -> list[Timed]:
    """Run, check and time every option; the fastest right one is chosen if it beats the pinned one by `margin`."""
    rows = []
    for config in dict.fromkeys([pinned, *options]):
        try:
            wrong = problem(run(config))
        except (RuntimeError, TritonError) as e:  # out of shared memory or registers, for instance
            wrong = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        ms = measure(functools.partial(run, config)) if wrong is None else None
        rows.append(Timed(direction, config, ms, wrong, config == pinned, False))
    right = [r for r in rows if r.ms is not None]
    if not right:
        raise RuntimeError(f"tune: no configuration of {direction} ran: {rows[0].problem}")
    best = min(right, key=lambda r: r.ms or 0.0)
    held = next((r for r in right if r.pinned), None)
    if held is not None and best.ms is not None and held.ms is not None and best.ms > (1 - margin) * held.ms:
        best = held
    return [r._replace(chosen=r.config == best.config) for r in rows]


def keep(rows: Sequence[Timed], dtype: torch.dtype, scans: int, K: int, V: int) -> None:
    for row in rows:
        if row.chosen:
            _found[key(row.direction, dtype, scans, K, V)] = row.config
