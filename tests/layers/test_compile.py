# SPDX-License-Identifier: Apache-2.0
"""The layer under torch.compile and torch.export."""

import io

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from m2rnn_compile.layers import M2RNN, M2RNNCache
from m2rnn_compile.testing.judge import assert_accurate
from tests.layers import equations
from tests.layers.equations import assert_same, run_module

D = 24


@pytest.fixture
def layer():
    return M2RNN(D, num_heads=4, key_dim=8, value_dim=4)


def test_compiled_training_keeps_the_accuracy_rule(layer):
    x, dy = torch.randn(2, 19, D), torch.randn(2, 19, D)
    truth, eager = (equations.run(layer, x, dy, t) for t in (torch.float64, torch.float32))
    assert_accurate(run_module(torch.compile(layer, fullgraph=True), x, dy), truth, eager)


def test_compiled_packed_and_padded(layer):
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(1, 19, D)
    cu = torch.tensor([0, 7, 7, 19])
    assert_same(compiled(x, cu_seqlens=cu), layer(x, cu_seqlens=cu))
    mask = torch.arange(19)[None] >= 4
    assert_same(compiled(x, attention_mask=mask)[mask], layer(x, attention_mask=mask)[mask])


def test_at_most_two_compilations_over_ten_lengths(layer):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for T in (16, 5, 33, 64, 2, 65, 7, 100, 31, 12):
        x = torch.randn(2, T, D, requires_grad=True)
        y = compiled(x)
        y.backward(torch.randn_like(y))
        assert_same(y, layer(x))
    assert counter.frame_count <= 2


def test_at_most_two_compilations_over_ten_packings(layer):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for i in range(10):
        lengths = torch.randint(0, 9, (3 + i,))
        lengths[0] += 2
        cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
        x = torch.randn(1, int(cu[-1]), D)
        assert_same(compiled(x, cu_seqlens=cu), layer(x, cu_seqlens=cu))
    assert counter.frame_count <= 2


def test_compiled_decoding(layer):
    """One graph for the prefill, one for the steps; the cache passes through as it is."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(2, 12, D)
    with torch.no_grad():
        y, cache = compiled(x[:, :6], cache=layer.init_cache(2))
        ys = [y]
        for t in range(6, 12):
            y, cache = compiled(x[:, t : t + 1], cache=cache)
            ys.append(y)
        assert isinstance(cache, M2RNNCache)
        assert_same(torch.cat(ys, 1), layer(x))
    assert counter.frame_count == 2


def test_export_round_trip(layer):
    B, T = torch.export.Dim("B"), torch.export.Dim("T")
    program = torch.export.export(layer, (torch.randn(3, 9, D),), dynamic_shapes={"x": {0: B, 1: T}})
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for shape in ((3, 9), (1, 1), (5, 40)):
        x = torch.randn(*shape, D)
        assert_same(loaded(x), layer(x))


def test_dynamic_true(layer):
    """Then Dynamo makes symbols of the layer's float options too, the clip among them."""
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (9, 20):
        x = torch.randn(2, T, D)
        assert_same(compiled(x), layer(x))
