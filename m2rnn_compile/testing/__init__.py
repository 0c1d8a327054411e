# SPDX-License-Identifier: Apache-2.0
"""What the tests and the benchmark judge by, for users too: inputs, the fp64 oracle, the tolerance rule."""

from .inputs import ScanInputs, make_inputs
from .judge import Comparison, assert_accurate, compare
from .oracle import low_precision_eager, oracle, run, run_low_precision

__all__ = [
    "Comparison",
    "ScanInputs",
    "assert_accurate",
    "compare",
    "low_precision_eager",
    "make_inputs",
    "oracle",
    "run",
    "run_low_precision",
]
