# SPDX-License-Identifier: Apache-2.0
"""The op on CUDA tensors: run by `make test-gpu` on a machine that has one; its report goes to bench/results/."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from m2rnn_compile import explain_impl, m2rnn, m2rnn_step
from m2rnn_compile.testing import (
    ScanInputs,
    assert_accurate,
    low_precision_eager,
    make_inputs,
    oracle,
    run,
    run_low_precision,
)

pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def inputs(*shape: int, **options: Any) -> ScanInputs:
    return make_inputs(*shape, device="cuda", **options)


CASES: dict[str, dict[str, Any]] = {
    "paper 410M heads": dict(B=2, T=200, N=84, K=64, V=16, dtype=BF16, state_grad_clip=1.0),
    "paper 410M heads, fp16": dict(B=1, T=130, N=12, K=64, V=16, dtype=FP16, initial_state=True),
    "fp32": dict(B=2, T=150, N=6, K=64, V=16, dtype=FP32, initial_state=True),
    "few heads, long": dict(B=1, T=1500, N=3, K=64, V=16, dtype=BF16),
    "square state": dict(B=2, T=130, N=4, K=64, V=64, dtype=BF16, initial_state=True, state_grad_clip=1.0),
    "V 32": dict(B=2, T=100, N=4, K=64, V=32, dtype=BF16),
    "V 128": dict(B=1, T=70, N=2, K=64, V=128, dtype=BF16),
    "V 20, K 50": dict(B=2, T=70, N=4, K=50, V=20, dtype=BF16, initial_state=True),
    "more scans than programs": dict(B=5, T=100, N=132, K=64, V=16, dtype=BF16, state_grad_clip=1.0),
    "K 200": dict(B=1, T=70, N=2, K=200, V=16, dtype=BF16),
    "K 3, V 1": dict(B=2, T=30, N=2, K=3, V=1, dtype=BF16),
    "every input its own heads": dict(B=2, T=70, N=8, K=32, V=16, Nq=4, Nk=2, Nv=8, Nf=1, Nw=2, dtype=BF16),
    "clip that bites": dict(B=2, T=150, N=4, K=64, V=16, dtype=BF16, state_grad_clip=0.1, initial_state=True),
    "clip zero": dict(B=2, T=70, N=4, K=64, V=16, dtype=BF16, state_grad_clip=0.0),
    "packed": dict(B=1, T=300, N=6, K=64, V=16, dtype=BF16, seqlens=[65, 0, 100, 1, 134], initial_state=True),
    "packed, empty at both ends": dict(B=1, T=130, N=6, K=64, V=16, dtype=BF16, seqlens=[0, 130, 0]),
    "packed, square state": dict(B=1, T=130, N=4, K=64, V=64, dtype=BF16, seqlens=[66, 64], state_grad_clip=1.0),
    "square state, fp16": dict(B=1, T=130, N=4, K=64, V=64, dtype=FP16, initial_state=True),
    "square state, its own heads": dict(B=2, T=70, N=8, K=32, V=64, Nq=4, Nk=2, Nv=8, Nf=1, Nw=2, dtype=BF16),
    "square state, clip that bites": dict(B=2, T=150, N=4, K=64, V=64, dtype=BF16, state_grad_clip=0.1),
    "square state, ragged": dict(
        B=1, T=300, N=4, K=64, V=64, dtype=BF16, seqlens=[65, 0, 100, 1, 134], initial_state=True
    ),
    "V 48": dict(B=2, T=100, N=4, K=64, V=48, dtype=BF16, initial_state=True),
    "K 160, V 64": dict(B=1, T=100, N=4, K=160, V=64, dtype=BF16, initial_state=True),
}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.replace(" ", "-"))
def test_values_and_gradients(case: str) -> None:
    x = inputs(**CASES[case], seed=11)
    assert_accurate(run(x, impl="triton"), oracle(x, impl="eager"), run_low_precision(x))


@pytest.mark.parametrize("V", [16, 64])
@pytest.mark.parametrize("T", [0, 1, 2, 3, 4, 5, 63, 64, 65, 127, 129])
def test_lengths_around_chunks_and_groups(T: int, V: int) -> None:
    x = inputs(2, T, 4, 64, V, dtype=BF16, seed=T, initial_state=True)
    assert_accurate(run(x, impl="triton"), oracle(x, impl="eager"), run_low_precision(x))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_gradients_of_a_step_at_the_papers_sizes(dtype: torch.dtype) -> None:
    """5,376 scans of one step: thousands of programs write their scratch at once, and bits repeat."""
    x = inputs(64, 1, 84, 64, 16, dtype=dtype, initial_state=True)

    def step(q: Tensor, k: Tensor, v: Tensor, f: Tensor, W: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        y, state = m2rnn_step(q[:, 0], k[:, 0], v[:, 0], f[:, 0], W, initial_state=options["initial_state"])
        return y.unsqueeze(1), state

    got = run(x, step)
    assert_accurate(got, oracle(x, impl="eager"), run_low_precision(x))
    for _ in range(20):
        again = run(x, step)
        assert all(torch.equal(got[name], again[name]) for name in got)


def test_no_steps_at_the_papers_sizes() -> None:
    """Scans are shared out among programs here, and there is nothing to share."""
    x = inputs(8, 0, 84, 64, 16, dtype=BF16, initial_state=True)
    got = run(x, impl="triton")
    assert got["y"].shape == (8, 0, 84, 16)
    assert torch.equal(got["final_state"], x.initial_state)
    assert torch.equal(got["dinitial_state"], x.dfinal_state)
    assert not got["dW"].any()


@pytest.mark.parametrize("V", [16, 64, 128])
@pytest.mark.parametrize("only", ["y", "final_state"])
def test_a_gradient_of_one_output_only(only: str, V: int) -> None:
    x = inputs(2, 130, 4, 64, V, dtype=BF16, initial_state=True)

    def one(q: Tensor, k: Tensor, v: Tensor, f: Tensor, W: Tensor, *, scan: Any, **options: Any) -> Any:
        y, state = scan(q, k, v, f, W, **options)
        return (y, state.detach()) if only == "y" else (y.detach(), state)

    by = lambda scan: lambda *a, **k: one(*a, scan=scan, **k)
    eager_impl = lambda *a, **k: m2rnn(*a, impl="eager", **k)
    truth = run(x.to(torch.float64), by(eager_impl))
    assert_accurate(run(x, by(m2rnn)), truth, run(x, by(low_precision_eager)))


@pytest.mark.parametrize("V", [16, 64])
def test_the_state_does_not_drift_over_64k_steps(V: int) -> None:
    """bf16 inputs, the hardware's tanh, 16-bit checkpoints; gates with time constants of up to a thousand steps."""
    x = inputs(1, 65_536, 4, 64, V, dtype=BF16, dfinal_state=False)
    a = (x.q, x.k, x.v, x.f, x.W)
    with torch.no_grad():
        got, eager = m2rnn(*a, impl="triton"), low_precision_eager(*a)
        truth = m2rnn(*(t.double() for t in a), impl="eager")
    named = [dict(y=r[0], final_state=r[1]) for r in (got, truth, eager)]
    assert_accurate(*named, slices=32)


@pytest.mark.parametrize(("dtype", "V"), [(BF16, 16), (BF16, 64), (FP32, 16), (BF16, 128)], ids=str)
@pytest.mark.parametrize("chunk", [4, 16, 32, 64, 128, 256])
def test_chunks(chunk: int, dtype: torch.dtype, V: int) -> None:
    """The op's own argument: 64 steps between checkpoints is the Gluon kernels', others are the portable ones'."""
    x = inputs(2, 150, 4, 64, V, dtype=dtype, initial_state=True, state_grad_clip=0.5)
    truth, eager = oracle(x, impl="eager"), run_low_precision(x)
    op = lambda q, k, v, f, W, *, initial_state, cu_seqlens, state_grad_clip: torch.ops.m2rnn.scan(
        q, k, v, f, W, initial_state, cu_seqlens, state_grad_clip, chunk, "triton"
    )[:2]
    assert_accurate(run(x, op), truth, eager)


CONFIGS = [  # rows, warps, registers; and V
    ((16, 1, None), 16), ((32, 1, None), 16), ((32, 1, 168), 16), ((64, 1, None), 16),
    ((32, 2, None), 16), ((64, 2, None), 16), ((64, 4, None), 16),
    ((16, 1, None), 32), ((32, 1, None), 32), ((64, 4, None), 64),
]  # fmt: skip


@pytest.mark.parametrize(("config", "V"), CONFIGS, ids=str)
def test_every_configuration_is_right_not_only_the_pinned_one(
    config: tuple[int, int, int | None], V: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from m2rnn_compile.lowering import triton as lowering

    for name in ("forward_config", "backward_config"):
        monkeypatch.setattr(lowering, name, lambda *_: lowering.LaunchConfig(*config))
    x = inputs(2, 101, 4, 64, V, dtype=BF16, initial_state=True, state_grad_clip=0.5)
    assert_accurate(run(x, impl="triton"), oracle(x, impl="eager"), run_low_precision(x))


def scan_and_backward(x: ScanInputs, **options: Any) -> tuple[Tensor, ...]:
    from m2rnn_compile.lowering import triton as lowering

    a = (x.q, x.k, x.v, x.f, x.W, x.initial_state, x.cu_seqlens)
    c = x.state_grad_clip
    checkpoints = lowering.scan(*a, c, 64)[2]
    return lowering.scan_backward(x.dy, x.dfinal_state, *a, checkpoints, c, 64, **options)


@pytest.mark.parametrize(("dtype", "V"), [(BF16, 16), (FP32, 16), (BF16, 64)])
def test_windows_of_time_do_not_change_a_bit(dtype: torch.dtype, V: int) -> None:
    x = inputs(2, 300, 4, 64, V, dtype=dtype, initial_state=True)
    whole, parts = scan_and_backward(x, window_bytes=2**40), scan_and_backward(x, window_bytes=1)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("window_bytes", [1, 2**18])
@pytest.mark.parametrize(("dtype", "V"), [(BF16, 16), (FP32, 16), (BF16, 64), (FP32, 64)])
def test_windows_of_packed_sequences_do_not_change_a_bit(dtype: torch.dtype, V: int, window_bytes: int) -> None:
    """One chunk of one sequence at a time, or several of all of them."""
    x = inputs(1, 620, 4, 64, V, dtype=dtype, seqlens=[65, 0, 100, 1, 134, 320], initial_state=True)
    whole, parts = scan_and_backward(x, window_bytes=2**40), scan_and_backward(x, window_bytes=window_bytes)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_a_cuda_graph_of_packed_windows_follows_the_lengths_it_is_given() -> None:
    """The plan of the windows is made on the device: a replay with other lengths walks other sequences."""
    x, other = (
        inputs(1, 300, 4, 64, 16, dtype=BF16, seqlens=lengths, initial_state=True)
        for lengths in ([65, 0, 100, 135], [10, 200, 0, 90])
    )
    want = scan_and_backward(dataclasses.replace(x, cu_seqlens=other.cu_seqlens), window_bytes=1)
    scan_and_backward(x, window_bytes=1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = scan_and_backward(x, window_bytes=1)
    x.cu_seqlens.copy_(other.cu_seqlens)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


@pytest.mark.parametrize("programs", [1, 3, 7, 8, 13])
@pytest.mark.parametrize("T", [31, 250])
def test_scans_shared_out_among_programs_give_the_bits_of_undivided_ones(
    programs: int, T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """13 scans or more to each number of programs: scans begin in one program and are finished by another."""
    from m2rnn_compile.lowering import triton as lowering

    x = inputs(2, T, 7, 64, 16, dtype=BF16, initial_state=True, state_grad_clip=0.5)

    def everything(programs: int | None) -> tuple[Tensor, ...]:
        monkeypatch.setattr(lowering, "shared_programs", lambda *_: programs)
        a = (x.q, x.k, x.v, x.f, x.W, x.initial_state, None)
        return (*lowering.scan(*a, 0.5, 0)[:2], *scan_and_backward(x), *scan_and_backward(x, window_bytes=1))

    for shared, undivided in zip(everything(programs), everything(None), strict=True):
        assert torch.equal(shared, undivided)


@pytest.mark.parametrize("V", [16, 64])
def test_the_portable_backward_reads_what_the_gluon_forward_left(V: int) -> None:
    x = inputs(2, 150, 4, 64, V, dtype=BF16, initial_state=True)
    names = ("dq", "dk", "dv", "df", "dW", "dinitial_state")
    truth, eager = ({n: r[n] for n in names} for r in (oracle(x, impl="eager"), run_low_precision(x)))
    assert_accurate(dict(zip(names, scan_and_backward(x, gluon=False), strict=True)), truth, eager)


@pytest.mark.parametrize("case", ["paper 410M heads", "square state", "packed"])
def test_fifty_runs_give_the_same_bits_with_a_busy_second_stream(case: str) -> None:
    x = inputs(**CASES[case])
    first = run(x, impl="triton")
    side, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for _ in range(50):
        with torch.cuda.stream(side):
            noise = (noise @ noise).clamp(-1, 1)
        again = run(x, impl="triton")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("V", [16, 64])
def test_cuda_graph_replays_with_new_inputs(V: int) -> None:
    x, new = inputs(2, 70, 4, 64, V, dtype=BF16, seed=1), inputs(2, 70, 4, 64, V, dtype=BF16, seed=2)
    static = [getattr(x, n).clone().requires_grad_() for n in ("q", "k", "v", "f", "W")]

    def step() -> tuple[Tensor, ...]:
        y, _ = m2rnn(*static)
        return y, *torch.autograd.grad(y, static, x.dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t, n in zip(static, ("q", "k", "v", "f", "W"), strict=True):
            t.copy_(getattr(new, n))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_side_stream() -> None:
    x = inputs(2, 70, 4, 64, 16, dtype=BF16)
    here = m2rnn(x.q, x.k, x.v, x.f, x.W).y
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        there = m2rnn(x.q, x.k, x.v, x.f, x.W).y
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(here, there)


def test_offsets_beyond_32_bits() -> None:
    """q of 2^32 + elements through its strides, and T·N·V of y beyond 2^31: the last steps must be right."""
    T, N, K, V = 70_000, 2048, 16, 16
    v = torch.zeros(1, T, N, V, device="cuda", dtype=BF16)
    assert v.numel() > 2**31
    tail = make_inputs(1, 64, N, K, V, device="cuda", dtype=BF16, dfinal_state=False)
    q, k = (torch.zeros(1, T, 1, K, device="cuda", dtype=BF16) for _ in range(2))
    f = torch.ones(1, T, N, device="cuda")  # f = 1 freezes the state until the tail begins
    for whole, part in ((q, tail.q), (k, tail.k), (v, tail.v), (f, tail.f)):
        whole[:, -64:] = part
    y, final = m2rnn(q, k, v, f, tail.W)
    y_tail, final_tail = m2rnn(tail.q, tail.k, tail.v, tail.f, tail.W)
    assert torch.equal(y[:, -64:], y_tail)
    assert torch.equal(final, final_tail)
    assert not y[:, :-64].any()


def test_time_stride_beyond_32_bits() -> None:
    x = inputs(1, 40, 2, 64, 16, dtype=BF16)
    stride = 2**31 // 39 + 1
    q = torch.empty(39 * stride + 64, device="cuda", dtype=BF16).as_strided(x.q.shape, (1, stride, 64, 1))
    q.copy_(x.q)
    assert q.stride(1) * 39 > 2**31
    assert torch.equal(m2rnn(q, x.k, x.v, x.f, x.W).y, m2rnn(x.q, x.k, x.v, x.f, x.W).y)


def test_strided_inputs_equal_dense_ones() -> None:
    x = inputs(2, 70, 4, 64, 16, dtype=BF16)
    fused = torch.cat([x.q, x.k, x.v.flatten(2).unflatten(2, (1, 64))], -1)  # one projection, split into views
    q, k = fused[..., :64], fused[..., 64:128]
    v = fused[..., 128:].unflatten(-1, (4, 16)).squeeze(2)
    dense = m2rnn(x.q, x.k, x.v, x.f, x.W).y
    assert torch.equal(m2rnn(q, k, v, x.f, x.W).y, dense)
    odd = torch.cat([x.q.new_zeros(2, 70, 1, 1), x.q], -1)[..., 1:]  # misaligned for any vector load
    assert torch.equal(m2rnn(odd, x.k, x.v, x.f, x.W).y, dense)
    y = m2rnn(x.q, x.k, x.v.requires_grad_(), x.f, x.W).y
    y.sum().backward()  # dy of stride 0


@pytest.mark.parametrize("V", [16, 64])
def test_nan_in_one_sequence_stays_there(V: int) -> None:
    x = inputs(2, 70, 4, 64, V, dtype=BF16)
    clean = run(x, impl="triton")
    x.k[1, 10] = float("nan")
    dirty = run(x, impl="triton")
    for name in ("y", "dv", "df"):
        assert torch.equal(clean[name][0], dirty[name][0])
    assert dirty["y"][1, 10:].isnan().all()


def test_tf32_switches_do_not_change_fp32_results() -> None:
    x = inputs(2, 70, 4, 64, 16)
    before = run(x, impl="triton")
    old = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        after = run(x, impl="triton")
    finally:
        torch.set_float32_matmul_precision(old)
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_step_equals_scan_and_autocast_keeps_the_gate_in_fp32() -> None:
    x = inputs(3, 5, 4, 64, 16, dtype=BF16)
    y, final = m2rnn(x.q, x.k, x.v, x.f, x.W)
    state = None
    for t in range(5):
        y_t, state = m2rnn_step(x.q[:, t], x.k[:, t], x.v[:, t], x.f[:, t], x.W, initial_state=state)
        assert torch.equal(y_t, y[:, t])
    assert torch.equal(state, final)
    wide = x.to(FP32)
    with torch.autocast("cuda", BF16):
        auto = m2rnn(wide.q, wide.k, wide.v, wide.f, wide.W)
    assert torch.equal(auto.y, y)


def test_compiled_equals_eager_with_dynamic_length() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("inductor")
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: m2rnn(*a).y.float().sin(), backend=counter, fullgraph=True)
    for T in (70, 71, 96, 128, 130, 150):
        x = inputs(2, T, 4, 64, 16, dtype=BF16)
        args = (x.q, x.k, x.v, x.f, x.W)
        torch.testing.assert_close(compiled(*args), m2rnn(*args).y.float().sin(), rtol=1e-6, atol=1e-6)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_compile_modes_train(mode: str) -> None:
    x = inputs(2, 70, 4, 64, 16, dtype=BF16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: m2rnn(*a).y * 2, mode=mode, fullgraph=True)
    for seed in range(4):
        x = inputs(2, 70, 4, 64, 16, dtype=BF16, seed=seed)
        args = [getattr(x, n).clone().requires_grad_() for n in ("q", "k", "v", "f", "W")]
        got = torch.autograd.grad(compiled(*args), args, x.dy)
        want = torch.autograd.grad(m2rnn(*args).y * 2, args, x.dy)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_opcheck() -> None:
    x = inputs(2, 70, 4, 64, 16, dtype=BF16, initial_state=True)
    args = [t.clone().requires_grad_() for t in x.named_inputs().values()]
    opcheck(torch.ops.m2rnn.scan.default, (*args, None, 1.0, 64, "auto"))
    out = torch.ops.m2rnn.scan(*args, None, 1.0, 64, "auto")
    dense = [t.detach() for t in args]
    opcheck(torch.ops.m2rnn.scan_backward.default, (x.dy, None, *dense, None, out[2].detach(), 1.0, 64, "auto"))


def test_what_cannot_run_says_why() -> None:
    x = inputs(1, 4, 1, 16, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"float64.*impl='eager'"):
        m2rnn(x.q, x.k, x.v, x.f, x.W)
    with pytest.raises(ValueError, match="cpp"):
        m2rnn(x.q, x.k, x.v, x.f, x.W, impl="cpp")
    y = inputs(1, 4, 1, 16, 16)
    assert explain_impl(y.q, y.k, y.v, y.f, y.W).impl == "triton"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_tensors_on_a_device_other_than_the_current_one() -> None:
    x = inputs(2, 70, 4, 64, 16, dtype=BF16)
    here, there = m2rnn(x.q, x.k, x.v, x.f, x.W), x.to(device="cuda:1")
    other = m2rnn(there.q, there.k, there.v, there.f, there.W)
    assert torch.equal(here.y, other.y.to("cuda:0"))


def test_out_of_memory_in_backward_leaves_a_usable_process() -> None:
    x = inputs(8, 2048, 16, 64, 16, dtype=BF16)  # backward needs more than what the allocator keeps at hand
    want = run(x, impl="triton")
    args = [getattr(x, n).clone().requires_grad_() for n in ("q", "k", "v", "f", "W")]
    y = m2rnn(*args).y
    _, total = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**20) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            y.backward(x.dy)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    del y
    got = run(x, impl="triton")
    assert all(torch.equal(want[n], got[n]) for n in want)
