# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers: generate equals ours, folders round-trip, beams reorder caches, labels give the loss."""

import copy
import dataclasses

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers; pip install 'm2rnn-compile[hf]'")
import transformers
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from m2rnn_compile.models import HybridLM, generate, left_pad, miniature, preset, swap_layer
from m2rnn_compile.models.hf import M2RNNHybridConfig, M2RNNHybridForCausalLM, from_hybrid
from m2rnn_compile.models.weights import load_model, save_model
from tests.layers.equations import assert_same
from tests.models.helpers import make_model

CONFIG = dataclasses.replace(miniature(preset("hybrid-gated-deltanet+5-7b")), pattern="MGA2")


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    ours = make_model(CONFIG, torch.float32)
    return ours, from_hybrid(ours, pad_token_id=0).eval()


def prompt(*shape):
    return torch.randint(1, 256, shape)


def test_logits_and_greedy_generation_are_ours(pair):
    ours, theirs = pair
    x = prompt(2, 7)
    with torch.no_grad():
        assert torch.equal(theirs(x).logits, ours(x))
        assert torch.equal(theirs(x, logits_to_keep=1).logits, ours(x, logits_to_keep=1))
    got = theirs.generate(x, max_new_tokens=8, do_sample=False)
    assert torch.equal(got, generate(ours, x, max_new_tokens=8))
    assert torch.equal(theirs.generate(x, max_new_tokens=8, do_sample=False, use_cache=False), got)


def test_left_padded_batch(pair):
    ours, theirs = pair
    rows = [prompt(6), prompt(3)]
    padded, mask = left_pad(rows)
    got = theirs.generate(padded, attention_mask=mask.long(), max_new_tokens=5, do_sample=False)
    for row, alone in zip(got, rows, strict=True):
        assert torch.equal(row[6:], generate(ours, alone[None], max_new_tokens=5)[0, len(alone) :])


def test_a_left_padded_prompt_can_be_fed_token_by_token(pair):
    """Pads never move a state: one at a time they say so only in the mask, which grows with the tokens."""
    ours, theirs = pair
    rows = [prompt(6), prompt(3)]
    padded, mask = left_pad(rows)
    cache = None
    with torch.no_grad():
        for i in range(6):
            out = theirs(padded[:, i : i + 1], attention_mask=mask[:, : i + 1].long(), past_key_values=cache)
            cache = out.past_key_values
        token = prompt(2, 1)
        out = theirs(token, attention_mask=torch.ones(2, 7), past_key_values=cache)
        for i, row in enumerate(rows):
            assert_same(out.logits[i], ours(torch.cat([row, token[i]])[None])[0, -1:])


def test_beam_search_with_cache_equals_without(pair):
    _, theirs = pair
    x = prompt(2, 5)
    options = dict(max_new_tokens=6, num_beams=3, do_sample=False)
    cached = theirs.generate(x, **options)
    assert torch.equal(cached, theirs.generate(x, **options, use_cache=False))


def test_a_beam_cache_that_is_not_reordered_would_be_seen(pair, monkeypatch):
    _, theirs = pair
    x = prompt(2, 5)
    options = dict(max_new_tokens=12, num_beams=4, do_sample=False)
    expected = theirs.generate(x, **options)
    monkeypatch.setattr("m2rnn_compile.models.hf.HybridCache.reorder_cache", lambda self, rows: None)
    assert not torch.equal(theirs.generate(x, **options), expected)


def test_sampling_returns_several_sequences(pair):
    _, theirs = pair
    torch.manual_seed(0)
    out = theirs.generate(prompt(1, 4), max_new_tokens=4, do_sample=True, top_k=20, num_return_sequences=3)
    assert out.shape == (3, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folders_round_trip_both_ways(tmp_path, pair, dtype):
    ours, theirs = pair
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=dtype)
    assert isinstance(again, M2RNNHybridForCausalLM)
    assert again.dtype == dtype
    for (name, a), (_, b) in zip(again.named_parameters(), ours.named_parameters(), strict=True):
        assert a.dtype == (torch.float32 if "decay_gate" in name else dtype), name
        assert torch.equal(a, b.to(a.dtype)), name
    mine = load_model(tmp_path / "theirs")
    assert mine.config == ours.config
    save_model(ours, tmp_path / "ours", max_shard_bytes=50_000)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    x = prompt(1, 6)
    with torch.no_grad():  # weights that are mapped from a file lie elsewhere in memory: other kernels, other last bits
        assert_same(mine(x), ours(x))
        assert_same(back(x).logits, ours(x))


def test_a_swapped_layer_is_saved_as_it_is(tmp_path):
    """The pattern in config.json is that of the weights beside it, whoever writes and whoever reads."""
    model = from_hybrid(HybridLM(CONFIG)).eval()
    swap_layer(model.lm, 1, "M")
    assert model.config.lm_config == model.lm.config
    assert model.config.lm_config.pattern == "MMA2"
    model.save_pretrained(tmp_path)
    x = prompt(1, 6)
    with torch.no_grad():
        for back in (AutoModelForCausalLM.from_pretrained(tmp_path), load_model(tmp_path)):
            y = back(x)
            assert_same(getattr(y, "logits", y), model(x).logits)


def test_copies_do_not_share_what_they_say_of_themselves():
    model = from_hybrid(HybridLM(CONFIG))
    copied = copy.deepcopy(model)
    swap_layer(copied.lm, 1, "M")
    assert copied.lm.transformer is copied.transformer
    assert (model.config.lm_config.pattern, copied.config.lm_config.pattern) == ("MGA2", "MMA2")


def test_more_tokens(pair, tmp_path):
    """What a fine-tuning with new special tokens does first."""
    ours, _ = pair
    theirs, x = from_hybrid(ours).eval(), prompt(2, 7)
    before = theirs(x).logits
    theirs.resize_token_embeddings(300)
    assert theirs.config.vocab_size == theirs.lm.config.vocab_size == 300
    after = theirs(x).logits
    assert after.shape == (2, 7, 300)
    assert_same(after[..., :256], before)
    theirs.save_pretrained(tmp_path)
    for back in (AutoModelForCausalLM.from_pretrained(tmp_path), load_model(tmp_path)):
        y = back(x)
        assert_same(getattr(y, "logits", y), after)
    theirs.resize_token_embeddings(256)
    assert_same(theirs(x).logits, before)


def test_a_new_model_starts_as_ours_do():
    torch.manual_seed(0)
    model = M2RNNHybridForCausalLM(M2RNNHybridConfig.of(CONFIG))
    layer = model.lm.mixers[0]
    assert torch.equal(layer.state_weight[0], torch.eye(8))
    scaled = 0.02 / (2 * 4) ** 0.5
    assert abs(float(layer.output_projection.weight.detach().std()) - scaled) < 0.15 * scaled
    assert model.num_parameters() == HybridLM(CONFIG, device="meta").num_parameters()


def test_loss_is_that_of_the_next_token_and_reaches_every_weight(pair):
    ours, theirs = pair
    x = prompt(2, 9)
    labels = x.clone()
    labels[0, :4] = -100
    expected = ours.loss(x[:, :-1], labels[:, 1:])
    assert_same(theirs(x, labels=labels).loss, expected)
    theirs.train()
    try:
        loss = theirs(x, labels=labels).loss
        assert loss > expected, "the auxiliary loss of the experts is missing"
        loss.backward()
        assert all(p.grad is not None for p in theirs.parameters())
        items = theirs(x, labels=labels, num_items_in_batch=torch.tensor(1000)).loss
        assert items < loss
    finally:
        theirs.eval().zero_grad()


def test_trainer_learns(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    model = M2RNNHybridForCausalLM(M2RNNHybridConfig.of(CONFIG))
    data = [{"input_ids": row, "labels": row} for row in prompt(1, 12).expand(8, 12)]
    args = TrainingArguments(str(tmp_path), max_steps=8, learning_rate=1e-2, report_to=[], save_strategy="no")
    trainer = Trainer(model, args, train_dataset=data)
    before = float(model(prompt(1, 12), labels=data[0]["labels"][None]).loss)
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] < before


def test_config_defaults_and_unknown_fields():
    assert M2RNNHybridConfig().lm_config == preset("m2rnn-410m")
    config = M2RNNHybridConfig.of(CONFIG, eos_token_id=3)
    assert (config.vocab_size, config.num_hidden_layers, config.eos_token_id) == (256, 4, 3)
    with pytest.raises(ValueError, match=r"unknown field\(s\) \['heads'\]"):
        M2RNNHybridForCausalLM(M2RNNHybridConfig(lm=CONFIG.to_dict() | {"heads": 1}))


def test_the_tested_version_is_the_pinned_one():
    from pathlib import Path

    pinned = (Path(__file__).parents[2] / "constraints.txt").read_text()
    assert f"transformers=={transformers.__version__}" in pinned
