# SPDX-License-Identifier: Apache-2.0
"""A compiled training step of an M²RNN layer, in fifteen lines: python examples/train_step.py"""

import torch

from m2rnn_compile import M2RNN
from m2rnn_compile.layers import param_groups

torch.manual_seed(0)
layer = M2RNN(64, num_heads=4, key_dim=16, value_dim=16)  # N = 4 states of 16 x 16 for each sequence
compiled = torch.compile(layer, fullgraph=True)  # the scan stays one op; everything around it is fused
optimizer = torch.optim.AdamW(param_groups(layer, weight_decay=0.1), lr=1e-2)

x_BTD = torch.randn(8, 128, 64)
target_BTD = x_BTD.cumsum(1).tanh()  # needs memory: a running sum
for step in range(101):
    loss = (compiled(x_BTD) - target_BTD).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step:3d}  loss {loss.item():.4f}")
