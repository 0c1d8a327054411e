# SPDX-License-Identifier: Apache-2.0
"""Hybrid language models: configs, presets, generation, checkpoints, data and training.

Importing this needs torch only; `checkpoint` loads safetensors, `display` loads rich and `hf` loads transformers when
they are first used.
"""

from .config import (
    AttentionConfig,
    GatedDeltaNetConfig,
    GRUConfig,
    LMConfig,
    M2RNNConfig,
    Mamba2Config,
    MoEConfig,
    VectorRNNConfig,
)
from .generation import generate, left_pad, sample, stream
from .lm import HybridLM
from .mixers import MIXERS, build_mixer
from .pattern import expand
from .presets import PRESETS, miniature, preset
from .statistics import ModelStatistics, statistics
from .swap import Swap, swap_layer

__all__ = [
    "MIXERS",
    "PRESETS",
    "AttentionConfig",
    "GRUConfig",
    "GatedDeltaNetConfig",
    "HybridLM",
    "LMConfig",
    "M2RNNConfig",
    "Mamba2Config",
    "MoEConfig",
    "ModelStatistics",
    "Swap",
    "VectorRNNConfig",
    "build_mixer",
    "expand",
    "generate",
    "left_pad",
    "miniature",
    "preset",
    "sample",
    "statistics",
    "stream",
    "swap_layer",
]
