# SPDX-License-Identifier: Apache-2.0
"""Hand the rewrite to Inductor. The only file that touches the compiler's private parts.

`torch._inductor.config.pre_grad_custom_pass` runs on Dynamo's graph before autograd: one slot up to torch 2.12, a slot
or a list from 2.13. A pass that the user has put there keeps running, before ours. With a version of torch that this
file does not know, or one that lacks these parts, nothing is installed: the op stays opaque, and one warning says so.
"""

from __future__ import annotations

import hashlib
import importlib
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
_status = "torch.compile has not been used in this process yet"


def status() -> str:
    """Whether the rewrite is installed, as a sentence."""
    return _status


def torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def _source_hash() -> str:
    """Of all files that the rewrite's outcome depends on: Inductor's caches on disk go by it."""
    here = Path(__file__).parent
    ops = ("conv.py", "fused.py", "fused_conv.py")
    files = [*sorted(here.glob("*.py")), *(here.parents[1] / "ops" / name for name in ops)]
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()


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
            """Where torch pickles its configuration to make the key of a cache, the uuid is what counts."""
            return str, (repr(self.uuid()),)

    return FuseScans()


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
            return None
        if several:
            config.pre_grad_custom_pass = [*passes, _make_pass(None)] if passes else _make_pass(None)  # type: ignore[attr-defined]
        else:
            config.pre_grad_custom_pass = _make_pass(current)  # type: ignore[attr-defined]
    except (AttributeError, ImportError, TypeError) as e:
        return _give_up(f"torch {torch.__version__} has no such hook ({type(e).__name__}: {e})")
    _status = f"installed in torch {torch.__version__}'s Inductor"
    return None


def _give_up(reason: str) -> None:
    global _status
    if _status.startswith("not installed"):
        return
    _status = f"not installed: {reason}"
    warnings.warn(
        f"m2rnn: fusion under torch.compile is off: {reason}. The scan runs as an opaque op: right, and unfused. "
        "m2rnn_compile.enable_fusion(False) turns this message off.",
        stacklevel=2,
    )


def installed(config: ModuleType) -> bool:
    """Whether the pass is (still) in the configuration: users may have put theirs over it."""
    current = getattr(config, "pre_grad_custom_pass", None)
    return any(map(_is_ours, current if isinstance(current, (list, tuple)) else [current]))
