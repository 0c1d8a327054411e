# SPDX-License-Identifier: Apache-2.0
"""What the kernels compile to for three GPU generations, without a GPU: registers, spills and shared memory.

A snapshot holds bounds, not figures: compilers differ by a few registers from release to release. A kernel that grows
beyond its bound, or shrinks far below it, fails; EXPECTTEST_ACCEPT=1 then writes new bounds.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from expecttest import TestCase

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from m2rnn_compile.lowering.triton.backward import scan_backward_kernel
from m2rnn_compile.lowering.triton.conv import conv_backward_kernel, conv_forward_kernel
from m2rnn_compile.lowering.triton.decode import decode_config, decode_finish_kernel, decode_kernel
from m2rnn_compile.lowering.triton.forward import scan_forward_kernel
from m2rnn_compile.lowering.triton.fused_mixer import gate_backward_kernel
from m2rnn_compile.lowering.triton.fused_tail import norm_kernel, tail_backward_kernel, tail_forward_kernel
from m2rnn_compile.lowering.triton.gluon import (
    _import_error,
    backward_gluon_kernel,
    backward_wide_kernel,
    forward_fused_kernel,
    forward_gluon_kernel,
    forward_wide_kernel,
)
from m2rnn_compile.lowering.triton.prologue import prologue_kernel
from m2rnn_compile.lowering.triton.reduce import reduce_four_kernel, reduce_kernel

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
needs_tools = pytest.mark.skipif(not (BIN / "cuobjdump").exists(), reason="this Triton has no NVIDIA tools with it")

# Head counts, rows and columns of the benchmark's shapes A to C and D.
A = dict(N=84, K=64, V=16, Gq=84, Gk=84, Gv=1, Gf=1, Gw=1, BV=16, PACKED=False)
D = dict(N=16, K=64, V=64, Gq=16, Gk=16, Gv=1, Gf=1, Gw=1, BV=64, PACKED=False)
FORWARD = dict(HAS_H0=False, SAVE=True)
STEP = dict(HAS_H0=True, SAVE=False)
BACKWARD = dict(HAS_DY=True, CLIP=1, PLANNED=False)
WINDOWS = dict(PACKED=True, PLANNED=True)  # of packed sequences
LOW = {"q", "k", "v", "W", "dy"}
LOW_AROUND = {"x", "w", "y", "dy", "dx", "x_f", "part", "v", "g", "o", "do", "dg", "a", "b", "c", "D", "W"}
LOW_AROUND |= {"qkv", "conv_weight", "conv_state", "norm_weight"}
GLUON_LOW = LOW | {"ckpt", "scratch", "dq", "dk", "dv", "g", "o"}
STRIDE_ONE = {"q_sk", "k_sk", "v_sv", "dy_sv", "f_sn", "g_sv"}
STRIDE_ONE |= {"x_sn", "x_f_sn", "qkv_sc", "g_sc", "do_se", "v_se", "g_se"}
UNALIGNED = {"f_st", "f_sb"}  # with those that a kernel says not to specialise
FLOATS = {"clip", "eps", "norm_eps"}
INTEGERS = {"cu_ptr": "*i32", "walks_ptr": "*i32", "flags_ptr": "*i32", "indices_ptr": "*i32", "places_ptr": "*i64"}


class Resources(NamedTuple):
    """Of one compiled kernel: registers of a thread, bytes of its stack (what spills), bytes of shared memory."""

    registers: int
    stack: int
    shared: int

    def bound(self) -> Resources:
        """A little above: 8 registers, 128 bytes of stack, 1 KiB of shared memory, rounded up."""
        up = lambda x, step: -(-x // step) * step
        return Resources(min(255, up(self.registers + 4, 8)), up(self.stack + 64, 128), up(self.shared, 1024))

    def within(self, bound: Resources) -> bool:
        """At most the bound, and not so far below it that the bound says nothing any more."""
        below = all(x <= y for x, y in zip(self, bound, strict=True))
        return below and self.registers > bound.registers - 48 and self.shared > bound.shared - 4096


def compile_kernel(
    kernel: Any, constants: dict[str, Any], capability: int, warps: int, registers: int | None,
    low: set[str] | None = None,
) -> Resources:  # fmt: skip
    """Compile for bf16 inputs as the launcher would: innermost strides 1, pointers and strides aligned to 16.

    low: which pointers are to 16 bits.
    """
    gluon = "gluon" in type(kernel).__module__
    low = low or (GLUON_LOW if gluon else LOW)
    constants = {**constants, **{name: 1 for name in kernel.arg_names if name in STRIDE_ONE}}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr") or name[1:] in ("_out", "_scale", "_plus"):
            pointer = "*bf16" if name[:-4] in low else "*fp32"
            signature[name] = INTEGERS.get(name, pointer)
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
            if name not in UNALIGNED | FLOATS and not kernel.params[i].do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    Source = gluon_source() if gluon else ASTSource
    options = {"num_warps": warps, **({"maxnreg": registers} if registers else {})}
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(Source(kernel, signature, constants, attributes), target=target, options=options)
    return Resources(*registers_and_stack(compiled.asm["cubin"]), compiled.metadata.shared)


def gluon_source() -> Any:
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(BIN / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def table(measured: dict[str, Resources], recorded: str) -> str:
    """The recorded lines where they bound what was measured, new bounds elsewhere."""
    kept = {}
    for line in recorded.strip().splitlines():
        name, *numbers = (x.strip() for x in line.split("|"))
        kept[name] = Resources(*(int(re.sub(r"\D", "", x)) for x in numbers))
    lines = []
    for name, resources in measured.items():
        bound = kept[name] if name in kept and resources.within(kept[name]) else resources.bound()
        lines.append(f"{name:<16} | registers <= {bound.registers} | stack <= {bound.stack} | shared <= {bound.shared}")
    return "\n".join(lines) + "\n"


def gluon_kernels(capability: int) -> dict[str, Resources]:
    if _import_error():
        pytest.skip(str(_import_error()))
    forward, backward = forward_gluon_kernel(), backward_gluon_kernel()
    A32, D32 = dict(A, C=32), dict(D, C=32)
    plans = {
        "forward A": (forward, dict(A32, BK=64, **FORWARD, SHARED=True), 2, None),
        "forward B": (forward, dict(A32, BK=64, **FORWARD, SHARED=False), 2, None),
        "forward C": (forward, dict(A32, BK=32, **FORWARD, SHARED=False), 2, None),
        "forward D": (forward, dict(D32, BK=64, **FORWARD, SHARED=False), 4, None),
        "step A": (forward, dict(A32, BK=32, **STEP, SHARED=False), 2, None),
        "step D": (forward, dict(D32, BK=64, **STEP, SHARED=False), 4, None),
        "backward A": (backward, dict(A32, BK=32, **BACKWARD, SHARED=True), 1, None),
        "backward B": (backward, dict(A32, BK=32, **BACKWARD, SHARED=False), 1, None),
        "backward C": (backward, dict(A32, BK=16, **BACKWARD, SHARED=False), 1, None),
        "backward packed": (backward, dict(A32, BK=32, **{**BACKWARD, **WINDOWS}, SHARED=False), 1, None),
    }
    if capability == 90:
        plans["forward D"] = (forward_wide_kernel(), dict(D32, BK=64, **FORWARD), 4, None)
        plans["step D"] = (forward_wide_kernel(), dict(D32, BK=64, **STEP), 4, None)
        plans["backward D"] = (backward_wide_kernel(), dict(D32, BK=64, **BACKWARD), 4, None)
        plans["packed D"] = (backward_wide_kernel(), dict(D32, BK=64, **{**BACKWARD, **WINDOWS}), 4, None)
    return {name: compile_kernel(k, c, capability, warps, most) for name, (k, c, warps, most) in plans.items()}


def fused_kernels(capability: int) -> dict[str, Resources]:
    """The scan with what stands around it, for inference: all of it at A, and the tail alone."""
    if _import_error():
        pytest.skip(str(_import_error()))
    heads = {k: x for k, x in A.items() if k != "PACKED"}
    around = dict(Gg=1, G_SHIFT=4, HAS_H0=False, HAS_D=True, ACT="silu", HEAD_NORM=False, HAS_WEIGHT=False)
    fused = dict(heads, BK=64, C=32, **around)
    plans = {"conv, tail": dict(fused, WIDTH=4, SHARED=capability == 90), "tail": dict(fused, WIDTH=0, SHARED=False)}
    return {name: compile_kernel(forward_fused_kernel(), c, capability, 2, None) for name, c in plans.items()}


def portable_kernels(capability: int) -> dict[str, Resources]:
    numerics = dict(DOT=tl.bfloat16, HARDWARE=True, C=64, UNITS=(16, 16, 16, 16))
    forward = dict(A, BK=32, **FORWARD, **numerics)
    backward = dict(A, BK=16, **{**BACKWARD, "CLIP": True}, SLOTS=1, **numerics)
    return {
        "forward": compile_kernel(scan_forward_kernel, forward, capability, 1, None),
        "step": compile_kernel(scan_forward_kernel, {**forward, **STEP}, capability, 1, None),
        "backward": compile_kernel(scan_backward_kernel, backward, capability, 1, None),
        "backward packed": compile_kernel(scan_backward_kernel, {**backward, **WINDOWS}, capability, 1, None),
    }


def kernels_around(capability: int) -> dict[str, Resources]:
    """Around the scan: of inference prologue, norm and decoding step; of training convolution, gates, tail, sums."""
    conv = dict(C=1472, WIDTH=4, PACKED=False, FAST=True, BC=128, X_UNIT=16)
    before = dict(C=128, WIDTH=4, NF=84, FORGET="decay", FAST=True, STEPS=32, BC=128, BF=128, X_UNIT=16, F_UNIT=1)
    norm = dict(F=1344, HAS_W=True, BF=2048, ROWS=2)
    gate = dict(N=84, FORGET="decay", BR=8, BN=128, X_UNIT=16)
    tail = dict(N=84, V=16, Gv=1, Gg=1, V_SHIFT=0, G_SHIFT=0, HAS_D=True, HAS_G=True, HAS_W=True, ACT="silu",
                NORM="all", FAST=True, BN=128, BV=16, V_UNIT=16, G_UNIT=16)  # fmt: skip
    forth = dict(tail, BLOCKS=2, SAVE_Y=True, SAVE_RSTD=True, ROWS=2)
    back = dict(tail, DY_SHIFT=0, DG_SHIFT=0, DO_UNIT=16)
    heads = dict(Nq=1, Nk=1, Nv=84, Nf=84, Ng=84, Nw=84)
    config = decode_config(64, 16, 2)
    decode = dict(N=84, K=64, V=16, C=1472, WIDTH=4, **heads, BK=config.rows, BV=16, INDEXED=True, DOT=tl.bfloat16,
                  HARDWARE=True)  # fmt: skip
    finish = dict(F=1344, C=1472, WIDTH=4, BF=2048, BC=1024, BW=4, INDEXED=True)
    # Blocks of rows, heads that share the result's, elements of each; rows, heads and elements of a tile; no columns
    # beside them, nothing more to add, no places.
    y, dq = (2, 1, 16, 256, 1, 16, 0, 0, 0, 0), (1, 84, 64, 1, 32, 64, 0, 0, 0, 0)
    dv, df = (2, 1, 16, 64, 1, 16, 0, 0, 0, 0), (2, 1, 1, 1024, 1, 1, 0, 0, 0, 0)
    four = dict(A=dq, B=dq, C=dv, D=df)
    plans = {
        "prologue": (prologue_kernel, before, 4, None),
        "norm": (norm_kernel, norm, 4, None),
        "conv": (conv_forward_kernel, dict(conv, STEPS=64), 1, None),
        "conv backward": (conv_backward_kernel, dict(conv, STEPS=128, DX_UNIT=16), 1, None),
        "gate backward": (gate_backward_kernel, gate, 4, None),
        "tail": (tail_forward_kernel, forth, 2, None),
        "tail backward": (tail_backward_kernel, back, 8, 128),
        "decode": (decode_kernel, decode, config.warps, None),
        "decode finish": (decode_finish_kernel, finish, 4, None),
        "sum": (reduce_kernel, dict(A=y), 4, None),
        "four sums": (reduce_four_kernel, four, 1, None),
        "sums, placed": (reduce_four_kernel, {name: (*x[:9], 1) for name, x in four.items()}, 1, None),
    }
    compiled = lambda kernel, *plan: compile_kernel(kernel, plan[0], capability, *plan[1:], LOW_AROUND)
    return {name: compiled(*plan) for name, plan in plans.items()}


@needs_tools
class CompiledKernels(TestCase):
    def check(self, measured: dict[str, Resources], recorded: str) -> None:
        self.assertExpectedInline(table(measured, recorded), recorded, skip=1)

    def test_portable_sm80(self) -> None:
        self.check(portable_kernels(80), """\
forward          | registers <= 88 | stack <= 128 | shared <= 1024
step             | registers <= 72 | stack <= 128 | shared <= 1024
backward         | registers <= 255 | stack <= 128 | shared <= 4096
backward packed  | registers <= 255 | stack <= 256 | shared <= 4096
""")

    def test_gluon_sm80(self) -> None:
        self.check(gluon_kernels(80), """\
forward A        | registers <= 255 | stack <= 128 | shared <= 27648
forward B        | registers <= 136 | stack <= 128 | shared <= 27648
forward C        | registers <= 104 | stack <= 128 | shared <= 19456
forward D        | registers <= 255 | stack <= 256 | shared <= 91136
step A           | registers <= 104 | stack <= 128 | shared <= 19456
step D           | registers <= 255 | stack <= 256 | shared <= 91136
backward A       | registers <= 255 | stack <= 128 | shared <= 26624
backward B       | registers <= 255 | stack <= 128 | shared <= 26624
backward C       | registers <= 176 | stack <= 128 | shared <= 15360
backward packed  | registers <= 255 | stack <= 128 | shared <= 26624
""")

    def test_fused_sm80(self) -> None:
        self.check(fused_kernels(80), """\
conv, tail       | registers <= 136 | stack <= 128 | shared <= 37888
tail             | registers <= 136 | stack <= 128 | shared <= 29696
""")

    def test_fused_sm90(self) -> None:
        self.check(fused_kernels(90), """\
conv, tail       | registers <= 255 | stack <= 128 | shared <= 37888
tail             | registers <= 152 | stack <= 128 | shared <= 29696
""")

    def test_fused_sm100(self) -> None:
        self.check(fused_kernels(100), """\
conv, tail       | registers <= 152 | stack <= 128 | shared <= 37888
tail             | registers <= 144 | stack <= 128 | shared <= 29696
""")

    def test_around_sm80(self) -> None:
        self.check(kernels_around(80), """\
prologue         | registers <= 112 | stack <= 128 | shared <= 4096
norm             | registers <= 56 | stack <= 128 | shared <= 1024
conv             | registers <= 72 | stack <= 128 | shared <= 0
conv backward    | registers <= 104 | stack <= 128 | shared <= 0
gate backward    | registers <= 104 | stack <= 128 | shared <= 1024
tail             | registers <= 136 | stack <= 128 | shared <= 1024
tail backward    | registers <= 128 | stack <= 128 | shared <= 8192
decode           | registers <= 72 | stack <= 128 | shared <= 3072
decode finish    | registers <= 40 | stack <= 128 | shared <= 1024
sum              | registers <= 128 | stack <= 128 | shared <= 4096
four sums        | registers <= 216 | stack <= 128 | shared <= 1024
sums, placed     | registers <= 255 | stack <= 128 | shared <= 1024
""")

    def test_around_sm100(self) -> None:
        self.check(kernels_around(100), """\
prologue         | registers <= 144 | stack <= 128 | shared <= 4096
norm             | registers <= 56 | stack <= 128 | shared <= 1024
conv             | registers <= 72 | stack <= 128 | shared <= 0
conv backward    | registers <= 136 | stack <= 128 | shared <= 0
gate backward    | registers <= 120 | stack <= 128 | shared <= 1024
tail             | registers <= 136 | stack <= 128 | shared <= 1024
tail backward    | registers <= 128 | stack <= 128 | shared <= 8192
decode           | registers <= 72 | stack <= 128 | shared <= 3072
decode finish    | registers <= 40 | stack <= 128 | shared <= 1024
sum              | registers <= 120 | stack <= 128 | shared <= 4096
four sums        | registers <= 255 | stack <= 128 | shared <= 1024
sums, placed     | registers <= 255 | stack <= 128 | shared <= 1024
""")

    def test_around_sm90(self) -> None:
        self.check(kernels_around(90), """\
prologue         | registers <= 136 | stack <= 128 | shared <= 4096
norm             | registers <= 64 | stack <= 128 | shared <= 1024
conv             | registers <= 72 | stack <= 128 | shared <= 0
conv backward    | registers <= 104 | stack <= 128 | shared <= 0
gate backward    | registers <= 112 | stack <= 128 | shared <= 2048
tail             | registers <= 136 | stack <= 128 | shared <= 1024
tail backward    | registers <= 128 | stack <= 128 | shared <= 8192
decode           | registers <= 64 | stack <= 128 | shared <= 3072
decode finish    | registers <= 40 | stack <= 128 | shared <= 1024
sum              | registers <= 120 | stack <= 128 | shared <= 4096
four sums        | registers <= 255 | stack <= 128 | shared <= 1024
sums, placed     | registers <= 255 | stack <= 128 | shared <= 1024
""")

    def test_portable_sm90(self) -> None:
        self.check(portable_kernels(90), """\
forward          | registers <= 88 | stack <= 128 | shared <= 1024
step             | registers <= 72 | stack <= 128 | shared <= 1024
backward         | registers <= 255 | stack <= 128 | shared <= 4096
backward packed  | registers <= 255 | stack <= 128 | shared <= 4096
""")

    def test_gluon_sm90(self) -> None:
        self.check(gluon_kernels(90), """\
forward A        | registers <= 255 | stack <= 128 | shared <= 27648
forward B        | registers <= 152 | stack <= 128 | shared <= 27648
forward C        | registers <= 104 | stack <= 128 | shared <= 19456
forward D        | registers <= 255 | stack <= 128 | shared <= 160768
step A           | registers <= 112 | stack <= 128 | shared <= 19456
step D           | registers <= 255 | stack <= 128 | shared <= 160768
backward A       | registers <= 255 | stack <= 256 | shared <= 26624
backward B       | registers <= 255 | stack <= 128 | shared <= 26624
backward C       | registers <= 248 | stack <= 128 | shared <= 15360
backward packed  | registers <= 255 | stack <= 128 | shared <= 26624
backward D       | registers <= 255 | stack <= 256 | shared <= 232448
packed D         | registers <= 255 | stack <= 256 | shared <= 232448
""")

    def test_portable_sm100(self) -> None:
        self.check(portable_kernels(100), """\
forward          | registers <= 96 | stack <= 128 | shared <= 1024
step             | registers <= 72 | stack <= 128 | shared <= 1024
backward         | registers <= 224 | stack <= 128 | shared <= 4096
backward packed  | registers <= 248 | stack <= 128 | shared <= 4096
""")

    def test_gluon_sm100(self) -> None:
        self.check(gluon_kernels(100), """\
forward A        | registers <= 176 | stack <= 128 | shared <= 27648
forward B        | registers <= 144 | stack <= 128 | shared <= 27648
forward C        | registers <= 112 | stack <= 128 | shared <= 19456
forward D        | registers <= 255 | stack <= 128 | shared <= 91136
step A           | registers <= 104 | stack <= 128 | shared <= 19456
step D           | registers <= 255 | stack <= 256 | shared <= 91136
backward A       | registers <= 255 | stack <= 128 | shared <= 26624
backward B       | registers <= 255 | stack <= 128 | shared <= 26624
backward C       | registers <= 152 | stack <= 128 | shared <= 15360
backward packed  | registers <= 255 | stack <= 128 | shared <= 26624
""")


def test_a_kernel_that_spills_or_grows_is_noticed() -> None:
    bounds = table({"k": Resources(100, 0, 5000)}, "")
    assert table({"k": Resources(104, 16, 5120)}, bounds) == bounds
    for other in (Resources(120, 0, 5000), Resources(100, 600, 5000), Resources(100, 0, 9000), Resources(40, 0, 5000)):
        assert table({"k": other}, bounds) != bounds
