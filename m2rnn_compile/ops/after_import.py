# SPDX-License-Identifier: Apache-2.0
"""Do something the moment a module of torch's is imported, without importing it ourselves."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class _RunAfterImport:
    """A finder that steps aside, lets the real import happen, and calls back after it."""

    def __init__(self, name: str, callback: Callable[[ModuleType], None]) -> None:
        self.name, self.callback = name, callback

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            self.callback(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def after_import(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Call back with the module now if it is loaded, else as soon as it is. Once for each (name, callback)."""
    if name in sys.modules:
        callback(sys.modules[name])
    elif not any(isinstance(x, _RunAfterImport) and (x.name, x.callback) == (name, callback) for x in sys.meta_path):
        sys.meta_path.insert(0, _RunAfterImport(name, callback))
