# SPDX-License-Identifier: Apache-2.0
"""Peers of the whole layer, on a CPU: what is theirs and needs a GPU is stood in for by an implementation of ours."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import cli, files, measure
from bench.gate import Judge
from bench.providers import PROVIDERS, Context, layers, upstream
from bench.shapes import parse_shape
from m2rnn_compile import m2rnn
from m2rnn_compile.layers import linear_recurrence

SHARED = "B2,T19,N4,K8,V4,Nq2,Nk4,Nv2,Nf4,Nw1"


def build(name, shape):
    (provider,) = [provider for provider in PROVIDERS if provider.name == name]
    return provider.build["layer"](Context("layer", parse_shape(shape), torch.float32, torch.device("cpu")))


def eager_scan(q, k, v, f, W, *, state_grad_clip):
    out = m2rnn(q, k, v, f, W, state_grad_clip=state_grad_clip, output_final_state=True, impl="eager")
    return out.y, out.final_state


@pytest.mark.parametrize("shape", ["B2,T19,N4,K8,V4", SHARED])
def test_the_authors_layer_is_judged_as_the_same_layer_as_ours(shape, monkeypatch):
    monkeypatch.setattr(upstream, "scan", eager_scan)
    theirs, ours = build("xma", shape), build("eager", shape)
    assert theirs.family == ours.family
    assert all(torch.equal(x, ours.leaves[name]) for name, x in theirs.leaves.items())
    verdict = Judge(ours)(theirs)
    assert verdict.ok, verdict.failing
    assert Judge(ours).of_inference(theirs).ok


def test_the_authors_layer_runs_their_op_and_a_wrong_one_is_refused(monkeypatch):
    monkeypatch.setattr(upstream, "scan", lambda q, k, v, f, W, **clip: eager_scan(q, k, v, f, W + 1, **clip))
    problem = build("xma", "B2,T19,N4,K8,V4")
    assert "y errs" in Judge(problem)(problem).failing


def test_gated_deltanet_is_its_layer_around_the_chunked_kernel(monkeypatch):
    asked = []

    def uses_fla(impl, q, v, delta):
        asked.append(impl)
        return False  # chunks in torch stand in

    monkeypatch.setattr(linear_recurrence, "_uses_fla", uses_fla)
    problem = build("fla-gdn", "B2,T19,N4,K8,V16")
    assert problem.operator == "layer Gated DeltaNet, 1 heads of K 32 V 64, width 64"
    judge = Judge(problem)
    assert set(asked) == {"torch"}  # the truth
    asked.clear()
    verdict = judge(problem)
    assert verdict.ok, verdict.failing
    assert set(asked) == {"fla"}
    assert problem.work["forward"].flops > 2 * 2 * 19 * layers.weights_of(linear_of(problem))


def linear_of(problem):
    """A module of the matrices among a problem's leaves, to count them."""
    matrices = [x for name, x in problem.leaves.items() if name.endswith("_proj.weight")]
    return torch.nn.ModuleList([torch.nn.Linear(x.shape[1], x.shape[0], bias=False) for x in matrices])


def test_layers_are_timed_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(upstream, "scan", eager_scan)
    monkeypatch.setattr(linear_recurrence, "_uses_fla", lambda impl, q, v, delta: False)
    here = [dataclasses.replace(p, why_not=lambda device: None, version=None) for p in PROVIDERS]
    monkeypatch.setattr(measure, "PROVIDERS", here)
    path = tmp_path / "rows.jsonl"
    argv = ["layer", "--shape", "B1,T9,N4,K8,V16", "--device", "cpu", "--provider", "eager,xma,fla-gdn,sdpa"]
    assert cli.main([*argv, "--mode", "inference,forward+backward", "--runs", "1", "--out", str(path)]) == 0
    assert {(row.provider, row.mode, row.status) for row in files.read(path)} == {
        (name, mode, "ok")
        for name in ("eager", "xma", "fla-gdn", "sdpa")
        for mode in ("inference", "forward+backward")
    }
