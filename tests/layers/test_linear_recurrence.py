# SPDX-License-Identifier: Apache-2.0
"""The chunked linear recurrences and the GRU loop against their equations; as ops; refusals."""

import pytest
import torch

from m2rnn_compile.layers import linear_rnn, linear_rnn_step
from m2rnn_compile.layers.chunk_gradients import chunk_gradients
from m2rnn_compile.layers.gru_scan import gru_scan
from m2rnn_compile.layers.linear_recurrence import _fla_kernels, fla_unsupported
from m2rnn_compile.testing.judge import assert_accurate
from tests.layers import recurrences
from tests.layers.equations import assert_same


def inputs(B, T, H=2, K=6, V=4, dtype=torch.float64, device="cpu", strong=1.0):
    unit = lambda *s: torch.nn.functional.normalize(torch.randn(*s), dim=-1)
    tensors = dict(
        q=unit(B, T, H, K),
        k=unit(B, T, H, K),
        v=torch.randn(B, T, H, V),
        g=-strong * torch.rand(B, T, H),
        beta=2 * torch.rand(B, T, H),
    )
    wide = lambda name: torch.float32 if dtype.itemsize < 4 and name in ("g", "beta") else dtype
    return {n: x.to(device, wide(n)).requires_grad_() for n, x in tensors.items()}


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "sum"])
@pytest.mark.parametrize("T", [1, 63, 64, 130])
def test_equals_the_recurrence_with_gradients(T, delta):
    x = inputs(2, T)
    state = torch.randn(2, 2, 6, 4).double().requires_grad_()
    got = linear_rnn(**x, initial_state=state, delta=delta)
    expected = recurrences.linear_rnn(**x, state=state, delta=delta)
    assert_same(dict(zip("yS", got, strict=True)), dict(zip("yS", expected, strict=True)))
    dy, dS = torch.randn_like(got[0]), torch.randn_like(got[1])
    leaves = [*x.values(), state]
    grads = [torch.autograd.grad(out, leaves, (dy, dS)) for out in (got, expected)]
    assert_same(*(dict(zip([*x, "state"], g, strict=True)) for g in grads))


def test_a_dropped_carry_would_be_seen():
    x = inputs(1, 130)
    whole = linear_rnn(**x).y
    last = linear_rnn(**{n: t[:, 128:] for n, t in x.items()}).y
    assert (whole[:, 128:] - last).abs().max() > 0.01


def test_strong_decay_stays_finite():
    x = inputs(1, 100, strong=300.0, dtype=torch.float32)
    y = linear_rnn(**x).y
    y.sum().backward()
    assert y.isfinite().all()
    assert all(t.grad.isfinite().all() for t in x.values())


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "sum"])
def test_low_precision_keeps_the_accuracy_rule(delta):
    x = inputs(2, 150, dtype=torch.bfloat16)
    wide = {n: t.detach().double() for n, t in x.items()}
    low = {n: t.detach().float() for n, t in x.items()}
    truth, eager = (dict(y=recurrences.linear_rnn(**w, delta=delta)[0]) for w in (wide, low))
    assert_accurate(dict(y=linear_rnn(**x, delta=delta).y), truth, dict(y=eager["y"].bfloat16()))


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "sum"])
def test_packed_equals_separate(delta):
    bounds = [0, 70, 70, 71, 90]
    x = inputs(1, 90)
    states = torch.randn(4, 2, 6, 4).double()
    got = linear_rnn(**x, initial_state=states, cu_seqlens=torch.tensor(bounds), delta=delta)
    for s, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
        part = {n: t[:, a:b] for n, t in x.items()}
        y, S = linear_rnn(**part, initial_state=states[s : s + 1], delta=delta)
        assert_same(got.y[:, a:b], y)
        assert_same(got.final_state[s : s + 1], S)


def test_steps_equal_the_sequence():
    x, state = inputs(2, 5), torch.zeros(2, 2, 6, 4).double()
    for delta in (True, False):
        S, ys = state, []
        for t in range(5):
            y, S = linear_rnn_step(**{n: u[:, t] for n, u in x.items()}, state=S, delta=delta)
            ys.append(y)
        whole = linear_rnn(**x, delta=delta)
        assert_same(torch.stack(ys, 1), whole.y)
        assert_same(S, whole.final_state)
    assert not state.any()


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    x = inputs(1, 10, dtype=torch.float32)
    cu = torch.tensor([0, 4, 10]) if packed else None
    torch.library.opcheck(torch.ops.m2rnn.linear_rnn.default, (*x.values(), None, cu, True, "torch"))


def test_refusals_name_reason_and_way_out():
    x = inputs(1, 4)
    with pytest.raises(ValueError, match=r"`impl` must be one of"):
        linear_rnn(**x, impl="best")
    with pytest.raises(ValueError, match=r"impl='fla' cannot be used: tensors are on cpu.*impl='torch'"):
        linear_rnn(**x, impl="fla")
    assert "only the delta rule" in fla_unsupported(x["q"], x["v"], delta=False)


@pytest.mark.parametrize("T", [1, 9])
def test_gru_equals_the_recurrence_with_gradients(T):
    x = [torch.randn(2, T, 3, 4).double().requires_grad_() for _ in range(3)]
    weight, state = torch.randn(9, 4, 4).double().requires_grad_(), torch.randn(2, 3, 4).double().requires_grad_()
    got, expected = gru_scan(*x, weight, initial_state=state), recurrences.gru(*x, weight, state)
    dy = [torch.randn_like(t) for t in got]
    leaves = [*x, weight, state]
    for out in zip(got, expected, strict=True):
        assert_same(*out)
    for pair in zip(*(torch.autograd.grad(out, leaves, dy) for out in (got, expected)), strict=True):
        assert_same(*pair)


def test_gru_packed_equals_separate():
    x = [torch.randn(1, 9, 3, 4).double() for _ in range(3)]
    weight = torch.randn(9, 4, 4).double()
    bounds = [0, 4, 4, 9]
    h, last = gru_scan(*x, weight, cu_seqlens=torch.tensor(bounds))
    for s, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
        h_s, last_s = gru_scan(*(u[:, a:b] for u in x), weight)
        assert_same(h[:, a:b], h_s)
        assert_same(last[s : s + 1], last_s)


@pytest.mark.parametrize("bounds", [None, [0, 5, 5, 40, 41, 90]], ids=["padded", "packed"])
def test_gradients_within_chunks(bounds):
    """What stands in for flash-linear-attention's kernel, against autograd through the chunks' definition."""
    B, T, H, K, V, C = 1 if bounds else 2, 90, 2, 6, 4, 16
    pieces = [(b, a, min(a + C, e)) for b in range(B) for s, e in _segments(bounds, T) for a in range(s, e, C)]
    x = dict(q=torch.randn(B, T, H, K), k=torch.randn(B, T, H, K), w=torch.randn(B, T, H, K))
    x = {n: t.double().requires_grad_() for n, t in x.items()}
    g = -torch.rand(B, T, H).double()
    G = torch.zeros_like(g)
    for b, a, e in pieces:
        G[b, a:e] = g[b, a:e].cumsum(0)
    G.requires_grad_()
    u, do = torch.randn(B, T, H, V).double(), torch.randn(B, T, H, V).double()
    starts = {s for s, _ in _segments(bounds, T)}
    states, ends, values, loss, S = [], [], torch.zeros_like(u), 0.0, None
    leaves = []
    for b, a, e in pieces:
        if a in starts:
            S = torch.randn(H, K, V).double().requires_grad_()
        q, k, w = (x[n][b, a:e].transpose(0, 1) for n in "qkw")
        d = G[b, a:e].T
        v = (u[b, a:e].transpose(0, 1) - w @ S).clone()
        v.retain_grad()
        scores = ((q @ k.mT) * (d[:, :, None] - d[:, None, :]).exp()).tril()
        loss = loss + (do[b, a:e].transpose(0, 1) * 0.5 * ((q * d.exp()[..., None]) @ S + scores @ v)).sum()
        states.append(S.detach())
        S = (d[:, -1].exp()[:, None, None] * S + (k * (d[:, -1:] - d).exp()[..., None]).mT @ v).clone()
        S.retain_grad()
        ends.append(S)
        leaves.append((b, a, e, v))
        values[b, a:e] = v.detach().transpose(0, 1)
        loss = loss + (0.1 * S).sum()
    loss.backward()
    dv = torch.zeros_like(u)
    for b, a, e, v in leaves:
        dv[b, a:e] = v.grad.transpose(0, 1)
    stack = lambda tensors: torch.stack(tensors).unflatten(0, (B, -1))
    got = chunk_gradients(
        x["q"].detach(), x["k"].detach(), values, do, stack(states), stack([S.grad for S in ends]), w=x["w"].detach(),
        g=G.detach(), dv=dv, scale=0.5, chunk_size=C, cu_seqlens=None if bounds is None else torch.tensor(bounds),
    )  # fmt: skip
    assert_same(dict(zip("qkwG", got, strict=True)), dict(q=x["q"].grad, k=x["k"].grad, w=x["w"].grad, G=G.grad))


def _segments(bounds, T):
    return list(zip(bounds, bounds[1:], strict=False)) if bounds else [(0, T)]


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_fla_equals_the_chunks_on_a_gpu(packed):
    kernels = _fla_kernels()
    if isinstance(kernels, str):
        pytest.skip(kernels)
    B = 1 if packed else 2
    x = inputs(B, 300, K=64, V=128, dtype=torch.bfloat16, device="cuda")
    cu = torch.tensor([0, 100, 228, 300], device="cuda") if packed else None
    results = []
    for impl in ("fla", "torch"):
        y, S = linear_rnn(**x, cu_seqlens=cu, impl=impl)
        torch.manual_seed(1)
        dy, dS = torch.randn_like(y), torch.randn_like(S)
        try:
            grads = torch.autograd.grad((y, S), list(x.values()), (dy, dS))
        except RuntimeError as error:
            if impl == "fla" and "riton" in str(error):
                pytest.skip(f"fla's backward refuses: {error}")
            raise
        results.append(dict(zip(["y", "S", *x], (y, S, *grads), strict=True)))
    for name, expected in results[1].items():
        a, b = results[0][name].double(), expected.double()
        # Both round to bf16 along chains of some ten products; the difference of two such results.
        assert (a - b).norm() <= 0.03 * b.norm(), f"{name}: {float((a - b).norm() / b.norm()):.3f}"
