# SPDX-License-Identifier: Apache-2.0
"""A fused scan's arguments, and the same thing composed of `m2rnn` and plain torch, as a user would write it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m2rnn_compile import m2rnn
from m2rnn_compile.ops.reference import expand_heads
from m2rnn_compile.testing import make_inputs

# Each a set of options of `make_fused`; names say what is special.
CASES: dict[str, dict[str, Any]] = {
    "layer": dict(forget="decay", D=True, g=True, norm="all"),
    "shared heads": dict(forget="decay", D=True, g=True, norm="all", Ng=2, Nv=2, Nq=4, Nf=2),
    "sigmoid forget": dict(forget="sigmoid", D=True, g=True),
    "no D": dict(g=True, norm="head"),
    "D only": dict(D=True),
    "sigmoid gate": dict(D=True, g=True, activation="sigmoid"),
    "gelu": dict(g=True, activation="gelu", norm="all", weight=False),
    "gelu tanh": dict(g=True, activation="gelu_tanh"),
    "norm only": dict(norm="head"),
    "nothing": dict(),
    "packed": dict(forget="decay", D=True, g=True, norm="all", seqlens=[40, 0, 56], B=1, T=96),
}


@dataclasses.dataclass(frozen=True)
class Fused:
    """Tensors by argument name, the other arguments, and the gradients to send back."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    do: Tensor
    dfinal_state: Tensor

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Fused:
        def move(x: Tensor) -> Tensor:
            return x.to(device=device, dtype=dtype if x.is_floating_point() else None)

        options = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in self.options.items()}
        tensors = {n: move(x) for n, x in self.tensors.items()}
        return Fused(tensors, options, move(self.do), move(self.dfinal_state))


def make_fused(
    B: int = 2,
    T: int = 12,
    N: int = 4,
    K: int = 5,
    V: int = 3,
    *,
    Ng: int | None = None,
    D: bool = False,
    g: bool = False,
    forget: str = "none",
    activation: str = "silu",
    norm: str = "none",
    weight: bool = True,
    clip: float | None = 1.0,
    dtype: torch.dtype = torch.float32,
    **heads: Any,
) -> Fused:
    x = make_inputs(B, T, N, K, V, dtype=dtype, initial_state=True, **heads)
    made = torch.Generator().manual_seed(1)
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    tensors = dict(x.named_inputs())
    if forget != "none":
        tensors["f"] = randn(*x.f.shape).to(dtype)
    if forget == "decay":
        Nf = x.f.shape[2]
        tensors |= {"A_log": randn(Nf).to(acc), "dt_bias": (randn(Nf) - 2).to(acc)}
    if D:
        tensors["D"] = (1 + 0.3 * randn(N, V)).to(dtype)
    if g:
        tensors["g"] = randn(B, T, Ng or N, V).to(dtype)
    if norm != "none" and weight:
        tensors["norm_weight"] = (1 + 0.3 * randn(N, V)).to(dtype)
    options = dict(
        cu_seqlens=x.cu_seqlens, state_grad_clip=clip, forget=forget, activation=activation, norm=norm, norm_eps=1e-3
    )
    assert x.dfinal_state is not None
    return Fused(tensors, options, randn(B, T, N, V).to(dtype), x.dfinal_state)


def compose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    W: Tensor,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    D: Tensor | None = None,
    g: Tensor | None = None,
    norm_weight: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state_grad_clip: float | None = None,
    forget: str = "none",
    activation: str = "silu",
    norm: str = "none",
    norm_eps: float = 1e-5,
    impl: str = "auto",
    scan: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """`m2rnn_fused` without it. Each step rounds to its operands' dtype, as plain torch does."""
    scan = scan or functools.partial(m2rnn, impl=impl)
    acc = torch.promote_types(f.dtype, torch.float32)
    if forget == "sigmoid":
        f = torch.sigmoid(f.to(acc))
    elif forget == "decay":
        assert A_log is not None
        assert dt_bias is not None
        f = torch.exp(-torch.exp(A_log) * F.softplus(f.to(acc) + dt_bias))
    y, state = scan(q, k, v, f, W, initial_state=initial_state, cu_seqlens=cu_seqlens, state_grad_clip=state_grad_clip)
    o, N = y, y.shape[2]
    if D is not None:
        o = o + D * expand_heads(v, N, 2)
    if g is not None:
        gate = {
            "silu": F.silu,
            "sigmoid": torch.sigmoid,
            "gelu": F.gelu,
            "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        }[activation]
        o = o * gate(expand_heads(g, N, 2))
    if norm != "none":
        axes = (-2, -1) if norm == "all" else (-1,)
        wide = o.to(acc)
        o = wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + norm_eps)
        if norm_weight is not None:
            o = o * norm_weight.to(acc)
        o = o.to(v.dtype)
    return o, state


def run(x: Fused, fn: Any, **more: Any) -> dict[str, Tensor]:
    """Values and gradients of `fn`, named for `assert_accurate`."""
    leaves = {n: t.detach().requires_grad_() for n, t in x.tensors.items()}
    o, state = fn(**leaves, **x.options, **more)
    grads = torch.autograd.grad([o, state], list(leaves.values()), [x.do.to(o.dtype), x.dfinal_state.to(state.dtype)])
    result = {"y": o.detach(), "final_state": state.detach()}
    return result | {f"d{n}": d for n, d in zip(leaves, grads, strict=True)}
