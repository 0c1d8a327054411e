# SPDX-License-Identifier: Apache-2.0
"""How fast the hardware could go at best: a documented lower bound for a pass, to report measurements against.

Four resources bound a pass; its floor is the largest of the four, since they can overlap at best entirely:

tanh
    Transcendental functions (tanh, sigmoid, exp), on the special-function unit: 16 a cycle and SM, in fp32 and in
    packed half alike. (Evaluating a share of them by polynomial on the FMA pipes could go below this.)
matrix products
    Multiply-adds. M²RNN, per state element and step, forward: V for H W, 1 each for k vᵀ, the blend and qᵀ H. Backward:
    V each for the recomputed H W, for dU Wᵀ and for dW = Hᵀ dU, and 8 single ones (k vᵀ, blend, q dyᵀ, dq, df, dk, dv,
    f D).
memory
    Every input read once and every output written once, at the device's copy bandwidth.
sequential
    Steps that wait for each other, of 100 cycles each on a GPU: the latency of product → tanh → blend → convert, at its
    low end.

Backward recomputes the states from checkpoints chunk by chunk. Chunks are independent, so the recomputation adds to the
first three and not to the sequential chain. The floor of forward+backward is the sum of the two passes' floors.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from pathlib import Path

import torch

from .shapes import Shape

STEP_CYCLES = 100
MODES = ("inference", "forward", "backward", "forward+backward")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclasses.dataclass(frozen=True)
class Work:
    """What one pass has to do at least: transcendentals, floating-point operations, bytes moved, dependent steps."""

    tanh: float
    flops: float
    bytes: float
    steps: int

    def __add__(self, other: Work) -> Work:
        return Work(
            self.tanh + other.tanh, self.flops + other.flops, self.bytes + other.bytes, self.steps + other.steps
        )


@dataclasses.dataclass(frozen=True)
class Device:
    """What a device can do."""

    name: str
    tanh_per_s: float
    half_flops: float  # bf16 and fp16 matrix products with fp32 accumulation
    fp32_flops: float  # IEEE fp32
    bytes_per_s: float
    step_s: float


def _gpu(name: str, sms: int, clock_hz: float, fp32_lanes: int, *, half_flops: float, bytes_per_s: float) -> Device:
    return Device(
        name, sms * 16 * clock_hz, half_flops, sms * fp32_lanes * 2 * clock_hz, bytes_per_s, STEP_CYCLES / clock_hz
    )


# half_flops is an assumption, the rate behind an estimate of 0.15 ms for the 0.107 TFLOP of shape A: three quarters of
# the data sheet (989 TFLOP/s; A100: 312). bytes_per_s counts reads and writes: measured by a copy on an H200, nine
# tenths of the data sheet on the others.
H200 = _gpu("H200", 132, 1.98e9, 128, half_flops=733e12, bytes_per_s=4.2e12)
H100 = _gpu("H100 80GB HBM3", 132, 1.98e9, 128, half_flops=733e12, bytes_per_s=3.0e12)
A100 = _gpu("A100-SXM4-80GB", 108, 1.41e9, 64, half_flops=234e12, bytes_per_s=1.8e12)
DEVICES = (H200, H100, A100)

# A CPU core with AVX: two FMA pipes of 8 (AVX2) or 16 (AVX-512) fp32 lanes. A tanh costs at least about 12 of
# their instructions (a rational or exponential form with its division), a dependent step at least about 60 cycles
# (a short chain of FMAs of 4 cycles each, then the tanh).
CPU_TANH_INSTRUCTIONS = 12
CPU_STEP_CYCLES = 60


def _copy_bandwidth() -> float:
    """Bytes read and written per second by the fastest of five copies of 64 MiB."""
    source = torch.ones(64 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


@functools.cache
def host(threads: int) -> Device | None:
    """Estimated figures of this machine's CPU with so many threads; None where its clock or its width is unknown."""
    lanes = {"AVX2": 8, "AVX512": 16}.get(torch.backends.cpu.get_cpu_capability())
    try:
        match = re.search(r"^cpu MHz\s*:\s*([\d.]+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    if lanes is None or match is None:
        return None
    clock = float(match[1]) * 1e6
    instructions = threads * 2 * lanes * clock
    return Device(
        "CPU",
        instructions / CPU_TANH_INSTRUCTIONS,
        2 * instructions,
        2 * instructions,
        _copy_bandwidth(),
        CPU_STEP_CYCLES / clock,
    )


def find_device(name: str) -> Device | None:
    """The figures of the card whose name contains one that is known, else None: no floor is guessed."""
    return next((device for device in DEVICES if device.name in name), None)


def device_at_hand(device: torch.device) -> Device | None:
    """Figures of a torch device, or None where none are known."""
    if device.type == "cuda":
        return find_device(torch.cuda.get_device_name(device))
    return host(torch.get_num_threads())


@dataclasses.dataclass(frozen=True)
class Floor:
    """Lower bounds in milliseconds; `total` is the bound of the pass and `bound` names what sets it."""

    tanh: float
    matmul: float
    memory: float
    sequential: float

    @property
    def bound(self) -> str:
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]

    @property
    def total(self) -> float:
        return max(dataclasses.astuple(self))


def floor_of(work: Work, dtype: str, device: Device) -> Floor:
    """Bounds of one pass."""
    flops_per_s = device.half_flops if BYTES[dtype] == 2 else device.fp32_flops
    return Floor(
        tanh=1e3 * work.tanh / device.tanh_per_s,
        matmul=1e3 * work.flops / flops_per_s,
        memory=1e3 * work.bytes / device.bytes_per_s,
        sequential=1e3 * work.steps * device.step_s,
    )


def work_of_mode(work: dict[str, Work], mode: str) -> list[Work]:
    """The passes that a mode runs one after the other, from what "forward", "backward" and others have to do."""
    if mode in work:
        return [work[mode]]
    if mode == "inference":
        return [work["forward"]]
    passes = ("forward", "backward", "optimizer") if mode == "train" else ("forward", "backward")
    return [work[name] for name in passes]


def floor_of_mode(work: dict[str, Work], dtype: str, mode: str, device: Device | None) -> tuple[float, str] | None:
    """(milliseconds, what sets it), or None where no figures of the device are known."""
    if device is None or dtype == "float64" or not work:
        return None
    floors = [floor_of(part, dtype, device) for part in work_of_mode(work, mode)]
    return sum(floor.total for floor in floors), ", ".join(dict.fromkeys(floor.bound for floor in floors))


def scan_work(shape: Shape, dtype: str) -> dict[str, Work]:
    """Forward and backward of the M²RNN scan. f is fp32. Backward reads the inputs and dy, writes every gradient."""
    itemsize = BYTES[dtype]
    per_token = (shape.Nq + shape.Nk) * shape.K * itemsize + shape.Nv * shape.V * itemsize + shape.Nf * 4
    inputs = shape.B * shape.T * per_token + shape.Nw * shape.V * shape.V * itemsize
    outputs = shape.B * shape.T * shape.N * shape.V * itemsize
    elements = shape.B * shape.T * shape.N * shape.K * shape.V
    return {
        "forward": Work(elements, 2 * elements * (shape.V + 3), inputs + outputs, shape.T),
        "backward": Work(elements, 2 * elements * (3 * shape.V + 8), 2 * inputs + outputs, shape.T),
    }


def step_work(shape: Shape, dtype: str) -> dict[str, Work]:
    """One decoding step: the state is read and written in fp32, and so is everything else once."""
    itemsize, states = BYTES[dtype], shape.B * shape.N * shape.K * shape.V
    token = (shape.Nq + shape.Nk) * shape.K + (shape.Nv + shape.N) * shape.V
    moved = 2 * 4 * states + shape.B * (token * itemsize + 4 * shape.Nf) + shape.Nw * shape.V**2 * itemsize
    return {"forward": Work(states, 2 * states * (shape.V + 3), moved, 1)}


def attention_work(shape: Shape, heads: int, dim: int, dtype: str) -> dict[str, Work]:
    """Causal softmax attention over the shape's tokens: scores below the diagonal; no chain over time."""
    elements = shape.B * shape.T * heads * dim
    half = shape.B * heads * shape.T * (shape.T + 1) / 2
    itemsize = BYTES[dtype]
    return {
        "forward": Work(half, 4 * half * dim, itemsize * 4 * elements, 1),
        "backward": Work(half, 10 * half * dim, itemsize * 7 * elements, 1),
    }


def layer_work(mixer: dict[str, Work], tokens: int, width: int, weights: int, dtype: str) -> dict[str, Work]:
    """A mixer between projections of so many weights: only x, y and the weights need to be in memory."""
    x, itemsize = tokens * width, BYTES[dtype]
    dense = {
        "forward": Work(0, 2.0 * tokens * weights, itemsize * (2 * x + weights), 0),
        "backward": Work(0, 4.0 * tokens * weights, itemsize * (3 * x + 2 * weights), 0),
    }
    return {name: dense[name] + dataclasses.replace(mixer[name], bytes=0) for name in dense}
