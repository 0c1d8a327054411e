# SPDX-License-Identifier: Apache-2.0
"""Hybrid language models: configs, generation, checkpoints, data and training.

Importing this needs torch only; `checkpoint` loads safetensors and `display` loads rich when they are first used.
"""

from .config import AttentionConfig, LMConfig, M2RNNConfig
from .generation import generate, stream
from .lm import MIXERS, HybridLM, build_mixer

__all__ = [
    "MIXERS",
    "AttentionConfig",
    "HybridLM",
    "LMConfig",
    "M2RNNConfig",
    "build_mixer",
    "generate",
    "stream",
]
