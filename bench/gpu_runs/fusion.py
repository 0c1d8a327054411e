# SPDX-License-Identifier: Apache-2.0
"""What `torch.compile` makes of a layer, setting by setting, and the kernels it is made of, at shape A.

    python -m bench.gpu_runs.fusion layer --out rows.jsonl      # settings of enable_fusion side by side
    python -m bench.gpu_runs.fusion kernels --out rows.jsonl    # parts of the inference path, launch configurations

`layer` writes, for inference and for a training step, one row a setting: times, peak memory, every kernel with its
time, and the sum of those that are neither scan nor matrix product. Beside them, where the authors' kernel can be
imported (`source bench/gpu_runs/peers.sh`), the layer of the same weights made of their op, conv1d and an eager tail.
It runs on a CPU too, for a small layer:
--device cpu --hidden 32 --heads 4 --shape 1,16 --budget 3
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2rnn_compile import M2RNN, enable_fusion

from ..environment import of_row
from ..providers import upstream
from ..providers.authors_layer import of_the_authors_op
from ..timing import CudaClock, Variant, clock_for, measure_interleaved

SETTINGS: dict[str, dict[str, Any]] = {
    "off": dict(enabled=False),
    "fused": dict(enabled=True),
    "fused, prologue": dict(enabled=True, prologue=True),
    "tail only": dict(enabled=True, conv=False),
}
AUTHORS = "authors' op, conv1d, eager tail"
HEAD_START_CYCLES = 20_000_000  # 10 ms: forward, the autograd engine and backward launch some 60 kernels from Python
PRODUCTS = ("nvjet", "gemm", "cutlass", "splitk")
SCANS = ("scan_forward", "scan_backward", "_m2rnn_")


def compiled_in(setting: str, layer: M2RNN, devices: tuple[str, ...]) -> Callable[[Tensor], Tensor]:
    """The layer, compiled at its first call; each call is under the setting, which is a guard of the compiled code."""

    @torch.compile(fullgraph=True, dynamic=False)
    def run(x: Tensor) -> Tensor:
        y: Tensor = layer(x)
        return y

    def call(x: Tensor) -> Tensor:
        enable_fusion(**{"devices": devices, **SETTINGS[setting]})
        return run(x)

    return call


def kernels_of(call: Callable[[], object]) -> list[tuple[str, float]]:
    """(name, µs) of all that ran on the GPU, in order."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [(e.name[:70], round(e.device_time, 1)) for e in sorted(events, key=lambda e: e.time_range.start)]


def layer_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    B, T = args.shape
    device, dtype = args.device, torch.bfloat16 if args.device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    layer = M2RNN(args.hidden, num_heads=args.heads, device=device, dtype=dtype)
    x = torch.randn(B, T, args.hidden, device=device, dtype=dtype)
    leaf, dy = x.clone().requires_grad_(), torch.randn_like(x)

    def inference(fn: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            return fn(x)

    def training(fn: Callable[[Tensor], Tensor]) -> Tensor:
        y = fn(leaf)
        torch.autograd.grad(y, [leaf, *layer.parameters()], dy)
        return y.detach()

    steps = {"inference": inference, "training": training}
    for kind, step in {kind: steps[kind] for kind in args.kinds}.items():
        torch._dynamo.reset()  # the functions share their code, and Dynamo limits how often it compiles one
        fns = {name: compiled_in(name, layer, (device.type,)) for name in args.settings}
        if upstream.why_not(device) is None:
            fns[AUTHORS] = functools.partial(of_the_authors_op, layer, scan=upstream.scan)
        results = {name: step(fn).float() for name, fn in fns.items()}
        base = results[args.settings[0]]
        variants = {name: functools.partial(functools.partial, step, fn) for name, fn in fns.items()}
        clock = CudaClock(device, HEAD_START_CYCLES) if device.type == "cuda" else clock_for(device)
        timings = measure_interleaved(variants, clock, runs=args.runs, min_runs=20, budget_s=args.budget)
        for name, fn in fns.items():
            row: dict[str, Any] = {
                "kind": f"layer, {kind}", "setting": name, "median_ms": timings[name].median_ms,
                "min_ms": timings[name].min_ms, "runs": len(timings[name].samples_ms),
                "differs": ((results[name] - base).norm() / base.norm()).item(), "from": args.settings[0],
            }  # fmt: skip
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step(fn)
                row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
                rows = kernels_of(functools.partial(step, fn))
                others = [us for n, us in rows if not any(word in n.lower() for word in (*PRODUCTS, *SCANS))]
                row |= {"kernels": rows, "launches": len(rows), "pointwise_ms": sum(others) / 1e3}
            yield row


def kernel_variants() -> Iterator[tuple[str, float, Callable[[], object]]]:
    """(name, MB read and written at least, call) at A: B8 T4096 N84 K64 V16, inputs as slices of one projection."""
    from m2rnn_compile.lowering import triton as lowering
    from m2rnn_compile.lowering.triton import conv, fused_inference, prologue
    from m2rnn_compile.lowering.triton.config import LaunchConfig
    from m2rnn_compile.lowering.triton.fused_tail import norm_kernel
    from m2rnn_compile.ops.fused import unpack

    B, T, N, K, V = 8, 4096, 84, 64, 16
    C, sizes = 2 * K + N * V, [1, 1, N, K, V]
    draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    x = draw(B, T, 2944)
    raw, x_f, g = x[..., :C], x[..., C : C + N], x[..., C + N : C + N + N * V].unflatten(-1, (N, V))
    weight, W = 0.5 * draw(C, 4), (torch.eye(V, device="cuda") + 0.1 * draw(N, V, V)).bfloat16()
    A_log, dt_bias, D, norm_weight = draw(N).float(), draw(N).float() - 3, draw(N, V), draw(N, V)
    q, k, v = unpack(conv.conv_silu(raw, weight, None), sizes)
    f = prologue.before_scan(None, None, x_f, A_log, dt_bias, "decay")[1]
    v_raw, unit = raw[..., 2 * K :].unflatten(-1, (N, V)), B * T * N * V * 2e-6
    taps = weight[2 * K :]
    yield "scan alone", 2 * unit, lambda: lowering.scan(q, k, v, f, W, None, None, None, 0)
    around: dict[str, tuple[Any, ...]] = {
        "scan, fused kernel with nothing": (v, None, None, None),
        "scan, tail": (v, None, D, g),
        "scan, conv, tail": (v_raw, taps, D, g),
    }

    def walk(v: Tensor, taps: Tensor | None, D: Tensor | None, g: Tensor | None, **options: Any) -> object:
        return fused_inference.walk(q, k, v, f, W, None, taps, D, g, None, "silu", "none", 1e-5, **options)

    for name, inputs in around.items():
        for shared in (True, False):
            how = "shared out" if shared else "whole"
            yield f"{name}, scans {how}", 3 * unit, functools.partial(walk, *inputs, shared=shared)
    warps4 = functools.partial(walk, v_raw, taps, D, g, config=LaunchConfig(64, 4))
    yield "scan, conv, tail, four warps", 3 * unit, warps4
    yield "fused_scan_conv", 5 * unit, lambda: fused_inference.fused_scan_conv(
        raw, weight, None, sizes, x_f, W, A_log, dt_bias, D, g, norm_weight, None, None, "decay", "silu", "all", 1e-5,
        torch.bfloat16,
    )  # fmt: skip
    o = draw(B, T, N, V)

    def norm(rows: int, warps: int) -> object:
        return norm_kernel[(B * T // rows,)](
            o, norm_weight, B * T, 1e-5, F=N * V, HAS_W=True, BF=2048, ROWS=rows, num_warps=warps
        )

    for rows in (1, 2, 4, 8):
        for warps in (1, 2, 4, 8):
            yield f"norm, rows {rows} warps {warps}", 2 * unit, functools.partial(norm, rows, warps)
    before = functools.partial(
        prologue.before_scan, raw[..., : 2 * K], weight[: 2 * K], x_f, A_log, dt_bias, "decay"
    )  # fmt: skip
    for steps in (8, 16, 32, 64):
        for warps in (2, 4, 8):
            mb = B * T * (8 * K + 6 * N) * 1e-6
            yield f"prologue, steps {steps} warps {warps}", mb, functools.partial(before, steps=steps, warps=warps)
    dy = draw(B, T, C)
    for channels, warps in ((128, 1), (256, 1), (256, 2), (512, 2), (512, 4), (1024, 4)):
        for steps in (16, 32, 64, 128):
            options: dict[str, Any] = dict(channels=channels, warps=warps, steps=steps)
            name, mb = ", ".join(f"{n} {i}" for n, i in options.items()), B * T * C * 2e-6
            yield f"conv, {name}", 2 * mb, functools.partial(conv.conv_silu, raw, weight, None, **options)
            backward = functools.partial(conv.conv_silu_backward, dy, raw, weight, None, **options)
            yield f"conv backward, {name}", 3 * mb, backward


def kernel_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows as they come, each timed by itself: times of kernels that the bytes explain need no interleaving."""
    copied = torch.empty(2**28, device="cuda", dtype=torch.bfloat16)
    other = torch.empty_like(copied)
    variants = [("copy", copied.nbytes * 2e-6, lambda: other.copy_(copied)), *kernel_variants()]
    for name, mb, call in variants:
        if args.only not in name:
            continue
        setup: dict[str, Variant] = {name: lambda call=call: call}  # type: ignore[misc]
        timing = measure_interleaved(setup, clock_for(args.device), runs=args.runs, min_runs=20, budget_s=args.budget)
        ms = timing[name].median_ms
        yield {"kind": "kernel", "name": name, "median_ms": ms, "min_ms": timing[name].min_ms,
               "runs": len(timing[name].samples_ms), "mb": mb, "tb_s": mb / ms / 1e3}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_runs.fusion", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["layer", "kernels"])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--settings", type=lambda text: text.split(";"), default=list(SETTINGS), metavar="A;B")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=["inference", "training"])
    parser.add_argument("--shape", type=lambda text: tuple(map(int, text.split(","))), default=(8, 4096), metavar="B,T")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=84)
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for one set of timings")
    parser.add_argument("--only", default="", help="of `kernels`: those whose name holds this")
    parser.add_argument("--commit", help="where the copy has no history")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    unknown = set(args.settings) - set(SETTINGS)
    if set(args.kinds) - {"inference", "training"}:
        parser.error(f"--kinds takes inference and training, got {','.join(args.kinds)}")
    if unknown:
        parser.error(f"unknown setting {', '.join(unknown)}; there are {'; '.join(SETTINGS)}")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; `layer --device cpu` runs anywhere")
    machine = of_row(args.device, args.commit)
    for row in (layer_rows if args.what == "layer" else kernel_rows)(args):
        line = json.dumps({**row, **machine})
        if args.out:
            with args.out.open("a") as file:
                file.write(line + "\n")
        print(json.dumps({k: x for k, x in row.items() if k != "kernels"}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
