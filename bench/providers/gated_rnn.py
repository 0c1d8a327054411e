# SPDX-License-Identifier: Apache-2.0
"""LSTM and GRU: torch's (cuDNN on a GPU), and FlashRNN's LSTM, whose recurrent weights are block-diagonal by head."""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..floors import Work
from ..problem import Leaves, Problem
from .inputs import normal
from .peers import moved, peer_problem, results_only, step_problem, why_not_importable
from .registry import Context, Provider

GATES = {"LSTM": 4, "GRU": 3}
HEAD_DIM = 64  # of FlashRNN


def _lstm_cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """(h, c) from pre-activations in torch's order: input, forget, cell, output."""
    i, f, z, o = gates.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * z.tanh()
    return o.sigmoid() * c.tanh(), c


def _naive(kind: str, given: Leaves) -> tuple[Tensor, ...]:
    x, h = given["x"], given.get("h")
    projected = x @ given["weight_ih_l0"].mT + given["bias_ih_l0"]
    W, b = given["weight_hh_l0"], given["bias_hh_l0"]
    h = x.new_zeros(x.shape[0], W.shape[1]) if h is None else h[0]
    c = given["c"][0] if "c" in given else torch.zeros_like(h)
    outputs = []
    for t in range(x.shape[1]):
        recurrent = h @ W.mT + b
        if kind == "LSTM":
            h, c = _lstm_cell(projected[:, t] + recurrent, c)
        else:
            r_x, z_x, n_x = projected[:, t].chunk(3, -1)
            r_h, z_h, n_h = recurrent.chunk(3, -1)
            z = (z_x + z_h).sigmoid()
            h = (1 - z) * (n_x + (r_x + r_h).sigmoid() * n_h).tanh() + z * h
        outputs.append(h)
    return (torch.stack(outputs, 1),)


def _module(kind: str, context: Context) -> nn.RNNBase:
    width = context.shape.width
    make: Any = {"LSTM": nn.LSTM, "GRU": nn.GRU}[kind]
    with torch.random.fork_rng(devices=[context.device] if context.device.type == "cuda" else []):
        torch.manual_seed(context.seed)
        module: nn.RNNBase = make(width, width, batch_first=True, device=context.device, dtype=context.dtype)
    return module


def _work(kind: str, context: Context, T: int) -> dict[str, Work]:
    B, H, gates = context.shape.B, context.shape.width, GATES[kind]
    flops, weights = 2.0 * B * T * gates * H * 2 * H, gates * 2 * H * H
    traffic = moved(context.itemsize, B * T * H + weights, B * T * H)
    activations = B * T * H * (gates + (kind == "LSTM"))
    return {
        "forward": Work(activations, flops, traffic["forward"], T),
        "backward": Work(0, 2 * flops, traffic["backward"], T),
    }


def _operator(kind: str, context: Context) -> str:
    return f"{kind} of {context.shape.width} units with its input projection"


def _build(kind: str, context: Context) -> Problem:
    s = context.shape
    module = _module(kind, context)
    # The module runs on its own parameters: cuDNN wants them in one piece of memory.
    leaves = {"x": normal(context, s.B, s.T, s.width, salt=1), **dict(module.named_parameters())}

    def call(given: Leaves) -> tuple[Tensor, ...]:
        return (module(given["x"])[0],)

    size = (s.B, s.T, s.width)
    naive = functools.partial(_naive, kind)
    work = _work(kind, context, s.T)
    return peer_problem(context, _operator(kind, context), leaves, call, naive, size, ("x",), work)


def _build_step(kind: str, context: Context) -> Problem:
    s = context.shape
    module = _module(kind, context)
    states = {"h": normal(context, 1, s.B, s.width, scale=0.5, salt=2)}
    if kind == "LSTM":
        states["c"] = normal(context, 1, s.B, s.width, scale=0.5, salt=3)
    leaves = {"x": normal(context, s.B, 1, s.width, salt=1), **states, **dict(module.named_parameters())}

    def call(given: Leaves) -> tuple[Tensor, ...]:
        state = (given["h"], given["c"]) if kind == "LSTM" else given["h"]
        return (module(given["x"], state)[0],)

    work = {"forward": _work(kind, context, 1)["forward"]}
    operator = _operator(kind, context) + ", one token"
    return step_problem(context, operator, leaves, call, functools.partial(_naive, kind), work)


def _flash_naive(given: Leaves) -> tuple[Tensor, ...]:
    Wx, R, b = given["Wx"], given["R"], given["b"]  # [B, T, 4, N, D], [4, N, D, D], [4, N, D]
    h = c = Wx.new_zeros(Wx.shape[0], *Wx.shape[3:])
    outputs = []
    for t in range(Wx.shape[1]):
        gates = Wx[:, t] + torch.einsum("bnd,gned->bgne", h, R) + b
        h, c = _lstm_cell(gates.movedim(1, -2).flatten(-2), c)
        outputs.append(h)
    return (torch.stack(outputs, 1),)


def _build_flash(backend: str, context: Context) -> Problem:
    s = context.shape
    N, D = max(1, s.width // HEAD_DIM), HEAD_DIM
    if context.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"FlashRNN's fused kernels take bf16 or fp16, not {context.dtype_name}")
    function: Any = importlib.import_module("flashrnn").flashrnn
    leaves = {
        "Wx": normal(context, s.B, s.T, 4, N, D, salt=1),
        "R": normal(context, 4, N, D, D, scale=D**-0.5, salt=2),
        "b": normal(context, 4, N, D, salt=3),
    }

    def call(given: Leaves) -> tuple[Tensor, ...]:
        states, _ = function(
            given["Wx"], given["R"], given["b"], function="lstm", backend=backend, dtype=context.dtype_name
        )
        return (states[0],)

    units = s.B * s.T * N * D
    flops = 2.0 * units * 4 * D
    traffic = moved(context.itemsize, 4 * units, units)
    work = {
        "forward": Work(5 * units, flops, traffic["forward"], s.T),
        "backward": Work(0, 2 * flops, traffic["backward"], s.T),
    }
    operator = f"FlashRNN LSTM, {N} heads of {D}, without input projection"
    return peer_problem(context, operator, leaves, call, _flash_naive, (s.B, s.T, N, D), ("Wx",), work)


def _why_not_flash(module: str, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "its kernels run on CUDA tensors only"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        advice = "PYTHONPATH with a checkout of NX-AI/flashrnn (its Triton backend needs einops)"
        return why_not_importable("flashrnn", advice) or why_not_importable(module, advice)


def _why_not_flash_cuda(device: torch.device) -> str | None:
    reason = _why_not_flash("flashrnn.flashrnn.cuda_init", device)
    if reason is None and shutil.which("nvcc") is None and not os.environ.get("CUDA_HOME"):
        return "it is compiled at first use, and there is no nvcc"
    return reason


def _torch_rnn(kind: str) -> Provider:
    return Provider(
        name=kind.lower(),
        about=f"torch.nn.{kind} (cuDNN on a GPU)",
        default_on=("cpu", "cuda"),
        why_not=lambda device: None,
        build={"op": functools.partial(_build, kind), "step": functools.partial(_build_step, kind)},
        kept=results_only,
    )


LSTM, GRU = _torch_rnn("LSTM"), _torch_rnn("GRU")
FLASH_RNN = Provider(
    name="flashrnn",
    about="FlashRNN's LSTM (Triton)",
    default_on=("cuda",),
    why_not=functools.partial(_why_not_flash, "flashrnn.flashrnn.triton_fused.fwbw"),
    build={"op": functools.partial(_build_flash, "triton_fused")},
    kept=results_only,
)
FLASH_RNN_CUDA = Provider(
    name="flashrnn-cuda",
    about="FlashRNN's LSTM (CUDA, compiled for each shape)",
    default_on=(),
    why_not=_why_not_flash_cuda,
    build={"op": functools.partial(_build_flash, "cuda_fused")},
    kept=results_only,
)
