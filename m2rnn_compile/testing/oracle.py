# SPDX-License-Identifier: Apache-2.0
"""The fp64 oracle, and the low-precision eager run that every kernel is measured against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..ops import m2rnn
from ..ops.reference import _ClipGradient, expand_heads
from ..ops.validation import check_cu_seqlens_values
from .inputs import ScanInputs

ScanFunction = Callable[..., tuple[Tensor, Tensor | None]]


def run(inputs: ScanInputs, fn: ScanFunction | None = None, *, impl: str = "auto") -> dict[str, Tensor]:
    """Run a scan forward and backward: y, final_state and the gradient of every input (`dq`, `dk`, ...).

    `fn` takes the arguments of `m2rnn` (without impl); by default it is `m2rnn` with `impl`.
    """
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.named_inputs().items()}
    q, k, v, f, W = (leaves[n] for n in ("q", "k", "v", "f", "W"))
    options = dict(
        initial_state=leaves.get("initial_state"),
        cu_seqlens=inputs.cu_seqlens,
        state_grad_clip=inputs.state_grad_clip,
    )
    y, final_state = fn(q, k, v, f, W, **options) if fn is not None else m2rnn(q, k, v, f, W, impl=impl, **options)  # type: ignore[arg-type]
    assert final_state is not None
    outputs = {"y": (y, inputs.dy), "final_state": (final_state, inputs.dfinal_state)}
    used = [(o, g.to(o.dtype)) for o, g in outputs.values() if g is not None and o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in used], list(leaves.values()), [g for _, g in used], allow_unused=True)
    result = {name: o.detach() for name, (o, _) in outputs.items()}
    for (name, x), dx in zip(leaves.items(), grads, strict=True):
        result[f"d{name}"] = torch.zeros_like(x) if dx is None else dx.detach()
    return result


def oracle(inputs: ScanInputs, *, impl: str = "reference") -> dict[str, Tensor]:
    """The same in fp64. `impl="eager"` keeps memory small on long sequences (it is tested against autograd)."""
    return run(inputs.to(torch.float64), impl=impl)


def low_precision_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    W: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state_grad_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What a careful user writes in eager PyTorch: state in fp32, products of operands in q's dtype.

    It sets the yardstick for kernels: ours may err at most twice as much. Memory stays small by activation
    checkpointing every 64 steps.
    """
    B, T, K, V = q.shape[0], q.shape[1], q.shape[3], v.shape[3]
    N = max(q.shape[2], k.shape[2], v.shape[2], f.shape[2], W.shape[0])
    low, acc = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    W_ = expand_heads(W.to(low), N, 0)
    bounds = [0, T] if cu_seqlens is None else check_cu_seqlens_values(cu_seqlens, T)

    def steps(h: Tensor, q: Tensor, k: Tensor, v: Tensor, f: Tensor, W_: Tensor) -> tuple[Tensor, Tensor]:
        ys = []
        q_, k_, v_, f_ = (expand_heads(x, N, 2) for x in (q, k, v, f.to(acc)))
        for t in range(q.shape[1]):
            f_t = f_[:, t, :, None, None]
            u = h.to(low) @ W_ + k_[:, t, :, :, None] * v_[:, t, :, None, :]
            h = f_t * h + (1 - f_t) * torch.tanh(u.to(acc))
            ys.append((q_[:, t, :, None, :] @ h.to(low)).squeeze(-2))
            if state_grad_clip is not None:
                h = _ClipGradient.apply(h, state_grad_clip)
        return torch.stack(ys, 1), h

    ys, finals = [v.new_empty(B, 0, N, V)], []
    for s, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        rows = slice(None) if cu_seqlens is None else slice(s, s + 1)
        h = q.new_zeros(B, N, K, V, dtype=acc) if initial_state is None else initial_state[rows].to(acc).clone()
        for first in range(start, end, 64):
            part = slice(first, min(first + 64, end))
            y, h = checkpoint(steps, h, q[:, part], k[:, part], v[:, part], f[:, part], W_, use_reentrant=False)
            ys.append(y)
        finals.append(h)
    return torch.cat(ys, 1), torch.cat(finals)


def run_low_precision(inputs: ScanInputs) -> dict[str, Tensor]:
    """`run` with `low_precision_eager`."""
    return run(inputs, low_precision_eager)
