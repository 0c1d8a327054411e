# SPDX-License-Identifier: Apache-2.0
"""The fused decoding step: against the equations, against the layer, in place on pools, and what it refuses."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from m2rnn_compile import M2RNN, m2rnn_decode_step
from m2rnn_compile.layers import write_rows
from m2rnn_compile.testing import assert_accurate
from tests.layers.equations import assert_same
from tests.ops.decoding import HEADS, Step, by_loops, make_step

D = 24
op = torch.ops.m2rnn.decode_step.default


def run(s: Step, impl: str = "auto") -> dict[str, Tensor]:
    """Through the public function, on pools of its own."""
    s = s.changed()
    *tensors, state_indices, num_q_heads, num_k_heads, norm_eps = s.arguments()
    o = m2rnn_decode_step(
        *tensors, state_indices=state_indices, num_q_heads=num_q_heads, num_k_heads=num_k_heads, norm_eps=norm_eps,
        impl=impl,
    )  # fmt: skip
    return {"o": o, "conv_state": s.conv_state, "state": s.state}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("case", HEADS, ids=lambda c: c.replace(" ", "-"))
def test_equals_the_equations_in_fp64(case: str) -> None:
    s = make_step(**HEADS[case], dtype=torch.float64)
    assert_same(run(s), by_loops(s))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy_rule(dtype: torch.dtype) -> None:
    s = make_step(6, 4, 20, 6, Nv=2, indices=[5, -1, 0, 3, 2, 7], dtype=dtype)
    got = run(s)
    assert got["o"].dtype == dtype
    assert got["state"].dtype == torch.float32
    assert_accurate(got, by_loops(s.to(torch.float64)), by_loops(s, dtype))


def make_layer(dtype: torch.dtype = torch.float64, **options: Any) -> M2RNN:
    layer = M2RNN(D, **(dict(num_heads=4, key_dim=6, value_dim=5) | options), dtype=dtype)
    with torch.no_grad():  # large enough for the state to matter
        layer.input_projection.weight.mul_(12)
        layer.conv1d.weight.mul_(25)
        layer.state_weight.add_(0.2 * torch.randn_like(layer.state_weight))
    return layer


def noisy_pool(layer: M2RNN, slots: int) -> Any:
    pool = layer.init_cache(slots)
    return type(pool)(torch.randn_like(pool.conv_state), torch.randn_like(pool.state))


@pytest.mark.parametrize("options", [{}, dict(num_q_heads=2, num_v_heads=2, num_g_heads=1, conv_size=2)], ids=str)
def test_continuous_batching_equals_each_request_alone(options: dict[str, Any]) -> None:
    """Requests of their own lengths enter, leave and share a batch; each must be what one forward makes of it."""
    layer = make_layer(**options)
    requests = {slot: torch.randn(1, T, D).double() for slot, T in ((3, 9), (0, 5), (4, 7))}
    prefilled = {3: 4, 0: 1, 4: 0}  # steps run as a prefill, before the request enters its slot
    with torch.no_grad():
        pool = noisy_pool(layer, 6)  # what earlier requests left behind
        untouched = [pool.conv_state[[1, 2, 5]].clone(), pool.state[[1, 2, 5]].clone()]
        got = {slot: [] for slot in requests}
        for slot, steps in prefilled.items():
            y, cache = layer(requests[slot][:, :steps], cache=layer.init_cache(1))
            write_rows(pool, torch.tensor([slot]), cache)
            got[slot].append(y)
        done = dict(prefilled)
        while any(done[slot] < x.shape[1] for slot, x in requests.items()):
            batch = [slot if done[slot] < x.shape[1] else -1 for slot, x in requests.items()]
            x = torch.cat(
                [
                    torch.full((1, 1, D), float("nan")).double() if slot == -1 else requests[slot][:, done[slot], None]
                    for slot in batch
                ]
            )
            y, returned = layer(x, cache=pool, state_indices=torch.tensor(batch))
            assert returned is pool
            for b, slot in enumerate(batch):
                if slot == -1:
                    assert not y[b].any()
                else:
                    got[slot].append(y[b, None])
                    done[slot] += 1
        for slot, x in requests.items():
            assert_same(torch.cat(got[slot], 1), layer(x))
        assert torch.equal(pool.conv_state[[1, 2, 5]], untouched[0])
        assert torch.equal(pool.state[[1, 2, 5]], untouched[1])


def test_a_step_in_place_equals_the_functional_step() -> None:
    layer, x = make_layer(), torch.randn(3, 1, D).double()
    pool = noisy_pool(layer, 3)
    with torch.no_grad():
        y, cache = layer(x, cache=pool)
        y_pool, _ = layer(x, cache=pool, state_indices=torch.arange(3))
    assert_same({"y": y_pool, **pool._asdict()}, {"y": y, **cache._asdict()})


def test_without_indices_row_b_uses_slot_b() -> None:
    s = make_step(3, 4, 6, 5)
    assert same_bits(run(s), run(dataclasses.replace(s, state_indices=torch.arange(3))))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_skipped_rows_are_zero_and_touch_no_slot(dtype: torch.dtype) -> None:
    s = make_step(5, 4, 6, 5, indices=[-1, 3, -1, 0, -1], slots=5)
    s = dataclasses.replace(s, state_indices=s.state_indices.to(dtype))
    s.qkv[[0, 2, 4]] = float("nan")
    s.conv_state[2, 0, 0] = float("nan")  # bits of any kind stay as they are
    got = run(s)
    assert not got["o"][[0, 2, 4]].any()
    for name in ("conv_state", "state"):
        before, after = getattr(s, name), got[name]
        rest = [1, 2, 4]
        assert torch.equal(after[rest].view(torch.int32), before[rest].view(torch.int32)), name
        assert not (after[[3, 0]] == before[[3, 0]]).all(), name
    alone = run(dataclasses.replace(s, **{n: getattr(s, n)[[1, 3]] for n in ("qkv", "x_f", "g", "state_indices")}))
    assert_same(got["o"][[1, 3]], alone["o"])


def test_nan_in_one_slot_stays_there() -> None:
    s = make_step(3, 4, 6, 5, indices=[2, 0, 1])
    clean = run(s)
    s.state[0, 1, 2, 3] = float("nan")
    dirty = run(s)
    assert torch.equal(clean["o"][[0, 2]], dirty["o"][[0, 2]])
    assert dirty["o"][1].isnan().any()
    assert torch.equal(clean["state"][1:], dirty["state"][1:])


def test_no_rows() -> None:
    s = make_step(0, 4, 6, 5, slots=0)
    assert run(s)["o"].shape == (0, 20)


def test_views_of_the_projection_and_of_larger_pools() -> None:
    """x of any strides, and one layer's slots out of a pool of [slots, layers, ...]."""
    s = make_step(3, 4, 6, 5, indices=[1, -1, 2], slots=4)
    assert s.qkv.stride(0) > s.qkv.shape[1]
    dense = {n: getattr(s, n).contiguous() for n in ("qkv", "x_f", "g")}
    transposed = {n: getattr(s, n).mT.contiguous().mT for n in ("qkv", "x_f", "g")}
    expected = run(s)
    for inputs in (dense, transposed):
        assert same_bits(run(dataclasses.replace(s, **inputs)), expected)
    pools = {n: torch.stack([getattr(s, n)] * 3, 1) for n in ("conv_state", "state")}
    others = {n: x[:, [0, 2]].clone() for n, x in pools.items()}
    views = {n: x[:, 1] for n, x in pools.items()}
    o = op(*dataclasses.replace(s, **views).arguments(), "eager")
    assert same_bits({"o": o, **views}, expected)
    assert all(torch.equal(pools[n][:, [0, 2]], others[n]) for n in pools)


@pytest.mark.parametrize("indices", [None, [1, -1, -1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(indices: list[int] | None, dtype: torch.dtype) -> None:
    """The schema says which arguments are written, the fake agrees with the result, functionalization keeps both."""
    s = make_step(3, 4, 6, 5, Nv=2, indices=indices, dtype=dtype)
    opcheck(op, (*s.arguments(), "eager"))
    written = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == ["conv_state", "state"]
    assert op._schema.is_mutable


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_steps_write_the_pool_in_one_graph(backend: str) -> None:
    layer = make_layer(torch.float32)
    pool, counter = noisy_pool(layer, 5), CompileCounterWithBackend(backend)
    expected = type(pool)(*(x.clone() for x in pool))
    addresses = [x.data_ptr() for x in pool]
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.no_grad():
        for indices in ([4, -1, 0], [0, 2, 4], [-1, -1, -1]):
            x, at = torch.randn(3, 1, D), torch.tensor(indices)
            y, _ = compiled(x, cache=pool, state_indices=at)
            assert_same(y, layer(x, cache=expected, state_indices=at)[0])
            assert_same(pool._asdict(), expected._asdict())
    assert [x.data_ptr() for x in pool] == addresses
    assert counter.frame_count == 1


def test_compiling_copies_no_pool() -> None:
    """A mutated argument can be compiled as copy, write, copy back: that would cost more than the step itself."""
    layer = make_layer(torch.float32)
    pool, arguments = layer.init_cache(5), dict(state_indices=torch.tensor([0, 1, -1]))
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True)
        _, (code, *others) = run_and_get_code(compiled, torch.randn(3, 1, D), cache=pool, **arguments)
    assert not others
    calls = code[code.index("def call(") : code.index("def get_args(")]
    assert calls.count("m2rnn.decode_step.default(") == 1
    assert "(5, 3, 32)" in calls
    for allocation in re.findall(r"empty\w*\(.*", calls):
        assert "(5, 3, 32)" not in allocation
        assert "(5, 4, 6, 5)" not in allocation
    assert "copy_" not in calls


def test_steps_of_changing_batch_size_compile_at_most_twice() -> None:
    layer, counter = make_layer(torch.float32), CompileCounterWithBackend("aot_eager")
    compiled, pool = torch.compile(layer, fullgraph=True, backend=counter), noisy_pool(layer, 9)
    with torch.inference_mode():
        for B in (4, 3, 7, 2, 9):
            compiled(torch.randn(B, 1, D), cache=pool, state_indices=torch.arange(B))
    assert counter.frame_count <= 2


def test_a_gradient_is_refused_and_a_frozen_layer_is_not() -> None:
    layer, x = make_layer(), torch.randn(2, 1, D).double()
    pool = noisy_pool(layer, 2)
    before = [t.clone() for t in pool]
    with pytest.raises(ValueError, match=r"no backward.*no_grad.*m2rnn_step"):
        layer(x, cache=pool, state_indices=torch.arange(2))
    assert all(map(torch.equal, pool, before))
    layer.requires_grad_(False)
    layer(x, cache=pool, state_indices=torch.arange(2))
    assert not any(map(torch.equal, pool, before))


def test_the_functional_step_stays_differentiable() -> None:
    layer, x = make_layer(), torch.randn(2, 1, D).double().requires_grad_()
    cache = layer.init_cache(2)
    layer(x, cache=cache)[0].sum().backward()
    assert x.grad.any()
    assert not cache.state.any()


def test_a_backward_does_not_use_a_pool_that_was_written_since() -> None:
    s = make_step(2, 4, 6, 5, dtype=torch.float64)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = (weight * s.state).sum() + (weight * s.conv_state).sum()  # both saved
    for pool in (s.conv_state, s.state):
        version = pool._version
        op(*s.arguments(), "eager")
        assert pool._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_flops_are_those_of_the_step() -> None:
    s = make_step(3, 4, 6, 5, indices=[1, 0, 4])
    with FlopCounterMode(display=False) as counter:
        run(s)
    assert counter.get_total_flops() == 2 * 3 * 4 * (6 * 5 * 5 + 2 * 6 * 5)


def test_transforms_are_refused() -> None:
    s = make_step(2, 4, 6, 5)
    with pytest.raises(NotImplementedError, match=r"torch\.vmap"):
        torch.vmap(lambda g: run(dataclasses.replace(s, g=g))["o"])(torch.stack([s.g, s.g]))


ERRORS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "not a tensor": (TypeError, "`x_f` must be a torch.Tensor, got float", dict(x_f=1.0)),
    "time dimension": (ValueError, r"`qkv` must have 2 dimensions \[B, C\]", dict(qkv=torch.zeros(3, 1, 32))),
    "channels": (ValueError, "leaves 19 channels for v", dict(qkv=torch.zeros(3, 31))),
    "head count": (ValueError, r"head count of f \(3\) must divide N = 4", dict(x_f=torch.zeros(3, 3))),
    "no q heads": (ValueError, r"head count of q \(0\) must divide", dict(num_q_heads=0, num_k_heads=2)),
    "gate width": (ValueError, r"`g` must have shape \[B, Ng·V\] with V = 5", dict(g=torch.zeros(3, 19))),
    "batch of x_f": (ValueError, "`x_f` must have shape", dict(x_f=torch.zeros(2, 4))),
    "window": (ValueError, "`conv_state` must have shape", dict(conv_state=torch.zeros(5, 4, 32))),
    "taps": (ValueError, "at least one tap", dict(conv_weight=torch.zeros(32, 1, 0))),
    "norm weight": (
        ValueError,
        r"`norm_weight` must have shape \[N·V\] with N·V = 20",
        dict(norm_weight=torch.ones(4)),
    ),
    "state dtype": (TypeError, r"`state` must be torch.float32.*allocate", dict(state=torch.zeros(5, 4, 6, 5).half())),
    "integers": (TypeError, "`qkv` must be float32", dict(qkv=torch.zeros(3, 32, dtype=torch.int32))),
    "index dtype": (TypeError, "`state_indices` must be int32 or int64", dict(state_indices=torch.ones(3))),
    "index shape": (ValueError, r"`state_indices` must have shape \[B\]", dict(state_indices=torch.arange(2))),
    "no indices": (ValueError, r"must have B = 3 slots, got 5; pass state_indices", dict(state_indices=None)),
    "expanded": (ValueError, "must not be an expanded", dict(state=torch.zeros(1, 4, 6, 5).expand(5, -1, -1, -1))),
    "device": (ValueError, "`W` on meta", dict(W=torch.zeros(4, 5, 5, device="meta"))),
    "layout": (TypeError, "`D` must be dense", dict(D=torch.zeros(4, 5).to_sparse())),
    "slot too large": (ValueError, "slots of the pool, 0 to 4, .*got 5", dict(state_indices=torch.tensor([5, 0, 1]))),
    "slot -2": (ValueError, "or -1 to skip a row, got -2", dict(state_indices=torch.tensor([0, -2, 1]))),
    "slot twice": (ValueError, "at most once", dict(state_indices=torch.tensor([2, -1, 2]))),
}


@pytest.mark.parametrize("case", ERRORS, ids=lambda c: c.replace(" ", "-"))
def test_errors_name_the_argument_and_leave_the_pools(case: str) -> None:
    error, message, wrong = ERRORS[case]
    s = dataclasses.replace(make_step(3, 4, 6, 5, indices=[1, -1, 3]), **wrong)
    pools = (s.conv_state, s.state)
    before = [x.clone() for x in pools]
    *tensors, state_indices, num_q_heads, num_k_heads, _ = s.arguments()
    with pytest.raises(error, match=message):
        m2rnn_decode_step(*tensors, state_indices=state_indices, num_q_heads=num_q_heads, num_k_heads=num_k_heads)
    assert all(map(torch.equal, pools, before))


@pytest.mark.parametrize(
    "impl, message",
    [("cpp", "no impl='cpp'; choose 'auto'"), ("reference", "no impl='reference'"), ("cuda", "must be one of 'auto'")],
)
def test_implementations_that_do_not_exist(impl: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(make_step(2, 4, 6, 5), impl)


def test_triton_on_a_cpu_is_refused_and_nothing_falls_back() -> None:
    with pytest.raises(ValueError, match=r"runs on cuda tensors, these are on cpu.*impl='eager'"):
        run(make_step(2, 4, 6, 5), "triton")
    layer = make_layer(torch.float32, impl="triton")
    with torch.no_grad(), pytest.raises(ValueError, match="runs on cuda tensors"):
        layer(torch.randn(2, 1, D), cache=layer.init_cache(2))


def test_layer_errors() -> None:
    layer, x = make_layer(), torch.randn(2, 3, D).double()
    pool, at = layer.init_cache(4), torch.tensor([0, 1])
    for call in (
        dict(x=x, cache=pool),
        dict(x=x[:, :1]),
        dict(x=x[:, :1], cache=pool, attention_mask=torch.ones(2, 1)),
        dict(x=x[:1, :1], cache=pool, cu_seqlens=torch.tensor([0, 1])),
    ):
        with pytest.raises(ValueError, match=r"`state_indices` goes with a `cache`.*write_rows"):
            layer(**call, state_indices=at)
