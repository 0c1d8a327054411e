# SPDX-License-Identifier: Apache-2.0
"""The tests of the tests: break a kernel on purpose, and the suite's own checks go red.

A fault is a piece of source and what stands there instead. The eager kernels are executed anew with one fault each; the
C++ kernel is built once with all of them, each behind a switch.
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
from m2rnn_compile.ops import reference, registry
from tests.lowering.test_cpp import test_values_and_gradients_are_as_accurate_as_the_rule_asks as check_cpp
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


def replaced(source: str, name: str, fault: Fault, wrong: str) -> str:
    assert fault.right in source, f"the source has changed; the fault {name!r} must be seeded anew"
    return source.replace(fault.right, wrong)


@pytest.fixture
def broken_eager(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put the eager kernels with one fault in the place of the right ones."""

    def use(name: str) -> None:
        module = types.ModuleType(f"{reference.__package__}.broken")
        module.__package__ = reference.__package__
        exec(replaced(inspect.getsource(reference), name, EAGER[name], EAGER[name].wrong), module.__dict__)
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
        source = replaced(source, name, fault, wrong)
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
