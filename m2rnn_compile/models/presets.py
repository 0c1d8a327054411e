# SPDX-License-Identifier: Apache-2.0
"""The paper's models by name: ``HybridLM(preset("hybrid-m2rnn-410m"))``."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from .config import (
    AttentionConfig,
    GatedDeltaNetConfig,
    LMConfig,
    M2RNNConfig,
    MixerConfig,
    MoEConfig,
)
from .pattern import expand

ROPE_THETA = 10_000.0
DENSE_410M = LMConfig(vocab_size=100_352, hidden_size=1024, pattern="M" * 24, mlp_size=2752)
MOE_7B = LMConfig(
    vocab_size=100_352,
    hidden_size=1536,
    pattern="M" * 40,
    m2rnn=M2RNNConfig(num_heads=132),
    attention=AttentionConfig(num_heads=24),
    gated_deltanet=GatedDeltaNetConfig(num_heads=3),
    moe=MoEConfig(),
)


# What the paper has at a width. Of the 7B size it has three mixers; the others stand in MOE_7B with the 410M sizes.
_SIZES: dict[int, dict[str, MixerConfig]] = {
    DENSE_410M.hidden_size: {
        name: getattr(DENSE_410M, name)
        for name in ("m2rnn", "attention", "gated_deltanet", "mamba2", "vector_rnn", "gru")
    },
    MOE_7B.hidden_size: {name: getattr(MOE_7B, name) for name in ("m2rnn", "attention", "gated_deltanet")},
}


def paper_sizes(field: str, hidden_size: int) -> MixerConfig | None:
    """The mixer of the paper's models of that width, or None where it has none: `field` is one of `LMConfig`."""
    return _SIZES.get(hidden_size, {}).get(field)


def _family(base: LMConfig, suffix: str, swaps_before_attention: int) -> dict[str, LMConfig]:
    n = base.num_layers
    hybrid = "A every 8 from 4"
    rules = {
        "m2rnn": f"{n}M",
        "gated-deltanet": f"{n}G",
        "softmax": f"{n}A",
        "hybrid-m2rnn": f"{n}M, {hybrid}",
        "hybrid-gated-deltanet": f"{n}G, {hybrid}",
        "hybrid-gated-deltanet+1": f"{n}G, {hybrid}, M at 0",
        f"hybrid-gated-deltanet+{swaps_before_attention}": f"{n}G, {hybrid}, M before A",
    }
    configs = {f"{name}-{suffix}": dataclasses.replace(base, pattern=expand(rule)) for name, rule in rules.items()}
    # Only the transformer baseline knows positions.
    rope = dataclasses.replace(base.attention, rope_theta=ROPE_THETA)
    configs[f"softmax-{suffix}"] = dataclasses.replace(configs[f"softmax-{suffix}"], attention=rope)
    return configs


PRESETS: dict[str, LMConfig] = _family(DENSE_410M, "410m", 3) | _family(MOE_7B, "7b", 5)


def preset(name: str) -> LMConfig:
    """The config of a named model.

    Raises:
        ValueError: no preset has that name; the nearest names are given.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 3, 0.4) or sorted(PRESETS)
        raise ValueError(f"no preset is called {name!r}; did you mean {', '.join(near)}? See `PRESETS` for all")
    return PRESETS[name]


def miniature(config: LMConfig, *, layers: int | None = None, hidden_size: int = 32, vocab_size: int = 256) -> LMConfig:
    """The same kinds of layers in the same order, small enough for a laptop or a test.

    What is no size stays as it is: convs (or none), how W starts, clips, positions, gates.

    Args:
        layers: keep the first so many (default: up to 8, which holds one period of every hybrid).
        hidden_size: a multiple of 16.
        vocab_size: 256 for bytes.
    """
    pattern = config.pattern[: min(8, config.num_layers) if layers is None else layers]
    heads = max(1, hidden_size // 16)
    return dataclasses.replace(
        config,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        pattern=pattern,
        mlp_size=0 if config.moe else 2 * hidden_size,
        m2rnn=_miniature_m2rnn(config.m2rnn, 2 * heads),
        attention=dataclasses.replace(config.attention, num_heads=heads, num_kv_heads=None, head_dim=None),
        gated_deltanet=dataclasses.replace(config.gated_deltanet, num_heads=2, key_dim=16, value_dim=16),
        mamba2=dataclasses.replace(
            config.mamba2, num_heads=heads, state_size=16, intermediate_size=hidden_size, num_groups=1
        ),
        vector_rnn=dataclasses.replace(config.vector_rnn, num_heads=heads, head_dim=8),
        gru=dataclasses.replace(config.gru, num_heads=heads, head_dim=8),
        moe=config.moe and dataclasses.replace(config.moe, num_experts=8, top_k=2, expert_size=16, shared_size=32),
    )


def _miniature_m2rnn(config: M2RNNConfig, num_heads: int) -> M2RNNConfig:
    """Heads shared by all stay one, those that every head has for itself as many as heads; in between, two."""
    counts = {name: getattr(config, name) for name in (f"num_{kind}_heads" for kind in "qkvfgw")}
    few: dict[str, Any] = {
        n: c if c in (None, 1) else num_heads if c == config.num_heads else 2 for n, c in counts.items()
    }
    return dataclasses.replace(config, num_heads=num_heads, key_dim=16, value_dim=8, **few)
