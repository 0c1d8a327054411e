# SPDX-License-Identifier: Apache-2.0
"""Swapping one layer: what changes is named, everything else is the same tensor."""

import dataclasses

import pytest
import torch

from m2rnn_compile.layers import M2RNN, GatedDeltaNet, param_groups
from m2rnn_compile.models import HybridLM, miniature, preset, swap_layer

CONFIG = dataclasses.replace(miniature(preset("hybrid-gated-deltanet-410m"), layers=6))
TOKENS = torch.randint(0, 256, (2, 9))


def trained(config=CONFIG, weight_decay=0.1):
    model = HybridLM(config)
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay), lr=1e-3)
    model.loss(TOKENS, TOKENS).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def test_everything_else_is_kept():
    model, optimizer = trained()
    before = {n: (p, p.detach().clone(), optimizer.state[p]) for n, p in model.named_parameters()}
    with torch.no_grad():
        _, cache = model(TOKENS, cache=model.init_cache(2))
    swap = swap_layer(model, 0, "M", optimizer=optimizer, cache=cache)
    assert isinstance(model.mixers[0], M2RNN)
    assert model.config.pattern == swap.pattern == "MGGGAG"
    after = dict(model.named_parameters())
    assert set(before) - set(after) <= set(swap.removed)
    assert set(after) - set(before) <= set(swap.added)
    for name, p in after.items():
        if name not in swap.added:
            assert p is before[name][0]
            assert torch.equal(p, before[name][1])
            assert optimizer.state[p] is before[name][2]
    assert swap.difference == sum(p.numel() for n, p in after.items() if n in swap.added) - sum(
        before[n][1].numel() for n in swap.removed
    )
    assert swap.parameters == model.num_parameters()
    assert all(a is b for a, b in zip(swap.cache[1:], cache[1:], strict=True))
    assert not swap.cache[0].state.any()
    assert str(swap).startswith("layer 0: Gated DeltaNet -> M²RNN; pattern MGGGAG; 7 tensors out, 8 in")


def test_the_optimizer_goes_on_with_the_right_groups():
    model, optimizer = trained()
    swap_layer(model, 2, "M", optimizer=optimizer)
    grouped = [p for g in optimizer.param_groups for p in g["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
    assert len(grouped) == len(list(model.parameters()))
    assert set(optimizer.state) <= set(model.parameters())
    expected = {n: g["weight_decay"] for g in param_groups(model, 0.1) for n in g["param_names"]}
    assert {n: g["weight_decay"] for g in optimizer.param_groups for n in g["param_names"]} == expected
    old = [p.detach().clone() for p in model.parameters()]
    model.loss(TOKENS, TOKENS).backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(old, model.parameters(), strict=True))


def test_the_new_layer_starts_as_the_paper_says_and_follows_dtype_and_mode():
    model = HybridLM(CONFIG, dtype=torch.bfloat16).eval()
    swap_layer(model, 3, "M")
    layer = model.mixers[3]
    assert layer.output_projection.weight.dtype == torch.bfloat16
    assert not layer.training
    assert torch.equal(layer.state_weight[0], torch.eye(8, dtype=torch.bfloat16))
    expected = 0.02 / (2 * 6) ** 0.5
    assert abs(float(layer.output_projection.weight.detach().float().std()) - expected) < 0.15 * expected
    swap_layer(model, 3, "G")
    assert isinstance(model.mixers[3], GatedDeltaNet)


def test_swapping_back_the_weights_gives_the_same_model():
    model = HybridLM(CONFIG)
    with torch.no_grad():
        expected = model(TOKENS)
        weights = {n: p.clone() for n, p in model.mixers[1].state_dict().items()}
        swap_layer(model, 1, "M")
        assert not torch.equal(model(TOKENS), expected)
        swap_layer(model, 1, "G")
        model.mixers[1].load_state_dict(weights)
        assert torch.equal(model(TOKENS), expected)


def test_a_plus_one_preset_is_a_swapped_hybrid():
    model = HybridLM(preset("hybrid-gated-deltanet-410m"), device="meta")
    swap_layer(model, 0, "M")
    assert model.config == preset("hybrid-gated-deltanet+1-410m")
    assert model.num_parameters() == HybridLM(model.config, device="meta").num_parameters()


def test_errors():
    model, optimizer = trained()
    with pytest.raises(IndexError, match="`index` must be from 0 to 5, got 6"):
        swap_layer(model, 6, "M")
    for index in (True, 1.0, "1", None):
        with pytest.raises(TypeError, match=f"`index` must be an integer from 0 to 5, got {index!r}"):
            swap_layer(model, index, "A")
    with pytest.raises(ValueError, match="no mixer has the letter 'Z'"):
        swap_layer(model, 0, "Z")
    before = list(model.parameters())
    optimizer.param_groups = optimizer.param_groups[:1]
    with pytest.raises(ValueError, match=r"no group without weight decay.*layers.param_groups"):
        swap_layer(model, 0, "M", optimizer=optimizer)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert model.config.pattern == "GGGGAG"


def test_an_optimizer_without_weight_decay():
    model = HybridLM(CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    swap_layer(model, 0, "M", optimizer=optimizer)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
