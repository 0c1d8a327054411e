# SPDX-License-Identifier: Apache-2.0
"""The eager kernels of the op: their hand-written backward against torch autograd through the plain loop, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from m2rnn_compile.testing import make_inputs, oracle, run

CASES: dict[str, dict[str, Any]] = {
    "three chunks": dict(B=2, T=130, N=2, K=4, V=3, initial_state=True),
    "every input its own heads": dict(B=2, T=66, N=4, K=3, V=5, Nq=2, Nk=4, Nv=1, Nf=2, Nw=1),
    "clip that bites": dict(B=1, T=130, N=2, K=4, V=3, state_grad_clip=0.1),
    "packed": dict(B=1, T=140, N=2, K=4, V=3, seqlens=[65, 0, 10, 65], initial_state=True),
}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.replace(" ", "-"))
def test_eager_kernels_agree_with_autograd_through_the_loop(case: str) -> None:
    x = make_inputs(**CASES[case], dtype=torch.float64, seed=3)
    got, want = run(x, impl="eager"), oracle(x)
    for name, truth in want.items():
        torch.testing.assert_close(got[name], truth, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
