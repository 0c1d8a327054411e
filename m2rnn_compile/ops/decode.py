# SPDX-License-Identifier: Apache-2.0
"""`m2rnn::decode_step`: all that a layer does for one token between its two projections, in place on pools of states.

The one op here that mutates its arguments: decoding is bound by reading and writing the states, and a functional step
would write them to new memory and copy them back into the pool. It has no backward, and its public function refuses
tensors that would need one.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference, registry
from .library import LIB, functorch_active
from .validation import DecodeShape, check_decode, check_slot_values

LIB.define(
    "decode_step(Tensor qkv, Tensor x_f, Tensor g, Tensor conv_weight, Tensor A_log, Tensor dt_bias, Tensor W, "
    "Tensor D, Tensor norm_weight, Tensor(a!) conv_state, Tensor(b!) state, Tensor? state_indices, int num_q_heads, "
    "int num_k_heads, float norm_eps, str impl) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_decode_step = torch.ops.m2rnn.decode_step.default
_POOLS = (9, 10)  # positions of conv_state and state


@torch.library.impl(LIB, "decode_step", "CompositeExplicitAutograd")
def _decode_kernel(*args: Any) -> Tensor:
    *arguments, impl = args
    shape = check_decode(*arguments[:14])
    if _choose(impl, arguments, shape) == "eager":
        return eager(*arguments)
    o: Tensor = _triton().decode_step(*arguments)
    return o


@torch.library.register_fake("m2rnn::decode_step", lib=LIB)
def _decode_fake(*args: Any) -> Tensor:
    *arguments, impl = args
    shape = check_decode(*arguments[:14])
    _check_name(impl)
    qkv: Tensor = arguments[0]
    return qkv.new_empty(shape.B, shape.N * shape.V)


def _mark_as_written(keys: torch._C.DispatchKeySet, *args: Any) -> Tensor:
    """A pool that a graph has saved for its backward must not be used there once it was written to."""
    for i in _POOLS:
        torch.autograd.graph.increment_version(args[i])
    with torch._C._AutoDispatchBelowADInplaceOrView():
        o: Tensor = _decode_step.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)
    return o


LIB.impl("decode_step", _mark_as_written, "ADInplaceOrView", with_keyset=True)


def _triton() -> Any:
    return importlib.import_module("m2rnn_compile.lowering.triton.decode")


def _check_name(impl: str) -> None:
    registry.check_name(impl)
    if impl in ("reference", "cpp"):
        raise ValueError(
            f"m2rnn: the fused decoding step has no impl={impl!r}; choose 'auto' (by device), 'triton' (CUDA) or "
            "'eager' (any device)"
        )


def _choose(impl: str, arguments: list[Any], shape: DecodeShape) -> str:
    """As `registry.choose`: "auto" goes by the device, and on CUDA nothing falls back in silence."""
    _check_name(impl)
    device = arguments[0].device
    if impl == "eager" or (impl == "auto" and device.type != "cuda"):
        return "eager"
    if device.type != "cuda":
        reason = f"impl='triton' runs on cuda tensors, these are on {device.type}"
    else:
        try:
            reason = _triton().unsupported(arguments[:12], shape)
        except ImportError as e:
            reason = f"impl='triton' cannot be imported: {e}"
    if reason is not None:
        raise ValueError(
            f"m2rnn: {reason}. Nothing falls back in silence: pass impl='eager' to run the slow path knowingly"
        )
    return "triton"


def eager(
    qkv: Tensor,
    x_f: Tensor,
    g: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    W: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    state_indices: Tensor | None,
    num_q_heads: int,
    num_k_heads: int,
    norm_eps: float,
) -> Tensor:
    """The step as it is specified, on the rows that have a slot. Reads the indices, so on a GPU it waits for them.

    Everything is taken in the state's dtype; o is rounded to qkv's dtype before the norm and after it.
    """
    (B, C), (_, N, K, V) = qkv.shape, state.shape
    acc = state.dtype
    if state_indices is None:
        row = slot = torch.arange(B, device=qkv.device)
    else:
        row = torch.nonzero(state_indices != -1).squeeze(1)
        slot = state_indices[row].long()
        check_slot_values(slot.tolist(), state.shape[0])

    window = torch.cat([conv_state[slot].to(acc), qkv[row].to(acc)[:, None]], 1)  # oldest first, this step last
    conv_state[slot] = window[:, 1:].to(conv_state.dtype)
    qkv_acc = F.silu((window * conv_weight[:, 0].to(acc).mT).sum(1))
    sizes = [num_q_heads * K, num_k_heads * K, C - (num_q_heads + num_k_heads) * K]
    q, k, v = (x.unflatten(1, (-1, d)) for x, d in zip(qkv_acc.split(sizes, 1), (K, K, V), strict=True))
    f = torch.exp(-torch.exp(A_log.to(acc)) * F.softplus(x_f[row].to(acc) + dt_bias.to(acc)))

    y, new_state = reference.step(q, k, v, f, W, state[slot])
    state[slot] = new_state

    gate = F.silu(g[row].to(acc).unflatten(1, (-1, V)))
    o = (y + D.to(acc) * reference.expand_heads(v, N, 1)) * reference.expand_heads(gate, N, 1)
    o = o.flatten(1).to(qkv.dtype).to(acc)
    o = o * torch.rsqrt(o.square().mean(1, keepdim=True) + norm_eps) * norm_weight.to(acc)
    out = qkv.new_zeros(B, N * V)
    out[row] = o.to(qkv.dtype)
    return out


def m2rnn_decode_step(
    qkv: Tensor,
    x_f: Tensor,
    g: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    W: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    *,
    state_indices: Tensor | None = None,
    num_q_heads: int = 1,
    num_k_heads: int = 1,
    norm_eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """One decoding step of an `M2RNN` layer between its two projections, in place on pools of states.

    For each row b of the batch and its slot ``s = state_indices[b]``, in the order of the layer::

        q | k | v        = SiLU(causal conv of conv_state[s] and qkv[b])
        conv_state[s]    = its rows but the oldest, then qkv[b]
        f                = exp(-exp(A_log) · softplus(x_f[b] + dt_bias))
        state[s]         = f state[s] + (1 - f) tanh(state[s] W + k vᵀ)
        o                = (state[s]ᵀ q + D ⊙ v) · SiLU(g[b])
        result[b]        = RMSNorm of o over all N·V features together

    On CUDA these are two launches, without an allocation but the result and without waiting for the device, so the step
    can be captured in a CUDA graph and replayed with other values in `state_indices`. Inference only.

    Args:
        qkv: ``[B, C]`` with C = Nq·K + Nk·K + Nv·V, channels in the order q | k | v, before the conv; float32, float64,
            bfloat16 or float16. Any strides (a view of the projection's result), as x_f and g.
        x_f: ``[B, Nf]``, the forget gate before its bias.  g: ``[B, Ng·V]``, the output gate before SiLU.
        conv_weight: ``[C, 1, width]``, the last tap being the current step.
        A_log, dt_bias: ``[Nf]``; fp32 advised.
        W: ``[Nw, V, V]``.  D: ``[N, V]``.  norm_weight: ``[N·V]``.
        conv_state: ``[slots, width - 1, C]``, the last conv inputs of each slot, oldest first. **Modified.**
        state: ``[slots, N, K, V]`` in fp32 (fp64 for fp64 qkv): H of each slot. **Modified.**
        state_indices: int32 or int64 ``[B]``: the slot of each row, at most once each. -1 skips a row: its result is
            zero and no slot changes. None: row b uses slot b, and slots = B. Other values outside of the pool, and
            repeated slots, raise where looking is free (`eager`). On a GPU a row outside of the pool gives NaN and
            changes no slot; a slot named twice holds one of the two results or a mixture.
        num_q_heads, num_k_heads: Nq and Nk. The other head counts follow from the shapes. Each divides N: head n of the
            result reads head ``n // (N / N_x)`` of input x.
        norm_eps: of the RMSNorm.
        impl: "auto" goes by the tensors' device: "triton" on CUDA, "eager" elsewhere. "cpp" and "reference" do not
            exist for this step.

    Returns:
        ``[B, N·V]`` in qkv's dtype, the input of the output projection.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, head counts, devices, slots or options that do not fit; `impl` not available; a gradient
            is asked for (call it under `torch.no_grad()` or `torch.inference_mode()`).
        NotImplementedError: under torch.vmap or torch.func transforms.
    """
    check_decode(
        qkv, x_f, g, conv_weight, A_log, dt_bias, W, D, norm_weight, conv_state, state, state_indices,
        num_q_heads, num_k_heads,
    )  # fmt: skip
    _check_name(impl)
    tensors = (qkv, x_f, g, conv_weight, A_log, dt_bias, W, D, norm_weight, conv_state, state)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            "m2rnn: the fused decoding step writes its states in place and has no backward, but a gradient is asked "
            "for; call it under torch.no_grad() or torch.inference_mode(), or use m2rnn_step, which is functional"
        )
    if not torch.compiler.is_compiling() and functorch_active():
        raise NotImplementedError(
            "m2rnn: the fused decoding step cannot run inside of torch.vmap or torch.func transforms; it takes a batch "
            "of rows as it is, and m2rnn_step can be mapped"
        )
    o: Tensor = _decode_step(*tensors, state_indices, num_q_heads, num_k_heads, norm_eps, impl)
    return o
