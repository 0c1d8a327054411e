# SPDX-License-Identifier: Apache-2.0
"""Put `m2rnn::fused_scan` in the place of a scan and what was matched around it. Public torch.fx only.

Forward only: this runs on the graph before autograd, and the op's own formula supplies the backward. So one rewrite is
right in training and inference, with static and dynamic shapes.
"""

from __future__ import annotations

import dataclasses
import operator
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ...ops.fusion_switch import FusionSettings
from ...ops.library import name_of
from ...ops.validation import check_fused
from .match import Match, match
from .match_conv import Conv, match_conv
from .match_projection import Projection, match_projection
from .nodes import SCAN, is_check, label, name, scan_arguments, users, value
from .normalize import normalize
from .obstacles import obstacle, writes, written_later
from .pad_projection import pad_projection

WHOLE = "the whole projection"
FUSED_SCAN = torch.ops.m2rnn.fused_scan.default
FUSED_SCAN_PACKED = torch.ops.m2rnn.fused_scan_packed.default
FUSED_SCAN_CONV = torch.ops.m2rnn.fused_scan_conv.default
FUSED_MIXER = torch.ops.m2rnn.fused_mixer.default
CONV_SILU = torch.ops.m2rnn.conv_silu.default


@dataclasses.dataclass(frozen=True)
class FusionRecord:
    """What happened to one scan of a compiled graph.

    Attributes:
        scan: its name in the graph.
        fused: the parts that moved into the op.
        left: for what did not, the reason.
        where: file and line of the call in the user's code, as far as tracing knows.
        shapes: B, T, N, K, V as text (symbols where they are dynamic).
        training: whether the graph keeps what a backward needs.
    """

    scan: str
    fused: tuple[str, ...]
    left: tuple[str, ...]
    where: str
    shapes: str
    training: bool


def fuse(graph: Graph, settings: FusionSettings) -> list[FusionRecord]:
    """Rewrite every scan of the graph where that is possible and pays. What fails here leaves its scan opaque."""
    normalize(graph)
    functorch = any(label(n).endswith("_increment_nesting") for n in graph.nodes)  # torch.vmap, torch.func.grad, ...
    records, failures = [], []
    for scan in [n for n in graph.nodes if n.op == "call_function" and n.target is SCAN]:
        before = set(graph.nodes)
        try:
            if functorch:
                records.append(_record(scan, Match(scan), [], ["the graph holds torch.func transforms"]))
            else:
                records.append(_fuse_one(graph, scan, settings))
        except Exception as e:
            for n in reversed(list(graph.nodes)):
                if n not in before and not n.users:
                    graph.erase_node(n)
            reason = f"the rewrite failed with {type(e).__name__}: {e}"
            failures.append(reason)
            records.append(FusionRecord(scan.name, (), (reason,), "", "", training=scan_arguments(scan).chunk != 0))
    if failures:
        warnings.warn(
            f"m2rnn: {len(failures)} of {len(records)} scans of a graph run unfused, as opaque ops, though right: "
            f"{failures[0]}. Please report this; m2rnn_compile.enable_fusion(False) turns the rewrite off",
            stacklevel=2,
        )
    return records


def _fuse_one(graph: Graph, scan: Node, settings: FusionSettings) -> FusionRecord:
    m = match(scan)
    training = scan_arguments(scan).chunk != 0
    conv: Conv | str = match_conv(m.qkv) if m.qkv is not None and settings.conv else ""
    if isinstance(conv, Conv):
        conv = _conv_why_not(conv) or (written_later([conv.x, conv.weight], conv.last) if training else None) or conv
    found = conv if isinstance(conv, Conv) else None
    # One op can do all of it: without a backward, or where all that it reads is columns of one tensor.
    whole = settings.conv and m.qkv is not None
    if training:
        whole = whole and isinstance(match_projection(m, found), Projection)
    if m.forget != "none" and not settings.prologue and not whole:
        m = m.without_prologue(f"{m.prologue_parts()[0]}: one small pass either way, left to the compiler")
    elif m.prologue_stopped:
        m.prologue_stopped = f"forget gate: {m.prologue_stopped}"
    reason = _why_not(m, settings)
    if reason is None:
        m, reason = _without_obstacles(m)
    tail = m.tail_parts()
    if reason is not None:
        return _record(scan, m, [], [f"{', '.join(tail) or 'tail'}: {reason}"])
    left, parts = [], m.prologue_parts() + tail
    if m.stopped:
        left.append(f"behind the tail: {m.stopped}")
    if m.prologue_stopped:
        left.append(m.prologue_stopped)
    if m.qkv is not None:
        parts.insert(0, "q | k | v as one tensor")
    if found is not None:
        parts.insert(0, "causal conv, SiLU")
    elif conv:
        left.append(f"in front of q | k | v: {conv}")
    projection: Projection | str = ""
    if training and settings.conv and m.qkv is not None:
        projection = match_projection(m, found)
        if isinstance(projection, Projection):
            parts.insert(0, WHOLE)
        else:
            left.append(f"{WHOLE}: {projection}")
    record = _record(scan, m, parts, left)
    fused = _replace(graph, m)
    if isinstance(projection, Projection):
        _replace_projection(graph, fused, projection, found)
        return record
    whole = whole and not training and all(user.args[1] in (0, 1) for user in fused.users)
    if found is not None and not (whole and _can_absorb(found, fused)):
        _replace_conv(graph, found)
        found = None
    if whole:
        _replace_whole(graph, fused, found)
    return record


def _without_obstacles(m: Match) -> tuple[Match, str | None]:
    """The match, without its forget gate if only that stands in the way, or the reason why there is nothing left."""
    reason = m.obstacle()
    if reason is not None and m.forget != "none":
        rest = m.without_prologue(f"{m.prologue_parts()[0]}: {reason}")
        if rest.obstacle() is None:
            return rest, None
    return m, reason


def _conv_why_not(conv: Conv) -> str | None:
    """Why the kernel does not take this convolution, or None. Where there are no kernels, the op is plain torch."""
    x = value(conv.x)
    if x.device.type != "cuda":
        return None
    from ..triton.conv import unsupported  # _cuda_why_not has imported Triton already

    return unsupported(x.dtype, value(conv.weight).shape[1])


def _why_not(m: Match, settings: FusionSettings) -> str | None:
    """Why this scan stays as it is, or None."""
    if m.last is None:
        return m.stopped or "nothing follows that could move into the op"
    y, given = value(m.scan)[0], scan_arguments(m.scan)
    device, (N, V), K = y.device.type, tuple(y.shape[2:]), value(given.q).shape[3]
    out = value(m.last)
    if given.impl not in ("auto", "triton", "eager", "cpp"):
        return f"impl={given.impl!r}"
    if device not in settings.devices:
        return f"on {device} the compiler's own pass over the tail is as good; fusion is on for " + (
            ", ".join(settings.devices) or "no device"
        )
    if not out.dtype.is_floating_point:
        return f"the tail ends in {out.dtype}"
    if device == "cuda":
        return _cuda_why_not(m, N, K, V)
    return None


def _cuda_why_not(m: Match, N: int, K: Any, V: int) -> str | None:
    try:
        from ..triton.fused import unsupported
    except ImportError as e:
        return f"Triton cannot be imported: {e}"
    if scan_arguments(m.scan).impl == "eager":
        return "impl='eager' runs the tail in torch"
    reason = unsupported(N, V, m.norm)
    if reason is not None:
        return reason
    if isinstance(K, int) and K <= 16:
        return f"K = {K}: y leaves the scan in one piece, and the compiler's own pass over the tail is as good"
    return None


def _record(scan: Node, m: Match, parts: list[str], left: list[str]) -> FusionRecord:
    q, y = value(scan_arguments(scan).q), value(scan)
    sizes = zip("BTNKV", (*y[0].shape[:3], q.shape[3], y[0].shape[3]), strict=True) if isinstance(q, Tensor) else ()
    frames = re.findall(r'File "(.+?)", line (\d+)', scan.meta.get("stack_trace") or "")
    frames = [frame for frame in frames if "/m2rnn_compile/ops/" not in frame[0]] or frames
    where = f"{'/'.join(Path(frames[-1][0]).parts[-2:])}:{frames[-1][1]}" if frames else ""
    return FusionRecord(
        scan=scan.name,
        fused=tuple(parts),
        left=tuple(left),
        where=where,
        shapes=", ".join(f"{n}={size}" for n, size in sizes),
        training=scan_arguments(scan).chunk != 0,
    )


# ---- the rewrite itself ---------------------------------------------------------------------------------------------


def _call(graph: Graph, x: Node, method: str, *args: Any) -> Node:
    made = graph.call_method(method, (x, *args))
    fake = value(x)
    made.meta["example_value"] = getattr(fake, method)(*args)
    return made


def _per_feature(graph: Graph, x: Node | None, N: int, V: int) -> Node | None:
    """A parameter as [N, V]."""
    if x is None:
        return None
    shape = tuple(value(x).shape)
    if shape == (N, V):
        return x
    if value(x).numel() == N * V:
        return _call(graph, x, "reshape", (N, V))
    while len(value(x).shape) > 2:  # leading ones
        x = _call(graph, x, "squeeze", 0)
    return _call(graph, x, "expand", (N, V))


def _heads_of(graph: Graph, g: Node | None, V: int) -> Node | None:
    """[B, T, Ng·V] as [B, T, Ng, V]."""
    if g is None or len(value(g).shape) == 4:
        return g
    return _call(graph, g, "unflatten", -1, (value(g).shape[-1] // V, V))


def _out_dtype(last: Node, v: Tensor) -> torch.dtype:
    """The dtype of what is replaced; or v's, where under autocast every user casts to it anyway."""
    out: torch.dtype = value(last).dtype
    casts = [u for u in users(last) if name(u) in ("linear", "matmul", "mm")]
    if out != v.dtype and len(casts) == len(users(last)) > 0:
        if all(isinstance(value(u), Tensor) and value(u).dtype == v.dtype for u in casts):
            return v.dtype
    return out


def _replace(graph: Graph, m: Match) -> Node:
    assert m.last is not None
    scan, last = m.scan, m.last
    q, k, v, f, W, initial_state, cu_seqlens, clip, chunk, impl = scan_arguments(scan)
    fakes = value(scan)
    y, N, V = fakes[0], fakes[0].shape[2], fakes[0].shape[3]
    flat = len(value(last).shape) == 3
    dtype = _out_dtype(last, y)
    with graph.inserting_before(last):
        D, weight = (_per_feature(graph, x, N, V) for x in (m.D, m.norm_weight))
        g = _heads_of(graph, m.g, V)
        rest = (
            f if m.x_f is None else m.x_f, W, m.A_log, m.dt_bias, D, g, weight, initial_state, cu_seqlens,
            clip, m.forget, m.activation, m.norm, m.norm_eps, name_of(dtype), chunk, impl,
        )  # fmt: skip
        # What it would refuse when it runs, it refuses here, where the graph is still whole. The scan has its clip.
        fakes_of: Any = [value(x) if isinstance(x, Node) else x for x in (q, k, v, *rest[:9], None, *rest[10:14])]
        check_fused(*fakes_of)
        if m.qkv is None:
            fused = graph.call_function(FUSED_SCAN, (q, k, v, *rest))
        else:
            sizes = [value(q).shape[2], value(k).shape[2], value(v).shape[2], value(q).shape[3], V]
            fused = graph.call_function(FUSED_SCAN_PACKED, (m.qkv, sizes, *rest))
        o_fake = y.new_empty(y.shape, dtype=dtype)
        fused.meta = dict(scan.meta)
        fused.meta["example_value"] = (o_fake, fakes[1], y, y.new_empty(0, dtype=fakes[1].dtype), fakes[2])
        outputs: dict[Any, Node] = {}
        for old, new in ((0, 0), (1, 1), (2, 4)):
            outputs[old] = graph.call_function(operator.getitem, (fused, new))
            outputs[old].meta["example_value"] = fused.meta["example_value"][new]
        o = _call(graph, outputs[0], "flatten", -2) if flat else outputs[0]
    for check in [u for u in last.users if is_check(u)]:  # of a dtype and strides that o need not have
        graph.erase_node(check)
    last.replace_all_uses_with(o)
    for user in list(scan.users):
        user.replace_all_uses_with(outputs[user.args[1]]) if user.args[1] != 0 else None
    _sort(graph)
    _erase_dead(graph, last)
    return fused


def _can_absorb(conv: Conv, fused: Node) -> bool:
    """Whether nothing but the op wants the convolution's result, and nothing between the two stands in the way."""
    return users(conv.last) == [fused] and obstacle({conv.last}, fused) is None


def _replace_whole(graph: Graph, fused: Node, conv: Conv | None) -> None:
    """The op without a backward in the place of the one that has one."""
    qkv, sizes, *rest, _, impl = fused.args
    start = (qkv, None, None) if conv is None else (conv.x, conv.weight, conv.position)
    with graph.inserting_before(fused):
        made = graph.call_function(FUSED_SCAN_CONV, (*start, sizes, *rest, impl))
    made.meta = {**fused.meta, "example_value": fused.meta["example_value"][:2]}
    for output in list(fused.users):
        output.replace_input_with(fused, made)
    graph.erase_node(fused)
    _sort(graph)
    if conv is not None:
        _erase_dead(graph, conv.last)


def _replace_projection(graph: Graph, fused: Node, projection: Projection, conv: Conv | None) -> None:
    """The op that takes the whole projection in the place of the one that takes its parts."""
    qkv, _, f, W, A_log, dt_bias, D, g, *rest = fused.args
    start = (None, None) if conv is None else (conv.weight, conv.position)
    with graph.inserting_before(fused):
        made = graph.call_function(FUSED_MIXER, (projection.x, *start, projection.sizes, W, A_log, dt_bias, D, *rest))
    o, state, y, rstd, checkpoints = fused.meta["example_value"]
    made.meta = {**fused.meta, "example_value": (o, state, y.new_empty(0), y, rstd, checkpoints)}
    for output in list(fused.users):
        output.args = (made, {0: 0, 1: 1, 4: 5}[output.args[1]])
    graph.erase_node(fused)
    _sort(graph)
    for part in (qkv, f, g):
        if isinstance(part, Node):
            _erase_dead(graph, part)
    pad_projection(graph, projection.x)


def _replace_conv(graph: Graph, conv: Conv) -> None:
    with graph.inserting_before(conv.last):
        made = graph.call_function(CONV_SILU, (conv.x, conv.weight, conv.position))
    made.meta = dict(conv.last.meta)
    conv.last.replace_all_uses_with(made)
    _sort(graph)
    _erase_dead(graph, conv.last)


def _sort(graph: Graph) -> None:
    """Restore the order of definitions and uses; nodes keep their place where they can."""
    placed: set[Node] = set()
    order: list[Node] = []

    def place(n: Node) -> None:
        todo = [n]
        while todo:
            top = todo[-1]
            missing = [x for x in top.all_input_nodes if x not in placed]
            if missing:
                todo += missing
                continue
            todo.pop()
            if top not in placed:
                placed.add(top)
                order.append(top)

    for n in list(graph.nodes):
        place(n)
    if order != list(graph.nodes):
        for before, after in zip(order, order[1:], strict=False):
            before.append(after)


def _erase_dead(graph: Graph, n: Node) -> None:
    """Erase `n` and what only it used; other dead code is not ours to judge."""
    todo = [n]
    while todo:
        top = todo.pop()
        if users(top) or top.op in ("placeholder", "output", "get_attr") or top._erased or writes(top) is not None:
            continue
        for check in list(top.users):
            graph.erase_node(check)
        inputs = list(top.all_input_nodes)
        graph.erase_node(top)
        todo += inputs
    for getter in [x for x in graph.nodes if x.target is operator.getitem and not users(x)]:
        source = getter.args[0]
        if isinstance(source, Node) and source.target in (SCAN, FUSED_SCAN, FUSED_SCAN_PACKED, FUSED_MIXER):
            for check in list(getter.users):
                graph.erase_node(check)
            graph.erase_node(getter)
            if source.target is SCAN and not source.users:
                _erase_dead(graph, source)
