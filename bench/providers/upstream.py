# SPDX-License-Identifier: Apache-2.0
"""The authors' kernel: `xma.layers.m2rnn` from a source checkout, unchanged."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..problem import Problem
from ..shapes import Shape
from . import authors_layer, ours
from .peers import SLACK, tolerated
from .registry import Context, Provider

MODULE = "xma.layers.m2rnn.op"
CHECKOUT = "a checkout of open-lm-engine/accelerated-model-architectures"


def add_checkout(path: str) -> None:
    """Put a checkout on the import path.

    Raises:
        ValueError: it is none.
    """
    root = Path(path).expanduser().resolve()
    if not (root / "xma/layers/m2rnn/op.py").is_file():
        raise ValueError(f"--xma {path}: there is no xma/layers/m2rnn/op.py in it; give the root of {CHECKOUT}")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))


def why_not(device: torch.device) -> str | None:
    """Why upstream's kernel cannot run."""
    if device.type != "cuda":  # it would launch Triton kernels on CPU tensors
        return "runs on CUDA tensors only"
    return why_not_importable()


def why_not_importable() -> str | None:
    """Why upstream's module cannot be imported: nothing is there, another package is, or its import fails."""
    advice = f"give --xma PATH or PYTHONPATH with the root of {CHECKOUT}"
    try:
        package = importlib.util.find_spec("xma")
        if package is None:
            return f"not installed; {advice} (the PyPI package xma is another one)"
        if importlib.util.find_spec("xma.layers") is None or importlib.util.find_spec("xma.layers.m2rnn") is None:
            where = package.origin or next(iter(package.submodule_search_locations or ["?"]))
            return f"the xma at {where} is another package, as is the one on PyPI; {advice}"
        importlib.import_module(MODULE)
    except Exception as e:  # whatever upstream's import raises is the reason to report
        return f"import of {MODULE} failed with {type(e).__name__}: {(str(e).splitlines() or [''])[0]}; {advice}"
    return None


def version() -> str:
    """A checkout has no version: the first digits of the SHA-256 over its Python files."""
    package = importlib.util.find_spec("xma")
    digest = hashlib.sha256()
    for folder in (package and package.submodule_search_locations) or ():
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return f"sources {digest.hexdigest()[:12]}"


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    W: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state_grad_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Upstream's `m2rnn` with our argument order: it takes f in the inputs' dtype, packed inputs without a batch."""
    m2rnn: Any = importlib.import_module(MODULE).m2rnn
    f, W = f.to(q.dtype), W.to(q.dtype)
    h = None if initial_state is None else initial_state.to(q.dtype)
    if cu_seqlens is None:
        y, state = m2rnn(q, k, v, W, f, h, state_grad_clip)
        return y, state
    q, k, v, f = (x.squeeze(0) for x in (q, k, v, f))
    y, state = m2rnn(q, k, v, W, f, h, state_grad_clip, cu_seqlens, int(cu_seqlens.diff().max()))
    return y.unsqueeze(0), state


def _step(q: Tensor, k: Tensor, v: Tensor, f: Tensor, W: Tensor, *, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    y, state = scan(q[:, None], k[:, None], v[:, None], f[:, None], W, initial_state=initial_state)
    return y[:, 0], state


def _build(context: Context) -> Problem:
    return ours.scan_problem(context, lambda **given: scan(**given)[0], slack=SLACK, tolerated=tolerated(context))


def _build_step(context: Context) -> Problem:
    return ours.step_problem(context, _step, slack=SLACK, tolerated=tolerated(context))


def _in_backward(shape: Shape, itemsize: int) -> int:
    return itemsize * ours.state_elements(shape)  # every state, computed again, in the inputs' dtype


XMA = Provider(
    name="xma",
    about="the authors' Triton kernel",
    default_on=("cuda",),
    why_not=why_not,
    build={"op": _build, "step": _build_step, "layer": lambda context: authors_layer.layer_problem(context, scan)},
    kept=lambda shape, itemsize: 0,
    in_backward=_in_backward,
    version=version,
)
