# SPDX-License-Identifier: Apache-2.0
"""Every mixer and the experts under what PyTorch does to modules: right, or refused in so many words."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from m2rnn_compile.layers import MoE
from tests.layers.equations import assert_same
from tests.layers.test_mixers import MIXERS, D, make

# Attention is torch's own op with torch's own messages.
OURS = [name for name in MIXERS if name != "attention"]


def moe():
    torch.manual_seed(0)
    return MoE(D, num_experts=6, top_k=2, expert_size=8, shared_size=8, dtype=torch.float64)


def build(name):
    if name != "moe":
        return make(name)
    layer = moe()
    return torch.nn.Sequential(layer, Output())  # `MoE` returns its auxiliary loss too


class Output(torch.nn.Module):
    def forward(self, out):
        return out.y


def draw():
    return torch.randn(2, 9, D, dtype=torch.float64)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", [*MIXERS, "moe"])
def test_activation_checkpointing_changes_nothing(name, use_reentrant):
    layer, x, dy = build(name), draw().requires_grad_(), draw()
    leaves = [x, *layer.parameters()]
    plain = layer(x)
    expected = torch.autograd.grad(plain, leaves, dy)
    y = checkpoint(layer, x, use_reentrant=use_reentrant)
    y.backward(dy)  # the reentrant kind knows no autograd.grad
    assert torch.equal(y, plain)
    assert all(torch.equal(leaf.grad, g) for leaf, g in zip(leaves, expected, strict=True))


@pytest.mark.parametrize("name", OURS)
def test_differentiating_twice_is_refused(name):
    layer, x = build(name), draw().requires_grad_()
    (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        g.square().sum().backward()


def test_experts_are_differentiable_twice():
    layer, x = moe(), draw()[:1, :3].requires_grad_()
    weights = [layer.c_fc.weight, layer.c_proj.weight, layer.gate.weight]

    def run(x, *given):
        names = ("c_fc.weight", "c_proj.weight", "gate.weight")
        return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x,)).y

    small = [(10 * w).detach().requires_grad_() for w in weights]
    assert torch.autograd.gradgradcheck(run, (x, *small), fast_mode=True)


@pytest.mark.parametrize("name", [*OURS, "moe"])
def test_forward_mode_is_refused_instead_of_zero(name):
    layer, x = build(name), draw()
    with pytest.raises((NotImplementedError, RuntimeError), match=r"forward-mode|jvp"):
        torch.func.jvp(layer, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises((NotImplementedError, RuntimeError), match=r"forward-mode|jvp"):
            layer(dual)


@pytest.mark.parametrize("name", MIXERS)
def test_forward_mode_of_packed_sequences_is_refused_instead_of_zero(name):
    """Attention's calls are torch's own in eager mode, and an op of ours under torch.compile."""
    layer, x, bounds = build(name), draw()[:1], torch.tensor([0, 3, 3, 9])
    run = lambda x: torch.func.jvp(lambda x: layer(x, cu_seqlens=bounds), (x,), (x,))
    for call in (run, torch.compile(run, backend="eager")):
        with pytest.raises((NotImplementedError, RuntimeError), match=r"forward-mode|jvp|forward AD"):
            call(x)


@pytest.mark.parametrize("name", OURS)
def test_func_grad_is_refused(name):
    layer = build(name)
    with pytest.raises(NotImplementedError, match=r"torch\.func\.grad.*torch\.autograd\.grad"):
        torch.func.grad(lambda x: layer(x).sum())(draw())


@pytest.mark.parametrize("name", OURS)
def test_vmap_equals_a_loop(name):
    layer, x = build(name), torch.stack([draw() for _ in range(3)])
    assert_same(torch.vmap(layer)(x), torch.stack([layer(row) for row in x]))


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("name", MIXERS)
def test_what_a_pad_holds_does_not_matter(name, cached):
    layer, x, mask = build(name), draw(), torch.arange(9)[None] >= torch.tensor([[4], [0]])
    results = []
    for filling in (0.0, float("nan"), float("inf")):
        leaf = x.masked_fill(~mask[:, :, None], filling).requires_grad_()
        y = layer(leaf, attention_mask=mask, cache=layer.init_cache(2) if cached else None)
        y, cache = y if cached else (y, ())
        assert y.isfinite().all()
        wanted = [leaf, *layer.parameters()]
        results.append([y, *cache, *torch.autograd.grad(y[mask].square().sum(), wanted)])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("name", MIXERS)
def test_nan_in_one_row_stays_there_and_strides_do_not_matter(name):
    layer, x = build(name), draw()
    expected = layer(x)
    bad = x.clone()
    bad[0, 4] = float("nan")
    y = layer(bad)
    assert torch.equal(y[1], expected[1])
    assert y[0, 4:].isnan().any()
    bounds = torch.tensor([0, 9, 18])
    packed, packed_bad = (t.view(1, 18, D).clone().requires_grad_() for t in (x, bad))
    ys = [layer(t, cu_seqlens=bounds) for t in (packed, packed_bad)]
    assert torch.equal(ys[1][0, 9:], ys[0][0, 9:])
    dxs = [torch.autograd.grad(y.sum(), t)[0] for y, t in zip(ys, (packed, packed_bad), strict=True)]
    assert torch.equal(dxs[1][0, 9:], dxs[0][0, 9:])
    wide = torch.stack([x, x + 1], -1)[..., 0]
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(layer(wide), expected)
    assert torch.equal(layer(turned), expected)
    assert_same(layer(x[:1].expand(2, -1, -1)), expected[:1].expand(2, -1, -1))
