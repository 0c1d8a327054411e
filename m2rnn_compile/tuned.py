# SPDX-License-Identifier: Apache-2.0
"""Opt-in tuning of the Triton kernels' launch configurations on the GPU at hand."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .lowering.triton.tuning import Timed

REPEATS = 20


def tune(
    *,
    B: int,
    N: int,
    K: int,
    V: int,
    T: int = 2048,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    backward: bool = True,
    state_grad_clip: float | None = 1.0,
    path: str | Path | None = None,
) -> list[Timed]:
    """Time every launch configuration of the scan's kernels for one kind of batch, use the fastest, keep it on disk.

    The pinned configurations are good at the shapes of docs/kernel-notes.md; on another GPU or at other sizes one of
    the others may be faster. Every candidate is compared with the pinned one before it is timed. What is found holds
    for this process from here on, at any T, and for later ones that call `load_tuned`. Another split of rows adds in
    another order: results change in their last bits.

    Args:
        B, N, K, V: sequences and heads of a batch, rows and columns of the state, as calls to come will have them.
        T: steps of the trial runs; long enough that launches do not count.
        dtype: of q, k, v and W.
        backward: also the backward kernel.
        state_grad_clip: of the trial runs.
        path: the file; by default one in the cache folder, named by GPU model, Triton and kernel version.

    Returns:
        A row for every candidate: direction, configuration, median ms of 20 runs, why it was left out, whether chosen.

    Raises:
        ValueError: no CUDA device, or sizes that the kernels do not take.
    """
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        got = f"{str(device)!r}" + ("" if torch.cuda.is_available() else ", and this machine has none")
        raise ValueError(f"tune: device must be a CUDA device, got {got}; on a CPU there is nothing to tune")
    for name, value in dict(B=B, N=N, K=K, V=V, T=T).items():
        if value < 1:
            raise ValueError(f"tune: {name} must be at least 1, got {value}")
    from .lowering import triton as lowering
    from .lowering.triton import tuning
    from .testing import make_inputs

    x = make_inputs(B, T, N, K, V, dtype=dtype, device=device, state_grad_clip=state_grad_clip)
    arguments = (x.q, x.k, x.v, x.f, x.W, None, None)
    reason = lowering.unsupported(*arguments)
    if reason is not None:
        raise ValueError(f"tune: {reason}")
    rows: list[Timed] = []
    pinned, kernel = lowering.pinned_config("forward", x.q, x.k, x.v, x.f, x.W, 64)
    first = lowering.scan(*arguments, state_grad_clip, 64, config=pinned)
    rows += tuning.choose(
        "forward", tuning.candidates("forward", K, V, kernel), pinned,
        lambda c: lowering.scan(*arguments, state_grad_clip, 64, config=c), _measure, lambda got: _differs(got, first),
    )  # fmt: skip
    if backward:
        pinned, kernel = lowering.pinned_config("backward", x.q, x.k, x.v, x.f, x.W, 64)

        def undo(config: lowering.LaunchConfig) -> tuple[Tensor, ...]:
            return lowering.scan_backward(
                x.dy, x.dfinal_state, *arguments, first[2], state_grad_clip, 64, config=config
            )

        gradients = undo(pinned)
        rows += tuning.choose(
            "backward", tuning.candidates("backward", K, V, kernel), pinned, undo, _measure,
            lambda got: _differs(got, gradients),
        )  # fmt: skip
    tuning.keep(rows, dtype, B * N, K, V)
    tuning.save(Path(path) if path is not None else tuning.default_path(torch.cuda.get_device_name(device)))
    return rows


def load_tuned(path: str | Path | None = None, *, device: torch.device | str = "cuda") -> int:
    """Use what `tune` found earlier on this GPU model with this Triton and these kernels; returns how many it were.

    Raises:
        FileNotFoundError: nothing was tuned yet. ValueError: the file is damaged, or there is no CUDA device.
    """
    if path is None and not torch.cuda.is_available():
        raise ValueError("load_tuned: no CUDA device is there, whose model names the file; give path=")
    from .lowering.triton import tuning

    where = Path(path) if path is not None else tuning.default_path(torch.cuda.get_device_name(torch.device(device)))
    if not where.exists():
        raise FileNotFoundError(f"load_tuned: {where} is not there; call m2rnn_compile.tune(...) once on this machine")
    return tuning.load(where)


def _measure(run: Callable[[], object]) -> float:
    """Median ms, launches hidden behind a wait of the GPU."""
    times = []
    for _ in range(REPEATS + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def _differs(got: object, want: tuple[Tensor, ...]) -> str | None:
    """Why `got` is not what the pinned configuration gave, up to the rounding of sums in another order."""
    assert isinstance(got, tuple)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if i == 2 and len(want) == 3:
            continue  # checkpoints: 16-bit states, looked at through backward
        error = (a.double() - b.double()).norm()
        bound = 8 * torch.finfo(a.dtype if a.dtype != torch.float32 else torch.bfloat16).eps * b.double().norm()
        if not bool(error <= bound):
            return f"result {i} differs by {float(error):.3g}, more than {float(bound):.3g}"
    return None
