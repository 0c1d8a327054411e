# SPDX-License-Identifier: Apache-2.0
"""`nn.Module`s: plain single-device PyTorch around the op, so that the compiler can fuse everything but the scan."""

from .attention import Attention, AttentionCache
from .block import Block, BlockOutput
from .conv import CausalConv
from .gated_deltanet import GatedDeltaNet, GatedDeltaNetCache
from .linear_recurrence import LinearRNNOutput, linear_rnn, linear_rnn_step
from .m2rnn import M2RNN, DecayGate, M2RNNCache
from .mamba2 import Mamba2, Mamba2Cache
from .mixer import Cache, SequenceMixer, select_rows, write_rows
from .mlp import SwiGLU
from .moe import MoE, MoEOutput
from .norm import RMSNorm
from .optim import param_groups
from .vector_rnn import GRU, VectorRNN, VectorRNNCache

__all__ = [
    "GRU",
    "M2RNN",
    "Attention",
    "AttentionCache",
    "Block",
    "BlockOutput",
    "Cache",
    "CausalConv",
    "DecayGate",
    "GatedDeltaNet",
    "GatedDeltaNetCache",
    "LinearRNNOutput",
    "M2RNNCache",
    "Mamba2",
    "Mamba2Cache",
    "MoE",
    "MoEOutput",
    "RMSNorm",
    "SequenceMixer",
    "SwiGLU",
    "VectorRNN",
    "VectorRNNCache",
    "linear_rnn",
    "linear_rnn_step",
    "param_groups",
    "select_rows",
    "write_rows",
]
