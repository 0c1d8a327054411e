# SPDX-License-Identifier: Apache-2.0
"""The switch of `enable_fusion`, where code that Dynamo traces can see it.

A function that is traced reads `TOKEN`, so Dynamo guards the graph by it: turning the switch compiles again instead of
running what was compiled under the other setting.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from .after_import import after_import


class FusionSettings(NamedTuple):
    """What `torch.compile` may do with a scan's surroundings.

    Attributes:
        enabled: off means the opaque op, as if there were no rewrite at all.
        devices: device types on which the surroundings move into the op. Only where that saves passes over memory.
        prologue: also move the forget gate into the op, though it saves no pass (a kernel of B·T·N either way).
        conv: also move the causal convolution with its SiLU in front of q | k | v into an op: the scan's, where no
            backward follows or q | k | v, f and g are columns of one tensor (with the forget gate then), or its own.
    """

    enabled: bool = True
    devices: tuple[str, ...] = ("cuda",)
    prologue: bool = False
    conv: bool = True

    def token(self) -> str:
        return repr(tuple(self))


SETTINGS = FusionSettings()
TOKEN = SETTINGS.token()
WATCH: Callable[[Tensor], None] | None = None  # the installed rewrite's: called with v of every scan's fake


def guard() -> bool:
    """Called where Dynamo traces: the comparison puts a guard on TOKEN."""
    return TOKEN != ""


def change(settings: FusionSettings) -> None:
    global SETTINGS, TOKEN
    SETTINGS, TOKEN = settings, settings.token()


def _install(config: ModuleType) -> None:
    importlib.import_module("m2rnn_compile.lowering.inductor.hook").install(config)


def install_when_compiling() -> None:
    """Install the rewrite as soon as the compiler is loaded, which this library must not do by itself.

    Also where it is off: it does nothing then, but tells caches on disk which version of this library they are of.
    """
    after_import("torch._inductor.config", _install)
