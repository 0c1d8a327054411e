# SPDX-License-Identifier: Apache-2.0
"""Errors of df at V = 64 with the kernels emulated, beside those of the eager run that the tolerance rule measures by.

`python -m tests.lowering.df_errors` prints a line of JSON for each case, with E = H_{t-1} - Z in fp16, as the kernel
keeps it, and in bf16, as it once did; and with an exact tanh and with one as rough as the hardware's may be.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from m2rnn_compile.testing import make_inputs, oracle, run_low_precision
from tests.lowering import emulated_gluon
from tests.lowering.emulated_scan import emulate, emulate_kernels

CASES: dict[str, tuple[int, dict[str, Any]]] = {  # draws, and what of
    "1 step of 2 heads": (200, dict(T=1, N=2)),
    "1 step of 2 heads, from a state": (100, dict(T=1, N=2, initial_state=True)),
    "8 steps of 4 heads": (12, dict(T=8, N=4)),
    "8 steps of 4 heads, from a state": (12, dict(T=8, N=4, initial_state=True)),
}


def rough_tanh(x: Any) -> Any:
    """tanh, wrong by up to 2^-11 of itself without a pattern: no better than the hardware's."""
    x = x.as_subclass(Tensor)
    noise = torch.sin(x.double() * 12345.678).mul(43758.5453).frac().abs() * 2 - 1
    return emulated_gluon.block(torch.tanh(x) * (1 + noise * 2**-11).float())


def through_bf16(x: Any) -> Any:
    """In the place of `to_half`: E as bf16 has it, up to what fp16 cannot hold."""
    return x.to(torch.bfloat16).to(torch.float16)


def errors(draws: int, T: int, N: int, v_scale: float = 1.0, **options: Any) -> tuple[Tensor, Tensor]:
    """Of ours and of eager's df, [draws, T, N]."""
    ours, eager = [], []
    for seed in range(draws):
        x = make_inputs(1, T, N, 64, 64, dtype=torch.bfloat16, state_grad_clip=1.0, seed=seed, **options)
        x.v.mul_(v_scale)
        truth = oracle(x, impl="eager")["df"]
        ours.append(emulate(x, forward=(64, 4), backward=64)["df"] - truth)
        eager.append(run_low_precision(x)["df"] - truth)
    return torch.cat(ours), torch.cat(eager)


def main() -> None:
    cases = [(name, draws, case, 1.0) for name, (draws, case) in CASES.items()]
    cases += [(f"1 step of 2 heads, v times {s:g}", 60, dict(T=1, N=2), s) for s in (1e-4, 1e-5, 1e-6)]
    for e in ("fp16", "bf16"):
        for tanh in ("exact", "rough"):
            with pytest.MonkeyPatch.context() as patch:
                emulate_kernels(patch, wide=True)
                if e == "bf16":
                    patch.setitem(emulated_gluon.PTX, "cvt.rn.satfinite.f16x2", through_bf16)
                if tanh == "rough":
                    patch.setitem(emulated_gluon.PTX, "tanh.approx", rough_tanh)
                for name, draws, case, v_scale in cases:
                    if v_scale != 1 and (e, tanh) != ("fp16", "rough"):
                        continue
                    ours, eager = errors(draws, **case, v_scale=v_scale)
                    step = ours.norm(dim=2) / eager.norm(dim=2)
                    row = dict(
                        E=e, tanh=tanh, case=name, numbers=ours.numel(),
                        ratio=round(float(ours.norm() / eager.norm()), 3),
                        ratio_of_steps={q: round(float(step.quantile(q)), 3) for q in (0.05, 0.5, 0.95)},
                        steps_above_2=round(float((step > 2).double().mean()), 3),
                    )  # fmt: skip
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
