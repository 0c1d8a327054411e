# SPDX-License-Identifier: Apache-2.0
"""What counts as an operation of torch, in every way to write its call; and what only looks like one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2rnn_compile import explain, m2rnn
from m2rnn_compile.lowering.inductor import rewrite
from m2rnn_compile.lowering.inductor.rewrite import FusionRecord
from tests.fusion.compiling import Rewriting, fusion_on_cpu
from tests.fusion.test_rewrite import B, K, N, T, V, scan, tensors

__all__ = ["fusion_on_cpu"]
pytestmark = pytest.mark.usefixtures("fusion_on_cpu")
Code = Callable[[dict[str, Tensor]], Tensor]
SIGMOID = "sigmoid forget gate"


def compiled_as_written(fn: Code, t: dict[str, Tensor], tolerance: float = 1e-4) -> FusionRecord:
    """The record of the only scan, after the values have been compared with eager's."""
    backend = Rewriting()
    with torch.no_grad():
        got, expected = torch.compile(fn, backend=backend, fullgraph=True)(t), fn(t)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    (record,) = backend.records
    return record


# ---- namesakes ------------------------------------------------------------------------------------------------------


@torch.compiler.allow_in_graph
def silu(x: Tensor) -> Tensor:
    return 2 * x


@torch.library.custom_op("m2rnn_tests::silu", mutates_args=())
def op_silu(x: Tensor) -> Tensor:
    return 2 * x


@op_silu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.compiler.allow_in_graph
def sigmoid(x: Tensor) -> Tensor:
    return x.clamp(0.1, 0.9)


NAMESAKES: dict[str, Code] = {
    "a function": lambda t: scan(t) * silu(t["g"]),
    "an op": lambda t: scan(t) * torch.ops.m2rnn_tests.silu(t["g"]),
    "an overload": lambda t: scan(t) * torch.ops.m2rnn_tests.silu.default(t["g"]),
}


@pytest.mark.parametrize("case", NAMESAKES)
def test_the_same_name_is_not_the_same_operation(case: str) -> None:
    assert compiled_as_written(NAMESAKES[case], tensors()).fused == ()


def test_nor_in_the_forget_gate() -> None:
    def code(t: dict[str, Tensor]) -> Tensor:
        return m2rnn(t["q"], t["k"], t["v"], sigmoid(t["x"]), t["W"]).y * F.silu(t["g"])

    assert compiled_as_written(code, tensors()).fused == ("SiLU(g)",)


def test_torch_s_own_in_each_of_its_homes() -> None:
    homes: list[Callable[[Tensor], Tensor]] = [
        F.silu,
        torch.ops.aten.silu,
        torch.ops.aten.silu.default,
        torch._C._nn.silu,
        nn.SiLU(),
    ]
    for home in homes:
        record = compiled_as_written(lambda t, home=home: scan(t) * home(t["g"]), tensors())  # type: ignore[misc]
        assert record.fused == (SIGMOID, "SiLU(g)"), home


# ---- views that read the bits anew ----------------------------------------------------------------------------------


def low(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: x.half() if n in "qkvWg" else x for n, x in t.items()}


def test_a_view_in_another_dtype_is_no_view() -> None:
    def of_y(t: dict[str, Tensor]) -> Tensor:
        return scan(low(t)).view(torch.bfloat16) * F.silu(t["g"])

    def of_the_gate(t: dict[str, Tensor]) -> Tensor:
        return scan(low(t)) * F.silu(t["g"].half()).view(torch.int16).view(torch.float16).view(torch.bfloat16)

    def of_v(t: dict[str, Tensor]) -> Tensor:
        t = low(t)
        return scan(t) + t["D"].half() * t["v"].view(torch.bfloat16)

    for code in (of_y, of_the_gate, of_v):
        assert compiled_as_written(code, tensors(), 0.02).fused == (), code


# ---- q | k | v ------------------------------------------------------------------------------------------------------


def parts(t: dict[str, Tensor], *lead: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = t["qkv"].split([K, K, N * V], -1)
    return q.reshape(*lead, 1, K), k.reshape(*lead, 1, K), v.reshape(*lead, N, V)


def test_slices_whose_steps_move_to_other_sequences_are_not_q_k_v() -> None:
    """One sequence of B·T steps instead of B of T; or T of B."""
    t = {**tensors(), "qkv": torch.randn(B, T, 2 * K + N * V), "cu": torch.tensor([0, T, B * T], dtype=torch.int32)}

    def packed(t: dict[str, Tensor]) -> Tensor:
        q, k, v = parts(t, 1, B * T)
        y = m2rnn(q, k, v, t["x"].reshape(1, B * T, N).sigmoid(), t["W"], cu_seqlens=t["cu"]).y
        return y * F.silu(t["g"].reshape(1, B * T, N, V))

    def turned(t: dict[str, Tensor]) -> Tensor:
        q, k, v = parts(t, T, B)
        return m2rnn(q, k, v, t["x"].view(T, B, N).sigmoid(), t["W"]).y * F.silu(t["g"].view(T, B, N, V))

    def plain(t: dict[str, Tensor]) -> Tensor:
        return m2rnn(*parts(t, B, T), t["x"].sigmoid(), t["W"]).y * F.silu(t["g"])

    for code in (packed, turned):
        assert compiled_as_written(code, t).fused == (SIGMOID, "SiLU(g)")
    assert compiled_as_written(plain, t).fused == ("q | k | v as one tensor", SIGMOID, "SiLU(g)")


# ---- keywords -------------------------------------------------------------------------------------------------------


def by_keyword(t: dict[str, Tensor]) -> Tensor:
    """The whole layer, every argument by its name."""
    q, k, v = torch.split(tensor=t["qkv"], split_size_or_sections=[K, K, N * V], dim=-1)
    q, k, v = q.unflatten(dim=-1, sizes=(1, K)), k.unflatten(dim=-1, sizes=(1, K)), v.unflatten(dim=-1, sizes=(N, V))
    softplus = F.softplus(input=torch.add(input=t["x"], other=t["b"]))
    f = torch.exp(input=torch.mul(input=torch.neg(input=torch.exp(input=t["A"])), other=softplus))
    y, _, _ = torch.ops.m2rnn.scan.default(
        q, k, v, f=f, W=t["W"], initial_state=None, cu_seqlens=None, state_grad_clip=None, chunk=0, impl="auto"
    )
    y = torch.add(input=y, other=torch.mul(input=t["D"], other=v))
    y = torch.mul(input=y, other=torch.sigmoid(input=t["g"])).flatten(start_dim=-2)
    mean = torch.mean(input=y.pow(exponent=2), dim=-1, keepdim=True)
    return torch.mul(input=y, other=torch.rsqrt(input=torch.add(input=mean, other=1e-5))).mul(other=t["w"])


KEYWORDS: dict[str, tuple[Code, str]] = {
    "pow": (lambda t: (lambda y: y * torch.rsqrt(y.pow(exponent=2).mean(-1, keepdim=True) + 1))(scan(t)), "RMSNorm"),
    "torch.pow": (
        lambda t: (lambda y: y * torch.rsqrt(torch.pow(y, exponent=2).mean(-1, keepdim=True) + 1))(scan(t)),
        "RMSNorm per head",
    ),
    "mul": (lambda t: torch.mul(scan(t), other=F.silu(t["g"])), "SiLU(g)"),
    "both of mul": (lambda t: torch.mul(input=scan(t), other=F.silu(input=t["g"])), "SiLU(g)"),
    "gelu": (lambda t: scan(t) * F.gelu(t["g"], approximate="tanh"), "GELU(g)"),
    "rms_norm": (
        lambda t: F.rms_norm(input=scan(t), normalized_shape=(V,), weight=t["wh"], eps=1e-5),
        "RMSNorm per head",
    ),
    "an aten op's self": (lambda t: torch.ops.aten.mul.Tensor(self=scan(t), other=t["g"].sigmoid()), "sigmoid(g)"),
    "numpy's names": (lambda t: torch.mul(scan(t), x2=torch.sigmoid(input=t["g"])), "sigmoid(g)"),
}


@pytest.mark.parametrize("case", KEYWORDS)
def test_arguments_by_keyword(case: str) -> None:
    fn, part = KEYWORDS[case]
    record = compiled_as_written(fn, tensors())
    assert any(p.startswith(part) for p in record.fused), record


def test_a_layer_written_in_keywords_fuses_like_any_other() -> None:
    t = {**tensors(), "qkv": torch.randn(B, T, 2 * K + N * V)}
    expected = ("q | k | v as one tensor", "decay gate", "D ⊙ v", "sigmoid(g)", "RMSNorm over N·V")
    assert compiled_as_written(by_keyword, t).fused == expected
    report = explain(by_keyword, t)  # reads the scan's arguments too
    assert report.scans[0].fused == expected


# ---- dtypes ---------------------------------------------------------------------------------------------------------


def normed(y: Tensor, weight: Tensor) -> Tensor:
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * weight


DTYPES: dict[str, tuple[Code, str]] = {
    "D of integers": (lambda t: scan(t) + t["D"].long() * t["v"], "D is torch.int64"),
    "D of bools": (lambda t: scan(t) + (t["D"] > 0) * t["v"], "D is torch.bool"),
    "D in fp64": (lambda t: scan(t) + t["D"].double() * t["v"], "D is torch.float64"),
    "g of integers": (lambda t: scan(t) * torch.sigmoid((4 * t["g"]).int()), "g is torch.int32"),
    "g in fp64": (lambda t: scan(t) * torch.sigmoid(t["g"].double()), "g is torch.float64"),
    "a weight of integers": (lambda t: normed(scan(t), torch.arange(V)), "the norm's weight is torch.int64"),
}


@pytest.mark.parametrize("case", DTYPES)
def test_what_the_op_does_not_take_stays_outside(case: str) -> None:
    fn, reason = DTYPES[case]
    record = compiled_as_written(fn, tensors())
    assert record.fused == ()
    assert reason in record.left[0], record


def test_a_forget_gate_of_integers_stays_outside_and_the_rest_fuses() -> None:
    record = compiled_as_written(lambda t: scan({**t, "x": (4 * t["x"]).int()}) * F.silu(t["g"]), tensors())
    assert record.fused == ("SiLU(g)",)
    assert any("what it is of is torch.int32" in reason for reason in record.left), record


def test_a_part_that_stays_outside_ends_the_tail_behind_what_fuses() -> None:
    record = compiled_as_written(lambda t: (scan(t) + t["D"] * t["v"]) * torch.sigmoid((4 * t["g"]).int()), tensors())
    assert record.fused == (SIGMOID, "D ⊙ v")
    assert "behind the tail: g is torch.int32" in record.left[0]


def test_everything_in_fp64_fuses() -> None:
    t = {n: x.double() for n, x in tensors().items()}
    record = compiled_as_written(lambda t: (scan(t) + t["D"] * t["v"]) * F.silu(t["g"]), t)
    assert record.fused == (SIGMOID, "D ⊙ v", "SiLU(g)")


# ---- torch's eps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rms_norm_s_default_eps(dtype: torch.dtype) -> None:
    """y so small that eps decides: torch takes that of the dtype it computes in, fp32 for half precision."""
    t = {n: x.to(dtype) for n, x in tensors().items()}
    t["v"] = t["v"] / 256
    layer = nn.RMSNorm(V, dtype=dtype)
    record = compiled_as_written(lambda t: layer(scan(t)), t, 0.02 if dtype.itemsize == 2 else 1e-5)
    assert record.fused == (SIGMOID, "RMSNorm per head")


# ---- reasons and failures -------------------------------------------------------------------------------------------


def test_the_reason_names_what_follows_the_last_cast_or_view() -> None:
    record = compiled_as_written(lambda t: scan(t).flatten(-2).double().float().flatten(-1).relu(), tensors())
    assert record.left[0].endswith("`double` follows")
    record = compiled_as_written(lambda t: scan(t).flatten(-2).relu(), tensors())
    assert record.left[0].endswith("`relu` follows")
    record = compiled_as_written(lambda t: (scan(t) * F.silu(t["g"])).flatten(-2) @ torch.ones(N * V, 3), tensors())
    assert record.left[0] == "behind the tail: `matmul` follows"


def test_results_as_one_tuple() -> None:
    def code(t: dict[str, Tensor]) -> Any:
        return torch.ops.m2rnn.scan(t["q"], t["k"], t["v"], t["x"].sigmoid(), t["W"], None, None, None, 0, "auto")

    backend = Rewriting()
    with torch.no_grad():
        for a, b in zip(torch.compile(code, backend=backend)(tensors()), code(tensors()), strict=True):
            assert a.shape == b.shape


@pytest.mark.parametrize("place", ["match", "_replace"])
def test_a_fault_of_ours_leaves_the_scan_opaque_and_says_so_once(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded: the first scan cannot be matched (or replaced), the second fuses, and the numbers are right."""
    sound, calls = getattr(rewrite, place), []

    def broken(*args: Any) -> Any:
        calls.append(args)
        if len(calls) != 2:
            return sound(*args)
        if place == "_replace":
            graph = args[0]
            with graph.inserting_before(args[1].last):
                graph.call_method("relu", (args[1].last.args[0],))  # what was begun
        raise IndexError("tuple index out of range")

    monkeypatch.setattr(rewrite, place, broken)

    def code(t: dict[str, Tensor]) -> Tensor:
        o = scan(t) * F.silu(t["g"])
        o = scan({**t, "v": o}) * F.silu(t["g"])
        return scan({**t, "v": o}) * F.silu(t["g"])

    t = tensors()
    backend = Rewriting()
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(torch.compile(code, backend=backend, fullgraph=True)(t), code(t))
    assert [r.fused for r in backend.records] == [(SIGMOID, "SiLU(g)"), (), (SIGMOID, "SiLU(g)")]
    assert backend.records[1].left == ("the rewrite failed with IndexError: tuple index out of range",)
    (message,) = [str(w.message) for w in caught if "m2rnn" in str(w.message)]
    assert "1 of 3 scans" in message
    assert "relu" not in backend.graphs[0][1]
