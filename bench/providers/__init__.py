# SPDX-License-Identifier: Apache-2.0
"""Who can be measured. A provider joins by one line here; each is looked for only when a run might use it."""

from __future__ import annotations

from .attention import SDPA
from .gated_delta import GATED_DELTA_NET
from .gated_rnn import FLASH_RNN, FLASH_RNN_CUDA, GRU, LSTM
from .mamba import MAMBA2
from .ours import compiled, implementation
from .registry import Context, Provider, choose
from .upstream import XMA, add_checkout

PROVIDERS: list[Provider] = [
    implementation("reference", default_on=("cpu",), about="ours: the loop through autograd"),
    implementation("eager", default_on=(), about="ours: torch loops with checkpoints"),
    implementation("cpp", default_on=("cpu",), about="ours: C++ kernel"),
    implementation("triton", default_on=("cuda",), about="ours: Triton kernels"),
    compiled("reference", default_on=()),
    compiled("cpp", default_on=("cpu",)),
    compiled("triton", default_on=("cuda",)),
    XMA,
    GATED_DELTA_NET,
    MAMBA2,
    FLASH_RNN,
    FLASH_RNN_CUDA,
    LSTM,
    GRU,
    SDPA,
]

__all__ = ["PROVIDERS", "Context", "Provider", "add_checkout", "choose"]
