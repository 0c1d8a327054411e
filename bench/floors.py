# SPDX-License-Identifier: Apache-2.0
"""How fast the hardware could go at best: a documented lower bound for the scan, to report measurements against.

Four resources bound a scan; the floor of a pass is the largest of the four, since they can overlap at best entirely:

tanh
    One per state element and step, on the special-function unit: 16 a cycle and SM, in fp32 and in packed half alike.
    (Evaluating a share of them by polynomial on the FMA pipes could go below this.)
matrix products
    Multiply-adds per state element and step. Forward: V for H W, 1 each for k vᵀ, the blend and qᵀ H. Backward: V each
    for the recomputed H W, for dU Wᵀ and for dW = Hᵀ dU, and 8 single ones (k vᵀ, blend, q dyᵀ, dq, df, dk, dv, f D).
memory
    Every input read once and every output written once, at the card's copy bandwidth.
sequential
    T steps, one after the other, of 100 cycles each: the latency of product → tanh → blend → convert, at its low end.

Backward recomputes the states from checkpoints chunk by chunk. Chunks are independent, so the recomputation adds to the
first three and not to the sequential chain. The floor of forward+backward is the sum of the two passes' floors.
"""

from __future__ import annotations

import dataclasses

from .shapes import Shape

STEP_CYCLES = 100
PASSES = ("inference", "forward", "forward+backward")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclasses.dataclass(frozen=True)
class Device:
    """What a card can do per second."""

    name: str
    sms: int
    clock_hz: float
    tanh_per_cycle_sm: int
    half_flops: float  # bf16 and fp16 matrix products with fp32 accumulation
    fp32_flops: float  # IEEE fp32 on the FMA pipes
    bytes_per_s: float


# 132 SMs at 1.98 GHz. half_flops is an assumption, the rate behind an estimate of 0.15 ms for the 0.107 TFLOP
# of shape A: three quarters of the data sheet's 989 TFLOP/s. fp32: 128 lanes an SM, two operations each. bytes_per_s is
# a measured copy, reads plus writes.
H200 = Device("H200", 132, 1.98e9, 16, 733e12, 132 * 128 * 2 * 1.98e9, 4.2e12)
DEVICES = (H200,)


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


def find_device(name: str) -> Device | None:
    """The figures of the card whose name contains one that is known, else None: no floor is guessed."""
    return next((device for device in DEVICES if device.name in name), None)


def _bytes(shape: Shape, itemsize: int) -> tuple[int, int]:
    """(bytes of q, k, v, f, W; bytes of y). f is fp32."""
    per_token = (shape.Nq + shape.Nk) * shape.K * itemsize + shape.Nv * shape.V * itemsize + shape.Nf * 4
    inputs = shape.B * shape.T * per_token + shape.Nw * shape.V * shape.V * itemsize
    return inputs, shape.B * shape.T * shape.N * shape.V * itemsize


def forward_floor(shape: Shape, dtype: str, device: Device = H200) -> Floor:
    """Bounds of the forward pass."""
    inputs, outputs = _bytes(shape, BYTES[dtype])
    return _floor(shape, dtype, device, fmas=shape.V + 3, moved=inputs + outputs)


def backward_floor(shape: Shape, dtype: str, device: Device = H200) -> Floor:
    """Bounds of the backward pass: reads the inputs and dy, writes a gradient for every input."""
    inputs, outputs = _bytes(shape, BYTES[dtype])
    return _floor(shape, dtype, device, fmas=3 * shape.V + 8, moved=2 * inputs + outputs)


def _floor(shape: Shape, dtype: str, device: Device, *, fmas: int, moved: int) -> Floor:
    elements = shape.B * shape.T * shape.N * shape.K * shape.V
    flops_per_s = device.half_flops if BYTES[dtype] == 2 else device.fp32_flops
    return Floor(
        tanh=1e3 * elements / (device.sms * device.tanh_per_cycle_sm * device.clock_hz),
        matmul=1e3 * 2 * elements * fmas / flops_per_s,
        memory=1e3 * moved / device.bytes_per_s,
        sequential=1e3 * shape.T * STEP_CYCLES / device.clock_hz,
    )


def floor_of_pass(shape: Shape, dtype: str, which: str, device: Device | None) -> tuple[float, str] | None:
    """(milliseconds, what sets it) for one of `PASSES`, or None where no figures of the device are known."""
    if device is None or dtype == "float64":
        return None
    forward = forward_floor(shape, dtype, device)
    if which != "forward+backward":
        return forward.total, forward.bound
    backward = backward_floor(shape, dtype, device)
    bound = forward.bound if forward.bound == backward.bound else f"{forward.bound}, {backward.bound}"
    return forward.total + backward.total, bound
