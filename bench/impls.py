# SPDX-License-Identifier: Apache-2.0
"""The implementations a benchmark can run, under one calling convention, and why one cannot."""

from __future__ import annotations

import functools
import hashlib
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2rnn_compile import explain_impl, m2rnn
from m2rnn_compile.testing import ScanInputs

Scan = Callable[..., tuple[Tensor, Tensor | None]]
OURS = ("reference", "eager", "cpp", "triton")
NAMES = (*OURS, "xma")


def load_xma(checkout: str) -> Scan:
    """Upstream's `m2rnn` from a checkout, as a function with our argument order.

    Upstream takes the forget factors in the inputs' dtype and packed inputs without a batch dimension.

    Raises:
        ValueError: no such checkout, or its module cannot be imported.
    """
    root = Path(checkout).expanduser().resolve()
    if not (root / "xma/layers/m2rnn/op.py").is_file():
        raise ValueError(f"--xma {checkout}: there is no xma/layers/m2rnn/op.py in it; give the root of a checkout")
    sys.path.insert(0, str(root))
    try:
        module = importlib.import_module("xma.layers.m2rnn.op")
    except Exception as e:  # whatever upstream's import raises is the reason to report
        raise ValueError(f"--xma {checkout}: the import failed with {type(e).__name__}: {e}") from e
    finally:
        sys.path.remove(str(root))
    if not Path(str(module.__file__)).is_relative_to(root):
        raise ValueError(f"--xma {checkout}: another package named xma is installed, at {module.__file__}")

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
    ) -> tuple[Tensor, Tensor | None]:
        f, W = f.to(q.dtype), W.to(q.dtype)
        h = None if initial_state is None else initial_state.to(q.dtype)
        if cu_seqlens is None:
            return module.m2rnn(q, k, v, W, f, h, state_grad_clip)
        q, k, v, f = (x.squeeze(0) for x in (q, k, v, f))
        longest = int(cu_seqlens.diff().max())
        y, state = module.m2rnn(q, k, v, W, f, h, state_grad_clip, cu_seqlens, longest)
        return y.unsqueeze(0), state

    return scan


def fingerprint(checkout: str) -> str:
    """SHA-256 over upstream's M²RNN sources: says which version ran where the checkout has no git history."""
    digest = hashlib.sha256()
    for path in sorted((Path(checkout).expanduser() / "xma/layers/m2rnn").rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def why_unavailable(name: str, inputs: ScanInputs, xma: str | None) -> str | None:
    """The reason why `name` cannot run on these inputs, or None."""
    if name == "xma":
        if inputs.q.device.type != "cuda":  # it would launch Triton kernels on CPU tensors
            return "upstream's kernel runs on CUDA tensors only"
        return "give the path of a checkout with --xma" if xma is None else None
    if name not in OURS:
        return "there is no such implementation"
    try:
        explain_impl(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.f,
            inputs.W,
            initial_state=inputs.initial_state,
            cu_seqlens=inputs.cu_seqlens,
            impl=name,
        )
    except (ValueError, TypeError) as e:
        return str(e)
    return None


def resolve(names: Sequence[str] | None, inputs: ScanInputs, xma: str | None) -> dict[str, Scan]:
    """Implementations by name. None chooses those that make sense on the inputs' device and are available.

    Raises:
        ValueError: a name that is unknown or cannot run here; the message lists all of them, with reasons.
    """
    reasons = {name: why_unavailable(name, inputs, xma) for name in NAMES}
    if names is None:
        usual = ("triton", "xma") if inputs.q.device.type == "cuda" else ("reference", "eager", "cpp")
        names = [name for name in usual if reasons[name] is None]
    bad = [name for name in names if reasons.get(name, "unknown") is not None]
    if bad or not names:
        lines = (f"  {name:<10} {reason or 'available'}" for name, reason in reasons.items())
        what = f"--impl {', '.join(map(repr, bad))} cannot run here" if bad else "no implementation can run here"
        raise ValueError(f"{what}; implementations on {inputs.q.device}:\n" + "\n".join(lines))
    return {name: load_xma(str(xma)) if name == "xma" else functools.partial(m2rnn, impl=name) for name in names}


def parse_dtype(text: str) -> torch.dtype:
    """`bf16`, `fp16`, `fp32`, `fp64` or torch's own names."""
    table: dict[str, Any] = {
        **dict.fromkeys(("bf16", "bfloat16"), torch.bfloat16),
        **dict.fromkeys(("fp16", "float16"), torch.float16),
        **dict.fromkeys(("fp32", "float32"), torch.float32),
        **dict.fromkeys(("fp64", "float64"), torch.float64),
    }
    if text not in table:
        raise ValueError(f"--dtype {text!r} is unknown; expected bf16, fp16, fp32 or fp64")
    return table[text]


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
