# SPDX-License-Identifier: Apache-2.0
"""The fused op under the compiler's other modes: cudagraph configuration, checkpointing policies, compiled autograd."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from m2rnn_compile import M2RNN, m2rnn
from m2rnn_compile.lowering.inductor import hook
from tests.fusion.compiling import Rewriting, fusion_on_cpu

__all__ = ["fusion_on_cpu"]
pytestmark = pytest.mark.usefixtures("fusion_on_cpu")


def make_layer() -> M2RNN:
    return M2RNN(24, num_heads=4, key_dim=8, value_dim=4)


def gradients(y: Tensor, layer: M2RNN, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))


def assert_close(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_mode(mode: str) -> None:
    """On a CPU there is nothing to capture: the configuration is what is tested here, the graphs on a GPU."""
    layer, x = make_layer(), torch.randn(2, 9, 24, requires_grad=True)
    compiled = torch.compile(layer, mode=mode, fullgraph=True)
    hook.RECORDS.clear()
    assert_close(gradients(compiled(x), layer, x), gradients(layer(x), layer, x))
    assert len(hook.RECORDS) == 1
    assert "RMSNorm over N·V" in hook.RECORDS[0].fused


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_selective_checkpointing(policy: CheckpointPolicy) -> None:
    """A policy knows an op by its name, and the rewrite's is `fused_mixer`."""
    layer, x = make_layer(), torch.randn(2, 9, 24, requires_grad=True)

    def choose(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return policy if op is torch.ops.m2rnn.fused_mixer.default else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, choose)
    backend, backwards = Rewriting(partition_fn=min_cut_rematerialization_partition), []
    backend.bw_compiler = lambda gm, _: backwards.append(gm.code) or make_boxed_func(gm)
    compiled = torch.compile(
        lambda x: checkpoint(layer, x, use_reentrant=False, context_fn=contexts), backend=backend, fullgraph=True
    )
    assert_close(gradients(compiled(x), layer, x), gradients(layer(x), layer, x))
    assert "SiLU(g)" in backend.parts()
    (code,) = backwards
    assert ("m2rnn.fused_mixer.default" in code) == (policy is not CheckpointPolicy.MUST_SAVE)
    assert "m2rnn.fused_mixer_backward.default" in code


def test_compiled_autograd() -> None:
    layer, x = make_layer(), torch.randn(2, 9, 24, requires_grad=True)
    expected = gradients(layer(x), layer, x)
    with torch._dynamo.config.patch(compiled_autograd=True):

        @torch.compile(backend=Rewriting())
        def step(x: Tensor) -> None:
            layer(x).square().sum().backward()

        step(x)
    assert x.grad is not None
    got = [x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
    assert_close(got, expected)


HOOKED = ("raw", "x_f", "g", "qkv", "q", "k", "v", "f", "y", "D ⊙ v", "SiLU(g)", "o")


@pytest.mark.parametrize("where", HOOKED)
def test_a_hook_on_a_gradient_in_between_is_heeded(where: str) -> None:
    """Under compiled autograd a hook is in the graph, and what the op takes in has no gradient of its own."""
    layer, x = make_layer(), torch.randn(2, 9, 24, requires_grad=True)

    def forward(x: Tensor) -> Tensor:
        def seen(name: str, t: Tensor) -> Tensor:
            if name == where:
                t.register_hook(lambda g: 3 * g)
            return t

        raw, x_f, g = layer.input_projection(x)[..., : sum(layer.projection_sizes)].split(layer.projection_sizes, -1)
        raw, x_f, g = seen("raw", raw), seen("x_f", x_f), seen("g", g)
        qkv = seen("qkv", F.silu(layer.conv1d(raw)[0]))
        q, k, v = layer._heads(qkv)
        q, k, v, f = seen("q", q), seen("k", k), seen("v", v), seen("f", layer.decay_gate(x_f))
        y = seen("y", m2rnn(q, k, v, f, layer.state_weight).y)
        o = (y + seen("D ⊙ v", layer.D * v)).flatten(-2) * seen("SiLU(g)", F.silu(g))
        return seen("o", layer.output_projection(layer.g_norm(o)))

    def step(x: Tensor) -> None:
        forward(x).square().sum().backward()

    results = []
    backend = Rewriting()
    with torch._dynamo.config.patch(compiled_autograd=True):
        for run in (step, torch.compile(step, backend=backend)):
            for p in (x, *layer.parameters()):
                p.grad = None
            run(x)
            results.append([p.grad for p in (x, *layer.parameters()) if p.grad is not None])
    assert_close(results[1], results[0])
    assert len(results[0]) > 8
    if where in ("f", "q", "D ⊙ v", "SiLU(g)"):
        assert any("register_hook" in why for record in backend.records for why in record.left), backend.records


def test_no_graph_breaks_in_training() -> None:
    layer = make_layer()
    report = torch._dynamo.explain(layer)(torch.randn(2, 9, 24))
    assert report.graph_count == 1
    assert report.graph_break_count == 0
