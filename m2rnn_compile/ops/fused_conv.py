# SPDX-License-Identifier: Apache-2.0
"""`m2rnn::fused_scan_conv`: the fused scan from q | k | v as they leave the projection, for inference.

    q | k | v = SiLU(causal convolution)        as `conv.py`, if `conv_weight` is given
    o, final state                              as `fused.py`, prologue and tail included

The two ops in a row are the equations, and what runs where no kernel takes both. Where one does, the convolution of v
happens where the scan loads it, and neither v nor y is ever in memory. No backward: the rewrite of a compiled graph
uses this op only where none follows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import fused, registry
from .conv import check_conv
from .library import LIB, dtype_named, register_autocast
from .validation import check_fused, state_dtype

LIB.define(
    "fused_scan_conv(Tensor qkv, Tensor? conv_weight, Tensor? position, int[] sizes, Tensor f, Tensor W, "
    "Tensor? A_log, Tensor? dt_bias, Tensor? D, Tensor? g, Tensor? norm_weight, Tensor? initial_state, "
    "Tensor? cu_seqlens, float? state_grad_clip, str forget, str activation, str norm, float norm_eps, "
    "str out_dtype, str impl) -> (Tensor o, Tensor final_state)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_conv_silu = torch.ops.m2rnn.conv_silu.default
_packed = torch.ops.m2rnn.fused_scan_packed.default


def _check(qkv: Tensor, conv_weight: Tensor | None, position: Tensor | None) -> None:
    if conv_weight is not None:
        check_conv(qkv, conv_weight, position)
    elif position is not None:
        raise ValueError("m2rnn: `position` goes with `conv_weight`, got conv_weight=None; leave out `position`")


@torch.library.impl(LIB, "fused_scan_conv", "CompositeExplicitAutograd")
def _kernel(
    qkv: Tensor, conv_weight: Tensor | None, position: Tensor | None, sizes: list[int], *rest: Any
) -> tuple[Tensor, Tensor]:
    *arguments, out_dtype, impl = rest
    _check(qkv, conv_weight, position)
    q, k, v = fused.unpack(qkv, sizes)
    check_fused(q, k, v, *arguments)
    f, W, A_log, dt_bias, D, g, norm_weight, initial_state, cu_seqlens, _, *options = arguments
    lowering = registry.lowering_for(impl, qkv.device, (q, k, v, f, W, initial_state, cu_seqlens))
    kernels = registry.load_fused(lowering)
    if kernels is not None:
        done: tuple[Tensor, Tensor] | None = kernels.fused_scan_conv(
            qkv, conv_weight, position, sizes, f, W, A_log, dt_bias, D, g, norm_weight, initial_state, cu_seqlens,
            *options, dtype_named(out_dtype),
        )  # fmt: skip
        if done is not None:
            return done
    if conv_weight is not None:
        qkv = _conv_silu(qkv, conv_weight, position)
    o, final_state, *_ = _packed(qkv, sizes, *arguments, out_dtype, 0, impl)
    return o, final_state


@torch.library.register_fake("m2rnn::fused_scan_conv", lib=LIB)
def _fake(
    qkv: Tensor, conv_weight: Tensor | None, position: Tensor | None, sizes: list[int], *rest: Any
) -> tuple[Tensor, Tensor]:
    *arguments, out_dtype, impl = rest
    _check(qkv, conv_weight, position)
    B, T, N, K, V, S = check_fused(*fused.unpack(qkv, sizes), *arguments)
    registry.check_name(impl)
    return (
        qkv.new_empty(B, T, N, V, dtype=dtype_named(out_dtype)),
        qkv.new_empty(S, N, K, V, dtype=state_dtype(qkv)),
    )


def _no_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    raise RuntimeError(
        "m2rnn: m2rnn::fused_scan_conv is for inference and has no backward; "
        "call m2rnn::conv_silu and m2rnn_fused, which have"
    )


torch.library.register_autograd("m2rnn::fused_scan_conv", _no_backward, lib=LIB)
register_autocast("fused_scan_conv", torch.ops.m2rnn.fused_scan_conv.default, low=(0, 5))
