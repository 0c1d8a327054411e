# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (a graph's line is as long as it is)
"""Graphs and texts that users meet, frozen: EXPECTTEST_ACCEPT=1 python -m pytest tests/ops/test_snapshots.py writes them anew."""

import operator
from collections.abc import Callable
from unittest import skipIf

import torch
from expecttest import TestCase
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch.fx.experimental.proxy_tensor import make_fx

from m2rnn_compile import explain_impl, m2rnn, m2rnn_step
from m2rnn_compile.lowering import cpu
from m2rnn_compile.testing import make_inputs

X = make_inputs(2, 130, 4, 3, 5, Nq=2, initial_state=True)
ARGUMENTS = tuple(X.named_inputs().values())


def text_of(graph: fx.GraphModule) -> str:
    """One line per node: name, what makes it, of what, and its dtype, shape and strides."""
    lines = []
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        what = f" : {value.dtype} {list(value.shape)} {list(value.stride())}" if isinstance(value, Tensor) else ""
        if node.op == "output":
            lines.append(f"return {node.args[0]}")
        elif node.op == "placeholder":
            lines.append(f"{node.name}{what}")
        elif node.target is operator.getitem:
            lines.append(f"{node.name} = {node.args[0]}[{node.args[1]}]{what}")
        else:
            lines.append(f"{node.name} = {node.target}{node.args}{what}")
    return "\n".join(lines)


def graphs_of(fn: Callable[..., tuple[Tensor, ...]], *args: Tensor) -> tuple[str, str]:
    """The forward and the backward graph that a compiler is given."""
    seen: list[str] = []

    def keep(graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        seen.append(text_of(graph))
        return make_boxed_func(graph)

    leaves = [x.detach().requires_grad_() for x in args]
    compiled = aot_function(fn, keep, keep)
    results = compiled(*leaves)
    torch.autograd.grad(results, leaves, [torch.randn_like(r) for r in results])
    forward, backward = seen
    return forward, backward


class Snapshots(TestCase):
    maxDiff = None

    def test_training_is_one_op_forward_and_one_backward(self) -> None:
        """No T-sized tensor beyond inputs, results and gradients; states only one per chunk."""
        forward, backward = graphs_of(
            lambda *a: tuple(m2rnn(*a[:5], initial_state=a[5], state_grad_clip=1.0)), *ARGUMENTS
        )
        self.assertExpectedInline(
            forward,
            """\
primals_1 : torch.float32 [2, 130, 2, 3] [780, 6, 3, 1]
primals_2 : torch.float32 [2, 130, 1, 3] [390, 3, 3, 1]
primals_3 : torch.float32 [2, 130, 4, 5] [2600, 20, 5, 1]
primals_4 : torch.float32 [2, 130, 4] [520, 4, 1]
primals_5 : torch.float32 [4, 5, 5] [25, 5, 1]
primals_6 : torch.float32 [2, 4, 3, 5] [60, 15, 5, 1]
scan = m2rnn.scan.default(primals_1, primals_2, primals_3, primals_4, primals_5, primals_6, None, 1.0, 64, 'auto')
getitem = scan[0] : torch.float32 [2, 130, 4, 5] [2600, 20, 5, 1]
getitem_1 = scan[1] : torch.float32 [2, 4, 3, 5] [60, 15, 5, 1]
getitem_2 = scan[2] : torch.float32 [2, 4, 4, 3, 5] [240, 60, 15, 5, 1]
return (getitem, getitem_1, primals_1, primals_2, primals_3, primals_4, primals_5, primals_6, getitem_2)""",
        )
        self.assertExpectedInline(
            backward,
            """\
primals_1 : torch.float32 [2, 130, 2, 3] [780, 6, 3, 1]
primals_2 : torch.float32 [2, 130, 1, 3] [390, 3, 3, 1]
primals_3 : torch.float32 [2, 130, 4, 5] [2600, 20, 5, 1]
primals_4 : torch.float32 [2, 130, 4] [520, 4, 1]
primals_5 : torch.float32 [4, 5, 5] [25, 5, 1]
primals_6 : torch.float32 [2, 4, 3, 5] [60, 15, 5, 1]
getitem_2 : torch.float32 [2, 4, 4, 3, 5] [240, 60, 15, 5, 1]
tangents_1 : torch.float32 [2, 130, 4, 5] [2600, 20, 5, 1]
tangents_2 : torch.float32 [2, 4, 3, 5] [60, 15, 5, 1]
scan_backward = m2rnn.scan_backward.default(tangents_1, tangents_2, primals_1, primals_2, primals_3, primals_4, primals_5, primals_6, None, getitem_2, 1.0, 64, 'auto')
getitem_3 = scan_backward[0] : torch.float32 [2, 130, 2, 3] [780, 6, 3, 1]
getitem_4 = scan_backward[1] : torch.float32 [2, 130, 1, 3] [390, 3, 3, 1]
getitem_5 = scan_backward[2] : torch.float32 [2, 130, 4, 5] [2600, 20, 5, 1]
getitem_6 = scan_backward[3] : torch.float32 [2, 130, 4] [520, 4, 1]
getitem_7 = scan_backward[4] : torch.float32 [4, 5, 5] [25, 5, 1]
getitem_8 = scan_backward[5] : torch.float32 [2, 4, 3, 5] [60, 15, 5, 1]
return (getitem_3, getitem_4, getitem_5, getitem_6, getitem_7, getitem_8)""",
        )

    def test_inference_keeps_no_checkpoints(self) -> None:
        def scan(*a: Tensor) -> tuple[Tensor, ...]:
            return tuple(m2rnn(*a[:5], initial_state=a[5]))

        with torch.no_grad():
            graph = make_fx(scan, tracing_mode="fake")(*ARGUMENTS)
        self.assertExpectedInline(
            text_of(graph),
            """\
arg0_1 : torch.float32 [2, 130, 2, 3] [780, 6, 3, 1]
arg1_1 : torch.float32 [2, 130, 1, 3] [390, 3, 3, 1]
arg2_1 : torch.float32 [2, 130, 4, 5] [2600, 20, 5, 1]
arg3_1 : torch.float32 [2, 130, 4] [520, 4, 1]
arg4_1 : torch.float32 [4, 5, 5] [25, 5, 1]
arg5_1 : torch.float32 [2, 4, 3, 5] [60, 15, 5, 1]
scan = m2rnn.scan.default(arg0_1, arg1_1, arg2_1, arg3_1, arg4_1, arg5_1, None, None, 0, 'auto')
getitem = scan[0] : torch.float32 [2, 130, 4, 5] [2600, 20, 5, 1]
getitem_1 = scan[1] : torch.float32 [2, 4, 3, 5] [60, 15, 5, 1]
getitem_2 = scan[2] : torch.float32 [2, 0, 4, 3, 5] [60, 60, 15, 5, 1]
return (getitem, getitem_1)""",
        )

    def test_a_step_is_one_op(self) -> None:
        def step(*a: Tensor) -> tuple[Tensor, ...]:
            return tuple(m2rnn_step(*(x[:, 0] for x in a[:4]), a[4], initial_state=a[5]))

        with torch.no_grad():
            graph = make_fx(step, tracing_mode="fake")(*ARGUMENTS)
        self.assertExpectedInline(
            text_of(graph),
            """\
arg0_1 : torch.float32 [2, 130, 2, 3] [780, 6, 3, 1]
arg1_1 : torch.float32 [2, 130, 1, 3] [390, 3, 3, 1]
arg2_1 : torch.float32 [2, 130, 4, 5] [2600, 20, 5, 1]
arg3_1 : torch.float32 [2, 130, 4] [520, 4, 1]
arg4_1 : torch.float32 [4, 5, 5] [25, 5, 1]
arg5_1 : torch.float32 [2, 4, 3, 5] [60, 15, 5, 1]
select = aten.select.int(arg0_1, 1, 0) : torch.float32 [2, 2, 3] [780, 3, 1]
select_1 = aten.select.int(arg1_1, 1, 0) : torch.float32 [2, 1, 3] [390, 3, 1]
select_2 = aten.select.int(arg2_1, 1, 0) : torch.float32 [2, 4, 5] [2600, 5, 1]
select_3 = aten.select.int(arg3_1, 1, 0) : torch.float32 [2, 4] [520, 1]
step = m2rnn.step.default(select, select_1, select_2, select_3, arg4_1, arg5_1, 'auto')
getitem = step[0] : torch.float32 [2, 4, 5] [20, 5, 1]
getitem_1 = step[1] : torch.float32 [2, 4, 3, 5] [60, 15, 5, 1]
return (getitem, getitem_1)""",
        )

    @skipIf(cpu.availability() is not None, "no C++ compiler")
    def test_which_implementation_would_run_and_why(self) -> None:
        on_cpu, on_meta = ARGUMENTS[:5], [x.to("meta") for x in ARGUMENTS[:5]]
        choices = [explain_impl(*on_cpu), explain_impl(*on_meta), explain_impl(*on_cpu, impl="eager")]
        said = [
            f"{c.impl}: {c.reason}" + "".join(f"\n  not {n}: {why}" for n, why in c.rejected.items()) for c in choices
        ]
        self.assertExpectedInline(
            "\n".join(said),
            """\
cpp: the tensors are on the CPU and a C++ kernel is available
  not triton: impl='triton' runs on cuda tensors, these are on cpu
eager: no kernel exists for meta tensors
  not cpp: impl='cpp' runs on cpu tensors, these are on meta
  not triton: impl='triton' runs on cuda tensors, these are on meta
eager: impl='eager' was asked for
  not triton: impl='triton' runs on cuda tensors, these are on cpu""",
        )
