# SPDX-License-Identifier: Apache-2.0
"""The causal conv: torch's conv1d is the oracle."""

import pytest
import torch
import torch.nn.functional as F

from m2rnn_compile.layers import CausalConv
from tests.layers.equations import assert_same

C = 6


def conv1d(weight, x):
    width = weight.shape[-1]
    return F.conv1d(x.transpose(1, 2), weight, padding=width - 1, groups=weight.shape[0])[..., : x.shape[1]].transpose(
        1, 2
    )


def make(width=4):
    conv = CausalConv(C, width, dtype=torch.float64)
    torch.nn.init.normal_(conv.weight)
    return conv


def cu(lengths, dtype=torch.int32):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=dtype)


@pytest.mark.parametrize("T", [1, 2, 3, 4, 17])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_equals_conv1d_in_value_and_gradient(T, width):
    conv, x, dy = (
        make(width),
        torch.randn(2, T, C, dtype=torch.float64, requires_grad=True),
        torch.randn(2, T, C).double(),
    )
    y, state = conv(x)
    assert state is None
    expected = conv1d(conv.weight, x)
    assert_same(y, expected)
    for a, b in zip(*(torch.autograd.grad(o, [x, conv.weight], dy) for o in (y, expected)), strict=True):
        assert_same(a, b)


def test_no_steps():
    y, state = make()(torch.zeros(2, 0, C).double(), output_final_state=True)
    assert y.shape == (2, 0, C)
    assert state.shape == (2, 3, C)


@pytest.mark.parametrize("cuts", [[1] * 9, [2, 7], [4, 4, 1], [0, 9], [9, 0]])
def test_state_carries_over_calls(cuts):
    conv, x = make(), torch.randn(2, 9, C).double()
    state, ys = torch.zeros(2, 3, C).double(), []
    for part in x.split(cuts, 1):
        before = state.clone()
        y, new = conv(part, state=state, output_final_state=True)
        assert torch.equal(state, before), "the state passed in was modified"
        state = new
        ys.append(y)
    assert_same(torch.cat(ys, 1), conv(x)[0])
    assert torch.equal(state, x[:, -3:])
    assert state.untyped_storage().nbytes() == state.numel() * 8, "the state is a view into a larger buffer"


@pytest.mark.parametrize("lengths", [[5, 4], [1, 2, 3, 3], [0, 5, 0, 0, 4, 0], [9]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_equals_separate(lengths, dtype, with_state):
    conv, x = make(), torch.randn(1, 9, C).double().requires_grad_()
    state = torch.randn(len(lengths), 3, C).double().requires_grad_() if with_state else None
    y, final = conv(x, state=state, cu_seqlens=cu(lengths, dtype), output_final_state=True)
    parts = []
    for s, part in enumerate(x.split(lengths, 1)):
        parts.append(conv(part, state=None if state is None else state[s : s + 1], output_final_state=True))
    y_separate, final_separate = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts])
    assert_same(y, y_separate)
    assert_same(final, final_separate)
    leaves = [x, conv.weight] + ([] if state is None else [state])
    dy, dfinal = torch.randn_like(y), torch.randn_like(final)
    for a, b in zip(
        torch.autograd.grad([y, final], leaves, [dy, dfinal]),
        torch.autograd.grad([y_separate, final_separate], leaves, [dy, dfinal]),
        strict=True,
    ):
        assert_same(a, b)


def test_packed_leak_would_be_seen():
    """The comparison above can fail: one call over the whole row leaks over the boundary."""
    conv, x = make(), torch.randn(1, 9, C).double()
    with pytest.raises(AssertionError, match="differs by"):
        assert_same(conv(x)[0], conv(x, cu_seqlens=cu([5, 4]))[0])


def test_left_padding_is_no_input():
    conv, x = make(), torch.randn(1, 5, C).double()
    padded = torch.cat([torch.full((1, 4, C), 7.0).double(), x], 1)
    mask = torch.tensor([[0] * 4 + [1] * 5])
    y, state = conv(padded, attention_mask=mask, output_final_state=True)
    assert torch.equal(y[:, 4:], conv(x)[0])
    assert not y[:, :4].any()
    assert torch.equal(state, x[:, -3:])


def test_low_precision_sums_in_fp32():
    x = torch.randn(2, 33, C)
    conv = CausalConv(C, dtype=torch.bfloat16)
    torch.nn.init.normal_(conv.weight)
    y, _ = conv(x.bfloat16())
    exact = conv1d(conv.weight.double(), x.bfloat16().double())
    assert y.dtype == torch.bfloat16
    # one rounding to bf16 (half an eps relative), fp32 sums being exact beside it
    assert ((y.double() - exact).abs() <= 0.51 * torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-6).all()


@pytest.mark.parametrize(
    "x, options, message",
    [
        ((2, 4, 1), {}, r"`x_BTC` must have shape \[B, T, 6\], got \(2, 4, 1\)"),  # would broadcast
        ((4, 6), {}, "`x_BTC` must have shape"),
        ((2, 4, 6), dict(state=torch.zeros(1, 3, 6)), r"`state` must have shape \(2, 3, 6\).*got \(1, 3, 6\)"),
        ((2, 4, 6), dict(state=torch.zeros(2, 2, 6)), r"`state` must have shape \(2, 3, 6\).*got \(2, 2, 6\)"),
        ((1, 4, 6), dict(state=torch.zeros(1, 3, 6), cu_seqlens=cu([1, 3])), r"`state` must have shape \(2, 3, 6\)"),
        ((1, 4, 6), dict(cu_seqlens=cu([3])), "from 0 to T = 4, got first = 0, last = 3"),
        ((1, 4, 6), dict(cu_seqlens=cu([3, -1, 2])), "must not decrease"),
    ],
)
def test_errors(x, options, message):
    with pytest.raises(ValueError, match=message):
        CausalConv(C)(torch.zeros(x), **options)
