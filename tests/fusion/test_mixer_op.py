# SPDX-License-Identifier: Apache-2.0
"""The op `m2rnn::fused_mixer` against slices, the convolution and the composition of `composed.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from m2rnn_compile.ops.fused_mixer import parts, unused
from m2rnn_compile.testing import assert_accurate, low_precision_eager
from tests.fusion.composed import CASES, run
from tests.fusion.mixing import ORDERS, arguments, composed_mixer, make_mixer, mixer
from tests.ops.helpers import IMPLS, LAYOUTS


@pytest.mark.parametrize("taps", [None, 1, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_composition(case: str, taps: int | None) -> None:
    """In fp64, where the two differ by nothing but the order of sums."""
    x = make_mixer(case, taps=taps, dtype=torch.float64)
    got, expected = run(x, mixer), run(x, composed_mixer)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_the_composition(case: str) -> None:
    x = make_mixer(case, dtype=torch.bfloat16, **{"T": 96, **CASES[case]})
    truth = run(x.to(torch.float64), composed_mixer, impl="reference")
    assert_accurate(run(x, mixer), truth, run(x, composed_mixer, scan=low_precision_eager), slices=4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", ["layer", "shared heads", "no D", "packed", "nothing"])
def test_gradcheck(case: str, order: str, impl: str) -> None:
    x = make_mixer(case, order=order, dtype=torch.float64, clip=None)
    names = list(x.tensors)
    leaves = tuple(t.requires_grad_() for t in x.tensors.values())

    def f(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return mixer(**dict(zip(names, args, strict=True)), **x.options, impl=impl)

    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("taps", [None, 4])
@pytest.mark.parametrize("case", ["layer", "shared heads", "no D", "packed", "nothing"])
def test_opcheck(case: str, taps: int | None, layout: str) -> None:
    x = make_mixer(case, taps=taps)
    leaves = {n: LAYOUTS[layout](t).detach().requires_grad_() for n, t in x.tensors.items()}
    args = arguments(**leaves, **x.options)
    opcheck(torch.ops.m2rnn.fused_mixer.default, args)
    dense = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    _, _, *kept = torch.ops.m2rnn.fused_mixer(*dense)
    _, _, forget, activation, norm, _, _, chunk, impl = dense[10:]
    given = (*dense[:11], *kept, dense[11], forget, activation, norm, chunk, impl)
    for do, dh in ((x.do, x.dfinal_state), (None, x.dfinal_state), (LAYOUTS[layout](x.do), None)):
        opcheck(torch.ops.m2rnn.fused_mixer_backward.default, (do, dh, *given))


@pytest.mark.parametrize("which", ["o", "state", "neither"])
def test_a_gradient_of_one_result_only(which: str) -> None:
    x = make_mixer("layer")
    results = []
    for fn in (mixer, composed_mixer):
        leaves = {n: t.detach().requires_grad_() for n, t in x.tensors.items()}
        o, state = fn(**leaves, **x.options)
        loss = {"o": (o * x.do).sum(), "state": (state * x.dfinal_state).sum(), "neither": leaves["W"].sum()}[which]
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        results.append([torch.zeros_like(t) if d is None else d for t, d in zip(leaves.values(), grads, strict=True)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("frozen", ["x", "conv_weight", "W", "D", "norm_weight", "initial_state"])
def test_an_input_without_a_gradient(frozen: str) -> None:
    x = make_mixer("layer")
    leaves = {n: t.detach().requires_grad_(n != frozen) for n, t in x.tensors.items()}
    o, _ = mixer(**leaves, **x.options)
    o.sum().backward()
    assert leaves[frozen].grad is None
    assert all(t.grad is not None for n, t in leaves.items() if n != frozen)


def test_columns_of_no_use_have_no_gradient() -> None:
    x = make_mixer("layer", order="padded")
    leaf = x.tensors["x"].requires_grad_()
    o, _ = mixer(**x.tensors, **x.options)
    o.sum().backward()
    spans = unused(x.options["sizes"], leaf.shape[2])
    assert len(spans) == 3
    for first, end in spans:
        assert leaf.grad[..., first:end].abs().max() == 0


def test_under_activation_checkpointing() -> None:
    x = make_mixer("layer")
    leaves = {n: t.detach().requires_grad_() for n, t in x.tensors.items()}
    grads = [
        torch.autograd.grad((o * x.do).sum(), list(leaves.values()))
        for o in (
            mixer(**leaves, **x.options)[0],
            checkpoint(lambda: mixer(**leaves, **x.options)[0], use_reentrant=False),
        )
    ]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_autocast_leaves_gate_norm_and_state_alone() -> None:
    x = make_mixer("layer")
    with torch.autocast("cpu", torch.bfloat16):
        o, state, qkv, y, *_ = torch.ops.m2rnn.fused_mixer(*arguments(**x.tensors, **x.options))
    assert (o.dtype, state.dtype, qkv.dtype, y.dtype) == (
        torch.float32, torch.float32, torch.bfloat16, torch.bfloat16,
    )  # fmt: skip


def test_flops_are_those_of_the_scan() -> None:
    counts = []
    for fn in (mixer, composed_mixer):
        x = make_mixer("layer")
        with FlopCounterMode(display=False) as counter:
            o, _ = fn(**{n: t.requires_grad_() for n, t in x.tensors.items()}, **x.options)
            o.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_no_second_derivative() -> None:
    x = make_mixer("layer")
    leaf = x.tensors["x"].requires_grad_()
    (dx,) = torch.autograd.grad(mixer(**x.tensors, **x.options)[0].sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        dx.sum().backward()


def wrong(**change: Any) -> tuple[Any, ...]:
    x = make_mixer("layer")
    given: dict[str, Any] = {**x.tensors, **x.options} | change
    return arguments(**given)


SIZES = make_mixer("layer").options["sizes"]


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(x=torch.zeros(2, 12)), r"`x` must have shape \[B, T, P\]"),
        (dict(sizes=SIZES[:9]), r"`sizes` must be \[Nq, Nk, Nv, K, V, Nf, Ng\]"),
        (dict(sizes=[*SIZES[:8], 0, SIZES[9]]), "must be inside of it and must not overlap"),
        (dict(sizes=[*SIZES[:9], 1000]), "must be inside of it and must not overlap"),
        (dict(chunk=0), r"`chunk` must be >= 1, got 0; for inference there is"),
        (dict(conv_weight=None, position=torch.zeros(12, dtype=torch.int64)), "`position` goes with `conv_weight`"),
        (dict(conv_weight=torch.zeros(3, 4)), r"`weight` must have shape \[C = "),
        (dict(D=torch.zeros(3, 3)), "`D`"),
        (dict(impl="fast"), "`impl` must be one of"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.m2rnn.fused_mixer(*wrong(**change))


def test_parts_are_views() -> None:
    x = torch.zeros(1, 2, 20)
    qkv, f, g = parts(x, [1, 1, 2, 3, 2, 2, 2, 8, 0, 3])
    assert [t.shape[2:] for t in (qkv, f, g)] == [(10,), (2,), (2, 2)]
    for t in (qkv, f, g):
        assert t._base is x
    assert unused([1, 1, 2, 3, 2, 2, 2, 8, 0, 3], 20) == [(2, 3), (7, 8), (18, 20)]
