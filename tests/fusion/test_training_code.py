# SPDX-License-Identifier: Apache-2.0
"""The code of a training step of the released 410M model's layer (B8 T4096, bf16), pinned: launches, large buffers, MB.

One unit, a tensor B·T·N·V in bf16, is 88 MB. [8, 4096, 1472] is q | k | v, [8, 4096, 2944] the gradient of the
projection's result, padded. MB are Inductor's own count of its kernels; it leaves out what our ops and products move.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
from expecttest import assert_expected_inline

from m2rnn_compile.lowering.inductor.hook import torch_version

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch_version() != (2, 13), reason="leans on private parts of torch 2.13"),
]


@functools.cache
def generated(mode: str) -> str:
    command = [sys.executable, "-m", "tests.fusion.training_code", mode]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = []
    for name, graph in zip(("forward", "backward"), json.loads(done.stdout.splitlines()[-1]), strict=True):
        large = [
            b for b in graph["buffers"] if prod(int(n) for n in b[b.index("[") + 1 : -1].split(",") if n.strip()) > 1e7
        ]
        lines += [f"{name}:", *graph["launches"], "buffers:", *large, f"{graph['inductor_mb']} MB"]
    return "\n".join(lines)


def test_fused() -> None:
    """Nothing T-sized between the products but what one op returns, each way: Inductor's own kernels pad weights and
    add gradients of parameters."""
    assert_expected_inline(
        generated("on"),
        """\
forward:
cpp_fused
extern_kernels.mm
m2rnn.fused_mixer
extern_kernels.mm
buffers:
bfloat16[32768, 2944]
bfloat16[32768, 1024]
3 MB
backward:
extern_kernels.mm
extern_kernels.mm
m2rnn.fused_mixer_backward
cpp_fused
extern_kernels.mm
extern_kernels.mm
cpp_fused
buffers:
bfloat16[32768, 1344]
bfloat16[32768, 1024]
3 MB""",
    )


def test_a_projection_of_a_width_that_is_not_padded() -> None:
    """2900 columns: the rewrite pads the product, and the code is the same; no pass pads x or its gradient."""
    assert generated("narrow") == generated("on")


def test_opaque() -> None:
    assert_expected_inline(
        generated("off"),
        """\
forward:
cpp_fused
extern_kernels.mm
cpp_fused
m2rnn.scan
cpp_fused
extern_kernels.mm
buffers:
bfloat16[32768, 2944]
bfloat16[8, 4099, 1472]
bfloat16[8, 4096, 1472]
float32[8, 4096, 1344]
bfloat16[8, 4096, 1344]
bfloat16[32768, 1024]
242 MB
backward:
extern_kernels.mm
extern_kernels.mm
cpp_fused
m2rnn.scan_backward
cpp_fused
extern_kernels.mm
extern_kernels.mm
cpp_fused
buffers:
bfloat16[32768, 1344]
bfloat16[8, 4096, 84, 16]
bfloat16[8, 4096, 1344]
bfloat16[8, 4096, 2944]
bfloat16[8, 4096, 84, 16]
bfloat16[8, 4096, 1472]
float32[8, 4096, 1472]
float32[8, 4096, 1472]
bfloat16[8, 4099, 1472]
bfloat16[32768, 1024]
1004 MB""",
    )


def test_ops_of_their_own_for_conv_tail_and_scan() -> None:
    """What one op for all of it saves: two passes that put gradients side by side, of q, k and v and of everything.

    187 MB is Inductor's count; by the shapes of what they read and write these passes move some 660.
    """
    assert_expected_inline(
        generated("apart"),
        """\
forward:
cpp_fused
extern_kernels.mm
m2rnn.conv_silu
cpp_fused
m2rnn.fused_scan_packed
extern_kernels.mm
buffers:
bfloat16[32768, 2944]
bfloat16[32768, 1024]
7 MB
backward:
extern_kernels.mm
extern_kernels.mm
m2rnn.fused_tail_backward
m2rnn.scan_backward
cpp_fused
m2rnn.conv_silu_backward
cpp_fused
extern_kernels.mm
extern_kernels.mm
cpp_fused
buffers:
bfloat16[32768, 1344]
bfloat16[8, 4096, 1472]
bfloat16[8, 4096, 2944]
bfloat16[32768, 1024]
187 MB""",
    )


@pytest.mark.parametrize(
    "fault, buffers",
    [("no gate", ["float32[8, 4096, 1344]"]), ("apart", ["bfloat16[8, 4096, 1472]", "bfloat16[8, 4096, 2944]"])],
)
def test_a_seeded_fault_brings_passes_back(fault: str, buffers: list[str]) -> None:
    for buffer in buffers:
        assert buffer not in generated("on")
        assert buffer in generated(fault)
