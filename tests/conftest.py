# SPDX-License-Identifier: Apache-2.0
"""What every test gets: fixed seeds and threads, fresh compiler state, a reason when a GPU is missing."""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Inductor would start a pool of compile processes in every test worker, more than the two cores of CI can carry.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# triton 3.9 warns at every compilation unless told whether to contract a * b + c; this is its default.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
# Where a cache on disk has a graph of an earlier run, no pass runs, and tests would find no records of it.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="m2rnn-inductor-"))

import pytest
import torch

from m2rnn_compile import enable_fusion
from m2rnn_compile.ops import fusion_switch

try:
    import hypothesis
except ImportError:  # a GPU machine may have torch and pytest only; property tests are not GPU tests
    hypothesis = None  # type: ignore[assignment]

if hypothesis is not None:
    # Timings vary on shared machines, and a red run must be red again when repeated.
    hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
    hypothesis.settings.load_profile("repeatable")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-report", type=Path, metavar="FILE", help="write the outcome of every test as a record")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--gpu-report")
    if path is not None:
        config.pluginmanager.register(_Report(path), "m2rnn-gpu-report")


def long_ones_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """Slow tests, a quick one behind each, then the rest: `--dist load --maxschedchunk 1` gives a worker two at a time.

    On a GPU machine the suite then takes as long as its longest test, which compiles, and not that much longer.
    """
    slow = [item for item in items if item.get_closest_marker("slow")]
    slow.sort(key=lambda item: "test_layer" in item.name or "test_modes" in item.name)  # these take a minute at most
    quick = [item for item in items if not item.get_closest_marker("slow")]
    pairs = [item for pair in zip(slow, quick, strict=False) for item in pair]
    return pairs + slow[len(quick) :] + quick[len(slow) :]


@pytest.hookimpl(trylast=True)  # after -m has taken out what does not run
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        items[:] = long_ones_first(items)
        return
    reason = "needs a CUDA device (torch.cuda.is_available() is False); run `make test-gpu` on a machine with one"
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _isolation() -> Iterator[None]:
    """The same random numbers for every test, in whatever order and process; nothing set or compiled is left."""
    random.seed(0)
    torch.manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    fusion = fusion_switch.SETTINGS
    yield
    if fusion != fusion_switch.SETTINGS:
        enable_fusion(**fusion._asdict())
    torch.use_deterministic_algorithms(False)  # a trainer switches it on
    torch.utils.deterministic.fill_uninitialized_memory = True
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


class _Report:
    """Collects outcomes and writes them in the form of bench/record.py: `python -m bench show FILE` prints it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        self.start = time.time()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        row = self.rows.setdefault(
            report.nodeid,
            {"test": report.nodeid, "outcome": "passed", "seconds": 0.0, "message": "", "device": "cuda"},
        )
        row["seconds"] = round(row["seconds"] + report.duration, 3)
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
            row.update(outcome="xfailed" if hasattr(report, "wasxfail") else "skipped", message=str(reason))
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message.splitlines()[0] if crash else str(report.longrepr)[-300:]
            row.update(outcome="failed" if report.when == "call" else "error", message=message)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        from bench import record

        made = record.make_record(
            "test-gpu",
            ["make test-gpu"],
            list(self.rows.values()),
            exit_status=int(exitstatus),
            seconds=round(time.time() - self.start, 1),
        )
        record.write(made, self.path)
