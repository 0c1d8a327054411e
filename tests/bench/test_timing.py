# SPDX-License-Identifier: Apache-2.0
"""The measuring loop, on a clock that is told the time: nothing here depends on how fast the machine is."""

import math

import pytest

from bench.timing import Timing, WallClock, measure_interleaved, planned_runs


class FakeClock:
    """Every function "takes" what it returns."""

    def measure(self, fn):
        return fn()


def always(value):
    return lambda: lambda: value


def test_medians_minima_and_quantiles():
    timing = Timing((5.0, 1.0, 3.0, 2.0, 4.0, 6.0))
    assert (timing.median_ms, timing.min_ms) == (3.5, 1.0)
    assert (timing.quantile_ms(0.2), timing.quantile_ms(0.8)) == (2.0, 5.0)
    assert Timing((7.0,)).quantile_ms(0.2) == 7.0


def test_every_variant_runs_as_often_as_asked_and_warmups_do_not_count():
    times = iter([1000.0, 50.0, 1.0, 2.0, 3.0])
    timings = measure_interleaved({"a": lambda: lambda: next(times)}, FakeClock(), runs=3, warmup=2)
    assert timings["a"].samples_ms == (1.0, 2.0, 3.0)


def test_preparation_is_not_timed():
    done = []

    def prepare():
        done.append("prepared")
        return lambda: done.append("timed") or 1.0

    class Watching:
        def measure(self, fn):
            done.append("start")
            return fn()

    measure_interleaved({"a": prepare}, Watching(), runs=1, warmup=1)
    assert done == ["prepared", "start", "timed"] * 2


def test_rounds_interleave_and_rotate():
    order = []
    variants = {name: (lambda name=name: lambda: order.append(name) or 1.0) for name in "abc"}
    measure_interleaved(variants, FakeClock(), runs=3, warmup=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"


def test_slow_variants_run_less_often_but_spread_over_the_rounds():
    order = []
    variants = {
        "fast": lambda: lambda: order.append("f") or 1.0,
        "slow": lambda: lambda: order.append("s") or 10_000.0,
    }
    timings = measure_interleaved(variants, FakeClock(), runs=9, min_runs=3, budget_s=10, warmup=1)
    assert len(timings["fast"].samples_ms) == 9
    assert len(timings["slow"].samples_ms) == 3
    rounds = "".join(order)[2:]
    assert [len(part) for part in rounds.split("s")[:3]] == pytest.approx([3, 3, 3], abs=1)


@pytest.mark.parametrize("cost_ms, expected", [(1.0, 20), (1000.0, 20), (5000.0, 6), (60_000.0, 3), (0.0, 20)])
def test_the_budget_limits_runs(cost_ms, expected):
    assert planned_runs(cost_ms, runs=20, min_runs=3, budget_s=30) == expected


@pytest.mark.parametrize("budget_s", [math.inf, 1e308])
def test_a_budget_without_end_affords_all_runs(budget_s):
    assert planned_runs(1e-3, runs=20, min_runs=3, budget_s=budget_s) == 20


def test_fewer_runs_than_the_minimum_may_be_asked_for():
    assert planned_runs(1.0, runs=1, min_runs=3, budget_s=30) == 1


def test_progress_reaches_the_end():
    told = []
    variants = {"a": always(1.0), "b": always(1.0)}
    measure_interleaved(variants, FakeClock(), runs=2, warmup=1, on_run=lambda *news: told.append(news[1:]))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert measure_interleaved({}, FakeClock()) == {}


def test_a_variant_that_raises_is_dropped_and_the_others_go_on():
    calls = []

    def failing():
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("no more")
        return lambda: 1.0

    told = []
    handle = lambda name, error: told.append((name, str(error))) is None
    timings = measure_interleaved({"bad": failing, "good": always(2.0)}, FakeClock(), runs=5, on_error=handle)
    assert told == [("bad", "no more")]
    assert "bad" not in timings
    assert len(timings["good"].samples_ms) == 5
    calls.clear()
    with pytest.raises(RuntimeError, match="no more"):
        measure_interleaved({"bad": failing}, FakeClock(), runs=5)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        measure_interleaved({"a": always(1.0)}, FakeClock(), runs=0)


def test_the_wall_clock_writes_over_the_caches_before_it_starts(monkeypatch):
    order = []
    clock = WallClock(flush_bytes=8)
    monkeypatch.setattr("bench.timing.ctypes.memset", lambda *given: order.append(given[2]))
    assert clock.measure(lambda: order.append("call")) >= 0
    assert order == [8, "call"]
