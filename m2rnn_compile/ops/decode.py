# SPDX-License-Identifier: Apache-2.0
"""`m2rnn::decode_step`: one decoding step of a layer, between its two projections, in place on a pool of states."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .library import LIB
from .validation import INPUT_DTYPES, _has_shape, _is_tensor, state_dtype

IMPL_NAMES = ("auto", "eager", "triton")


class DecodeShape(NamedTuple):
    """Sizes of one step. `C` is the number of conv channels: those of q, then of k, then of v."""

    B: int
    N: int
    K: int
    V: int
    Nq: int
    Nk: int
    Nv: int
    C: int
    width: int
    slots: int


def check_decode(
    qkv: Tensor,
    x_f: Tensor,
    g: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    W: Tensor,
    D: Tensor,
    conv_state: Tensor,
    state: Tensor,
    state_indices: Tensor,
    arrivals: Tensor | None,
    num_q_heads: int,
    num_k_heads: int,
) -> DecodeShape:
    """Check everything that metadata can tell about one step and return its sizes."""
    floats = {
        "qkv": qkv, "x_f": x_f, "g": g, "conv_weight": conv_weight, "A_log": A_log, "dt_bias": dt_bias, "W": W, "D": D,
        "conv_state": conv_state, "state": state,
    }  # fmt: skip
    integers = {"state_indices": state_indices} | ({} if arrivals is None else {"arrivals": arrivals})
    for name, x in {**floats, **integers}.items():
        _is_tensor(name, x)
    _has_shape("state", state, ("slots", "N", "K", "V"), {})
    slots, N, K, V = state.shape
    if N == 0 or K == 0 or V == 0:
        raise ValueError(f"m2rnn: N, K and V must be at least 1, got `state` of shape {tuple(state.shape)}")
    for name, n in (("num_q_heads", num_q_heads), ("num_k_heads", num_k_heads)):
        _divides(name, n, N)
    _has_shape("qkv", qkv, ("B", "C"), {})
    B, C = qkv.shape
    v_channels = C - (num_q_heads + num_k_heads) * K
    if v_channels <= 0 or v_channels % V != 0:
        raise ValueError(
            f"m2rnn: `qkv` must have Nq·K + Nk·K + Nv·V channels with Nq = {num_q_heads}, Nk = {num_k_heads} and, from "
            f"`state`, K = {K}, V = {V}; got {C}, which leaves {v_channels} channels for v"
        )
    Nv = v_channels // V
    _divides("v heads (of `qkv`)", Nv, N)
    _has_shape("x_f", x_f, ("B", "Nf"), {"B": B})
    Nf = x_f.shape[1]
    _divides("f heads (of `x_f`)", Nf, N)
    _has_shape("A_log", A_log, ("Nf",), {"Nf": Nf})
    _has_shape("dt_bias", dt_bias, ("Nf",), {"Nf": Nf})
    _has_shape("g", g, ("B", "Ng·V"), {"B": B})
    if g.shape[1] % V != 0:
        raise ValueError(f"m2rnn: `g` must have shape [B, Ng·V] with V = {V}, got shape {tuple(g.shape)}")
    _divides("g heads (of `g`)", g.shape[1] // V, N)
    _has_shape("W", W, ("Nw", "V", "V"), {"V": V})
    _divides("W heads", W.shape[0], N)
    _has_shape("D", D, ("N", "V"), {"N": N, "V": V})
    _has_shape("conv_weight", conv_weight, ("C", "1", "width"), {"C": C, "1": 1})
    width = conv_weight.shape[2]
    if width == 0:
        raise ValueError("m2rnn: `conv_weight` must have at least one tap, got width = 0")
    _has_shape("conv_state", conv_state, ("slots", "width - 1", "C"), {"slots": slots, "width - 1": width - 1, "C": C})
    _has_shape("state_indices", state_indices, ("B",), {"B": B})
    if arrivals is not None:
        _has_shape("arrivals", arrivals, ("slots",), {"slots": slots})

    for name, x in floats.items():
        if x.dtype not in INPUT_DTYPES:
            raise TypeError(
                f"m2rnn: `{name}` must be float32, float64, bfloat16 or float16, got {x.dtype}; cast it with .to()"
            )
    if state.dtype != state_dtype(qkv):
        raise TypeError(
            f"m2rnn: `state` must be {state_dtype(qkv)} for `qkv` in {qkv.dtype}, got {state.dtype}; it is written in "
            "place, so allocate the pool in that dtype"
        )
    if state_indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"m2rnn: `state_indices` must be int32 or int64, got {state_indices.dtype}; cast it with .to()")
    if arrivals is not None and arrivals.dtype != torch.int32:
        raise TypeError(f"m2rnn: `arrivals` must be int32, got {arrivals.dtype}")
    for name, x in {**floats, **integers}.items():
        if x.layout != torch.strided:
            raise TypeError(f"m2rnn: `{name}` must be dense, got layout {x.layout}; convert it with .to_dense()")
        if x.device != qkv.device:
            raise ValueError(
                f"m2rnn: all tensors must be on one device, got `qkv` on {qkv.device} and `{name}` on {x.device}; "
                f"move it with .to({str(qkv.device)!r})"
            )
    pools = {"conv_state": conv_state, "state": state} | ({} if arrivals is None else {"arrivals": arrivals})
    for name, x in pools.items():
        if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
            raise ValueError(f"m2rnn: `{name}` is written in place and must not be an expanded tensor; .clone() it")
    return DecodeShape(B, N, K, V, num_q_heads, num_k_heads, Nv, C, width, slots)


def _divides(name: str, n: int, N: int) -> None:
    if n < 1 or N % n != 0:
        raise ValueError(
            f"m2rnn: the number of {name} must divide N = {N} (the heads of `state`), got {n}; heads are shared by "
            "divisibility: head n of the result reads head n // (N / N_x) of input x"
        )


LIB.define(
    "decode_step(Tensor qkv, Tensor x_f, Tensor g, Tensor conv_weight, Tensor A_log, Tensor dt_bias, Tensor W, "
    "Tensor D, Tensor(a!) conv_state, Tensor(b!) state, Tensor state_indices, Tensor(c!)? arrivals, int num_q_heads, "
    "int num_k_heads, str impl) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_decode_step = torch.ops.m2rnn.decode_step.default


@torch.library.impl(LIB, "decode_step", "CompositeExplicitAutograd")
def _decode_kernel(
    qkv: Tensor,
    x_f: Tensor,
    g: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    W: Tensor,
    D: Tensor,
    conv_state: Tensor,
    state: Tensor,
    state_indices: Tensor,
    arrivals: Tensor | None,
    num_q_heads: int,
    num_k_heads: int,
    impl: str,
) -> Tensor:
    args = (qkv, x_f, g, conv_weight, A_log, dt_bias, W, D, conv_state, state, state_indices)
    shape = check_decode(*args, arrivals, num_q_heads, num_k_heads)
    if _choose(impl, qkv, shape) == "eager":
        return eager(*args, shape)
    kernel = importlib.import_module("m2rnn_compile.lowering.triton.decode")
    o: Tensor = kernel.decode_step(*args, arrivals, shape)
    return o


@torch.library.register_fake("m2rnn::decode_step", lib=LIB)
def _decode_fake(
    qkv: Tensor,
    x_f: Tensor,
    g: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    W: Tensor,
    D: Tensor,
    conv_state: Tensor,
    state: Tensor,
    state_indices: Tensor,
    arrivals: Tensor | None,
    num_q_heads: int,
    num_k_heads: int,
    impl: str,
) -> Tensor:
    args = (qkv, x_f, g, conv_weight, A_log, dt_bias, W, D, conv_state, state, state_indices, arrivals)
    shape = check_decode(*args, num_q_heads, num_k_heads)
    _check_name(impl)
    return qkv.new_empty(shape.B, shape.N, shape.V)


def _check_name(impl: str) -> None:
    if impl not in IMPL_NAMES:
        raise ValueError(f"m2rnn: `impl` must be one of {', '.join(map(repr, IMPL_NAMES))}, got {impl!r}")


def _choose(impl: str, qkv: Tensor, shape: DecodeShape) -> str:
    """The rule of `registry.choose`: on CUDA nothing falls back to the slow path in silence."""
    _check_name(impl)
    on_cuda = qkv.device.type == "cuda"
    if impl == "eager" or (impl == "auto" and not on_cuda):
        return "eager"
    reason: str | None = f"impl='triton' runs on cuda tensors, these are on {qkv.device.type}"
    if on_cuda:
        try:
            kernel = importlib.import_module("m2rnn_compile.lowering.triton.decode")
        except ImportError as e:
            reason = f"impl='triton' cannot be imported: {e}"
        else:
            reason = kernel.unsupported(qkv, shape)
    if reason is not None:
        raise ValueError(f"m2rnn: {reason}; pass impl='eager', which runs everywhere, to run the slow path knowingly")
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
    conv_state: Tensor,
    state: Tensor,
    state_indices: Tensor,
    shape: DecodeShape,
) -> Tensor:
    """The step in torch, on the rows that have a slot. Reads the indices, so on a GPU it waits for the device."""
    B, N, K, V, Nq, Nk, _, C, _, slots = shape
    acc = state.dtype
    rows = torch.nonzero(state_indices != -1).squeeze(1)
    slot = state_indices[rows].long()
    _check_slots(slot.tolist(), slots)

    window = torch.cat([conv_state[slot].to(acc), qkv[rows].to(acc)[:, None]], 1)  # oldest first, the current one last
    conv_state[slot] = window[:, 1:].to(conv_state.dtype)
    conv = (window * conv_weight[:, 0].to(acc).mT).sum(1)
    # Rounded to the activations' dtype as prefill does, whose q, k and v are tensors in memory.
    q, k, v = F.silu(conv).to(qkv.dtype).split([Nq * K, Nk * K, C - (Nq + Nk) * K], 1)
    q, k, v = q.unflatten(1, (-1, K)), k.unflatten(1, (-1, K)), v.unflatten(1, (-1, V))
    f = torch.exp(-torch.exp(A_log.to(acc)) * F.softplus(x_f[rows].to(acc) + dt_bias.to(acc)))

    q, k, v = q.to(acc), k.to(acc), v.to(acc)
    y, new_state = reference.step(q, k, v, f, W.to(acc), _heads_of(state[slot], N))
    state[slot] = new_state
    o_rows = y + D.to(acc) * v.repeat_interleave(N // v.shape[1], 1)
    gate = g[rows].to(acc).unflatten(1, (-1, V))
    o_rows = o_rows * F.silu(gate).repeat_interleave(N // gate.shape[1], 1)
    o = qkv.new_zeros(B, N, V)
    o[rows] = o_rows.to(o.dtype)
    return o
