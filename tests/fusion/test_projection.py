# SPDX-License-Identifier: Apache-2.0
"""When a layer's training takes `m2rnn::fused_mixer`, and that it is right where it does not."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2rnn_compile import M2RNN, m2rnn
from m2rnn_compile.lowering.inductor import pad_projection
from tests.fusion.compiling import Rewriting, fusion_on_cpu

__all__ = ["fusion_on_cpu"]
WHOLE = "the whole projection"
D, N, K, V, EXTRA = 24, 4, 8, 4, 5
QKV, G = 2 * K + N * V, N * V

Parts = tuple[Tensor, Tensor, Tensor]  # q | k | v before the convolution, x_f, g


class Plain(nn.Module):
    """The layer written out, its parts cut from the projection by `cut`; what `more` makes is returned beside y."""

    def __init__(
        self, cut: Callable[[Tensor], Parts], more: Callable[..., Tensor] | None, conv: bool, write: bool = False
    ) -> None:
        super().__init__()
        self.layer = M2RNN(D, num_heads=N, key_dim=K, value_dim=V, conv_size=4 if conv else None)
        if self.layer.conv1d is not None:
            nn.init.normal_(self.layer.conv1d.weight, std=0.5)
        self.projection = nn.Linear(D, QKV + N + G + EXTRA, bias=True)
        self.cut, self.more, self.write = cut, more, write

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        layer, projected = self.layer, self.projection(x)
        raw, x_f, g = self.cut(projected)
        qkv = raw if layer.conv1d is None else F.silu(layer.conv1d(raw)[0])
        if self.write:
            raw.mul_(2)
        q, k, v = layer._heads(qkv)
        y = m2rnn(q, k, v, layer.decay_gate(x_f), layer.state_weight, state_grad_clip=1.0).y
        o = layer._gate_and_norm(y, v, g)
        return (o,) if self.more is None else (o, self.more(projected, raw, x_f, g, qkv))


def split(x: Tensor) -> Parts:
    raw, x_f, g, _ = x.split([QKV, N, G, EXTRA], -1)
    return raw, x_f, g


def turned(x: Tensor) -> Parts:
    _, g, raw, x_f = torch.split(x, [EXTRA, G, QKV, N], dim=2)
    return raw, x_f, g


def slices(x: Tensor) -> Parts:
    return x[..., :QKV], x[:, :, QKV : QKV + N], x[..., QKV + N : QKV + N + G]


def two_splits(x: Tensor) -> Parts:
    raw = torch.split_with_sizes(x, [QKV, N + G + EXTRA], -1)[0]
    _, x_f, g, _ = x.split([QKV, N, G, EXTRA], -1)
    return raw, x_f, g


def cast_gate(x: Tensor) -> Parts:
    raw, x_f, g = split(x)
    return raw, x_f.float(), g


def other_g(x: Tensor) -> Parts:
    raw, x_f, _ = split(x)
    return raw, x_f, torch.flip(x, (0,))[..., :G]


def copied(x: Tensor) -> Parts:
    raw, x_f, g = split(x)
    return raw, x_f, g.contiguous() * 2


def backwards(x: Tensor) -> Parts:
    return x[..., :QKV], x[..., QKV : QKV + N], x[..., -G:]


def check(
    cut: Callable[[Tensor], Parts],
    more: Callable[..., Tensor] | None = None,
    conv: bool = True,
    write: bool = False,
) -> Rewriting:
    torch.manual_seed(0)
    model, backend = Plain(cut, more, conv, write), Rewriting()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    results = []
    x, dy = torch.randn(2, 11, D, requires_grad=True), torch.randn(2, 11, D)
    for fn in (compiled, model):
        y, *others = fn(x)
        loss = (y * dy).sum() + sum(o.square().sum() for o in others)
        grads = torch.autograd.grad(loss, [x, *model.parameters()], allow_unused=True)
        results.append([y.detach(), *(torch.zeros(()) if d is None else d for d in grads)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    return backend


@pytest.mark.parametrize("conv", [True, False], ids=["conv", "no conv"])
@pytest.mark.parametrize("cut", [split, turned, slices, two_splits, cast_gate])
def test_columns_of_one_tensor(cut: Callable[[Tensor], Parts], conv: bool, fusion_on_cpu: None) -> None:
    backend = check(cut, conv=conv)
    assert WHOLE in backend.parts()
    assert backend.ops == [["fused_mixer"]]


def overlapping(x: Tensor) -> Parts:
    raw, _, g = split(x)
    return raw, x[..., 2 : 2 + N], g


def g_cut_without_a_gradient(x: Tensor) -> Parts:
    raw, x_f, _ = split(x)
    with torch.no_grad():
        return raw, x_f, x[..., QKV + N : QKV + N + G]


@pytest.mark.parametrize("cut", [other_g, copied, backwards, overlapping, g_cut_without_a_gradient])
def test_parts_that_are_not(cut: Callable[[Tensor], Parts], fusion_on_cpu: None) -> None:
    backend = check(cut)
    assert WHOLE not in backend.parts()
    assert backend.ops == [["conv_silu", "fused_scan_packed"]]
    assert any(text.startswith(WHOLE) for text in backend.records[0].left)


USED_ELSEWHERE: dict[str, Callable[..., Tensor]] = {
    "the projection": lambda x, raw, x_f, g, qkv: x.sin(),
    "q | k | v before the convolution": lambda x, raw, x_f, g, qkv: raw.sin(),
    "the gate's input": lambda x, raw, x_f, g, qkv: x_f.sin(),
    "g": lambda x, raw, x_f, g, qkv: g.sin(),
    "the convolution's result": lambda x, raw, x_f, g, qkv: qkv.sin(),
}


@pytest.mark.parametrize("conv", [True, False], ids=["conv", "no conv"])
@pytest.mark.parametrize("what", USED_ELSEWHERE)
def test_a_part_with_another_use(what: str, conv: bool, fusion_on_cpu: None) -> None:
    backend = check(split, USED_ELSEWHERE[what], conv)
    assert "fused_mixer" not in backend.ops[0]
    assert any("fused_scan" in op for op in backend.ops[0])


def test_columns_that_only_others_use(fusion_on_cpu: None) -> None:
    backend = check(split, lambda x, *_: x.split([QKV + N + G, EXTRA], -1)[1].sin())
    assert "fused_mixer" not in backend.ops[0]


def test_a_write_between_the_convolution_and_the_scan(fusion_on_cpu: None) -> None:
    """The op would read x after the write, and the convolution's op would keep what is not there any more."""
    backend = check(slices, write=True)
    assert backend.ops == [["fused_scan_packed"]]
    assert any("`mul_` writes in place" in text for text in backend.records[0].left)


def test_a_write_behind_the_scan(fusion_on_cpu: None) -> None:
    """Nothing of plain code's backward wants the projection any more: each part of it went through a copy."""
    backend = check(
        lambda x: tuple(part * 1 for part in slices(x)),  # type: ignore[return-value]
        lambda x, *_: x.mul_(2),
    )
    assert "fused_mixer" not in backend.ops[0]


def test_without_a_gradient_nothing_changes(fusion_on_cpu: None) -> None:
    backend, model = Rewriting(), Plain(split, None, True)
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(torch.randn(2, 11, D))
    assert backend.ops == [["fused_scan_conv"]]


class Cast(nn.Module):
    """A projection in fp32 under autocast, which rounds q, k and v where the scan reads them, and not f and g."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = Plain(split, None, True)
        self.plain.projection = nn.Identity()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            o: Tensor = self.plain(x)[0]
            return o


def test_under_autocast_a_projection_in_fp32_keeps_f_and_g(fusion_on_cpu: None) -> None:
    backend, model = Rewriting(), Cast()
    x = torch.randn(2, 11, QKV + N + G + EXTRA, requires_grad=True)
    torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x), atol=0.02, rtol=0.02)
    assert "fused_mixer" not in backend.ops[0]
    assert any("would round f and g too" in text for text in backend.records[0].left)


# ---- the product's width --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_width_that_is_padded(
    bias: bool, autocast: bool, fusion_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parameters keep theirs, and so do their gradients. Under autocast the product rounds the padded weight."""
    monkeypatch.setattr(pad_projection, "wants_padding", lambda x: x.shape[-1] % 8 != 0)
    model, backend = Plain(split, None, True), Rewriting()
    model.projection = nn.Linear(D, QKV + N + G + EXTRA, bias=bias)
    assert model.projection.out_features == 57

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            o: Tensor = model(x)[0]
            return o.float()

    results = []
    x = torch.randn(2, 11, D, requires_grad=True)
    for fn in (torch.compile(forward, backend=backend, fullgraph=True), forward):
        y = fn(x)
        grads = torch.autograd.grad(y.square().sum(), [x, *model.parameters()], allow_unused=True)
        results.append([y.detach(), *(torch.zeros(()) if d is None else d for d in grads)])
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape
        limit = 0.05 if autocast else 1e-5
        assert (a - b).norm() <= limit * b.norm()
    assert backend.ops == [["fused_mixer"]]
    after = backend.graphs[0][1]
    assert "functional.pad(l_model_modules_projection_parameters_weight_, (0, 0, 0, 7))" in after
    assert after.count("functional.pad(") == 1 + bias


def test_a_width_that_is_a_symbol_stays(fusion_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are inputs of a dynamic graph."""
    monkeypatch.setattr(pad_projection, "wants_padding", lambda x: x.shape[-1] % 8 != 0)
    model, backend = Plain(slices, None, True), Rewriting()
    model.projection = nn.Linear(D, QKV + N + G + EXTRA, bias=False)
    fn = lambda x, w: torch.func.functional_call(model, {"projection.weight": w}, (x,))[0]
    x, w = torch.randn(2, 11, D), torch.randn(QKV + N + G + EXTRA, D, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = torch.compile(fn, backend=backend, dynamic=True)(x, w)
    torch.testing.assert_close(got, fn(x, w), atol=1e-5, rtol=1e-5)
    assert "fused_mixer" in backend.ops[0]
    assert all("functional.pad(" not in after for _, after in backend.graphs)
    assert not any("failed" in why for record in backend.records for why in record.left)


def test_a_width_of_whole_lines_stays(fusion_on_cpu: None) -> None:
    assert "functional.pad(" not in check(split).graphs[0][1]


@pytest.mark.parametrize(
    "device, dtype, columns, expected",
    [
        ("cuda", torch.bfloat16, 2900, True),
        ("cuda", torch.float16, 2900, True),
        ("cuda", torch.bfloat16, 2904, False),
        ("cuda", torch.float32, 2900, False),
        ("cpu", torch.bfloat16, 2900, False),
    ],
)
def test_which_widths_want_padding(device: str, dtype: torch.dtype, columns: int, expected: bool) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    meta = torch.empty(2, 3, columns, dtype=dtype, device="meta")
    x = FakeTensor(FakeTensorMode(), meta, torch.device(device))
    assert pad_projection.wants_padding(x) == expected
