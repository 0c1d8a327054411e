# SPDX-License-Identifier: Apache-2.0
"""Mamba-2: the chunked kernel of mamba-ssm, heads of 64, a state of 128, the width doubled as in its block."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from ..floors import Work
from ..problem import Leaves, Problem
from .inputs import normal
from .peers import moved, peer_problem, results_only, version_of, why_not_importable
from .registry import Context, Provider

MODULE = "mamba_ssm.ops.triton.ssd_combined"
P, STATE, CHUNK = 64, 128, 256


def _naive(given: Leaves) -> tuple[Tensor, ...]:
    x, dt, A, B, C = (given[name] for name in ("x", "dt", "A", "B", "C"))  # [b, T, H, P], [b, T, H], [H], [b, T, 1, S]
    h = x.new_zeros(x.shape[0], x.shape[2], P, STATE)
    outputs = []
    for t in range(x.shape[1]):
        decay = (dt[:, t] * A).exp()[..., None, None]
        h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        outputs.append((h * C[:, t, :, None, :]).sum(-1))
    return (torch.stack(outputs, 1),)


def _build(context: Context) -> Problem:
    s = context.shape
    H = 2 * s.width // P
    kernel: Any = importlib.import_module(MODULE).mamba_chunk_scan_combined
    rate = torch.rand(s.B, s.T, H, generator=context.generator(), device=context.device)
    leaves = {
        "x": normal(context, s.B, s.T, H, P, salt=1),
        "dt": (0.001 + 0.1 * rate).requires_grad_(),
        "A": (-1 - 15 * torch.rand(H, generator=context.generator(), device=context.device)).requires_grad_(),
        "B": normal(context, s.B, s.T, 1, STATE, salt=2),
        "C": normal(context, s.B, s.T, 1, STATE, salt=3),
    }

    def call(given: Leaves) -> tuple[Tensor, ...]:
        return (kernel(given["x"], given["dt"], given["A"], given["B"], given["C"], CHUNK),)

    tokens = s.B * s.T
    flops = 5.0 * tokens * H * P * STATE
    traffic = moved(context.itemsize, tokens * (H * P + H + 2 * STATE), tokens * H * P)
    work = {
        "forward": Work(0, flops, traffic["forward"], 1),
        "backward": Work(0, 2 * flops, traffic["backward"], 1),
    }
    operator = f"Mamba-2, {H} heads of {P}, state {STATE}"
    return peer_problem(context, operator, leaves, call, _naive, (s.B, s.T, H, P), ("x", "dt", "B", "C"), work)


def _why_not(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "its kernels run on CUDA tensors only"
    return why_not_importable(MODULE, "pip install mamba-ssm (it compiles CUDA extensions)")


MAMBA2 = Provider(
    name="mamba2",
    about="Mamba-2 (mamba-ssm)",
    default_on=("cuda",),
    why_not=_why_not,
    build={"op": _build},
    kept=results_only,
    version=functools.partial(version_of, "mamba_ssm"),
)
