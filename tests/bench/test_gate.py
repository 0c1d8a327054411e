# SPDX-License-Identifier: Apache-2.0
"""The gate lets through what is right and stops what is wrong: every fault here was put in on purpose."""

import dataclasses
import math

import pytest
import torch

from bench import measure, memory
from bench.gate import Judge
from bench.measure import extra_verdict
from bench.providers import Context, lm, ours
from bench.shapes import parse_shape
from m2rnn_compile import m2rnn, m2rnn_step

SHAPE = parse_shape("B2,T24,N2,K4,V3")
CPU = torch.device("cpu")


def context(shape=SHAPE, kernel="op", dtype=torch.float32, **options):
    return Context(kernel, shape, dtype, CPU, **options)


def eager(**given):
    return m2rnn(**given, impl="eager").y


@pytest.fixture(scope="module")
def judge():
    return Judge(ours.scan_problem(context(), eager))


@pytest.mark.parametrize("impl", ["reference", "eager", "cpp"])
def test_our_implementations_pass(impl, judge):
    verdict = judge(ours.scan_problem(context(), lambda **given: m2rnn(**given, impl=impl).y))
    assert verdict.ok, verdict.failing
    assert verdict.allows("backward")
    assert 0 < verdict.ratio <= 1
    assert verdict.against == "fp64 of an independent run, all steps"


def no_carry(q, k, v, f, W, state_grad_clip):
    parts = [
        m2rnn(q[:, t : t + 8], k[:, t : t + 8], v[:, t : t + 8], f[:, t : t + 8], W, impl="eager").y for t in (0, 8, 16)
    ]
    return torch.cat(parts, 1)


def last_chunk_unwritten(q, k, v, f, W, state_grad_clip):
    good = m2rnn(q, k, v, f, W, impl="eager").y
    y = torch.empty_like(good)  # poisoned by the gate
    y[:, :16] = good[:, :16]
    return y


FAULTS = {
    "wrong weights": lambda **given: eager(**{**given, "W": given["W"].mT}),
    "the carry is dropped between chunks": no_carry,
    "the last chunk is never written": last_chunk_unwritten,
    "everything is a hundredth too large": lambda **given: eager(**given) * 1.01,
    "one step is off": lambda **given: eager(**given).roll(1, 1),
    "NaN at one place": lambda **given: eager(**given).index_fill(1, torch.tensor([20]), math.nan),
    "results of another shape": lambda **given: eager(**given)[..., :1],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_result_is_refused(fault, judge):
    problem = ours.scan_problem(context(), FAULTS[fault])
    if fault == "results of another shape":
        problem = dataclasses.replace(problem, dy=problem.dy[..., :1])
    verdict = judge(problem)
    assert not verdict.allows("forward")
    assert not verdict.allows("backward")
    assert "y errs" in verdict.failing


def test_a_wrong_gradient_stops_backward_only():
    strict = context(clip=0.05)
    forgetful = lambda state_grad_clip, **given: eager(**given)  # forgets the clip: same result, other gradients
    verdict = Judge(ours.scan_problem(strict, eager))(ours.scan_problem(strict, forgetful))
    assert verdict.allows("forward")
    assert verdict.allows("inference")
    assert not verdict.allows("backward")
    assert not verdict.allows("forward+backward")
    assert "dk errs" in verdict.failing


def zeros_without_gradients(**given):
    y = eager(**given)
    return y if torch.is_grad_enabled() else torch.zeros_like(y)


def unwritten_without_gradients(**given):
    y = eager(**given)
    return y if torch.is_grad_enabled() else torch.empty_like(y)


@pytest.mark.parametrize("fault", [zeros_without_gradients, unwritten_without_gradients])
def test_inference_is_judged_on_what_it_runs(fault, judge):
    problem = ours.scan_problem(context(), fault)
    assert judge(problem).ok
    verdict = judge.of_inference(problem)
    assert not verdict.allows("inference")
    assert verdict.failing.startswith("y errs")
    assert " dq " not in verdict.failing  # there are no gradients to err
    right = judge.of_inference(ours.scan_problem(context(), eager))
    assert right.allows("inference")
    assert 0 < right.ratio <= 1


def test_a_step_is_judged_on_what_inference_runs():
    good = lambda **given: tuple(m2rnn_step(**given))
    judge = Judge(ours.step_problem(context(kernel="step"), good))
    assert judge.of_inference(ours.step_problem(context(kernel="step"), good)).ok


def test_a_peer_may_err_more_but_not_without_bound():
    slightly = lambda **given: eager(**given) * (1 + 1.0e-6)
    problem = ours.scan_problem(context(), slightly)
    judge = Judge(problem)
    strict, peer = judge(problem), judge(dataclasses.replace(problem, slack=1000.0))
    assert not strict.ok
    assert peer.ok
    assert strict.ratio == peer.ratio > 1  # the row shows the same figure
    assert not judge(dataclasses.replace(ours.scan_problem(context(), FAULTS["one step is off"]), slack=1000.0)).ok


def test_a_peer_may_err_a_few_roundings_whatever_the_tolerance():
    problem = ours.scan_problem(context(), lambda **given: eager(**given) * 1.001)
    judge = Judge(problem)
    assert not judge(problem).ok
    verdict = judge(dataclasses.replace(problem, slack=4.0, tolerated=0.01))
    assert verdict.ok
    assert verdict.ratio > 4  # the row still shows it
    assert not judge(dataclasses.replace(problem, slack=4.0, tolerated=1e-4)).ok


def test_the_error_of_a_peer_is_told_relative_to_a_rounding_of_its_dtype():
    """Of a leaf in fp32 among others in bf16, say, whose gradient a peer computes in bf16."""
    problem = ours.scan_problem(context(), lambda **given: eager(**given) * 1.001)
    rounding = torch.finfo(torch.bfloat16).eps
    verdict = Judge(problem)(dataclasses.replace(problem, tolerated=8 * rounding, rounding=rounding))
    assert verdict.ok
    assert 0.1 < verdict.ratio < 1
    assert not Judge(problem)(problem).ok


def test_a_gate_may_be_told_to_look_at_fewer_steps(monkeypatch):
    monkeypatch.setattr(ours, "ORACLE_STEPS", 16)  # beyond, the tolerance comes from 4 steps
    problem = ours.scan_problem(context(), eager)
    assert measure.at_most(None, problem) is problem
    assert measure.at_most(problem.steps, problem) is problem
    assert Judge(measure.at_most(8, problem)).against.endswith("first 8 steps, tolerance from 4")
    assert Judge(measure.at_most(3, problem)).against.endswith("first 3 steps")
    peer = dataclasses.replace(problem, gate_steps=6, yardstick_steps=None)
    assert measure.at_most(8, peer) is peer


def test_a_gate_on_the_first_steps_sees_faults_there_and_what_leaks_from_later_steps():
    short = lambda call: dataclasses.replace(ours.scan_problem(context(), call), gate_steps=8)
    judge = Judge(short(eager))
    assert judge(short(eager)).ok
    assert judge.against.endswith("first 8 steps")
    assert not judge(short(FAULTS["one step is off"])).ok
    acausal = lambda **given: eager(**given) + 1e-3 * given["v"][:, -1:].mean()
    assert not judge(short(acausal)).ok
    assert not judge(short(FAULTS["NaN at one place"])).ok  # at step 20: the whole result must be finite


def test_a_long_sequence_is_judged_in_full_with_a_tolerance_from_a_part(monkeypatch):
    monkeypatch.setattr(ours, "ORACLE_STEPS", 16)
    judge = Judge(ours.scan_problem(context(), eager))
    assert judge.against.endswith("all steps, tolerance from 4")
    assert judge(ours.scan_problem(context(), eager)).ratio < 3
    assert not judge(ours.scan_problem(context(), FAULTS["one step is off"])).ok


def test_memory_is_poisoned_during_the_gate_only():
    with memory.poisoned(CPU, 0):
        assert torch.empty(100).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_decoding_step_is_judged_with_its_state():
    good = lambda **given: tuple(m2rnn_step(**given))
    judge = Judge(ours.step_problem(context(kernel="step"), good))
    assert judge(ours.step_problem(context(kernel="step"), good)).ok

    def stale(**given):
        return m2rnn_step(**given).y, given["initial_state"].clone()

    verdict = judge(ours.step_problem(context(kernel="step"), stale))
    assert "final_state errs" in verdict.failing
    assert not verdict.allows("inference")


def test_a_model_that_generates_from_a_wrong_cache_is_refused(monkeypatch):
    small = context(parse_shape("B1,T12,N2,K4,V4"), "model", layers=2)
    problem = lm.language_model(small, "M", "eager", compiled=False)
    assert Judge(problem)(problem).ok
    assert extra_verdict(problem, "generate").ok
    zero_cache = lambda self, *given, **options: tuple(
        type(c)(*(x.zero_() for x in c)) for c in original(self, *given, **options)
    )
    original = lm.HybridLM.init_cache
    forward = lm.HybridLM.forward

    def forgets(self, tokens, *, cache=None, **options):
        if cache is not None and tokens.shape[1] == 1:
            cache = zero_cache(self, tokens.shape[0])
        return forward(self, tokens, cache=cache, **options)

    monkeypatch.setattr(lm.HybridLM, "forward", forgets)
    verdict = extra_verdict(lm.language_model(small, "M", "eager", compiled=False), "generate")
    assert not verdict.ok
    assert "logits err" in verdict.failing
