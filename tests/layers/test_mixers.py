# SPDX-License-Identifier: Apache-2.0
"""What holds for every mixer behind the one interface: caches, packing, padding, compilation, weight decay."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from m2rnn_compile.layers import GRU, M2RNN, Attention, GatedDeltaNet, Mamba2, VectorRNN, param_groups, select_rows
from tests.layers import recurrences
from tests.layers.equations import assert_same

D = 24
MIXERS = {
    "m2rnn": lambda **f: M2RNN(D, num_heads=4, key_dim=8, value_dim=4, **f),
    "gated-deltanet": lambda **f: GatedDeltaNet(D, num_heads=2, key_dim=8, value_dim=12, **f),
    "negative-eigenvalues": lambda **f: GatedDeltaNet(
        D, num_heads=2, key_dim=8, value_dim=4, allow_neg_eigval=True, use_gate=False, **f
    ),
    "attention": lambda **f: Attention(D, num_heads=4, num_kv_heads=2, rope_theta=100.0, **f),
    "mamba2": lambda **f: Mamba2(D, num_heads=4, state_size=8, intermediate_size=24, num_groups=2, **f),
    "vector-rnn": lambda **f: VectorRNN(D, num_heads=3, head_dim=4, **f),
    "gru": lambda **f: GRU(D, num_heads=3, head_dim=4, **f),
}


def make(name, dtype=torch.float64):
    """Weights large enough for every part to matter."""
    mixer = MIXERS[name](dtype=dtype)
    with torch.no_grad():
        for p in mixer.parameters():
            if p.dim() >= 2:
                p.add_(0.3 * torch.randn_like(p))
    return mixer


@pytest.fixture(params=MIXERS)
def mixer(request):
    return make(request.param)


@pytest.mark.parametrize("cuts", [[70], [1] * 8 + [62], [33, 1, 36], [0, 69, 1]], ids=str)
def test_prefill_and_decode_equal_forward(mixer, cuts):
    x = torch.randn(2, 70, D).double()
    cache, ys = mixer.init_cache(2), []
    with torch.no_grad():
        for part in x.split(cuts, 1):
            before = [t.clone() for t in cache]
            y, new = mixer(part, cache=cache)
            assert all(map(torch.equal, cache, before)), "the cache that was passed in was modified"
            assert type(new) is type(cache)
            ys.append(y)
            cache = new
        assert_same(torch.cat(ys, 1), mixer(x))


def test_packed_equals_separate(mixer):
    bounds = torch.tensor([0, 3, 3, 67, 68])
    x = torch.randn(1, 68, D).double().requires_grad_()
    got = mixer(x, cu_seqlens=bounds)
    parts = x.split(bounds.diff().tolist(), 1)
    expected = torch.cat([mixer(part) for part in parts if part.shape[1]], 1)
    assert_same(got, expected)
    dy = torch.randn_like(got)
    leaves = [x, *mixer.parameters()]
    for pair in zip(*(torch.autograd.grad(y, leaves, dy) for y in (got, expected)), strict=True):
        assert_same(*pair)


@pytest.mark.parametrize("cuts", [[8], [3, 5], [1] * 8], ids=str)
def test_left_padding_changes_nothing(mixer, cuts):
    lengths = [8, 4, 1]
    rows = [torch.randn(1, n, D).double() for n in lengths]
    x = torch.cat([torch.cat([torch.full((1, 8 - r.shape[1], D), 5.0).double(), r], 1) for r in rows])
    mask = torch.arange(8)[None] >= (8 - torch.tensor(lengths))[:, None]
    cache, ys = mixer.init_cache(3), []
    with torch.no_grad():
        for part, m in zip(x.split(cuts, 1), mask.split(cuts, 1), strict=True):
            y, cache = mixer(part, cache=cache, attention_mask=m)
            ys.append(y)
        y = torch.cat(ys, 1)
        assert y.isfinite().all()
        for b, row in enumerate(rows):
            assert_same(y[b : b + 1, 8 - lengths[b] :], mixer(row))
        _, branched = mixer(x[:, :1], cache=select_rows(cache, torch.tensor([2, 2, 0])))
        assert branched[0].shape[0] == 3


# Tokens of every row in each turn: shorter rows are padded on the left, rows without any are skipped.
TURNS = [[5, 5, 3], [2, 4, 0], [0, 1, 1], [1, 0, 6], [3, 3, 3], [1, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("turns", [TURNS, [*TURNS[:2], [0, 0, 0], [2, 2, 2]]], ids=["turns", "all-pads"])
def test_padding_in_later_turns_changes_nothing(mixer, turns):
    """Every turn goes on from the cache of the one before; each row alone, in one call, is the oracle."""
    lengths = torch.tensor(turns).sum(0).tolist()
    rows = [torch.randn(1, n, D).double().requires_grad_() for n in lengths]
    cache, read, ys = mixer.init_cache(3), [0, 0, 0], [[], [], []]
    for turn in turns:
        T = max(max(turn), 1)
        parts, mask = [], torch.arange(T)[None] >= T - torch.tensor(turn)[:, None]
        for b, n in enumerate(turn):
            parts.append(torch.cat([torch.full((1, T - n, D), 5.0).double(), rows[b][:, read[b] : read[b] + n]], 1))
            read[b] += n
        y, cache = mixer(torch.cat(parts), cache=cache, attention_mask=None if mask.all() else mask)
        assert y.isfinite().all()
        for b, n in enumerate(turn):
            ys[b].append(y[b : b + 1, T - n :])
    got, expected = [torch.cat(y, 1) for y in ys], [mixer(row) for row in rows]
    leaves = [*rows, *mixer.parameters()]
    dys = [1e-3 * torch.randn_like(y) for y in got]  # small: a step of M2RNN from a cache does not clip gradients
    for y, row in zip(got, expected, strict=True):
        assert_same(y, row)
    for pair in zip(*(torch.autograd.grad(y, leaves, dys) for y in (got, expected)), strict=True):
        assert_same(*pair)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("layout", ["batch", "cached", "packed"])
def test_no_steps_forward_and_backward(mixer, layout, compiled):
    call = torch.compile(mixer, fullgraph=True, backend="aot_eager") if compiled else mixer
    x = torch.randn(1, 0, D).double().requires_grad_()
    if layout == "cached":
        cache = type(mixer.init_cache(1))(*(t.requires_grad_(t.is_floating_point()) for t in mixer.init_cache(1)))
        y, new = call(x, cache=cache)
        kept = [(a, b) for a, b in zip(new, cache, strict=True) if a.requires_grad]
        assert all(map(torch.equal, new, cache))
        for a, b in kept:
            (grad,) = torch.autograd.grad(a.sum(), b, retain_graph=True)
            assert torch.equal(grad, torch.ones_like(b))
    else:
        y = call(x, cu_seqlens=torch.tensor([0, 0, 0]) if layout == "packed" else None)
    assert y.shape == (1, 0, D)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not any(p.grad.any() for p in mixer.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", MIXERS)
def test_compiled_padding_in_a_later_turn(name):
    mixer = make(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mixer, fullgraph=True, backend=counter)
    with torch.no_grad():
        for first, T in ((6, 4), (9, 7), (5, 12), (17, 33)):
            _, cache = mixer(torch.randn(3, first, D).double(), cache=mixer.init_cache(3))
            x, mask = torch.randn(3, T, D).double(), torch.arange(T)[None] >= torch.tensor([[2], [0], [T]])
            got, expected = (f(x, cache=cache, attention_mask=mask) for f in (compiled, mixer))
            assert_same(got[0], expected[0])
            for a, b in zip(got[1], expected[1], strict=True):
                assert_same(a.double(), b.double())
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", MIXERS)
def test_compiled_without_graph_breaks_at_most_twice(name):
    mixer = make(name, torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mixer, fullgraph=True, backend=counter)
    for T in (16, 5, 33, 64, 2, 65, 7, 100, 31, 12):
        x = torch.randn(2, T, D, requires_grad=True)
        y, expected = compiled(x), mixer(x)
        assert_same(y, expected)
        dy = torch.randn_like(y)
        for pair in zip(*(torch.autograd.grad(v, [x, *mixer.parameters()], dy) for v in (y, expected)), strict=True):
            assert_same(*pair, roundings=4000)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", MIXERS)
def test_autocast_trains_in_bf16(name):
    mixer = make(name, torch.float32)
    x = torch.randn(2, 20, D)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    y.float().square().mean().backward()
    exact = mixer(x)
    assert (y - exact).norm() <= 0.05 * exact.norm()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in mixer.parameters())


@pytest.mark.parametrize("name", MIXERS)
def test_what_is_not_decayed(name):
    kept = {"A_log", "dt_bias", "D", "bias"}
    for group in param_groups(MIXERS[name](), 0.1):
        for full in group["param_names"]:
            exempt = full.rpartition(".")[2] in kept or "norm" in full
            assert exempt == (group["weight_decay"] == 0), full


@pytest.mark.parametrize("name", MIXERS)
def test_a_cache_of_another_batch_is_refused(name):
    mixer = make(name)
    with pytest.raises(ValueError, match=r"`cache\.\w+` must have shape"):
        mixer(torch.zeros(2, 3, D).double(), cache=mixer.init_cache(1))


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", MIXERS)
def test_a_gpu_gives_what_a_cpu_gives(name, packed):
    mixer = make(name)
    x = torch.randn(1, 70, D).double()
    dy = torch.randn_like(x)
    options = dict(cu_seqlens=torch.tensor([0, 3, 3, 67, 70])) if packed else {}
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        mixer.to(device, dtype)
        leaf = x.detach().to(device, dtype).requires_grad_()
        y = mixer(leaf, **{n: t.to(device) for n, t in options.items()})
        results.append((y, *torch.autograd.grad(y, [leaf, *mixer.parameters()], dy.to(device, dtype))))
    for a, b in zip(*results, strict=True):
        assert (a.cpu() - b.cpu().double()).norm() <= 1e-4 * a.norm()


def written_out_deltanet(m, x):
    """[T, D] of one sequence, order of operations as in the released models."""
    T, (H, K, V) = x.shape[0], (m.num_heads, m.key_dim, m.value_dim)
    qkv = x @ m.qkv_proj.weight.T
    conv = torch.zeros_like(qkv)
    for t in range(T):
        for j in range(4):
            if t - j >= 0:
                conv[t] = conv[t] + qkv[t - j] * m.qkv_conv1d.weight[:, 0, 3 - j]
    q, k, v = (conv * torch.sigmoid(conv)).split(m.qkv_sizes, -1)
    q, k, v = q.view(1, T, H, K), k.view(1, T, H, K), v.view(1, T, H, V)
    a, b, gate = (x @ m.ab_proj.weight.T).split(m.ab_sizes, -1)
    g = -m.decay_gate.A_log.exp() * F.softplus(a + m.decay_gate.dt_bias)
    beta = torch.sigmoid(b) * (2 if m.allow_neg_eigval else 1)
    q, k = q / (q.square().sum(-1, True) + 1e-6).sqrt() / K**0.5, k / (k.square().sum(-1, True) + 1e-6).sqrt()
    o = recurrences.linear_rnn(q, k, v, g[None], beta[None])[0][0]
    if m.use_gate:
        o = o * F.silu(gate.view(T, H, V))
    o = o / (o.square().mean(-1, True) + 1e-5).sqrt() * m.o_norm.weight
    return o.flatten(1) @ m.o_proj.weight.T


@pytest.mark.parametrize("name", ["gated-deltanet", "negative-eigenvalues"])
def test_gated_deltanet_is_its_equations(name):
    mixer, x = make(name), torch.randn(2, 6, D).double()
    assert_same(mixer(x), torch.stack([written_out_deltanet(mixer, row) for row in x]))


def test_mamba2_is_its_equations():
    m, x = make("mamba2"), torch.randn(1, 6, D).double()
    gate, xBC, dt = (x @ m.in_proj.weight.T).split(m.projection_sizes, -1)
    weight = m.conv1d.weight
    conv = F.conv1d(xBC.transpose(1, 2), weight, m.conv1d.bias, padding=3, groups=weight.shape[0])[..., :6]
    v, B, C = F.silu(conv.transpose(1, 2)).split(m.conv_sizes, -1)
    step = F.softplus(dt + m.decay_gate.dt_bias)
    y = torch.zeros(1, 6, 4, 6).double()
    for h in range(4):
        group, S = h // 2, torch.zeros(8, 6).double()
        for t in range(6):
            b, c, v_t = (B[0, t].view(2, 8)[group], C[0, t].view(2, 8)[group], v[0, t].view(4, 6)[h])
            decay = torch.exp(-step[0, t, h] * m.decay_gate.A_log[h].exp())
            S = decay * S + step[0, t, h] * torch.outer(b, v_t)
            y[0, t, h] = c @ S + m.D[h] * v_t
    y = y.flatten(2) * F.silu(gate)
    y = y / (y.square().mean(-1, True) + 1e-5).sqrt() * m.norm.weight
    assert_same(m(x), y @ m.out_proj.weight.T)


def test_vector_rnn_is_its_equations():
    m, x = make("vector-rnn"), torch.randn(2, 6, D).double()
    u, g = (x @ m.input_projection.weight.T).chunk(2, -1)
    u = F.conv1d(u.transpose(1, 2), m.conv1d.weight, padding=3, groups=12)[..., :6].transpose(1, 2)
    u = F.silu(u).view(2, 6, 3, 4)
    h, hs = torch.zeros(2, 3, 4).double(), []
    for t in range(6):
        h = torch.tanh(torch.einsum("bnv,nvw->bnw", h, m.state_weight) + u[:, t])
        hs.append(h)
    y = torch.stack(hs, 1).flatten(2) * F.silu(g)
    y = y / (y.square().mean(-1, True) + 1e-5).sqrt() * m.norm.weight
    assert_same(m(x), y @ m.output_projection.weight.T)


def test_negative_eigenvalues_can_flip_a_sign():
    """With g = 0 and β = 2 the transition is a reflection: twice is the identity. With β ≤ 1 nothing can flip."""
    from m2rnn_compile.layers import linear_rnn

    key = F.normalize(torch.randn(1, 1, 1, 8).double(), dim=-1)
    state = torch.randn(1, 1, 8, 4).double()
    zero = torch.zeros(1, 1, 1, 4).double()
    reflect = lambda S: linear_rnn(key, key, zero, zero[..., 0], 2 + zero[..., 0], initial_state=S).final_state
    once = reflect(state)
    along = torch.einsum("bhkv,bthk->bhv", state, key)
    assert_same(torch.einsum("bhkv,bthk->bhv", once, key), -along)
    assert_same(reflect(once), state)


def test_options_that_do_not_fit():
    for bad, message in (
        (lambda: GatedDeltaNet(D, num_heads=0), "`num_heads` must be at least 1, got 0"),
        (lambda: GatedDeltaNet(D, num_heads=1, impl="fast"), "`impl` must be one of"),
        (lambda: Mamba2(D, num_heads=5, intermediate_size=24), "`intermediate_size` must be a multiple of 5, got 24"),
        (lambda: Mamba2(D, num_heads=4, intermediate_size=24, num_groups=3), "`num_heads` must be a multiple of 3"),
        (lambda: VectorRNN(D, num_heads=2, head_dim=0), "VectorRNN: `head_dim` must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
