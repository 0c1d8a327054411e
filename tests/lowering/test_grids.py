# SPDX-License-Identifier: Apache-2.0
"""Launches with many or long sequences: CUDA takes 2^31 - 1 programs on a grid's first axis, 65,535 on the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton

from m2rnn_compile.lowering import triton as lowering
from m2rnn_compile.lowering.triton import conv, decode, fused, fused_mixer, prologue


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape)


def scan(B: int, T: int) -> None:
    q, v, f, W = zeros(B, T, 1, 16), zeros(B, T, 1, 16), zeros(B, T, 1), zeros(1, 16, 16)
    y, state, checkpoints = lowering.scan(q, q, v, f, W, None, None, None, 64)
    lowering.scan_backward(y, state, q, q, v, f, W, None, None, checkpoints, None, 64)


def convolution(B: int, T: int) -> None:
    x, weight = zeros(B, T, 8), zeros(8, 4)
    conv.conv_silu_backward(conv.conv_silu(x, weight, None), x, weight, None)


def before_scan(B: int, T: int) -> None:
    prologue.before_scan(zeros(B, T, 8), zeros(8, 4), zeros(B, T, 2), None, None, "sigmoid")


def tail(B: int, T: int) -> None:
    q, v, f, W = zeros(B, T, 1, 16), zeros(B, T, 1, 16), zeros(B, T, 1), zeros(1, 16, 16)
    D, w = zeros(1, 16), zeros(16)
    _, _, y, rstd, _ = fused.fused_scan(
        q, q, v, f, W, None, None, None, 64, D, v, w, "silu", "all", 1e-6, torch.float32
    )
    fused.fused_tail_backward(v, y, v, D, v, w, rstd, "silu", "all")


def gate(B: int, T: int) -> None:
    x, n = zeros(B, T, 2), zeros(2)
    fused_mixer.gate_backward(x, x, n, n, "decay", torch.empty_like(x))


def decoding(B: int, T: int) -> None:
    qkv, n, W = zeros(B, 48), zeros(1), zeros(1, 16, 16)
    decode.decode_step(
        qkv, zeros(B, 1), zeros(B, 16), zeros(48, 1, 4), n, n, W, zeros(1, 16), zeros(16), zeros(B, 3, 48),
        zeros(B, 1, 16, 16), None, 1, 1, 1e-6,
    )  # fmt: skip


SIZES = {"many sequences": (70_000, 1), "long": (1, 5_000_000)}
CALLS = {
    "many sequences": (scan, convolution, before_scan, tail, gate, decoding),
    "long": (convolution, before_scan, gate),  # of the others no axis but the first counts steps
}


@pytest.mark.parametrize(("size", "call"), [(size, call) for size in SIZES for call in CALLS[size]])
def test_no_axis_but_the_first_is_counted_in_sequences_or_steps(
    size: str, call: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, grid, **__: grids.append(grid))
    call(*SIZES[size])
    assert grids
    for first, *others in grids:
        assert 0 < first < 2**31
        assert all(0 < n < 65_536 for n in others)
