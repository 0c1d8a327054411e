# SPDX-License-Identifier: Apache-2.0
"""`m2rnn::conv_silu` against the layer's convolution in plain torch, and what the rewrite recognises as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from m2rnn_compile import M2RNN, enable_fusion
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
    parts = ("causal conv, SiLU", "q | k | v as one tensor", "decay gate", "D ⊙ v", "SiLU(g)", "RMSNorm over N·V")
    assert {r.fused for r in backend.records} == {parts}
    assert backend.compilations <= 2
    before, after = backend.graphs[0]
    assert "conv_silu" in after
    assert "conv_silu" not in before
    assert "silu(" in before.split("scan")[0]
    assert "functional.silu(" not in after.split("fused_scan")[0]


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


def test_off_unless_asked_for(conv_on_cpu: None) -> None:
    enable_fusion(True, **ON_CPU)
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
