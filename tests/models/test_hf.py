# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers: generate equals ours, folders round-trip, beams reorder caches, labels give the loss."""

import copy
import dataclasses

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers; pip install 'm2rnn-compile[hf]'")
import transformers
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainingArguments

from m2rnn_compile.layers import param_groups
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


def test_a_second_turn_with_padding_of_its_own(pair):
    """The mask of both turns has a gap then, which only a cache can bridge."""
    ours, theirs = pair
    first, second, mask = prompt(2, 5), prompt(2, 4), torch.ones(2, 9, dtype=torch.int64)
    mask[0, 5:7] = 0
    options = dict(max_new_tokens=4, do_sample=False)
    both, cache = torch.cat([first, second], 1), theirs(first).past_key_values
    got = theirs.generate(both, attention_mask=mask, past_key_values=cache, **options)[:, 9:]
    for row, real in ((0, both[0][mask[0] == 1]), (1, both[1])):
        assert torch.equal(got[row], generate(ours, real[None], max_new_tokens=4)[0, len(real) :])
    for cached in (True, False):
        with pytest.raises(ValueError, match="has a gap: in a row 1 comes again"):
            theirs.generate(both, attention_mask=mask, use_cache=cached, **options)


def test_padding_on_the_right_needs_that_there_is_no_cache(pair):
    ours, theirs = pair
    x, mask = prompt(2, 6), torch.tensor([[1] * 4 + [0] * 2, [1] * 6])
    with torch.no_grad():
        out = theirs(x, attention_mask=mask)
        assert_same(out.logits[0, :4], ours(x[:1, :4])[0])
        assert out.past_key_values is None
        labelled = theirs(x, attention_mask=mask, labels=x.masked_fill(mask == 0, -100)).loss
        assert_same(labelled, theirs(x, labels=x.masked_fill(mask == 0, -100)).loss)
        for options in (dict(use_cache=True), dict(past_key_values=theirs(x).past_key_values)):
            with pytest.raises(ValueError, match="padding on the right"):
                theirs(x, attention_mask=mask, **options)


def test_a_cache_is_used_though_none_is_wanted_back(pair):
    ours, theirs = pair
    x = prompt(2, 6)
    with torch.no_grad():
        out = theirs(x[:, 4:], past_key_values=theirs(x[:, :4]).past_key_values, use_cache=False)
        assert_same(out.logits, ours(x)[:, 4:])
    assert out.past_key_values is None


def test_hidden_states(pair):
    ours, theirs = pair
    x = prompt(2, 6)
    with torch.no_grad():
        out = theirs(x, output_hidden_states=True)
        assert torch.equal(out.hidden_states[0], ours.transformer.wte(x))
        for i, block in enumerate(ours.transformer.h[:-1]):
            assert_same(out.hidden_states[i + 1], block(out.hidden_states[i]).x)
        assert_same(out.hidden_states[-1] @ ours.transformer.wte.weight.T, out.logits)
        assert len(out.hidden_states) == 5
        assert theirs(x).hidden_states is None
        theirs.config.output_hidden_states = True
        try:
            assert len(theirs(x).hidden_states) == 5
        finally:
            theirs.config.output_hidden_states = False
    options = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_hidden_states=True)
    steps = theirs.generate(x, **options).hidden_states
    assert [s[-1].shape for s in steps] == [(2, 6, 32), (2, 1, 32), (2, 1, 32)]


def test_what_is_not_supported_is_refused_by_name(pair):
    _, theirs = pair
    x = prompt(2, 6)
    embedded = theirs.get_input_embeddings()(x)
    for call in (
        lambda: theirs(inputs_embeds=embedded),
        lambda: theirs(x, inputs_embeds=embedded),
        lambda: theirs.generate(inputs_embeds=embedded, max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match="`inputs_embeds` are not supported"):
            call()
    with pytest.raises(ValueError, match="`output_attentions` is not supported"):
        theirs(x, output_attentions=True)
    for options in ({}, dict(past_key_values=theirs(x[:, :2]).past_key_values)):
        with pytest.raises(ValueError, match="`prefill_chunk_size` = 2 is not supported"):
            theirs.generate(x, max_new_tokens=2, prefill_chunk_size=2, **options)


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


def test_passes_of_a_batch_add_up_to_its_loss():
    """Gradient accumulation, as Trainer does it; the auxiliary loss too counts once, by targets."""
    model, x = from_hybrid(make_model(CONFIG, torch.float64)).train(), prompt(4, 9)
    labels = x.clone()
    labels[3, 4:] = -100
    items = (labels[:, 1:] != -100).sum()

    def losses(rows, all_items):
        options = {} if all_items is None else dict(num_items_in_batch=all_items)
        full = model.train()(x[rows], labels=labels[rows], **options).loss
        return full, full - model.eval()(x[rows], labels=labels[rows], **options).loss

    passes = [losses(slice(i, i + 1), items) for i in range(4)]
    aux = [losses(slice(i, i + 1), None)[1].item() for i in range(4)]
    expected = sum(a * n for a, n in zip(aux, (8, 8, 8, 3), strict=True)) / 27
    assert min(aux) > 1e-3
    assert abs(sum(a.item() for _, a in passes) - expected) <= 1e-5 * expected
    assert_same(losses(slice(None), items)[0].float(), losses(slice(None), None)[0].float())
    assert_same(losses(slice(None), 27)[0], losses(slice(None), items)[0])


def test_trainer_learns(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    model = M2RNNHybridForCausalLM(M2RNNHybridConfig.of(CONFIG))
    data = [{"input_ids": row, "labels": row} for row in prompt(1, 12).expand(8, 12)]
    args = TrainingArguments(str(tmp_path), max_steps=8, learning_rate=1e-2, report_to=[], save_strategy="no")
    trainer = Trainer(model, args, train_dataset=data)
    before = float(model(prompt(1, 12), labels=data[0]["labels"][None]).loss)
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] < before


def test_trainer_decays_by_the_groups_of_this_library(tmp_path):
    """As docs/models.md says. Left to itself it goes by names: should it ever do right, that page can say so."""
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    model = from_hybrid(make_model(CONFIG, torch.float32))
    data = [{"input_ids": row, "labels": row} for row in prompt(8, 12)]
    args = TrainingArguments(
        str(tmp_path), weight_decay=0.1, max_steps=3, save_steps=2, warmup_steps=2, report_to=[], use_cpu=True
    )
    names = {id(p): name for name, p in model.named_parameters()}

    def decayed(optimizer):
        return {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}

    expected = {n for g in param_groups(model, 0.1) if g["weight_decay"] > 0 for n in g["param_names"]}
    theirs = decayed(Trainer(model, args, train_dataset=data).create_optimizer())
    assert {"transformer.ln_f.weight", "transformer.h.0.ln_1.weight"} < theirs - expected

    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), lr=args.learning_rate)
    trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))
    before = [p.detach().clone() for p in model.parameters()]
    trainer.train()
    assert decayed(trainer.optimizer) == expected
    assert not any(map(torch.equal, before, model.parameters()))
    resumed = from_hybrid(make_model(CONFIG, torch.float32))
    optimizer = torch.optim.AdamW(param_groups(resumed, args.weight_decay), lr=args.learning_rate)
    Trainer(resumed, args, train_dataset=data, optimizers=(optimizer, None)).train(resume_from_checkpoint=True)
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


WAYS = {
    "positions": {},
    "positions from 2": {},
    "boundaries": dict(return_flash_attn_kwargs=True, return_position_ids=False),
    "indices": dict(return_seq_idx=True, return_position_ids=False),
    "all": dict(return_flash_attn_kwargs=True, return_seq_idx=True),
}


@pytest.fixture(scope="module")
def packed():
    """A model that knows positions, documents, and their logits and the sum of their losses one by one."""
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, attention=dataclasses.replace(CONFIG.attention, rope_theta=100.0))
    model = from_hybrid(make_model(config, torch.float64)).eval()
    documents = [torch.randint(1, 256, (n,)).tolist() for n in (5, 1, 7, 2)]
    with torch.no_grad():
        alone = [model(torch.tensor([d])).logits for d in documents]
        sums = [
            torch.nn.functional.cross_entropy(y[0, :-1], torch.tensor(d[1:], dtype=torch.int64), reduction="sum")
            for y, d in zip(alone, documents, strict=True)
        ]
    return (
        model,
        documents,
        torch.cat(alone, 1),
        (sum(sums) / sum(len(d) - 1 for d in documents)).float(),
    )  # transformers' loss is in fp32


def collate(way, documents):
    batch = DataCollatorWithFlattening(**WAYS[way])([{"input_ids": d, "labels": d} for d in documents])
    if "from 2" in way:
        batch["position_ids"] = batch["position_ids"] + 2
    return dict(batch)


@pytest.mark.parametrize("way", WAYS)
def test_documents_of_a_flattening_collator_do_not_see_each_other(packed, way):
    model, documents, logits, loss = packed
    batch = collate(way, documents)
    with torch.no_grad():
        out = model(**batch)
        assert_same(out.logits, logits)
        assert_same(out.loss.float(), loss)
        whole = model(**batch | dict(labels=batch["input_ids"]))
        assert_same(whole.loss.float(), loss)  # no token of one document is predicted from another
        unlabelled = model(**{k: v for k, v in batch.items() if k != "labels"})
        assert_same(unlabelled.logits, logits)
        assert unlabelled.past_key_values is None
        assert not torch.allclose(model(batch["input_ids"]).logits, logits)


def test_compiled_boundaries_stay_in_the_graph_and_positions_break_it(packed):
    model, documents, logits, loss = packed
    batch = collate("all", documents)
    with torch.no_grad():
        got = torch.compile(model, backend="eager", fullgraph=True)(**batch)
        assert_same(got.logits, logits)
        assert_same(got.loss.float(), loss)
        torch._dynamo.reset()
        got = torch.compile(model, backend="eager")(**collate("positions", documents))
        assert_same(got.logits, logits)


def test_positions_of_unpacked_rows_change_nothing(pair):
    _, theirs = pair
    rows = [prompt(6), prompt(3)]
    padded, mask = left_pad(rows)
    with torch.no_grad():
        expected = theirs(padded, attention_mask=mask.long()).logits
        for fill in (0, 1):
            positions = (mask.long().cumsum(-1) - 1).masked_fill(~mask, fill)
            assert torch.equal(theirs(padded, attention_mask=mask.long(), position_ids=positions).logits, expected)
        x = prompt(2, 6)
        assert torch.equal(theirs(x, position_ids=torch.arange(6)[None]).logits, theirs(x).logits)
        options = dict(max_new_tokens=4, do_sample=False)
        assert torch.equal(
            theirs.generate(x, position_ids=torch.arange(6)[None], **options), theirs.generate(x, **options)
        )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(cu_seq_lens_k=[0, 4, 15]), r"`cu_seq_lens_q` and `cu_seq_lens_k` do not tell of the same documents"),
        (dict(position_ids=[list(range(15))]), r"`cu_seq_lens_q` and `position_ids` do not .*\[\[0, 5, 6, 13\]\]"),
        (dict(seq_idx=[[0] * 14 + [1]]), r"`cu_seq_lens_q` and `seq_idx` do not .*latter at \[\[0, 14\]\]"),
        (dict(position_ids=[[0, 1, 5, *range(12)]]), r"`position_ids` must count up by one and start again"),
        (dict(position_ids=[[0, 1]]), r"`position_ids` must have shape \[1, 15\].*got \[1, 2\]"),
        (dict(cu_seq_lens_q=[0, 5, 14]), r"from 0 to T = 15"),
        (dict(attention_mask=[[0] + [1] * 14]), r"there is padding: packed documents need one row"),
        (dict(use_cache=True), r"have no cache; give use_cache"),
    ],
)
def test_packing_that_is_not_consistent_is_refused(packed, change, message):
    model, documents, _, _ = packed
    change = {k: v if k == "use_cache" else torch.tensor(v) for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        model(**collate("all", documents) | change)


def test_packing_needs_one_row_and_no_cache(packed):
    model = packed[0]
    positions = torch.tensor([[0, 1, 0], [0, 1, 2]])
    with pytest.raises(ValueError, match=r"`position_ids` packs documents.*there is 2 rows"):
        model(prompt(2, 3), position_ids=positions)
    with pytest.raises(ValueError, match=r"`cu_seq_lens_q` is of documents packed into one row.* 2 rows"):
        model(prompt(2, 3), cu_seq_lens_q=torch.tensor([0, 2, 3]))
    cache = model(prompt(1, 3)).past_key_values
    with pytest.raises(ValueError, match="there is a cache"):
        model(prompt(1, 3), position_ids=positions[:1], past_key_values=cache)


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
