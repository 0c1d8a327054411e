# SPDX-License-Identifier: Apache-2.0
"""Swapping one layer: what changes is named, everything else is the same tensor."""

import dataclasses
import json

import pytest
import torch

from m2rnn_compile.layers import M2RNN, GatedDeltaNet, param_groups
from m2rnn_compile.models import (
    GatedDeltaNetConfig,
    HybridLM,
    LMConfig,
    M2RNNConfig,
    Mamba2Config,
    miniature,
    preset,
    swap_layer,
)
from m2rnn_compile.models.lm_engine import RowOrders, config_from_released, config_to_released

CONFIG = dataclasses.replace(miniature(preset("hybrid-gated-deltanet-410m"), layers=6))
SMALL = GatedDeltaNetConfig(num_heads=2, key_dim=16, value_dim=16)
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


def by_name(model, optimizer):
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: entry for p, entry in optimizer.state.items()}


@pytest.mark.parametrize("grouped", [True, False], ids=["param_groups", "one group"])
def test_the_optimizers_state_fits_one_made_afresh(grouped):
    """`state_dict` knows parameters by their place in the groups only."""
    make = lambda m: torch.optim.AdamW(param_groups(m, 0.1) if grouped else m.parameters(), 1e-3, weight_decay=0.0)
    model = HybridLM(CONFIG)
    optimizer = make(model)
    for layer in (None, 2, 0):
        if layer is not None:
            swap_layer(model, layer, "M", optimizer=optimizer)
        model.loss(TOKENS, TOKENS).backward()
        optimizer.step()
        optimizer.zero_grad()
    other = HybridLM(model.config)
    fresh = make(other)
    fresh.load_state_dict(optimizer.state_dict())
    got, expected = by_name(other, fresh), by_name(model, optimizer)
    assert got.keys() == expected.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(got[n][key], x) for n in got for key, x in expected[n].items())
    names = [g.get("param_names") for g in optimizer.param_groups]
    assert names == [g.get("param_names") for g in make(other).param_groups]


def layerwise(model, weight_decay=0.1, grouping=param_groups):
    """As many groups as layers have, and a learning rate for each layer; the embedding's group is the first."""
    groups = [dict(params=[model.transformer.wte.weight], lr=1e-2, weight_decay=weight_decay)]
    for i, block in enumerate(model.transformer.h):
        own = [{k: v for k, v in g.items() if k != "param_names"} for g in grouping(block, weight_decay)]
        groups += [g | {"lr": 10.0 ** -(i + 3)} for g in own]
    return torch.optim.AdamW([*groups, dict(params=[model.transformer.ln_f.weight], lr=1e-2, weight_decay=0.0)])


def by_dimensions(module, weight_decay):
    """Matrices, other tensors, vectors: the decayed ones are in two groups."""
    parts = [[p for p in module.parameters() if min(p.dim(), 4) in dims] for dims in ((2,), (3, 4), (0, 1))]
    return [dict(params=p, weight_decay=weight_decay if p[0].dim() > 1 else 0.0) for p in parts]


@pytest.mark.parametrize("layer", [1, 4], ids=["G", "A"])
@pytest.mark.parametrize("weight_decay", [0.1, 0.0])
def test_layer_wise_groups_keep_their_layers(layer, weight_decay):
    """Attention has no parameters without decay: those of the new layer join its block's norms."""
    model = HybridLM(CONFIG)
    optimizer = layerwise(model, weight_decay)
    assert len(optimizer.param_groups) == 14
    swap_layer(model, layer, "M", optimizer=optimizer)
    other = HybridLM(model.config)
    fresh = layerwise(other, weight_decay)
    names = [{id(p): n for n, p in m.named_parameters()} for m in (model, other)]
    got, expected = (
        [([n[id(p)] for p in g["params"]], g["lr"], g["weight_decay"]) for g in o.param_groups]
        for n, o in zip(names, (optimizer, fresh), strict=True)
    )
    assert got == expected
    model.loss(TOKENS, TOKENS).backward()
    optimizer.step()
    fresh.load_state_dict(optimizer.state_dict())


def test_three_groups_a_layer_keep_their_kinds_of_tensors():
    model = HybridLM(dataclasses.replace(CONFIG, pattern="GGG"))
    optimizer = layerwise(model, 0.1, by_dimensions)
    swap_layer(model, 1, "M", optimizer=optimizer)
    mixer = model.mixers[1]
    place = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
    assert place[id(mixer.state_weight)] == place[id(mixer.conv1d.weight)] == 5
    assert place[id(mixer.output_projection.weight)] == 4
    assert place[id(mixer.decay_gate.A_log)] == place[id(mixer.g_norm.weight)] == 6


def test_groups_that_could_all_be_meant_are_refused():
    model = HybridLM(CONFIG)
    optimizer = torch.optim.AdamW([dict(params=[p]) for p in model.parameters()], lr=1e-3, weight_decay=0.0)
    before = list(model.parameters())
    with pytest.raises(ValueError, match=r"groups 2, 3, 8 of the optimizer hold parameters like 'input_projection.w"):
        swap_layer(model, 0, "M", optimizer=optimizer)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert [g["params"][0] for g in optimizer.param_groups] == before
    swap_layer(model, 0, "G", optimizer=optimizer)  # each of the new ones has an old one of its name
    assert all(g["params"][0] is p for g, p in zip(optimizer.param_groups, model.parameters(), strict=True))


@pytest.mark.parametrize("kind", [torch.optim.Rprop, torch.optim.RMSprop, torch.optim.Adafactor])
def test_optimizers_that_know_no_weight_decay(kind):
    model = HybridLM(CONFIG)
    optimizer = kind(model.parameters())
    swap_layer(model, 0, "M", optimizer=optimizer)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    model.loss(TOKENS, TOKENS).backward()
    optimizer.step()


def test_an_optimizer_of_one_vector_is_refused():
    model = HybridLM(CONFIG)
    with pytest.raises(ValueError, match=r"LBFGS keeps one vector of all parameters.*make a new LBFGS"):
        swap_layer(model, 0, "M", optimizer=torch.optim.LBFGS(model.parameters()))
    assert model.config.pattern == "GGGGAG"


@pytest.mark.parametrize("layer", [1, 4], ids=["G", "A"])
def test_several_optimizers(layer):
    """Muon takes matrices only."""
    model = HybridLM(CONFIG)
    matrix = lambda n, p: p.dim() == 2 and n.endswith(("projection.weight", "proj.weight", "c_attn.weight"))
    split = lambda m, wanted: [p for n, p in m.named_parameters() if matrix(n, p) == wanted]
    muon = torch.optim.Muon(split(model, True), lr=1e-3, weight_decay=0.0)
    adamw = torch.optim.AdamW(split(model, False), lr=1e-3, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"no group that takes 'state_weight' \(3 dim.*several optimizers give al"):
        swap_layer(model, layer, "M", optimizer=muon)
    swap_layer(model, layer, "M", optimizer=(muon, adamw))
    held = [p for o in (muon, adamw) for g in o.param_groups for p in g["params"]]
    assert len(held) == len(list(model.parameters()))
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    mixer, matrices = model.mixers[layer], {id(p) for p in muon.param_groups[0]["params"]}
    assert {id(mixer.input_projection.weight), id(mixer.output_projection.weight)} <= matrices
    assert not {id(mixer.state_weight), id(mixer.conv1d.weight), id(mixer.decay_gate.A_log), id(mixer.D)} & matrices
    model.loss(TOKENS, TOKENS).backward()
    muon.step()
    adamw.step()


def test_names_are_those_of_the_model_where_blocks_are_compiled():
    model = HybridLM(CONFIG)
    for i in range(model.config.num_layers):
        model.transformer.h[i] = torch.compile(model.transformer.h[i], backend="eager")
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), lr=1e-3)
    before = {n for n, _ in model.named_parameters()}
    swap = swap_layer(model, 1, "M", optimizer=optimizer)
    after = {n for n, _ in model.named_parameters()}
    assert after - before <= set(swap.added) <= after
    assert before - after <= set(swap.removed) <= before
    assert all(n.startswith("transformer.h.1._orig_mod.sequence_mixer.") for n in swap.added + swap.removed)
    assert {n for g in optimizer.param_groups for n in g["param_names"]} == after


def test_an_order_of_ones_own_is_kept():
    """Then the new parameters come last, and the keys of torch.distributed.checkpoint are what tells them apart."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = HybridLM(CONFIG)
    optimizer = torch.optim.AdamW(reversed(list(model.parameters())), lr=1e-3, weight_decay=0.0)
    kept = [p for p in reversed(list(model.parameters())) if all(p is not q for q in model.mixers[2].parameters())]
    swap_layer(model, 2, "M", optimizer=optimizer)
    assert all(a is b for a, b in zip(kept, optimizer.param_groups[0]["params"], strict=False))
    model.loss(TOKENS, TOKENS).backward()
    optimizer.step()
    other = HybridLM(model.config)
    fresh = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.0)
    set_optimizer_state_dict(other, fresh, get_optimizer_state_dict(model, optimizer))
    got, expected = by_name(other, fresh), by_name(model, optimizer)
    assert all(torch.equal(got[n][key], x) for n in expected for key, x in expected[n].items())


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


@pytest.mark.parametrize("name", ["gated-deltanet-7b", "gated-deltanet-410m", "m2rnn-7b", "softmax-410m"])
@pytest.mark.parametrize("letter", "MGA")
def test_a_kind_that_a_released_file_does_not_hold_gets_the_sizes_of_the_model(name, letter):
    """Such a file says nothing about it; the presets do."""
    expected = dataclasses.replace(preset(name), attention=preset("hybrid-m2rnn-" + name.split("-")[-1]).attention)
    if letter in preset(name).pattern:
        expected = preset(name)
    config = config_from_released(config_to_released(preset(name), RowOrders()))
    model = HybridLM(config, device="meta")
    swap_layer(model, 2, letter)
    expected = HybridLM(dataclasses.replace(expected, pattern=model.config.pattern), device="meta")
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in expected.named_parameters()}
    assert HybridLM(model.config, device="meta").num_parameters() == model.num_parameters()


def test_sizes_that_are_not_known_are_asked_for():
    model = HybridLM(LMConfig(vocab_size=256, hidden_size=48, mlp_size=64, pattern="GG", gated_deltanet=SMALL))
    before = list(model.parameters())
    with pytest.raises(ValueError, match=r"the paper has none of hidden size 48; give them.*sizes=M2RNNConfig\(num_h"):
        swap_layer(model, 0, "M")
    with pytest.raises(ValueError, match=r"hidden size 1536; give them, for example sizes=Mamba2Config"):
        swap_layer(HybridLM(preset("m2rnn-7b"), device="meta"), 0, "2")
    with pytest.raises(TypeError, match="`sizes` of a layer 'M' must be a M2RNNConfig, got Mamba2Config"):
        swap_layer(model, 0, "M", sizes=Mamba2Config())
    with pytest.raises(ValueError, match="all layers 'G' of a model have the same sizes"):
        swap_layer(model, 0, "G", sizes=GatedDeltaNetConfig(num_heads=3))
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    sizes = M2RNNConfig(num_heads=3, key_dim=8, value_dim=8)
    swap_layer(model, 0, "M", sizes=sizes)
    assert model.config.m2rnn == sizes
    assert model.mixers[0].state_weight.shape == (3, 8, 8)
    swap_layer(model, 1, "M")  # as the first
    assert model.mixers[1].state_weight.shape == (3, 8, 8)


@pytest.mark.parametrize("hidden_size", [48, 1536])
def test_the_only_layer_of_its_kind_is_made_again_with_its_own_sizes(hidden_size):
    """Also where they are the defaults, which are the 410M's."""
    config = LMConfig(vocab_size=256, hidden_size=hidden_size, mlp_size=64, pattern="GM", gated_deltanet=SMALL)
    model = HybridLM(config, device="meta")
    swap_layer(model, 1, "M")
    assert model.config == config
    assert model.mixers[1].state_weight.shape == (84, 16, 16)
    swap_layer(model, 1, "M", sizes=M2RNNConfig(num_heads=3))  # it has no others that must be alike
    assert model.mixers[1].state_weight.shape == (3, 16, 16)


def test_a_kind_that_went_out_comes_back_as_large():
    config = LMConfig(vocab_size=256, hidden_size=1536, mlp_size=64, pattern="GA", gated_deltanet=SMALL)
    model = HybridLM(config, device="meta")
    shapes = {n: p.shape for n, p in model.named_parameters()}
    swap_layer(model, 1, "G")
    kept = LMConfig.from_dict(json.loads(json.dumps(model.config.to_dict())))
    assert kept == model.config == dataclasses.replace(config, pattern="GG")
    for again in (model, HybridLM(kept, device="meta")):  # the second from a file
        swap_layer(again, 1, "G")
        swap_layer(again, 1, "A")
        assert again.config.attention.num_heads == 16  # the paper has 24 of this width
        assert {n: p.shape for n, p in again.named_parameters()} == shapes
        assert again.config.to_dict() == config.to_dict()


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


@pytest.mark.parametrize(
    "cache, error, message",
    [
        ((), ValueError, "one entry for each of the 6 layers, got 0"),
        ((None,) * 6, TypeError, "`cache` holds no tensors"),
        (torch.zeros(2), TypeError, "tuple with one cache a layer.*or a HybridCache, got Tensor"),
    ],
)
def test_a_cache_that_does_not_fit_leaves_the_model_and_the_optimizer(cache, error, message):
    model, optimizer = trained()
    before = list(model.parameters()), [list(g["params"]) for g in optimizer.param_groups]
    with pytest.raises(error, match=message):
        swap_layer(model, 0, "M", optimizer=optimizer, cache=cache)
    assert model.config.pattern == "GGGGAG"
    after = list(model.parameters()), [g["params"] for g in optimizer.param_groups]
    for old, new in zip(torch.utils._pytree.tree_leaves(before), torch.utils._pytree.tree_leaves(after), strict=True):
        assert old is new


def test_the_cache_of_transformers_is_taken():
    pytest.importorskip("transformers")
    from m2rnn_compile.models.hf import HybridCache, from_hybrid

    model = from_hybrid(HybridLM(CONFIG)).eval()
    with torch.no_grad():
        cache = model(TOKENS).past_key_values
        before = cache.layers
        swapped = swap_layer(model.lm, 1, "M", cache=cache).cache
        assert isinstance(swapped, HybridCache)
        assert swapped.get_seq_length() == 9
        assert cache.layers is before
        assert not swapped.layers[1].state.any()
        assert all(a is b for i, (a, b) in enumerate(zip(swapped.layers, before, strict=True)) if i != 1)
        assert model(TOKENS[:, :1], past_key_values=swapped).logits.isfinite().all()
    empty = HybridCache()
    assert swap_layer(model.lm, 1, "G", cache=empty).cache is empty


def test_an_optimizer_without_weight_decay():
    model = HybridLM(CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    swap_layer(model, 0, "M", optimizer=optimizer)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
