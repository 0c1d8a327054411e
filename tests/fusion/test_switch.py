# SPDX-License-Identifier: Apache-2.0
"""The switch, the hook in Inductor, and `explain`: no flag needed, nothing stale, no silence."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import m2rnn_compile
from m2rnn_compile import M2RNN, enable_fusion, explain, m2rnn
from m2rnn_compile.lowering.inductor import hook
from m2rnn_compile.ops import fusion_switch
from tests.fusion.compiling import ON_CPU, Rewriting, conv, fusion_on_cpu
from tests.fusion.composed import make_fused

__all__ = ["conv", "fusion_on_cpu"]
WHOLE = "the whole projection"  # in training
ALL = ("causal conv, SiLU", "q | k | v as one tensor", "decay gate", "D ⊙ v", "SiLU(g)", "RMSNorm over N·V")


def make_layer() -> M2RNN:
    return M2RNN(24, num_heads=4, key_dim=8, value_dim=4)


def python(code: str, *args: str, **env: str) -> str:
    command = [sys.executable, "-c", code, *args]
    folder = env.get("PYTHONPATH")  # -c puts the working directory before it
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_importing_the_package_imports_no_compiler() -> None:
    python(
        "import sys, m2rnn_compile\n"
        "bad = [m for m in ('triton', 'torch._inductor', 'torch._dynamo', 'rich') if m in sys.modules]\n"
        "assert not bad, bad"
    )


def training_step(fn: Any, layer: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(fn(x).square().sum(), list(layer.parameters())))


def test_inductor_gets_the_fused_op_without_a_flag(conv: bool) -> None:
    """Training, inference, another length; then off: the bits of a torch without our pass."""
    layer = make_layer()
    compiled = torch.compile(layer, fullgraph=True)
    for length in (9, 20):
        x = torch.randn(2, length, 24)
        hook.RECORDS.clear()
        for a, b in zip(training_step(compiled, layer, x), training_step(layer, layer, x), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        assert [(r.fused, r.training) for r in hook.RECORDS] == [((WHOLE, *ALL) if conv else ALL[1:], True)]
        hook.RECORDS.clear()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-4)
        assert [(r.fused, r.training) for r in hook.RECORDS] == [(ALL if conv else ALL[1:], False)]
    enable_fusion(False)
    hook.RECORDS.clear()
    off = [compiled(x), *training_step(compiled, layer, x)]
    assert not hook.RECORDS
    torch._dynamo.reset()
    with torch._inductor.config.patch(pre_grad_custom_pass=None):
        never = [compiled(x), *training_step(compiled, layer, x)]
    assert all(torch.equal(a, b) for a, b in zip(off, never, strict=True))


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("trained", ["D", "g_norm.weight", "output_projection.weight", "D g_norm.weight"])
def test_what_stands_behind_a_frozen_scan_trains(fused: bool, trained: str, fusion_on_cpu: None) -> None:
    """The scan itself keeps nothing for a backward then; what fusion would absorb has its gradients all the same."""
    layer, x = make_layer().requires_grad_(False), torch.randn(2, 9, 24)
    leaves = [layer.get_parameter(name).requires_grad_() for name in trained.split()]
    compiled = torch.compile(layer, backend=Rewriting() if fused else "aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(x).square().sum(), leaves)
    expected = torch.autograd.grad(layer(x).square().sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_a_gate_behind_a_frozen_scan_trains(fused: bool, fusion_on_cpu: None) -> None:
    x = make_fused(N=4, D=True, g=True)
    t = {n: v.detach() for n, v in x.tensors.items()}

    def f(g: Tensor) -> Tensor:
        y = m2rnn(t["q"], t["k"], t["v"], t["f"], t["W"]).y
        return (y + t["D"] * t["v"]) * torch.nn.functional.silu(g)

    g = t["g"].requires_grad_()
    compiled = torch.compile(f, backend=Rewriting() if fused else "aot_eager", fullgraph=True)
    (got,), (expected,) = (torch.autograd.grad(fn(g).square().sum(), g) for fn in (compiled, f))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_the_switch_compiles_again_and_nothing_stale_runs() -> None:
    seen = []
    layer, x = make_layer(), torch.randn(2, 9, 24)

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(fusion_switch.SETTINGS.enabled)
        return gm.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for enabled in (True, True, False, True, False):
        enable_fusion(enabled)
        compiled(x)
    assert seen == [True, False]  # each setting once; going back finds what is compiled already


TRAINS = """
import sys
import torch
import m2rnn_compile
assert m2rnn_compile.__file__.startswith(sys.argv[1]), m2rnn_compile.__file__
m2rnn_compile.enable_fusion({enabled}, devices=("cpu",))
torch.manual_seed(0)
q, v, W = torch.randn(1, 5, 1, 4), torch.randn(1, 5, 2, 3), torch.eye(3)
g, f = torch.randn(1, 5, 2, 3, requires_grad=True), torch.rand(1, 5, 2, requires_grad=True)
scan = lambda g, f: m2rnn_compile.m2rnn(q, q, v, f, W[None], impl="eager").y * torch.sigmoid(g)
torch.compile(scan)(g, f).sum().backward()
from torch._dynamo.utils import counters
hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
print({leaf}.grad.abs().sum().item(), hits)
"""


@pytest.mark.slow
@pytest.mark.parametrize("enabled", [False, True], ids=["off", "on"])
def test_caches_on_disk_keep_versions_of_the_library_apart(enabled: bool, tmp_path: Path) -> None:
    """An upgrade that changes what only a compiler traces, as the backward of an op, runs at once."""
    if enabled:  # the fused op's backward adds up the gates of heads that share them
        edited, leaf, right = "reference.py", "g", "return dx if dx.shape[axis] == heads else dx."
        wrong = "return 0 * dx if dx.shape[axis] == heads else dx."
    else:
        edited, leaf, right = "scan.py", "f", "    return dq, dk, dv, df, dW, dh0,"
        wrong = "    return dq, dk, dv, 0 * df, dW, dh0,"
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        shutil.copytree(Path(m2rnn_compile.__file__).parent, folder / "m2rnn_compile")
    file = new / "m2rnn_compile" / "ops" / edited
    source = file.read_text()
    assert source.count(right) == 1
    file.write_text(source.replace(right, wrong))
    shared = dict(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"), TORCHINDUCTOR_FX_GRAPH_CACHE="1")
    code = TRAINS.format(enabled=enabled, leaf=leaf)
    runs = [python(code, str(folder), PYTHONPATH=str(folder), **shared).split() for folder in (old, new)]
    assert float(runs[0][0]) > 0
    assert runs[1] == ["0.0", "0"]


def test_code_without_a_call_of_m2rnn_keeps_its_setting_until_it_is_compiled_again(fusion_on_cpu: None) -> None:
    """As the docs say: nothing that Dynamo traces there reads the switch."""
    x = make_fused(N=4, D=True, g=True).tensors
    backend = Rewriting()

    @torch.compile(backend=backend)
    def f(g: Tensor) -> Tensor:
        y: Tensor = torch.ops.m2rnn.scan.default(x["q"], x["k"], x["v"], x["f"], x["W"], None, None, None, 0, "auto")[0]
        return y * torch.sigmoid(g)

    for setting in (ON_CPU, dict(devices=())):
        enable_fusion(True, **setting)
        f(x["g"])
        assert [r.fused for r in backend.records] == [("sigmoid(g)",)]
    torch._dynamo.reset()
    f(x["g"])
    assert [r.fused for r in backend.records] == [("sigmoid(g)",), ()]


CACHED = """
import torch
import m2rnn_compile
from m2rnn_compile.lowering.inductor import hook
m2rnn_compile.enable_fusion({enabled}, devices=("cpu",))
torch.manual_seed(0)
layer = m2rnn_compile.M2RNN(24, num_heads=4, key_dim=8, value_dim=4)
with torch.no_grad():
    torch.compile(layer)(torch.randn(2, 9, 24))
from torch._dynamo.utils import counters
code = counters["inductor"]
print(len(hook.RECORDS), code["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"])
"""


def test_caches_on_disk_keep_the_settings_apart(tmp_path: Any) -> None:
    env = dict(TORCHINDUCTOR_CACHE_DIR=str(tmp_path), TORCHINDUCTOR_FX_GRAPH_CACHE="1")
    assert python(CACHED.format(enabled=True), **env).split()[0] == "1"
    assert python(CACHED.format(enabled=False), **env).split() == ["0", "0"]  # nothing of the other setting is used
    again = python(CACHED.format(enabled=True), **env).split()
    assert int(again[1]) > 0  # and the same setting finds its own


def test_a_user_s_pass_stays_and_runs_first(fusion_on_cpu: None) -> None:
    import torch._inductor.config as config

    order: list[str] = []

    class Theirs(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            order.append("theirs")

        def uuid(self) -> str:
            return "theirs"

    for several in (True, False):
        theirs = Theirs()
        with config.patch(pre_grad_custom_pass=theirs), pytest.MonkeyPatch.context() as patch:
            if not several:  # as torch 2.11 and 2.12 have it
                patch.setattr(hook, "torch_version", lambda: (2, 12))
            hook.install(config)
            hook.install(config)
            assert hook.installed(config)
            installed = config.pre_grad_custom_pass
            if several and isinstance(installed, list):
                assert len(installed) == 2
                assert installed[0] is theirs
            hook.RECORDS.clear()
            torch._dynamo.reset()
            layer = make_layer()
            with torch.no_grad(), config.patch(force_disable_caches=True):
                torch.compile(layer)(torch.randn(2, 9, 24))
            assert order == ["theirs"]
            assert len(hook.RECORDS) == 1
            order.clear()


class Theirs(torch._inductor.custom_graph_pass.CustomGraphPass):
    """A user's pass, which does nothing."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        pass

    def uuid(self) -> str:
        return "theirs"


@pytest.mark.parametrize("form", [lambda p: p, lambda p: [p]], ids=["pass", "list"])
def test_a_pass_that_takes_the_place_of_ours_is_noticed(
    form: Any, fusion_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whoever asks, and by one warning where a scan is compiled without it; the switch puts it back behind."""
    import torch._inductor.config as config

    monkeypatch.setattr(hook, "_warned", set())
    assert hook.status().startswith("installed in torch")
    x = make_fused(N=4, D=True, g=True).tensors
    f = lambda g: m2rnn(x["q"], x["k"], x["v"], x["f"], x["W"]).y * torch.sigmoid(g)
    with config.patch(pre_grad_custom_pass=form(Theirs()), force_disable_caches=True):
        lost = "lost: torch._inductor.config.pre_grad_custom_pass was replaced by Theirs"
        assert hook.status().startswith(lost)
        assert lost in str(explain(f, x["g"])).replace("\n", " ")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "m2rnn")
            torch.compile(f, backend="aot_eager")(x["g"])  # which never fuses
        torch._dynamo.reset()
        hook.RECORDS.clear()
        with pytest.warns(UserWarning, match=rf"m2rnn: fusion .* is {lost}.*enable_fusion.*unfused") as seen:
            torch.compile(f)(x["g"])
        assert sum(str(w.message).startswith("m2rnn") for w in seen) == 1
        assert not hook.RECORDS
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "m2rnn")
            torch.compile(f)(x["g"])
        enable_fusion(True, **ON_CPU)
        assert hook.status().startswith("installed in torch")
        torch._dynamo.reset()
        torch.compile(f)(x["g"])
        assert [r.fused for r in hook.RECORDS] == [("sigmoid(g)",)]


def test_copies_and_pickles_of_inductor_s_configuration_hold_a_pass() -> None:
    import torch._inductor.config as config

    ours = config.pre_grad_custom_pass
    assert hook.installed(config)
    assert copy.deepcopy(ours) is copy.copy(ours) is ours
    config.load_config(config.get_config_copy())
    assert hook.installed(config)
    for earlier in (None, Theirs()):
        loaded = pickle.loads(pickle.dumps(hook._make_pass(earlier)))
        assert hook.installed(SimpleNamespace(pre_grad_custom_pass=loaded))  # type: ignore[arg-type]
        assert loaded.uuid() == hook._make_pass(earlier).uuid()


@pytest.mark.parametrize(
    "devices,error,message",
    [
        ("cpu", TypeError, r"sequence of device types as text, got 'cpu'; for one write devices=\('cuda',\)"),
        ((torch.device("cuda"),), TypeError, "sequence of device types as text"),
        (("gpu",), ValueError, "`devices` names 'gpu', which is no device type"),
        (("cpu", "cuda:0"), ValueError, "got the device 'cuda:0'.*use 'cuda'"),
    ],
)
def test_devices_are_types(devices: Any, error: type[Exception], message: str) -> None:
    before = fusion_switch.SETTINGS
    with pytest.raises(error, match=message):
        enable_fusion(devices=devices)
    assert before == fusion_switch.SETTINGS


@pytest.mark.parametrize("version", [(2, 10), (3, 0)])
def test_an_unknown_torch_gets_the_opaque_op_and_one_message(
    version: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "torch_version", lambda: version)
    monkeypatch.setattr(hook, "_status", "")
    monkeypatch.setattr(hook, "_warned", set())
    config: Any = SimpleNamespace(pre_grad_custom_pass=None)
    with pytest.warns(UserWarning, match="m2rnn: fusion under torch.compile is off: .* not one of the versions 2.11"):
        hook.install(config)
    assert config.pre_grad_custom_pass is None
    assert hook.status().startswith("not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hook.install(config)
        hook._warned.clear()
        enable_fusion(False)
        hook.install(config)  # with fusion off nobody misses it


def test_a_torch_without_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook, "_status", "")
    monkeypatch.setattr(hook, "_warned", set())
    with pytest.warns(UserWarning, match="has no such hook"):
        hook.install(SimpleNamespace())  # type: ignore[arg-type]


# ---- explain --------------------------------------------------------------------------------------------------------


def test_explain_says_what_and_why_not(fusion_on_cpu: None) -> None:
    layer, x = make_layer(), torch.randn(2, 9, 24)
    report = explain(layer, x)
    (scan,) = report.scans
    assert scan.fused == (WHOLE, *ALL)
    assert scan.training
    assert scan.shapes == "B=2, T=9, N=4, K=8, V=4"
    assert scan.where.startswith("layers/m2rnn.py:")
    assert "RMSNorm over N·V" in str(report)
    with torch.no_grad():
        assert not explain(layer, x).scans[0].training
    enable_fusion(True, **ON_CPU, conv=False)
    assert explain(layer, x).scans[0].fused == ALL[1:]
    enable_fusion(True, devices=("cpu",))
    assert explain(layer, x).scans[0].fused == (WHOLE, *ALL)  # where one op takes all, it takes the gate too
    with torch.no_grad():
        assert explain(layer, x).scans[0].fused == ALL
    enable_fusion(True, devices=("cpu",), conv=False)
    assert explain(layer, x).scans[0].left[-1].startswith("decay gate: one small pass either way")
    enable_fusion(True)
    assert explain(layer, x).scans[0].left[0].startswith("D ⊙ v, SiLU(g), RMSNorm over N·V: on cpu")
    enable_fusion(False)
    assert explain(layer, x).scans[0].left == ("fusion is off",)
    assert "fusion is off" in str(explain(layer, x))


def test_the_docs_show_what_explain_prints() -> None:
    """All of it but the line number, which dots stand for, and torch's version."""
    text = (Path(__file__).parents[2] / "docs/compile.md").read_text()
    code, shown = re.search(r"^```python\n([^`]*?explain\(.*?)^```\n+```text\n(.*?)^```", text, re.M | re.S).groups()  # type: ignore[union-attr]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {"torch": torch, "m2rnn_compile": m2rnn_compile, "M2RNN": M2RNN})
    printed = re.sub(r"(?<=m2rnn\.py:)\d+", lambda m: "·" * len(m[0]), out.getvalue())
    printed, shown = (re.sub(r"torch \S+'s", "torch's", x) for x in (printed, shown))
    assert [line.rstrip() for line in printed.split("\n")] == [line.rstrip() for line in (shown + "\n").split("\n")]


def test_explain_many_times_and_a_model_of_many_scans(fusion_on_cpu: None) -> None:
    model = nn.Sequential(make_layer(), make_layer())
    for length in range(3, 15):  # beyond Dynamo's limit of compilations of one function
        assert [r.fused for r in explain(model, torch.randn(2, length, 24)).scans] == [(WHOLE, *ALL)] * 2


@pytest.mark.parametrize("op", [torch.ops.m2rnn.scan, torch.ops.m2rnn.scan.default], ids=["packet", "overload"])
@pytest.mark.parametrize("keywords", [False, True])
def test_the_op_called_directly(op: Any, keywords: bool, fusion_on_cpu: None) -> None:
    x = make_fused(N=4, D=True, g=True).tensors

    def f(g: Tensor) -> Tensor:
        rest = dict(state_grad_clip=None, chunk=0, impl="auto") if keywords else {}
        y = op(x["q"], x["k"], x["v"], x["f"], x["W"], None, None, *(() if keywords else (None, 0, "auto")), **rest)[0]
        return y * torch.sigmoid(g)

    assert [r.fused for r in explain(f, x["g"]).scans] == [("sigmoid(g)",)]
    hook.RECORDS.clear()
    torch.testing.assert_close(torch.compile(f)(x["g"]), f(x["g"]), atol=1e-5, rtol=1e-4)
    assert [r.fused for r in hook.RECORDS] == [("sigmoid(g)",)]
    enable_fusion(False)
    assert [r.left for r in explain(f, x["g"]).scans] == [("fusion is off",)]


def test_explain_of_a_model_without_a_scan() -> None:
    assert explain(nn.Linear(3, 3), torch.randn(2, 3)).scans == ()


def test_explain_refuses_compiled_models() -> None:
    with pytest.raises(TypeError, match=r"before torch\.compile"):
        explain(torch.compile(make_layer()), torch.randn(2, 9, 24))


def test_explain_leaves_compiled_code_alone(fusion_on_cpu: None) -> None:
    layer, x = make_layer(), torch.randn(2, 9, 24)
    count = 0

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal count
        count += 1
        return gm.forward

    compiled = torch.compile(layer, backend=backend)
    compiled(x)
    explain(layer, x)
    compiled(x)
    assert count == 1
