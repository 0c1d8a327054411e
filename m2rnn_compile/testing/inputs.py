# SPDX-License-Identifier: Apache-2.0
"""Random scans that look like the paper's: gates near one, identity-like W, values of order one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class ScanInputs:
    """Arguments of one scan and the gradients to send back through it. Shapes as in `m2rnn`."""

    q: Tensor
    k: Tensor
    v: Tensor
    f: Tensor
    W: Tensor
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    state_grad_clip: float | None
    dy: Tensor | None
    dfinal_state: Tensor | None

    def named_inputs(self) -> dict[str, Tensor]:
        """The differentiable inputs that are present, by argument name."""
        names = ("q", "k", "v", "f", "W", "initial_state")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> ScanInputs:
        """A copy with every float tensor cast (cu_seqlens is only moved)."""

        def move(x: object) -> object:
            if not isinstance(x, Tensor):
                return x
            return x.to(device=device, dtype=dtype if x.is_floating_point() else None)

        return ScanInputs(*(move(getattr(self, field.name)) for field in dataclasses.fields(self)))  # type: ignore[arg-type]


def make_inputs(
    B: int,
    T: int,
    N: int,
    K: int,
    V: int,
    *,
    Nq: int = 1,
    Nk: int = 1,
    Nv: int | None = None,
    Nf: int | None = None,
    Nw: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    initial_state: bool = False,
    seqlens: Sequence[int] | None = None,
    state_grad_clip: float | None = None,
    dfinal_state: bool = True,
) -> ScanInputs:
    """Draw one scan. The same arguments give the same numbers on every device (they are drawn on the CPU).

    k and v are scaled so that k vᵀ is of order one and tanh is neither linear nor saturated; f is the forget factor of
    the paper's initialisation (log-uniform time constants), in fp32 (fp64 for fp64 inputs); W is the identity plus
    noise, |W| about 1. `seqlens` packs sequences of those lengths (B must be 1 and T their sum).
    """
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    Nv, Nf, Nw = Nv or N, Nf or N, Nw or N
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    S = B
    cu_seqlens = None
    if seqlens is not None:
        if B != 1 or sum(seqlens) != T:
            raise ValueError(
                f"make_inputs: seqlens need B = 1 and T = sum(seqlens) = {sum(seqlens)}, got B = {B}, T = {T}"
            )
        S = len(seqlens)
        cu_seqlens = torch.tensor([0, *torch.tensor(list(seqlens)).cumsum(0).tolist()], dtype=torch.int32).to(device)
    f = torch.exp(
        -torch.rand(B, T, Nf, generator=g, dtype=torch.float64) * torch.logspace(-3, 0.5, Nf, dtype=torch.float64)
    )
    fields = dict(
        q=randn(B, T, Nq, K).mul_(K**-0.5).to(dtype),
        k=randn(B, T, Nk, K).to(dtype),
        v=randn(B, T, Nv, V).to(dtype),
        f=f.to(acc),
        W=(torch.eye(V, dtype=torch.float64) + randn(Nw, V, V) * (0.3 * V**-0.5)).to(dtype),
        initial_state=randn(S, N, K, V).mul_(0.5).to(acc) if initial_state else None,
        dy=randn(B, T, N, V).to(dtype),
        dfinal_state=randn(S, N, K, V).to(acc) if dfinal_state else None,
    )
    moved = {name: None if x is None else x.to(device) for name, x in fields.items()}
    return ScanInputs(cu_seqlens=cu_seqlens, state_grad_clip=state_grad_clip, **moved)  # type: ignore[arg-type]
