# SPDX-License-Identifier: Apache-2.0
"""Snapshots that turn red when fusion stops: FX graphs before and after, and what Inductor generates for a GPU.

After a change that is meant: EXPECTTEST_ACCEPT=1 pytest tests/fusion/test_snapshots.py, and read the difference.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from m2rnn_compile import m2rnn
from m2rnn_compile.lowering.inductor import match
from m2rnn_compile.lowering.inductor.hook import torch_version
from tests.fusion.compiling import Rewriting, fusion_on_cpu

__all__ = ["fusion_on_cpu"]


def plain(q: Tensor, k: Tensor, v: Tensor, x: Tensor, W: Tensor, D: Tensor, g: Tensor, weight: Tensor) -> Tensor:
    y = m2rnn(q, k, v, torch.sigmoid(x), W).y
    return F.rms_norm(((y + D * v) * F.silu(g)).flatten(-2), (24,), weight, 1e-5)


def rewritten() -> tuple[str, str]:
    """The graph of `plain` before and after, without type comments and names of placeholders."""
    backend = Rewriting()
    B, T, N, K, V = 2, 5, 4, 3, 6
    sizes = ((B, T, 1, K), (B, T, 1, K), (B, T, N, V), (B, T, N), (N, V, V), (N, V), (B, T, N, V), (N * V,))
    with torch.no_grad():
        torch.compile(plain, backend=backend, fullgraph=True)(*(torch.randn(s) for s in sizes))

    def tidy(code: str) -> str:
        lines = code.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("def forward")) + 1
        kept = [re.sub(r";  .* = None$", "", line.strip()) for line in lines[start:]]
        named = [re.sub(r"\bl_(\w+?)_\b", r"\1", line) for line in kept if " = L_" not in line]
        return "\n".join(textwrap.fill(line, 100, subsequent_indent="    ") for line in named)

    before, after = backend.graphs[0]
    return tidy(before), tidy(after)


@pytest.mark.skipif(torch_version() != (2, 13), reason="the snapshot is that of torch 2.13's Dynamo")
def test_graph_before_and_after(fusion_on_cpu: None) -> None:
    before, after = rewritten()
    assert_expected_inline(
        before,
        """\
x = torch.sigmoid(x)
scan_default = torch.ops.m2rnn.scan.default(q, k, v, x, w, None, None, None, 0, 'auto')
y = scan_default[0]
mul = d * v
add = y + mul
silu = torch.nn.functional.silu(g)
mul_1 = add * silu
flatten = mul_1.flatten(-2)
rms_norm = torch.rms_norm(flatten, (24,), weight, 1e-05)
return (rms_norm,)""",
    )
    assert_expected_inline(
        after,
        """\
reshape = weight.reshape((4, 6))
fused_scan_default = torch.ops.m2rnn.fused_scan.default(q, k, v, x, w, None, None, d, g, reshape,
    None, None, None, 'sigmoid', 'silu', 'all', 1e-05, 'float32', 0, 'auto')
getitem_3 = fused_scan_default[0]
flatten_1 = getitem_3.flatten(-2)
return (flatten_1,)""",
    )


def test_a_seeded_fault_is_seen(fusion_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot above is worth something: break the matcher, and what it shows is another graph."""
    _, good = rewritten()
    monkeypatch.setattr(match._Tail, "multiply_gate", lambda self, at, flat: False)
    torch._dynamo.reset()
    _, broken = rewritten()
    assert "functional.silu" not in good
    assert "functional.silu" in broken


def generated(mode: str) -> str:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.fusion.fake_cuda", mode]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    lines = ["launches:", *found["launches"], "buffers:", *found["buffers"]]
    return "\n".join([*lines, f"Inductor's kernels: {found['inductor_mb']} MB, all: {found['total_mb']} MB"])


needs_generation = [
    pytest.mark.slow,
    pytest.mark.skipif(torch_version() != (2, 13), reason="leans on private parts of torch 2.13"),
    pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ and Linux"),
]


class TestCodeForAGpu:
    """The released 410M model's layer at B8 T4096, bf16, inference. MB are by Inductor's own count (it leaves our op's
    inside out, see docs/compile.md for that); what matters is that no T-sized buffer and no launch comes back."""

    pytestmark = needs_generation

    def test_without_the_conv(self) -> None:
        """With `conv=False`."""
        pytest.importorskip("triton")
        assert_expected_inline(
            generated("tail"),
            """\
launches:
triton_poi
extern_kernels.mm
triton_poi
triton_poi
m2rnn.fused_scan_packed
extern_kernels.mm
buffers:
bfloat16[2944, 1024]
bfloat16[32768, 2944]
bfloat16[8, 4096, 1472]
float32[8, 4096, 84]
bfloat16[32768, 1024]
Inductor's kernels: 79 MB, all: 1130 MB""",
        )

    def test_fused(self) -> None:
        """Nothing is left between the two products but the op."""
        pytest.importorskip("triton")
        assert_expected_inline(
            generated("on"),
            """\
launches:
triton_poi
extern_kernels.mm
m2rnn.fused_scan_conv
extern_kernels.mm
buffers:
bfloat16[2944, 1024]
bfloat16[32768, 2944]
bfloat16[32768, 1024]
Inductor's kernels: 3 MB, all: 717 MB""",
        )

    def test_opaque(self) -> None:
        pytest.importorskip("triton")
        assert_expected_inline(
            generated("off"),
            """\
launches:
triton_poi
extern_kernels.mm
triton_poi
triton_poi
triton_poi
triton_poi
triton_poi
m2rnn.scan
triton_red
extern_kernels.mm
buffers:
bfloat16[2944, 1024]
bfloat16[32768, 2944]
float32[8, 4096, 1472]
bfloat16[8, 4096, 1, 64]
bfloat16[8, 4096, 1, 64]
bfloat16[8, 4096, 84, 16]
float32[8, 4096, 84]
bfloat16[8, 4096, 1344]
bfloat16[32768, 1024]
Inductor's kernels: 316 MB, all: 1885 MB""",
        )

    def test_a_seeded_fault_brings_a_pass_back(self) -> None:
        pytest.importorskip("triton")
        good, broken = generated("on"), generated("broken")
        assert "triton_red" not in good
        assert "triton_red" in broken
