# SPDX-License-Identifier: Apache-2.0
"""Language models: a training step (forward, backward, AdamW) and one generated token after T tokens of context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from m2rnn_compile.layers import GatedDeltaNet, param_groups
from m2rnn_compile.models import (
    AttentionConfig,
    GatedDeltaNetConfig,
    GRUConfig,
    HybridLM,
    LMConfig,
    M2RNNConfig,
    Mamba2Config,
    VectorRNNConfig,
)

from ..floors import Work, attention_work, layer_work, scan_work
from ..problem import Leaves, Problem
from . import gated_delta, layers, mamba
from .peers import tolerated
from .registry import Context

GATE_STEPS = 64
# Preset → (depth, MLP width, vocabulary). A and D: the 410M model. B and C: the 7B trunk, its experts replaced by a
# dense MLP of the width that is active for a token (8 experts of 256 and a shared one of 1024).
SIZES = {"A": (24, 2752, 100_352), "D": (24, 2752, 100_352), "B": (40, 3072, 100_352), "C": (40, 3072, 100_352)}
SMALL = (2, 172, 256)


def config_of(context: Context, letter: str) -> LMConfig:
    """The model of a shape. `--layers` and `--pattern` override; a peer has its own letter in every layer.

    Mixers of other letters have the sizes of the peers of that name, vector RNNs as many heads of V as M²RNN.
    """
    s = context.shape
    depth, mlp, vocabulary = SIZES.get(s.name, SMALL)
    pattern = letter * (len(context.pattern) if context.pattern else context.layers or depth)
    if letter == "M" and context.pattern:
        pattern = context.pattern
    heads: dict[str, Any] = dict(num_q_heads=s.Nq, num_k_heads=s.Nk, num_v_heads=s.Nv)
    heads |= dict(num_f_heads=s.Nf, num_w_heads=s.Nw)
    H, K, V = gated_delta.sizes(s)
    return LMConfig(
        vocab_size=vocabulary,
        hidden_size=s.width,
        pattern=pattern,
        mlp_size=mlp,
        m2rnn=M2RNNConfig(num_heads=s.N, key_dim=s.K, value_dim=s.V, state_grad_clip=context.clip, **heads),
        attention=AttentionConfig(num_heads=s.width // layers.HEAD_DIM),
        gated_deltanet=GatedDeltaNetConfig(num_heads=H, key_dim=K, value_dim=V),
        mamba2=Mamba2Config(num_heads=2 * s.width // mamba.P, state_size=mamba.STATE, intermediate_size=2 * s.width),
        vector_rnn=VectorRNNConfig(num_heads=s.N, head_dim=s.V, state_grad_clip=context.clip),
        gru=GRUConfig(num_heads=s.N, head_dim=s.V),
    )


def language_model(context: Context, letter: str, impl: str, *, compiled: bool) -> Problem:
    """A `HybridLM`; the gate looks at the losses of the first tokens and the gradient of every parameter."""
    s, device = context.shape, context.device
    impl, compiled = layers.runnable(context, impl), compiled and not context.sizes_only
    config = config_of(context, letter)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(context.seed)
        model = HybridLM(config, impl=impl, device=device, dtype=context.dtype)
    g = context.generator()
    tokens = torch.randint(config.vocab_size, (s.B, s.T + 1), generator=g, device=device)
    dy = torch.rand(s.B, s.T, generator=g, device=device) / (s.B * s.T)
    leaves: dict[str, Tensor] = dict(model.named_parameters())
    eager = HybridLM(config, impl="eager", device="meta", dtype=context.dtype)
    for module in eager.modules():
        if isinstance(module, GatedDeltaNet):
            module.impl = "torch"  # not the kernels that are judged by it
    loss: Callable[..., Tensor] = torch.compile(model.loss, fullgraph=True, dynamic=False) if compiled else model.loss
    step: Callable[..., Any] = torch.compile(model, dynamic=False) if compiled else model

    def call(given: Leaves) -> tuple[Tensor, ...]:
        return (loss(tokens[:, :-1], tokens[:, 1:], reduction="none"),)

    def eager_call(given: Leaves, steps: int | None) -> tuple[Tensor, ...]:
        short = tokens if steps is None else tokens[:, : steps + 1]
        logits = functional_call(eager, dict(given), (short[:, :-1],))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), short[:, 1:].flatten(), reduction="none")
        return (nll.view(s.B, -1),)

    @torch.inference_mode()
    def prefilled(length: int) -> Any:
        cache = model.init_cache(s.B, device=device)
        for first in range(0, length, 4096):
            _, cache = model(tokens[:, first : min(first + 4096, length)], cache=cache, logits_to_keep=1)
        return cache

    optimizers: list[torch.optim.Optimizer] = []

    def train() -> Callable[[], object]:
        if not optimizers:
            optimizers.append(torch.optim.AdamW(param_groups(model, 0.1), lr=1e-4, fused=device.type == "cuda"))

        def one_step() -> None:
            (y,) = call(leaves)
            y.backward(dy)
            optimizers[0].step()
            optimizers[0].zero_grad()

        return one_step

    caches: dict[int, Any] = {}

    def generate() -> Callable[[], object]:
        if s.T not in caches:
            caches[s.T] = prefilled(s.T)
        token = tokens[:, -1:]

        def one_token() -> object:
            with torch.inference_mode():
                return step(token, cache=caches[s.T])

        return one_token

    def check_generation() -> tuple[Tensor, Tensor, Tensor]:
        length = min(s.T, GATE_STEPS)
        with torch.inference_mode():
            got, _ = step(tokens[:, length : length + 1], cache=prefilled(length))
            uncached = functional_call(eager, leaves, (tokens[:, : length + 1],), {"logits_to_keep": 1})
            double = {name: p.double() for name, p in leaves.items()}
            truth = functional_call(eager, double, (tokens[:, : length + 1],), {"logits_to_keep": 1})
        return got, truth, uncached

    kind = f"language model {_short(config.pattern)}, width {s.width}, {model.num_parameters() / 1e6:.3g}M parameters"
    return Problem(
        operator=kind,
        leaves=leaves,
        call=call,
        naive=eager_call,
        yardstick=eager_call,
        family=f"model {config.pattern}",
        dy=dy,
        steps=s.T,
        gate_steps=min(s.T, GATE_STEPS),
        slack=layers.SLACK,
        tolerated=tolerated(context) if "G" in config.pattern else 0.0,  # its kernels are a peer's
        work=_work(context, config, model),
        tokens=s.B * s.T,
        modes={"train": train, "generate": generate},
        tokens_of_mode={"generate": s.B},
        extra_gate={"generate": check_generation},
    )


def _work(context: Context, config: LMConfig, model: HybridLM) -> dict[str, Work]:
    """Lower bounds of a training step and of one generated token; AdamW reads p, g, m, v and writes p, m, v.

    None of models with other mixers than M²RNN and attention.
    """
    if set(config.pattern) - set("MA"):
        return {}
    s, dtype = context.shape, context.dtype_name
    heads = s.width // layers.HEAD_DIM
    mixers = {"M": scan_work(s, dtype), "A": attention_work(s, heads, layers.HEAD_DIM, dtype)}
    total = {name: Work(0, 0, 0, 0) for name in ("forward", "backward")}
    for letter in config.pattern:
        total = {name: work + mixers[letter][name] for name, work in total.items()}
    parameters = model.num_parameters()
    matrices = layers.weights_of(model) + config.vocab_size * config.hidden_size  # the embedding makes the logits
    work = layer_work(total, s.B * s.T, 0, matrices, dtype)
    states, keys = s.B * s.N * s.K * s.V, s.B * s.T * s.width
    recurrent, attending = config.pattern.count("M"), config.pattern.count("A")
    scores = attending * s.B * heads * s.T
    return {
        **work,
        "optimizer": Work(0, 0, 7 * context.itemsize * parameters, 0),
        "generate": Work(
            recurrent * states + scores,
            2.0 * s.B * matrices + recurrent * 2 * states * (s.V + 3) + 4 * scores * layers.HEAD_DIM,
            context.itemsize * (matrices + attending * 2 * keys) + recurrent * 2 * 4 * states,
            len(config.pattern),
        ),
    }


def _short(pattern: str) -> str:
    return f"{pattern[0]} x {len(pattern)}" if len(set(pattern)) == 1 and len(pattern) > 4 else pattern
