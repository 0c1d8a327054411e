# SPDX-License-Identifier: Apache-2.0
"""What the tests of the fused decoding step share: its arguments, and the equations once more by plain loops."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

INTO_NEXT_STEP = ("conv_state", "state")


@dataclasses.dataclass
class Step:
    """The arguments of one `m2rnn_decode_step`."""

    qkv: Tensor
    x_f: Tensor
    g: Tensor
    conv_weight: Tensor
    A_log: Tensor
    dt_bias: Tensor
    W: Tensor
    D: Tensor
    norm_weight: Tensor
    conv_state: Tensor
    state: Tensor
    state_indices: Tensor | None
    num_q_heads: int
    num_k_heads: int
    norm_eps: float = 1e-5

    def arguments(self) -> tuple[Any, ...]:
        """As the op takes them, but for `impl`; the same tensors, so the pools are written."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def changed(self, **tensors: Any) -> Step:
        """A copy with pools of its own and some arguments replaced."""
        pools = {name: getattr(self, name).clone() for name in INTO_NEXT_STEP}
        return dataclasses.replace(self, **{**pools, **tensors})

    def to(self, dtype: torch.dtype) -> Step:
        """A copy in another dtype; the state, A_log and dt_bias never below fp32."""
        wide = torch.promote_types(dtype, torch.float32)
        names = [field.name for field in dataclasses.fields(self)][:11]
        cast = {n: getattr(self, n).to(wide if n in ("A_log", "dt_bias", "state") else dtype, copy=True) for n in names}
        return dataclasses.replace(self, **cast)


def make_step(
    B: int,
    N: int,
    K: int,
    V: int,
    *,
    Nq: int = 1,
    Nk: int = 1,
    Nv: int | None = None,
    Nf: int | None = None,
    Ng: int | None = None,
    Nw: int | None = None,
    width: int = 4,
    indices: list[int] | None = None,
    slots: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Step:
    """Values of order one, dt as in the paper's initialisation and identity-like W; drawn on the CPU in fp64."""
    r = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=r, dtype=torch.float64)
    Nv, Nf, Ng, Nw = (N if heads is None else heads for heads in (Nv, Nf, Ng, Nw))
    slots = (B if indices is None else max([0, *indices]) + 2) if slots is None else slots
    C = (Nq + Nk) * K + Nv * V
    dt = torch.logspace(-3, -1, Nf, dtype=torch.float64)
    step = Step(
        qkv=randn(B, C),
        x_f=randn(B, Nf),
        g=randn(B, Ng * V),
        conv_weight=randn(C, 1, width) * width**-0.5,
        A_log=torch.linspace(0.01, 16, Nf, dtype=torch.float64).log(),
        dt_bias=dt.expm1().log(),
        W=torch.eye(V, dtype=torch.float64) + randn(Nw, V, V) * (0.3 * V**-0.5),
        D=1 + 0.1 * randn(N, V),
        norm_weight=1 + 0.1 * randn(N * V),
        conv_state=randn(slots, width - 1, C),
        state=randn(slots, N, K, V) * 0.5,
        state_indices=None if indices is None else torch.tensor(indices, dtype=torch.int32),
        num_q_heads=Nq,
        num_k_heads=Nk,
    ).to(dtype)
    tensors = {n: x.to(device) for n, x in vars(step).items() if isinstance(x, Tensor)}
    # As the layer has them, views of one projection's result: rows are further apart than they are long.
    projected = torch.cat([tensors[n] for n in ("qkv", "x_f", "g")], 1).split([C, Nf, Ng * V], 1)
    return dataclasses.replace(step, **(tensors | dict(zip(("qkv", "x_f", "g"), projected, strict=True))))


def by_loops(s: Step, low: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Result and pools after the step, row by row and head by head, without code of the package.

    In fp64 this is the oracle. With `low` it is what a careful user writes in eager PyTorch: each operation rounds its
    result to `low`, only the forget gate and the state stay in fp32. That sets the tolerance for kernels.
    """
    acc = torch.float64 if low == torch.float64 else torch.float32
    s = s.to(low)
    (B, C), (_, N, K, V), width = s.qkv.shape, s.state.shape, s.conv_weight.shape[2]
    result = torch.zeros(B, N * V, dtype=low, device=s.qkv.device)
    heads = {"q": (0, s.num_q_heads, K), "k": (s.num_q_heads * K, s.num_k_heads, K)}
    heads["v"] = ((s.num_q_heads + s.num_k_heads) * K, (C - (s.num_q_heads + s.num_k_heads) * K) // V, V)
    silu = lambda x: x * torch.sigmoid(x)
    indices = range(B) if s.state_indices is None else s.state_indices.tolist()
    for b, slot in enumerate(indices):
        if slot == -1:
            continue
        inputs = [*s.conv_state[slot], s.qkv[b]]
        x = silu(sum(inputs[j] * s.conv_weight[:, 0, j] for j in range(width)))
        for j in range(width - 1):
            s.conv_state[slot, j] = inputs[j + 1].clone()
        dt = torch.log1p(torch.exp(s.x_f[b].to(acc) + s.dt_bias))
        f = torch.exp(-torch.exp(s.A_log) * dt)
        o = []
        for n in range(N):
            q, k, v = (
                x[first + n // (N // count) * size : first + (n // (N // count) + 1) * size]
                for first, count, size in heads.values()
            )
            W, f_n = s.W[n // (N // s.W.shape[0])], f[n // (N // len(f))]
            z = torch.tanh((s.state[slot, n].to(low) @ W + torch.outer(k, v)).to(acc))
            h = f_n * s.state[slot, n] + (1 - f_n) * z
            s.state[slot, n] = h
            g = s.g[b].unflatten(0, (-1, V))
            o.append((q @ h.to(low) + s.D[n] * v) * silu(g[n // (N // len(g))]))
        row = torch.cat(o).to(acc)
        result[b] = (row / torch.sqrt((row * row).mean() + s.norm_eps) * s.norm_weight.to(acc)).to(low)
    return {"o": result, "conv_state": s.conv_state, "state": s.state}


HEADS: dict[str, dict[str, Any]] = {
    "multi-value, as the paper's": dict(B=3, N=4, K=6, V=5),
    "one head, one row": dict(B=2, N=1, K=1, V=1),
    "every input its own heads": dict(B=3, N=4, K=6, V=5, Nq=2, Nk=4, Nv=1, Nf=2, Ng=2, Nw=1),
    "shared v": dict(B=2, N=6, K=3, V=4, Nv=2, Nf=3, Nw=6),
    "no window": dict(B=2, N=2, K=3, V=4, width=1),
    "window of one": dict(B=2, N=2, K=3, V=4, width=2),
    "window of five": dict(B=2, N=2, K=3, V=4, width=5),
    "some rows skipped": dict(B=5, N=2, K=3, V=4, indices=[4, -1, 0, 2, -1]),
    "all rows skipped": dict(B=2, N=2, K=3, V=4, indices=[-1, -1]),
}
