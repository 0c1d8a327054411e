# SPDX-License-Identifier: Apache-2.0
"""What the ops are: schemas, validation, fakes, autograd, and the eager equations. Imports torch only."""

from . import fused_conv as fused_conv  # the op m2rnn::fused_scan_conv
from . import fused_mixer as fused_mixer  # the op m2rnn::fused_mixer
from .decode import m2rnn_decode_step
from .flops import register_flops
from .functional import M2RNNOutput, M2RNNStepOutput, explain_impl, m2rnn, m2rnn_step
from .fused import m2rnn_fused
from .fusion_switch import install_when_compiling
from .registry import ImplChoice

register_flops()
install_when_compiling()

__all__ = [
    "ImplChoice",
    "M2RNNOutput",
    "M2RNNStepOutput",
    "explain_impl",
    "m2rnn",
    "m2rnn_decode_step",
    "m2rnn_fused",
    "m2rnn_step",
]
