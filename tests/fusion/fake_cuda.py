# SPDX-License-Identifier: Apache-2.0
"""What Inductor generates for a GPU, on a machine without one: python -m tests.fusion.fake_cuda {on,off,tail,broken}

Tensors are fake and on "cuda"; torch.cuda says H200; Triton's driver has a target and no device. The wrapper's code and
the scheduler's byte counts are printed as JSON instead of being loaded. Inference only: the autograd engine asks the
accelerator itself. Leans on private parts of torch 2.13; run in a process of its own, which is of no use afterwards.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

# FakeTensor indexing asks for a device guard, which a CPU build has none of for CUDA.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>) }
"""
H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=140 * 2**30, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=60 * 2**20, gcnArchName="", uuid="",
)  # fmt: skip


class Target:
    """Enough of a Triton driver for code to be generated for it."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def pretend() -> None:
    import torch._dynamo
    import torch._inductor.compile_fx
    import torch._inductor.fx_passes.joint_graph as joint
    import torch._inductor.fx_passes.post_grad as post
    import triton

    root = Path(torch.__file__).parent
    folder = Path(tempfile.mkdtemp())
    (folder / "guard.cpp").write_text(GUARD)
    library = str(folder / "guard.so")
    options = ["-std=c++20", "-w", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}"]
    subprocess.run(["g++", *options, str(folder / "guard.cpp"), "-o", library, "-lc10"], check=True)
    ctypes.CDLL(library)
    triton.runtime.driver.set_active(Target())
    rng = torch.zeros(16, dtype=torch.uint8)
    cuda: Any = torch.cuda
    cuda.is_available, cuda.is_initialized = (lambda: True), (lambda: False)
    cuda.device_count, cuda.current_device = (lambda: 1), (lambda: 0)
    cuda.get_device_properties = cuda._get_device_properties = lambda d=None: H200
    cuda.get_device_capability, cuda.get_device_name = (lambda d=None: (9, 0)), (lambda d=None: H200.name)
    cuda.get_rng_state, cuda.set_rng_state = (lambda *a: rng), (lambda *a, **k: None)
    cuda._lazy_init, cuda.set_device, cuda.synchronize = (lambda: None), (lambda d: None), (lambda d=None: None)
    cuda._exchange_device = lambda i: 0
    cuda._maybe_exchange_device = lambda i: 0  # Dynamo wants it to be another function
    # Patterns for attention and mm + mm are traced on real tensors.
    joint.lazy_init = post.lazy_init = lambda *a, **k: None  # type: ignore[assignment]


def generated(model: nn.Module, *shape: int) -> dict[str, Any]:
    """Kernels in order of launch, and MB moved by each node of the schedule, for `model(x)` in bf16."""
    import torch._inductor.config as config
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: dict[str, Any] = {}

    class Done(Exception):
        pass

    def capture(self: GraphLowering) -> Any:
        wrapper, _ = self.codegen()  # type: ignore[misc]
        code = wrapper.value if hasattr(wrapper, "value") else wrapper
        body = code[code.index("def call(") :]
        launches = re.findall(r"(triton_\w+?)\.run\(|(extern_kernels\.\w+)\(|torch\.ops\.(m2rnn\.\w+)\.default\(", body)
        total, by_node, _ = self.count_bytes()
        named = [next(filter(None, names)) for names in launches]
        found["launches"] = [re.sub(r"^(triton_[a-z]+)_.*$", r"\1", n) for n in named]
        found["inductor_mb"] = round(sum(b for n, b in by_node if "Extern" not in type(n).__name__) / 1e6)
        found["total_mb"] = round(total / 1e6)
        buffers = re.findall(r"empty_strided_cuda\(\((.*?)\), \(.*?\), torch\.(\w+)\)", body)
        found["buffers"] = [f"{dtype}[{size}]" for size, dtype in buffers]
        raise Done

    GraphLowering.compile_to_module = capture  # type: ignore[method-assign]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for module in model.modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    fake = torch.empty(p.shape, dtype=p.dtype, device="cuda")
                    module._parameters[name] = nn.Parameter(fake)
        x = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        with config.patch(force_disable_caches=True, compile_threads=1):
            try:
                torch.compile(model, fullgraph=True)(x)
            except Exception as e:
                if not found:
                    raise RuntimeError("no code was generated") from e
    return found


def main(mode: str) -> None:
    from m2rnn_compile import M2RNN, enable_fusion
    from m2rnn_compile.lowering.inductor import match

    pretend()
    enable_fusion(mode != "off", conv=mode == "on")
    if mode == "broken":  # a seeded fault: the gate is not recognised any more
        match._Tail.multiply_gate = lambda self, at, flat: False  # type: ignore[method-assign]
    layer = M2RNN(1024, num_heads=84, device="meta", dtype=torch.bfloat16)
    print(json.dumps(generated(layer, 8, 4096, 1024)))


if __name__ == "__main__":
    main(sys.argv[1])
