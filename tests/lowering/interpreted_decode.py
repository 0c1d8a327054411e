# SPDX-License-Identifier: Apache-2.0
"""The kernels of the fused decoding step on the CPU, under Triton's interpreter, against the fp64 equations.

Run by `test_triton.py` in a process of its own. Programs run one after the other here: that no two of them meet in
memory is for the GPU suite and for `test_the_windows_are_moved_by_the_second_launch_only` to show.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from m2rnn_compile.lowering.triton import LaunchConfig
from m2rnn_compile.lowering.triton import decode as lowering
from m2rnn_compile.ops.validation import check_decode
from m2rnn_compile.testing import assert_accurate
from tests.ops.decoding import HEADS, Step, by_loops, make_step

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel forgets to write is NaN, not a zero that happened to be there."""
    new_empty = Tensor.new_empty

    def poisoned(x: Tensor, *size: Any, **options: Any) -> Tensor:
        made = new_empty(x, *size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def run(s: Step, **options: Any) -> dict[str, Tensor]:
    """Through the lowering's function itself (the op would refuse CPU tensors), on pools of its own."""
    s = s.changed()
    o = lowering.decode_step(*s.arguments(), **options)
    return {"o": o, "conv_state": s.conv_state, "state": s.state}


def assert_right(s: Step, **options: Any) -> None:
    assert_accurate(run(s, **options), by_loops(s.to(torch.float64)), by_loops(s, s.qkv.dtype))


@pytest.mark.parametrize("case", HEADS, ids=lambda c: c.replace(" ", "-"))
def test_values(case: str) -> None:
    assert_right(make_step(**HEADS[case]))


SIZES: dict[str, dict[str, Any]] = {
    "paper's head": dict(B=2, N=2, K=64, V=16, dtype=BF16),
    "fp16": dict(B=2, N=2, K=64, V=16, dtype=FP16),
    "K of several tiles": dict(B=1, N=2, K=150, V=16, dtype=FP32),
    "V above one tile": dict(B=1, N=2, K=20, V=17, dtype=BF16),
    "V 33": dict(B=1, N=1, K=40, V=33, dtype=BF16),
    "V 128": dict(B=1, N=1, K=33, V=128, dtype=BF16),
    "V 128, fp32": dict(B=1, N=1, K=17, V=128, dtype=FP32),
    "channels of several blocks": dict(B=2, N=40, K=16, V=32, dtype=FP32),
}


@pytest.mark.parametrize("case", SIZES, ids=lambda c: c.replace(" ", "-"))
def test_sizes(case: str) -> None:
    assert_right(make_step(**SIZES[case], seed=1))


@pytest.mark.parametrize("rows", [16, 32, 64])
def test_rows_of_a_tile_change_no_bit_of_the_state(rows: int) -> None:
    s = make_step(2, 2, 100, 20, seed=2)
    assert_right(s, config=LaunchConfig(rows, 1))
    assert torch.equal(run(s, config=LaunchConfig(rows, 1))["state"], run(s)["state"])


def test_norm_over_more_features_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "FINISH_FEATURES", 16)
    monkeypatch.setattr(lowering, "FINISH_CHANNELS", 16)
    assert_right(make_step(2, 4, 6, 5, seed=3, indices=[1, 0]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_skipped_rows_are_zero_and_touch_no_slot(dtype: torch.dtype) -> None:
    s = make_step(5, 2, 6, 5, indices=[-1, 3, -1, 0, -1], slots=5)
    s = dataclasses.replace(s, state_indices=s.state_indices.to(dtype))
    s.qkv[[0, 2, 4]] = torch.nan
    got = run(s)
    assert not got["o"][[0, 2, 4]].any()
    for name in ("conv_state", "state"):
        assert torch.equal(got[name][[1, 2, 4]], getattr(s, name)[[1, 2, 4]])
    assert_right(s)


@pytest.mark.parametrize("outside", [2, -2, 2**31 - 1, -(2**31)])
def test_a_row_outside_of_the_pool_is_nan_and_touches_no_slot(outside: int) -> None:
    s = make_step(2, 2, 6, 5, indices=[1, 0], slots=2)
    inside = run(s)
    s.state_indices[1] = outside
    got = run(s)
    assert got["o"][1].isnan().all()
    assert torch.equal(got["o"][0], inside["o"][0])
    assert torch.equal(got["state"][1], inside["state"][1])
    assert torch.equal(got["state"][0], s.state[0])
    assert torch.equal(got["conv_state"][0], s.conv_state[0])


def test_views_of_the_projection_of_larger_pools_and_of_indices() -> None:
    s = make_step(3, 2, 6, 5, indices=[1, -1, 2], slots=4)
    expected = run(s)
    transposed = {n: getattr(s, n).mT.contiguous().mT for n in ("qkv", "x_f", "g")}
    indices = torch.stack([s.state_indices, s.state_indices * 0], 1)[:, 0]
    pools = {n: torch.stack([getattr(s, n)] * 3, 1) for n in ("conv_state", "state")}
    others = {n: x[:, [0, 2]].clone() for n, x in pools.items()}
    views = {n: x[:, 1] for n, x in pools.items()}
    o = lowering.decode_step(*dataclasses.replace(s, **transposed, **views, state_indices=indices).arguments())
    assert torch.equal(o, expected["o"])
    assert all(torch.equal(views[n], expected[n]) for n in views)
    assert all(torch.equal(pools[n][:, [0, 2]], others[n]) for n in pools)


def test_conv_state_in_its_own_dtype() -> None:
    s = make_step(2, 2, 6, 5, dtype=BF16)
    wide = dataclasses.replace(s, conv_state=s.conv_state.float())
    got, expected = run(wide), run(s)
    assert got["conv_state"].dtype == FP32
    assert torch.equal(got["conv_state"], expected["conv_state"].float())
    assert torch.equal(got["o"], expected["o"])


def test_the_windows_are_moved_by_the_second_launch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that share channels all read the window in the first launch, in any order."""
    s = make_step(2, 4, 6, 5)
    windows = s.conv_state.clone()

    class Skipped:
        def __getitem__(self, grid: object) -> Any:
            return lambda *args, **options: None

    monkeypatch.setattr(lowering, "decode_finish_kernel", Skipped())
    lowering.decode_step(*s.arguments())
    assert torch.equal(s.conv_state, windows)


def test_small_steps_of_the_forget_gate_keep_their_digits() -> None:
    """f = exp(-A softplus(x)): with 1 + exp(x) rounded, dt = 1e-6 would lose most of its digits."""
    s = make_step(1, 4, 3, 4)
    s.dt_bias.fill_(-13.8).sub_(s.x_f[0])
    s.state.fill_(0.5)
    truth, got = by_loops(s.to(torch.float64)), run(s)
    moved = (truth["state"] - s.state.double()).abs().max()
    assert 0 < moved < 1e-4
    assert ((got["state"].double() - truth["state"]).abs() <= 2 * torch.finfo(FP32).eps).all()


REASONS: dict[str, tuple[str, dict[str, Any]]] = {
    "dtype": ("float64", dict(qkv=torch.zeros(2, 22, dtype=torch.float64), state=torch.zeros(2, 2, 6, 5).double())),
    "V": ("V = 130", {}),
    "parameter": ("contiguous `W`", dict(W=torch.zeros(2, 5, 5).mT)),
    "parameter dtype": ("not `D` in torch.float64", dict(D=torch.zeros(2, 5).double())),
    "pool": ("`state` whose slots are contiguous", dict(state=torch.zeros(2, 2, 5, 6).mT)),
}


@pytest.mark.parametrize("case", REASONS, ids=lambda c: c.replace(" ", "-"))
def test_what_it_cannot_do_has_a_reason(case: str) -> None:
    reason, wrong = REASONS[case]
    s = make_step(2, 2, 6, 5) if case != "V" else make_step(2, 2, 6, 130)
    s = dataclasses.replace(s, **wrong)
    tensors = list(s.arguments()[:12])
    assert reason in (lowering.unsupported(tensors, check_decode(*tensors, 1, 1)) or "")


def test_what_it_can_do_has_none() -> None:
    arguments = make_step(2, 2, 6, 5).arguments()
    assert lowering.unsupported(list(arguments[:12]), check_decode(*arguments[:14])) is None


def test_the_rule_notices_a_window_that_stands_still() -> None:
    """The suite can fail: the old window in place of the new one."""
    s = make_step(2, 4, 6, 5)
    got = run(s) | {"conv_state": s.conv_state}
    with pytest.raises(AssertionError, match="conv_state"):
        assert_accurate(got, by_loops(s.to(torch.float64)), by_loops(s, FP32))
