# SPDX-License-Identifier: Apache-2.0
"""Fill Triton's cache with what fla's autotuner tries for Gated DeltaNet: one process takes two minutes over it.

Here several processes compile a share of the configurations each. Nothing is chosen: the run itself tunes at its own
sizes, on a GPU that is not busy, from the cache.

    FLA_CACHE_RESULTS=0 python3 bench/gpu_runs/warm_fla.py SHARE SHARES [ours] [B,H,K,V ...]

With `ours` as our mixer calls them (beta in fp32, the final state asked for: other kernels), else as users do.
Without sizes: those of A to D of `python -m bench op` and of the gate of `python -m bench.training`. The 410M models
want 4,3,256,512, and `examples/layer_swap.py --preset h200` 64,2,96,192 (training) and 16,2,96,192 (evaluation).
"""

import os
import sys

os.environ["FLA_CACHE_RESULTS"] = "0"  # before fla is imported: choices made on a busy GPU are not kept

import torch
import torch.nn.functional as F
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from triton.runtime.autotuner import Autotuner

from m2rnn_compile.layers.linear_recurrence import linear_rnn

# Some kernels are compiled for a batch size: A and D, B, C, the gate.
SIZES = ((8, 2, 256, 512), (4, 3, 256, 512), (1, 3, 256, 512), (2, 2, 256, 512))
T = 512


def autotuners() -> list[Autotuner]:
    """Of all modules of fla that are imported, below whatever decorators stand around them."""
    found = {}
    for name, module in list(sys.modules.items()):
        for x in list(vars(module).values()) if name.startswith("fla.") else []:
            while x is not None and not isinstance(x, Autotuner):
                x = getattr(x, "fn", None)
            if x is not None:
                found[id(x)] = x
    return list(found.values())


def main() -> None:
    share, shares = int(sys.argv[1]), int(sys.argv[2])
    ours = sys.argv[3:4] == ["ours"]
    sizes = [tuple(map(int, text.split(","))) for text in sys.argv[3 + ours :]] or SIZES
    for tuner in autotuners():
        tuner.configs = tuner.configs[share::shares] or tuner.configs[:1]
    for B, H, K, V in sizes:
        new = lambda *size: torch.randn(*size, device="cuda").bfloat16()
        q, k = (F.normalize(new(B, T, H, K).float(), dim=-1).bfloat16().requires_grad_() for _ in range(2))
        v, beta = new(B, T, H, V).requires_grad_(), new(B, T, H).sigmoid().detach().requires_grad_()
        g = (-0.2 * torch.rand(B, T, H, device="cuda")).requires_grad_()
        try:
            if ours:
                y = linear_rnn(q, k, v, g, beta, impl="fla").y
            else:
                y = chunk_gated_delta_rule(q, k, v, g, beta)[0]
            y.backward(torch.randn_like(y))
        except Exception as e:  # a share whose configurations all fail; the run will say more
            print("warm_fla", share, B, H, type(e).__name__, str(e)[:200], file=sys.stderr)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
