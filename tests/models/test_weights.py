# SPDX-License-Identifier: Apache-2.0
"""Sharded weights, and the released layout in all its row orders: round trips, and misfits by name."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

from m2rnn_compile.models import MIXERS, HybridLM, LMConfig, miniature, preset
from m2rnn_compile.models.checkpoint import CheckpointError
from m2rnn_compile.models.lm_engine import (
    RowOrders,
    config_from_released,
    config_to_released,
    load_released,
    orders_of,
    save_released,
)
from m2rnn_compile.models.weights import WeightFiles, load_model, load_weights, save_model, save_weights
from tests.models.helpers import largest_file

DENSE = dataclasses.replace(miniature(preset("hybrid-gated-deltanet+1-410m")), pattern="MGA2RU")
DENSE = dataclasses.replace(
    DENSE, attention=dataclasses.replace(DENSE.attention, num_heads=4, num_kv_heads=2, rope_theta=10_000.0)
)
MOE = dataclasses.replace(miniature(preset("hybrid-m2rnn-7b")), pattern="MA")
ORDERS = [RowOrders(), RowOrders(True, True, True), RowOrders(False, False, False)]
TOKENS = torch.randint(0, 256, (2, 7))


def used(config):
    """Kinds of layers that do not occur are lost in their config."""
    fields = {letter: mixer.field for letter, mixer in MIXERS.items()}
    default = LMConfig(1, 1, "M", 1)
    lost = {field: getattr(default, field) for letter, field in fields.items() if letter not in config.pattern}
    return dataclasses.replace(config, **lost)


def same_model(a, b):
    assert used(a.config) == used(b.config)
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    with torch.no_grad():
        assert torch.equal(a.eval()(TOKENS), b.eval()(TOKENS))


@pytest.mark.parametrize("shard", [5 * 10**9, 20_000], ids=["single", "sharded"])
def test_round_trip_of_our_own_layout(tmp_path, shard):
    model = HybridLM(DENSE)
    files = save_model(model, tmp_path, max_shard_bytes=shard)
    assert (len(files) > 3) == (shard == 20_000)
    same_model(load_model(tmp_path), model)
    sizes = [sum(x.numel() * 4 for x in load_file(f).values()) for f in files]
    assert all(size <= shard or len(load_file(f)) == 1 for f, size in zip(files, sizes, strict=True))
    with pytest.raises(CheckpointError, match=r"written by this library; read it by models\.weights\.load_model"):
        load_released(tmp_path)
    save_model(model, tmp_path)  # over sharded files: none of them stays behind
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("orders", ORDERS, ids=["released", "alternating", "halves"])
@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_round_trip_of_the_released_layout(tmp_path, config, orders):
    model = HybridLM(config)
    save_released(model, tmp_path, orders=orders, max_shard_bytes=50_000)
    same_model(load_released(tmp_path), model)
    told = orders_of(json.loads((tmp_path / "config.json").read_text()))
    assert told[1:] == orders[1:] if config.moe else told.dense == orders.dense


def test_rows_are_where_lm_engine_has_them(tmp_path):
    """By hand: up at odd rows, gate at even ones; queries, key and value of each key/value head together."""
    model = HybridLM(DENSE)
    save_released(model, tmp_path, orders=RowOrders(dense=True))
    stored = load_file(tmp_path / "model.safetensors")
    up, gate = model.transformer.h[0].mlp_block.c_fc.weight.chunk(2)
    theirs = stored["transformer.h.0.mlp_block.c_fc.weight"]
    assert torch.equal(theirs[1::2], up)
    assert torch.equal(theirs[::2], gate)
    dim = 8  # width 32, four query heads, two key/value heads
    q, k, v = model.transformer.h[2].sequence_mixer.c_attn.weight.split([4 * dim, 2 * dim, 2 * dim])
    by_head = stored["transformer.h.2.sequence_mixer.c_attn.weight"].view(2, -1, 32)
    for n in range(2):
        assert torch.equal(by_head[n, : 2 * dim], q[2 * n * dim : 2 * (n + 1) * dim])
        assert torch.equal(by_head[n, 2 * dim : 3 * dim], k[n * dim : (n + 1) * dim])
        assert torch.equal(by_head[n, 3 * dim :], v[n * dim : (n + 1) * dim])
    assert "lm_head.weight" not in stored


def test_experts_alternate_and_the_shared_one_does_not_by_default(tmp_path):
    model = HybridLM(MOE)
    save_released(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    mlp = model.transformer.h[0].mlp_block
    up, gate = mlp.c_fc.weight.chunk(2, 1)
    assert torch.equal(stored["transformer.h.0.mlp_block.c_fc.weight"][:, 1::2], up)
    assert torch.equal(stored["transformer.h.0.mlp_block.c_fc.weight"][:, ::2], gate)
    assert torch.equal(stored["transformer.h.0.mlp_block.c_fc_shared.weight"], mlp.c_fc_shared.weight)


def test_the_wrong_row_order_would_be_seen(tmp_path):
    model = HybridLM(DENSE)
    save_released(model, tmp_path, orders=RowOrders(dense=True))
    other = load_released(tmp_path, orders=RowOrders(dense=False))
    with torch.no_grad():
        assert not torch.equal(other(TOKENS), model.eval()(TOKENS))


@pytest.mark.parametrize("name", ["m2rnn-410m", "hybrid-gated-deltanet+5-7b", "softmax-410m"])
def test_released_configs_of_the_paper(name):
    config = preset(name)
    record = json.loads(json.dumps(config_to_released(config, RowOrders())))
    assert config_from_released(record) == used(config)
    assert HybridLM(config_from_released(record), device="meta").num_parameters() == (
        HybridLM(config, device="meta").num_parameters()
    )
    first = record["sequence_mixer_blocks"][0]
    if name == "m2rnn-410m":
        assert first["sequence_mixer_type"] == "m2rnn"
        assert (first["num_weight_heads"], first["gradient_clipping"]) == (84, 1.0)


def test_misfits_are_named_and_leave_the_model_unchanged(tmp_path):
    model = HybridLM(MOE)
    save_released(model, tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    del stored["transformer.h.0.ln_1.weight"]
    stored["transformer.h.9.extra"] = torch.zeros(1)
    stored["transformer.h.1.mlp_block.gate.weight"] = torch.zeros(3, 32)
    save_file(stored, file)
    with pytest.raises(
        CheckpointError,
        match=r"missing: transformer.h.0.ln_1.weight; unexpected: transformer.h.9.extra; mis-shaped: "
        r"transformer.h.1.mlp_block.gate.weight has shape \[3, 32\], expected \[8, 32\]; check that config.json",
    ):
        load_released(tmp_path)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match="missing"):
        load_weights(model, WeightFiles(tmp_path))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    save_file(stored | {"lm_head.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(CheckpointError, match=r"separate lm_head.weight"):
        load_released(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.pop("mlp_blocks"), "not a config of lm-engine.*mlp_blocks"),
        (lambda r: r.update(normalization_function="layernorm"), "`normalization_function` is 'layernorm'"),
        (lambda r: r["sequence_mixer_blocks"][0].update(add_bias=True), r"blocks\[0\]: `add_bias` is True"),
        (
            lambda r: r["sequence_mixer_blocks"][1].update(sequence_mixer_type="hymba"),
            r"config.json, sequence_mixer_blocks\[1\]: `sequence_mixer_type` is 'hymba', and this .* has 'm2rnn' or",
        ),
        (lambda r: r["sequence_mixer_blocks"][0].pop("sequence_mixer_type"), "`sequence_mixer_type` is None, and this"),
        (
            lambda r: r["sequence_mixer_blocks"][0].update(num_slots=8),
            r"blocks\[0\]: `num_slots` is 8, which this library .* not know; of m2rnn blocks it knows \['A_init_max', ",
        ),
        (lambda r: r["mlp_blocks"][0].update(router="sigmoid"), "must be alike"),
        (lambda r: [b.update(router="x") for b in r["mlp_blocks"]], "`router` is 'x', which this library does not"),
        (lambda r: [b.update(mlp_type="KAN") for b in r["mlp_blocks"]], "`mlp_type` is 'KAN', and this library has"),
        (lambda r: r.update(model_type="ladder_residual"), "`model_type` is 'ladder_residual', and this .*'gpt_base'"),
        (lambda r: r.update(num_layers=7), "`num_layers` is 7, but there are 6 sequence_mixer_blocks"),
        (lambda r: r.update(tie_word_embeddings=False), "`tie_word_embeddings` is False, and this library has True"),
        (lambda r: r.update(embedding_dropout=0.1), "`embedding_dropout` is 0.1"),
        (
            lambda r: r.update(position_embedding_type="learned_absolute"),
            "`position_embedding_type` is 'learned_absolute', and this library has 'rope' or 'nope' only",
        ),
        (lambda r: r.pop("position_embedding_type"), "'position_embedding_type'"),
        (lambda r: r.update(rope_scaling={"type": "yarn", "factor": 4}), "`rope_scaling` is {'type': 'yarn'"),
        (lambda r: r.update(rope_dim=4), "`rope_dim` is 4, and this library has None or 8 only"),
        (lambda r: r["sequence_mixer_blocks"][2].update(attention_multiplier=1), "`attention_multiplier` is 1, and"),
        (
            lambda r: r["sequence_mixer_blocks"][2].update(attention_multiplier_method="1 / head_dim"),
            "`attention_multiplier_method` is '1 / head_dim'",
        ),
        (lambda r: r["sequence_mixer_blocks"][1].update(num_k_heads=1), "`num_k_heads` is 1, and this library has 2"),
        (lambda r: r["sequence_mixer_blocks"][3].update(time_step_limit=[0, 0.1]), r"`time_step_limit` is \[0, 0.1\]"),
        (lambda r: r["sequence_mixer_blocks"][4].update(num_input_heads=1), "`num_input_heads` is 1, and this"),
        (lambda r: r["sequence_mixer_blocks"][5].update(gradient_clipping=1.0), "`gradient_clipping` is 1.0"),
        (lambda r: r["mlp_blocks"].pop(), "mlp_blocks must be alike, one a layer"),
        (lambda r: r.update(hidden_size=-1), "`hidden_size` must be at least 1"),
    ],
)
def test_configs_that_ask_for_something_else(tmp_path, change, message):
    record = json.loads(json.dumps(config_to_released(DENSE, RowOrders())))
    change(record)
    with pytest.raises(CheckpointError, match=message):
        config_from_released(record)


def test_what_starts_or_chunks_or_names_a_model_does_not_matter():
    """Options of lm-engine that say nothing about what the trained model computes, and those that are off."""
    record = json.loads(json.dumps(config_to_released(DENSE, RowOrders())))
    expected = config_from_released(record)
    record |= dict(m_width=1, m_emb=None, rope_dim=8, rope_scaling=None, initializer_range=0.1, architectures=["x"])
    for block in record["sequence_mixer_blocks"]:
        block["not_there_yet"] = None
        if block["sequence_mixer_type"] in ("m2rnn", "gated_deltanet", "mamba2"):
            block |= dict(A_init_min=1, A_init_max=8, dt_init_min=0.01, dt_init_max=0.2, dt_init_floor=1e-3)
        if block["sequence_mixer_type"] == "mamba2":
            block |= dict(chunk_size=128, time_step_limit=[0, float("inf")])
    assert config_from_released(record) == expected
    record |= dict(position_embedding_type="nope", rope_scaling={"type": "yarn"}, rope_dim=4)
    assert config_from_released(record).attention.rope_theta is None


def test_sizes_that_no_layer_can_have(tmp_path):
    save_released(HybridLM(DENSE), tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    record["sequence_mixer_blocks"][2] |= dict(num_key_value_heads=3)
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"config.json.*`num_kv_heads` must divide `num_heads` = 4"):
        load_released(tmp_path)


def test_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json' is missing"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no weights at"):
        WeightFiles(tmp_path)
    files = save_model(HybridLM(MOE), tmp_path, max_shard_bytes=50_000)
    files[1].unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-.*is missing; fetch it"):
        load_model(tmp_path)
    files[1].write_bytes(b"\0" * 4)
    with pytest.raises(CheckpointError, match=r"model-00002-of-.*is damaged"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x", "b": 3}}')
    with pytest.raises(CheckpointError, match=r"index.json' .*`weight_map`.* 'b': 3; fetch the file again"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt_base"}')
    with pytest.raises(CheckpointError, match=r"not a config of this library.*load_released"):
        load_model(tmp_path)


def test_a_failed_write_leaves_no_litter(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write weights"):
        save_weights({"x": torch.zeros(1)}, tmp_path / "file")
    shards = {"small": torch.zeros(100), "large": torch.zeros(10_000)}
    with largest_file(10_000), pytest.raises(CheckpointError, match=r"write weights.*File too large.*free space"):
        save_weights(shards, tmp_path / "out", max_shard_bytes=400)  # safetensors raises what is no OSError
    assert not list((tmp_path / "out").iterdir())

    def broken():
        yield "a", torch.zeros(100)
        yield "b", torch.zeros(100)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        save_weights(broken(), tmp_path / "out", max_shard_bytes=400)
    assert not list((tmp_path / "out").iterdir())
