# SPDX-License-Identifier: Apache-2.0
"""What a training step of the released 410M model's layer moves between its projections, and what is written twice.

The code of `m2rnn::fused_mixer` for a GPU runs here on CPU tensors, and every kernel is exchanged for a note of what it
was given. The unit is a tensor B·T·N·V in 16 bits; a tensor counts once for a launch. Which arguments a kernel reads
and which it writes is said here, from its code; an argument that is as long as T and is not named is an error.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from m2rnn_compile.ops import conv as conv_op
from m2rnn_compile.ops import fused_mixer as op
from m2rnn_compile.ops import registry
from tests.ops.test_decode_launches import Dispatched

TRITON = "m2rnn_compile.lowering.triton"
lowering: Any = pytest.importorskip(TRITON, reason="needs Triton")
# As many scans as let the configurations be those of B = 8; few steps: each row of the table is proportional to T.
B, T, N, K, V = 4, 384, 84, 64, 16
COLUMNS, QKV = 2944, 2 * K + N * V
SIZES = [1, 1, N, K, V, N, N, 0, QKV, QKV + N]
UNIT = B * T * N * V * 2


class Moves(NamedTuple):
    """Arguments of a kernel by name, without `_ptr`. `unused`: what stands there because something has to."""

    reads: str
    writes: str
    unused: str = ""


KERNELS = {
    "conv_forward_kernel": Moves("x", "y", "position"),
    "prologue_kernel": Moves("x_f", "f", "x w y"),
    "scan_forward_gluon_kernel": Moves("q k v f", "y ckpt"),
    "tail_forward_kernel": Moves("part v g", "o rstd", "y"),
    "tail_backward_kernel": Moves("do y v g rstd", "dy dg"),
    "scan_backward_gluon_kernel": Moves("q k v f dy ckpt", "dq dk dv df"),
    "reduce_four_kernel": Moves(
        "a b c d c_plus", "a_out b_out c_out d_out", "places a_scale a_plus b_scale b_plus d_scale d_plus"
    ),
    "conv_backward_kernel": Moves("dy x", "dx dw", "position"),
    "gate_backward_kernel": Moves("df x", "dx"),
}


class Memory:
    """What each launch moves, in units, and the places that kernels wrote."""

    def __init__(self) -> None:
        self.written: list[tuple[Tensor, int]] = []  # kept alive, or a storage's address could be another's later
        self.lines: list[str] = []
        self.totals = [0.0, 0.0]

    def launch(self, name: str, given: dict[str, Tensor], constants: dict[str, Any]) -> None:
        reads, writes, unused = (set(names.split()) for names in KERNELS[name])
        long = {n for n, x in given.items() if T in x.shape or "ckpt" in n}
        assert long <= reads | writes | unused, f"{name}: {long - reads - writes - unused} is not in the table"
        for n in writes:
            self.written.append((given[n], constants.get(f"{n.upper()}_SHIFT", 0)))
        units = [sum(bytes_of(n, given[n]) for n in names) / UNIT for names in (reads, writes)]
        self.totals = [a + b for a, b in zip(self.totals, units, strict=True)]
        self.lines.append(f"{name}: {units[0]:.2f} {units[1]:.2f}")

    def report(self) -> str:
        return "\n".join([*self.lines, f"in all: {self.totals[0]:.2f} {self.totals[1]:.2f}"])

    def written_again(self) -> float:
        """Elements that more than one kernel wrote, in units of 16 bits each."""
        times: dict[int, Tensor] = {}
        for x, shift in self.written:
            storage = x.untyped_storage()
            size = storage.nbytes() // x.element_size()
            of_storage = times.setdefault(storage.data_ptr(), torch.zeros(size, dtype=torch.int8))
            of_storage.as_strided(x.shape, x.stride(), x.storage_offset() + shift).add_(1)
        return sum(int((t > 1).sum()) * 2 for t in times.values()) / UNIT


def bytes_of(name: str, x: Tensor) -> float:
    """Of the checkpoints only those of T // 64 slots: two more are there to be zero."""
    used = T // 64 / x.shape[1] if name == "ckpt" else 1
    return x.numel() * x.element_size() * used


class Kernel:
    """Stands in for one."""

    def __init__(self, kernel: Any, memory: Memory) -> None:
        self.arguments, self.name, self.memory = kernel.arg_names, kernel.fn.__name__, memory

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launch

    def launch(self, *arguments: Any, **constants: Any) -> None:
        named = zip(self.arguments, arguments, strict=False)
        self.memory.launch(self.name, {n.removesuffix("_ptr"): x for n, x in named if isinstance(x, Tensor)}, constants)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """The Triton lowering takes CPU tensors for an H200's, and launches nothing."""
    memory = Memory()
    names = ("conv", "fused", "fused_mixer", "fused_inference", "prologue", "reduce")
    modules = [lowering, *(importlib.import_module(f"{TRITON}.{name}") for name in names)]
    row = registry.IMPLEMENTATIONS["triton"]
    monkeypatch.setitem(registry.IMPLEMENTATIONS, "triton", row._replace(devices=("cpu",)))
    monkeypatch.setattr(conv_op, "_lowering", lambda x, weight: modules[1])
    monkeypatch.setattr(importlib.import_module(f"{TRITON}.gluon"), "_device_reason", lambda device: None)
    monkeypatch.setattr(lowering, "clip_mode", lambda device: 2)
    for module in modules:
        if hasattr(module, "_multiprocessors"):
            monkeypatch.setattr(module, "_multiprocessors", lambda device: 132)
        for name in KERNELS.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, Kernel(getattr(module, name), memory))
    for name in ("forward_gluon_kernel", "backward_gluon_kernel"):
        kernel = Kernel(getattr(lowering, name)(), memory)
        monkeypatch.setattr(lowering, name, lambda kernel=kernel: kernel)
    return memory


def long_operations(dispatched: Dispatched) -> list[str]:
    """Operations of torch on tensors that are as long as T; of `new_zeros` what it makes, not what it is asked on."""
    found = []
    for called, args in dispatched.calls:
        made = called is torch.ops.aten.new_zeros.default
        shapes = [args[1]] if made else [list(x.shape) for x in args if isinstance(x, Tensor)]
        found += [f"{called} {shape}" for shape in shapes if T in shape]
    return found


def test_a_training_step(memory: Memory) -> None:
    low: dict[str, Any] = dict(dtype=torch.bfloat16)
    x, taps, W = torch.zeros(B, T, COLUMNS, **low), torch.zeros(QKV, 4, **low), torch.zeros(N, V, V, **low)
    tensors = (x, taps, None, SIZES, W, torch.zeros(N), torch.zeros(N), torch.zeros(N, V, **low))
    tensors = (*tensors, torch.zeros(N, V, **low), None, None)  # the norm's weight; no initial state, not packed
    dispatched = Dispatched()
    with dispatched:
        o, _, *kept = op._kernel(*tensors, 1.0, "decay", "silu", "all", 1e-5, "bfloat16", 64, "triton")
    assert long_operations(dispatched) == []
    assert memory.written_again() == 0
    assert_expected_inline(
        memory.report(),
        """\
conv_forward_kernel: 1.10 1.10
prologue_kernel: 0.06 0.12
scan_forward_gluon_kernel: 1.22 3.00
tail_forward_kernel: 3.00 1.00
in all: 5.38 5.22""",
    )

    memory.lines, memory.totals, dispatched, do = [], [0.0, 0.0], Dispatched(), torch.zeros_like(o)
    with dispatched:
        op._backward_kernel(do, None, *tensors, *kept, 1.0, "decay", "silu", "all", 64, "triton")
    assert long_operations(dispatched) == [f"aten.zero_.default [{B}, {T}, 44]"]
    assert memory.written_again() == 1  # dy, which lies where the convolution's backward writes last
    assert_expected_inline(
        memory.report(),
        """\
tail_backward_kernel: 4.00 2.00
prologue_kernel: 0.06 0.12
scan_backward_gluon_kernel: 4.22 10.25
reduce_four_kernel: 11.25 1.22
conv_backward_kernel: 2.19 1.16
gate_backward_kernel: 0.19 0.06
in all: 21.91 14.82""",
    )
