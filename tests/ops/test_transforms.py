# SPDX-License-Identifier: Apache-2.0
"""The op inside of PyTorch's transforms and modes: selective checkpointing, compiled autograd, inference, vmap.

Every test compares with the plain call to the bit, or says what the user is told.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from m2rnn_compile import M2RNN, m2rnn, m2rnn_step
from m2rnn_compile.ops import reference, registry
from m2rnn_compile.testing import make_inputs
from tests.ops.helpers import IMPLS, leaves

X = make_inputs(3, 70, 4, 3, 5, Nq=2)


def gradients(f: Callable[..., Tensor]) -> list[Tensor]:
    args = leaves(X)
    f(*args).backward(X.dy)
    return [t.grad for t in args]  # type: ignore[misc]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def plain(*args: Tensor) -> Tensor:
    return m2rnn(*args, impl="eager").y.sin()


@pytest.mark.parametrize("policy, runs", [(CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.MUST_RECOMPUTE, 2)])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_selective_checkpointing_runs_the_scan_as_often_as_it_is_told(
    policy: CheckpointPolicy, runs: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, scan = [], reference.scan
    monkeypatch.setattr(reference, "scan", lambda *args: (calls.append(1), scan(*args))[1])

    def choose(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return policy if op == torch.ops.m2rnn.scan.default else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, choose)
    f = lambda *args: checkpoint(plain, *args, use_reentrant=False, context_fn=contexts)
    got = gradients(torch.compile(f, backend="aot_eager", fullgraph=True) if compiled else f)
    assert len(calls) == runs
    assert same(got, gradients(plain))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_autograd(impl: str) -> None:
    f = lambda *args: m2rnn(*args, state_grad_clip=0.5, impl=impl).y.sin()
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        got = gradients(f)
    assert same(got, gradients(f))


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_inference_mode_and_no_grad_give_the_same_bits(impl: str) -> None:
    args = leaves(X)
    y, final = m2rnn(*args, impl=impl)
    assert y.requires_grad
    with torch.no_grad():
        assert torch.equal(m2rnn(*args, impl=impl).y, y)
    with torch.inference_mode():
        fast = m2rnn(*args, impl=impl)
        step = m2rnn_step(*(t[:, 0] for t in args[:4]), args[4], impl=impl)
    assert fast.y.is_inference()
    assert step.state.is_inference()
    assert torch.equal(fast.y, y)
    assert torch.equal(fast.final_state, final)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_go_through_vmap(impl: str) -> None:
    """Inside of vmap a tensor hides that the one outside requires a gradient: the scan has to keep its checkpoints."""

    def batched(*args: Tensor) -> Tensor:
        one = lambda q, k, v, f: m2rnn(q[None], k[None], v[None], f[None], args[4], impl=impl).y[0].sin()
        return torch.vmap(one)(*args[:4])

    got, want = gradients(batched), gradients(lambda *args: m2rnn(*args, impl=impl).y.sin())
    assert same(got[:4], want[:4])
    torch.testing.assert_close(got[4], want[4], rtol=1e-5, atol=1e-5)  # dW: another order of the sum over the batch


@pytest.mark.parametrize("impl", IMPLS)
def test_vmap_of_a_step_and_of_the_backward_pass(impl: str) -> None:
    args = leaves(X)
    step = lambda q, k, v, f: m2rnn_step(q[None], k[None], v[None], f[None], args[4], impl=impl)
    one_by_one = torch.vmap(step)(*(t[:, 0] for t in args[:4]))
    together = m2rnn_step(*(t[:, 0] for t in args[:4]), args[4], impl=impl)
    assert torch.equal(one_by_one.y[:, 0], together.y)
    assert torch.equal(one_by_one.state[:, 0], together.state)

    y = m2rnn(*args, impl=impl).y
    many = torch.stack([X.dy, 2 * X.dy, torch.zeros_like(X.dy)])
    for batch in zip(
        torch.autograd.grad(y, args, many, is_grads_batched=True, retain_graph=True),
        *(torch.autograd.grad(y, args, dy, retain_graph=True) for dy in many),
        strict=True,
    ):
        assert torch.equal(batch[0], torch.stack(batch[1:]))


def test_vmap_over_boundaries_says_why_not() -> None:
    x = make_inputs(1, 6, 2, 3, 5)
    with pytest.raises(ValueError, match="vmap over `cu_seqlens` is not possible; pack"):
        torch.vmap(lambda c: m2rnn(x.q, x.k, x.v, x.f, x.W, cu_seqlens=c).y)(torch.tensor([[0, 6], [0, 6]]))


def test_func_grad_says_what_to_use_instead_and_the_reference_does_it() -> None:
    args = [X.q[:, :4], X.k[:, :4], X.v[:, :4], X.f[:, :4], X.W]
    loss = lambda q, impl: m2rnn(q[None], *(t[:1] for t in args[1:4]), args[4], impl=impl).y.sum()
    each = lambda impl: torch.vmap(torch.func.grad(partial(loss, impl=impl)))(args[0])
    with pytest.raises(NotImplementedError, match=r"torch.func.grad.*torch.autograd.grad.*impl='reference'"):
        each("eager")
    with pytest.raises(NotImplementedError, match=r"torch\.func\.grad"):
        torch.func.grad(lambda q: torch.vmap(partial(loss, impl="eager"))(q).sum())(args[0])
    with pytest.raises(NotImplementedError, match=r"torch\.func\.grad"):
        torch.func.grad(lambda q: m2rnn_step(q, *(t[:, 0] for t in args[1:4]), args[4]).y.sum())(args[0][:, 0])
    assert each("reference").shape == args[0].shape
    constant = lambda z: z * m2rnn(*args, impl="eager").y.sum()  # a scan that is not differentiated is no obstacle
    assert torch.func.grad(constant)(torch.tensor(1.0)) == m2rnn(*args, impl="eager").y.sum()


def test_fakes_choose_no_lowering_and_know_the_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any) -> None:
        raise AssertionError("a fake asked for a lowering")

    x = make_inputs(1, 9, 4, 3, 5, Nk=2, seqlens=[4, 0, 5], initial_state=True)
    args = (*(t.requires_grad_() for t in x.named_inputs().values()), x.cu_seqlens, 1.0, 4, "auto")
    real = torch.ops.m2rnn.scan(*args)
    real_grads = torch.autograd.grad(real[:2], args[:6], [x.dy, x.dfinal_state])
    monkeypatch.setattr(registry, "load", forbidden)
    mode = FakeTensorMode()
    leaf = lambda t: mode.from_tensor(t.detach()).requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
    fake_args = [leaf(t) for t in args]
    dy, dh = leaf(x.dy), leaf(x.dfinal_state)
    with mode:
        fake = torch.ops.m2rnn.scan(*fake_args)
        fake_grads = torch.autograd.grad(fake[:2], fake_args[:6], [dy, dh])
    for a, b in zip((*fake, *fake_grads), (*real, *real_grads), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def _clipped(v: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A loss whose backward clips, through impl="reference"."""
    torch.manual_seed(seed)
    B, T, N, V, K = *v.shape, 4
    q, k = torch.randn(B, T, 1, K), torch.randn(B, T, 1, K)
    f, W = torch.rand(B, T, N), torch.randn(N, V, V)
    return m2rnn(q, k, v, f, W, state_grad_clip=0.5, impl="reference").y.square().sum()


def test_torch_func_goes_through_the_clip_of_the_reference() -> None:
    """grad clips, jvp (a rule of the forward pass) does not, vmap does it row by row."""
    v = torch.randn(2, 7, 3, 5)
    leaf = v.clone().requires_grad_()
    (expected,) = torch.autograd.grad(_clipped(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(_clipped)(v), expected)
    h = 1e-2
    _, tangent = torch.func.jvp(_clipped, (v,), (torch.ones_like(v),))
    numeric = (_clipped((v + h).double().float()) - _clipped(v - h)) / (2 * h)
    torch.testing.assert_close(tangent, numeric, rtol=2e-2, atol=0.1)
    both = torch.func.vmap(torch.func.grad(_clipped), randomness="same")(torch.stack([v, v + 1]))
    torch.testing.assert_close(both[0], expected)


def test_compiled_forward_mode_is_refused() -> None:
    """Not zero tangents without a word."""
    B, T, N, K, V = 1, 3, 2, 4, 5
    q, k, v = torch.randn(B, T, 1, K), torch.randn(B, T, 1, K), torch.randn(B, T, N, V)
    f, W = torch.rand(B, T, N), torch.randn(N, V, V)
    jvp = lambda v: torch.func.jvp(lambda v: m2rnn(q, k, v, f, W).y, (v,), (torch.ones_like(v),))
    with pytest.raises(NotImplementedError, match="forward-mode differentiation is not supported"):
        torch.compile(jvp, backend="eager")(v)


def chunks_of(fn: Callable[..., Any], *args: Tensor) -> list[int]:
    """The `chunk` of each scan in what Dynamo makes of `fn` in grad mode."""
    seen: list[int] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(n.args[8] for n in gm.graph.nodes if n.target is torch.ops.m2rnn.scan.default)
        return gm.forward

    torch.compile(fn, backend=backend, fullgraph=True)(*args)
    return seen


def test_compiled_code_keeps_checkpoints_only_where_a_gradient_may_be_asked_for() -> None:
    """As eager code does: a frozen scan in grad mode keeps none."""
    x = list(X.named_inputs().values())
    f = lambda *args: m2rnn(*args).y
    assert chunks_of(f, *x) == [0]
    for i in range(len(x)):
        torch._dynamo.reset()
        assert chunks_of(f, *x[:i], x[i].clone().requires_grad_(), *x[i + 1 :]) == [64]
    layer = M2RNN(24, num_heads=4, key_dim=8, value_dim=4)
    assert chunks_of(layer, torch.randn(2, 9, 24)) == [64]
    layer.requires_grad_(False)
    assert chunks_of(layer, torch.randn(2, 9, 24)) == [0]
    assert chunks_of(layer, torch.randn(2, 9, 24, requires_grad=True)) == [64]


def test_gradients_go_through_a_compiled_vmap() -> None:
    """Where a tensor hides what it requires, compiled code keeps the checkpoints as eager code does."""

    def batched(*args: Tensor) -> Tensor:
        one = lambda q, k, v, f: m2rnn(q[None], k[None], v[None], f[None], args[4], impl="eager").y[0].sin()
        return torch.vmap(one)(*args[:4])

    got, want = gradients(torch.compile(batched, backend="aot_eager", fullgraph=True)), gradients(batched)
    assert same(got, want)


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: torch.vmap(torch.func.grad(f))])
def test_compiled_func_grad_fails_aloud(transform: Callable[..., Any]) -> None:
    """In torch's words: whether a tensor is tracked cannot be asked while tracing."""
    loss = lambda q: m2rnn(q, X.k, X.v, X.f, X.W).y.sum()
    q = X.q if transform is torch.func.grad else X.q[None]
    with pytest.raises(Exception, match=r"autograd\.Function with functorch transforms"):
        torch.compile(transform(loss), backend="aot_eager")(q)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_autocast_brings_q_k_and_v_to_one_dtype(impl: str) -> None:
    """As the message for mixed dtypes advises."""
    B, T, N, K, V = 1, 3, 2, 4, 5
    q, k, v = torch.randn(B, T, 1, K), torch.randn(B, T, 1, K), torch.randn(B, T, N, V)
    f, W = torch.rand(B, T, N), torch.randn(N, V, V)
    with pytest.raises(TypeError, match=r"run under torch\.autocast, which does"):
        m2rnn(q.bfloat16(), k, v, f, W, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m2rnn(q.bfloat16(), k, v, f, W, impl=impl).y
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, m2rnn(q, k, v, f, W, impl=impl).y)
        step = m2rnn_step(q[:, 0].bfloat16(), k[:, 0], v[:, 0], f[:, 0], W, impl=impl)
        assert step.y.dtype == torch.bfloat16
