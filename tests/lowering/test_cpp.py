# SPDX-License-Identifier: Apache-2.0
"""The C++ kernel for CPU tensors, through the public function, against the fp64 oracle."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch

from m2rnn_compile import explain_impl, m2rnn
from m2rnn_compile.lowering import cpu as lowering
from m2rnn_compile.testing import ScanInputs, assert_accurate, make_inputs, oracle, run, run_low_precision

pytestmark = pytest.mark.skipif(lowering.availability() is not None, reason=str(lowering.availability()))

CASES: dict[str, dict[str, Any]] = {
    "one of everything": dict(B=1, T=5, N=1, K=1, V=1),
    "the benchmark's heads": dict(B=2, T=70, N=8, K=32, V=16),
    "K and V odd": dict(B=2, T=67, N=2, K=33, V=17, initial_state=True),
    "wide V": dict(B=1, T=66, N=2, K=8, V=100),
    "many rows": dict(B=1, T=30, N=2, K=130, V=8),
    "every input its own heads": dict(B=1, T=67, N=4, K=24, V=17, Nq=2, Nk=4, Nv=2, Nf=1, Nw=2),
    "clip that bites": dict(B=2, T=70, N=2, K=16, V=16, state_grad_clip=0.1, initial_state=True),
    "clip one": dict(B=2, T=70, N=2, K=16, V=16, state_grad_clip=1.0),
    "clip zero": dict(B=1, T=66, N=2, K=16, V=16, state_grad_clip=0.0),
    "clip infinite": dict(B=1, T=66, N=2, K=16, V=16, state_grad_clip=float("inf")),
    "packed": dict(B=1, T=140, N=4, K=16, V=16, Nv=2, seqlens=[65, 0, 10, 65], initial_state=True),
    "packed, empty at both ends": dict(B=1, T=20, N=2, K=16, V=16, seqlens=[0, 20, 0], state_grad_clip=0.3),
    "no gradient of the final state": dict(B=1, T=66, N=2, K=16, V=16, dfinal_state=False),
    "bf16": dict(B=2, T=70, N=4, K=16, V=16, dtype=torch.bfloat16, initial_state=True),
    "fp16": dict(B=2, T=70, N=4, K=16, V=16, dtype=torch.float16),
    "long": dict(B=1, T=700, N=2, K=64, V=16),
}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.replace(" ", "-"))
def test_values_and_gradients_are_as_accurate_as_the_rule_asks(case: str) -> None:
    x = make_inputs(**CASES[case], seed=5)
    assert_accurate(run(x, impl="cpp"), oracle(x, impl="eager"), run_low_precision(x), slices=4)


@pytest.mark.parametrize("T", [0, 1, 63, 64, 65, 130])
def test_fp64_agrees_with_autograd_through_the_loop(T: int) -> None:
    """Sums of at most a few thousand terms in fp64: 1e-12 is four thousand roundings."""
    x = make_inputs(2, T, 4, 9, 7, Nk=2, dtype=torch.float64, seed=T, initial_state=True, state_grad_clip=0.5)
    got, want = run(x, impl="cpp"), oracle(x)
    for name, truth in want.items():
        torch.testing.assert_close(got[name], truth, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_bits_depend_neither_on_repeats_nor_on_threads() -> None:
    x = make_inputs(3, 130, 6, 32, 16, Nq=2, seed=1, initial_state=True, state_grad_clip=1.0)
    first, threads = run(x, impl="cpp"), torch.get_num_threads()
    try:
        for n in (1, 2, 3, 4, 5) * 10:
            torch.set_num_threads(n)
            again = run(x, impl="cpp")
            assert all(torch.equal(first[name], again[name]) for name in first)
    finally:
        torch.set_num_threads(threads)


def test_strided_expanded_and_offset_inputs() -> None:
    x = make_inputs(2, 66, 4, 16, 16, seed=2, initial_state=True)
    strided = ScanInputs(
        x.q.transpose(1, 3).contiguous().transpose(1, 3),
        torch.cat([x.k, x.k], -1)[..., 16:],
        x.v.mT.contiguous().mT,
        x.f.transpose(0, 2).contiguous().transpose(0, 2),
        x.W.mT.contiguous().mT,
        x.initial_state.transpose(0, 1).contiguous().transpose(0, 1),
        None,
        None,
        torch.ones(()).expand_as(x.dy),  # what y.sum().backward() sends
        x.dfinal_state,
    )
    dense = ScanInputs(
        x.q, x.k, x.v, x.f, x.W, x.initial_state, None, None, torch.ones_like(x.dy), x.dfinal_state
    )  # fmt: skip
    a, b = run(dense, impl="cpp"), run(strided, impl="cpp")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_inputs(1, 80, 3, 5, 7, seed=3, seqlens=[30, 0, 50], initial_state=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        assert torch.empty(3).isnan().all()
        got = run(x, impl="cpp")
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(t.isnan().any() for t in got.values())


def test_nan_in_one_sequence_stays_there() -> None:
    x = make_inputs(1, 40, 2, 16, 16, seed=5, seqlens=[20, 20])
    clean = run(x, impl="cpp")
    x.k[0, 25] = float("nan")
    dirty = run(x, impl="cpp")
    for name in ("y", "dv", "df", "dq", "dk"):
        assert torch.equal(clean[name][:, :20], dirty[name][:, :20])
    assert dirty["y"][:, 25:].isnan().all()


def test_saturation_and_extreme_gates_are_exact() -> None:
    x = make_inputs(1, 4, 1, 4, 4, seed=6)
    big = m2rnn(x.q, x.k * 1e30, x.v, torch.zeros_like(x.f), x.W, impl="cpp").final_state
    assert torch.equal(big.abs(), torch.ones_like(big))  # f = 0 and tanh saturated: ±1, no NaN
    state = torch.randn(1, 1, 4, 4)
    frozen = m2rnn(x.q, x.k, x.v, torch.ones_like(x.f), x.W, initial_state=state, impl="cpp").final_state
    assert torch.equal(frozen, state)  # f = 1 keeps the state to the bit


def test_state_does_not_drift_over_64k_steps() -> None:
    x = make_inputs(1, 65536, 1, 4, 4, seed=7)
    got, truth = m2rnn(x.q, x.k, x.v, x.f, x.W, impl="cpp"), x.to(torch.float64)
    want = m2rnn(truth.q, truth.k, truth.v, truth.f, truth.W, impl="cpp")
    eps = torch.finfo(torch.float32).eps
    # Gates with a time constant of 1,000 steps sum that many roundings, a random walk of 32 eps; times 4 for safety.
    assert (got.y - want.y).norm() / want.y.norm() < 128 * eps
    assert (got.y[:, -1024:] - want.y[:, -1024:]).norm() / want.y[:, -1024:].norm() < 128 * eps


def test_a_second_process_uses_the_cached_build(tmp_path: Any) -> None:
    code = "from m2rnn_compile.lowering import cpu; assert cpu.availability() is None; print('built')"
    env = {"M2RNN_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin:/usr/local/bin", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True)
    built = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.so")}
    assert len(built) == 1
    subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True)
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.so")} == built


def test_without_a_compiler_there_is_one_message_and_the_right_answer(tmp_path: Any) -> None:
    code = """
import warnings, torch
from m2rnn_compile import m2rnn, explain_impl
from m2rnn_compile.testing import make_inputs
x = make_inputs(1, 5, 2, 4, 4)
args = (x.q, x.k, x.v, x.f, x.W)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    a, b = m2rnn(*args).y, m2rnn(*args).y
assert len([w for w in caught if "C++" in str(w.message)]) == 1, caught
assert torch.equal(a, m2rnn(*args, impl="eager").y)
choice = explain_impl(*args)
assert choice.impl == "eager" and "compiler" in choice.rejected["cpp"], choice
try:
    m2rnn(*args, impl="cpp")
except ValueError as e:
    assert "compiler" in str(e)
else:
    raise AssertionError("impl='cpp' must raise")
"""
    env = {"M2RNN_CACHE_DIR": str(tmp_path), "PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_auto_chooses_it() -> None:
    x = make_inputs(1, 4, 1, 4, 4)
    assert explain_impl(x.q, x.k, x.v, x.f, x.W).impl == "cpp"


def test_the_rule_notices_a_lost_carry() -> None:
    """The suite can fail: zero checkpoints are what forgetting the carry between chunks looks like."""
    x = make_inputs(1, 130, 2, 16, 16, seed=8)
    args = (x.q, x.k, x.v, x.f, x.W, None, None)
    y, final, checkpoints = lowering.scan(*args, None, 64)
    grads = lowering.scan_backward(x.dy, x.dfinal_state, *args, checkpoints.zero_(), None, 64)
    got = {"y": y, "final_state": final, **dict(zip(("dq", "dk", "dv", "df", "dW"), grads, strict=False))}
    with pytest.raises(AssertionError, match="dq"):
        assert_accurate(got, oracle(x), run_low_precision(x), slices=2)


# Tensors that end (or begin) where a page begins (or ends) that must not be touched: one element too far is a crash.
EDGES = """
import ctypes, mmap, sys
import torch
from m2rnn_compile.lowering import cpu
from m2rnn_compile.testing import make_inputs

keep, at_end = [], sys.argv[1] == "end"

def at_the_edge(x):
    size = x.numel() * x.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    keep.append(memory)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    offset = pages * mmap.PAGESIZE - size if at_end else mmap.PAGESIZE
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape).copy_(x)
    forbidden = first + (pages * mmap.PAGESIZE if at_end else 0)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return copy

if sys.argv[2] == "too far":
    x = at_the_edge(torch.ones(5))
    ctypes.c_float.from_address(x.data_ptr() + (20 if at_end else -4)).value
for dtype in (torch.float32, torch.bfloat16):
    for K, V in ((33, 17), (32, 16), (1, 1), (5, 100)):
        for seqlens in (None, [65, 0, 2]):
            x = make_inputs(1, 67, 4, K, V, Nq=2, Nw=2, dtype=dtype, initial_state=True, seqlens=seqlens)
            q, k, v, f, W, h0, dy, dh = map(
                at_the_edge, (x.q, x.k, x.v, x.f, x.W, x.initial_state, x.dy, x.dfinal_state)
            )
            checkpoints = cpu.scan(q, k, v, f, W, h0, x.cu_seqlens, None, 64)[2]
            saved = at_the_edge(checkpoints)
            cpu.scan_backward(dy, dh, q, k, v, f, W, h0, x.cu_seqlens, saved, 1.0, 64)
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect is called as on Linux")
@pytest.mark.parametrize("edge", ["end", "begin"])
def test_nothing_beyond_the_tensors_is_read(edge: str) -> None:
    command = [sys.executable, "-c", EDGES, edge]
    done = subprocess.run([*command, "as it is"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "done" in done.stdout
    assert subprocess.run([*command, "too far"], capture_output=True).returncode == -signal.SIGSEGV  # it would be seen


def test_offsets_beyond_32_bits() -> None:
    """Two steps 2³¹ elements apart. The 4 GiB between them are asked for and never touched."""
    x = make_inputs(1, 2, 2, 5, 6, dtype=torch.bfloat16, seed=9)
    x = dataclasses.replace(x, f=x.f.bfloat16())
    far, memory, first = 2**31, torch.empty(2**31 + 4096, dtype=torch.bfloat16), 0
    apart = {}
    for name in ("q", "k", "v", "f", "dy"):
        t = getattr(x, name)
        apart[name] = memory.as_strided(t.shape, (t.stride(0), far, *t.stride()[2:]), first).copy_(t)
        first += t[:, 0].numel()
    got, want = run(dataclasses.replace(x, **apart), impl="cpp"), run(x, impl="cpp")
    assert all(torch.equal(got[name], want[name]) for name in want)
