# SPDX-License-Identifier: Apache-2.0
"""Softmax attention against softmax(q kᵀ) written out."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from m2rnn_compile.layers import Attention, RMSNorm, SwiGLU
from tests.layers.equations import assert_same

D = 24
KINDS = {
    "nope": dict(num_heads=4),
    "rope": dict(num_heads=4, rope_theta=100.0),
    "grouped": dict(num_heads=4, num_kv_heads=2, head_dim=8, rope_theta=100.0),
}


def make(**options):
    attention = Attention(D, **options, dtype=torch.float64)
    torch.nn.init.normal_(attention.c_attn.weight, std=0.4)
    return attention


def written_out(a, x):
    """[T, D] of one sequence, step by step, RoPE as a complex rotation."""
    T = x.shape[0]
    q, k, v = (x @ a.c_attn.weight.T).split(a.qkv_sizes, -1)
    out = torch.zeros(T, a.num_heads, a.head_dim).double()

    def rotate(u, t):
        if a.rope_theta is None:
            return u
        half = a.head_dim // 2
        angle = t * a.rope_theta ** (-torch.arange(half).double() / half)
        w = torch.complex(u[:half], u[half:]) * torch.polar(torch.ones(half).double(), angle)
        return torch.cat([w.real, w.imag])

    for n in range(a.num_heads):
        m = n // (a.num_heads // a.num_kv_heads)
        keys = torch.stack([rotate(k[t].unflatten(-1, (-1, a.head_dim))[m], t) for t in range(T)])
        values = v.unflatten(-1, (-1, a.head_dim))[:, m]
        for t in range(T):
            scores = keys[: t + 1] @ rotate(q[t].unflatten(-1, (-1, a.head_dim))[n], t) / math.sqrt(a.head_dim)
            out[t, n] = scores.softmax(0) @ values[: t + 1]
    return out.flatten(1) @ a.c_proj.weight.T


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
class TestEveryKind:
    def test_equals_the_equations(self, kind):
        a, x = make(**kind), torch.randn(2, 7, D).double()
        assert_same(a(x), torch.stack([written_out(a, row) for row in x]))

    def test_packed_equals_separate(self, kind):
        a, lengths = make(**kind), [3, 0, 5, 1]
        cu = torch.tensor([0, 3, 3, 8, 9])
        x = torch.randn(1, 9, D).double().requires_grad_()
        got, expected = a(x, cu_seqlens=cu), torch.cat([a(p) for p in x.split(lengths, 1) if p.shape[1]], 1)
        assert_same(got, expected)
        dy = torch.randn_like(got)
        for g, e in zip(*(torch.autograd.grad(o, [x, *a.parameters()], dy) for o in (got, expected)), strict=True):
            assert_same(g, e)

    @pytest.mark.parametrize("cuts", [[9], [1] * 9, [4, 5], [0, 8, 1]])
    def test_prefill_and_decode_equal_forward(self, kind, cuts):
        a, x = make(**kind), torch.randn(2, 9, D).double()
        cache, ys = a.init_cache(2), []
        for part in x.split(cuts, 1):
            y, cache = a(part, cache=cache)
            ys.append(y)
        assert_same(torch.cat(ys, 1), a(x))
        assert cache.k.shape[1] == 9

    @pytest.mark.parametrize("cuts", [[8], [3, 5], [1] * 8])
    def test_left_padding(self, kind, cuts):
        a, lengths = make(**kind), [8, 4, 1]
        rows = [torch.randn(1, n, D).double() for n in lengths]
        x = torch.cat([torch.cat([torch.full((1, 8 - r.shape[1], D), 5.0).double(), r], 1) for r in rows])
        mask = torch.arange(8)[None] >= (8 - torch.tensor(lengths))[:, None]
        cache, ys = a.init_cache(3), []
        for part, m in zip(x.split(cuts, 1), mask.split(cuts, 1), strict=True):
            y, cache = a(part, cache=cache, attention_mask=m)
            ys.append(y)
        y = torch.cat(ys, 1)
        assert y.isfinite().all()
        assert_same(a(x, attention_mask=mask)[mask], y[mask])
        for b, row in enumerate(rows):
            assert_same(y[b : b + 1, 8 - lengths[b] :], a(row))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_compiled_packed_attention_is_one_op_for_all_lengths(kind):
    a, x = make(**kind), torch.randn(1, 9, D).double().requires_grad_()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(a, fullgraph=True, dynamic=False, backend=counter)
    dy = torch.randn(1, 9, D).double()
    for bounds in ([0, 3, 3, 8, 9], [0, 1, 2, 9, 9]):
        cu = torch.tensor(bounds)
        ys = [f(x, cu_seqlens=cu) for f in (compiled, a)]
        assert_same(*ys)
        for g, e in zip(*(torch.autograd.grad(y, [x, *a.parameters()], dy) for y in ys), strict=True):
            assert_same(g, e)
    assert counter.frame_count == 1
    with pytest.raises(ValueError, match="last = 8"):
        compiled(x, cu_seqlens=torch.tensor([0, 3, 3, 8, 8]))


def test_packed_attention_passes_the_checks_of_torch_for_ops():
    inputs = [torch.randn(1, 9, n, 4, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2)]
    torch.library.opcheck(torch.ops.m2rnn.packed_attention.default, (*inputs, torch.tensor([0, 3, 3, 9])))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_packed_flash_attention_on_a_gpu(kind):
    """In bf16 it takes another path than in fp32."""
    a = Attention(64, **(kind | dict(head_dim=16)), device="cuda")
    torch.nn.init.normal_(a.c_attn.weight, std=0.3)
    torch.nn.init.normal_(a.c_proj.weight, std=0.3)
    low = Attention(64, **(kind | dict(head_dim=16)), device="cuda", dtype=torch.bfloat16)
    low.load_state_dict(a.state_dict())
    x = torch.randn(1, 300, 64, device="cuda", requires_grad=True)
    cu = torch.tensor([0, 1, 1, 130, 300], device="cuda")
    dy = torch.randn_like(x)
    exact, y = a(x, cu_seqlens=cu), low(x.bfloat16(), cu_seqlens=cu)
    grads = [torch.autograd.grad(out, x, dy.to(out.dtype))[0] for out in (exact, y)]
    for got, expected in ((y, exact), (grads[1], grads[0])):
        assert (got.float() - expected).norm() <= 0.02 * expected.norm()


def test_errors():
    with pytest.raises(ValueError, match="`num_kv_heads` must divide `num_heads` = 4"):
        Attention(D, num_heads=4, num_kv_heads=3)
    with pytest.raises(ValueError, match="does not divide `hidden_size`"):
        Attention(D, num_heads=5)
    with pytest.raises(ValueError, match="`head_dim` must be even"):
        Attention(D, num_heads=8, rope_theta=1e4)
    a = make(num_heads=4)
    with pytest.raises(ValueError, match="cache cannot be combined"):
        a(torch.zeros(1, 3, D).double(), cache=a.init_cache(1), cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"`cache.k` must have shape \(2, 0, 4, 6\).*got \(1, 0, 4, 6\)"):
        a(torch.zeros(2, 3, D).double(), cache=a.init_cache(1))


@pytest.mark.parametrize(
    "bounds, message",
    [
        ([0, 2], "from 0 to T = 3, got first = 0, last = 2"),
        ([1, 3], "got first = 1"),
        ([0, 4], "last = 4"),
        ([0, 2, 1, 3], r"must not decrease, got cu_seqlens\[1\] = 2"),
    ],
)
def test_boundaries_that_do_not_fit_are_refused(bounds, message):
    """The scan refuses them too, but a model may have attention layers only."""
    with pytest.raises(ValueError, match=message):
        make(num_heads=4)(torch.zeros(1, 3, D).double(), cu_seqlens=torch.tensor(bounds))


def test_rms_norm_takes_fp32_statistics():
    x = (300 * torch.randn(5, 64)).bfloat16()
    norm = RMSNorm(64, dtype=torch.bfloat16)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert norm(x).dtype == torch.bfloat16
    assert ((norm(x).double() - exact).abs() <= 0.51 * torch.finfo(torch.bfloat16).eps * exact.abs()).all()


def test_swiglu_halves_are_up_then_gate():
    mlp, x = SwiGLU(6, 10, dtype=torch.float64), torch.randn(2, 3, 6).double()
    up, gate = mlp.c_fc.weight[:10], mlp.c_fc.weight[10:]
    g = x @ gate.T
    assert_same(mlp(x), ((x @ up.T) * g * torch.sigmoid(g)) @ mlp.c_proj.weight.T)
