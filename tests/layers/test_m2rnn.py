# SPDX-License-Identifier: Apache-2.0
"""The M²RNN layer against the equations, packed, padded and decoded."""

import math

import pytest
import torch

from m2rnn_compile.layers import M2RNN, M2RNNCache, RMSNorm, param_groups, select_rows
from m2rnn_compile.testing.judge import assert_accurate
from tests.layers import equations
from tests.layers.equations import assert_same, run_module

D = 24
SHARING = {
    "multi_value": dict(num_heads=4),
    "mha": dict(num_heads=4, num_q_heads=4, num_k_heads=4),
    "mixed": dict(num_heads=4, num_q_heads=2, num_v_heads=1, num_f_heads=2, num_g_heads=2, num_w_heads=4),
    "one_head": dict(num_heads=1),
}


def make(dtype=torch.float64, *, scale=12.0, **options):
    """A layer whose weights are large enough for the state and the clip to matter."""
    layer = M2RNN(D, **(dict(num_heads=4, key_dim=6, value_dim=5) | options), dtype=dtype)
    with torch.no_grad():
        layer.input_projection.weight.mul_(scale)
        layer.conv1d.weight.mul_(25)
        layer.state_weight.add_(0.2 * torch.randn_like(layer.state_weight))
        layer.D.add_(0.1 * torch.randn_like(layer.D))
    return layer


def cu(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


@pytest.mark.parametrize("heads", SHARING.values(), ids=SHARING.keys())
@pytest.mark.parametrize("clip", [None, 1.0, 0.1])
def test_equals_the_equations_in_fp64(heads, clip):
    layer = make(**heads, state_grad_clip=clip)
    x, dy = torch.randn(2, 13, D).double(), torch.randn(2, 13, D).double()
    assert_same(run_module(layer, x, dy), equations.run(layer, x, dy, torch.float64))


def test_the_clip_bites_in_these_tests():
    """Otherwise the cases above would not tell one clip from another."""
    x, dy = torch.randn(2, 13, D).double(), torch.randn(2, 13, D).double()
    layer = make(state_grad_clip=None)
    free = run_module(layer, x, dy)
    layer.state_grad_clip = 0.1
    clipped = run_module(layer, x, dy)
    assert (free["dx"] - clipped["dx"]).norm() > 1e-3 * free["dx"].norm()


@pytest.mark.parametrize("dtype", [torch.float32])
def test_accuracy_rule(dtype):
    """Error against the fp64 oracle at most twice that of a careful eager run, per tensor and per time slice."""
    layer = make(dtype)
    x, dy = torch.randn(2, 40, D, dtype=dtype), torch.randn(2, 40, D, dtype=dtype)
    truth, eager = (equations.run(layer, x, dy, t) for t in (torch.float64, dtype))
    assert_accurate(run_module(layer, x, dy), truth, eager)


@pytest.mark.parametrize("lengths", [[5, 8], [1, 2, 3, 7], [0, 6, 0, 0, 7, 0], [13]])
def test_packed_equals_separate_in_values_and_all_gradients(lengths):
    layer = make()
    x, dy = torch.randn(1, 13, D).double(), torch.randn(1, 13, D).double()
    got = run_module(layer, x, dy, cu_seqlens=cu(lengths))
    assert_same(got, equations.run(layer, x, dy, torch.float64, lengths=lengths))


@pytest.mark.parametrize("cuts", [[13], [1] * 13, [5, 8], [2, 1, 1, 9], [0, 13]])
def test_prefill_and_decode_equal_forward(cuts):
    layer, x = make(), torch.randn(2, 13, D).double()
    expected, whole = layer(x, cache=layer.init_cache(2))
    y, cache = _in_pieces(layer, x, cuts)
    assert_same(layer(x), expected)
    assert_same(y, expected)
    assert_same(cache._asdict(), whole._asdict())


def _in_pieces(layer, x, cuts, drop=None):
    cache, ys = layer.init_cache(x.shape[0], dtype=x.dtype), []
    for part in x.split(cuts, 1):
        before = [c.clone() for c in cache]
        y, new = layer(part, cache=cache)
        assert all(map(torch.equal, cache, before)), "the cache passed in was modified"
        cache = new if drop is None else new._replace(**{drop: torch.zeros_like(getattr(new, drop))})
        ys.append(y)
    return torch.cat(ys, 1), cache


@pytest.mark.parametrize("drop", ["conv_state", "state"])
def test_a_lost_carry_would_be_seen(drop):
    layer, x = make(), torch.randn(2, 13, D).double()
    with pytest.raises(AssertionError, match="differs by"):
        assert_same(_in_pieces(layer, x, [5, 8], drop)[0], layer(x))


def test_swapped_rows_of_the_projection_would_be_seen(monkeypatch):
    layer = make()
    x, dy = torch.randn(2, 13, D).double(), torch.randn(2, 13, D).double()
    good = layer._project

    def swapped(x, pad):
        qkv, x_f, g = good(x, pad)
        k, q, v = qkv.split(layer.qkv_sizes, -1)  # as if the rows were k | q | v
        return torch.cat([q, k, v], -1), x_f, g

    monkeypatch.setattr(layer, "_project", swapped)
    with pytest.raises(AssertionError, match="differs by"):
        assert_same(run_module(layer, x, dy), equations.run(layer, x, dy, torch.float64))


def test_packed_cache_holds_one_row_a_sequence():
    layer, lengths = make(), [4, 0, 9]
    first, second = torch.randn(1, 13, D).double(), torch.randn(1, 6, D).double()
    y1, cache = layer(first, cache=layer.init_cache(3), cu_seqlens=cu(lengths))
    y2, _ = layer(second, cache=cache, cu_seqlens=cu([1, 2, 3]))
    for s, (a, b) in enumerate(zip(first.split(lengths, 1), second.split([1, 2, 3], 1), strict=True)):
        expected = layer(torch.cat([a, b], 1))
        got = torch.cat([y1.split(lengths, 1)[s], y2.split([1, 2, 3], 1)[s]], 1)
        assert_same(got, expected)


@pytest.mark.parametrize("chunks", [[12], [3, 9], [1] * 12, [6, 6]])
def test_left_padding_batch_of_one_and_of_n_agree(chunks):
    """Chunks that are all padding for some rows included."""
    layer = make()
    lengths, T = [12, 5, 1], 12
    rows = [torch.randn(1, n, D).double() for n in lengths]
    x = torch.cat(
        [torch.cat([torch.full((1, T - n, D), 3.0).double(), r], 1) for n, r in zip(lengths, rows, strict=True)]
    )
    mask = torch.arange(T)[None] >= (T - torch.tensor(lengths))[:, None]
    cache, ys = layer.init_cache(3), []
    for part, m in zip(x.split(chunks, 1), mask.split(chunks, 1), strict=True):
        y, cache = layer(part, cache=cache, attention_mask=m)
        ys.append(y)
    y = torch.cat(ys, 1)
    assert y.isfinite().all()
    assert_same(layer(x, attention_mask=mask)[mask], y[mask])
    for b, row in enumerate(rows):
        expected, alone = layer(row, cache=layer.init_cache(1))
        assert_same(y[b : b + 1, T - lengths[b] :], expected)
        assert_same(select_rows(cache, torch.tensor([b]))._asdict(), alone._asdict())


def test_pads_never_move_the_state():
    layer = make()
    state = torch.randn(2, 4, 6, 5).double()
    cache = layer.init_cache(2)._replace(state=state)
    for T in (1, 7):
        x = torch.randn(2, T, D).double() * 100
        _, after = layer(x, cache=cache, attention_mask=torch.zeros(2, T))
        assert torch.equal(after.state, state)


def test_padding_gets_no_gradient():
    layer, x = make(), torch.randn(2, 9, D).double().requires_grad_()
    mask = torch.arange(9)[None] >= torch.tensor([[4], [0]])
    (layer(x, attention_mask=mask)[mask]).pow(2).sum().backward()
    assert not x.grad[~mask].any()


def test_decay_stays_fp32_under_autocast():
    layer = make(torch.float32)
    seen = {}
    layer.decay_gate.register_forward_hook(lambda m, a, f: seen.update(f=f))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(2, 9, D))
        cache = layer(torch.randn(2, 9, D), cache=layer.init_cache(2))[1]
    assert seen["f"].dtype == torch.float32
    assert cache.state.dtype == torch.float32
    assert y.isfinite().all()
    half = M2RNN(D, num_heads=4, key_dim=6, value_dim=5, dtype=torch.bfloat16)
    assert {half.decay_gate.A_log.dtype, half.decay_gate.dt_bias.dtype} == {torch.float32}
    assert half(torch.randn(2, 3, D).bfloat16()).dtype == torch.bfloat16


def test_padded_projection_has_the_true_state_dict_and_gradient():
    layer = make()
    out = 2 * 6 + 4 * 5 + 4 + 4 * 5
    assert layer.input_projection.weight.shape == (out, D)
    assert out % 64 != 0
    x = torch.randn(2, 7, D).double().requires_grad_()
    grads = []
    for pad in (True, False):
        o = torch.cat(layer._project(x, pad=pad), -1)
        assert o.shape[-1] == out
        grads.append((o, *torch.autograd.grad(o, [x, layer.input_projection.weight], torch.ones_like(o))))
    for a, b in zip(*grads, strict=True):
        assert_same(a, b)


def test_padded_projection_is_one_product_of_a_multiple_of_64(monkeypatch):
    layer, widths = make(), []
    true_linear = torch.nn.functional.linear
    spy = lambda x, w, *rest: (widths.append(w.shape[0]), true_linear(x, w, *rest))[1]
    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    layer(torch.randn(1, 5, D).double())
    assert widths[0] == 64
    assert len(widths) == 2  # the second is the output projection


def test_state_dict_names_and_shapes():
    layer = M2RNN(32, num_heads=6, key_dim=8, value_dim=4, num_q_heads=2)
    assert {n: tuple(p.shape) for n, p in layer.state_dict().items()} == {
        "input_projection.weight": (16 + 8 + 24 + 6 + 24, 32),
        "decay_gate.A_log": (6,),
        "decay_gate.dt_bias": (6,),
        "conv1d.weight": (16 + 8 + 24, 1, 4),
        "D": (6, 4),
        "state_weight": (6, 4, 4),
        "g_norm.weight": (24,),
        "output_projection.weight": (32, 24),
    }


def test_size_of_the_released_410m_layer():
    layer = M2RNN(1024, num_heads=84, device="meta")
    inner = 84 * 16
    expected = (
        1024 * (64 + 64 + inner + 84 + inner) + (128 + inner) * 4 + 2 * 84 + 84 * 16 * 16 + 2 * inner + inner * 1024
    )
    assert sum(p.numel() for p in layer.parameters()) == expected
    assert math.prod(layer.init_cache(1).state.shape) == 86_016


def test_init_statistics():
    layer = M2RNN(256, num_heads=4096, key_dim=8, value_dim=1, init_num_layers=8)

    def std(w, expected):  # the estimate of a normal's std from n draws is off by expected / sqrt(2 n): allow 5 of them
        assert abs(float(w.std()) - expected) < 5 * expected / math.sqrt(2 * w.numel())

    std(layer.input_projection.weight, 0.02)
    std(layer.conv1d.weight, 0.02)
    std(layer.output_projection.weight, 0.02 / math.sqrt(16))
    assert torch.equal(layer.D, torch.ones(4096, 1))
    assert torch.equal(layer.state_weight, torch.ones(4096, 1, 1))
    A = layer.decay_gate.A_log.exp()
    assert 0 < A.min() < 0.1
    assert 15.9 < A.max() <= 16.001
    assert abs(A.mean() - 8) < 5 * 16 / math.sqrt(12 * 4096)
    log_dt = torch.nn.functional.softplus(layer.decay_gate.dt_bias).log()
    lo, hi = math.log(1e-3), math.log(0.1)
    assert lo - 1e-3 < log_dt.min() < lo + 0.1
    assert hi - 0.1 < log_dt.max() < hi + 1e-3
    assert abs(log_dt.mean() - (lo + hi) / 2) < 5 * (hi - lo) / math.sqrt(12 * 4096)


def test_weight_decay_groups():
    layer = torch.nn.ModuleDict(dict(m=make(), n=RMSNorm(3), lin=torch.nn.Linear(2, 2), ln=torch.nn.LayerNorm(2)))
    decay, rest = param_groups(layer, 0.3)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert set(rest["param_names"]) == {
        "m.decay_gate.A_log", "m.decay_gate.dt_bias", "m.D", "m.g_norm.weight", "n.weight", "lin.bias",
        "ln.weight", "ln.bias",
    }  # fmt: skip
    assert {"m.state_weight", "m.conv1d.weight", "lin.weight"} < set(decay["param_names"])
    assert len(decay["params"]) + len(rest["params"]) == len(list(layer.parameters()))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_heads=0), "`num_heads` must be at least 1, got 0"),
        (dict(num_heads=4, num_k_heads=3), r"`num_k_heads` must divide `num_heads` = 4, got 3.*\[1, 2, 4\]"),
        (
            dict(num_heads=4, num_v_heads=1, num_f_heads=2, num_w_heads=1),
            "at least one of q, k, v, f, w .* got at most 2",
        ),
        (dict(num_heads=4, key_dim=0), "`key_dim`"),
        (dict(num_heads=4, conv_size=0), "`conv_size`"),
        (dict(num_heads=4, impl="cuda"), "`impl` must be one of 'auto'"),
        (dict(num_heads=4, state_grad_clip=-1.0), "`state_grad_clip` must be >= 0"),
    ],
)
def test_constructor_errors_name_argument_and_way_out(options, message):
    with pytest.raises(ValueError, match=message):
        M2RNN(8, **options)


def test_call_errors():
    layer, x = make(), torch.randn(2, 4, D).double()
    with pytest.raises(ValueError, match=r"`x` must have shape \[B, T, 24\], got \(2, 4, 23\)"):
        layer(x[..., 1:])
    with pytest.raises(ValueError, match=r"batch must be 1.*reshape"):
        layer(x, cu_seqlens=cu([4, 4]))
    with pytest.raises(ValueError, match="either `cu_seqlens`"):
        layer(x[:1], cu_seqlens=cu([4]), attention_mask=torch.ones(1, 4))
    with pytest.raises(TypeError, match="int32 or int64"):
        layer(x[:1], cu_seqlens=cu([4]).float())
    with pytest.raises(ValueError, match="`attention_mask` must have shape"):
        layer(x, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="cu_seqlens"):
        layer(x[:1], cu_seqlens=cu([3]))
    for T in (4, 1):
        with pytest.raises(ValueError, match=r"`cache.conv_state` must have shape \(2, 3, 32\).*got \(3, 3, 32\)"):
            layer(x[:, :T], cache=layer.init_cache(3))
    with pytest.raises(ValueError, match=r"`cache.conv_state` must have shape \(3, 3, 32\).*got \(2, 3, 32\)"):
        layer(x[:1], cache=layer.init_cache(2), cu_seqlens=cu([1, 1, 2]))
    other = make(key_dim=5, value_dim=3, num_q_heads=2, num_k_heads=2)
    assert other.init_cache(2).conv_state.shape == layer.init_cache(2).conv_state.shape
    with pytest.raises(ValueError, match=r"`cache.state` must have shape \(2, 4, 6, 5\).*belongs to one layer"):
        layer(x, cache=other.init_cache(2))


def test_nan_in_one_row_stays_there():
    """Padded, packed, and under the mask: no row's values or gradients hear of another's."""
    layer, lengths = make(), [5, 8]
    x, dy = torch.randn(2, 6, D).double(), torch.randn(2, 6, D).double()
    bad = x.clone()
    bad[1, 2] = float("nan")
    clean, dirty = run_module(layer, x, dy), run_module(layer, bad, dy)
    assert torch.equal(clean["y"][0], dirty["y"][0])
    assert torch.equal(clean["dx"][0], dirty["dx"][0])
    assert dirty["y"][1, 2:].isnan().all()

    x, dy = torch.randn(1, 13, D).double(), torch.randn(1, 13, D).double()
    bad = x.clone()
    bad[0, 4] = float("inf")  # the last step of the first sequence, next to the second
    clean, dirty = (run_module(layer, t, dy, cu_seqlens=cu(lengths)) for t in (x, bad))
    assert torch.equal(clean["y"][:, 5:], dirty["y"][:, 5:])
    assert torch.equal(clean["dx"][:, 5:], dirty["dx"][:, 5:])
    assert not dirty["y"][:, 4].isfinite().all()

    mask = torch.arange(13)[None] >= 4
    hidden = x.masked_fill(~mask[..., None], float("nan"))
    assert torch.equal(layer(hidden, attention_mask=mask)[mask], layer(x, attention_mask=mask)[mask])


def test_no_steps_and_no_rows():
    layer = make()
    for B, T in ((2, 0), (0, 3)):
        y, cache = layer(torch.zeros(B, T, D).double(), cache=layer.init_cache(B))
        assert y.shape == (B, T, D)
        assert isinstance(cache, M2RNNCache)
        assert not cache.state.any()
