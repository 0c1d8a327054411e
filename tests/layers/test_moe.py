# SPDX-License-Identifier: Apache-2.0
"""The mixture of experts against a loop over tokens and experts; the grouped product it stands on."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from m2rnn_compile.layers import MoE
from m2rnn_compile.layers.grouped_mm import grouped_linear
from tests.layers.equations import assert_same

D = 12


def make(dtype=torch.float64, **options):
    moe = MoE(D, num_experts=6, top_k=2, expert_size=10, shared_size=8, dtype=dtype, **options)
    with torch.no_grad():
        for p in moe.parameters():
            p.mul_(15)
    return moe


def written_out(moe, x):
    """Token by token, expert by expert; and the auxiliary loss."""
    tokens = x.flatten(0, 1)
    ys, counts = [], torch.zeros(moe.num_experts).double()
    for t in tokens:
        logits = moe.gate.weight @ t
        best = logits.argsort(descending=True)[: moe.top_k]
        weights = logits[best].softmax(0) if moe.normalize_top_k else logits.softmax(0)[best]
        y = torch.zeros_like(t)
        for w, e in zip(weights, best, strict=True):
            counts[e] += 1
            up, gate = (moe.c_fc.weight[e] @ t).chunk(2)
            y = y + w * (moe.c_proj.weight[e] @ (up * F.silu(gate)))
        if moe.has_shared:
            up, gate = (moe.c_fc_shared.weight @ t).chunk(2)
            y = y + moe.c_proj_shared.weight @ (up * F.silu(gate))
        ys.append(y)
    logits = tokens @ moe.gate.weight.T
    share = counts / counts.sum()
    aux = moe.num_experts * (logits.softmax(-1).mean(0) * share).sum()
    return torch.stack(ys).view_as(x), aux + 0.1 * logits.logsumexp(-1).square().mean()


@pytest.mark.parametrize("options", [{}, dict(normalize_top_k=False)], ids=["normalised", "softmax"])
def test_equals_a_loop_over_experts_with_gradients(options):
    moe, x = make(**options), torch.randn(2, 9, D).double().requires_grad_()
    got, expected = moe(x), written_out(moe, x)
    assert_same(got.y, expected[0])
    assert_same(got.aux_loss, expected[1])
    dy = torch.randn_like(x)
    leaves = [x, *moe.parameters()]
    grads = [torch.autograd.grad((y, aux), leaves, (dy, torch.tensor(0.7).double())) for y, aux in (got, expected)]
    for pair in zip(*grads, strict=True):
        assert_same(*pair)


def test_no_shared_expert_and_no_loss_in_eval_mode():
    moe = MoE(D, num_experts=4, top_k=4, expert_size=3, shared_size=0, dtype=torch.float64).eval()
    x = torch.randn(1, 5, D).double()
    got = moe(x)
    assert got.aux_loss is None
    assert_same(got.y, written_out(moe, x)[0])
    assert moe(x[:, :0]).y.shape == (1, 0, D)


def test_padding_is_left_out_of_the_loss():
    moe, x = make(), torch.randn(2, 6, D).double()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    assert_same(moe(x, attention_mask=mask).aux_loss, written_out(moe, x[mask][None])[1])


def test_even_use_costs_one():
    """Of the balance term alone: the z-loss is separate."""
    moe = make()
    logits = torch.zeros(6, 6).double()
    experts = torch.stack([torch.arange(6), (torch.arange(6) + 1) % 6], 1)
    z = 0.1 * logits.logsumexp(-1).square().mean()
    assert_same(moe._aux_loss(logits, experts, None) - z, torch.tensor(1.0).double())


def test_compiled_without_graph_breaks_at_most_twice():
    moe = make(torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moe, fullgraph=True, backend=counter)
    for T in (16, 5, 33, 64, 2, 65, 7, 100, 31, 12):
        x = torch.randn(2, T, D, requires_grad=True)
        got, expected = compiled(x), moe(x)
        assert_same(got.y, expected.y)
        grads = [torch.autograd.grad(o.y.sum() + o.aux_loss, [x, *moe.parameters()]) for o in (got, expected)]
        for pair in zip(*grads, strict=True):
            assert_same(*pair)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("sizes", [(10, 16), (7, 5)], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_grouped_linear_with_empty_groups(dtype, sizes):
    check_grouped_linear(dtype, sizes, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(64, 128), (7, 5)], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_linear_on_a_gpu(dtype, sizes):
    check_grouped_linear(dtype, sizes, "cuda")


def check_grouped_linear(dtype, sizes, device):
    I, O = sizes
    counts = [0, 5, 0, 9, 1, 0]
    x = torch.randn(15, I, device=device).to(dtype).requires_grad_()
    W = torch.randn(6, O, I, device=device).to(dtype).requires_grad_()
    ends = torch.tensor(counts, device=device).cumsum(0).int()
    y = grouped_linear(x, W, ends)
    dy = torch.randn(O, 15, device=device).to(dtype).T  # not contiguous
    got = (y, *torch.autograd.grad(y, [x, W], dy))
    wide = [t.detach().double() for t in (x, W, dy)]
    expected = [torch.zeros_like(t, dtype=torch.float64) for t in got]
    start = 0
    for e, n in enumerate(counts):
        rows = slice(start, start + n)
        expected[0][rows] = wide[0][rows] @ wide[1][e].T
        expected[1][rows] = wide[2][rows] @ wide[1][e]
        expected[2][e] = wide[2][rows].T @ wide[0][rows]
        start += n
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).abs().max() <= 20 * torch.finfo(dtype).eps * b.abs().max()


def test_opcheck():
    x, W = torch.randn(4, 8, requires_grad=True), torch.randn(2, 8, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.m2rnn.grouped_linear.default, (x, W, torch.tensor([1, 4]).int()))


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="`top_k` must be at most `num_experts` = 4, got 5"):
        MoE(D, num_experts=4, top_k=5)
    with pytest.raises(ValueError, match="`num_experts` must be at least 1"):
        MoE(D, num_experts=0)
