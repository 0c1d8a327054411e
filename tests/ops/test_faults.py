# SPDX-License-Identifier: Apache-2.0
"""The tests of the tests: break a kernel on purpose, and the suite's own checks go red.

A fault is a piece of source and what stands there instead. The eager kernels, and the reference that is the oracle of
all others, are executed anew with one fault each; the C++ kernel is built once with all of them, each behind a switch.
"""

from __future__ import annotations

import ctypes
import inspect
import types
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from m2rnn_compile.lowering import cpu
from m2rnn_compile.lowering.cpu import build
from m2rnn_compile.ops import functional, reference, registry
from tests.lowering.test_cpp import test_values_and_gradients_are_as_accurate_as_the_rule_asks as check_cpp
from tests.ops.test_contract import test_clipping_means_the_same_everywhere as check_by_hand
from tests.ops.test_reference import test_eager_kernels_agree_with_autograd_through_the_loop as check_eager


class Fault(NamedTuple):
    right: str
    wrong: str
    case: str  # of the suite's check, which must notice it
    seen_in: str  # a result that the check must name


EAGER = {
    "forward loses the state between chunks": Fault(
        "            if chunk and (t - start) % chunk == 0:\n",
        "            if chunk and (t - start) % chunk == 0:\n"
        "                h = torch.zeros_like(h) if t > start else h\n",
        "three chunks",
        "y",
    ),
    "forward forgets 1 - f": Fault("(1 - f) * z_BNKV", "z_BNKV", "three chunks", "y"),
    "forward forgets the initial state": Fault(
        "if initial_state is None else initial_state[states]", "if True else initial_state[states]", "three chunks", "y"
    ),
    "backward drops the carry between chunks": Fault(
        "            h = checkpoints[:, first_slot",
        "            carry = carry if first + chunk >= end else 0 * carry\n            h = checkpoints[:, first_slot",
        "three chunks",
        "dk",
    ),
    "backward skips the last chunk": Fault(
        "reversed(range(start, end, chunk))", "reversed(range(start, end - chunk, chunk))", "three chunks", "dq"
    ),
    "backward reads the next chunk's checkpoint": Fault(
        "first_slot + (first - start) // chunk]", "first_slot + (first - start) // chunk + 1]", "three chunks", "dq"
    ),
    "backward forgets 1 - f": Fault("dU = (1 - f_t) * D", "dU = D", "three chunks", "dk"),
    "W instead of its transpose": Fault("dU @ W_.mT", "dU @ W_", "three chunks", "dk"),
    "df without Z": Fault("D * (before[i] - Z[i])", "D * before[i]", "three chunks", "df"),
    "dW of one step only": Fault("dW_ += ", "dW_ = ", "three chunks", "dW"),
    "no clip": Fault("carry.clamp(-state_grad_clip, state_grad_clip)", "carry", "clip that bites", "dk"),
    "a clip on one side": Fault("carry.clamp(-state_grad_clip, s", "carry.clamp(max=s", "clip that bites", "dk"),
    "the sum clipped instead of the carry": Fault(
        "D = D + q_t[..., :, None] * dy_t[..., None, :]",
        "D = (carry + q_t[..., :, None] * dy_t[..., None, :]).clamp(-(state_grad_clip or 9e9), state_grad_clip or 9e9)",
        "clip that bites",
        "dk",
    ),
    "heads that share are not added up": Fault(
        ".sum(axis + 1)", ".select(axis + 1, 0)", "every input its own heads", "dq"
    ),
    "packed checkpoints on top of each other": Fault("// chunk + s", "// chunk", "packed", "dq"),
}

# The oracle has no oracle but the equations written out in plain loops (one head), and the eager kernels, which share
# `one_step` and `expand_heads` with it. A number is the clip of the check by hand, a text the case of the other.
REFERENCE: dict[str, tuple[str, str, float | str]] = {
    "loses the state at a step": (
        "            h, _ = one_step(h, k_[:, t], v_[:, t], f_[:, t], W_)\n            ys",
        "            h, _ = one_step(h * (t != 64), k_[:, t], v_[:, t], f_[:, t], W_)\n            ys",
        1.0,
    ),
    "skips the last step": (
        "            h, _ = one_step(h, k_[:, t], v_[:, t], f_[:, t], W_)\n            ys",
        "            h = one_step(h, k_[:, t], v_[:, t], f_[:, t], W_)[0] if t < end - 1 else h\n            ys",
        1.0,
    ),
    "forgets 1 - f": ("(1 - f) * z_BNKV", "z_BNKV", 1.0),
    "W instead of its transpose": ("h_BNKV @ W_NVV", "h_BNKV @ W_NVV.mT", 1.0),
    "rounds the state to fp32": ("h = h0[states].clone()", "h = h0[states].float().to(acc)", 1.0),
    "forgets the initial state": ("if initial_state is None else initial_state.to(acc)", "if True else h0", 1.0),
    "no clip": ("grads[0].clamp(-ctx.c, ctx.c)", "grads[0]", 0.1),
    "a clip on one side": ("grads[0].clamp(-ctx.c, ctx.c)", "grads[0].clamp(max=ctx.c)", 0.1),
    "the sum clipped instead of the carry": (
        "            ys.append(readout(h, q_[:, t])[:, None])\n",
        "            if state_grad_clip is not None:\n                h = _ClipGradient.apply(h, state_grad_clip)\n"
        "            ys.append(readout(h, q_[:, t])[:, None])\n",
        0.1,
    ),
    "heads dealt out in turn": (
        "x.repeat_interleave(N // x.shape[axis], dim=axis)",
        "torch.cat([x] * (N // x.shape[axis]), axis)",
        "every input its own heads",
    ),
    "a packed sequence goes on with the state of the one before": (
        "h = h0[states].clone()", "h = (finals[-1] if finals else h0[states]).clone()", "packed"
    ),
}  # fmt: skip

# FAULT is true when this one is switched on.
CPP = {
    "forward loses the state between chunks": Fault(
        "            R f;\n            load_row(a.q, x.b, t, q_head",
        "            if (FAULT && t > x.start && (t - x.start) % 64 == 0) std::fill_n(H, K * VP, R(0));\n"
        "            R f;\n            load_row(a.q, x.b, t, q_head",
        "the benchmark's heads",
        "y",
    ),
    "forward skips the last step": Fault(
        "t < x.end; ++t) {\n            if (a.C",
        "t < x.end - FAULT; ++t) {\n            if (a.C",
        "the benchmark's heads",
        "final_state",
    ),
    "forward forgets 1 - f": Fault(
        "const R g = R(1) - f;", "const R g = FAULT ? R(1) : R(1) - f;", "the benchmark's heads", "y"
    ),
    "forward forgets the initial state": Fault(
        "pad_rows(a.initial ?", "pad_rows(a.initial && !FAULT ?", "K and V odd", "y"
    ),
    "tanh off by one part in 100,000": Fault(
        "const Vec<R> new_h = f * load(h + at) + g * z",
        "const Vec<R> new_h = f * load(h + at) + g * z * R(FAULT ? 1.00001 : 1)",
        "the benchmark's heads",
        "y",
    ),
    "backward drops the carry between chunks": Fault(
        "if (x.end == first + steps)", "if (FAULT || x.end == first + steps)", "the benchmark's heads", "dk"
    ),
    "backward skips the last chunk": Fault(
        # dk, for the carry that it loses: dq of the chunk stays unwritten, where an earlier right one may still stand.
        "int64_t i = chunks; i--", "int64_t i = chunks - FAULT; i--", "the benchmark's heads", "dk"
    ),
    "backward reads the next chunk's checkpoint": Fault(
        "pad_rows(checkpoint<R>(a, x, chunk.index,",
        "pad_rows(checkpoint<R>(a, x, chunk.index + FAULT,",
        "the benchmark's heads",
        "dq",
    ),
    "backward forgets 1 - f": Fault(
        "const R g = R(1) - f, floor", "const R g = FAULT ? R(1) : R(1) - f, floor", "the benchmark's heads", "dk"
    ),
    "W instead of its transpose": Fault(
        "dU, WT, carry_)", "dU, FAULT ? W : WT, carry_)", "the benchmark's heads", "dk"
    ),
    "df without Z": Fault(
        "(load(H + at) - z)", "(load(H + at) - (FAULT ? Vec<R>{} : z))", "the benchmark's heads", "df"
    ),
    "dW without the last step of a chunk": Fault(
        "H, Z, steps * K", "H, Z, (steps - FAULT) * K", "the benchmark's heads", "dW"
    ),
    "a clip on one side": Fault("D = D < lo ? lo : D;", "if (!FAULT) D = D < lo ? lo : D;", "clip that bites", "dk"),
    "no clip": Fault("R(a.clip)", "FAULT ? R(INFINITY) : R(a.clip)", "clip that bites", "dk"),
    "the sum clipped instead of the carry": Fault(
        "D = n.masked(D + q[row + r] * dy_, c);",
        "D = n.masked(D + q[row + r] * dy_, c); if (FAULT) { D = D > hi ? hi : D; D = D < lo ? lo : D; }",
        "clip that bites",
        "dk",
    ),
    "heads that share are not added up": Fault(
        "m < group", "m < (FAULT ? 1 : group)", "every input its own heads", "dq"
    ),
    "packed checkpoints on top of each other": Fault(
        "a.bounds[s] / a.C + s :", "a.bounds[s] / a.C + s * !FAULT :", "packed", "dq"
    ),
}


def replaced(source: str, name: str, right: str, wrong: str) -> str:
    assert right in source, f"the source has changed; the fault {name!r} must be seeded anew"
    return source.replace(right, wrong)


def with_fault(name: str, right: str, wrong: str) -> types.ModuleType:
    """`ops/reference.py`, which holds the reference and the eager kernels, with one fault in it."""
    module = types.ModuleType(f"{reference.__package__}.broken")
    module.__package__ = reference.__package__
    exec(replaced(inspect.getsource(reference), name, right, wrong), module.__dict__)
    return module


@pytest.mark.parametrize("name", REFERENCE)
def test_the_suite_notices_a_broken_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, case = REFERENCE[name]

    def check() -> None:
        check_eager(case) if isinstance(case, str) else check_by_hand("reference", case)

    check()
    monkeypatch.setattr(functional, "reference", with_fault(name, right, wrong))
    with pytest.raises(AssertionError):
        check()


@pytest.fixture
def broken_eager(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put the eager kernels with one fault in the place of the right ones."""

    def use(name: str) -> None:
        module = with_fault(name, EAGER[name].right, EAGER[name].wrong)
        right = registry.load
        monkeypatch.setattr(registry, "load", lambda impl: module if impl == "eager" else right(impl))

    return use


@pytest.mark.parametrize("name", EAGER)
def test_the_suite_notices_a_broken_eager_kernel(name: str, broken_eager: Callable[[str], None]) -> None:
    check_eager(EAGER[name].case)
    broken_eager(name)
    with pytest.raises(AssertionError, match=f"^{EAGER[name].seen_in}:"):
        check_eager(EAGER[name].case)


@pytest.fixture(scope="module")
def faulty_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The C++ kernel with all faults in it and none switched on."""
    source = build.SOURCE.read_text()
    for number, (name, fault) in enumerate(CPP.items(), 1):
        wrong = fault.wrong.replace("FAULT", f"(m2rnn_fault == {number})")
        source = replaced(source, name, fault.right, wrong)
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("faulty")
        (folder / "kernel.cpp").write_text('extern "C" { int m2rnn_fault = 0; }\n' + source)
        patch.setattr(build, "SOURCE", folder / "kernel.cpp")
        patch.setattr(build, "BASE_FLAGS", ("-O1", *build.BASE_FLAGS[1:]))  # halves the time of the build
        patch.setenv("M2RNN_CACHE_DIR", str(folder))
        return build.build()


@pytest.fixture
def switch(faulty_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.c_int]:
    """Use that library; the value set is the number of the fault."""
    monkeypatch.setattr(cpu, "library", lambda: faulty_library)
    number = ctypes.c_int.in_dll(faulty_library, "m2rnn_fault")
    yield number
    number.value = 0


@pytest.mark.skipif(cpu.availability() is not None, reason=str(cpu.availability()))
@pytest.mark.parametrize("name", CPP)
def test_the_suite_notices_a_broken_cpp_kernel(name: str, request: pytest.FixtureRequest) -> None:
    switch = request.getfixturevalue("switch")  # after the skip: it needs a compiler
    check_cpp(CPP[name].case)
    switch.value = 1 + list(CPP).index(name)
    with pytest.raises(AssertionError, match=rf"\n  {CPP[name].seen_in} \["):
        check_cpp(CPP[name].case)
