# SPDX-License-Identifier: Apache-2.0
"""What a newcomer meets first: the import, the README's example and commands, the wheel."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import m2rnn_compile

ROOT = Path(__file__).resolve().parent.parent


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_after(code: str) -> set[str]:
    return set(python(f"import sys\n{code}\nprint(*sys.modules)").split())


def test_import_loads_torch_and_nothing_else():
    extra = modules_after("import m2rnn_compile") - modules_after("import torch")
    foreign = {name for name in extra if name.partition(".")[0] not in sys.stdlib_module_names}
    foreign -= {name for name in foreign if name.partition(".")[0] in ("m2rnn_compile", "torch")}
    assert not foreign, f"import m2rnn_compile brought along {sorted(foreign)}"
    own = {name for name in extra if name.startswith("m2rnn_compile.")}
    assert all(name.startswith("m2rnn_compile.ops") for name in own), f"loaded before its first use: {sorted(own)}"
    assert not any(name.startswith(("torch._inductor", "torch._dynamo")) for name in extra)


@pytest.mark.parametrize("blocked", ["triton", "rich", "safetensors"])
def test_runs_on_a_cpu_without(blocked):
    out = python(
        f"import sys; sys.modules[{blocked!r}] = None\n"
        "import torch\n"
        "from m2rnn_compile import M2RNN, explain_impl, m2rnn\n"
        "q, k, v = torch.randn(1, 3, 1, 4), torch.randn(1, 3, 1, 4), torch.randn(1, 3, 2, 4)\n"
        "f, W = torch.rand(1, 3, 2), torch.randn(2, 4, 4)\n"
        "y, state = m2rnn(q, k, v, f, W)\n"
        "print(tuple(y.shape), state.dtype, 'triton' in explain_impl(q, k, v, f, W).rejected, M2RNN.__name__)\n"
    )
    assert out == "(1, 3, 2, 4) torch.float32 True M2RNN\n"


def test_import_does_not_initialise_cuda():
    assert python("import torch, m2rnn_compile; print(torch.cuda.is_initialized())") == "False\n"


def test_version_is_the_project_s():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert m2rnn_compile.__version__ == declared
    assert f"## [{declared}]" in (ROOT / "CHANGELOG.md").read_text()


def test_public_names_exist_and_are_documented():
    for name in m2rnn_compile.__all__:
        assert getattr(m2rnn_compile, name).__doc__, name


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(readme_blocks("python"))))
def test_readme_example_runs(number):
    code = readme_blocks("python")[number]
    exec(compile(code, f"README.md, Python block {number + 1}", "exec"), {"__name__": "readme"})


def test_readme_first_example_is_short_and_on_the_first_screen():
    text = (ROOT / "README.md").read_text()
    first = readme_blocks("python")[0]
    assert len(first.strip().splitlines()) <= 5
    assert text[: text.index(first)].count("\n") < 40


def test_readme_commands_are_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", "\n".join(readme_blocks("bash"))))
    assert {"demo", "test"} <= named <= targets


def test_links_in_the_documents_lead_somewhere():
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    for document in documents:
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text()):
            if "://" not in link:
                assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_torch_is_pinned_exactly():
    # An open range would let pip fetch another build: gigabytes of CUDA libraries on a laptop.
    constraints = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^torch==\d+\.\d+\.\d+$", constraints, re.MULTILINE)
    assert not re.search(r"^[A-Za-z_-]+\s*[<>~]", constraints, re.MULTILINE)


def test_ci_runs_what_contributors_run():
    script = (ROOT / ".ci/run").read_text()
    assert (ROOT / ".ci/run").stat().st_mode & 0o100
    assert re.findall(r"^exec (.+)$", script, re.MULTILINE) == ["make test"]


@pytest.mark.slow
def test_wheel_holds_the_package_and_its_data(tmp_path):
    # Built from a copy: setuptools leaves build/ behind, and a stale one would hide a missing file.
    source = tmp_path / "source"
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if name.startswith(("m2rnn_compile/", "pyproject", "README", "LICENSE")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
        + ["--disable-pip-version-check", "-w", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("m2rnn_compile-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    sources = {str(p.relative_to(source)) for p in source.glob("m2rnn_compile/**/*") if p.suffix in (".py", ".cpp")}
    assert any(name.endswith(".cpp") for name in sources)
    assert sources | {"m2rnn_compile/py.typed"} <= names
    assert all(name.startswith("m2rnn_compile") for name in names), "tests or benchmarks got into the wheel"
    core = {re.split(r"[<>=;\s]", line[15:])[0] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")
            and "extra ==" not in line}  # fmt: skip
    assert core == {"torch", "rich", "triton"}
