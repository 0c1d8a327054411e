# SPDX-License-Identifier: Apache-2.0
"""Tuning: opt-in, checked, kept on disk under a version, never keyed on T. Without a GPU: all but the timing itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

import m2rnn_compile
from m2rnn_compile.lowering import triton as lowering
from m2rnn_compile.lowering.triton import tuning
from m2rnn_compile.lowering.triton.config import LaunchConfig
from m2rnn_compile.testing import assert_accurate, make_inputs, oracle, run, run_low_precision
from tests.lowering.few_numbers import draws_for, together

A, B, C = LaunchConfig(16, 1), LaunchConfig(32, 1), LaunchConfig(64, 2)


@pytest.fixture(autouse=True)
def _nothing_found() -> Iterator[None]:
    tuning.forget()
    yield
    tuning.forget()


def choose(times: dict[LaunchConfig, float], wrong: tuple[LaunchConfig, ...] = ()) -> LaunchConfig:
    """What is chosen where a run takes `times` and the results of `wrong` are wrong; A is pinned."""
    rows = tuning.choose(
        "forward", list(times), A, lambda c: c, lambda f: times[f()], lambda c: "wrong" if c in wrong else None
    )
    assert [r.pinned for r in rows] == [r.config == A for r in rows]
    assert all(r.ms is None for r in rows if r.config in wrong)
    (best,) = (r.config for r in rows if r.chosen)
    return best


def test_the_fastest_right_one_is_chosen() -> None:
    assert choose({A: 3.0, B: 2.0, C: 1.0}) == C
    assert choose({A: 3.0, B: 2.0, C: 1.0}, wrong=(C,)) == B, "a wrong one is not even timed"


def test_the_pinned_one_stays_unless_another_is_clearly_faster() -> None:
    assert choose({A: 1.0, B: 0.99}) == A
    assert choose({A: 1.0, B: 0.97}) == B


def test_one_that_cannot_run_is_left_out_and_none_is_an_error() -> None:
    def fails(config: LaunchConfig) -> LaunchConfig:
        if config != A:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return config

    rows = tuning.choose("forward", [B], A, fails, lambda f: 1.0, lambda c: None)
    assert [(r.config, r.chosen) for r in rows] == [(A, True), (B, False)]
    assert rows[1].problem is not None
    assert rows[1].problem.startswith("OutOfResources: out of resource: shared memory")
    with pytest.raises(RuntimeError, match="no configuration of forward ran"):
        tuning.choose("forward", [B], C, fails, lambda f: 1.0, lambda c: None)


def test_what_was_found_survives_the_process(tmp_path: Path) -> None:
    rows = tuning.choose("backward", [B], A, lambda c: c, lambda f: {A: 2.0, B: 1.0}[f()], lambda c: None)
    tuning.keep(rows, torch.bfloat16, 168, 64, 16)
    tuning.save(tmp_path / "tuned.json")
    tuning.forget()
    assert tuning.chosen("backward", torch.bfloat16, 168, 64, 16) is None
    assert m2rnn_compile.load_tuned(tmp_path / "tuned.json") == 1
    assert tuning.chosen("backward", torch.bfloat16, 168, 64, 16) == B
    for other in (("forward", torch.bfloat16, 168), ("backward", torch.float16, 168), ("backward", torch.bfloat16, 84)):
        assert tuning.chosen(*other, 64, 16) is None
    assert [p.name for p in tmp_path.iterdir()] == ["tuned.json"], "no litter"


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", '{"format": 1}', '{"format": 99, "configs": {}}',
        '{"format": 1, "configs": {"a": ["x", 1, null]}}', '{"format": 1, "configs": {"a": 3}}',
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tuned.json").write_text(content)
    with pytest.raises(ValueError, match=r"tuned\.json holds no tuned configurations.*delete it"):
        m2rnn_compile.load_tuned(tmp_path / "tuned.json")


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"call m2rnn_compile\.tune"):
        m2rnn_compile.load_tuned(tmp_path / "tuned.json")


def test_the_file_belongs_to_gpu_triton_and_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("M2RNN_CACHE_DIR", str(tmp_path))
    here = tuning.default_path("GPU one")
    assert here.parent == tmp_path
    assert here == tuning.default_path("GPU one")
    assert here != tuning.default_path("GPU two")
    monkeypatch.setattr(tuning, "_sources", lambda: "other kernels")
    assert here != tuning.default_path("GPU one")
    monkeypatch.undo()
    monkeypatch.setenv("M2RNN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning.triton, "__version__", "0.0")
    assert here != tuning.default_path("GPU one")


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ValueError, match="this machine has none"):
        m2rnn_compile.tune(B=1, N=1, K=16, V=16)
    with pytest.raises(ValueError, match="no CUDA device is there"):
        m2rnn_compile.load_tuned()


@pytest.mark.parametrize(
    ("K", "V", "kernel"), [(64, 16, "gluon"), (16, 16, "gluon"), (50, 20, "portable"), (64, 64, "wide")]
)
def test_candidates_fit_the_state(K: int, V: int, kernel: str) -> None:
    for direction in ("forward", "backward"):
        found = tuning.candidates(direction, K, V, kernel)
        assert (found == []) == (kernel == "wide")
        assert all(c.rows <= max(16, 1 << (K - 1).bit_length()) and c.rows >= 16 * c.warps for c in found)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 7, 64, 16), (2, 3, 64, 32), (1, 2, 50, 20), (1, 2, 64, 64)])
def test_every_candidate_is_right_and_the_choice_is_used(
    shape: tuple[int, int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, N, K, V = shape
    rows = m2rnn_compile.tune(B=n, N=N, K=K, V=V, T=130, path=tmp_path / "tuned.json")
    assert all(r.problem is None for r in rows), rows
    assert sum(r.chosen for r in rows) == 2
    assert len(json.loads((tmp_path / "tuned.json").read_text())["configs"]) == 2
    used = []
    for name in ("forward_config", "backward_config"):
        monkeypatch.setattr(lowering, name, lambda *_, name=name: used.append(name))
    for T in (1, 65):
        options = dict(dtype=torch.bfloat16, device="cuda", state_grad_clip=1.0)
        draws = [make_inputs(n, T, N, K, V, **options, seed=seed) for seed in range(draws_for(n * N, T))]
        truth, eager = [oracle(x, impl="eager") for x in draws], [run_low_precision(x) for x in draws]
        assert_accurate(together([run(x, impl="triton") for x in draws]), together(truth), together(eager))
    assert used == [], "no length asks for another"
