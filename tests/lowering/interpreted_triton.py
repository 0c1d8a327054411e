# SPDX-License-Identifier: Apache-2.0
"""The portable Triton kernels on the CPU, under Triton's interpreter, against the fp64 oracle.

`test_triton.py` runs this file in a process of its own, with TRITON_INTERPRET=1 from the start: the interpreter must be
on before anything imports the kernels. The GPU suite runs them compiled; Gluon does not run in the interpreter.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from m2rnn_compile.lowering import triton as lowering
from m2rnn_compile.testing import ScanInputs, assert_accurate, make_inputs, oracle, run_low_precision

C16, C32 = lowering.LaunchConfig(16, 1), lowering.LaunchConfig(32, 1)


def run_kernels(
    x: ScanInputs, chunk: int = 16, config: lowering.LaunchConfig | None = None, window_bytes: int = 2**30
) -> dict[str, Tensor]:
    """Forward and backward through the lowering's functions themselves (the op would refuse CPU tensors)."""
    args = (x.q, x.k, x.v, x.f, x.W, x.initial_state, x.cu_seqlens)
    y, final, checkpoints = lowering.scan(*args, x.state_grad_clip, chunk, config=config)
    grads = lowering.scan_backward(
        x.dy, x.dfinal_state, *args, checkpoints, x.state_grad_clip, chunk, config=config, window_bytes=window_bytes
    )
    names = ("dq", "dk", "dv", "df", "dW", "dinitial_state")
    result = {"y": y, "final_state": final, **dict(zip(names, grads, strict=True))}
    if x.initial_state is None:
        del result["dinitial_state"]
    return result


CASES: dict[str, dict[str, Any]] = {
    "one head, one row": dict(B=1, T=25, N=1, K=1, V=1),
    "K and V not powers of two": dict(B=2, T=21, N=2, K=20, V=6, initial_state=True),
    "V above one tile": dict(B=1, T=18, N=2, K=16, V=17),
    "every input has its own heads": dict(B=1, T=19, N=4, K=16, V=16, Nq=4, Nk=2, Nv=2, Nf=1, Nw=2),
    "multi-value heads of the paper": dict(B=2, T=17, N=3, K=16, V=16),
    "clip that bites": dict(B=2, T=33, N=2, K=16, V=16, state_grad_clip=0.1, initial_state=True),
    "clip zero": dict(B=1, T=20, N=2, K=16, V=16, state_grad_clip=0.0),
    "clip infinite": dict(B=1, T=20, N=2, K=16, V=16, state_grad_clip=float("inf")),
    "packed, with an empty sequence": dict(B=1, T=45, N=2, K=16, V=16, seqlens=[20, 0, 25], initial_state=True),
    "packed, clipped, shared heads": dict(B=1, T=34, N=4, K=16, V=16, Nv=2, seqlens=[1, 16, 17], state_grad_clip=0.3),
    "no gradient of the final state": dict(B=1, T=20, N=2, K=16, V=16, dfinal_state=False),
    "bf16": dict(B=1, T=20, N=2, K=16, V=16, dtype=torch.bfloat16, initial_state=True),
    "fp16": dict(B=1, T=20, N=2, K=16, V=16, dtype=torch.float16),
}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.replace(" ", "-"))
def test_values_and_gradients_are_as_accurate_as_the_rule_asks(case: str) -> None:
    x = make_inputs(**CASES[case], seed=7)
    assert_accurate(run_kernels(x), oracle(x), run_low_precision(x), slices=2)


@pytest.mark.parametrize("T", [1, 3, 4, 15, 16, 17, 35])
def test_lengths_around_the_chunk_and_the_group_of_four(T: int) -> None:
    x = make_inputs(1, T, 2, 16, 16, seed=T, initial_state=True)
    assert_accurate(run_kernels(x, chunk=16), oracle(x), run_low_precision(x), slices=2)


@pytest.mark.parametrize("config", [C16, C32], ids=["16-rows", "32-rows"])
@pytest.mark.parametrize("window_bytes", [1, 2**30], ids=["a-window-per-chunk", "one-window"])
def test_every_split_of_rows_and_time_gives_the_same_answer(config: lowering.LaunchConfig, window_bytes: int) -> None:
    x = make_inputs(2, 35, 2, 40, 16, seed=1, initial_state=True, state_grad_clip=0.5)
    got = run_kernels(x, config=config, window_bytes=window_bytes)
    assert_accurate(got, oracle(x), run_low_precision(x), slices=2)


def test_windows_of_time_do_not_change_a_bit() -> None:
    x = make_inputs(1, 40, 2, 16, 16, seed=2)
    one, many = run_kernels(x, window_bytes=2**30), run_kernels(x, window_bytes=1)
    assert all(torch.equal(one[name], many[name]) for name in one)


PACKED: dict[str, list[int]] = {
    "one sequence": [37],
    "long, short, empty, and one of a chunk": [35, 1, 0, 16],
    "short ones, more than a window has": [1, 2, 3, 27, 0, 1],
    "empty at both ends": [0, 34, 0],
}


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("seqlens", PACKED.values(), ids=PACKED)
def test_windows_of_packed_sequences_do_not_change_a_bit(
    seqlens: list[int], chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The partial sums of a window are no larger than asked for, and what nobody writes is not read."""
    T = sum(seqlens)
    x = make_inputs(1, T, 1, 20, 6, seed=2, seqlens=seqlens, initial_state=True, state_grad_clip=0.5)
    one = run_kernels(x, config=C16)
    made, new_empty = [], Tensor.new_empty

    def poisoned(y: Tensor, *size: Any, **options: Any) -> Tensor:
        made.append(new_empty(y, *size, **options))
        return made[-1].fill_(torch.nan) if made[-1].is_floating_point() else made[-1]

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    bytes_of_a_chunk = 16 * 4 * (2 * 20 + 2 * 6 + 2)
    many = run_kernels(x, config=C16, window_bytes=chunks * bytes_of_a_chunk)
    assert all(torch.equal(one[name], many[name]) for name in one)
    parts = [y for y in made if y.dim() == 1 and y.is_floating_point()]
    assert sum(y.nbytes for y in parts) == chunks * bytes_of_a_chunk


def test_a_wrong_plan_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_inputs(1, 36, 1, 16, 16, seed=2, seqlens=[20, 16])
    windows_of = lowering.windows_of

    def earlier_windows_first(*args: Any) -> tuple[Tensor, ...]:
        return tuple(table.flip(0) for table in windows_of(*args))

    one = run_kernels(x)
    monkeypatch.setattr(lowering, "windows_of", earlier_windows_first)
    other = run_kernels(x, window_bytes=1)
    assert not torch.equal(one["dk"], other["dk"])


def test_cu_seqlens_of_any_values_touch_no_memory_but_their_own() -> None:
    x = make_inputs(1, 36, 1, 16, 16, seed=2, seqlens=[20, 16])
    right = run_kernels(x)
    for values in ([-5, 400, 70], [36, 0, 36], [2**31 - 1, -(2**31), 0]):
        wrong = dataclasses.replace(x, cu_seqlens=torch.tensor(values, dtype=torch.int32))
        run_kernels(wrong, window_bytes=1)
    again = run_kernels(x)
    assert all(torch.equal(right[name], again[name]) for name in right)


def test_strided_inputs_and_a_gradient_of_stride_zero() -> None:
    x = make_inputs(2, 18, 2, 16, 16, seed=3, initial_state=True)
    dy = torch.ones(()).expand_as(x.dy)  # what y.sum().backward() sends
    dense = ScanInputs(x.q, x.k, x.v, x.f, x.W, x.initial_state, None, None, dy.contiguous(), x.dfinal_state)
    state = x.initial_state.transpose(0, 1).contiguous().transpose(0, 1)
    strided = ScanInputs(
        x.q.transpose(1, 3).contiguous().transpose(1, 3), torch.cat([x.k, x.k], -1)[..., 16:], x.v.mT.contiguous().mT,
        x.f.transpose(0, 2).contiguous().transpose(0, 2), x.W.mT.contiguous().mT, state, None, None, dy, x.dfinal_state,
    )  # fmt: skip
    a, b = run_kernels(dense), run_kernels(strided)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_empty_time_returns_the_initial_state_and_its_gradient() -> None:
    x = make_inputs(2, 0, 2, 16, 16, initial_state=True)
    got = run_kernels(x)
    assert torch.equal(got["final_state"], x.initial_state)
    assert got["final_state"].data_ptr() != x.initial_state.data_ptr()
    assert torch.equal(got["dinitial_state"], x.dfinal_state)
    assert not got["dW"].any()


def test_a_step_is_a_scan_of_length_one() -> None:
    x = make_inputs(3, 1, 2, 16, 16, seed=4, initial_state=True)
    y, state = lowering.step(x.q[:, 0], x.k[:, 0], x.v[:, 0], x.f[:, 0], x.W, x.initial_state)
    whole = run_kernels(x)
    assert torch.equal(y, whole["y"][:, 0])
    assert torch.equal(state, whole["final_state"])


@pytest.mark.parametrize("chunk", [1, 64])
def test_each_program_of_backward_has_a_scratch_row_of_its_own(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs run at once on a GPU and one after another here: only what they leave behind shows a shared row."""
    made, new_empty = [], Tensor.new_empty

    def poisoned(x: Tensor, *size: Any, **options: Any) -> Tensor:
        made.append(new_empty(x, *size, **options))
        return made[-1].fill_(torch.nan) if made[-1].is_floating_point() else made[-1]

    B, N, K, V = 3, 4, 16, 16
    draw = lambda *shape: torch.randn(*shape)
    q, k, v, f, W = draw(B, 1, 1, K), draw(B, 1, 1, K), draw(B, 1, N, V), torch.rand(B, 1, N), draw(N, V, V)
    checkpoints = draw(B, 1 if chunk == 1 else 2, N, K, V)
    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    lowering.scan_backward(draw(B, 1, N, V), None, q, k, v, f, W, None, None, checkpoints, None, chunk)
    scratch, *_ = [x for x in made if x.dim() == 4 and x.shape[0] == B * N and x.shape[2:] == (K, V)]
    assert scratch[:, 0].isfinite().all()


@pytest.mark.parametrize("chunk", [1, 2, 5, 63])
def test_a_chunk_that_groups_of_four_do_not_fill_is_refused(chunk: int) -> None:
    B, T, N, K, V = 1, 70, 1, 16, 16
    q, v, f, W = torch.zeros(B, T, N, K), torch.zeros(B, T, N, V), torch.zeros(B, T, N), torch.zeros(N, V, V)
    with pytest.raises(ValueError, match=f"multiple of 4 or no less than T = 70, got {chunk}"):
        lowering.scan(q, q, v, f, W, None, None, None, chunk)


def test_nan_in_one_sequence_stays_there() -> None:
    x = make_inputs(1, 40, 2, 16, 16, seed=5, seqlens=[20, 20])
    clean = run_kernels(x)
    x.k[0, 25] = float("nan")
    dirty = run_kernels(x)
    assert torch.equal(clean["y"][:, :20], dirty["y"][:, :20])
    assert torch.equal(clean["dv"][:, :20], dirty["dv"][:, :20])
    assert dirty["y"][:, 25:].isnan().any()


def test_a_nan_gradient_is_not_clipped_away() -> None:
    x = make_inputs(1, 8, 1, 16, 16, state_grad_clip=1.0)
    x.dfinal_state.fill_(float("nan"))
    assert run_kernels(x)["dv"].isnan().all()


def test_what_it_cannot_do_has_a_reason() -> None:
    x = make_inputs(1, 4, 1, 16, 16, dtype=torch.float64)
    assert "float64" in (lowering.unsupported(x.q, x.k, x.v, x.f, x.W, None, None) or "")
    x = make_inputs(1, 4, 1, 16, 130)
    assert "V = 130" in (lowering.unsupported(x.q, x.k, x.v, x.f, x.W, None, None) or "")


def test_the_rule_notices_a_lost_carry_between_chunks() -> None:
    """The suite can fail: checkpoints of zero are what forgetting the carry looks like."""
    x = make_inputs(1, 40, 2, 16, 16, seed=6)
    args = (x.q, x.k, x.v, x.f, x.W, None, None)
    y, final, checkpoints = lowering.scan(*args, None, 16)
    grads = lowering.scan_backward(x.dy, x.dfinal_state, *args, checkpoints.zero_(), None, 16)
    got = {"y": y, "final_state": final, **dict(zip(("dq", "dk", "dv", "df", "dW"), grads, strict=False))}
    with pytest.raises(AssertionError, match="dq"):
        assert_accurate(got, oracle(x), run_low_precision(x), slices=2)
