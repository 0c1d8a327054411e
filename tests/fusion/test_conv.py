# SPDX-License-Identifier: Apache-2.0
"""`m2rnn::conv_silu` against the layer's convolution in plain torch, and what the rewrite recognises as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from m2rnn_compile import M2RNN, enable_fusion, m2rnn
from m2rnn_compile.layers.conv import CausalConv
from m2rnn_compile.layers.mixer import positions_in_sequence
from tests.fusion.compiling import ON_CPU, Rewriting
from tests.ops.helpers import LAYOUTS

B, T, C = 2, 13, 6
SEQLENS = [0, 1, 1, 3, 10, 13]  # of length 1, 0, 2, 7, 3: shorter and longer than the taps


def position() -> Tensor:
    return positions_in_sequence(torch.tensor(SEQLENS), T)[0]


def plain(x: Tensor, weight: Tensor, packed: bool) -> Tensor:
    conv = CausalConv(C, weight.shape[1], dtype=weight.dtype)
    cu = torch.tensor(SEQLENS) if packed else None
    return F.silu(torch.func.functional_call(conv, {"weight": weight[:, None]}, (x,), {"cu_seqlens": cu})[0])


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_the_layers_convolution(width: int, packed: bool) -> None:
    x = torch.randn(1 if packed else B, T, C, dtype=torch.float64, requires_grad=True)
    w = torch.randn(C, width, dtype=torch.float64, requires_grad=True)
    where = position() if packed else None
    got, expected = torch.ops.m2rnn.conv_silu(x, w, where), plain(x, w, packed)
    torch.testing.assert_close(got, expected)
    dy = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, [x, w], dy), torch.autograd.grad(expected, [x, w], dy), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(lambda x, w: torch.ops.m2rnn.conv_silu(x, w, where), (x, w))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](torch.randn(B, T, C, dtype=dtype)).detach()
    w = torch.randn(C, 4)
    for where in (None, position()):
        opcheck(torch.ops.m2rnn.conv_silu.default, (x.clone().requires_grad_(), w.clone().requires_grad_(), where))
        dy = LAYOUTS[layout](torch.randn(B, T, C, dtype=dtype)).detach()
        opcheck(torch.ops.m2rnn.conv_silu_backward.default, (dy, x, w, where))


@pytest.mark.parametrize(
    "x,w,where,message",
    [
        (torch.zeros(T, C), torch.zeros(C, 4), None, r"`x` must be floating point of shape \[B, T, C\]"),
        (torch.zeros(1, T, C), torch.zeros(C + 1, 4), None, r"`weight` must have shape \[C = 6, width >= 1\]"),
        (torch.zeros(1, T, C), torch.zeros(C, 4), torch.zeros(T), "`position` must be int32 or int64"),
        (torch.zeros(1, T, C), torch.zeros(C, 4), torch.zeros(T + 1, dtype=torch.int64), "must have length T = 13"),
    ],
)
def test_what_does_not_fit_is_refused(x: Tensor, w: Tensor, where: Tensor | None, message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.m2rnn.conv_silu(x, w, where)


def test_no_second_derivative() -> None:
    x, w = torch.randn(1, T, C, requires_grad=True), torch.randn(C, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(torch.ops.m2rnn.conv_silu(x, w, None).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        dx.sum().backward()


# ---- the rewrite ----------------------------------------------------------------------------------------------------


@pytest.fixture
def conv_on_cpu() -> Iterator[None]:
    before = enable_fusion(True, **ON_CPU, conv=True)
    yield
    enable_fusion(**before._asdict())


def values_and_gradients(fn: Callable[..., Tensor], layer: M2RNN, x: Tensor, **options: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = fn(x, **options)
    torch.manual_seed(1)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_the_layer(conv_on_cpu: None, packed: bool, dynamic: bool) -> None:
    """All of it fuses, also with `dynamic=True`, where Dynamo makes inputs of sizes and of the norm's eps."""
    layer = M2RNN(32, num_heads=6, key_dim=8, value_dim=4)
    torch.nn.init.normal_(layer.conv1d.weight, std=0.5)
    x = torch.randn(1 if packed else B, T, 32)
    options = dict(cu_seqlens=torch.tensor(SEQLENS)) if packed else {}
    backend = Rewriting()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=dynamic)
    got = values_and_gradients(compiled, layer, x, **options)
    for a, b in zip(got, values_and_gradients(layer, layer, x, **options), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert {r.fused for r in backend.records} == {("the whole projection", *WHOLE)}
    assert backend.compilations <= 2
    before, after = backend.graphs[0]
    assert "silu(" in before.split("scan")[0]
    assert "silu(" not in after


def seen(layer: M2RNN, **options: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
    backend = Rewriting()
    x = torch.randn(B, T, 32)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    got = values_and_gradients(compiled, layer, x, **options)  # type: ignore[arg-type]
    for a, b in zip(got, values_and_gradients(layer, layer, x, **options), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    (record,) = backend.records
    return record.fused, record.left


def make_layer(**options: int) -> M2RNN:
    layer = M2RNN(32, num_heads=6, key_dim=8, value_dim=4, **options)  # type: ignore[arg-type]
    torch.nn.init.normal_(layer.conv1d.weight, std=0.5)
    return layer


def test_left_padding_fuses(conv_on_cpu: None) -> None:
    mask = torch.arange(T)[None] >= torch.tensor([[0], [5]])
    assert "causal conv, SiLU" in seen(make_layer(), attention_mask=mask)[0]


# ---- inference: one op from the projection on -----------------------------------------------------------------------

WHOLE = ("causal conv, SiLU", "q | k | v as one tensor", "decay gate", "D ⊙ v", "SiLU(g)", "RMSNorm over N·V")


def inference(layer: M2RNN, *args: Tensor, **options: object) -> tuple[str, tuple[str, ...]]:
    """(the rewritten graph, what it says is fused) without a gradient, after a look at the values."""
    backend = Rewriting()
    with torch.no_grad():
        got = torch.compile(layer, backend=backend, fullgraph=True)(*args, **options)
        expected = layer(*args, **options)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    return backend.graphs[0][1], backend.records[0].fused


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_inference_is_one_op(conv_on_cpu: None, packed: bool) -> None:
    options = dict(cu_seqlens=torch.tensor(SEQLENS)) if packed else {}
    graph, parts = inference(make_layer(), torch.randn(1 if packed else B, T, 32), **options)
    assert parts == WHOLE
    assert "m2rnn.fused_scan_conv" in graph
    for other in ("conv_silu", "fused_scan_packed", "softplus", "silu("):
        assert other not in graph


def test_a_prefill_continues_without_the_convolution_inside(conv_on_cpu: None) -> None:
    """The window of the cache stands before x, which is another convolution; the rest is one op still."""
    layer = make_layer()
    graph, parts = inference(layer, torch.randn(B, T, 32), cache=layer.init_cache(B))
    assert parts == WHOLE[1:]
    assert "m2rnn.fused_scan_conv" in graph
    assert "silu(" in graph


def test_training_takes_the_op_that_has_a_backward(conv_on_cpu: None) -> None:
    backend = Rewriting()
    torch.compile(make_layer(), backend=backend, fullgraph=True)(torch.randn(B, T, 32))
    assert backend.ops == [["fused_mixer"]]


class UsesTheConvolution(torch.nn.Module):
    """Not only the scan wants what SiLU leaves: it has to be there."""

    def __init__(self, write: bool) -> None:
        super().__init__()
        self.layer, self.write = make_layer(), write

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        raw, x_f, g = layer._project(x, pad=True)
        qkv = F.silu(layer.conv1d(raw)[0])
        if self.write:
            raw.mul_(2)
        q, k, v = layer._heads(qkv)
        y = m2rnn(q, k, v, layer.decay_gate(x_f), layer.state_weight).y
        o = layer._gate_and_norm(y, v, g)
        return o + raw.sum() if self.write else o + qkv.sum()


@pytest.mark.parametrize("write", [False, True])
def test_a_convolution_that_others_use_or_write_over_stays(conv_on_cpu: None, write: bool) -> None:
    graph, _ = inference(UsesTheConvolution(write), torch.randn(B, T, 32))  # type: ignore[arg-type]
    assert "m2rnn.conv_silu" in graph
    assert "m2rnn.fused_scan_conv" in graph


def whole_arguments(conv: bool, packed: bool = False) -> tuple[object, ...]:
    N, K, V = 4, 5, 3
    x = torch.randn(1 if packed else B, T, 2 * K + N * V)
    cu = torch.tensor(SEQLENS) if packed else None
    return (
        x, torch.randn(x.shape[2], 4) if conv else None, position() if packed and conv else None, [1, 1, N, K, V],
        torch.randn(*x.shape[:2], N), 0.3 * torch.randn(N, V, V), torch.randn(N), torch.randn(N), torch.randn(N, V),
        torch.randn(*x.shape[:2], N, V), torch.randn(N, V), None, cu, 1.0, "decay", "silu", "all", 1e-5, "float32",
        "auto",
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("conv", [True, False])
def test_opcheck_and_values_of_the_whole(conv: bool, packed: bool, layout: str) -> None:
    def lay_out(t: object) -> object:
        return LAYOUTS[layout](t) if isinstance(t, Tensor) and t.is_floating_point() else t

    x, weight, where, sizes, *rest, impl = map(lay_out, whole_arguments(conv, packed))
    op = torch.ops.m2rnn.fused_scan_conv
    opcheck(op.default, (x, weight, where, sizes, *rest, impl))
    qkv = torch.ops.m2rnn.conv_silu(x, weight, where) if conv else x
    expected = torch.ops.m2rnn.fused_scan_packed(qkv, sizes, *rest, 0, impl)
    for a, b in zip(op(x, weight, where, sizes, *rest, impl), expected[:2], strict=True):
        assert torch.equal(a, b)


def test_the_whole_has_no_backward_and_refuses_positions_without_a_convolution() -> None:
    x, *rest = whole_arguments(True)
    assert isinstance(x, Tensor)
    o, _ = torch.ops.m2rnn.fused_scan_conv(x.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match="for inference and has no backward"):
        o.sum().backward()
    with pytest.raises((ValueError, RuntimeError), match="`position` goes with `conv_weight`"):
        torch.ops.m2rnn.fused_scan_conv(x.detach(), None, torch.arange(T), *rest[2:])


def test_on_unless_refused(conv_on_cpu: None) -> None:
    enable_fusion(True, **ON_CPU)
    assert "causal conv, SiLU" in seen(make_layer())[0]
    enable_fusion(True, **ON_CPU, conv=False)
    assert "causal conv, SiLU" not in seen(make_layer())[0]


@pytest.mark.parametrize("width", [1, 2, 5])
def test_other_widths_fuse(conv_on_cpu: None, width: int) -> None:
    assert "causal conv, SiLU" in seen(make_layer(conv_size=width))[0]


WRONG: dict[str, Callable[[list[Tensor], Tensor], Tensor]] = {
    "taps in another order": lambda x, w: x[0] * w[:, 0] + x[1] * w[:, 1] + x[2] * w[:, 2] + x[3] * w[:, 3],
    "a tap twice": lambda x, w: x[0] * w[:, 3] + x[1] * w[:, 2] + x[1] * w[:, 2] + x[3] * w[:, 0],
    "a tap missing": lambda x, w: x[0] * w[:, 3] + x[1] * w[:, 2] + x[2] * w[:, 1],
    "something more": lambda x, w: x[0] * w[:, 3] + x[1] * w[:, 2] + x[2] * w[:, 1] + x[3] * w[:, 0] + 1,
}


@pytest.mark.parametrize("variant", WRONG)
def test_what_only_looks_like_it_stays(conv_on_cpu: None, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """The values say so: they are compared with those of the uncompiled layer, which computes the variant too."""
    monkeypatch.setattr(CausalConv, "_taps", lambda self, x: WRONG[variant](x, self.weight[:, 0]))
    fused, left = seen(make_layer())
    assert "causal conv, SiLU" not in fused
    assert any(reason.startswith("in front of q | k | v: ") for reason in left), left
