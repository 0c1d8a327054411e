# SPDX-License-Identifier: Apache-2.0
"""`m2rnn::fused_mixer`: all that stands between the layer's two projections, for training.

    x [B, T, P] holds q | k | v, x_f and g          the projection's result as it is, columns of no use allowed
    q | k | v = SiLU(causal convolution)            as `conv.py`, if `conv_weight` is given
    o, final state                                  as `fused.py`, prologue and tail included

Forward is the two ops in a row. What one op is for is the gradient of x: it is *one* tensor here, and each part's
gradient is written where it belongs in it. With an op for each part autograd puts the parts' gradients side by side
afterwards, that of q, k and v twice (before and after the convolution): two passes over tensors of N·V features.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import conv, fused, registry
from .library import LIB, dtype_named, register_autocast
from .validation import check_fused, num_checkpoints, state_dtype

LIB.define(
    "fused_mixer(Tensor x, Tensor? conv_weight, Tensor? position, int[] sizes, Tensor W, Tensor? A_log, "
    "Tensor? dt_bias, Tensor? D, Tensor? norm_weight, Tensor? initial_state, Tensor? cu_seqlens, "
    "float? state_grad_clip, str forget, str activation, str norm, float norm_eps, str out_dtype, int chunk, str impl) "
    "-> (Tensor o, Tensor final_state, Tensor qkv, Tensor y, Tensor rstd, Tensor checkpoints)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIB.define(
    "fused_mixer_backward(Tensor? do, Tensor? dfinal_state, Tensor x, Tensor? conv_weight, Tensor? position, "
    "int[] sizes, Tensor W, Tensor? A_log, Tensor? dt_bias, Tensor? D, Tensor? norm_weight, Tensor? initial_state, "
    "Tensor? cu_seqlens, Tensor qkv, Tensor y, Tensor rstd, Tensor checkpoints, float? state_grad_clip, str forget, "
    "str activation, str norm, int chunk, str impl) -> (Tensor dx, Tensor dconv_weight, Tensor dW, Tensor dA_log, "
    "Tensor ddt_bias, Tensor dD, Tensor dnorm_weight, Tensor dinitial_state)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_backward = torch.ops.m2rnn.fused_mixer_backward.default


class BackwardArguments(NamedTuple):
    """What `m2rnn::fused_mixer_backward` takes."""

    do: Tensor | None
    dfinal_state: Tensor | None
    x: Tensor
    conv_weight: Tensor | None
    position: Tensor | None
    sizes: list[int]
    W: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    D: Tensor | None
    norm_weight: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    qkv: Tensor
    y: Tensor
    rstd: Tensor
    checkpoints: Tensor
    state_grad_clip: float | None
    forget: str
    activation: str
    norm: str
    chunk: int
    impl: str

    def inputs(self) -> tuple[Tensor | None, ...]:
        """Those that the gradients behind dx are of, in the order of the op's results."""
        return self.conv_weight, self.W, self.A_log, self.dt_bias, self.D, self.norm_weight, self.initial_state

    def qkv_of_scan(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as the scan had them: behind the convolution, if there is one."""
        return fused.unpack(parts(self.x, self.sizes)[0] if self.conv_weight is None else self.qkv, self.sizes[:5])


def _columns(sizes: list[int]) -> list[tuple[int, int]]:
    """(first, width) of q | k | v, x_f and g in x."""
    Nq, Nk, Nv, K, V, Nf, Ng, *at = sizes
    return list(zip(at, [(Nq + Nk) * K + Nv * V, Nf, Ng * V], strict=True))


def unused(sizes: list[int], width: int) -> list[tuple[int, int]]:
    """(first, end) of what lies between the parts in x; where parts overlap, an end stands before its first."""
    spans = sorted((first, first + size) for first, size in _columns(sizes) if size)
    ends, starts = [0, *(end for _, end in spans)], [*(first for first, _ in spans), width]
    return [(a, b) for a, b in zip(ends, starts, strict=True) if a != b]


def parts(x: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Views (q | k | v [B, T, C], x_f [B, T, Nf], g [B, T, Ng, V] or None if Ng = 0) of x [B, T, P].

    sizes = [Nq, Nk, Nv, K, V, Nf, Ng, first column of q | k | v, of x_f, of g].

    Raises:
        ValueError: there are not ten sizes, or a part is not inside of x or overlaps another.
    """
    if x.dim() != 3 or len(sizes) != 10:
        raise ValueError(
            "m2rnn: `x` must have shape [B, T, P] and `sizes` must be [Nq, Nk, Nv, K, V, Nf, Ng] and the first columns "
            f"of q | k | v, f and g; got x {tuple(x.shape)}, sizes {list(sizes)}"
        )
    if any(first > end for first, end in unused(sizes, x.shape[2])):
        raise ValueError(
            f"m2rnn: `sizes` puts q | k | v, f and g at (first column, width) {_columns(sizes)} of `x`, which has "
            f"{x.shape[2]} columns; they must be inside of it and must not overlap"
        )
    qkv, f, g = (x.narrow(2, first, width) for first, width in _columns(sizes))
    return qkv, f, g.unflatten(-1, (sizes[6], sizes[4])) if sizes[6] else None


def _check(
    x: Tensor, conv_weight: Tensor | None, position: Tensor | None, sizes: list[int], chunk: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    if chunk < 1:
        raise ValueError(f"m2rnn: `chunk` must be >= 1, got {chunk}; for inference there is m2rnn::fused_scan_conv")
    raw, f, g = parts(x, sizes)
    if conv_weight is not None:
        conv.check_conv(raw, conv_weight, position)
    elif position is not None:
        raise ValueError("m2rnn: `position` goes with `conv_weight`, got conv_weight=None; leave out `position`")
    return raw, f, g


# ---- kernels --------------------------------------------------------------------------------------------------------


@torch.library.impl(LIB, "fused_mixer", "CompositeExplicitAutograd")
def _kernel(
    x: Tensor, conv_weight: Tensor | None, position: Tensor | None, sizes: list[int], W: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    A_log, dt_bias, D, norm_weight, initial_state, cu_seqlens, *options = rest
    raw, f, g = _check(x, conv_weight, position, sizes, options[-2])
    qkv = raw if conv_weight is None else conv.run(raw, conv_weight, position)
    o, final_state, *kept = fused.run(
        *fused.unpack(qkv, sizes[:5]), f, W, A_log, dt_bias, D, g, norm_weight, initial_state, cu_seqlens, *options
    )
    return o, final_state, x.new_empty(0) if conv_weight is None else qkv, *kept


@torch.library.impl(LIB, "fused_mixer_backward", "CompositeExplicitAutograd")
def _backward_kernel(*args: Any) -> tuple[Tensor, ...]:
    given = BackwardArguments(*args)
    _, f, _ = _check(given.x, given.conv_weight, given.position, given.sizes, given.chunk)
    tensors = (*given.qkv_of_scan(), f, given.W, given.initial_state, given.cu_seqlens)
    kernels = registry.load_mixer(registry.lowering_for(given.impl, given.x.device, tensors))
    dx, grads = (composed_backward if kernels is None else kernels.fused_mixer_backward)(given)
    return dx, *(
        # Empty where there is no input, zero where the output had no gradient.
        dx.new_empty(0) if of is None else of.new_zeros(of.shape) if d is None else d.to(of.dtype).contiguous()
        for d, of in zip(grads, given.inputs(), strict=True)
    )


def composed_backward(given: BackwardArguments) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """(dx, gradients of `given.inputs()`): the backward of `fused.py`, then that of the convolution.

    Their gradients are copied to where they belong.
    """
    raw, f, g = parts(given.x, given.sizes)
    dx = given.x.new_zeros(given.x.shape)
    into, into_f, into_g = parts(dx, given.sizes)
    h0 = given.initial_state
    options = SimpleNamespace(
        clip=given.state_grad_clip, forget=given.forget, activation=given.activation, norm=given.norm,
        chunk=given.chunk, impl=given.impl, initial_dtype=None if h0 is None else h0.dtype,
    )  # fmt: skip
    saved = (
        *given.qkv_of_scan(), f, given.W, given.A_log, given.dt_bias, given.D, g, given.norm_weight, h0,
        given.cu_seqlens, given.y, given.rstd, given.checkpoints,
    )  # fmt: skip
    dq, dk, dv, df, dW, dA_log, ddt_bias, dD, dg, dw, dh0, *_ = fused.gradients(
        options, saved, given.do, given.dfinal_state
    )
    dqkv = fused.pack(dq, dk, dv)
    dconv_weight = None
    if given.conv_weight is not None:
        dqkv, dconv_weight = conv.run_backward(dqkv, raw, given.conv_weight, given.position)
    into.copy_(dqkv)
    into_f.copy_(df)
    if into_g is not None and dg is not None:
        into_g.copy_(dg)
    return dx, (dconv_weight, dW, dA_log, ddt_bias, dD, dw, dh0)


# ---- fakes ----------------------------------------------------------------------------------------------------------


@torch.library.register_fake("m2rnn::fused_mixer", lib=LIB)
def _fake(
    x: Tensor, conv_weight: Tensor | None, position: Tensor | None, sizes: list[int], W: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    A_log, dt_bias, D, norm_weight, initial_state, cu_seqlens, *options = rest
    *_, norm, _, out_dtype, chunk, impl = options
    raw, f, g = _check(x, conv_weight, position, sizes, chunk)
    B, T, N, K, V, S = check_fused(
        *fused.unpack(raw, sizes[:5]), f, W, A_log, dt_bias, D, g, norm_weight, initial_state, cu_seqlens, *options[:5]
    )
    registry.check_name(impl)
    acc = state_dtype(x)
    NC = num_checkpoints(B, T, S, chunk, cu_seqlens is not None)
    return (
        x.new_empty(B, T, N, V, dtype=dtype_named(out_dtype)),
        x.new_empty(S, N, K, V, dtype=acc),
        x.new_empty(0) if conv_weight is None else x.new_empty(raw.shape),
        x.new_empty(B, T, N, V) if fused.keeps_y(D, g, norm, chunk) else x.new_empty(0),
        x.new_empty(B, T, {"none": 0, "all": 1, "head": N}[norm], dtype=acc),
        x.new_empty(B, NC, N, K, V, dtype=acc),
    )


@torch.library.register_fake("m2rnn::fused_mixer_backward", lib=LIB)
def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    given = BackwardArguments(*args)
    x = given.x
    _check(x, given.conv_weight, given.position, given.sizes, given.chunk)
    return x.new_empty(x.shape), *(x.new_empty(0) if of is None else of.new_empty(of.shape) for of in given.inputs())


# ---- autograd -------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, conv_weight, position, ctx.sizes, *tensors = inputs[:11]
    ctx.clip, ctx.forget, ctx.activation, ctx.norm, _, _, ctx.chunk, ctx.impl = inputs[11:]
    kept = output[2:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(x, conv_weight, position, *tensors, *kept)


def _vjp(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None, *_: None) -> tuple[Any, ...]:
    if do is None and dfinal_state is None:
        return (None,) * 19
    x, conv_weight, position, *saved = ctx.saved_tensors
    dx, *grads = _backward(
        do, dfinal_state, x, conv_weight, position, ctx.sizes, *saved, ctx.clip, ctx.forget, ctx.activation, ctx.norm,
        ctx.chunk, ctx.impl,
    )  # fmt: skip
    dconv, *others = (None if of is None else d for d, of in zip(grads, (conv_weight, *saved[:6]), strict=True))
    return dx, dconv, None, None, *others, *(None,) * 9


torch.library.register_autograd("m2rnn::fused_mixer", _vjp, setup_context=_save, lib=LIB)
torch.library.register_autograd("m2rnn::fused_mixer_backward", fused.no_double_backward, lib=LIB)

# As for the scan: the gate's and the norm's parameters and the state keep their dtype.
register_autocast("fused_mixer", torch.ops.m2rnn.fused_mixer.default, low=(0, 4))
