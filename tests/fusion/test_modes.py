# SPDX-License-Identifier: Apache-2.0
"""The fused op under the compiler's other modes: cudagraph configuration, checkpointing policies, compiled autograd."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from m2rnn_compile import M2RNN
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
    layer, x = make_layer(), torch.randn(2, 9, 24, requires_grad=True)
    ops = (torch.ops.m2rnn.scan.default, torch.ops.m2rnn.fused_scan_packed.default)

    def choose(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return policy if op in ops else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, choose)
    backend = Rewriting()
    compiled = torch.compile(
        lambda x: checkpoint(layer, x, use_reentrant=False, context_fn=contexts), backend=backend, fullgraph=True
    )
    assert_close(gradients(compiled(x), layer, x), gradients(layer(x), layer, x))
    assert "SiLU(g)" in backend.parts()


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


def test_no_graph_breaks_in_training() -> None:
    layer = make_layer()
    report = torch._dynamo.explain(layer)(torch.randn(2, 9, 24))
    assert report.graph_count == 1
    assert report.graph_break_count == 0
