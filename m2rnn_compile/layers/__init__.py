# SPDX-License-Identifier: Apache-2.0
"""`nn.Module`s: plain single-device PyTorch around the op, so that the compiler can fuse everything but the scan."""

from .attention import Attention, AttentionCache
from .block import Block
from .conv import CausalConv
from .m2rnn import M2RNN, DecayGate, M2RNNCache
from .mixer import Cache, SequenceMixer, select_rows, write_rows
from .mlp import SwiGLU
from .norm import RMSNorm
from .optim import param_groups

__all__ = [
    "M2RNN",
    "Attention",
    "AttentionCache",
    "Block",
    "Cache",
    "CausalConv",
    "DecayGate",
    "M2RNNCache",
    "RMSNorm",
    "SequenceMixer",
    "SwiGLU",
    "param_groups",
    "select_rows",
    "write_rows",
]
