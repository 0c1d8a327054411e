# SPDX-License-Identifier: Apache-2.0
"""Compile a scan's kernels before the first batch needs them, for instance before a server takes requests."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import explain_impl, m2rnn
from .ops.scan import DEFAULT_CHUNK

LENGTH = 8  # steps of the trial runs: launch configurations and compiled kernels do not depend on T


def run_windows(inputs: tuple[Tensor | None, ...], state_grad_clip: float | None) -> None:
    """Backward of packed sequences whose partial sums fill more than one window, which is a kernel of its own.

    A batch that needs it by itself would be far longer than a trial run.
    """
    from .lowering.triton import scan, scan_backward

    y, final_state, checkpoints = scan(*inputs, state_grad_clip, DEFAULT_CHUNK)  # type: ignore[arg-type]
    scan_backward(y, final_state, *inputs, checkpoints, state_grad_clip, DEFAULT_CHUNK, window_bytes=1)  # type: ignore[arg-type]


def warmup(
    *,
    B: int,
    N: int,
    K: int,
    V: int,
    Nq: int = 1,
    Nk: int = 1,
    Nv: int | None = None,
    Nf: int | None = None,
    Nw: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    initial_state: bool = False,
    packed: bool = False,
    backward: bool = True,
    state_grad_clip: float | None = None,
    impl: str = "auto",
) -> None:
    """Run `m2rnn` on a few steps of random input, so that what it needs at any T is compiled.

    Args:
        B: sequences of a batch; with `packed`, sequences packed along time.
        N: heads of the result; Nv, Nf and Nw default to it, Nq and Nk to 1, as in the paper's models.
        K, V: rows and columns of the state.
        dtype: of q, k, v and W; f is fp32.
        device: where; on a CPU this builds the C++ kernel.
        initial_state, packed, state_grad_clip: as the calls to come will have them: each is a kernel of its own. With
            `packed`, those for `cu_seqlens` in int32 and in int64, and those for batches of any length.
        backward: with gradients (training). Without, the kernels of inference only.
        impl: as in `m2rnn`.

    The random-number generators of torch are left as they were.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    length = max(LENGTH, DEFAULT_CHUNK // B + 1) if packed else LENGTH  # packed, more than a chunk in all
    batch, T = (1, B * length) if packed else (B, length)
    leaves = [
        random(batch, T, Nq, K).to(dtype),
        random(batch, T, Nk, K).to(dtype),
        random(batch, T, Nv or N, V).to(dtype),
        random(batch, T, Nf or N),
        random(Nw or N, V, V).to(dtype) / V,
    ]
    q, k, v, f, W = (x.requires_grad_(backward) for x in leaves)
    h0 = random(B, N, K, V) if initial_state else None
    for index in (torch.int32, torch.int64) if packed else (None,):
        cu_seqlens = torch.arange(0, T + 1, length, dtype=index, device=device) if packed else None
        with torch.set_grad_enabled(backward):
            y, final_state = m2rnn(
                q, k, v, f, W, initial_state=h0, cu_seqlens=cu_seqlens, state_grad_clip=state_grad_clip, impl=impl
            )
            if backward:
                assert final_state is not None
                torch.autograd.grad(y.float().sum() + final_state.sum(), (q, k, v, f, W))
        if packed and backward:
            choice = explain_impl(q, k, v, f, W, initial_state=h0, cu_seqlens=cu_seqlens, impl=impl)
            if choice.impl == "triton":
                with torch.no_grad():
                    run_windows((q, k, v, f, W, h0, cu_seqlens), state_grad_clip)
