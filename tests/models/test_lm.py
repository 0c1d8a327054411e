# SPDX-License-Identifier: Apache-2.0
"""The hybrid language model: names, packed and cached equality, compile and export."""

import dataclasses
import io
import json

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from m2rnn_compile.layers import param_groups
from m2rnn_compile.models import HybridLM, LMConfig
from tests.layers.equations import assert_same
from tests.models.helpers import CONFIG, make_model


def tokens(*shape):
    return torch.randint(0, 256, shape)


def test_parameter_names_are_those_of_released_checkpoints():
    names = set(HybridLM(dataclasses.replace(CONFIG, pattern="MA"), device="meta").state_dict())
    block = {"ln_1.weight", "ln_2.weight", "mlp_block.c_fc.weight", "mlp_block.c_proj.weight"}
    m2rnn = {"input_projection.weight", "decay_gate.A_log", "decay_gate.dt_bias", "conv1d.weight", "D", "state_weight"}
    m2rnn |= {"g_norm.weight", "output_projection.weight"}
    assert names == (
        {"transformer.wte.weight", "transformer.ln_f.weight"}
        | {f"transformer.h.{i}.{n}" for i in (0, 1) for n in block}
        | {f"transformer.h.0.sequence_mixer.{n}" for n in m2rnn}
        | {"transformer.h.1.sequence_mixer.c_attn.weight", "transformer.h.1.sequence_mixer.c_proj.weight"}
    )


def test_the_410m_model_has_the_papers_parameter_count():
    assert HybridLM(LMConfig(100_352, 1024, "M" * 24, 2752), device="meta").num_parameters() == 410_736_576


def test_config_round_trip_and_errors():
    assert LMConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
    with pytest.raises(ValueError, match=r"unknown field\(s\) \['depth'\]"):
        LMConfig.from_dict(CONFIG.to_dict() | {"depth": 3})
    with pytest.raises(ValueError, match=r"missing field\(s\) \['vocab_size'\]"):
        LMConfig.from_dict({k: v for k, v in CONFIG.to_dict().items() if k != "vocab_size"})
    with pytest.raises(ValueError, match=r"LMConfig.m2rnn: unknown"):
        LMConfig.from_dict(CONFIG.to_dict() | {"m2rnn": {"heads": 1}})
    with pytest.raises(ValueError, match="no mixer has the letter 'Z'; known are"):
        HybridLM(dataclasses.replace(CONFIG, pattern="MZ"))


def test_call_errors():
    model, x = make_model(), tokens(2, 5)
    for bad in (x.float(), x > 3, x[0]):
        with pytest.raises(ValueError, match="must be integers"):
            model(bad)
    with pytest.raises(ValueError, match="one entry for each of the 3 layers, got 2"):
        model(x, cache=model.init_cache(2)[:2])
    for keep in (0, -1):
        with pytest.raises(ValueError, match=f"`logits_to_keep` must be at least 1 or None, got {keep}"):
            model(x, logits_to_keep=keep)


def test_packed_documents_equal_separate_ones():
    model, lengths = make_model(), [4, 1, 6]
    x, y = tokens(1, 11), tokens(1, 11)
    packed = model.loss(x, y, cu_seqlens=torch.tensor([0, 4, 5, 11]), reduction="none")
    separate = torch.cat(
        [model.loss(a, b, reduction="none") for a, b in zip(x.split(lengths, 1), y.split(lengths, 1), strict=True)], 1
    )
    assert_same(packed, separate)


@pytest.mark.parametrize("cuts", [[10], [1] * 10, [6, 4]])
def test_cached_equals_uncached(cuts):
    model, x = make_model(), tokens(2, 10)
    cache, logits = model.init_cache(2), []
    for part in x.split(cuts, 1):
        out, cache = model(part, cache=cache)
        logits.append(out)
    assert_same(torch.cat(logits, 1), model(x))
    assert_same(model(x, logits_to_keep=2), model(x)[:, -2:])


def test_loss_leaves_out_ignored_targets():
    model, x, y = make_model(), tokens(2, 6), tokens(2, 6)
    y[0, 3:] = -100
    kept = model.loss(x, y, reduction="none")[y != -100]
    assert_same(model.loss(x, y), kept.mean())


def test_every_parameter_is_in_exactly_one_group():
    model = make_model()
    grouped = [p for g in param_groups(model, 0.1) for p in g["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
    assert len(grouped) == len(list(model.parameters()))


def test_compiled_loss_and_recompilations():
    model = make_model(dtype=torch.float32).train()
    counter = CompileCounterWithBackend("aot_eager")
    loss = torch.compile(model.loss, fullgraph=True, backend=counter)
    for T in (9, 16, 5, 33, 21, 40, 7, 12, 30, 11):
        x, y = tokens(2, T), tokens(2, T)
        got, expected = loss(x, y), model.loss(x, y)
        assert_same(got, expected)
        for a, b in zip(*(torch.autograd.grad(v, list(model.parameters())) for v in (got, expected)), strict=True):
            assert_same(a, b)
    assert counter.frame_count <= 2


def test_export_round_trip_with_dynamic_batch_and_time():
    from m2rnn_compile.demo import export_model

    model = make_model(dtype=torch.float32)
    buffer = io.BytesIO()
    with torch.inference_mode():
        torch.export.save(export_model(model), buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    with torch.inference_mode():
        for shape in ((2, 16), (1, 1), (4, 100)):
            x = tokens(*shape)
            assert_same(loaded(x), model(x))
