# SPDX-License-Identifier: Apache-2.0
"""The `torch.library` namespace `m2rnn` and the rules that all of its ops share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIB = torch.library.Library("m2rnn", "DEF")


def name_of(dtype: torch.dtype) -> str:
    """As ops take it: "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


# A dtype goes through a schema by name: torch 2.11's AOTInductor packages hand a ScalarType over as torch.export's
# number, which the process that loads them takes for another dtype (float32 for float64).
DTYPES = {name_of(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def dtype_named(name: str) -> torch.dtype:
    """torch.float32 of "float32".

    Raises:
        ValueError: it names no floating-point dtype that the ops know.
    """
    if name not in DTYPES:
        raise ValueError(f"m2rnn: `out_dtype` must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def register_autocast(op_name: str, op: Callable[..., Any], low: tuple[int, ...]) -> None:
    """Under `torch.autocast`, cast the positional arguments `low` to the autocast dtype.

    `torch.library.register_autocast` would cast every float tensor; here the forget factor and the state must stay in
    fp32 (f rounded to bf16 freezes the state for f > 0.998), so only q, k, v and W are cast. fp64 is left alone, as
    torch's own rules do.
    """

    def rule(device_type: str) -> Callable[..., Any]:
        key = getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}")
        keys = torch._C.DispatchKeySet(key)

        def run(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device_type)

            def cast(i: int, x: Any) -> Any:
                eligible = i in low and isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
                return x.to(dtype) if eligible else x

            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(*(cast(i, x) for i, x in enumerate(args)))

        return run

    LIB.impl(op_name, rule("cpu"), "AutocastCPU")
    LIB.impl(op_name, rule("cuda"), "AutocastCUDA")


def functorch_active() -> bool:
    """Inside of torch.vmap, torch.func.grad or their kin.

    Asked so that Dynamo knows the answer: of the stack of transforms it only traces that there is one, which is always.
    """
    return bool(torch._C._are_functorch_transforms_active())


def differentiated_by_functorch(x: Tensor) -> bool:
    """Whether a torch.func.grad (vjp, jacrev ...) around us tracks `x`, also below layers of vmap."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_gradtrackingtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def fold_vmap_into_heads(size: int, x: Tensor | None, bdim: int | None, head_axis: int) -> Tensor | None:
    """Turn a vmapped dimension into the outermost part of the head dimension.

    With X samples of N heads, head x·N + n of the folded op reads folded input head x·N_x + n // (N / N_x): sharing by
    divisibility carries over. An input that is not vmapped is repeated (expanded views where the layout allows it).
    """
    if x is None:
        return None
    x = x.unsqueeze(0).expand(size, *x.shape) if bdim is None else x.movedim(bdim, 0)
    return x.movedim(0, head_axis).flatten(head_axis, head_axis + 1)


def unfold_vmap_from_heads(size: int, x: Tensor, head_axis: int) -> Tensor:
    """The inverse for results: the vmapped dimension comes back at position 0."""
    return x.unflatten(head_axis, (size, x.shape[head_axis] // size)).movedim(head_axis, 0)
