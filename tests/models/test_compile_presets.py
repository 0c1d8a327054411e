# SPDX-License-Identifier: Apache-2.0
"""Every preset, scaled down: one graph, at most two compilations over ten lengths, compiled as accurate as eager."""

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from m2rnn_compile.layers import MoE, SwiGLU
from m2rnn_compile.models import PRESETS, HybridLM, miniature, preset
from m2rnn_compile.testing.judge import assert_accurate
from tests.layers.equations import assert_same

# Each preset by the kinds of layers it has; its MLPs are experts in the 7B models.
PATTERNS = {
    "m2rnn-410m": "M",
    "gated-deltanet-410m": "G",
    "softmax-410m": "A",
    "hybrid-m2rnn-410m": "MA",
    "hybrid-gated-deltanet-410m": "GA",
    "hybrid-gated-deltanet+1-410m": "MGA",
    "hybrid-gated-deltanet+3-410m": "GMA",
    "m2rnn-7b": "M",
    "gated-deltanet-7b": "G",
    "softmax-7b": "A",
    "hybrid-m2rnn-7b": "MA",
    "hybrid-gated-deltanet-7b": "GA",
    "hybrid-gated-deltanet+1-7b": "MGA",
    "hybrid-gated-deltanet+5-7b": "GMA",
}
# Graph breaks and compilations are Dynamo's doing. AOTAutograd, which takes most of the time, sees every kind of layer
# with each kind of MLP in the presets that are not here.
DYNAMO_ALONE = [n for n in PATTERNS if "+3" in n or (n.endswith("7b") and "+5" not in n)]


def small(name, dtype=torch.float32, layers=None):
    config = miniature(preset(name), hidden_size=16, vocab_size=64)
    torch.manual_seed(0)
    model = HybridLM(dataclasses.replace(config, pattern=PATTERNS[name][:layers]), dtype=dtype)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.dim() >= 2 and "state_weight" not in n and not n.endswith(".D"):
                p.mul_(5)
    return model


def test_every_preset_is_here_with_every_kind_of_its_layers():
    assert set(PATTERNS) == set(PRESETS)
    for name, pattern in PATTERNS.items():
        assert set(pattern) == set(preset(name).pattern)
        kinds = {type(block.mlp_block) for block in small(name).transformer.h}
        assert kinds == {MoE if name.endswith("7b") else SwiGLU}


@pytest.mark.parametrize("name", PATTERNS)
def test_one_graph_and_at_most_two_compilations(name):
    model = small(name)
    counter = CompileCounterWithBackend("eager" if name in DYNAMO_ALONE else "aot_eager")
    compiled = torch.compile(model.loss, fullgraph=True, backend=counter)
    for i, T in enumerate((9, 16, 5, 33, 21, 70, 7, 12, 30, 11)):
        x, y = torch.randint(0, 64, (2, 2, T))
        got, expected = compiled(x, y), model.loss(x, y)
        assert_same(got, expected)
        if i in (0, 5):
            params = list(model.parameters())
            for pair in zip(*(torch.autograd.grad(loss, params) for loss in (got, expected)), strict=True):
                assert_same(*pair, roundings=4000)
    assert counter.frame_count <= 2


def test_export_with_dynamic_batch_and_time():
    """Gated DeltaNet, attention and experts pass through torch.export; M²RNN's own export is tested in test_lm."""
    model = small("hybrid-gated-deltanet+5-7b").eval()
    shapes = {"tokens": {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}}
    with torch.inference_mode():
        program = torch.export.export(model, (torch.zeros(2, 16, dtype=torch.int64),), dynamic_shapes=shapes)
        loaded = program.module()
        for shape in ((2, 16), (1, 1), (3, 70)):
            x = torch.randint(0, 64, shape)
            assert_same(loaded(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hybrid-gated-deltanet+5-7b", "softmax-410m"])  # each kind of layer and of MLP
def test_inductor_keeps_the_accuracy_rule(name):
    """Logits and every gradient, in fp32 through Inductor, against the same model in fp64."""
    x, dy = torch.randint(0, 64, (2, 21)), torch.randn(2, 21, 64)

    def run(model, call):
        model.eval()  # the experts a token is sent to must be the same in every precision: no auxiliary loss
        y = call(x)
        grads = torch.autograd.grad(y, list(model.parameters()), dy.to(y.dtype))
        return {"y": y.detach()} | dict(zip((n for n, _ in model.named_parameters()), grads, strict=True))

    model, truth = small(name), small(name, torch.float64)
    truth.load_state_dict(model.state_dict())
    eager = run(model, model)
    assert_accurate(run(model, torch.compile(model, fullgraph=True)), run(truth, truth), eager)
