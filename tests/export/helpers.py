# SPDX-License-Identifier: Apache-2.0
"""What the tests of export share: models, dynamic shapes, a process that has torch and nothing of ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from m2rnn_compile import M2RNN
from m2rnn_compile.layers import Attention, M2RNNCache, RMSNorm

BATCH, TIME = Dim("B"), Dim("T")


def make_layer() -> M2RNN:
    return M2RNN(24, num_heads=4, key_dim=8, value_dim=4).eval()


def export_layer(layer: M2RNN) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(layer, (torch.randn(3, 9, 24),), dynamic_shapes={"x": {0: BATCH, 1: TIME}})


class Stateful(nn.Module):
    """A layer with its cache as plain tensors: a program's file then names no class of this library."""

    def __init__(self, layer: M2RNN) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, conv_state: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, cache = self.layer(x, cache=M2RNNCache(conv_state, state))
        return y, *cache


def export_with_cache(layer: M2RNN, T: int) -> ExportedProgram:
    """T = 1: a decoding step, batch dynamic. Else a prefill that continues a cache, time dynamic too."""
    x: dict[int, Any] = {0: BATCH} if T == 1 else {0: BATCH, 1: TIME}
    with torch.no_grad():
        return torch.export.export(
            Stateful(layer),
            (torch.randn(3, T, 24), *layer.init_cache(3)),
            dynamic_shapes=(x, {0: BATCH}, {0: BATCH}),
        )


class Hybrid(nn.Module):
    """Embedding, M²RNN, attention, head: what a hybrid language model is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 24)
        self.mixers = nn.ModuleList([make_layer(), Attention(24, num_heads=2), make_layer()])
        self.norms = nn.ModuleList(RMSNorm(24) for _ in self.mixers)
        self.head = nn.Linear(24, 32, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        logits: Tensor = self.head(x)
        return logits


def run_without_the_library(code: str, *args: Path) -> str:
    """Run Python code in a process that must not import m2rnn_compile (an import of it fails there)."""
    guard = "import sys; sys.modules['m2rnn_compile'] = None\n"
    command = [sys.executable, "-c", guard + code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
