# SPDX-License-Identifier: Apache-2.0
"""Memory of a call: its peak, what it keeps for backward, and how its outputs are poisoned before the gate."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

MIB = 2**20


def _status_kib(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"no {field} in /proc/self/status")
    return int(match[1])


def _cpu_peak_bytes(call: Callable[[], object]) -> int | None:
    """Growth of the process's resident memory at its highest; Linux lets it be reset, elsewhere there is no figure."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator holds would hide what the call needs
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_kib("VmRSS")
        call()
        return max(0, _status_kib("VmHWM") - before) * 1024
    except (OSError, AttributeError):
        call()
        return None


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most memory a call holds beyond what was allocated before it; None where that cannot be told."""
    if device.type != "cuda":
        return _cpu_peak_bytes(call)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def kept_bytes(forward: Callable[[], object], given: list[Tensor], device: torch.device) -> int:
    """What lives between forward and backward: the result, and everything autograd saved that is not one of `given`.

    On a GPU the allocator says it; elsewhere the storages that pass through autograd's saved-tensor hooks are counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        result = forward()
        torch.cuda.synchronize(device)
        kept = torch.cuda.memory_allocated(device) - before
        del result
        return kept
    known = {x.untyped_storage().data_ptr() for x in given}
    sizes: dict[int, int] = {}

    def see(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if x.device.type == "cpu" and storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(see, lambda x: x):
        result = forward()
    for x in result if isinstance(result, tuple) else (result,):
        if isinstance(x, Tensor):
            see(x)
    return sum(sizes.values())


def _available_bytes() -> int | None:
    """Memory that processes may still take, swap left out; None where Linux does not say."""
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    if match is None:
        return None
    available = int(match[1]) * 1024
    try:  # a container's own limit
        group = Path("/sys/fs/cgroup")
        available = min(
            available, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        )
    except (OSError, ValueError):  # no such group, or "max"
        pass
    return available


@contextlib.contextmanager
def failing_when_full(device: torch.device) -> Iterator[None]:
    """On a CPU, let allocations beyond nine tenths of the free memory fail, so that they can be reported.

    Linux would grant them and kill the process at first use, and with it the rest of the run.
    """
    available = _available_bytes()
    if device.type != "cpu" or resource is None or available is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _status_kib("VmData") * 1024 + available * 9 // 10
    for given in (soft, hard):
        if given != resource.RLIM_INFINITY:
            limit = min(limit, given)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextlib.contextmanager
def poisoned(device: torch.device, nbytes: int) -> Iterator[None]:
    """Make memory that a call allocates and forgets to write hold NaNs.

    On a CPU torch fills what `empty` returns. On a GPU that would change which kernels run, so memory of the
    caching allocator is filled and given back to it: blocks of several sizes, about `nbytes`, which the call gets.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        total = min(nbytes, free // 2)
        blocks = [torch.empty(max(1, total // 4), dtype=torch.uint8, device=device) for _ in range(3)]
        blocks += [torch.empty(1 << 20, dtype=torch.uint8, device=device) for _ in range(16)]
        for block in blocks:
            block.fill_(255)  # all bits set is a NaN in every float format
        del blocks
        yield
        return
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
