# SPDX-License-Identifier: Apache-2.0
"""Hand the rewrite to Inductor. The only file that touches the compiler's private parts.

`torch._inductor.config.pre_grad_custom_pass` runs on Dynamo's graph before autograd: one slot up to torch 2.12, a slot
or a list from 2.13. A pass that the user has put there keeps running, before ours. With a version of torch that this
file does not know, or one that lacks these parts, nothing is installed: the op stays opaque, and one warning says so.

The pass is there with fusion off as well, and then does nothing: Inductor's caches on disk know an op by its name only,
and its `uuid` is what tells them one version of this library from another.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import warnings
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ...ops import fusion_switch
from .rewrite import FusionRecord

KNOWN = ((2, 11), (2, 14))  # the oldest and the newest version that tests have seen
RECORDS: deque[FusionRecord] = deque(maxlen=256)  # what happened in this process, newest last; caches run no pass
CONFIG = "torch._inductor.config"
_status = "torch.compile has not been used in this process yet"
_warned: set[str] = set()  # each message once


def status() -> str:
    """Whether the rewrite is installed, as a sentence."""
    config = sys.modules.get(CONFIG)
    if _status.startswith("installed") and config is not None and not installed(config):
        return _replaced(config)
    return _status


def _replaced(config: ModuleType) -> str:
    current = getattr(config, "pre_grad_custom_pass", None)
    passes = current if isinstance(current, (list, tuple)) else [current]
    names = ", ".join("None" if p is None else getattr(p, "__qualname__", type(p).__qualname__) for p in passes)
    return (
        f"lost: {CONFIG}.pre_grad_custom_pass was replaced by {names or 'an empty list'}; call "
        "m2rnn_compile.enable_fusion(...) after setting it, and the rewrite runs behind it"
    )


def torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def _source_hash() -> str:
    """Of the whole package: fakes, autograd formulas, custom ops and the rewrite are spread over it. 5 ms."""
    package = Path(__file__).parents[2]
    total = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        total.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes() + b"\0")
    return total.hexdigest()


def _make_pass(earlier: Any) -> Any:
    """The pass; `earlier` is a pass to run before it where there is one slot only."""
    base = importlib.import_module("torch._inductor.custom_graph_pass").CustomGraphPass
    source = _source_hash()

    class FuseScans(base):  # type: ignore[misc, valid-type]
        def __call__(self, graph: torch.fx.Graph) -> None:
            if earlier is not None:
                earlier(graph)
            if fusion_switch.SETTINGS.enabled:
                from .rewrite import fuse

                RECORDS.extend(fuse(graph, fusion_switch.SETTINGS))

        def uuid(self) -> Any:
            """Part of the key of every cache on disk. None (no caching) where the earlier pass has none either."""
            key = f"m2rnn {source} {fusion_switch.TOKEN}"
            if earlier is None:
                return key
            theirs = earlier.uuid() if isinstance(earlier, base) else None
            return None if theirs is None else (key, theirs)

        def __reduce__(self) -> Any:
            """A pickle, of which torch may make the key of a cache, holds the uuid; what is loaded is a pass again."""
            return _load, (repr(self.uuid()), earlier)

        def __deepcopy__(self, memo: Any) -> Any:
            """Copies of Inductor's configuration hold the pass itself: it has no state of its own."""
            return self

        def __copy__(self) -> Any:
            return self

    return FuseScans()


def _load(uuid: str, earlier: Any) -> Any:
    return _make_pass(earlier)


def _is_ours(x: Any) -> bool:
    return type(x).__name__ == "FuseScans"


def install(config: ModuleType) -> None:
    """Put the pass into Inductor's configuration; called when that module has been imported."""
    global _status
    version = torch_version()
    if not KNOWN[0] <= version <= KNOWN[1]:
        known = " to ".join(".".join(map(str, v)) for v in KNOWN)
        return _give_up(f"torch {torch.__version__} is not one of the versions {known} that it is tested with")
    try:
        current: Any = config.pre_grad_custom_pass  # type: ignore[attr-defined]
        several = version >= (2, 13)
        passes = list(current) if isinstance(current, (list, tuple)) else [] if current is None else [current]
        if any(map(_is_ours, passes)):
            pass
        elif several:
            config.pre_grad_custom_pass = [*passes, _make_pass(None)] if passes else _make_pass(None)  # type: ignore[attr-defined]
        else:
            config.pre_grad_custom_pass = _make_pass(current)  # type: ignore[attr-defined]
    except (AttributeError, ImportError, TypeError) as e:
        return _give_up(f"torch {torch.__version__} has no such hook ({type(e).__name__}: {e})")
    _status = f"installed in torch {torch.__version__}'s Inductor"
    fusion_switch.WATCH = watch
    return None


def _give_up(reason: str) -> None:
    global _status
    _status = f"not installed: {reason}"
    _warn_once(f"off: {reason}")


def _warn_once(what: str) -> None:
    if not fusion_switch.SETTINGS.enabled or what in _warned:
        return
    _warned.add(what)
    warnings.warn(
        f"m2rnn: fusion under torch.compile is {what}. The scan runs as an opaque op: right, and unfused. "
        "m2rnn_compile.enable_fusion(False) turns this message off.",
        stacklevel=3,
    )


def watch(v: torch.Tensor) -> None:
    """Called with an input of every opaque scan whose shapes a compiler asks for: notice a pass that is lost.

    Inductor asks while it lowers a graph, after all passes. Other compilers, which see the opaque op anyway, and
    devices that fusion is off for are none of our business.
    """
    config, virtualized = sys.modules.get(CONFIG), sys.modules.get("torch._inductor.virtualized")
    if not _status.startswith("installed") or config is None or virtualized is None or installed(config):
        return
    lowering = hasattr(getattr(virtualized.V, "graph", None), "graph_inputs")
    if lowering and v.device.type in fusion_switch.SETTINGS.devices:
        _warn_once(_replaced(config))


def installed(config: ModuleType) -> bool:
    """Whether the pass is (still) in the configuration: users may have put theirs over it."""
    current = getattr(config, "pre_grad_custom_pass", None)
    return any(map(_is_ours, current if isinstance(current, (list, tuple)) else [current]))
