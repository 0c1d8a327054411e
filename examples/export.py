# SPDX-License-Identifier: Apache-2.0
"""Export a layer with dynamic batch and time, load it again, compare: python examples/export.py"""

import tempfile
from pathlib import Path

import torch

from m2rnn_compile import M2RNN  # whoever loads the file imports m2rnn_compile too: it registers the op

torch.manual_seed(0)
layer = M2RNN(32, num_heads=4, key_dim=8, value_dim=8).eval()
shapes = {"x": {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}}
with torch.inference_mode():  # an inference graph: no checkpoints for a backward
    program = torch.export.export(layer, (torch.randn(2, 16, 32),), dynamic_shapes=shapes)
print([str(node.target) for node in program.graph.nodes if "m2rnn" in str(node.target)])

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "layer.pt2")
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
for shape in ((1, 1, 32), (3, 200, 32)):
    x = torch.randn(shape)
    with torch.inference_mode():
        print(shape, "max abs difference:", float((loaded(x) - layer(x)).abs().max()))
