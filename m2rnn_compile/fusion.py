# SPDX-License-Identifier: Apache-2.0
"""What users see of fusion under `torch.compile`: the switch, and `explain`."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .ops import fusion_switch
from .ops.fusion_switch import FusionSettings

if TYPE_CHECKING:
    from rich.table import Table

    from .lowering.inductor.rewrite import FusionRecord


def enable_fusion(
    enabled: bool = True, *, devices: Sequence[str] = ("cuda",), prologue: bool = False, conv: bool = True
) -> FusionSettings:
    """Turn fusion of the scan with its surroundings under `torch.compile` on (the default) or off.

    Compiled code notices: it compiles again where the setting matters. Off, the op is opaque, bit for bit as without
    this library's rewrite. In eager mode nothing depends on it.

    What notices is the call of `m2rnn` that is traced. Compiled code without one (the module of an exported program,
    or `torch.ops.m2rnn.scan` called directly) keeps the setting that it was compiled under: after a change call
    ``torch._dynamo.reset()``, or compile again.

    A pass that has taken the rewrite's place in `torch._inductor.config.pre_grad_custom_pass` is kept, and the rewrite
    put behind it.

    Args:
        devices: device types to fuse on, such as ``("cuda",)``. On a CPU the compiler's own pass over the tail is as
            good.
        prologue: also move the forget gate into the op. It saves no pass over memory.
        conv: also move the causal convolution and SiLU in front of the scan into the op: in inference they are part of
            the scan's own kernel, with the forget gate and the tail; in training they get kernels of their own, one
            pass of the backward instead of four, and where q | k | v, f and g are columns of one tensor, as in the
            layer, the op takes that tensor whole, forget gate included, and gives its gradient in one piece.

    Returns:
        The settings before, to restore with ``enable_fusion(**before._asdict())``.

    Raises:
        TypeError, ValueError: `devices` is no sequence of device types.
    """
    before = fusion_switch.SETTINGS
    fusion_switch.change(FusionSettings(bool(enabled), _device_types(devices), bool(prologue), bool(conv)))
    fusion_switch.install_when_compiling()
    return before


def _device_types(devices: Sequence[str]) -> tuple[str, ...]:
    if isinstance(devices, str) or not all(isinstance(d, str) for d in devices):
        raise TypeError(
            f"m2rnn: `devices` must be a sequence of device types as text, got {devices!r}; "
            "for one write devices=('cuda',)"
        )
    for name in devices:
        try:
            known = torch.device(name).type
        except RuntimeError as e:
            raise ValueError(f"m2rnn: `devices` names {name!r}, which is no device type of torch's; use 'cuda'") from e
        if known != name:
            raise ValueError(
                f"m2rnn: `devices` takes types, got the device {name!r}; fusion is on or off for all of a type: "
                f"use {known!r}"
            )
    return tuple(devices)


@dataclasses.dataclass(frozen=True)
class FusionReport:
    """What `explain` found. Print it, or give it to rich.

    Attributes:
        settings: of `enable_fusion`.
        hook: whether the rewrite is installed in this torch.
        graphs: number of graphs that Dynamo made (more than one: graph breaks or several calls).
        scans: one record for each scan.
    """

    settings: FusionSettings
    hook: str
    graphs: int
    scans: tuple[FusionRecord, ...]

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(title="scans under torch.compile", caption=self._caption(), title_justify="left")
        table.caption_justify = "left"
        for heading in ("scan", "shape", "fused with", "left outside, and why"):
            table.add_column(heading, overflow="fold")
        for r in self.scans:
            shape = f"{r.shapes}\n{'training' if r.training else 'inference'}"
            fused = Text("\n".join(r.fused) or "nothing", style="green" if r.fused else "yellow")
            table.add_row(Text(f"{r.scan}\n{r.where}"), shape, fused, Text("\n".join(r.left)))
        return table

    def _caption(self) -> str:
        state = "on" if self.settings.enabled else "off (m2rnn_compile.enable_fusion(True) turns it on)"
        devices = ", ".join(self.settings.devices) or "no device"
        return f"fusion is {state} for {devices}; rewrite {self.hook}; {self.graphs} graph(s)"

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def explain(model: Any, *args: Any, **kwargs: Any) -> FusionReport:
    """Which scans of `model(*args, **kwargs)` fuse with what under `torch.compile`, and why not.

    Traces and rewrites as the compiler would, under the current settings and grad mode, and runs the graph once in
    eager mode; generates no code. Compiled code of the same model is not touched.

    Args:
        model: a module or function, not compiled.

    Raises:
        TypeError: `model` is compiled already.
    """
    from .lowering.inductor import hook
    from .lowering.inductor.nodes import SCAN, scan_arguments
    from .lowering.inductor.normalize import normalize
    from .lowering.inductor.rewrite import FusionRecord, fuse

    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule) or hasattr(model, "_torchdynamo_orig_callable"):
        raise TypeError("m2rnn: explain takes the model before torch.compile; pass the original (model._orig_mod)")
    found: list[FusionRecord] = []
    graphs = 0

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        for module in gm.modules():
            if not isinstance(module, torch.fx.GraphModule):
                continue
            if fusion_switch.SETTINGS.enabled:
                found.extend(fuse(module.graph, fusion_switch.SETTINGS))
                module.recompile()
            else:
                normalize(module.graph)
                scans = [n for n in module.graph.nodes if n.target is SCAN]
                training = [scan_arguments(n).chunk != 0 for n in scans]
                off = ("fusion is off",)
                found.extend(FusionRecord(n.name, (), off, "", "", t) for n, t in zip(scans, training, strict=True))
        return gm.forward

    # A new code object each time: Dynamo keeps its compilations, and their limit, by code object.
    run = lambda *args, **kwargs: model(*args, **kwargs)
    fresh = types.FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
    torch.compile(fresh, backend=backend)(*args, **kwargs)
    return FusionReport(fusion_switch.SETTINGS, hook.status(), graphs, tuple(found))
