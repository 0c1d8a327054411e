# SPDX-License-Identifier: Apache-2.0
"""What the layers' own ops share: gradients taken inside an op, and packed sequences as a padded batch.

A loop over time (or over chunks of it) written in torch is traced by `torch.compile` step by step, so its graph grows
with T and is compiled anew for every T. Such loops are therefore wrapped in an op each, whose backward runs the same
loop again under autograd. That costs a second forward and saves every intermediate of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..ops.library import differentiated_by_functorch, functorch_active


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast would reach into an op and take its fp32 products in bf16."""
    return torch.autocast(x.device.type, enabled=False)


def gradients(
    fn: Callable[..., Sequence[Tensor]], inputs: Sequence[Any], grad_outputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of ``fn(*inputs)`` with respect to its floating-point tensors (None for the others).

    For use inside of an op, where autograd is switched off.
    """
    on = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with torch.enable_grad(), on:
        leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
        wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        pairs = [(o, g) for o, g in zip(fn(*leaves), grad_outputs, strict=True) if o.requires_grad]
        outputs, grads = [o for o, _ in pairs], [g for _, g in pairs]
        found = iter(torch.autograd.grad(outputs, wanted, grads, materialize_grads=True, allow_unused=True))
    given = {g.untyped_storage()._cdata for g in grad_outputs}

    def own(grad: Tensor) -> Tensor:
        # Without a step the gradient of a state is that of the result, the very tensor, which an op must not return.
        return grad.clone() if grad.untyped_storage()._cdata in given else grad.contiguous()

    return [own(next(found)) if isinstance(x, Tensor) and x.requires_grad else None for x in leaves]


def refuse_transforms(owner: str, *tensors: Tensor | None) -> None:
    """Refuse what a custom op cannot do: forward mode would give zero tangents without a word.

    Raises:
        NotImplementedError: forward-mode differentiation, torch.func.grad and its kin.
    """
    # While tracing, a tensor cannot be asked whether it has a tangent.
    compiling, present = torch.compiler.is_compiling(), [x for x in tensors if x is not None]
    if forward_ad._current_level >= 0 and (
        compiling or any(forward_ad.unpack_dual(x).tangent is not None for x in present)
    ):
        raise NotImplementedError(f"{owner}: forward-mode differentiation is not supported; use torch.autograd.grad")
    if not compiling and functorch_active() and any(map(differentiated_by_functorch, present)):
        raise NotImplementedError(
            f"{owner}: torch.func.grad, vjp and jacrev are not supported; use torch.autograd.grad, which goes through "
            "torch.vmap too"
        )


def differentiate_once(owner: str, backward_op: Any) -> None:
    """Let the gradient's own backward say that there is none."""

    def refuse(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        raise NotImplementedError(f"{owner} cannot be differentiated twice: its backward has no derivative")

    backward_op.register_autograd(refuse)


class Packing:
    """Packed sequences ``[1, T, ...]`` as a batch ``[S, longest, ...]`` filled up with zeros on the right, and back.

    The length of the batch depends on the values of `cu_seqlens`, so this is for use inside of an op.
    """

    def __init__(self, cu_seqlens: Tensor, T: int) -> None:
        lengths = cu_seqlens.diff().to(torch.int64)
        self.sequences, self.longest = lengths.shape[0], int(lengths.max())
        self.row = torch.repeat_interleave(torch.arange(self.sequences, device=cu_seqlens.device), lengths)
        self.step = torch.arange(T, device=cu_seqlens.device) - cu_seqlens.to(torch.int64)[self.row]

    def pad(self, x_1T: Tensor) -> Tensor:
        x = x_1T.new_zeros(self.sequences, self.longest, *x_1T.shape[2:])
        return x.index_put((self.row, self.step), x_1T[0])

    def pack(self, x_ST: Tensor) -> Tensor:
        return x_ST[self.row, self.step][None]
