# SPDX-License-Identifier: Apache-2.0
"""The op's Triton lowering on CPU tensors, its Gluon kernels emulated (`emulated_gluon.py`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from m2rnn_compile.lowering import triton as lowering
from m2rnn_compile.lowering.triton.backward_gluon import scan_backward_gluon_kernel
from m2rnn_compile.lowering.triton.backward_wide import scan_backward_wide_kernel
from m2rnn_compile.lowering.triton.config import LaunchConfig
from m2rnn_compile.lowering.triton.forward_gluon import scan_forward_gluon_kernel
from m2rnn_compile.lowering.triton.forward_wide import scan_forward_wide_kernel
from m2rnn_compile.lowering.triton.reduce import Sum
from m2rnn_compile.testing import ScanInputs, assert_accurate, oracle, run_low_precision
from tests.lowering.emulated_gluon import Emulated

GRADIENTS = ("dq", "dk", "dv", "df", "dW", "dinitial_state")


def add_one(s: Sum, window: int, t_first: int, places: Tensor | None = None) -> None:
    """What `reduce.py` does, whose kernels have a test of their own."""
    B, _, heads, *D = s.out.shape
    B = B if places is None else len(places)
    total = s.part.float().reshape(s.blocks, B, window, heads, s.G, *D).sum((0, 4)).to(s.out.dtype)
    if places is None:
        s.out[:, t_first : t_first + window] = total
    else:
        for slot, (t, steps) in zip(total, places.tolist(), strict=True):
            s.out[0, t : t + steps] = slot[:steps]


def emulate_kernels(monkeypatch: pytest.MonkeyPatch, wide: bool) -> None:
    """wide: those of two warpgroups, which run at V = 64 on Hopper. Memory that nobody has written to is NaN."""
    kernels = {
        "forward_gluon_kernel": scan_forward_gluon_kernel,
        "backward_gluon_kernel": scan_backward_gluon_kernel,
        "forward_wide_kernel": scan_forward_wide_kernel,
        "backward_wide_kernel": scan_backward_wide_kernel,
    }
    for name, kernel in kernels.items():
        monkeypatch.setattr(lowering, name, lambda kernel=kernel: Emulated(kernel))
    monkeypatch.setattr(lowering, "gluon_unsupported", lambda *_: None)
    monkeypatch.setattr(lowering, "warpgroups", lambda *_: wide)
    monkeypatch.setattr(lowering, "_numerics", lambda *_: dict(DOT=None, HARDWARE=True))
    monkeypatch.setattr(lowering, "clip_mode", lambda *_: 2)
    monkeypatch.setattr(lowering, "add", add_one)
    monkeypatch.setattr(lowering, "add_all", lambda sums, *window: [add_one(s, *window) for s in sums])
    new_empty = Tensor.new_empty

    def poisoned(x: Tensor, *size: Any, **options: Any) -> Tensor:
        made = new_empty(x, *size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def emulate(
    x: ScanInputs, forward: tuple[int, int] = (32, 1), backward: int = 32, window_bytes: int = 2**30
) -> dict[str, Tensor]:
    """All results and gradients, as `run` gives them."""
    a = (x.q, x.k, x.v, x.f, x.W, x.initial_state, x.cu_seqlens)
    y, state, checkpoints = lowering.scan(*a, x.state_grad_clip, 64, config=LaunchConfig(*forward))
    gradients = lowering.scan_backward(
        x.dy, x.dfinal_state, *a, checkpoints, x.state_grad_clip, 64, config=LaunchConfig(backward, 1),
        window_bytes=window_bytes,
    )  # fmt: skip
    return {"y": y, "final_state": state, **dict(zip(GRADIENTS, gradients, strict=True))}


def check(x: ScanInputs, **options: Any) -> None:
    """By the rule, on halves of the time: a slice of these few heads needs some steps to have a norm to speak of."""
    got = emulate(x, **options)
    truth, eager = oracle(x, impl="eager"), run_low_precision(x)
    assert_accurate({n: got[n] for n in truth}, truth, eager, slices=2)
