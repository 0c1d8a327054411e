# SPDX-License-Identifier: Apache-2.0
"""Memory of a call without running it: on the meta device tensors have sizes only, and a ledger adds them up."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")


class Ledger(TorchDispatchMode):
    """Counts the bytes of storages that operations make, from when they are made to when nothing holds them.

    Attributes:
        now: bytes that are held.
        peak: the most there were.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {x.untyped_storage()._cdata: 0 for x in given}  # counted by whoever made them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class _Kernel(torch.autograd.Function):
    """A kernel that keeps its inputs and its result for backward, and there holds `scratch` elements besides."""

    @staticmethod
    def forward(ctx: Any, size: Sequence[int], scratch: int, *tensors: Tensor) -> Tensor:
        y = tensors[0].new_empty(tuple(size))
        ctx.save_for_backward(*tensors, y)
        ctx.scratch = scratch
        return y

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, y = ctx.saved_tensors
        scratch = y.new_empty(ctx.scratch)
        gradients = [torch.empty_like(x) for x in tensors]
        del scratch
        return None, None, *gradients


def kernel(size: Sequence[int], tensors: Sequence[Tensor], scratch: int = 0) -> Tensor:
    """The result of a kernel on the meta device; `scratch`: elements that its backward holds beyond gradients."""
    result: Tensor = _Kernel.apply(size, scratch, *tensors)
    return result


class FlashAttention(TorchFunctionMode):
    """Attention that keeps no scores, as the kernels of CPUs and GPUs; on the meta device torch would keep them all."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            return kernel((*q.shape[:-1], v.shape[-1]), (q, k, v))
        return func(*args, **(kwargs or {}))
