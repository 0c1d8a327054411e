# SPDX-License-Identifier: Apache-2.0
"""`python -m bench info`: the block to paste into a bug report."""

from __future__ import annotations

import os
import platform
import shutil

import torch

from . import environment
from .providers import PROVIDERS

PACKAGES = (
    "triton",
    "rich",
    "numpy",
    "safetensors",
    "flash-linear-attention",
    "mamba-ssm",
    "transformers",
    "matplotlib",
)


def facts() -> dict[str, str]:
    """Name → value, in the order of the block."""
    result = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}, cuDNN {torch.backends.cudnn.version()})",
        "cpu": f"{environment.cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "c++": shutil.which(os.environ.get("CXX", "c++")) or "none",
        "git": environment.revision(),
        "sources": environment.source_hash()[:16],
    }
    for package in PACKAGES:
        result[package] = environment.version(package) or "not installed"
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        result[f"gpu {index}"] = (
            f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, {p.total_memory / 2**30:.0f} GiB"
        )
    if not torch.cuda.is_available():
        result["gpu"] = "none (torch.cuda.is_available() is False)"
    fields = (
        "driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit,temperature.gpu,persistence_mode"
    )
    for index, values in enumerate(environment.nvidia_smi(fields)):
        named = zip(fields.split(","), values, strict=False)
        result[f"nvidia-smi {index}"] = ", ".join(f"{name} {value}" for name, value in named)
    for name, folder in environment.cache_folders().items():
        result[f"cache: {name}"] = folder
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for provider in PROVIDERS:
        reason = provider.why_not(device)
        result[f"provider {provider.name}"] = f"{provider.about}: " + (f"missing, {reason}" if reason else "available")
    return result


def block() -> str:
    """Aligned lines, without colour: it is meant to be pasted."""
    values = facts()
    width = max(map(len, values))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in values.items())
