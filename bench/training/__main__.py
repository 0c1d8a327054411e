# SPDX-License-Identifier: Apache-2.0
"""The command: phases under one time budget, a JSON line for everything as soon as it is known."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from m2rnn_compile.layers import linear_recurrence
from m2rnn_compile.models import LMConfig, miniature, preset

from .. import arguments as bench_arguments
from .. import environment, output
from ..providers.peers import version_of
from ..timing import clock_for, measure_interleaved
from .depth import ASSUMED, Line, extrapolate, line
from .trainee import Trainee, free

# Each half can be judged by itself, should memory not hold all.
PRESETS = (
    "hybrid-gated-deltanet-410m",
    "hybrid-gated-deltanet+1-410m",
    "hybrid-m2rnn-410m",
    "gated-deltanet-410m",
    "m2rnn-410m",
    "softmax-410m",
)
RATIOS = (  # of milliseconds a step: slower over faster, and the bar
    ("hybrid-gated-deltanet+1-410m", "hybrid-gated-deltanet-410m", 1.02),
    ("m2rnn-410m", "gated-deltanet-410m", 1.3),
    ("hybrid-m2rnn-410m", "hybrid-gated-deltanet-410m", None),
    ("m2rnn-410m", "softmax-410m", None),
)
DEEP = ("m2rnn-7b", "gated-deltanet-7b", "softmax-7b")  # one kind of layer each: M, G, A
EXTRAPOLATED = (*DEEP, "hybrid-m2rnn-7b", "hybrid-gated-deltanet-7b", "hybrid-gated-deltanet+1-7b")
COMPILE = {"fullgraph": True, "dynamic": False}


class Run:
    """The options, the file, the clock of the whole."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.start = time.perf_counter()
        self.device = bench_arguments.device(args.device)
        self.compiled: dict[str, object] | None = None if args.eager else {**COMPILE}
        if args.backend and self.compiled is not None:
            self.compiled["backend"] = args.backend
        args.out.parent.mkdir(parents=True, exist_ok=True)
        self.file = args.out.open("a", buffering=1)
        self.clock = clock_for(self.device)

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.args.budget - (time.perf_counter() - self.start)

    def write(self, kind: str, **columns: Any) -> None:
        row = {"kind": kind, "at_s": round(time.perf_counter() - self.start, 1), **columns}
        text = json.dumps(row, ensure_ascii=False)
        self.file.write(text + "\n")
        print(text, flush=True)

    def config(self, name: str, layers: int | None = None) -> LMConfig:
        config = preset(name)
        if self.args.miniature:
            return miniature(config, layers=layers)
        return config if layers is None else dataclasses.replace(config, pattern=config.pattern[:layers])

    def trainee(self, name: str, batch: int, layers: int | None = None) -> Trainee:
        return Trainee(
            self.config(name, layers),
            batch=batch,
            seq_len=self.args.seq_len,
            device=self.device,
            compiled=self.compiled,
        )


def fla_gate(run: Run) -> str | None:
    """Why Gated DeltaNet cannot be measured, or None; on a GPU its kernels are compared with fp32 chunks first."""
    if run.device.type != "cuda":
        run.write("fla", status="not a GPU: chunks in torch")
        return None
    g = torch.Generator(run.device).manual_seed(0)
    draw = lambda *shape: torch.randn(2, 512, 2, *shape, generator=g, device=run.device)
    q, k = (torch.nn.functional.normalize(draw(256), dim=-1) for _ in range(2))
    full = [q / 16, k, draw(512), -0.1 * draw().abs(), draw().sigmoid()]
    dy = draw(512)
    reason = linear_recurrence.fla_unsupported(q.bfloat16(), q.bfloat16())
    if reason is not None:
        run.write("fla", status="missing", note=reason)
        return reason
    low = [x.bfloat16() for x in full[:3]] + full[3:]
    results = []
    try:
        for impl, given in (("torch", [x.float() for x in low]), ("fla", low)):
            leaves = [x.clone().requires_grad_() for x in given]
            y, _ = linear_recurrence.linear_rnn(*leaves, impl=impl)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
    except Exception as e:  # what a peer refuses is a result too
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        run.write("fla", status="refused", note=reason)
        return reason
    errors = {
        name: float((b.float() - a).norm() / a.norm())
        for name, a, b in zip(("y", "q", "k", "v", "g", "beta"), *results, strict=True)
    }
    wrong = max(errors.values()) > 0.02
    replaced = linear_recurrence._kernel_is_wrong(run.device)
    note = "chunk_bwd_dqkwg replaced by products of ours (its issue 640)" if replaced else "as installed"
    status, version = "wrong" if wrong else "ok", version_of("fla")
    run.write("fla", status=status, version=version, relative_errors=errors, note=note)
    return f"gradients are wrong: {errors}" if wrong else None


def side_by_side(run: Run, names: Sequence[str], batch: int, gdn_is_out: str | None) -> None:
    """Time the presets; where memory does not hold them all, in halves, then with fewer rows."""
    try:
        together(run, names, batch, gdn_is_out)
        return
    except torch.OutOfMemoryError as e:
        run.write("out of memory", models=names, batch=batch, note=str(e)[:200])
    free(run.device)  # not in the handler: its traceback holds the models
    if len(names) > 3:
        for part in (names[: len(names) // 2], names[len(names) // 2 :]):
            side_by_side(run, part, batch, gdn_is_out)
    elif batch > 1:
        side_by_side(run, names, batch // 2, gdn_is_out)


def together(run: Run, names: Sequence[str], batch: int, gdn_is_out: str | None) -> None:
    """One step of each preset in turns, in passes: drift hits them alike, and a pass that is finished is written.

    Raises:
        torch.OutOfMemoryError: they do not fit beside each other at this batch.
    """
    trainees = {}
    for name in names:
        trainee = warmed(run, name, batch, gdn_is_out)
        if trainee is not None:
            trainees[name] = trainee
    samples: dict[str, list[float]] = {name: [] for name in trainees}
    steps = {name: (lambda t=t: t.step) for name, t in trainees.items()}

    def on_error(name: str, error: Exception) -> bool:
        if isinstance(error, torch.OutOfMemoryError):
            return False
        run.write("preset", model=name, status="failed", note=f"{type(error).__name__}: {error}"[:600])
        return True

    for number in range(1, run.args.passes + 1):
        if number > 1 and run.left < run.args.reserve:
            run.write("no time", note=f"pass {number} left out")
            break
        timings = measure_interleaved(
            steps, run.clock, runs=run.args.runs, min_runs=run.args.runs, warmup=1, on_error=on_error
        )
        for name in set(steps) - set(timings):
            del steps[name], trainees[name]
        for name, timing in timings.items():
            samples[name] += timing.samples_ms
            speed = trainees[name].tokens / timing.median_ms * 1e3
            run.write("pass", number=number, model=name, median_ms=timing.median_ms, tokens_per_s=speed)
        write_ratios(run, {name: list(t.samples_ms) for name, t in timings.items()}, f"pass {number}")
    for name, trainee in trainees.items():
        ms = statistics.median(samples[name])
        run.write(
            "preset",
            model=name,
            status="ok",
            batch=batch,
            seq_len=run.args.seq_len,
            median_ms=ms,
            spread_ms=[min(samples[name]), max(samples[name])],
            tokens_per_s=trainee.tokens / ms * 1e3,
            loss=trainee.first_and_last_loss(),
            samples_ms=samples[name],
        )
    write_ratios(run, samples, "all")


def warmed(run: Run, name: str, batch: int, gdn_is_out: str | None) -> Trainee | None:
    """A preset, compiled; None if it cannot be had, the reason being written.

    Raises:
        torch.OutOfMemoryError: see `together`.
    """
    reason = None
    if gdn_is_out and "G" in preset(name).pattern:
        reason = "refused", gdn_is_out
    elif run.left < run.args.reserve:
        reason = "no time", f"{run.left:.0f} s of the budget left"
    else:
        try:
            trainee = run.trainee(name, batch)
            seconds = trainee.warm_up()
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # one model's failure must not cost the others their figures
            reason = "failed", f"{type(e).__name__}: {e}"[:600]
    if reason is not None:
        run.write("preset", model=name, status=reason[0], note=reason[1])
        return None
    run.write("warm", **facts(trainee, name, batch), warmup_and_compile_s=round(seconds, 1))
    return trainee


def facts(trainee: Trainee, name: str, batch: int) -> dict[str, Any]:
    peak, own = trainee.peak_gib() or (None, None)
    parameters = trainee.model.num_parameters()
    return dict(model=name, parameters=parameters, batch=batch, peak_gib=peak, weights_and_optimizer_gib=own)


def write_ratios(run: Run, samples: dict[str, list[float]], what: str) -> None:
    """Medians over medians, and the median of the ratios of neighbouring runs, in which drift cancels."""
    for slow, fast, bar in RATIOS:
        if samples.get(slow) and samples.get(fast):
            ratio = statistics.median(samples[slow]) / statistics.median(samples[fast])
            paired = sorted(a / b for a, b in zip(samples[slow], samples[fast], strict=True))
            columns = dict(
                of_medians=ratio, paired_median=statistics.median(paired), paired_range=[paired[0], paired[-1]]
            )
            run.write("ratio", what=what, slow=slow, fast=fast, bar=bar, **columns)


def deep(run: Run, gdn_is_out: str | None) -> None:
    """The 7B models from a few of their layers."""
    lines: dict[str, dict[str, Line]] = {"step_ms": {}, "forward_backward_ms": {}, "peak_gib": {}}
    batch = run.args.deep_batch
    for name in DEEP:
        letter = preset(name).pattern[0]
        if gdn_is_out and letter == "G":
            run.write("depth", model=name, status="refused", note=gdn_is_out)
            continue
        measured: dict[str, dict[int, float]] = {what: {} for what in lines}
        for layers in run.args.depths:
            if run.left < 15:
                run.write("depth", model=name, layers=layers, status="no time")
                continue
            try:
                one_depth(run, name, layers, batch, measured)
            except Exception as e:
                run.write("depth", model=name, layers=layers, status="failed", note=f"{type(e).__name__}: {e}"[:600])
            free(run.device)
        for what, at in measured.items():
            if len(at) >= 2:
                lines[what][letter] = line(at)
                run.write("line", model=name, what=what, **lines[what][letter]._asdict())
    for name in EXTRAPOLATED:
        pattern = preset(name).pattern
        cost = {what: extrapolate(pattern, found) for what, found in lines.items()}
        if cost["step_ms"] is not None:
            speed = batch * run.args.seq_len / cost["step_ms"] * 1e3
            run.write("extrapolated", model=name, batch=batch, **cost, tokens_per_s=speed, assumed=ASSUMED)


def one_depth(run: Run, name: str, layers: int, batch: int, measured: dict[str, dict[int, float]]) -> None:
    trainee = run.trainee(name, batch, layers)
    seconds = trainee.warm_up()
    calls = {"step_ms": trainee.step, "forward_backward_ms": trainee.forward_backward}
    variants = {what: (lambda call=call: call) for what, call in calls.items()}
    timings = measure_interleaved(variants, run.clock, runs=run.args.runs, min_runs=run.args.runs, warmup=1)
    known = facts(trainee, name, batch)
    found = {what: timing.median_ms for what, timing in timings.items()} | {"peak_gib": known["peak_gib"]}
    for what, value in found.items():
        if value is not None:
            measured[what][layers] = value
    run.write(
        "depth",
        **known | found,
        layers=layers,
        status="ok",
        seq_len=run.args.seq_len,
        warmup_and_compile_s=round(seconds, 1),
        loss=trainee.first_and_last_loss(),
        samples_ms=timings["step_ms"].samples_ms,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training",
        description="Training steps of the 410M presets side by side, and of the 7B ones extrapolated from few layers. "
        "bf16 autocast, fp32 weights, blocks compiled one by one, gradient clip 1, fused AdamW.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="JSON lines, appended to as results come")
    add("--presets", type=lambda text: text.split(","), default=list(PRESETS), help="side by side (default: six)")
    add("--batch", type=int, default=8, help="rows; fewer where three models do not fit beside each other (default: 8)")
    add("--seq-len", type=int, default=4096)
    add("--runs", type=int, default=10, help="timed steps of each model in a pass (default: 10)")
    add("--passes", type=int, default=2)
    add("--depths", type=lambda text: sorted({int(n) for n in text.split(",")}), default=[2, 4, 6])
    add("--deep-batch", type=int, default=4, help="rows of the 7B models (default: 4)")
    add("--budget", type=float, default=400.0, help="seconds in all; what would begin too late is left out")
    add("--reserve", type=float, default=60.0, help="seconds that must be left to warm up another preset")
    add("--miniature", action="store_true", help="the presets scaled down: a trial of the command, no figures")
    add("--eager", action="store_true", help="without torch.compile")
    add("--backend", help="of torch.compile (default: inductor)")
    add("--device", choices=("cpu", "cuda"))
    add("--commit", help="the commit, for a copy without history")
    args = parser.parse_args(arguments)
    for name in ("batch", "seq_len", "runs", "passes", "deep_batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    try:
        for name in args.presets:
            preset(name)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return output.ending_quietly(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    args = parse(arguments)
    # One code object, Block.forward, is compiled for every kind of block.
    torch._dynamo.config.recompile_limit = 64
    try:
        run = Run(args)
    except OSError as e:
        output.fail(f"--out {args.out}: cannot be written ({e.strerror})")
        return 2
    except ValueError as e:
        output.fail(str(e))
        return 2
    run.write(
        "environment",
        command=sys.argv[1:] if arguments is None else list(arguments),
        sources=environment.source_hash()[:16],
        **environment.of_row(run.device, args.commit),
    )
    gdn_is_out = fla_gate(run)
    side_by_side(run, args.presets, args.batch, gdn_is_out)
    free(run.device)
    deep(run, gdn_is_out)
    run.write("end", seconds=round(time.perf_counter() - run.start, 1))
    run.file.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
