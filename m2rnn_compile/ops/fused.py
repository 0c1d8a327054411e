# SPDX-License-Identifier: Apache-2.0
"""`m2rnn::fused_scan`: the scan with what stands around it, and `m2rnn::fused_tail_backward`.

    prologue   f = decay(x_f, A_log, dt_bias) | sigmoid(x_f) | x_f as it is
    scan       y, final state
    tail       o = RMSNorm((y + D ⊙ v) · activation(g)), each part optional

Everything between the scan's inputs and o is taken in the state's dtype and rounded once. `prologue` and `tail` below
are those equations in torch; a lowering that has a kernel for the tail computes it where the partial sums of y are
added, so that y is not read again. Backward is a composition on purpose: what a kernel gains from (the tail, the scan)
are ops, and the rest is plain torch that a compiler fuses with the neighbours (dv + D ⊙ dy with the backward of the
conv).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import conv as conv  # the op m2rnn::conv_silu, of the same rewrite
from . import registry
from .library import LIB, dtype_named, functorch_active, name_of, register_autocast
from .reference import expand_heads, sum_shared_heads
from .scan import DEFAULT_CHUNK
from .validation import check_fused, check_tail_backward, num_checkpoints, state_dtype

LIB.define(
    "fused_scan(Tensor q, Tensor k, Tensor v, Tensor f, Tensor W, Tensor? A_log, Tensor? dt_bias, Tensor? D, "
    "Tensor? g, Tensor? norm_weight, Tensor? initial_state, Tensor? cu_seqlens, float? state_grad_clip, str forget, "
    "str activation, str norm, float norm_eps, str out_dtype, int chunk, str impl) "
    "-> (Tensor o, Tensor final_state, Tensor y, Tensor rstd, Tensor checkpoints)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIB.define(
    "fused_tail_backward(Tensor do, Tensor y, Tensor v, Tensor? D, Tensor? g, Tensor? norm_weight, Tensor rstd, "
    "str activation, str norm, str impl) -> (Tensor dy, Tensor dg, Tensor dD, Tensor dnorm_weight)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIB.define(
    "fused_scan_packed(Tensor qkv, int[] sizes, Tensor f, Tensor W, Tensor? A_log, Tensor? dt_bias, Tensor? D, "
    "Tensor? g, Tensor? norm_weight, Tensor? initial_state, Tensor? cu_seqlens, float? state_grad_clip, str forget, "
    "str activation, str norm, float norm_eps, str out_dtype, int chunk, str impl) "
    "-> (Tensor o, Tensor final_state, Tensor y, Tensor rstd, Tensor checkpoints)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_fused_scan = torch.ops.m2rnn.fused_scan.default
_tail_backward = torch.ops.m2rnn.fused_tail_backward.default


# ---- the equations --------------------------------------------------------------------------------------------------


def prologue(f: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, forget: str, acc: torch.dtype) -> Tensor:
    """The forget factor in `acc`; "none" leaves f as it came."""
    if forget == "none":
        return f
    if forget == "sigmoid":
        return torch.sigmoid(f.to(acc))
    assert A_log is not None  # for the type checker; check_fused has looked
    assert dt_bias is not None
    return torch.exp(-torch.exp(A_log.to(acc)) * F.softplus(f.to(acc) + dt_bias.to(acc)))


def prologue_backward(
    df: Tensor, f: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, forget: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(gradient of the op's f, of A_log, of dt_bias) from the gradient of the forget factor, which has the same dtype.

    With f = exp(-a s), a = exp(A_log), s = softplus(z), z = x + dt_bias:
    dz = -df f a sigmoid(z),  dA_log = Σ -df f a s.
    """
    if forget == "none":
        return df, None, None
    acc = df.dtype
    if forget == "sigmoid":
        s = torch.sigmoid(f.to(acc))
        return (df * s * (1 - s)).to(f.dtype), None, None
    assert A_log is not None
    assert dt_bias is not None
    a = torch.exp(A_log.to(acc))
    z = f.to(acc) + dt_bias.to(acc)
    s = F.softplus(z)
    common = -df * torch.exp(-a * s) * a
    dz = common * torch.sigmoid(z)
    return dz.to(f.dtype), (common * s).sum((0, 1)).to(A_log.dtype), dz.sum((0, 1)).to(dt_bias.dtype)


def activate(g: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(g)
    if activation == "sigmoid":
        return torch.sigmoid(g)
    return F.gelu(g, approximate="tanh" if activation == "gelu_tanh" else "none")


def activation_slope(g: Tensor, activation: str) -> Tensor:
    """The derivative of `activate`."""
    if activation == "silu":
        s = torch.sigmoid(g)
        return s * (1 + g * (1 - s))
    if activation == "sigmoid":
        s = torch.sigmoid(g)
        return s * (1 - s)
    if activation == "gelu":
        return 0.5 * (1 + torch.erf(g * 0.5**0.5)) + g * torch.exp(-0.5 * g * g) * (0.5 / torch.pi) ** 0.5
    c, d = (2 / torch.pi) ** 0.5, 0.044715
    t = torch.tanh(c * (g + d * g**3))
    return 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * c * (1 + 3 * d * g * g)


def _norm_axes(norm: str) -> tuple[int, ...]:
    return (-2, -1) if norm == "all" else (-1,)


def tail(
    y: Tensor,
    v: Tensor,
    D: Tensor | None,
    g: Tensor | None,
    norm_weight: Tensor | None,
    activation: str,
    norm: str,
    norm_eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(o [B, T, N, V], rstd [B, T, 1 or N; 0 without a norm]) from y [B, T, N, V]."""
    acc, N = state_dtype(v), y.shape[2]
    o = y.to(acc)
    if D is not None:
        o = o + D.to(acc) * expand_heads(v, N, 2).to(acc)
    if g is not None:
        o = o * activate(expand_heads(g, N, 2).to(acc), activation)
    rstd = o.new_empty(*o.shape[:2], 0)
    if norm != "none":
        inverse = torch.rsqrt(o.square().mean(_norm_axes(norm), keepdim=True) + norm_eps)
        o = o * inverse
        rstd = inverse.squeeze(-1)
    if norm_weight is not None:
        o = o * norm_weight.to(acc)
    return o.to(out_dtype).contiguous(), rstd.contiguous()


def tail_backward(
    do: Tensor,
    y: Tensor,
    v: Tensor,
    D: Tensor | None,
    g: Tensor | None,
    norm_weight: Tensor | None,
    rstd: Tensor,
    activation: str,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of y (in v's dtype), g (for all N heads, in g's dtype), D and the norm's weight (in theirs).

    u = y + D v,  h = u a(g),  o = h rstd w:
    dh = rstd (w do - h rstd² mean(h w do)),  du = dh a,  dg = dh u a',  dD = Σ du v,  dw = Σ do h rstd.
    """
    acc, N = state_dtype(v), y.shape[2]
    u, v_, dh = y.to(acc), expand_heads(v, N, 2).to(acc), do.to(acc)
    if D is not None:
        u = u + D.to(acc) * v_
    g_ = None if g is None else expand_heads(g, N, 2).to(acc)
    a = None if g_ is None else activate(g_, activation)
    h = u if a is None else u * a
    dw = y.new_empty(0)
    if norm != "none":
        inverse = rstd.unsqueeze(-1)
        if norm_weight is not None:
            dw = (dh * h * inverse).sum((0, 1)).to(norm_weight.dtype)
            dh = dh * norm_weight.to(acc)
        dh = inverse * (dh - h * inverse.square() * (dh * h).mean(_norm_axes(norm), keepdim=True))
    du = dh if a is None else dh * a
    dg = y.new_empty(0) if g is None or g_ is None else (dh * u * activation_slope(g_, activation)).to(g.dtype)
    dD = y.new_empty(0) if D is None else (du * v_).sum((0, 1)).to(D.dtype)
    return du.to(v.dtype).contiguous(), dg.contiguous(), dD, dw


# ---- kernels --------------------------------------------------------------------------------------------------------


def keeps_y(D: Tensor | None, g: Tensor | None, norm: str, chunk: int) -> bool:
    """Backward reads y where it differs from o; without a backward, or without a tail, the op's `y` is empty."""
    return chunk > 0 and (D is not None or g is not None or norm != "none")


def _tail_kernels(lowering: ModuleType) -> ModuleType | None:
    """A lowering with kernels for the tail says where they are; the others run the equations above in torch."""
    return registry.load_fused(lowering)


@torch.library.impl(LIB, "fused_scan", "CompositeExplicitAutograd")
def run(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op's kernel."""
    (q, k, v, f, W, A_log, dt_bias, D, g, norm_weight, initial_state, cu_seqlens, clip,
     forget, activation, norm, norm_eps, named, chunk, impl) = args  # fmt: skip
    out_dtype = dtype_named(named)
    check_fused(*args[:17])
    if chunk < 0:
        raise ValueError(f"m2rnn: `chunk` must be >= 0 (0: inference, no checkpoints), got {chunk}")
    lowering = registry.lowering_for(impl, q.device, (q, k, v, f, W, initial_state, cu_seqlens))
    fused = _tail_kernels(lowering)
    if fused is None:
        f_ = prologue(f, A_log, dt_bias, forget, state_dtype(v))
    else:
        f_ = fused.forget_gate(f, A_log, dt_bias, forget)
    scan_arguments = (q, k, v, f_, W, initial_state, cu_seqlens, clip, chunk)
    if fused is not None:
        result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = fused.fused_scan(
            *scan_arguments, D, g, norm_weight, activation, norm, norm_eps, out_dtype
        )
        return result
    y, final_state, checkpoints = lowering.scan(*scan_arguments)
    o, rstd = tail(y, v, D, g, norm_weight, activation, norm, norm_eps, out_dtype)
    if chunk == 0:
        rstd = rstd.new_empty(0)
    if not keeps_y(D, g, norm, chunk):  # also: no output may alias another, and o may be y
        y = v.new_empty(0)
    return o, final_state, y, rstd, checkpoints


@torch.library.impl(LIB, "fused_tail_backward", "CompositeExplicitAutograd")
def _tail_backward_kernel(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *arguments, impl = args
    check_tail_backward(*arguments)
    y: Tensor = arguments[1]
    choice = registry.choose_for_device(impl, y.device)
    fused = _tail_kernels(registry.load(choice))
    result = tail_backward(*arguments) if fused is None else fused.fused_tail_backward(*arguments)
    return result


# ---- fakes ----------------------------------------------------------------------------------------------------------


@torch.library.register_fake("m2rnn::fused_scan", lib=LIB)
def _fused_scan_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    v, D, g, cu_seqlens, norm, out_dtype, chunk, impl = (args[i] for i in (2, 7, 8, 11, 15, 17, 18, 19))
    B, T, N, K, V, S = check_fused(*args[:17])
    registry.check_name(impl)
    acc = state_dtype(v)
    NC = num_checkpoints(B, T, S, chunk, cu_seqlens is not None)
    rstd = {"none": 0, "all": 1, "head": N}[norm]
    return (
        v.new_empty(B, T, N, V, dtype=dtype_named(out_dtype)),
        v.new_empty(S, N, K, V, dtype=acc),
        v.new_empty(B, T, N, V) if keeps_y(D, g, norm, chunk) else v.new_empty(0),
        v.new_empty(B, T, rstd, dtype=acc) if chunk else v.new_empty(0, dtype=acc),
        v.new_empty(B, NC, N, K, V, dtype=acc),
    )


@torch.library.register_fake("m2rnn::fused_tail_backward", lib=LIB)
def _tail_backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, y, v, D, g, norm_weight = args[:6]
    check_tail_backward(*args[:-1])
    return (
        v.new_empty(y.shape),
        y.new_empty(0) if g is None else g.new_empty(y.shape),
        y.new_empty(0) if D is None else D.new_empty(D.shape),
        y.new_empty(0) if norm_weight is None else norm_weight.new_empty(norm_weight.shape),
    )


# ---- autograd -------------------------------------------------------------------------------------------------------


def _remember(ctx: Any, rest: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Note the options in ctx and return what backward needs beside q, k and v; `rest` are the arguments behind v."""
    f, W, A_log, dt_bias, D, g, norm_weight, initial_state, cu_seqlens = rest[:9]
    ctx.clip, ctx.forget, ctx.activation, ctx.norm, _, _, ctx.chunk, ctx.impl = rest[9:]
    _, _, y, rstd, checkpoints = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(y, rstd, checkpoints)
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype
    return f, W, A_log, dt_bias, D, g, norm_weight, initial_state, cu_seqlens, y, rstd, checkpoints


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *rest = inputs
    ctx.save_for_backward(q, k, v, *_remember(ctx, tuple(rest), output))


def _fused_vjp(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None, *_: None) -> tuple[Any, ...]:
    return gradients(ctx, ctx.saved_tensors, do, dfinal_state)


def gradients(ctx: Any, saved: tuple[Any, ...], do: Tensor | None, dfinal_state: Tensor | None) -> tuple[Any, ...]:
    """Of everything in `saved` up to the initial state, and nine times None; `ctx` holds the options."""
    (q, k, v, f, W, A_log, dt_bias, D, g, norm_weight, initial_state, cu_seqlens, y, rstd, checkpoints) = saved
    if do is None and dfinal_state is None:
        return (None,) * 20
    N = checkpoints.shape[2]
    dy = dg = dD = dw = None
    if do is not None and not keeps_y(D, g, ctx.norm, ctx.chunk):
        dy = do.to(v.dtype)
    elif do is not None:
        dy, dg, dD, dw = _tail_backward(do, y, v, D, g, norm_weight, rstd, ctx.activation, ctx.norm, ctx.impl)
    acc = state_dtype(v)
    f_ = prologue(f, A_log, dt_bias, ctx.forget, acc)
    dq, dk, dv, df, dW, dh0 = torch.ops.m2rnn.scan_backward.default(
        dy, dfinal_state, q, k, v, f_, W, initial_state, cu_seqlens, checkpoints, ctx.clip, ctx.chunk, ctx.impl
    )
    if ctx.chunk == 0:  # the op above raises when it runs (see `_scan_vjp`): every gradient hangs on it
        dD, dg, dw = (None if x is None else dW.sum().to(x.dtype).expand(x.shape) for x in (D, g, norm_weight))
    if D is not None and dy is not None:
        dv = (dv.to(acc) + sum_shared_heads(D.to(acc) * dy.to(acc), v.shape[2], 2)).to(v.dtype)
    if g is not None and dg is not None:
        dg = sum_shared_heads(dg, g.shape[2], 2) if g.shape[2] == N else sum_shared_heads(dg.to(acc), g.shape[2], 2)
        dg = dg.to(g.dtype)
    df, dA_log, ddt_bias = prologue_backward(df, f, A_log, dt_bias, ctx.forget)
    dh0 = None if ctx.initial_dtype is None else dh0.to(ctx.initial_dtype)
    return (
        dq, dk, dv, df, dW, dA_log, ddt_bias,
        None if D is None else dD, None if g is None else dg, None if norm_weight is None else dw,
        dh0, *(None,) * 9,
    )  # fmt: skip


torch.library.register_autograd("m2rnn::fused_scan", _fused_vjp, setup_context=_save_for_backward, lib=LIB)


# ---- the same from q | k | v in one tensor --------------------------------------------------------------------------
#
# For the compiler's sake: with one tensor to produce, Inductor makes one kernel of conv + SiLU, bf16 in and out. With
# three views of it, it keeps the conv's sums in fp32 and runs SiLU three times (seen on torch 2.13: 578 MB instead of
# 193 MB at shape A).


def unpack(qkv: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k, v of qkv [B, T, Nq·K + Nk·K + Nv·V]; sizes = [Nq, Nk, Nv, K, V]."""
    Nq, Nk, Nv, K, V = sizes
    if qkv.dim() != 3 or qkv.shape[2] != (Nq + Nk) * K + Nv * V:
        raise ValueError(
            f"m2rnn: `qkv` must have shape [B, T, {(Nq + Nk) * K + Nv * V}] for Nq, Nk, Nv, K, V = {list(sizes)}, "
            f"got {tuple(qkv.shape)}"
        )
    q, k, v = qkv.split([Nq * K, Nk * K, Nv * V], -1)
    return q.unflatten(-1, (Nq, K)), k.unflatten(-1, (Nk, K)), v.unflatten(-1, (Nv, V))


def pack(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The reverse of `unpack`."""
    return torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], -1)


@torch.library.impl(LIB, "fused_scan_packed", "CompositeExplicitAutograd")
def _packed_kernel(qkv: Tensor, sizes: list[int], *rest: Any) -> tuple[Tensor, ...]:
    return run(*unpack(qkv, sizes), *rest)


@torch.library.register_fake("m2rnn::fused_scan_packed", lib=LIB)
def _packed_fake(qkv: Tensor, sizes: list[int], *rest: Any) -> tuple[Tensor, ...]:
    return _fused_scan_fake(*unpack(qkv, sizes), *rest)


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, ctx.sizes, *rest = inputs
    ctx.save_for_backward(qkv, *_remember(ctx, tuple(rest), output))


def _packed_vjp(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None, *_: None) -> tuple[Any, ...]:
    qkv, *rest = ctx.saved_tensors
    dq, dk, dv, *others = gradients(ctx, (*unpack(qkv, ctx.sizes), *rest), do, dfinal_state)
    return None if dq is None else pack(dq, dk, dv), None, *others


torch.library.register_autograd("m2rnn::fused_scan_packed", _packed_vjp, setup_context=_save_packed, lib=LIB)


def no_double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    raise NotImplementedError(
        "m2rnn: the fused scan cannot be differentiated twice (its backward has no derivative). "
        "Use m2rnn(..., impl='reference') with the gates written out in torch"
    )


torch.library.register_autograd("m2rnn::fused_tail_backward", no_double_backward, lib=LIB)

# As for the scan: f, the gate's and the norm's parameters and the state keep their dtype.
register_autocast("fused_scan", _fused_scan, low=(0, 1, 2, 4))
register_autocast("fused_scan_packed", torch.ops.m2rnn.fused_scan_packed.default, low=(0, 3))


def m2rnn_fused(
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
    out_dtype: torch.dtype | None = None,
    output_final_state: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`m2rnn` with its gates and norm as one op: what `torch.compile` makes of them where fusion is on.

    ::

        f'    = exp(-exp(A_log) · softplus(f + dt_bias))  (forget="decay"),  sigmoid(f) ("sigmoid"),  f ("none")
        y     = the recurrence of `m2rnn` with f'
        o     = (y + D ⊙ v) · activation(g)
        o     = o / rms(o) · norm_weight       rms over N·V (norm="all"), over V ("head"); "none": no norm

    All of it in fp32 (fp64 for fp64 inputs) and rounded once, to `out_dtype`.

    Args:
        q, k, v, W, initial_state, cu_seqlens, state_grad_clip, output_final_state, impl: as in `m2rnn`.
        f: ``[B, T, Nf]``, the forget factor or what it is made of, see `forget`.
        A_log, dt_bias: ``[Nf]``; given if and only if forget="decay".
        D: ``[N, V]``, optional.  g: ``[B, T, Ng, V]`` before the activation, optional; Ng divides N.
        norm_weight: ``[N, V]``, optional, with a norm only.
        activation: "silu", "sigmoid", "gelu" or "gelu_tanh".
        out_dtype: of o; v's dtype if None (under autocast: the autocast dtype).

    Returns:
        ``(o, final_state)``: o ``[B, T, N, V]``, the state as in `m2rnn`. Both are differentiable, once.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        NotImplementedError: torch.vmap and torch.func transforms, forward-mode differentiation, double backward.
    """
    arguments = (
        q, k, v, f, W, A_log, dt_bias, D, g, norm_weight, initial_state, cu_seqlens,
        state_grad_clip, forget, activation, norm, norm_eps,
    )  # fmt: skip
    check_fused(*arguments)
    registry.check_name(impl)
    if impl == "reference":
        raise ValueError("m2rnn: the fused scan has no impl='reference'; write the gates in torch around m2rnn")
    tensors = [x for x in arguments[:11] if isinstance(x, Tensor)]
    dual = forward_ad._current_level >= 0
    if dual and not torch.compiler.is_compiling():  # while tracing a tensor cannot be asked for its tangent
        dual = any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    if dual or functorch_active():
        raise NotImplementedError(
            "m2rnn: the fused scan does not run inside of torch.vmap, torch.func transforms or forward-mode "
            "differentiation; write the gates in torch around m2rnn, whose limits are fewer"
        )
    if out_dtype is None:
        autocast = torch.is_autocast_enabled(v.device.type) and v.dtype != torch.float64
        out_dtype = torch.get_autocast_dtype(v.device.type) if autocast else v.dtype
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    o, final_state, *_ = _fused_scan(*arguments, name_of(out_dtype), DEFAULT_CHUNK if wanted else 0, impl)
    return o, final_state if output_final_state else None
