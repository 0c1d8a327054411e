# SPDX-License-Identifier: Apache-2.0
"""What a provider is. A new one joins by one entry in bench/providers/__init__.py."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..problem import Problem
from ..shapes import Shape


@dataclasses.dataclass(frozen=True)
class Context:
    """What a problem is built from. `shared` is a scratch place for inputs that providers of one family share."""

    kernel: str
    shape: Shape
    dtype: torch.dtype
    device: torch.device
    seed: int = 0
    clip: float | None = 1.0
    layers: int | None = None
    pattern: str | None = None
    shared: dict[Any, Any] = dataclasses.field(default_factory=dict)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """Make something once for all providers of this context."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def generator(self, seed: int | None = None) -> torch.Generator | None:
        """Seeded, on the device: drawing gigabytes on the CPU takes longer than timing what they are drawn for.

        None on the meta device, where there are no numbers to draw.
        """
        if self.sizes_only:
            return None
        return torch.Generator(self.device).manual_seed(self.seed if seed is None else seed)

    @property
    def sizes_only(self) -> bool:
        """Nothing will be run: memory is predicted (layers and models)."""
        return self.device.type == "meta"


@dataclasses.dataclass(frozen=True)
class Provider:
    """Someone who computes something.

    Attributes:
        name: on the command line.
        about: one line for `info`.
        default_on: device types where it runs unless providers are named.
        why_not: why it cannot run on a device in this environment, or None. Must not compile anything.
        build: kernel → function that makes the problem; raises ValueError for a shape that it cannot do. Layers and
            models are also built on the meta device, where no kernel of theirs can run.
        kept: bytes that live from forward to backward beyond the results, estimated without running (kernel op).
        in_backward: bytes that only backward holds, gradients left out, estimated likewise.
        version: of the package it comes from, where that is neither this one nor torch.
    """

    name: str
    about: str
    default_on: tuple[str, ...]
    why_not: Callable[[torch.device], str | None]
    build: Mapping[str, Callable[[Context], Problem]]
    kept: Callable[[Shape, int], int]
    version: Callable[[], str] | None = None
    in_backward: Callable[[Shape, int], int] = lambda shape, itemsize: 0


def choose(
    known: Sequence[Provider], names: Sequence[str] | None, kernel: str, device: torch.device
) -> tuple[list[Provider], dict[str, str]]:
    """(providers to run, reasons of those that are missing). None takes the defaults of the device, ["all"] all.

    Only those that are asked for are looked for, which imports their packages; all of them for the message of an error.

    Raises:
        ValueError: a name that is unknown or cannot run here; the message lists all of them, with reasons.
    """
    order = {provider.name: provider for provider in known}

    @functools.cache
    def reason(name: str) -> str | None:
        if kernel not in order[name].build:
            return f"has no {kernel}; it has {', '.join(order[name].build)}"
        return order[name].why_not(device)

    if names is None or list(names) == ["all"]:
        offered = [provider for provider in known if kernel in provider.build]
        wanted = [p for p in offered if names is not None or device.type in p.default_on]
        missing = {p.name: why for p in wanted if (why := reason(p.name)) is not None}
        if len(missing) < len(wanted):
            return [p for p in wanted if p.name not in missing], missing
        bad: list[str] = []
    else:
        bad = [name for name in names if name not in order or reason(name) is not None]
        if not bad:
            return [order[name] for name in dict.fromkeys(names)], {}
    lines = [f"{name}: {reason(name) or 'available'}" for name in order]
    unknown = [name for name in bad if name not in order]
    what = f"unknown provider {', '.join(unknown)}" if unknown else f"{', '.join(bad) or 'nothing'} cannot run here"
    raise ValueError(f"--provider: {what}; for {kernel} on {device.type}: " + " | ".join(lines))
