# SPDX-License-Identifier: Apache-2.0
"""`warmup`: runs the kernels that calls to come will run, and leaves no trace in the process's random numbers."""

from __future__ import annotations

import pytest
import torch

import m2rnn_compile
from m2rnn_compile import warm, warmup


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_it_runs_every_kind_of_call(packed: bool, backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(*args: torch.Tensor, **options: object) -> object:
        calls.append((args, options))
        return m2rnn_compile.m2rnn(*args, **options)

    monkeypatch.setattr(warm, "m2rnn", spy)
    before = torch.get_rng_state()
    warmup(B=3, N=2, K=4, V=4, dtype=torch.float32, device="cpu", packed=packed, backward=backward, initial_state=True,
           state_grad_clip=1.0, impl="eager")  # fmt: skip
    (q, _, v, f, W), options = calls[0]
    assert q.shape == ((1, 66, 1, 4) if packed else (3, 8, 1, 4))
    indices = [cu.dtype for _, o in calls if isinstance(cu := o["cu_seqlens"], torch.Tensor)]
    assert indices == ([torch.int32, torch.int64] if packed else [])
    assert v.shape[2] == f.shape[2] == W.shape[0] == 2
    assert options["state_grad_clip"] == 1.0
    assert options["initial_state"].shape == (3, 2, 4, 4)
    assert q.requires_grad == backward
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.gpu
@pytest.mark.parametrize("T", [9, 64, 97, 4096])
def test_no_length_compiles_anything_after_it(T: int) -> None:
    from m2rnn_compile.lowering import triton as lowering
    from m2rnn_compile.testing import make_inputs, run

    kernels = [lowering.forward_gluon_kernel(), lowering.backward_gluon_kernel()]
    kernels += [lowering.reduce.reduce_kernel, lowering.reduce.reduce_four_kernel]

    def compiled() -> int:
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    warmup(B=2, N=84, K=64, V=16, state_grad_clip=1.0)
    before = compiled()
    run(make_inputs(2, T, 84, 64, 16, dtype=torch.bfloat16, device="cuda", state_grad_clip=1.0), impl="triton")
    assert compiled() == before
