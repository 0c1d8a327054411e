# SPDX-License-Identifier: Apache-2.0
"""The one place where user input is checked. Kernels below it assume validated input.

Everything here looks at metadata only (shape, dtype, device), so it runs under `torch.compile` and on fake tensors.
The *values* of `cu_seqlens` are checked by `check_cu_seqlens_values`, which the op calls when it really runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class ScanShape(NamedTuple):
    """Sizes of one scan. `S` is the number of states: sequences when packed, else `B`."""

    B: int
    T: int
    N: int
    K: int
    V: int
    S: int


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of `dtype` are taken in: fp32, or fp64 for fp64.

    Not `torch.promote_types`: export (non-strict) keeps each call of it as a node, on which Dynamo breaks the graph.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def state_dtype(v: Tensor) -> torch.dtype:
    """The dtype that the state is carried and returned in: fp32, or fp64 for fp64 inputs."""
    return accumulation_dtype(v.dtype)


def num_checkpoints(B: int, T: int, S: int, chunk: int, packed: bool) -> int:
    """Slots in the checkpoint tensor; see docs/design.md for which chunk sits where.

    Never 1: a size of one makes the compiler guard on it (a tensor with such a dimension is contiguous in more ways),
    and a graph would be compiled again at the first T beyond one chunk. The slots left over are zero.
    """
    if chunk == 0:
        return 0
    return T // chunk + S + 1 if packed else T // chunk + 2


def new_checkpoints(v: Tensor, N: int, K: int, S: int, chunk: int, packed: bool) -> Tensor:
    """The checkpoint tensor, [B, NC, N, K, V]: only slots that no chunk will fill are zeroed."""
    B, T, _, V = v.shape
    NC = num_checkpoints(B, T, S, chunk, packed)
    if packed:
        return v.new_zeros(B, NC, N, K, V, dtype=state_dtype(v))
    checkpoints = v.new_empty(B, NC, N, K, V, dtype=state_dtype(v))
    if chunk:
        checkpoints[:, (T + chunk - 1) // chunk :].zero_()
    return checkpoints


def _is_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"m2rnn: `{name}` must be a torch.Tensor, got {type(x).__name__}")
    if x.is_nested:  # it has no sizes to check: asking for them fails inside of torch
        raise TypeError(
            f"m2rnn: `{name}` must be a dense tensor, got a nested one; concatenate its sequences along time "
            "(x.values() of the jagged layout) and pass their offsets as `cu_seqlens`"
        )


def _has_shape(name: str, x: Tensor, names: tuple[str, ...], fixed: dict[str, int]) -> None:
    """`x` has the dimensions called `names`; those found in `fixed` must have that size."""
    shape = x.shape
    if len(shape) != len(names):
        spec = ", ".join(names)
        raise ValueError(f"m2rnn: `{name}` must have {len(names)} dimensions [{spec}], got shape {tuple(shape)}")
    for axis, dim in enumerate(names):
        if dim in fixed and shape[axis] != fixed[dim]:
            raise ValueError(
                f"m2rnn: `{name}` must have shape [{', '.join(names)}] with {dim} = {fixed[dim]} (set by the other "
                f"inputs), got shape {tuple(shape)}: dimension {axis} is {shape[axis]}"
            )


def _num_heads(heads: dict[str, int]) -> int:
    N = max(heads.values())
    for name, n in heads.items():
        if n == 0 or N % n != 0:
            listed = ", ".join(f"{k} has {v}" for k, v in heads.items())
            raise ValueError(
                f"m2rnn: the head count of `{name}` ({n}) must divide the largest head count ({N}); got {listed}. "
                "Heads are shared by divisibility: head n of the result reads head n // (N / N_x) of input x."
            )
    return N


def _dtypes_and_devices(q: Tensor, k: Tensor, v: Tensor, others: dict[str, Tensor | None]) -> None:
    if not (q.dtype == k.dtype == v.dtype):
        raise TypeError(
            f"m2rnn: `q`, `k` and `v` must share one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; "
            "cast them with .to(dtype), or run under torch.autocast, which does"
        )
    if v.dtype not in INPUT_DTYPES:
        raise TypeError(
            f"m2rnn: `q`, `k` and `v` must be float32, float64, bfloat16 or float16, got {v.dtype}; cast them with .to"
        )
    for name, x in others.items():
        if x is not None and x.dtype not in INPUT_DTYPES:
            raise TypeError(
                f"m2rnn: `{name}` must be float32, float64, bfloat16 or float16, got {x.dtype}; cast it with .to()"
            )
    for name, x in {"q": q, "k": k, "v": v, **others}.items():
        if x is not None and x.layout != torch.strided:
            raise TypeError(f"m2rnn: `{name}` must be dense, got layout {x.layout}; convert it with .to_dense()")
    for name, x in {"k": k, "v": v, **others}.items():
        if x is not None and x.device != q.device:
            raise ValueError(
                f"m2rnn: all tensors must be on one device, got `q` on {q.device} and `{name}` on {x.device}; "
                f"move it with .to({str(q.device)!r})"
            )


def check_clip(state_grad_clip: float | None) -> None:
    if state_grad_clip is None:
        return
    if isinstance(state_grad_clip, bool) or not isinstance(state_grad_clip, (int, float)):
        raise TypeError(f"m2rnn: `state_grad_clip` must be a float or None, got {type(state_grad_clip).__name__}")
    if not state_grad_clip >= 0:  # NaN too; math.isnan cannot be traced where dynamic=True makes the clip a symbol
        raise ValueError(f"m2rnn: `state_grad_clip` must be >= 0, got {state_grad_clip}; use None for no clipping")


def check_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    W: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    state_grad_clip: float | None,
) -> ScanShape:
    """Check everything that metadata can tell about one scan and return its sizes.

    Raises:
        TypeError: not a tensor, or a dtype that is not supported.
        ValueError: a shape, head count, device or option that does not fit.
    """
    for name, x in {"q": q, "k": k, "v": v, "f": f, "W": W}.items():
        _is_tensor(name, x)
    _has_shape("q", q, ("B", "T", "Nq", "K"), {})
    B, T, K = q.shape[0], q.shape[1], q.shape[3]
    _has_shape("k", k, ("B", "T", "Nk", "K"), {"B": B, "T": T, "K": K})
    _has_shape("v", v, ("B", "T", "Nv", "V"), {"B": B, "T": T})
    _has_shape("f", f, ("B", "T", "Nf"), {"B": B, "T": T})
    V = v.shape[3]
    _has_shape("W", W, ("Nw", "V", "V"), {"V": V})
    if K == 0 or V == 0:
        raise ValueError(f"m2rnn: K and V must be at least 1, got K = {K} (last dimension of q) and V = {V} (of v)")
    N = _num_heads({"q": q.shape[2], "k": k.shape[2], "v": v.shape[2], "f": f.shape[2], "W": W.shape[0]})
    if initial_state is not None:
        _is_tensor("initial_state", initial_state)
    _dtypes_and_devices(q, k, v, {"f": f, "W": W, "initial_state": initial_state})
    check_clip(state_grad_clip)

    S = B
    if cu_seqlens is not None:
        _is_tensor("cu_seqlens", cu_seqlens)
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"m2rnn: `cu_seqlens` must be int32 or int64, got {cu_seqlens.dtype}; cast it with .to()")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(
                "m2rnn: `cu_seqlens` must be one-dimensional [S + 1] with at least one sequence, "
                f"got shape {tuple(cu_seqlens.shape)}"
            )
        if cu_seqlens.device != q.device:
            raise ValueError(
                f"m2rnn: `cu_seqlens` must be on the inputs' device {q.device}, got {cu_seqlens.device}; "
                f"move it with .to({str(q.device)!r})"
            )
        if B != 1:
            raise ValueError(
                f"m2rnn: with `cu_seqlens` the sequences are packed along time and B must be 1, got B = {B}; "
                "reshape [B, T, ...] to [1, B * T, ...]"
            )
        S = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        lead = "S" if cu_seqlens is not None else "B"
        _has_shape("initial_state", initial_state, (lead, "N", "K", "V"), {lead: S, "N": N, "K": K, "V": V})
    return ScanShape(B, T, N, K, V, S)


def check_backward(
    shape: ScanShape, dy: Tensor | None, dfinal_state: Tensor | None, checkpoints: Tensor, chunk: int, packed: bool
) -> None:
    """Check what `scan_backward` takes beyond the scan's own arguments: kernels turn these shapes into addresses.

    Raises:
        ValueError: a shape that does not fit.
    """
    B, T, N, K, V, S = shape
    sizes = {"B": B, "T": T, "N": N, "K": K, "V": V, "S": S}
    if dy is not None:
        _has_shape("dy", dy, ("B", "T", "N", "V"), sizes)
    if dfinal_state is not None:
        _has_shape("dfinal_state", dfinal_state, ("S", "N", "K", "V"), sizes)
    _has_shape("checkpoints", checkpoints, ("B", "NC", "N", "K", "V"), sizes)
    filled = T // chunk + S if packed else (T + chunk - 1) // chunk
    if checkpoints.shape[1] < filled:
        raise ValueError(
            f"m2rnn: `checkpoints` must hold at least {filled} states for T = {T} and chunk = {chunk}, got "
            f"{checkpoints.shape[1]}; pass those of a scan with the same arguments"
        )


FORGETS = ("none", "decay", "sigmoid")
ACTIVATIONS = ("silu", "sigmoid", "gelu", "gelu_tanh")
NORMS = ("none", "all", "head")


def _is_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"m2rnn: `{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    W: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    D: Tensor | None,
    g: Tensor | None,
    norm_weight: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    state_grad_clip: float | None,
    forget: str,
    activation: str,
    norm: str,
    norm_eps: float,
) -> ScanShape:
    """`check_scan`, and the same for what the fused scan takes beyond it.

    Raises:
        TypeError, ValueError: naming the argument, what was got and what was expected.
    """
    _is_one_of("forget", forget, FORGETS)
    _is_one_of("activation", activation, ACTIVATIONS)
    shape = check_scan(q, k, v, f, W, initial_state, cu_seqlens, state_grad_clip)
    sizes = {"Nf": f.shape[2], "N": shape.N, "V": shape.V, "B": shape.B, "T": shape.T}
    for name, x in {"A_log": A_log, "dt_bias": dt_bias}.items():
        if (x is not None) != (forget == "decay"):
            raise ValueError(f"m2rnn: `{name}` goes with forget='decay' and only with it, got forget={forget!r}")
        if x is not None:
            _is_tensor(name, x)
            _has_shape(name, x, ("Nf",), sizes)
    if D is not None:
        _is_tensor("D", D)
        _has_shape("D", D, ("N", "V"), sizes)
    if g is not None:
        _is_tensor("g", g)
        _has_shape("g", g, ("B", "T", "Ng", "V"), sizes)
        if g.shape[2] == 0 or shape.N % g.shape[2] != 0:
            raise ValueError(f"m2rnn: the head count of `g` ({g.shape[2]}) must divide N = {shape.N}")
    _check_norm(norm, norm_weight, sizes)
    _dtypes_and_devices(q, k, v, {"A_log": A_log, "dt_bias": dt_bias, "D": D, "g": g, "norm_weight": norm_weight})
    return shape


def _check_norm(norm: str, norm_weight: Tensor | None, sizes: dict[str, int]) -> None:
    _is_one_of("norm", norm, NORMS)
    if norm_weight is not None:
        if norm == "none":
            raise ValueError("m2rnn: `norm_weight` goes with norm='all' or 'head', got norm='none'")
        _is_tensor("norm_weight", norm_weight)
        _has_shape("norm_weight", norm_weight, ("N", "V"), sizes)


def check_tail_backward(
    do: Tensor,
    y: Tensor,
    v: Tensor,
    D: Tensor | None,
    g: Tensor | None,
    norm_weight: Tensor | None,
    rstd: Tensor,
    activation: str,
    norm: str,
) -> None:
    """What the backward of the fused scan's tail takes: kernels turn these shapes into addresses.

    Raises:
        TypeError, ValueError: a shape or an option that does not fit.
    """
    _is_one_of("activation", activation, ACTIVATIONS)
    _has_shape("y", y, ("B", "T", "N", "V"), {})
    B, T, N, V = y.shape
    sizes = {"B": B, "T": T, "N": N, "V": V}
    _has_shape("do", do, ("B", "T", "N", "V"), sizes)
    _has_shape("v", v, ("B", "T", "Nv", "V"), sizes)
    if D is not None:
        _has_shape("D", D, ("N", "V"), sizes)
    if g is not None:
        _has_shape("g", g, ("B", "T", "Ng", "V"), sizes)
    _check_norm(norm, norm_weight, sizes)
    _has_shape("rstd", rstd, ("B", "T", "norms"), {**sizes, "norms": {"none": 0, "all": 1, "head": N}[norm]})


def check_step(q: Tensor, k: Tensor, v: Tensor, f: Tensor, W: Tensor, initial_state: Tensor | None) -> ScanShape:
    """The same as `check_scan` for one decoding step, whose inputs have no time dimension."""
    for name, x in {"q": q, "k": k, "v": v, "f": f, "W": W}.items():
        _is_tensor(name, x)
    if initial_state is not None:
        _is_tensor("initial_state", initial_state)
    _has_shape("q", q, ("B", "Nq", "K"), {})
    B, K = q.shape[0], q.shape[2]
    _has_shape("k", k, ("B", "Nk", "K"), {"B": B, "K": K})
    _has_shape("v", v, ("B", "Nv", "V"), {"B": B})
    _has_shape("f", f, ("B", "Nf"), {"B": B})
    V = v.shape[2]
    _has_shape("W", W, ("Nw", "V", "V"), {"V": V})
    if K == 0 or V == 0:
        raise ValueError(f"m2rnn: K and V must be at least 1, got K = {K} (last dimension of q) and V = {V} (of v)")
    N = _num_heads({"q": q.shape[1], "k": k.shape[1], "v": v.shape[1], "f": f.shape[1], "W": W.shape[0]})
    if initial_state is not None:
        _has_shape("initial_state", initial_state, ("B", "N", "K", "V"), {"B": B, "N": N, "K": K, "V": V})
    _dtypes_and_devices(q, k, v, {"f": f, "W": W, "initial_state": initial_state})
    return ScanShape(B, 1, N, K, V, B)


def check_cu_seqlens_values(cu_seqlens: Tensor, T: int) -> list[int]:
    """The boundaries as a list, after checking that they run from 0 to `T` without going back.

    Reads the tensor, so on a GPU it waits for the device.
    """
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T:
        raise ValueError(
            f"m2rnn: `cu_seqlens` must run from 0 to T = {T}, got first = {bounds[0]}, last = {bounds[-1]}"
        )
    for i, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if b < a:
            raise ValueError(
                f"m2rnn: `cu_seqlens` must not decrease, got cu_seqlens[{i}] = {a} and cu_seqlens[{i + 1}] = {b}"
            )
    return bounds


class DecodeShape(NamedTuple):
    """Sizes of one fused decoding step; `C` counts the conv channels: those of q, then of k, then of v."""

    B: int
    N: int
    K: int
    V: int
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
    norm_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    state_indices: Tensor | None,
    num_q_heads: int,
    num_k_heads: int,
) -> DecodeShape:
    """Check everything that metadata can tell about one fused decoding step and return its sizes.

    Raises:
        TypeError: not a tensor, or a dtype that is not supported.
        ValueError: a shape, head count, layout of memory or device that does not fit.
    """
    floats = {
        "qkv": qkv, "x_f": x_f, "g": g, "conv_weight": conv_weight, "A_log": A_log, "dt_bias": dt_bias, "W": W, "D": D,
        "norm_weight": norm_weight, "conv_state": conv_state, "state": state,
    }  # fmt: skip
    tensors = floats if state_indices is None else {**floats, "state_indices": state_indices}
    for name, x in tensors.items():
        _is_tensor(name, x)

    _has_shape("state", state, ("slots", "N", "K", "V"), {})
    slots, N, K, V = state.shape
    if N == 0 or K == 0 or V == 0:
        raise ValueError(f"m2rnn: N, K and V must be at least 1, got `state` of shape {tuple(state.shape)}")
    _has_shape("qkv", qkv, ("B", "C"), {})
    B, C = qkv.shape
    v_channels = C - (num_q_heads + num_k_heads) * K
    if v_channels <= 0 or v_channels % V != 0:
        raise ValueError(
            f"m2rnn: `qkv` must have Nq·K + Nk·K + Nv·V channels with Nq = {num_q_heads}, Nk = {num_k_heads} and, from "
            f"`state`, K = {K} and V = {V}; got {C}, which leaves {v_channels} channels for v"
        )
    _has_shape("x_f", x_f, ("B", "Nf"), {"B": B})
    _has_shape("g", g, ("B", "Ng·V"), {"B": B})
    if g.shape[1] % V != 0:
        raise ValueError(f"m2rnn: `g` must have shape [B, Ng·V] with V = {V}, got shape {tuple(g.shape)}")
    _has_shape("W", W, ("Nw", "V", "V"), {"V": V})
    heads = dict(q=num_q_heads, k=num_k_heads, v=v_channels // V, f=x_f.shape[1], g=g.shape[1] // V, W=W.shape[0])
    for name, n in heads.items():
        if n < 1 or N % n != 0:
            raise ValueError(
                f"m2rnn: the head count of {name} ({n}) must divide N = {N}, the heads of `state`. Heads are shared by "
                "divisibility: head n of the result reads head n // (N / N_x) of input x."
            )
    _has_shape("A_log", A_log, ("Nf",), {"Nf": x_f.shape[1]})
    _has_shape("dt_bias", dt_bias, ("Nf",), {"Nf": x_f.shape[1]})
    _has_shape("D", D, ("N", "V"), {"N": N, "V": V})
    _has_shape("norm_weight", norm_weight, ("N·V",), {"N·V": N * V})
    _has_shape("conv_weight", conv_weight, ("C", "1", "width"), {"C": C, "1": 1})
    width = conv_weight.shape[2]
    if width == 0:
        raise ValueError("m2rnn: `conv_weight` must have at least one tap, got width = 0")
    _has_shape("conv_state", conv_state, ("slots", "width - 1", "C"), {"slots": slots, "width - 1": width - 1, "C": C})

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
    if state_indices is None:
        if slots != B:
            raise ValueError(
                f"m2rnn: without `state_indices` row b uses slot b, so the pool must have B = {B} slots, got {slots}; "
                "pass state_indices [B]"
            )
    else:
        if state_indices.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"m2rnn: `state_indices` must be int32 or int64, got {state_indices.dtype}; cast it with .to()"
            )
        _has_shape("state_indices", state_indices, ("B",), {"B": B})
    for name, x in tensors.items():
        if x.layout != torch.strided:
            raise TypeError(f"m2rnn: `{name}` must be dense, got layout {x.layout}; convert it with .to_dense()")
        if x.device != qkv.device:
            raise ValueError(
                f"m2rnn: all tensors must be on one device, got `qkv` on {qkv.device} and `{name}` on {x.device}; "
                f"move it with .to({str(qkv.device)!r})"
            )
    for name, x in {"conv_state": conv_state, "state": state}.items():
        if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
            raise ValueError(f"m2rnn: `{name}` is written in place and must not be an expanded tensor; .clone() it")
    return DecodeShape(B, N, K, V, C, width, slots)


def check_slot_values(slots: list[int], num_slots: int) -> None:
    """The values of `state_indices`, those of -1 left out: each a slot of the pool, none twice."""
    for slot in slots:
        if not 0 <= slot < num_slots:
            raise ValueError(
                f"m2rnn: `state_indices` must be slots of the pool, 0 to {num_slots - 1}, or -1 to skip a row, got "
                f"{slot}"
            )
    if len(set(slots)) != len(slots):
        raise ValueError(
            f"m2rnn: `state_indices` must name each slot at most once in a step, got {slots}; copy the slot for a "
            "second row that continues it"
        )
