# SPDX-License-Identifier: Apache-2.0
"""The linear recurrences of Gated DeltaNet and Mamba-2, chunk by chunk, as one op.

Per batch and head, state S ∈ R^{K×V}, decay exp(g_t) ∈ (0, 1], step size β_t:

    delta rule:  S_t = e^{g_t} S_{t-1} + β_t k_t (v_t − e^{g_t} S_{t-1}ᵀ k_t)ᵀ      (arXiv 2412.06464, eq. 10)
    sum:         S_t = e^{g_t} S_{t-1} + β_t k_t v_tᵀ                               (arXiv 2405.21060)
    both:        y_t = S_tᵀ q_t

Being linear in S, C steps at a time are matrix products: only the state between chunks is sequential. On a GPU the
delta rule runs on the kernels of flash-linear-attention where that is installed (extra `hybrid`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import re
import types
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..ops.validation import accumulation_dtype
from .chunk_gradients import chunk_gradients
from .opaque import Packing, differentiate_once, gradients, no_autocast, refuse_transforms

CHUNK = 64  # also the chunk of flash-linear-attention's kernels: part of the shape of what they save
MAX_KEY_DIM_FLA = 256
IMPLS = ("auto", "torch", "fla")


class LinearRNNOutput(NamedTuple):
    """`y` in v's dtype, `final_state` in fp32 (fp64 for fp64 inputs)."""

    y: Tensor
    final_state: Tensor


def linear_rnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    delta: bool = True,
    impl: str = "auto",
) -> LinearRNNOutput:
    """Run the recurrence over a batch of sequences.

    Args:
        q, k: ``[B, T, H, K]``.  v: ``[B, T, H, V]``.
        g: log of the decay, ``[B, T, H]``, at most 0; taken in fp32.
        beta: step size, ``[B, T, H]``; taken in fp32.
        initial_state: ``[B, H, K, V]`` (packed: one a sequence, ``[S, H, K, V]``); None means zero.
        cu_seqlens: ``[S + 1]``, sequences packed along time; B must be 1.
        delta: the delta rule, or the plain sum.
        impl: "torch" (any device), "fla" (CUDA, delta rule, bf16 or fp16, K <= 256), "auto" (fla where it can).

    Raises:
        ValueError: `impl` is unknown, or names what cannot run these tensors.
        NotImplementedError: forward-mode differentiation, torch.func.grad and its kin, differentiating twice.
    """
    if impl not in IMPLS:
        raise ValueError(f"linear_rnn: `impl` must be one of {IMPLS}, got {impl!r}")
    refuse_transforms("linear_rnn", q, k, v, g, beta, initial_state)
    return LinearRNNOutput(*_op(q, k, v, g, beta, initial_state, cu_seqlens, delta, impl)[:2])


def linear_rnn_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, *, delta: bool = True
) -> LinearRNNOutput:
    """One step: arguments of `linear_rnn` without T, the state ``[B, H, K, V]`` (not modified)."""
    acc = state.dtype
    q_a, k_a, v_a, beta_a = (x.to(acc) for x in (q, k, v, beta))
    state = g.to(acc).exp()[..., None, None] * state
    if delta:
        v_a = v_a - torch.einsum("bhkv,bhk->bhv", state, k_a)
    state = state + (beta_a[..., None] * k_a)[..., None] * v_a[..., None, :]
    return LinearRNNOutput(torch.einsum("bhkv,bhk->bhv", state, q_a).to(v.dtype), state)


# -- the equations, in chunks ------------------------------------------------------------------------------------------


def chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, delta: bool
) -> tuple[Tensor, Tensor]:
    """y and the final state, in plain differentiable torch; shapes as in `linear_rnn`, unpacked.

    Within a chunk let G be the running sum of g. The delta rule's corrections u solve a unit lower triangular system,

        u_i = β_i (v_i − e^{G_i} S₀ᵀ k_i) − Σ_{j<i} β_i e^{G_i − G_j} (k_i · k_j) u_j,

    whose part that does not know S₀ is solved for all chunks at once.
    """
    acc = accumulation_dtype(v.dtype)
    B, T, H, V = v.shape
    K = q.shape[-1]
    S = q.new_zeros(B, H, K, V, dtype=acc) if state is None else state.to(acc)
    pad = -T % CHUNK
    NC = (T + pad) // CHUNK

    def chunks(x: Tensor) -> Tensor:  # [B, T, H, ...] -> [B, H, NC, C, ...]; steps of zeros leave the state alone
        x = torch.cat([x.to(acc), x.new_zeros(B, pad, *x.shape[2:], dtype=acc)], 1)
        return x.unflatten(1, (NC, CHUNK)).movedim(3, 1)

    if NC == 0:
        return v.new_empty(B, 0, H, V), S.clone()
    q_c, k_c, v_c, beta_c = chunks(q), chunks(k), chunks(v), chunks(beta)[..., None]
    G = chunks(g).cumsum(-1)
    past = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=v.device).tril()
    # Masked before the exponential: G_i − G_j is positive for j > i and may overflow.
    decay = torch.where(past, G[..., :, None] - G[..., None, :], float("-inf")).exp()
    scores = (q_c @ k_c.mT) * decay
    grown = G.exp()[..., None]
    u = beta_c * v_c
    w = None
    if delta:
        lower = (beta_c * (k_c @ k_c.mT) * decay).tril(-1)
        solved = torch.linalg.solve_triangular(
            lower, torch.cat([u, beta_c * grown * k_c], -1), upper=False, unitriangular=True
        )
        u, w = solved.split([V, K], -1)
    k_left = k_c * (G[..., -1:] - G).exp()[..., None]
    q_grown = q_c * grown
    ys = []
    for c in range(NC):
        u_now = u[:, :, c] if w is None else u[:, :, c] - w[:, :, c] @ S
        ys.append(q_grown[:, :, c] @ S + scores[:, :, c] @ u_now)
        S = grown[:, :, c, -1:] * S + k_left[:, :, c].mT @ u_now
    y = torch.stack(ys, 2).movedim(1, 3).flatten(1, 2)[:, :T]
    return y.to(v.dtype).contiguous(), S.contiguous()


def _torch_path(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, cu: Tensor | None, delta: bool
) -> tuple[Tensor, Tensor]:
    if cu is None:
        return chunked(q, k, v, g, beta, state, delta)
    packing = Packing(cu, q.shape[1])
    q, k, v, g, beta = (packing.pad(x) for x in (q, k, v, g, beta))
    y, S = chunked(q, k, v, g, beta, state, delta)
    return packing.pack(y), S


# -- flash-linear-attention --------------------------------------------------------------------------------------------


@functools.cache
def _fla_kernels() -> Any:
    """Its module of the chunked gated delta rule, or the reason why it cannot be used."""
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed; pip install 'm2rnn-compile[hybrid]'"
    try:
        # Its package and the module's function share a name, so the attribute would be the function.
        module = importlib.import_module("fla.ops.gated_delta_rule.chunk")
        # Called below its autograd.Function, whose tensors an op cannot save; so check that what is called is there.
        forward = inspect.signature(module.chunk_gated_delta_rule_fwd).parameters
        backward = inspect.signature(module.chunk_gated_delta_rule_bwd).parameters
    except (ImportError, AttributeError) as error:
        return f"flash-linear-attention cannot be used ({error}); tried with 0.4.1 and 0.6.0"
    missing = {"q", "k", "v", "g", "beta", "scale", "initial_state", "cu_seqlens"} - set(forward) & set(backward)
    if missing or not {"A", "do", "dht"} <= set(backward):
        return f"this flash-linear-attention lacks arguments {sorted(missing)}; tried with 0.4.1 and 0.6.0"
    return module


def _kernel_is_wrong(device: torch.device) -> bool:
    """Whether flash-linear-attention's issue 640 is present: Hopper, and Triton from 3.4.0 to before 3.7.1."""
    import triton

    version = tuple(int(n) for n in re.findall(r"\d+", triton.__version__)[:3])
    return torch.cuda.get_device_capability(device)[0] == 9 and (3, 4, 0) <= version < (3, 7, 1)


@functools.cache
def _fla_backward(device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
    """Its backward; where one of its kernels is known to be wrong, with products of ours in that kernel's place."""
    module = _fla_kernels()
    backward = module.chunk_gated_delta_rule_bwd
    if not _kernel_is_wrong(device):
        return backward
    # From 0.6.0 on, its running sums of g are in units of log 2.
    unit = math.log(2) if hasattr(module, "RCP_LN2") else 1.0
    ours = lambda g, **options: chunk_gradients(g=g * unit, **options)
    names = dict(backward.__globals__, chunk_bwd_dqkwg=ours)  # a copy: the module itself stays as it is
    repaired = types.FunctionType(backward.__code__, names, backward.__name__, backward.__defaults__)
    repaired.__kwdefaults__ = backward.__kwdefaults__
    return repaired


def fla_unsupported(q: Tensor, v: Tensor, delta: bool = True) -> str | None:
    """Why flash-linear-attention's kernels cannot run these tensors, or None."""
    if not delta:
        return "only the delta rule is wired to flash-linear-attention"
    if q.device.type != "cuda":
        return f"tensors are on {q.device.type}, not on a GPU"
    if v.dtype not in (torch.bfloat16, torch.float16) or q.dtype != v.dtype:
        return f"q and v are {q.dtype} and {v.dtype}, expected both bfloat16 or both float16"
    if q.shape[-1] > MAX_KEY_DIM_FLA:
        return f"K = {q.shape[-1]}, at most {MAX_KEY_DIM_FLA}"
    kernels = _fla_kernels()
    return kernels if isinstance(kernels, str) else None


def _uses_fla(impl: str, q: Tensor, v: Tensor, delta: bool) -> bool:
    if impl == "torch":
        return False
    reason = fla_unsupported(q, v, delta)
    if reason is not None and impl == "fla":
        raise ValueError(f"linear_rnn: impl='fla' cannot be used: {reason}; or take impl='torch'")
    return reason is None


# -- the op ------------------------------------------------------------------------------------------------------------


INPUTS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial_state, Tensor? cu_seqlens"


@torch.library.custom_op(
    "m2rnn::linear_rnn",
    mutates_args=(),
    schema=f"({INPUTS}, bool delta, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the final state, and what flash-linear-attention's backward wants: the summed g and the solved system."""
    with no_autocast(q):
        fla = _uses_fla(impl, q, v, delta)
        if not fla or q.numel() == 0:
            y, S = _torch_path(q, k, v, g, beta, initial_state, cu_seqlens, delta)
            return y, S, *_residuals(q, v, fla)
        with torch.cuda.device(q.device):
            summed, y, solved, S = _fla_kernels().chunk_gated_delta_rule_fwd(
                **_contiguous(q=q, k=k, v=v, g=g.float(), beta=beta.float(), initial_state=initial_state),
                scale=1.0,
                output_final_state=True,
                cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(torch.int64),
            )[:4]
        return y.to(v.dtype), S, summed, solved


def _contiguous(**tensors: Tensor | None) -> dict[str, Tensor | None]:
    return {name: x if x is None else x.contiguous() for name, x in tensors.items()}


def _residuals(q: Tensor, v: Tensor, fla: bool) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    if fla:
        return q.new_empty(B, T, H, dtype=torch.float32), q.new_empty(B, T, H, CHUNK)
    return v.new_empty(0), v.new_empty(0)


@_op.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, H, V = v.shape
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    acc = accumulation_dtype(v.dtype)
    state = v.new_empty(sequences, H, q.shape[-1], V, dtype=acc)
    return v.new_empty(B, T, H, V), state, *_residuals(q, v, _uses_fla(impl, q, v, delta))


@torch.library.custom_op(
    "m2rnn::linear_rnn_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor dstate, {INPUTS}, Tensor summed, Tensor solved, bool delta, str impl) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(
    dy: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    summed: Tensor,
    solved: Tensor,
    delta: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and the initial state (empty if there was none)."""
    inputs = (q, k, v, g, beta, initial_state)
    with no_autocast(q):
        if not _uses_fla(impl, q, v, delta) or q.numel() == 0:
            path = functools.partial(_torch_path, cu=cu_seqlens, delta=delta)
            dq, dk, dv, dg, dbeta, d0 = cast(list[Any], gradients(path, inputs, (dy, dstate)))
        else:
            with torch.cuda.device(q.device):
                dq, dk, dv, dbeta, dg, d0 = _fla_backward(q.device)(
                    **_contiguous(q=q, k=k, v=v, g=summed, beta=beta.float(), initial_state=initial_state),
                    **_contiguous(A=solved, do=dy, dht=dstate),
                    scale=1.0,
                    cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(torch.int64),
                )[:6]
    d0 = v.new_empty(0) if initial_state is None or d0 is None else d0.to(initial_state.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg.to(g.dtype), dbeta.to(beta.dtype), d0


@_backward_op.register_fake
def _backward_fake(
    dy: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    summed: Tensor,
    solved: Tensor,
    delta: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = lambda x: x.new_empty(x.shape)
    return *map(like, (q, k, v, g, beta)), (v.new_empty(0) if initial_state is None else like(initial_state))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.delta, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, dy: Tensor, dstate: Tensor, *_: Tensor) -> tuple[Any, ...]:
    q, k, v, g, beta, state, cu, summed, solved = ctx.saved_tensors
    *grads, d0 = _backward_op(
        dy, dstate, q, k, v, g, beta, state, cu, summed, solved, ctx.delta, ctx.impl
    )  # fmt: skip
    return *grads, None if state is None else d0, None, None, None


_op.register_autograd(_backward, setup_context=_save)
differentiate_once("linear_rnn", _backward_op)
