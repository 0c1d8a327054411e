# SPDX-License-Identifier: Apache-2.0
"""The paper's models by name: patterns, parameter counts, state sizes, FLOPs; pattern rules; the table."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from m2rnn_compile.__main__ import main
from m2rnn_compile.models import (
    PRESETS,
    GRUConfig,
    HybridLM,
    LMConfig,
    M2RNNConfig,
    Mamba2Config,
    VectorRNNConfig,
    expand,
    miniature,
    preset,
    statistics,
)

MILLIONS = {
    "gated-deltanet-410m": 406.68,
    "softmax-410m": 406.37,
    "hybrid-gated-deltanet-410m": 406.64,
    "hybrid-m2rnn-410m": 410.19,
    "hybrid-gated-deltanet+1-410m": 406.81,
    "hybrid-gated-deltanet+3-410m": 407.15,
}
BILLIONS = {
    "gated-deltanet-7b": 6.769,
    "softmax-7b": 6.768,
    "hybrid-gated-deltanet-7b": 6.769,
    "hybrid-m2rnn-7b": 6.794,
    "hybrid-gated-deltanet+1-7b": 6.770,
    "hybrid-gated-deltanet+5-7b": 6.773,
}


def count(name):
    return HybridLM(preset(name), device="meta").num_parameters()


def test_the_m2rnn_models_count_exactly_as_released():
    assert count("m2rnn-410m") == 410_736_576
    assert count("m2rnn-7b") == 6_797_818_688
    assert HybridLM(preset("m2rnn-7b"), device="meta").num_active_parameters() == 1_135_508_288


@pytest.mark.parametrize("name, total", MILLIONS.items())
def test_410m_totals(name, total):
    assert round(count(name) / 1e6, 2) == total


@pytest.mark.parametrize("name, total", BILLIONS.items())
def test_7b_totals(name, total):
    assert round(count(name) / 1e9, 3) == total


def test_every_row_of_the_paper_is_a_preset():
    assert set(PRESETS) == {"m2rnn-410m", "m2rnn-7b", *MILLIONS, *BILLIONS}
    a24, a40 = (4, 12, 20), (4, 12, 20, 28, 36)
    for name, config in PRESETS.items():
        attention = [i for i, letter in enumerate(config.pattern) if letter == "A"]
        if "hybrid" in name:
            assert tuple(attention) == (a24 if name.endswith("410m") else a40)
        assert (config.attention.rope_theta == 10_000) == name.startswith("softmax")
        assert (config.moe is not None) == name.endswith("7b")
    assert preset("hybrid-gated-deltanet+1-410m").pattern == "MGGGAGGGGGGGAGGGGGGGAGGG"
    assert preset("hybrid-gated-deltanet+3-410m").pattern == "GGGMAGGGGGGMAGGGGGGMAGGG"
    assert preset("hybrid-gated-deltanet+5-7b").pattern.count("M") == 5


@pytest.mark.parametrize(
    "name, elements",
    [("410m", {"M": 86_016, "G": 262_144}), ("7b", {"M": 135_168, "G": 393_216})],
)
def test_recurrent_state_per_layer(name, elements):
    assert statistics(preset(f"hybrid-gated-deltanet+1-{name}")).state_elements == elements


def test_state_bytes_are_those_of_a_cache():
    config = miniature(preset("hybrid-gated-deltanet+1-410m"))
    s = statistics(config, dtype=torch.float32)
    model = HybridLM(config)
    for T in (1, 9):
        _, cache = model(torch.zeros(1, T, dtype=torch.int64), cache=model.init_cache(1))
        held = sum(x.numel() * x.itemsize for layer in cache for x in layer)
        assert held == s.state_bytes + T * s.bytes_per_token


@pytest.mark.parametrize("name", ["m2rnn-410m", "softmax-410m"])
def test_flops_agree_with_torchs_counter(name):
    """Attention is counted at full context there too: its backend multiplies masked scores as well."""
    config, T = miniature(preset(name)), 32
    model = HybridLM(config)
    tokens = torch.zeros(1, T, dtype=torch.int64)
    # The CPU's own attention kernel has no formula in torch's table.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(tokens)
    counted = counter.get_total_flops()
    if name.startswith("m2rnn"):  # the projection runs padded to a multiple of 64 columns
        layer = model.mixers[0]
        extra = -layer.input_projection.weight.shape[0] % 64
        counted -= 2 * T * extra * config.hidden_size * config.num_layers
    assert counted == T * statistics(config, context=T).flops_per_token


def test_pattern_rules():
    assert expand("24G, A every 8 from 4") == "GGGGAGGGGGGGAGGGGGGGAGGG"
    assert expand("6G, M at 0 5, A at 1") == "MAGGGM"
    assert expand("9G, A every 4 from 2, M before A") == "GMAGGMAGG"
    assert expand("MGA") == "MGA"
    for bad, message in (
        ("G, A at 0", 'must start with layers and a letter such as "24G"'),
        ("4G, A at 4", "there is no layer 4, the model has 4 layers"),
        ("4G, A every 8 from 4", "there is no layer 4, the model has 4 layers"),
        ("4G, A every 0 from 1", "the period must be at least 1"),
        ("4G, A sometimes", "'A sometimes' is not understood"),
        ("24G, M before Z", '"M before Z" changes nothing: no layer Z comes after another'),
        ("4G, A at 0, M before A", '"M before A" changes nothing'),
        ("0M", "names 0 layers, need at least 1"),
        ("24 G", '\'24 G\' is neither layers and a letter, such as "24G", nor one letter a layer, such as "GGMA"'),
        ("", "'' is neither layers and a letter"),
    ):
        with pytest.raises(ValueError, match=message):
            expand(bad)


def test_a_config_takes_the_rule_itself():
    """A rule is known by its comma or star, since "2" is a mixer's letter: "2A" alone is Mamba-2 and attention."""
    config = LMConfig(vocab_size=256, hidden_size=16, mlp_size=24, pattern="24G, A every 8 from 4, M at 0")
    assert config.pattern == "MGGGAGGGGGGGAGGGGGGGAGGG"
    assert config == LMConfig.from_dict(config.to_dict())
    assert config == LMConfig.from_dict(config.to_dict() | {"pattern": "24G, A every 8 from 4, M at 0"})
    for pattern, letters in (("24*G", "G" * 24), ("3*2", "222"), ("2A", "2A"), ("22A", "22A"), ("2", "2")):
        assert dataclasses.replace(config, pattern=pattern).pattern == letters
    for bad, message in (
        ("24G, A at 24", "there is no layer 24"),
        ("24G", r'pattern "24G" has no comma or star and so one letter a layer; write "24\*G" for 24 layers'),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, pattern=bad)


def test_a_miniature_keeps_the_kinds_of_its_layers():
    """Sizes shrink; what a layer is (conv or none, how W starts, clips, gates) and how heads are shared stays."""
    config = dataclasses.replace(
        preset("m2rnn-410m"),
        m2rnn=M2RNNConfig(
            conv_size=None, state_weight_init="normal", state_grad_clip=0.5, num_q_heads=84, num_k_heads=4
        ),
        mamba2=Mamba2Config(conv_size=3),
        vector_rnn=VectorRNNConfig(conv_size=3, state_grad_clip=None),
        gru=GRUConfig(conv_size=2),
    )
    small = miniature(config)
    m = small.m2rnn
    assert (m.conv_size, m.state_weight_init, m.state_grad_clip) == (None, "normal", 0.5)
    assert (m.num_heads, m.num_q_heads, m.num_k_heads, m.num_v_heads) == (4, 4, 2, None)
    assert (small.mamba2.conv_size, small.gru.conv_size) == (3, 2)
    assert (small.vector_rnn.conv_size, small.vector_rnn.state_grad_clip) == (3, None)
    HybridLM(dataclasses.replace(small, pattern="MGA2RU"), device="meta")
    assert miniature(preset("m2rnn-410m")).m2rnn == M2RNNConfig(num_heads=4, key_dim=16, value_dim=8)


def test_names_that_are_nearly_right():
    with pytest.raises(ValueError, match=r"no preset is called 'm2rn-410m'; did you mean m2rnn-410m"):
        preset("m2rn-410m")


def test_configs_are_frozen_and_survive_json():
    for config in (*PRESETS.values(), miniature(preset("m2rnn-7b"))):
        assert LMConfig.from_dict(config.to_dict()) == config
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.pattern = "A"
    with pytest.raises(ValueError, match=r"LMConfig.moe: unknown field\(s\) \['experts'\]"):
        LMConfig.from_dict(preset("m2rnn-7b").to_dict() | {"moe": {"experts": 3}})
    with pytest.raises(ValueError, match="`mlp_size` must be at least 1, got 0"):
        LMConfig(256, 16, "M")


def test_the_table(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["models"]) == 0
    out = capfd.readouterr().out
    for text in (*PRESETS, "410,736,576", "6,797,818,688", "1,135,508,288", "4G A 7G A 7G A 3G"):
        assert text in out
    assert max(map(len, out.splitlines()[:-2])) <= 80
    assert main(["models", "hybrid-m2rnn-7b", "--context", "100"]) == 0
    assert "135,168 elements" in capfd.readouterr().out
    assert main(["models", "nothing"]) == 2
    assert "no preset is called 'nothing'" in capfd.readouterr().err
