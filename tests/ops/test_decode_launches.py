# SPDX-License-Identifier: Apache-2.0
"""What a GPU would be asked to launch for one step of a layer on a pool, counted without one.

The layer of the released 410M model at batch 64: between its two products there is one op besides views, and the op's
code for a GPU is two launches. The goal is at most three.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from m2rnn_compile import M2RNN

decode = pytest.importorskip("m2rnn_compile.lowering.triton.decode", reason="needs Triton")
B, SLOTS = 64, 70
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
NO_LAUNCH = {torch.ops.aten._unsafe_view.default, torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default}


class Dispatched(TorchDispatchMode):
    """Ops, in order, that a GPU would have to work for: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[OpOverload, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = [r.alias_info for r in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        if not is_view and func not in NO_LAUNCH:
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    @property
    def ops(self) -> list[OpOverload]:
        return [op for op, _ in self.calls]


class Launches:
    """Stands in for a kernel: notes its name and grid instead of running."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self.name, self.seen = name, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: self.seen.append(f"{self.name}{list(grid)}")


def step_of_a_layer(**options: Any) -> Dispatched:
    layer = M2RNN(64, num_heads=84, dtype=torch.bfloat16, **options)
    pool, dispatched = layer.init_cache(SLOTS), Dispatched()
    with torch.no_grad(), dispatched:
        layer(torch.randn(B, 1, 64, dtype=torch.bfloat16), cache=pool, state_indices=torch.randperm(SLOTS)[:B])
    return dispatched


def between_products(ops: list[OpOverload]) -> list[OpOverload]:
    first, last = (i for i, op in enumerate(ops) if op in PRODUCTS)
    return ops[first + 1 : last]


def test_one_op_between_the_two_products_of_a_layer() -> None:
    ops = step_of_a_layer().ops
    assert between_products(ops) == [torch.ops.m2rnn.decode_step.default]
    made_by_the_test = {torch.ops.aten.randn.default, torch.ops.aten.randperm.default}
    assert [op for op in ops if op not in PRODUCTS | made_by_the_test] == [torch.ops.m2rnn.decode_step.default]


def test_that_op_is_two_launches_and_nothing_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code that runs on CUDA tensors, on the arguments that the layer gave, with its kernels exchanged."""
    (arguments,) = (args for op, args in step_of_a_layer().calls if op is torch.ops.m2rnn.decode_step.default)
    seen: list[str] = []
    kernels = [name for name in vars(decode) if name.endswith("_kernel")]
    for name in kernels:
        monkeypatch.setattr(decode, name, Launches(name, seen))
    dispatched = Dispatched()
    with dispatched:
        decode.decode_step(*arguments[:-1])  # all but impl
    assert seen == ["decode_kernel[5376]", "decode_finish_kernel[64, 3]"]
    assert dispatched.ops == []


def test_the_count_sees_operations_of_torch() -> None:
    """A layer without conv has no fused step."""
    assert len(between_products(step_of_a_layer(conv_size=None).ops)) > 10
