# SPDX-License-Identifier: Apache-2.0
"""The fused decoding step on CUDA tensors: run by `make test-gpu`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from m2rnn_compile import M2RNN
from m2rnn_compile.testing import assert_accurate
from tests.ops.decoding import HEADS, Step, by_loops, make_step

pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
op = torch.ops.m2rnn.decode_step.default


def run(s: Step, impl: str = "auto") -> dict[str, Tensor]:
    s = s.changed()
    o = op(*s.arguments(), impl)
    return {"o": o, "conv_state": s.conv_state, "state": s.state}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


def on_cpu(result: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.cpu() for name, x in result.items()}


CASES: dict[str, dict[str, Any]] = {
    "paper 410M heads": dict(B=3, N=84, K=64, V=16, dtype=BF16, indices=[4, -1, 0]),
    "paper 7B heads, fp16": dict(B=2, N=132, K=64, V=16, dtype=FP16),
    "fp32": dict(B=2, N=6, K=64, V=16, dtype=FP32, indices=[1, 0]),
    "square state": dict(B=2, N=4, K=64, V=64, dtype=BF16),
    "square state, fp32": dict(B=2, N=4, K=64, V=64, dtype=FP32),
    "V 32": dict(B=2, N=4, K=64, V=32, dtype=BF16),
    "V 32, fp32": dict(B=2, N=4, K=64, V=32, dtype=FP32),
    "V 128": dict(B=2, N=2, K=64, V=128, dtype=BF16),
    "V 128, fp32": dict(B=2, N=2, K=40, V=128, dtype=FP32),
    "K 50, V 20": dict(B=2, N=4, K=50, V=20, dtype=BF16),
    "K 200": dict(B=2, N=2, K=200, V=16, dtype=BF16),
    "K 3, V 1": dict(B=2, N=2, K=3, V=1, dtype=BF16),
    "every input its own heads": dict(B=2, N=8, K=32, V=16, Nq=4, Nk=2, Nv=1, Nf=2, Ng=8, Nw=2, dtype=BF16),
    **{f"{name}, fp32": dict(case, dtype=FP32) for name, case in HEADS.items()},
}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.replace(" ", "-"))
def test_values(case: str) -> None:
    s = make_step(**CASES[case], seed=11)  # the oracle loops over heads in Python: on the CPU
    device = dataclasses.replace(s, **{n: x.cuda() for n, x in vars(s).items() if isinstance(x, Tensor)})
    assert_accurate(on_cpu(run(device)), by_loops(s.to(torch.float64)), by_loops(s, s.qkv.dtype))


CONFIGS = {  # rows and warps, by V; fp32 products of wide V would take minutes to compile for one warp
    (BF16, 16): [(16, 1), (32, 1), (64, 1), (64, 2), (64, 4)],
    (BF16, 64): [(16, 1), (32, 2), (32, 4), (64, 4)],
    (FP32, 16): [(16, 1), (32, 1), (64, 1), (64, 2)],
    (FP32, 64): [(16, 4), (16, 8), (32, 8)],
}


@pytest.mark.parametrize(("dtype", "V"), CONFIGS, ids=str)
def test_every_configuration_is_right_not_only_the_pinned_one(
    dtype: torch.dtype, V: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from m2rnn_compile.lowering.triton import decode as lowering

    s = make_step(2, 4, 64, V, dtype=dtype, seed=12)
    truth, eager = by_loops(s.to(torch.float64)), by_loops(s, dtype)
    device = dataclasses.replace(s, **{n: x.cuda() for n, x in vars(s).items() if isinstance(x, Tensor)})
    for config in CONFIGS[dtype, V]:
        monkeypatch.setattr(lowering, "decode_config", lambda *_, c=config: lowering.LaunchConfig(*c))
        assert_accurate(on_cpu(run(device)), truth, eager)


def test_auto_is_triton_and_eager_agrees_within_the_rule() -> None:
    s = make_step(3, 12, 64, 16, indices=[2, -1, 0], dtype=BF16, device="cuda")
    auto, triton, eager = run(s), run(s, "triton"), run(s, "eager")
    assert same_bits(auto, triton)
    truth = by_loops(s.to(torch.float64))
    for got in (auto, eager):
        assert_accurate(got, truth, by_loops(s, BF16))


def test_skipped_rows_and_slots_outside_of_the_pool_touch_nothing() -> None:
    s = make_step(6, 12, 64, 16, indices=[-1, 3, 7, 0, -2, -1], slots=6, dtype=BF16, device="cuda")
    got = run(s)
    assert not got["o"][[0, 5]].any()
    assert got["o"][[2, 4]].isnan().all()
    rest = [1, 2, 4, 5]
    for name in ("conv_state", "state"):
        assert torch.equal(got[name][rest], getattr(s, name)[rest])
    alone = run(dataclasses.replace(s, **{n: getattr(s, n)[[1, 3]] for n in ("qkv", "x_f", "g", "state_indices")}))
    assert torch.equal(got["o"][[1, 3]], alone["o"])
    assert all(torch.equal(got[n], alone[n]) for n in ("conv_state", "state"))


@pytest.mark.parametrize("B", [1, 64])
def test_fifty_runs_give_the_same_bits_with_a_busy_second_stream(B: int) -> None:
    """What a race between programs that share a window would change. Steps follow each other on the same pools."""
    s = make_step(B, 84, 64, 16, indices=list(range(B)), dtype=BF16, device="cuda")
    side, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")

    def steps() -> dict[str, Tensor]:
        own = s.changed()
        o = torch.stack([op(*own.arguments(), "auto") for _ in range(6)])  # more than the window is wide
        return {"o": o, "conv_state": own.conv_state, "state": own.state}

    first = steps()
    assert torch.equal(first["conv_state"][:B], s.qkv[:, None].expand(-1, 3, -1))
    for _ in range(50):
        with torch.cuda.stream(side):
            noise = (noise @ noise).clamp(-1, 1)
        assert same_bits(steps(), first)


def capture(fn: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fn()
    return graph, result


def test_cuda_graph_replays_with_other_rows_in_other_slots() -> None:
    s = make_step(4, 84, 64, 16, indices=[0, 1, 2, 3], slots=9, dtype=BF16, device="cuda")
    static = s.changed()
    graph, o = capture(lambda: op(*static.arguments(), "auto"))
    for name in ("conv_state", "state"):  # warm-up ran
        getattr(static, name).copy_(getattr(s, name))
    for seed, indices in enumerate(([8, 0, -1, 3], [0, 8, 3, -1], [-1] * 4, [5, 3, 0, 8])):
        new = make_step(4, 84, 64, 16, seed=seed, dtype=BF16, device="cuda")
        rows = {n: getattr(new, n) for n in ("qkv", "x_f", "g")}
        rows["state_indices"] = torch.tensor(indices, dtype=torch.int32, device="cuda")
        for n, x in rows.items():
            getattr(static, n).copy_(x)
        graph.replay()
        s = dataclasses.replace(s, **rows)
        assert torch.equal(o, op(*s.arguments(), "auto"))
        assert torch.equal(static.conv_state, s.conv_state)
        assert torch.equal(static.state, s.state)


def make_layer(dtype: torch.dtype) -> M2RNN:
    torch.manual_seed(0)
    layer = M2RNN(128, num_heads=12, device="cuda", dtype=dtype)
    with torch.no_grad():
        layer.input_projection.weight.mul_(5)
        layer.conv1d.weight.mul_(25)
    return layer


def test_layer_decodes_as_it_prefills_and_a_graph_of_the_layer_does_too() -> None:
    layer, x = make_layer(FP32), torch.randn(2, 12, 128, device="cuda")
    with torch.inference_mode():
        whole = layer(x)
        _, cache = layer(x[:, :5], cache=layer.init_cache(2))
        kept = [t.clone() for t in cache]
        pool = layer.init_cache(4)
        for t, new in zip(pool, cache, strict=True):
            t[[3, 1]] = new
        indices, token = torch.tensor([3, 1], device="cuda"), x[:, :1].clone()
        start = [t.clone() for t in pool]
        graph, y = capture(lambda: layer(token, cache=pool, state_indices=indices)[0])
        for t, b in zip(pool, start, strict=True):
            t.copy_(b)
        functional = cache
        close = dict(rtol=0, atol=1000 * 2**-23 * float(whole.abs().max()))  # some hundred roundings in another order
        for t in range(5, 12):
            y_t, functional = layer(x[:, t : t + 1], cache=functional)
            token.copy_(x[:, t : t + 1])
            graph.replay()
            torch.testing.assert_close(y_t[:, 0], whole[:, t], **close)
            torch.testing.assert_close(y[:, 0], whole[:, t], **close)
        assert all(map(torch.equal, cache, kept))  # functional: the cache passed in is as it was
        for p, f, before in zip(pool, functional, kept, strict=True):
            torch.testing.assert_close(p[[3, 1]], f, rtol=0, atol=1000 * 2**-23 * float(f.abs().max()))
            assert not torch.equal(f, before)
            assert not p[[0, 2]].any()


def launches(fn: Callable[[], Any]) -> list[str]:
    from torch.profiler import ProfilerActivity, profile

    fn()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        fn()
        torch.cuda.synchronize()
    on_device = [e.name for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in on_device if not name.lower().startswith(("activity buffer", "context sync"))]


def test_two_launches_between_the_projections() -> None:
    s = make_step(64, 84, 64, 16, indices=list(range(64)), dtype=BF16, device="cuda")
    seen = launches(lambda: op(*s.arguments(), "auto"))
    assert seen == ["decode_kernel", "decode_finish_kernel"], seen


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_layer_steps(mode: str) -> None:
    layer = make_layer(FP32)
    pool = layer.init_cache(4)
    for t in pool:
        torch._dynamo.mark_static_address(t)
    expected = type(pool)(*(t.clone() for t in pool))
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    with torch.no_grad():
        for _ in range(4):
            x, at = torch.randn(3, 1, 128, device="cuda"), torch.randperm(4, device="cuda")[:3]
            y = compiled(x, cache=pool, state_indices=at)[0].clone()
            y_eager = layer(x, cache=expected, state_indices=at)[0]
            torch.testing.assert_close(y, y_eager, rtol=0, atol=1000 * 2**-23 * float(y_eager.abs().max()))
    for a, b in zip(pool, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1000 * 2**-23 * float(b.abs().max()))


def test_opcheck() -> None:
    s = make_step(3, 12, 64, 16, indices=[2, -1, 0], dtype=BF16, device="cuda")
    opcheck(op, (*s.arguments(), "auto"))


def test_pools_beyond_32_bits() -> None:
    """The last slots of pools of more than 2^31 elements, and a view whose slots are 2^31 elements apart."""
    N, K, V = 84, 64, 16
    small = make_step(2, N, K, V, indices=[1, 0], slots=2, dtype=BF16, device="cuda")
    expected = run(small)
    slots = 2**31 // (N * K * V) + 2
    state = torch.zeros(slots, N, K, V, device="cuda")
    assert state.numel() > 2**31
    conv_state = torch.zeros(slots, *small.conv_state.shape[1:], device="cuda", dtype=BF16)
    state[-2:], conv_state[-2:] = small.state, small.conv_state
    at = small.state_indices + slots - 2
    big = dataclasses.replace(small, state=state, conv_state=conv_state, state_indices=at)
    assert torch.equal(op(*big.arguments(), "auto"), expected["o"])
    assert torch.equal(state[-2:], expected["state"])
    assert torch.equal(conv_state[-2:], expected["conv_state"])
    assert not state[:-2].any()
    del big, state, conv_state
    stride = 2**31 + 64
    memory = torch.zeros(stride + small.conv_state[0].numel(), device="cuda", dtype=BF16)
    view = memory.as_strided(small.conv_state.shape, (stride, small.conv_state.shape[2], 1))
    view.copy_(small.conv_state)
    assert torch.equal(op(*small.changed(conv_state=view).arguments(), "auto"), expected["o"])
    assert torch.equal(view, expected["conv_state"])


def test_what_cannot_run_says_why() -> None:
    s = make_step(2, 4, 6, 5, dtype=torch.float64, device="cuda")
    with pytest.raises(ValueError, match=r"float64.*impl='eager'"):
        run(s)
    run(s, "eager")
    with pytest.raises(ValueError, match="V = 130"):
        run(make_step(1, 1, 6, 130, device="cuda"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_tensors_on_a_device_other_than_the_current_one() -> None:
    here, there = (make_step(2, 12, 64, 16, dtype=BF16, device=d) for d in ("cuda:0", "cuda:1"))
    assert same_bits(on_cpu(run(here)), on_cpu(run(there)))
