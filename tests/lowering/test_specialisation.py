# SPDX-License-Identifier: Apache-2.0
"""A new T compiles nothing: what Triton looks up compiled kernels by does not depend on it.

Launches are recorded, not made; the key is what Triton's own launcher would compute for a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from m2rnn_compile import warm
from m2rnn_compile.lowering import triton as lowering
from m2rnn_compile.lowering.triton import conv, fused, fused_mixer, prologue

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
LENGTHS = (64, 65, 96, 100, 8, 1)  # odd, multiples of 4 and of 16; 8 as `warmup` has it


@functools.lru_cache(None)
def binder(kernel: Any) -> Any:
    return create_function_from_signature(kernel.signature, kernel.params, BACKEND)


def variants(call: Callable[[int], object], monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...] = LENGTHS,
             ) -> dict[str, dict[str, list[int]]]:  # fmt: skip
    """For every kernel that is launched, its compiled variants and the lengths that need each."""
    found: dict[str, dict[str, list[int]]] = {}
    now = 0

    def launch(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        bound, specialisation, rest = binder(kernel)(*arguments, **options)
        parameters = (f"{n}: {x}" for n, x in zip(bound, specialisation, strict=True) if x[0] != "constexpr")
        key = ", ".join([*parameters, *(f"{p.name} = {bound[p.name]}" for p in kernel.params if p.is_constexpr)])
        found.setdefault(kernel.fn.__name__, {}).setdefault(f"{key}, {rest}", []).append(now)

    monkeypatch.setattr(triton.JITFunction, "run", launch)
    for T in lengths:
        now = T
        call(T)
    return found


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def scan(T: int, dtype: torch.dtype, N: int, K: int, V: int, **options: Any) -> None:
    q, v, W = draw(2, T, 1, K, dtype=dtype), draw(2, T, N, V, dtype=dtype), draw(N, V, V, dtype=dtype)
    f = draw(2, T, N, dtype=torch.float32)
    y, state, checkpoints = lowering.scan(q, q, v, f, W, None, None, None, 64)
    lowering.scan_backward(y, state, q, q, v, f, W, None, None, checkpoints, None, 64, **options)


SHAPES = {  # all of the portable kernels on a GPU
    "fp32": (torch.float32, 84, 64, 16),
    "fp32, a head": (torch.float32, 1, 64, 16),
    "V above 64": (torch.bfloat16, 3, 64, 128),
    "K and V no multiples of 16": (torch.bfloat16, 3, 20, 12),
    "odd K and V": (torch.float32, 3, 33, 5),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window_bytes", [lowering.WINDOW_BYTES, 1], ids=["one window", "windows"])
def test_scan(shape: str, window_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = variants(lambda T: scan(T, *SHAPES[shape], window_bytes=window_bytes), monkeypatch)
    assert found.keys() >= {"scan_forward_kernel", "scan_backward_kernel", "reduce_four_kernel"}
    for kernel, by_key in found.items():
        assert len(by_key) == 1, (kernel, by_key)


def columns(T: int, before: int, width: int, after: int, dtype: torch.dtype) -> Tensor:
    """Columns of a projection's result."""
    return draw(2, T, before + width + after, dtype=dtype)[..., before : before + width]


BESIDE = {"aligned": (16, 16), "pairs": (2, 4), "odd": (3, 4)}  # columns before and after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beside", BESIDE)
def test_convolution(beside: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = BESIDE[beside]

    def call(T: int) -> None:
        x, dx = (columns(T, before, 33, after, dtype) for _ in range(2))
        weight = draw(33, 4, dtype=dtype)
        conv.conv_silu_backward(conv.conv_silu(x, weight, None), x, weight, None, dx=dx)

    found = variants(call, monkeypatch)
    assert {kernel: len(by_key) for kernel, by_key in found.items()} == {
        "conv_forward_kernel": 1, "conv_backward_kernel": 1,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beside", BESIDE)
def test_gates(beside: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = BESIDE[beside]
    n = draw(5, dtype=torch.float32)

    def call(T: int) -> None:
        x, f, dx = (columns(T, before, width, after, dtype) for width in (33, 5, 5))
        prologue.before_scan(x, draw(33, 4, dtype=dtype), f, n, n, "decay")
        fused_mixer.gate_backward(draw(2, T, 5, dtype=torch.float32), f, n, n, "decay", dx)

    monkeypatch.setattr(fused_mixer, "_multiprocessors", lambda *_: 132)
    found = variants(call, monkeypatch)
    assert {kernel: len(by_key) for kernel, by_key in found.items()} == {
        "prologue_kernel": 1, "gate_backward_kernel": 1,
    }  # fmt: skip


@pytest.mark.parametrize(("N", "V"), [(4, 16), (3, 5)], ids=["aligned", "odd"])
@pytest.mark.parametrize("beside", BESIDE)
def test_tail(beside: str, N: int, V: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = BESIDE[beside]
    dtype = torch.float32
    W, D, w = draw(N, V, V, dtype=dtype), draw(N, V, dtype=dtype), draw(N * V, dtype=dtype)

    def call(T: int) -> None:
        v, g, dy, dg = (columns(T, before, N * V, after, dtype).unflatten(-1, (N, V)) for _ in range(4))
        q, f = draw(2, T, 1, 64, dtype=dtype), draw(2, T, N, dtype=dtype)
        o, _, y, rstd, _ = fused.fused_scan(q, q, v, f, W, None, None, None, 64, D, g, w, "silu", "all", 1e-6, dtype)
        fused.fused_tail_backward(o, y, v, D, g, w, rstd, "silu", "all", dy=dy, dg=dg)

    found = variants(call, monkeypatch)
    assert {"tail_forward_kernel", "tail_backward_kernel"} < found.keys()
    for kernel, by_key in found.items():
        assert len(by_key) == 1, (kernel, by_key)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", ["fp32", "V above 64"])
def test_packed_batches_of_any_length_after_warmup(
    shape: str, index: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `warmup` runs for them compiles all that they need, in one window or in more."""
    dtype, N, K, V = SHAPES[shape]

    def inputs(T: int) -> tuple[Tensor | None, ...]:
        q, v, W = draw(1, T, 1, K, dtype=dtype), draw(1, T, N, V, dtype=dtype), draw(N, V, V, dtype=dtype)
        f = draw(1, T, N, dtype=torch.float32)
        return q, q, v, f, W, None, torch.tensor([0, 1, 3, T], dtype=index)

    def call(T: int) -> None:
        x = inputs(T)
        if T == 66:  # as `warmup` does it, after a run in one window
            warm.run_windows(x, 1.0)
        y, state, checkpoints = lowering.scan(*x, 1.0, 64)
        lowering.scan_backward(y, state, *x, checkpoints, 1.0, 64, window_bytes=2**22)

    found = variants(call, monkeypatch, (66, 65, 100, 9000))
    planned = [set(T) for key, T in found["scan_backward_kernel"].items() if "PLANNED = True" in key]
    assert len(planned) == 1
    assert planned[0] >= {66, 9000}
    for kernel, by_key in found.items():
        assert all(66 in T for T in by_key.values()), (kernel, by_key)


def test_a_number_that_follows_t_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    (parameter,) = [p for p in lowering.scan_backward_kernel.params if p.name == "q_sb"]
    monkeypatch.setattr(parameter, "do_not_specialize", False)
    binder.cache_clear()
    found = variants(lambda T: scan(T, *SHAPES["odd K and V"]), monkeypatch)
    binder.cache_clear()
    assert list(found["scan_backward_kernel"].values()) == [[64, 96], [65, 100, 8, 1]]
