# SPDX-License-Identifier: Apache-2.0
"""`M2RNN(conv_size=None)`: no conv, no SiLU; against the equations, packed, padded, decoded, pooled, compiled."""

import json
import math

import pytest
import torch

from m2rnn_compile.layers import M2RNN, M2RNNCache, write_rows
from m2rnn_compile.models import HybridLM, LMConfig, M2RNNConfig, generate
from m2rnn_compile.models.checkpoint import CheckpointError
from m2rnn_compile.models.lm_engine import RowOrders, config_from_released, config_to_released
from tests.layers import equations
from tests.layers.equations import assert_same, run_module

D = 24


def make(dtype=torch.float64, **options):
    layer = M2RNN(D, **(dict(num_heads=4, key_dim=6, value_dim=5, conv_size=None) | options), dtype=dtype)
    with torch.no_grad():
        layer.input_projection.weight.mul_(12)
        layer.state_weight.add_(0.2 * torch.randn_like(layer.state_weight))
    return layer


def inputs(*shape):
    return torch.randn(*shape, D).double()


@pytest.mark.parametrize("heads", [{}, dict(num_q_heads=2, num_v_heads=1, num_f_heads=2, num_g_heads=2)])
@pytest.mark.parametrize("lengths", [None, [4, 0, 9]])
def test_equals_the_equations_packed_or_not(heads, lengths):
    layer, B = make(**heads), 2 if lengths is None else 1
    x, dy = inputs(B, 13), inputs(B, 13)
    packed = {} if lengths is None else dict(cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
    assert_same(
        run_module(layer, x, dy, **packed), equations.run(layer, x, dy, torch.float64, lengths=lengths)
    )  # fmt: skip


def test_q_k_and_v_have_both_signs_and_know_their_own_token_only():
    layer, x = make(), inputs(1, 6)
    seen = {}
    layer._heads = lambda qkv: seen.update(qkv=qkv) or M2RNN._heads(layer, qkv)
    layer(x)
    assert (seen["qkv"] < -1).any()
    assert (seen["qkv"] > 1).any()
    assert_same(seen["qkv"], torch.nn.functional.linear(x, layer.input_projection.weight)[..., :32])


@pytest.mark.parametrize("cuts", [[13], [1] * 13, [5, 8], [2, 1, 1, 9], [0, 13]])
def test_prefill_and_decode_equal_forward(cuts):
    layer, x = make(), inputs(2, 13)
    cache, ys = layer.init_cache(2), []
    assert [tuple(c.shape) for c in cache] == [(2, 0, 32), (2, 4, 6, 5)]
    for part in x.split(cuts, 1):
        before = cache.state.clone()
        y, new = layer(part, cache=cache)
        assert torch.equal(cache.state, before), "the cache passed in was modified"
        assert isinstance(new, M2RNNCache)
        ys.append(y)
        cache = new
    assert_same(torch.cat(ys, 1), layer(x))
    assert_same(cache.state, layer(x, cache=layer.init_cache(2))[1].state)


def test_packed_cache_and_left_padding():
    layer, lengths = make(), [4, 0, 9]
    x = inputs(1, 13)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    y, cache = layer(x, cache=layer.init_cache(3), cu_seqlens=cu)
    assert cache.state.shape[0] == 3
    for s, part in enumerate(x.split(lengths, 1)):
        alone, kept = layer(part, cache=layer.init_cache(1))
        assert_same(y.split(lengths, 1)[s], alone)
        assert_same(cache.state[s : s + 1], kept.state)

    mask = torch.arange(13)[None] >= torch.tensor([[0], [6]])
    x = inputs(2, 13)
    y, cache = layer(x, cache=layer.init_cache(2), attention_mask=mask)
    alone, kept = layer(x[1:, 6:], cache=layer.init_cache(1))
    assert_same(y[1:, 6:], alone)
    assert_same(cache.state[1:], kept.state)
    y, cache = layer(x[:, :1], cache=cache, attention_mask=torch.tensor([[1], [0]]))
    assert_same(cache.state[1:], kept.state)  # a pad


@torch.no_grad()
def test_a_pool_of_states():
    layer, x = make(), inputs(2, 9)
    pool = layer.init_cache(5)
    pool.state.normal_()
    untouched = pool.state[[0, 2, 4]].clone()
    write_rows(pool, torch.tensor([3, 1]), layer(x[:, :4], cache=layer.init_cache(2))[1])
    for t in range(4, 9):
        nan = torch.full((1, D), float("nan")).double()
        row = torch.stack([x[0, t, None], nan, x[1, t, None]])
        y, same = layer(row, cache=pool, state_indices=torch.tensor([3, -1, 1], dtype=torch.int32))
        assert same is pool
        assert not y[1].any()
        assert_same(y[[0, 2]], layer(x[:, : t + 1])[:, -1:])
    assert torch.equal(pool.state[[0, 2, 4]], untouched)
    for slots, message in (([5], "slots of the pool, 0 to 4"), ([-2], "slots of the pool"), ([1, 1], "at most once")):
        with pytest.raises(ValueError, match=message):
            layer(inputs(len(slots), 1), cache=pool, state_indices=torch.tensor(slots))


def test_a_pool_has_no_backward():
    layer = make()
    with pytest.raises(ValueError, match=r"no backward.*no_grad"):
        layer(inputs(1, 1), cache=layer.init_cache(2), state_indices=torch.tensor([0]))


def test_compiled_and_exported():
    layer = make(torch.float32).eval()
    compiled = torch.compile(layer, fullgraph=True)
    x, dy = torch.randn(2, 11, D), torch.randn(2, 11, D)
    assert_same(run_module(compiled, x, dy), run_module(layer, x, dy))
    with torch.no_grad():
        y, cache = compiled(x, cache=layer.init_cache(2))
        step, _ = compiled(x[:, :1], cache=cache)
        assert_same(y, layer(x))
        assert_same(step, layer(torch.cat([x, x[:, :1]], 1))[:, -1:])
        program = torch.export.export(layer, (x,), dynamic_shapes={"x": {1: torch.export.Dim("T")}})
        longer = torch.randn(2, 40, D)
        assert_same(program.module()(longer), layer(longer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["identity", "orthogonal", "normal"])
def test_starts_of_the_state_weight(name, dtype):
    W = M2RNN(D, num_heads=6, key_dim=4, value_dim=32, state_weight_init=name, dtype=dtype).state_weight.detach()
    assert W.dtype == dtype
    product = (W.double() @ W.double().mT - torch.eye(32).double()).abs()
    if name == "normal":
        assert abs(float(W.double().std()) - 32**-0.5) < 5 * 32**-0.5 / (2 * W.numel()) ** 0.5
    else:
        assert product.max() < 20 * torch.finfo(dtype).eps
        assert torch.equal(W, torch.eye(32, dtype=dtype).expand_as(W)) == (name == "identity")
    assert name == "identity" or not torch.equal(W[0], W[1])
    assert M2RNN(D, num_heads=6, state_weight_init=name, device="meta").state_weight.is_meta


def test_dt_init_decides_where_the_forget_gate_starts():
    """From (0.5, 2) most heads overwrite; from the released models' range many keep nearly all."""
    torch.manual_seed(0)
    starts = {}
    for dt_init in ((0.5, 2.0), (1e-3, 0.1), (0.3, 0.3)):
        gate = M2RNN(D, num_heads=400, key_dim=4, value_dim=2, dt_init=dt_init).decay_gate
        dt = torch.nn.functional.softplus(gate.dt_bias).detach()
        assert dt.min() >= dt_init[0] * (1 - 1e-5)
        assert dt.max() <= dt_init[1] * (1 + 1e-5)
        f = gate(torch.zeros(400)).detach()
        torch.testing.assert_close(f, torch.exp(-gate.A_log.exp() * dt).detach())
        starts[dt_init] = f.median()
    assert starts[0.5, 2.0] < 0.02
    assert starts[1e-3, 0.1] > 0.8


def test_init_std_scales_the_projections_alone():
    torch.manual_seed(0)
    layer = M2RNN(64, num_heads=8, key_dim=8, value_dim=16, conv_size=None, init_std=0.3, init_num_layers=2)
    assert layer.input_projection.weight.std().item() == pytest.approx(0.3, rel=0.03)
    assert layer.output_projection.weight.std().item() == pytest.approx(0.15, rel=0.05)
    assert torch.equal(layer.state_weight, torch.eye(16).expand(8, 16, 16))


@pytest.mark.parametrize("dt_init", [(0.0, 0.1), (0.1, 0.01), (-1.0, 1.0), (0.1, math.inf), (math.nan, 1.0), (0.1,)])
def test_a_range_of_dt_that_is_none_is_refused(dt_init):
    with pytest.raises(ValueError, match=r"`dt_init` must be \(low, high\) with 0 < low <= high.*got \("):
        make(dt_init=dt_init)


def test_options_are_checked():
    with pytest.raises(ValueError, match="`state_weight_init` must be one of identity, orthogonal, normal, got 'zero'"):
        make(state_weight_init="zero")
    with pytest.raises(ValueError, match="`conv_size` must be at least 1, got 0"):
        make(conv_size=0)
    assert not any("conv" in name for name in make().state_dict())


def test_a_model_without_convs_generates_and_has_a_released_config():
    m2rnn = M2RNNConfig(num_heads=4, key_dim=6, value_dim=5, conv_size=None)
    config = LMConfig(64, D, "MM", 32, m2rnn)
    model, prompt = HybridLM(config).eval(), torch.randint(0, 64, (2, 7))
    text = generate(model, prompt, max_new_tokens=5)
    for t in range(7, 12):
        assert torch.equal(model(text[:, :t])[:, -1].argmax(-1), text[:, t])
    assert LMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    record = json.loads(json.dumps(config_to_released(config, RowOrders())))
    block = record["sequence_mixer_blocks"][0]
    assert (block["kernel_size"], block["activation_function"]) == (None, None)
    assert config_from_released(record) == config
    for layer in record["sequence_mixer_blocks"]:
        layer["activation_function"] = "silu"
    with pytest.raises(CheckpointError, match="`activation_function` is 'silu'"):
        config_from_released(record)
