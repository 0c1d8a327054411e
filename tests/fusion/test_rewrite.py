# SPDX-License-Identifier: Apache-2.0
"""Plain code around the op, compiled: what moves into the fused op, what stays, and that the numbers stay right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m2rnn_compile import M2RNN, m2rnn
from m2rnn_compile.testing import assert_accurate
from tests.fusion.compiling import Rewriting, conv, fusion_on_cpu, inference_ops, training_ops

__all__ = ["conv", "fusion_on_cpu"]
pytestmark = pytest.mark.usefixtures("fusion_on_cpu")

B, T, N, K, V = 2, 11, 4, 5, 6
Code = Callable[..., Tensor]


def tensors(dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    sizes = dict(
        q=(B, T, 1, K), k=(B, T, 1, K), v=(B, T, N, V), x=(B, T, N), W=(N, V, V), A=(N,), b=(N,), D=(N, V),
        g=(B, T, N, V), w=(N * V,), wh=(V,),
    )  # fmt: skip
    sizes |= shapes
    return {n: (0.5 * torch.randn(s)).to(torch.float32 if n in "Abw" else dtype) for n, s in sizes.items()}


def decay(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    return torch.exp(-torch.exp(A) * F.softplus(x.float() + b))


def norm(o: Tensor, w: Tensor | None, dim: Any = -1) -> Tensor:
    o_acc = o.float()
    o_acc = o_acc * torch.rsqrt(o_acc.pow(2).mean(dim, keepdim=True) + 1e-5)
    return (o_acc if w is None else o_acc * w).to(o.dtype)


def paper(q, k, v, x, W, A, b, D, g, w, wh):  # type: ignore[no-untyped-def]
    y = m2rnn(q, k, v, decay(x, A, b), W).y
    return norm(((y + D * v) * F.silu(g)).flatten(-2), w)


def scan(t: dict[str, Tensor]) -> Tensor:
    return m2rnn(t["q"], t["k"], t["v"], t["x"].sigmoid(), t["W"]).y


ALL = ["decay gate", "D ⊙ v", "SiLU(g)", "RMSNorm over N·V"]


def layer_parts(conv: bool, training: bool = True) -> list[str]:
    whole = ["the whole projection"] if conv and training else []
    return [*whole, *(["causal conv, SiLU"] if conv else []), "q | k | v as one tensor", *ALL]


SIGMOID = "sigmoid forget gate"
VARIANTS: dict[str, tuple[Code, list[str]]] = {
    "paper": (lambda t: paper(**t), ALL),
    "no D": (lambda t: scan(t) * F.silu(t["g"]), [SIGMOID, "SiLU(g)"]),
    "sigmoid gate": (lambda t: (scan(t) + t["v"] * t["D"]) * t["g"].sigmoid(), [SIGMOID, "D ⊙ v", "sigmoid(g)"]),
    "gelu": (lambda t: F.gelu(t["g"]) * scan(t), [SIGMOID, "GELU(g)"]),
    "gelu tanh": (lambda t: F.gelu(t["g"], approximate="tanh") * scan(t), [SIGMOID, "GELU(g)"]),
    "silu by hand": (lambda t: scan(t) * (t["g"] * torch.sigmoid(t["g"])), [SIGMOID, "SiLU(g)"]),
    "gate on flat": (
        lambda t: scan(t).flatten(-2) * F.silu(t["g"].flatten(-2)), [SIGMOID, "SiLU(g)"]
    ),
    "gate flat, then apart": (
        lambda t: scan(t) * F.silu(t["g"].flatten(-2)).unflatten(-1, (N, V)), [SIGMOID, "SiLU(g)"]
    ),
    "rms_norm per head": (
        lambda t: F.rms_norm(scan(t) + t["D"] * t["v"], (V,), t["wh"], 1e-5),
        [SIGMOID, "D ⊙ v", "RMSNorm per head"],
    ),
    "rms_norm over all, no weight": (
        lambda t: F.rms_norm(scan(t).flatten(-2), (N * V,), None, 1e-5), [SIGMOID, "RMSNorm over N·V"]
    ),
    "norm over two dimensions": (lambda t: norm(scan(t), None, (-2, -1)), [SIGMOID, "RMSNorm over N·V"]),
    "norm per head": (lambda t: norm(scan(t), t["wh"]), [SIGMOID, "RMSNorm per head"]),
    "residual after the gate": (
        lambda t: t["v"] + (scan(t) + t["D"] * t["v"]) * F.silu(t["g"]), [SIGMOID, "D ⊙ v", "SiLU(g)"]
    ),
    "D per head": (lambda t: scan(t) + t["D"][:, :1] * t["v"], [SIGMOID, "D ⊙ v"]),
    "D per column": (lambda t: torch.add(t["v"] * t["wh"], scan(t)), [SIGMOID, "D ⊙ v"]),
    "D on flat": (lambda t: scan(t).flatten(2) + t["w"] * t["v"].flatten(2), [SIGMOID, "D ⊙ v"]),
    "norm before the gate": (lambda t: norm(scan(t), t["wh"]) * F.silu(t["g"]), [SIGMOID, "RMSNorm per head"]),
    "gate after something else": (lambda t: torch.relu(scan(t)) * F.silu(t["g"]), []),
    "y used twice": (lambda t: scan(t) * F.silu(t["g"]) + scan(t).sum() * 0, [SIGMOID, "SiLU(g)"]),
}  # fmt: skip


def values_and_gradients(fn: Code, t: dict[str, Tensor]) -> list[Tensor]:
    leaves = {n: x.detach().clone().requires_grad_() for n, x in t.items()}
    o = fn(leaves)
    torch.manual_seed(1)
    grads = torch.autograd.grad(o, list(leaves.values()), torch.randn(o.shape).to(o.dtype), allow_unused=True)
    return [o.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant: str, dtype: torch.dtype) -> None:
    fn, expected = VARIANTS[variant]
    t = tensors(dtype)
    backend = Rewriting()
    got = values_and_gradients(torch.compile(fn, backend=backend, fullgraph=True), t)
    tolerance = dict(atol=2e-5, rtol=1e-4) if dtype == torch.float32 else dict(atol=0.25, rtol=0.05)
    for a, b in zip(got, values_and_gradients(fn, t), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **tolerance)
    assert expected in [list(r.fused) for r in backend.records], backend.records
    with torch.no_grad():
        compiled = torch.compile(fn, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(t), fn(t), **tolerance)
    assert not backend.records[-1].training


@pytest.mark.parametrize("low", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_rounding_to_eight_bits_stays_where_it_is(low: torch.dtype) -> None:
    """Behind the op, and between two parts: there it ends what moves into the op."""
    behind = lambda t: (scan(t) * F.silu(t["g"])).to(low)
    between = lambda t: scan(t).to(low).float() * F.silu(t["g"])
    t = tensors()
    for fn, parts in ((behind, 1), (between, 0)):
        backend = Rewriting()
        with torch.no_grad():
            got, expected = torch.compile(fn, backend=backend, fullgraph=True)(t), fn(t)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got.float(), expected.float(), atol=1e-5, rtol=1e-4)
        assert sum("SiLU(g)" in r.fused for r in backend.records) == parts


def in_place(t: dict[str, Tensor]) -> Tensor:
    g = t["g"].detach() * 1
    y = scan(t)
    gate = torch.sigmoid(g)  # where it stands: before g changes
    g.add_(1)
    return y * gate + g


def depends_on_state(t: dict[str, Tensor]) -> Tensor:
    y, state = m2rnn(t["q"], t["k"], t["v"], t["x"].sigmoid(), t["W"])
    assert state is not None
    return y * F.silu(t["g"] + state.mean())


def state_used_first(t: dict[str, Tensor]) -> Tensor:
    y, state = m2rnn(t["q"], t["k"], t["v"], t["x"].sigmoid(), t["W"])
    assert state is not None
    more = state.square().sum()
    return y * F.silu(t["g"]) + more


UNFUSED: dict[str, tuple[Code, str]] = {
    "in place": (in_place, "`add_` writes in place between what would move and where to"),
    "cycle": (depends_on_state, "depends on the scan's own result"),
    "y twice": (lambda t: (lambda y: y * F.silu(t["g"]) + y)(scan(t)), "y is used 2 times"),
    "D of time": (lambda t: scan(t) + t["D"][None, None].expand(B, T, N, V) * t["v"], "`add` follows"),
    "another v": (lambda t: scan(t) + t["D"] * (2 * t["v"]), "`add` follows"),
    "add with alpha": (lambda t: torch.add(scan(t), t["D"] * t["v"], alpha=2), "`add` follows"),
    "sum norm": (lambda t: (lambda o: o * torch.rsqrt(o.square().sum(-1, keepdim=True) + 1))(scan(t)), "used 2 times"),
    "impl": (
        lambda t: m2rnn(t["q"], t["k"], t["v"], t["x"].sigmoid(), t["W"], impl="eager").y.relu(), "`relu` follows"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFUSED)
def test_what_does_not_match_runs_unfused_and_right(case: str) -> None:
    fn, reason = UNFUSED[case]
    t = tensors()
    backend = Rewriting()
    got = values_and_gradients(torch.compile(fn, backend=backend, fullgraph=True), t)
    for a, b in zip(got, values_and_gradients(fn, t), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    (record,) = backend.records
    assert record.fused == ()
    assert reason in record.left[0]


def test_a_state_that_is_used_before_the_gate_is_computed() -> None:
    backend = Rewriting()
    t = tensors()
    got = values_and_gradients(torch.compile(state_used_first, backend=backend, fullgraph=True), t)
    for a, b in zip(got, values_and_gradients(state_used_first, t), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert backend.parts() == [SIGMOID, "SiLU(g)"]


def make_layer(**heads: int) -> M2RNN:
    layer = M2RNN(24, num_heads=4, key_dim=8, value_dim=4, **heads)
    torch.nn.init.normal_(layer.conv1d.weight, std=0.5)  # or what the taps contribute could go missing unseen
    return layer


@pytest.mark.parametrize("heads", [{}, dict(num_v_heads=2, num_g_heads=1), dict(num_q_heads=4, num_f_heads=2)])
def test_the_layer(heads: dict[str, int], conv: bool) -> None:
    layer = make_layer(**heads)
    backend = Rewriting()
    x = torch.randn(2, 9, 24, requires_grad=True)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    parameters = [x, *layer.parameters()]
    for got, expected in zip(
        torch.autograd.grad(compiled(x).square().sum(), parameters),
        torch.autograd.grad(layer(x).square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert backend.parts() == layer_parts(conv)
    assert backend.ops == [training_ops(conv)]


def test_the_layer_with_a_cache_packed_and_padded() -> None:
    layer = M2RNN(24, num_heads=4, key_dim=8, value_dim=4)
    x = torch.randn(1, 9, 24)
    for options in (
        dict(cache=layer.init_cache(1)),
        dict(cu_seqlens=torch.tensor([0, 4, 9])),
        dict(attention_mask=torch.arange(9)[None] > 2),
    ):
        backend = Rewriting()
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        got, expected = compiled(x, **options), layer(x, **options)
        for a, b in zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        assert backend.parts()[-3:] == ALL[1:]
        masked = "attention_mask" in options
        assert ("forget gate: f comes from `where`" in backend.records[0].left) == masked
        assert ("the whole projection" in backend.parts()) == ("cu_seqlens" in options)


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_autocast_writes_the_low_dtype_for_the_projection(packed: bool, inside: bool, conv: bool) -> None:
    layer = make_layer()
    x = torch.randn(1 if packed else 2, 9, 24, requires_grad=True)
    options = dict(cu_seqlens=torch.tensor([0, 1, 3, 9])) if packed else {}
    do = torch.randn(x.shape)
    parameters = dict(layer.named_parameters(), dx=x)

    def forward(x: Tensor, **options: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            o: Tensor = layer(x, **options)
            return o

    def results(fn: Callable[..., Tensor], low: bool = True) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            o = fn(x, **options)
        grads = torch.autograd.grad(o, list(parameters.values()), do.to(o.dtype))
        return {"y": o.detach(), **dict(zip(parameters, grads, strict=True))}

    backend = Rewriting()
    eager = results(layer)
    got = results(torch.compile(forward if inside else layer, backend=backend, fullgraph=True))
    assert got["y"].dtype == torch.bfloat16
    assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in eager.items()}
    assert_accurate(got, results(layer, low=False), eager, slices=1)
    assert backend.parts() == layer_parts(conv)
    assert backend.ops == [training_ops(conv)]
    assert "'bfloat16', 64" in backend.graphs[0][1]  # out_dtype, chunk


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_at_most_two_compilations_over_ten_lengths(training: bool, conv: bool) -> None:
    layer = make_layer()
    backend = Rewriting()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    with torch.set_grad_enabled(training):
        for i, length in enumerate((16, 5, 33, 64, 2, 65, 7, 100, 31, 12)):
            x = torch.randn(2 + i % 3, length, 24, requires_grad=training)
            got, expected = compiled(x), layer(x)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
            if training:
                leaves = [x, *layer.parameters()]
                for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (got, expected)), strict=True):
                    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert backend.compilations <= 2
    assert all(list(r.fused) == layer_parts(conv, training) and r.training == training for r in backend.records)
    assert all(ops == (training_ops if training else inference_ops)(conv) for ops in backend.ops)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_dynamic_true(training: bool, conv: bool) -> None:
    """Dynamo makes a symbol of the norm's eps then, which the op takes like a number."""
    layer = make_layer()
    backend = Rewriting()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    with torch.set_grad_enabled(training):
        for length in (9, 20):
            x = torch.randn(2, length, 24)
            torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-4)
    assert backend.compilations <= 2
    assert all(list(r.fused) == layer_parts(conv, training) for r in backend.records)
    assert all(ops == (training_ops if training else inference_ops)(conv) for ops in backend.ops)


def test_activation_checkpointing(conv: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    layer = make_layer()
    backend = Rewriting()
    compiled = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), backend=backend, fullgraph=True)
    x = torch.randn(2, 9, 24, requires_grad=True)
    leaves = [x, *layer.parameters()]
    for got, expected in zip(
        torch.autograd.grad(compiled(x).square().sum(), leaves),
        torch.autograd.grad(layer(x).square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert backend.parts() == layer_parts(conv)
    assert backend.ops == [training_ops(conv)]


def test_inside_of_vmap_the_scan_stays() -> None:
    t = tensors()
    backend = Rewriting()
    fn = torch.vmap(lambda g: scan(t) * F.silu(g))
    g = torch.randn(3, B, T, N, V)
    compiled = torch.compile(lambda g: fn(g), backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(g), fn(g), atol=1e-5, rtol=1e-4)
    assert all(r.fused == () for r in backend.records)
