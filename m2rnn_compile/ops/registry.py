# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: a table of lowerings, imported at first use, and the rule of `impl="auto"`.

A lowering is a module with `scan`, `scan_backward`, `step` (argument order of the ops, without `impl`),
`availability() -> str | None` (why it cannot run on this machine) and `unsupported(q, k, v, f, W, initial_state,
cu_seqlens) -> str | None` (why it cannot run on these tensors). Nothing is imported or compiled until one is chosen.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor


class Implementation(NamedTuple):
    """A row of the table."""

    name: str
    module: str
    devices: tuple[str, ...] | None  # device types; None means any
    about: str


IMPLEMENTATIONS = {
    row.name: row
    for row in (
        Implementation(
            "reference", "m2rnn_compile.ops.reference", None, "loop over time through torch autograd; oracle in fp64"
        ),
        Implementation(
            "eager", "m2rnn_compile.ops.reference", None, "loop over time in torch, checkpointed backward; any device"
        ),
        Implementation("cpp", "m2rnn_compile.lowering.cpu", ("cpu",), "vectorised C++ kernel, built at first use"),
        Implementation("triton", "m2rnn_compile.lowering.triton", ("cuda",), "Triton kernels"),
    )
}
IMPL_NAMES = ("auto", *IMPLEMENTATIONS)


class ImplChoice(NamedTuple):
    """What `explain_impl` answers."""

    impl: str
    reason: str
    rejected: dict[str, str]


def check_name(impl: str) -> None:
    if impl not in IMPL_NAMES:
        raise ValueError(f"m2rnn: `impl` must be one of {', '.join(map(repr, IMPL_NAMES))}, got {impl!r}")


@functools.lru_cache(None)
def load(name: str) -> ModuleType:
    """Import a lowering. Imports it once per process."""
    return importlib.import_module(IMPLEMENTATIONS[name].module)


@functools.lru_cache(None)
def _load_beside(lowering: ModuleType, constant: str) -> ModuleType | None:
    """The module that a lowering names in `constant`; imported by whoever needs it, once."""
    name = getattr(lowering, constant, None)
    return None if name is None else importlib.import_module(name)


def load_fused(lowering: ModuleType) -> ModuleType | None:
    """The kernels that a lowering has for the tail of the fused scan, or None: then it runs in torch."""
    return _load_beside(lowering, "FUSED")


def load_mixer(lowering: ModuleType) -> ModuleType | None:
    """The kernels that a lowering has for the backward of the fused mixer, or None: then it is put together."""
    return _load_beside(lowering, "MIXER")


def why_not(name: str, device: torch.device, tensors: tuple[Tensor | None, ...]) -> str | None:
    """The reason why implementation `name` cannot run on these tensors, or None when it can."""
    row = IMPLEMENTATIONS[name]
    if row.devices is not None and device.type not in row.devices:
        return f"impl={name!r} runs on {' or '.join(row.devices)} tensors, these are on {device.type}"
    if row.module == "m2rnn_compile.ops.reference":
        return None
    try:
        lowering = load(name)
    except ImportError as e:
        return f"impl={name!r} cannot be imported: {e}"
    return lowering.availability() or lowering.unsupported(*tensors)


@functools.lru_cache(None)
def _warn_no_compiler(reason: str) -> None:
    warnings.warn(
        f"m2rnn: the C++ kernel for CPU tensors is not available, running the slow eager loops instead. {reason} "
        "(impl='eager' chooses the loops without this message.)",
        stacklevel=3,
    )


def choose(impl: str, device: torch.device, tensors: tuple[Tensor | None, ...]) -> ImplChoice:
    """Resolve `impl` for tensors on `device`, or raise ValueError saying why it cannot be had.

    "auto" goes by the device: `cpp` on a CPU, `triton` on CUDA, `eager` elsewhere. One fallback exists and it speaks:
    no usable C++ compiler on a CPU means `eager` with one warning. On CUDA nothing falls back.
    """
    check_name(impl)
    rejected: dict[str, str] = {}
    if impl != "auto":
        reason = why_not(impl, device, tensors)
        if reason is not None:
            raise ValueError(f"m2rnn: {reason}; choose impl='auto' or impl='eager', which runs everywhere")
        return ImplChoice(impl, f"impl={impl!r} was asked for", rejected)
    if device.type == "cuda":
        reason = why_not("triton", device, tensors)
        if reason is not None:
            raise ValueError(
                f"m2rnn: no fast implementation for these CUDA tensors: {reason}. "
                "Nothing falls back in silence: pass impl='eager' to run the slow loops knowingly"
            )
        return ImplChoice("triton", "the tensors are on a CUDA device", rejected)
    if device.type == "cpu":
        reason = why_not("cpp", device, tensors)
        if reason is None:
            return ImplChoice("cpp", "the tensors are on the CPU and a C++ kernel is available", rejected)
        rejected["cpp"] = reason
        return ImplChoice("eager", f"the C++ kernel is not available: {reason}", rejected)
    return ImplChoice("eager", f"no kernel exists for {device.type} tensors", rejected)


def choose_for_device(impl: str, device: torch.device) -> str:
    """The name of an implementation for work that any lowering takes on its device (the tail of the fused scan)."""
    check_name(impl)
    if impl != "auto":
        return impl
    return {"cuda": "triton"}.get(device.type, "eager")


def lowering_for(impl: str, device: torch.device, tensors: tuple[Tensor | None, ...]) -> ModuleType:
    """The module to run, for the op's kernels."""
    choice = choose(impl, device, tensors)
    if impl == "auto" and "cpp" in choice.rejected:
        _warn_no_compiler(choice.rejected["cpp"])
    return load(choice.impl)
