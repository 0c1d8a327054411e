# SPDX-License-Identifier: Apache-2.0
"""FLOP formulas for `torch.utils.flop_counter.FlopCounterMode`.

A multiplication and an addition count as two; tanh and other pointwise work is not counted, as in torch's own formulas.

`torch.utils.flop_counter` imports Triton, which importing this package must not do, and a `FlopCounterMode` copies the
table of formulas when it is made. So the formulas are registered the moment that module is imported, by whoever
needs it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from .after_import import after_import


def scan_macs(q_shape: Any, v_shape: Any, heads: int, kvv: int, kv: int) -> int:
    """FLOPs of `kvv` products of K·V·V and `kv` of K·V multiply-adds per step and head."""
    (B, T, _, K), V = q_shape, v_shape[3]
    return int(2 * B * T * heads * (kvv * K * V * V + kv * K * V))


def scan_flops(q: Any, k: Any, v: Any, f: Any, W: Any, *args: Any, **kwargs: Any) -> int:
    """H W (K·V·V), k vᵀ and Hᵀ q (K·V each) per step and head."""
    return scan_macs(q, v, max(q[2], k[2], v[2], f[2], W[0]), 1, 2)


def scan_backward_flops(dy: Any, dh: Any, q: Any, k: Any, v: Any, f: Any, W: Any, *args: Any, **kwargs: Any) -> int:
    """H W again, dU Wᵀ and Hᵀ dU; k vᵀ again, q dyᵀ, dq, dk, dv, df."""
    return scan_macs(q, v, max(q[2], k[2], v[2], f[2], W[0]), 3, 6)


def step_flops(q: Any, k: Any, v: Any, f: Any, W: Any, state: Any, *args: Any, **kwargs: Any) -> int:
    """One step of `scan_flops`."""
    B, N, K, V = state
    return int(2 * B * N * (K * V * V + 2 * K * V))


def decode_step_flops(qkv: Any, *args: Any, **kwargs: Any) -> int:
    """`step_flops` for every row of the batch; the conv, the gates and the norm are pointwise work."""
    state = args[9]
    return step_flops(None, None, None, None, None, (qkv[0], *state[1:]))


def fused_scan_flops(q: Any, k: Any, v: Any, f: Any, W: Any, *args: Any, **kwargs: Any) -> int:
    """`scan_flops`; gates and norm are pointwise work."""
    return scan_flops(q, k, v, f, W)


def fused_scan_packed_flops(qkv: Any, sizes: Any, f: Any, W: Any, *args: Any, **kwargs: Any) -> int:
    """`scan_flops` with q | k | v in one tensor."""
    (B, T, _), (Nq, Nk, Nv, K, V) = qkv, sizes
    return scan_flops((B, T, Nq, K), (B, T, Nk, K), (B, T, Nv, V), f, W)


def fused_mixer_flops(x: Any, conv: Any, position: Any, sizes: Any, W: Any, *args: Any, **kwargs: Any) -> int:
    """`scan_flops` with q | k | v, f and g in one tensor."""
    return fused_scan_packed_flops(x, sizes[:5], (*x[:2], sizes[5]), W)


def fused_mixer_backward_flops(
    do: Any, dh: Any, x: Any, conv: Any, position: Any, sizes: Any, W: Any, *args: Any, **kwargs: Any
) -> int:
    """`scan_backward_flops`; the rest is pointwise work."""
    (B, T, _), (Nq, Nk, Nv, K, V, Nf) = x, sizes[:6]
    return scan_backward_flops(do, dh, (B, T, Nq, K), (B, T, Nk, K), (B, T, Nv, V), (B, T, Nf), W)


def _register(flop_counter: ModuleType) -> None:
    formulas = {
        torch.ops.m2rnn.scan: scan_flops,
        torch.ops.m2rnn.scan_backward: scan_backward_flops,
        torch.ops.m2rnn.fused_scan: fused_scan_flops,
        torch.ops.m2rnn.fused_scan_packed: fused_scan_packed_flops,
        torch.ops.m2rnn.fused_mixer: fused_mixer_flops,
        torch.ops.m2rnn.fused_mixer_backward: fused_mixer_backward_flops,
        torch.ops.m2rnn.step: step_flops,
        torch.ops.m2rnn.decode_step: decode_step_flops,
    }
    for op, formula in formulas.items():
        if op not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(op)(formula)


def register_flops() -> None:
    """Register now if torch's counter is loaded, else as soon as it is."""
    after_import("torch.utils.flop_counter", _register)
