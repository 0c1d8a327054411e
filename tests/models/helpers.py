# SPDX-License-Identifier: Apache-2.0
"""A small hybrid, and a folder of text."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from m2rnn_compile.models import AttentionConfig, HybridLM, LMConfig, M2RNNConfig

CONFIG = LMConfig(
    vocab_size=256,
    hidden_size=16,
    pattern="MAM",
    mlp_size=24,
    m2rnn=M2RNNConfig(num_heads=2, key_dim=8, value_dim=4),
    attention=AttentionConfig(num_heads=2),
)


def make_model(config: LMConfig = CONFIG, dtype: torch.dtype = torch.float64) -> HybridLM:
    """Weights large enough for the layers to matter, so that two tokens are never about equally likely."""
    model = HybridLM(config, dtype=dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2 and "state_weight" not in name and not name.endswith(".D"):
                p.mul_(10)
    return model.eval()


def write_texts(folder: Path, count: int = 12) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"file{i:02d}.txt").write_text(f"Text number {i}. " + "All work and no play makes a dull file. " * 5)
    return folder


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to write files beyond `size` bytes: what a full disk looks like to whoever writes them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
