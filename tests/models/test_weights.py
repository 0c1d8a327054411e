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
        (lambda r: r["sequence_mixer_blocks"][0].update(sequence_mixer_type="rwkv"), "rwkv"),
        (lambda r: r["mlp_blocks"].pop(), "mlp_blocks must be alike, one a layer"),
        (lambda r: r.update(hidden_size=-1), "`hidden_size` must be at least 1"),
    ],
)
def test_configs_that_ask_for_something_else(tmp_path, change, message):
    record = json.loads(json.dumps(config_to_released(DENSE, RowOrders())))
    change(record)
    with pytest.raises(CheckpointError, match=message):
        config_from_released(record)


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
