# SPDX-License-Identifier: Apache-2.0
"""The op `m2rnn::fused_scan` against the same thing composed of `m2rnn` and plain torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from m2rnn_compile import m2rnn_fused
from m2rnn_compile.testing import assert_accurate, low_precision_eager
from tests.fusion.composed import CASES, compose, make_fused, run
from tests.ops.helpers import IMPLS, LAYOUTS

TENSORS = ("q", "k", "v", "f", "W", "A_log", "dt_bias", "D", "g", "norm_weight", "initial_state")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_as_accurate_as_the_composition(case: str, dtype: torch.dtype) -> None:
    x = make_fused(**{"T": 96, **CASES[case]}, dtype=dtype)
    truth = run(x.to(torch.float64), compose, impl="reference")
    assert_accurate(run(x, m2rnn_fused), truth, run(x, compose, scan=low_precision_eager), slices=4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case: str, impl: str) -> None:
    x = make_fused(**{**CASES[case], "clip": None}, dtype=torch.float64)
    names = list(x.tensors)
    leaves = tuple(t.requires_grad_() for t in x.tensors.values())

    def f(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return m2rnn_fused(**dict(zip(names, args, strict=True)), **x.options, impl=impl)

    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["layer", "shared heads", "no D", "packed", "nothing"])
def test_opcheck(case: str, layout: str) -> None:
    x = make_fused(**CASES[case])
    tensors = [LAYOUTS[layout](x.tensors[n]).detach().requires_grad_() if n in x.tensors else None for n in TENSORS]
    o = x.options
    args = (
        *tensors, o["cu_seqlens"], 1.0, o["forget"], o["activation"], o["norm"], 1e-3, "bfloat16", 4, "auto"
    )  # fmt: skip
    opcheck(torch.ops.m2rnn.fused_scan.default, args)
    dense = [None if t is None else t.detach() for t in tensors]
    _, _, y, rstd, _ = torch.ops.m2rnn.fused_scan(*dense, *args[11:])
    if y.dim() == 4:
        _, _, v, _, _, _, _, D, g, weight, _ = dense
        do = LAYOUTS[layout](x.do)
        opcheck(
            torch.ops.m2rnn.fused_tail_backward.default,
            (do, y, v, D, g, weight, rstd, o["activation"], o["norm"], "auto"),
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["layer", "shared heads", "packed", "nothing"])
def test_opcheck_of_one_tensor_for_q_k_and_v(case: str, layout: str) -> None:
    x = make_fused(**CASES[case])
    q, k, v = (x.tensors[n] for n in "qkv")
    sizes = [q.shape[2], k.shape[2], v.shape[2], q.shape[3], v.shape[3]]
    lay_out = lambda t: LAYOUTS[layout](t).detach().requires_grad_()
    qkv = lay_out(torch.cat([t.flatten(2) for t in (q, k, v)], -1))
    tensors = [lay_out(x.tensors[n]) if n in x.tensors else None for n in TENSORS[3:]]
    o = x.options
    rest = (o["cu_seqlens"], 1.0, o["forget"], o["activation"], o["norm"], 1e-3, "bfloat16", 4, "auto")
    opcheck(torch.ops.m2rnn.fused_scan_packed.default, (qkv, sizes, *tensors, *rest))


@pytest.mark.parametrize("case", ["layer", "shared heads", "packed"])
def test_one_tensor_for_q_k_and_v(case: str) -> None:
    """The bits of the op with three tensors."""
    x = make_fused(**CASES[case])
    q, k, v = (x.tensors[n] for n in "qkv")
    qkv = torch.cat([t.flatten(2) for t in (q, k, v)], -1).requires_grad_()
    sizes = [q.shape[2], k.shape[2], v.shape[2], q.shape[3], v.shape[3]]
    tensors = [x.tensors[n].requires_grad_() if n in x.tensors else None for n in TENSORS]
    o = x.options
    rest = (o["cu_seqlens"], 1.0, o["forget"], o["activation"], o["norm"], 1e-3, "float32", 64, "auto")
    one = torch.ops.m2rnn.fused_scan_packed(qkv, sizes, *tensors[3:], *rest)
    three = torch.ops.m2rnn.fused_scan(*tensors, *rest)
    assert torch.equal(one[0], three[0])
    (dqkv,) = torch.autograd.grad(one[0].square().sum(), qkv)
    grads = torch.autograd.grad(three[0].square().sum(), tensors[:3])
    assert torch.equal(dqkv, torch.cat([t.flatten(2) for t in grads], -1))
    with pytest.raises((ValueError, RuntimeError), match="`qkv` must have shape"):
        torch.ops.m2rnn.fused_scan_packed(qkv[..., 1:], sizes, *tensors[3:], *rest)


def test_no_schema_hands_a_dtype_over() -> None:
    """Packages of torch 2.11's AOTInductor would hand over another one."""
    names = {n.partition("::")[2].partition(".")[0] for n in torch._C._dispatch_get_all_op_names() if "m2rnn::" in n}
    assert names >= {"scan", "fused_scan", "fused_scan_packed", "fused_scan_conv"}
    for name in names:
        assert "ScalarType" not in str(getattr(torch.ops.m2rnn, name).default._schema)


@pytest.mark.parametrize("name", ["int32", "float", ""])
def test_a_dtype_that_is_none_is_refused(name: str) -> None:
    x = make_fused(**CASES["layer"])
    inputs = [x.tensors.get(n) for n in TENSORS]
    with pytest.raises(ValueError, match="`out_dtype` must be one of float16, bfloat16, float32, float64"):
        torch.ops.m2rnn.fused_scan(*inputs, None, None, "decay", "silu", "all", 1e-5, name, 0, "auto")


def test_inference_keeps_nothing_for_a_backward() -> None:
    x = make_fused(**CASES["layer"])
    inputs = [x.tensors.get(n) for n in TENSORS]
    *_, y, rstd, checkpoints = torch.ops.m2rnn.fused_scan(
        *inputs, None, None, "decay", "silu", "all", 1e-5, "float32", 0, "auto"
    )
    assert y.numel() == rstd.numel() == checkpoints.numel() == 0


def test_autocast_casts_what_the_scan_casts_and_leaves_the_gates_alone() -> None:
    x = make_fused(**CASES["layer"])
    with torch.autocast("cpu", torch.bfloat16):
        o, state = m2rnn_fused(**x.tensors, **x.options)
    assert state is not None
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    low = {n: t.bfloat16() if n in "qkvW" else t for n, t in x.tensors.items()}
    expected, _ = m2rnn_fused(**low, **x.options)
    assert torch.equal(o, expected)


def test_only_the_state_or_only_the_output() -> None:
    x = make_fused(**CASES["layer"])
    for i in (0, 1):
        grads = []
        for fn in (m2rnn_fused, compose):
            leaves = {n: t.detach().requires_grad_() for n, t in x.tensors.items()}
            out = fn(**leaves, **x.options)[i]
            assert out is not None
            grads.append(torch.autograd.grad(out.sum(), list(leaves.values()), allow_unused=True))
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-4)


def test_checkpointing_gives_the_same_bits() -> None:
    x = make_fused(**CASES["layer"])

    def through(**tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return checkpoint(lambda: m2rnn_fused(**tensors), use_reentrant=False)

    plain, kept = run(x, m2rnn_fused), run(x, through)
    assert all(torch.equal(plain[n], kept[n]) for n in plain)


def test_flops_are_the_scan_s() -> None:
    x = make_fused(**CASES["layer"])
    q, k, v, f, W = (x.tensors[n] for n in "qkvfW")
    counts = []
    for op in (
        lambda: torch.ops.m2rnn.scan(q, k, v, f, W, None, None, None, 0, "auto"),
        lambda: m2rnn_fused(q, k, v, f, W),
    ):
        with FlopCounterMode(display=False) as counter:
            op()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(D=torch.ones(3, 3)), r"`D` must have shape \[N, V\]"),
        (dict(g=torch.ones(2, 12, 3, 3)), r"head count of `g` \(3\) must divide N = 4"),
        (dict(A_log=None), "`A_log` goes with forget='decay'"),
        (dict(norm="none"), "`norm_weight` goes with norm"),
        (dict(activation="relu"), "`activation` must be one of"),
        (dict(norm="layer"), "`norm` must be one of"),
        (dict(forget="softmax"), "`forget` must be one of"),
        (dict(impl="reference"), "no impl='reference'"),
        (dict(impl="triton"), "triton"),
    ],
)
def test_errors_name_the_argument(change: dict, message: str) -> None:
    x = make_fused(**CASES["layer"])
    with pytest.raises(ValueError, match=message):
        m2rnn_fused(**{**x.tensors, **x.options, **change})


def _jvp(f: Any, g: torch.Tensor) -> torch.Tensor:
    tangent: torch.Tensor = torch.func.jvp(f, (g,), (g,))[1]
    return tangent


def _dual_level(f: Any, g: torch.Tensor) -> torch.Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(g, g))).tangent


@pytest.mark.parametrize("forward_mode", [_jvp, _dual_level])
@pytest.mark.parametrize("compiled", ["not", "outside", "inside"])
def test_forward_mode_is_refused_and_gives_no_zero_tangents(forward_mode: Any, compiled: str) -> None:
    """In eager mode, in a compiled function that differentiates, and around a function compiled before."""
    x = make_fused(**CASES["layer"])
    f = lambda g: m2rnn_fused(**{**x.tensors, "g": g}, **x.options)[0]
    g = x.tensors["g"]
    if compiled == "inside":
        f = torch.compile(f, backend="aot_eager")
        f(g)
    run_it = partial(forward_mode, f)
    if compiled == "outside":
        run_it = torch.compile(lambda g: forward_mode(f, g), backend="aot_eager")
    with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
        run_it(g)


@pytest.mark.parametrize("trained", ["q", "D", "g", "norm_weight"])
@pytest.mark.parametrize("case", ["layer", "shared heads"])
def test_a_compiled_backward_without_checkpoints_fails_when_it_runs(case: str, trained: str) -> None:
    """Not before, as it may never run, and not by a gradient that is silently absent."""
    x = make_fused(**CASES[case])
    tensors = [x.tensors.get(n) for n in TENSORS]
    leaf = x.tensors[trained].requires_grad_()

    def f(*tensors: torch.Tensor | None) -> torch.Tensor:
        rest = (None, None, "decay", "silu", "all", 1e-5, "float32", 0, "auto")
        o: torch.Tensor = torch.ops.m2rnn.fused_scan(*tensors, *rest)[0]
        return o

    o = torch.compile(f, backend="aot_eager")(*tensors)
    torch.testing.assert_close(o, f(*tensors))
    with pytest.raises(RuntimeError, match="chunk = 0"):
        torch.autograd.grad(o.sum(), leaf)


def test_compiled_vmap_is_refused_as_in_eager_mode() -> None:
    x = make_fused(**CASES["layer"])
    mapped = torch.vmap(lambda g: m2rnn_fused(**{**x.tensors, "g": g}, **x.options)[0])
    with pytest.raises(NotImplementedError, match=r"torch\.vmap"):
        torch.compile(mapped, backend="aot_eager")(x.tensors["g"][None])


def test_what_it_cannot_do_is_said() -> None:
    x = make_fused(**CASES["layer"])
    t = {n: v.requires_grad_() for n, v in x.tensors.items()}
    o, _ = m2rnn_fused(**t, **x.options)
    (dg,) = torch.autograd.grad(o.sum(), [t["g"]], create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        dg.sum().backward()
    with pytest.raises(NotImplementedError, match=r"torch\.vmap"):
        torch.vmap(lambda g: m2rnn_fused(**{**x.tensors, "g": g}, **x.options)[0])(x.tensors["g"][None])
    inference = torch.ops.m2rnn.fused_scan(
        *(t.get(n) for n in TENSORS), None, None, "decay", "silu", "all", 1e-5, "float32", 0, "auto"
    )
    with pytest.raises(RuntimeError, match="chunk = 0"):
        inference[0].sum().backward()
