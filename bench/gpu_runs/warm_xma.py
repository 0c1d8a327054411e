# SPDX-License-Identifier: Apache-2.0
"""Fill Triton's cache with what the authors' autotuner tries: it compiles 72 kernels, one after the other, for minutes.

Here several processes compile a share each, at T 64; the run itself tunes anew at its own sizes, from the cache.

    python3 bench/gpu_runs/warm_xma.py SHARE SHARES
"""

import sys

import torch
from xma.layers.m2rnn.op import m2rnn
from xma.layers.m2rnn.triton_implementation import backward, forward

share, shares = int(sys.argv[1]), int(sys.argv[2])
kernels = (
    forward._m2rnn_forward_triton_kernel,
    forward._m2rnn_forward_no_output_triton_kernel,
    backward._m2rnn_backward_triton_kernel,
)
for kernel in kernels:
    kernel.configs = kernel.configs[share::shares]
for B, N, V in ((8, 84, 16), (8, 16, 64), (1, 132, 16)):  # A, D, C
    for kernel in kernels:
        kernel.cache.clear()
    new = lambda *size: torch.randn(*size, device="cuda").bfloat16().requires_grad_()
    f = torch.rand(B, 64, N, device="cuda").bfloat16().requires_grad_()
    try:
        y, _ = m2rnn(new(B, 64, 1, 64), new(B, 64, 1, 64), new(B, 64, N, V), new(N, V, V), f, None, 1.0)
        y.backward(torch.randn_like(y))
    except Exception as e:  # a share whose configurations all fail; the run will say more
        print("warm_xma", share, (B, N, V), type(e).__name__, str(e)[:200], file=sys.stderr)
torch.cuda.synchronize()
