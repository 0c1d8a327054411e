# SPDX-License-Identifier: Apache-2.0
"""What the ops promise to the rest of PyTorch: opcheck, gradcheck, compile, export, vmap, clear errors."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from m2rnn_compile import m2rnn, m2rnn_step
from m2rnn_compile.testing import ScanInputs, make_inputs, oracle, run
from tests.ops.helpers import IMPLS, LAYOUTS, leaves


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_opcheck(impl: str, layout: str, packed: bool) -> None:
    seqlens = [6, 0, 5] if packed else None
    x = make_inputs(1 if packed else 2, 11, 4, 3, 5, Nq=2, seqlens=seqlens, initial_state=True)
    args = leaves(x, layout)
    opcheck(torch.ops.m2rnn.scan.default, (*args, x.cu_seqlens, 0.5, 4, impl))
    dense = [t.detach() for t in args]
    checkpoints = torch.ops.m2rnn.scan(*dense, x.cu_seqlens, 0.5, 4, impl)[2]
    dy, dh = LAYOUTS[layout](x.dy), LAYOUTS[layout](x.dfinal_state)
    for grads in ((dy, dh), (dy, None), (None, dh)):
        opcheck(torch.ops.m2rnn.scan_backward.default, (*grads, *dense, x.cu_seqlens, checkpoints, 0.5, 4, impl))
    if not packed:
        step = [t[:, 0].detach().requires_grad_() for t in args[:4]] + args[4:]
        opcheck(torch.ops.m2rnn.step.default, (*step, impl))


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_gradcheck_in_fp64_for_each_argument_and_output(impl: str, packed: bool) -> None:
    seqlens = [3, 0, 2] if packed else None
    x = make_inputs(1 if packed else 2, 5, 2, 2, 3, dtype=torch.float64, seqlens=seqlens, initial_state=True)
    names = list(x.named_inputs())
    for i, output in product(range(len(names)), (0, 1)):
        args = [t.detach() for t in x.named_inputs().values()]

        def f(t: Tensor, i: int = i, output: int = output, args: list[Tensor] = args) -> Tensor:
            q, k, v, f, W, h0 = (*args[:i], t, *args[i + 1 :])
            result = m2rnn(q, k, v, f, W, initial_state=h0, cu_seqlens=x.cu_seqlens, impl=impl)[output]
            assert result is not None
            return result

        assert torch.autograd.gradcheck(f, (args[i].requires_grad_(),)), (names[i], output)


def clipped_by_hand(x: ScanInputs, c: float, *, clip_sum: bool = False) -> dict[str, Tensor]:
    """Backward for one batch element and head, straight from the equations of docs/numerics.md, in plain loops."""
    q, k, v = (t[0, :, 0].double() for t in (x.q, x.k, x.v))
    f, W, h, dy = x.f[0, :, 0].double(), x.W[0].double(), x.initial_state[0, 0].double(), x.dy[0, :, 0].double()
    H, Z = [h], []
    for t in range(len(f)):
        Z.append(torch.tanh(H[-1] @ W + torch.outer(k[t], v[t])))
        H.append(f[t] * H[-1] + (1 - f[t]) * Z[-1])
    carry, dW, dk = x.dfinal_state[0, 0].double(), torch.zeros_like(W), torch.zeros_like(k)
    for t in reversed(range(len(f))):
        D = (
            (carry + torch.outer(q[t], dy[t])).clamp(-c, c)
            if clip_sum
            else carry.clamp(-c, c) + torch.outer(q[t], dy[t])
        )
        dU = (1 - f[t]) * D * (1 - Z[t] ** 2)
        dk[t], dW = dU @ v[t], dW + H[t].T @ dU
        carry = f[t] * D + dU @ W.T
    return {"dW": dW, "dk": dk, "dinitial_state": carry}


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("c", [None, float("inf"), 1.0, 0.1, 0.0])
def test_clipping_means_the_same_everywhere(impl: str, c: float | None) -> None:
    x = make_inputs(1, 70, 1, 4, 5, dtype=torch.float64, initial_state=True, state_grad_clip=c)
    got, want = run(x, impl=impl), clipped_by_hand(x, float("inf") if c is None else c)
    for name, truth in want.items():
        torch.testing.assert_close(got[name].reshape(truth.shape), truth, rtol=1e-11, atol=1e-11)


def test_clipping_the_sum_instead_would_be_noticed() -> None:
    x = make_inputs(1, 70, 1, 4, 5, dtype=torch.float64, initial_state=True, state_grad_clip=0.1)
    ours, other = clipped_by_hand(x, 0.1), clipped_by_hand(x, 0.1, clip_sum=True)
    assert (ours["dW"] - other["dW"]).norm() > 0.1 * ours["dW"].norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_equals_separate_to_the_bit(impl: str) -> None:
    lengths = [65, 0, 7, 1]
    x = make_inputs(1, sum(lengths), 4, 8, 6, seqlens=lengths, initial_state=True, state_grad_clip=0.5)
    packed, start, dW = run(x, impl=impl), 0, torch.zeros_like(x.W)
    for s, n in enumerate(lengths):
        part = slice(start, start + n)
        one = ScanInputs(
            x.q[:, part], x.k[:, part], x.v[:, part], x.f[:, part], x.W, x.initial_state[s : s + 1], None, 0.5,
            x.dy[:, part], x.dfinal_state[s : s + 1],
        )  # fmt: skip
        got = run(one, impl=impl)
        for name in ("y", "dq", "dk", "dv", "df"):
            assert torch.equal(packed[name][:, part], got[name]), (name, s)
        for name in ("final_state", "dinitial_state"):
            assert torch.equal(packed[name][s], got[name][0]), (name, s)
        dW, start = dW + got["dW"], start + n
    torch.testing.assert_close(packed["dW"], dW, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_subset_of_requires_grad(impl: str) -> None:
    x = make_inputs(1, 5, 2, 3, 4, initial_state=True)
    everything = run(x, impl=impl)
    for wanted in product([False, True], repeat=6):
        args = [t.detach().requires_grad_(w) for t, w in zip(x.named_inputs().values(), wanted, strict=True)]
        y, final = m2rnn(*args[:5], initial_state=args[5], impl=impl)
        assert y.requires_grad == any(wanted)
        if not any(wanted):
            continue
        torch.autograd.backward([y, final], [x.dy, x.dfinal_state])
        for name, t, w in zip(x.named_inputs(), args, wanted, strict=True):
            assert (t.grad is not None) == w
            assert t.grad is None or torch.equal(t.grad, everything[f"d{name}"])


@pytest.mark.parametrize("impl", IMPLS)
def test_outputs_never_alias_inputs_and_inputs_are_not_modified(impl: str) -> None:
    for T in (0, 3):
        x = make_inputs(1, T, 2, 3, 4, initial_state=True)
        before = {n: t.clone() for n, t in x.named_inputs().items()}
        y, final = m2rnn(x.q, x.k, x.v, x.f, x.W, initial_state=x.initial_state, impl=impl)
        final.add_(1.0)
        y.add_(1.0)
        assert all(torch.equal(before[n], t) for n, t in x.named_inputs().items())
        assert final.untyped_storage().nbytes() == final.numel() * 4  # not a view into a large buffer


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(impl: str, reentrant: bool) -> None:
    x = make_inputs(1, 70, 2, 3, 4)

    def through(use: bool) -> list[Tensor]:
        args = leaves(x)
        f = lambda *a: m2rnn(*a, impl=impl).y
        y = checkpoint(f, *args, use_reentrant=reentrant) if use else f(*args)
        y.backward(x.dy)
        return [t.grad for t in args]

    assert all(torch.equal(a, b) for a, b in zip(through(True), through(False), strict=True))


def test_backward_saves_inputs_and_checkpoints_only_and_no_grad_saves_nothing() -> None:
    x = make_inputs(2, 200, 4, 3, 5)
    saved: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        m2rnn(*leaves(x), impl="eager")
        assert (2, 5, 4, 3, 5) in saved  # [B, 200 // 64 + 2, N, K, V]
        assert sorted(saved) == sorted([*(tuple(t.shape) for t in x.named_inputs().values()), (2, 5, 4, 3, 5)])
        saved.clear()
        with torch.no_grad():
            m2rnn(*leaves(x), impl="eager")
        assert not saved


def test_autocast_casts_products_and_leaves_gate_and_state_in_fp32() -> None:
    x = make_inputs(1, 9, 2, 3, 4, initial_state=True)
    low = x.to(torch.bfloat16)
    want = m2rnn(low.q, low.k, low.v, x.f, low.W, initial_state=x.initial_state)
    args = leaves(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = m2rnn(*args[:5], initial_state=args[5])
    assert got.y.dtype == torch.bfloat16
    assert torch.equal(got.y, want.y)
    assert torch.equal(got.final_state, want.final_state)
    got.y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in args)


@pytest.mark.parametrize("which", range(5), ids=["q", "k", "v", "f", "W"])
def test_vmap_equals_a_loop(which: int) -> None:
    x = make_inputs(2, 6, 4, 3, 5, Nq=2)
    args = list(x.named_inputs().values())
    many = torch.stack([args[which] * s for s in (1.0, 0.5, 0.25)], 1)

    def f(t: Tensor) -> Tensor:
        return m2rnn(*args[:which], t, *args[which + 1 :], impl="eager").y

    torch.testing.assert_close(
        torch.vmap(f, in_dims=1)(many), torch.stack([f(many[:, i]) for i in range(3)]), rtol=1e-6, atol=1e-6
    )


def test_differentiating_twice_or_forwards_raises_and_the_reference_does_it() -> None:
    x = make_inputs(1, 4, 1, 2, 3, dtype=torch.float64)
    args = leaves(x)
    (g,) = torch.autograd.grad(m2rnn(*args).y.sum(), args[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="impl='reference'"):
        g.sum().backward()
    dense = [t.detach() for t in args]
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: m2rnn(q, *dense[1:]).y, (dense[0],), (dense[0],))
    assert torch.autograd.gradgradcheck(lambda k: m2rnn(args[0], k, *args[2:], impl="reference").y, (args[1],))


@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_compiled_training_equals_eager_with_at_most_two_compilations(impl: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def f(*args: Tensor) -> tuple[Tensor, Tensor]:
        y, final = m2rnn(*args[:5], initial_state=args[5], state_grad_clip=1.0, impl=impl)
        return y.sin(), final * 2

    compiled = torch.compile(f, backend=counter, fullgraph=True)
    for T in (7, 9, 12, 64, 65, 66, 90, 128, 130, 131):
        x = make_inputs(2, T, 2, 3, 4, seed=T, initial_state=True)
        a, b = leaves(x), leaves(x)
        for g, args in ((compiled, a), (f, b)):
            torch.autograd.backward(g(*args), [x.dy, x.dfinal_state])
        assert all(torch.equal(s.grad, t.grad) for s, t in zip(a, b, strict=True))
    assert counter.frame_count <= 2


def test_inductor_compiles_it() -> None:
    x = make_inputs(2, 20, 2, 3, 4)
    args = leaves(x)
    f = lambda *a: m2rnn(*a).y.sin() * 2
    got = torch.autograd.grad(torch.compile(f, fullgraph=True)(*args), args, x.dy)
    want = torch.autograd.grad(f(*args), args, x.dy)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(got, want, strict=True))


class Scan(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, f: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        y, final = m2rnn(q, k, v, f, W)
        assert final is not None
        return y * 2, final


def test_export_with_dynamic_batch_and_time_survives_a_file_and_another_process(tmp_path: Path) -> None:
    x = make_inputs(2, 8, 2, 3, 4)
    B, T = torch.export.Dim("B", min=1), torch.export.Dim("T", min=1)
    dims = {n: {0: B, 1: T} for n in ("q", "k", "v", "f")}
    with torch.no_grad():
        program = torch.export.export(Scan(), tuple(x.named_inputs().values()), dynamic_shapes={**dims, "W": None})
    program = program.run_decompositions()
    calls = [str(n.target) for n in program.graph.nodes if n.op == "call_function" and "m2rnn" in str(n.target)]
    assert calls == ["m2rnn.scan.default"]
    torch.export.save(program, tmp_path / "scan.pt2")
    y = make_inputs(3, 70, 2, 3, 4, seed=1)
    torch.save((list(y.named_inputs().values()), Scan()(*y.named_inputs().values())), tmp_path / "io.pt")
    code = (
        "import sys, torch, m2rnn_compile; inputs, want = torch.load(sys.argv[2]); "
        "got = torch.export.load(sys.argv[1]).module()(*inputs); "
        "assert all(torch.equal(a, b) for a, b in zip(got, want))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "scan.pt2"), str(tmp_path / "io.pt")], check=True)


def test_flops_by_hand() -> None:
    x = make_inputs(2, 10, 4, 8, 6)
    with FlopCounterMode(display=False) as counter:
        run(x, impl="eager")
    forward, backward = 8 * 6 * 6 + 2 * 8 * 6, 3 * 8 * 6 * 6 + 6 * 8 * 6
    assert counter.get_total_flops() == 2 * 2 * 10 * 4 * (forward + backward)


def test_step_equals_scan() -> None:
    x = make_inputs(3, 4, 4, 3, 5, Nk=2)
    y, final = m2rnn(x.q, x.k, x.v, x.f, x.W)
    state = None
    for t in range(4):
        y_t, state = m2rnn_step(x.q[:, t], x.k[:, t], x.v[:, t], x.f[:, t], x.W, initial_state=state)
        torch.testing.assert_close(y_t, y[:, t], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state, final, rtol=1e-6, atol=1e-6)


def change(x: ScanInputs, **new: Any) -> dict[str, Any]:
    return {**x.named_inputs(), "cu_seqlens": x.cu_seqlens, **new}


X = make_inputs(2, 6, 4, 3, 5, initial_state=True)
P = make_inputs(1, 6, 2, 3, 5, seqlens=[2, 4])
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not a tensor": (change(X, q=[1.0]), TypeError, "`q` must be a torch.Tensor, got list"),
    "dimensions of q": (change(X, q=X.q[0]), ValueError, r"`q` must have 4 dimensions \[B, T, Nq, K\]"),
    "time of k": (change(X, k=X.k[:, :5]), ValueError, "`k`.*T = 6"),
    "rows of k": (change(X, k=X.k[..., :2]), ValueError, "`k`.*K = 3"),
    "batch of v": (change(X, v=X.v[:1]), ValueError, "`v`.*B = 2"),
    "f with a value dimension": (change(X, f=X.v), ValueError, r"`f` must have 3 dimensions \[B, T, Nf\]"),
    "W not square": (change(X, W=X.W[..., :4]), ValueError, "`W`.*V = 5"),
    "heads do not divide": (change(X, q=X.q.repeat(1, 1, 3, 1)), ValueError, r"`q` \(3\) must divide.*\(4\)"),
    "state of another batch": (change(X, initial_state=X.initial_state[:1]), ValueError, "`initial_state`.*B = 2"),
    "integer q, k, v": (
        change(X, q=X.q.int(), k=X.k.int(), v=X.v.int()), TypeError, "must be float32, float64, bfloat16 or float16"
    ),
    "mixed dtypes": (change(X, q=X.q.double()), TypeError, "must share one dtype"),
    "integer gate": (change(X, f=X.f.int()), TypeError, "`f` must be float32"),
    "another device": (change(X, k=X.k.to("meta")), ValueError, "`q` on cpu and `k` on meta"),
    "negative clip": (change(X, state_grad_clip=-1.0), ValueError, "must be >= 0, got -1.0; use None"),
    "NaN clip": (change(X, state_grad_clip=float("nan")), ValueError, "must be >= 0, got nan"),
    "clip of another type": (change(X, state_grad_clip="1"), TypeError, "must be a float or None, got str"),
    "unknown impl": (change(X, impl="cuda"), ValueError, "`impl` must be one of 'auto'.*got 'cuda'"),
    "triton on a CPU": (change(X, impl="triton"), ValueError, "'triton' runs on cuda tensors, these are on cpu"),
    "packed with a batch": (change(X, cu_seqlens=torch.tensor([0, 6])), ValueError, "B must be 1, got B = 2"),
    "cu_seqlens of floats": (change(P, cu_seqlens=torch.tensor([0.0, 6.0])), TypeError, "int32 or int64"),
    "cu_seqlens of two dimensions": (change(P, cu_seqlens=torch.tensor([[0, 6]])), ValueError, "one-dimensional"),
    "cu_seqlens that starts late": (change(P, cu_seqlens=torch.tensor([1, 6])), ValueError, "to T = 6.*first = 1"),
    "cu_seqlens that ends early": (change(P, cu_seqlens=torch.tensor([0, 5])), ValueError, "last = 5"),
    "cu_seqlens that goes back": (
        change(P, cu_seqlens=torch.tensor([0, 4, 3, 6])), ValueError, r"must not decrease.*cu_seqlens\[2\] = 3"
    ),
    "sparse weights": (change(X, W=X.W.to_sparse()), TypeError, r"`W` must be dense, got layout torch.sparse_coo"),
    "K of zero": (change(X, q=X.q[..., :0], k=X.k[..., :0], initial_state=None), ValueError, "at least 1, got K = 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=lambda c: c.replace(" ", "-"))
def test_wrong_input_gets_a_clear_error(case: str) -> None:
    arguments, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        m2rnn(**arguments)


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("name", ["q", "f", "initial_state"])
def test_nested_tensors_are_refused_with_the_way_out(layout: torch.layout, name: str) -> None:
    nested = torch.nested.nested_tensor([x.contiguous() for x in X.named_inputs()[name]], layout=layout)
    with pytest.raises(TypeError, match=f"`{name}` must be a dense tensor, got a nested one.*`cu_seqlens`"):
        m2rnn(**change(X, **{name: nested}))


S = {name: x if name in ("W", "initial_state") else x[:, 0] for name, x in X.named_inputs().items()}
WRONG_STEPS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a time dimension": (S | dict(q=X.q), ValueError, r"`q` must have 3 dimensions \[B, Nq, K\]"),
    "scalar gate": (S | dict(f=torch.tensor(1.0), initial_state=None), ValueError, r"`f` must have 2 dimensions"),
    "scalar W": (S | dict(W=torch.tensor(1.0), initial_state=None), ValueError, r"`W` must have 3 dimensions"),
    "state of another batch": (S | dict(initial_state=X.initial_state[:1]), ValueError, "`initial_state`.*B = 2"),
    "not a tensor": (S | dict(initial_state=[0.0]), TypeError, "`initial_state` must be a torch.Tensor, got list"),
    "unknown impl": (S | dict(impl="cuda"), ValueError, "`impl` must be one of"),
}


@pytest.mark.parametrize("case", WRONG_STEPS, ids=lambda c: c.replace(" ", "-"))
def test_wrong_input_of_a_step_gets_a_clear_error(case: str) -> None:
    arguments, error, message = WRONG_STEPS[case]
    with pytest.raises(error, match=message):
        m2rnn_step(**arguments)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_backward_op_refuses_what_would_become_wrong_addresses(impl: str, packed: bool) -> None:
    x = make_inputs(1, 11, 2, 3, 5, seqlens=[6, 0, 5] if packed else None)
    scan_args = (x.q, x.k, x.v, x.f, x.W, None, x.cu_seqlens)
    saved = torch.ops.m2rnn.scan(*scan_args, None, 4, impl)[2]
    for dy, dh, checkpoints, message in (
        (x.dy[:, :-1], None, saved, "`dy`.*T = 11"),
        (x.dy, x.dfinal_state[..., :1], saved, "`dfinal_state`.*V = 5"),
        (x.dy, None, saved[:, :2], "`checkpoints` must hold at least"),
        (x.dy, None, saved[..., :1], "`checkpoints`.*V = 5"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.m2rnn.scan_backward(dy, dh, *scan_args, checkpoints, None, 4, impl)
    with pytest.raises(RuntimeError, match="ran with chunk = 0"):
        torch.ops.m2rnn.scan_backward(x.dy, None, *scan_args, saved, None, 0, impl)


def test_the_oracle_agrees_with_the_equations_written_out() -> None:
    x = make_inputs(1, 20, 1, 4, 5, dtype=torch.float64, initial_state=True)
    got, want = oracle(x), clipped_by_hand(x, float("inf"))
    for name, truth in want.items():
        torch.testing.assert_close(got[name].reshape(truth.shape), truth, rtol=1e-12, atol=1e-12)
