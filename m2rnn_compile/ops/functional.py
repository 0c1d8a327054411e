# SPDX-License-Identifier: Apache-2.0
"""The public functions: `m2rnn`, `m2rnn_step` and `explain_impl`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference, registry
from .library import differentiated_by_functorch, functorch_active
from .scan import scan
from .step import step
from .validation import check_scan, check_step, state_dtype


class M2RNNOutput(NamedTuple):
    """Result of `m2rnn`."""

    y: Tensor
    final_state: Tensor | None


class M2RNNStepOutput(NamedTuple):
    """Result of `m2rnn_step`."""

    y: Tensor
    state: Tensor


def m2rnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    W: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state_grad_clip: float | None = None,
    output_final_state: bool = True,
    impl: str = "auto",
) -> M2RNNOutput:
    """The M²RNN recurrence (arXiv 2603.14360) over a batch of sequences.

    Per batch element and head, with a matrix state H of K rows and V columns::

        Z_t = tanh(H_{t-1} W + k_t v_tᵀ)
        H_t = f_t H_{t-1} + (1 - f_t) Z_t
        y_t = H_tᵀ q_t

    Heads are shared by divisibility: N is the largest head count, each other divides it, and head n of the result reads
    head ``n // (N / N_x)`` of input x.

    Args:
        q: queries ``[B, T, Nq, K]``; float32, float64, bfloat16 or float16.
        k: keys ``[B, T, Nk, K]`` in q's dtype.
        v: values ``[B, T, Nv, V]`` in q's dtype.
        f: forget factors in [0, 1], ``[B, T, Nf]``, any float dtype; fp32 advised (bf16 cannot tell 0.998 from 1).
        W: state transition ``[Nw, V, V]``, any float dtype.
        initial_state: ``[B, N, K, V]`` (packed: ``[S, N, K, V]``), zero if None. Differentiable, never modified.
        cu_seqlens: int32 or int64 ``[S + 1]`` from 0 to T: sequences packed along time, B must be 1.
        state_grad_clip: in backward, clamp the carried state gradient to [-c, c] elementwise before ``q_t dy_tᵀ`` is
            added to it (the semantics that the released models were trained with, at c = 1). None: no clipping.
        output_final_state: if False, ``final_state`` is None.
        impl: "auto" goes by the tensors' device; "cpp" (CPU), "triton" (CUDA), "eager" (torch loops, any device) and
            "reference" (torch autograd through the loop; slow, differentiable twice) are explicit. A choice that is not
            possible raises and says why; `explain_impl` tells without running.

    Returns:
        ``(y, final_state)``: y ``[B, T, N, V]`` in v's dtype; final_state ``[B or S, N, K, V]`` in fp32 (fp64 for fp64
        inputs). Both are differentiable.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, head counts, devices, ``cu_seqlens`` or options that do not fit; ``impl`` not available.
        NotImplementedError: forward-mode differentiation, torch.func.grad and its kin, differentiating twice (all of
            which impl="reference" does).
    """
    q, k, v = agree_under_autocast(q, k, v)
    check_scan(q, k, v, f, W, initial_state, cu_seqlens, state_grad_clip)
    registry.check_name(impl)
    if impl == "reference":
        q, k, v, W = _autocast(q, k, v, W)
        y, final_state = reference.reference(q, k, v, f, W, initial_state, cu_seqlens, state_grad_clip)
    else:
        _refuse_transforms(q, k, v, f, W, initial_state)
        y, final_state = scan(q, k, v, f, W, initial_state, cu_seqlens, state_grad_clip, impl)
    return M2RNNOutput(y, final_state if output_final_state else None)


def m2rnn_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    W: Tensor,
    *,
    initial_state: Tensor | None = None,
    impl: str = "auto",
) -> M2RNNStepOutput:
    """One step of `m2rnn` for decoding: the same arguments without the time dimension.

    Args:
        q: ``[B, Nq, K]``.  k: ``[B, Nk, K]``.  v: ``[B, Nv, V]``.  f: ``[B, Nf]``.  W: ``[Nw, V, V]``.
        initial_state: H before the step, ``[B, N, K, V]``; zero if None. Not modified.
        impl: as in `m2rnn`.

    Returns:
        ``(y, state)``: y ``[B, N, V]`` in v's dtype, the new state ``[B, N, K, V]`` in fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError, NotImplementedError: as `m2rnn`.
    """
    registry.check_name(impl)
    q, k, v = agree_under_autocast(q, k, v)
    B, _, N, K, V, _ = check_step(q, k, v, f, W, initial_state)
    if initial_state is None:
        initial_state = v.new_zeros(B, N, K, V, dtype=state_dtype(v))
    if impl == "reference":
        q, k, v, W = _autocast(q, k, v, W)
        return M2RNNStepOutput(*reference.step(q, k, v, f, W, initial_state))
    _refuse_transforms(q, k, v, f, W, initial_state)
    return M2RNNStepOutput(*step(q, k, v, f, W, initial_state, impl))


def explain_impl(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    W: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> registry.ImplChoice:
    """Which implementation `m2rnn` would run on these tensors, and why the others would not.

    Returns:
        ``(impl, reason, rejected)``: the name, one sentence, and for every other implementation that could not run on
        these tensors the reason.

    Raises:
        TypeError, ValueError: as `m2rnn` would, except for the values of `cu_seqlens`: only a run reads them.
    """
    q, k, v = agree_under_autocast(q, k, v)
    check_scan(q, k, v, f, W, initial_state, cu_seqlens, None)
    tensors = (q, k, v, f, W, initial_state, cu_seqlens)
    choice = registry.choose(impl, q.device, tensors)
    others = (name for name in registry.IMPLEMENTATIONS if name != choice.impl)
    reasons = {name: registry.why_not(name, q.device, tensors) for name in others}
    return choice._replace(rejected={name: reason for name, reason in reasons.items() if reason is not None})


def agree_under_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """q, k and v of several dtypes, cast as the op's autocast rule will cast them; what is checked is what runs."""
    several = all(isinstance(x, Tensor) for x in (q, k, v)) and not (q.dtype == k.dtype == v.dtype)
    floats = several and all(x.dtype.is_floating_point for x in (q, k, v))
    return _autocast(q, k, v) if floats else (q, k, v)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The op's autocast rule, for the path that is not an op."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _refuse_transforms(*tensors: Tensor | None) -> None:
    """What a custom op cannot do (torch 2.11, 2.13), said in words of ours.

    Forward-mode AD would give zero tangents without a word; torch.func.grad ends in a message about setup_context.
    """
    if torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:  # whether a tensor has a tangent cannot be asked while tracing
            raise NotImplementedError(
                "m2rnn: forward-mode differentiation is not supported by the op; use impl='reference'"
            )
        return
    present = [x for x in tensors if x is not None]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in present):
        raise NotImplementedError(
            "m2rnn: forward-mode differentiation is not supported by the op; use impl='reference'"
        )
    if functorch_active() and any(map(differentiated_by_functorch, present)):
        raise NotImplementedError(
            "m2rnn: torch.func.grad, vjp and jacrev are not supported by the op; use torch.autograd.grad, which "
            "goes through torch.vmap too, or impl='reference'"
        )
