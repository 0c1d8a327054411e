# SPDX-License-Identifier: Apache-2.0
"""What Inductor generates for a training step of the layer: python -m tests.fusion.training_code MODE

MODE is on, off, or a key of CHANGES.

For a CPU, because the autograd engine of fake CUDA tensors asks for an accelerator (see `fake_cuda.py`); what is fused
with what is decided before the device's code is written. Tensors are fake, so the released 410M model's layer at
B8 T4096 takes no memory. Launches, buffers and the scheduler's byte counts of the forward and the backward graph are
printed as JSON instead of being compiled. Leans on private parts of torch 2.13; run in a process of its own.
"""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


class Done(Exception):
    pass


def generated(model: nn.Module, *shape: int) -> list[dict[str, Any]]:
    """Kernels in order of launch, buffers, and MB moved by Inductor's own kernels: forward, then backward, in bf16."""
    import torch._functorch.config as functorch
    import torch._inductor.config as config
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: list[dict[str, Any]] = []

    def capture(self: GraphLowering) -> Any:
        wrapper, _ = self.codegen()  # type: ignore[misc]
        code = wrapper.value if hasattr(wrapper, "value") else wrapper
        body = code[code.rindex("def call(") :]
        launches = re.findall(r"(cpp_fused)_\w+\(|(extern_kernels\.\w+)\(|torch\.ops\.(m2rnn\.\w+)\.default\(", body)
        total, by_node, _ = self.count_bytes()
        buffers = re.findall(r"empty_strided_cpu\(\((.*?)\), \(.*?\), torch\.(\w+)\)", body)
        found.append(
            dict(
                launches=[next(filter(None, names)) for names in launches],
                buffers=[f"{dtype}[{size}]" for size, dtype in buffers],
                inductor_mb=round(sum(b for n, b in by_node if "Extern" not in type(n).__name__) / 1e6),
                total_mb=round(total / 1e6),
            )
        )
        if len(found) == 2:
            raise Done
        return SimpleNamespace(call=lambda arguments: None, __file__=__file__, __path__=None, __name__="nothing")

    GraphLowering.compile_to_module = capture  # type: ignore[method-assign]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype))
        x = torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
        with (
            config.patch(force_disable_caches=True, compile_threads=1),
            functorch.patch(force_non_lazy_backward_lowering=True),
        ):
            try:
                torch.compile(model, fullgraph=True)(x)
            except Exception as e:
                if len(found) < 2:
                    raise RuntimeError(f"{len(found)} of 2 graphs were generated") from e
    return found


def _no_gate() -> None:
    """A seeded fault: the gate is not recognised any more."""
    from m2rnn_compile.lowering.inductor import match

    match._Tail.multiply_gate = lambda self, at, flat: False  # type: ignore[method-assign]


def _apart() -> None:
    """Another: nor that all of it is of one projection."""
    from m2rnn_compile.lowering.inductor import rewrite

    rewrite.match_projection = lambda m, conv: "seeded"


def _narrow() -> None:
    """No fault: a projection of 2900 columns, as of a layer that does not pad it; the rewrite pads as on a GPU."""
    from m2rnn_compile.layers import m2rnn
    from m2rnn_compile.lowering.inductor import pad_projection

    m2rnn.PROJECTION_MULTIPLE = 1  # type: ignore[misc]
    pad_projection.wants_padding = lambda x: x.shape[-1] % 8 != 0


CHANGES = {"no gate": _no_gate, "apart": _apart, "narrow": _narrow}


def main(mode: str) -> None:
    from m2rnn_compile import M2RNN, enable_fusion

    enable_fusion(mode != "off", conv=True, devices=("cpu",))
    CHANGES.get(mode, lambda: None)()
    layer = M2RNN(1024, num_heads=84, device="meta", dtype=torch.bfloat16)
    print(json.dumps(generated(layer, 8, 4096, 1024)))


if __name__ == "__main__":
    main(sys.argv[1])
