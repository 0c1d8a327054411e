# SPDX-License-Identifier: Apache-2.0
"""M²RNN (arXiv 2603.14360), the matrix-state non-linear RNN, as a compile-native PyTorch library.

`m2rnn` is the recurrence, `m2rnn_step` one step of it, `m2rnn_decode_step` a layer's step on a pool of states, `M2RNN`
the layer. Importing this package imports torch and nothing else; layers, models, kernels and the command line are
loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .ops import (
    ImplChoice,
    M2RNNOutput,
    M2RNNStepOutput,
    explain_impl,
    m2rnn,
    m2rnn_decode_step,
    m2rnn_fused,
    m2rnn_step,
)

if TYPE_CHECKING:
    from .fusion import FusionReport, enable_fusion, explain
    from .layers import M2RNN
    from .tuned import load_tuned, tune
    from .warm import warmup

__version__ = "0.1.0"
__all__ = [
    "M2RNN",
    "FusionReport",
    "ImplChoice",
    "M2RNNOutput",
    "M2RNNStepOutput",
    "enable_fusion",
    "explain",
    "explain_impl",
    "load_tuned",
    "m2rnn",
    "m2rnn_decode_step",
    "m2rnn_fused",
    "m2rnn_step",
    "tune",
    "warmup",
]


_LAZY = {
    "M2RNN": "layers",
    "FusionReport": "fusion",
    "enable_fusion": "fusion",
    "explain": "fusion",
    "load_tuned": "tuned",
    "tune": "tuned",
    "warmup": "warm",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
