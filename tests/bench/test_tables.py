# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (tables are as wide as they are)
"""Rendered tables, frozen: EXPECTTEST_ACCEPT=1 python -m pytest tests/bench/test_tables.py writes them anew."""

import dataclasses
import io

from expecttest import TestCase

from bench import compare, output, plots, report, tables
from bench.rows import Row

MACHINE = {
    "device": "NVIDIA H200",
    "driver": "580.1",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "python": "3.12.3",
    "git": "abcdef012345",
    "date": "2026-01-02T03:04:05+00:00",
}
SIZES = {"B": 8, "T": 4096, "N": 84, "K": 64, "V": 16}
CONFIG = {"clip": 1.0, "Nq": 1, "Nk": 1, "Nv": 84, "Nf": 84, "Nw": 84}


def row(provider, mode="forward", **columns):
    return Row(
        kernel="op",
        provider=provider,
        mode=mode,
        dtype="bfloat16",
        **{"shape": "A", **SIZES, "config": CONFIG, **MACHINE, **columns},
    )


def timed(provider, median, mode="forward", **columns):
    spread = {"median_ms": median, "p20_ms": median * 0.99, "p80_ms": median * 1.02, "runs": 20}
    return row(provider, mode, **{**spread, "tokens_per_s": 32768e3 / median, **columns})


ROWS = [
    timed("triton", 1.484, compile_s=2.5, peak_mib=429.0, kept_mib=90.0, tflops_per_s=72.1, gbytes_per_s=125.0,
          floor_ms=0.674, floor_bound="tanh", of_floor=0.454, error_ratio=0.21),
    timed("xma", 4.112, config={**CONFIG, "version": "sources 0123456789ab"}, compile_s=31.0, peak_mib=91.0, kept_mib=5578.25, error_ratio=1.7),
    timed("sdpa", 0.66, operator="causal softmax attention, 16 heads of 64", error_ratio=0.4),
    row("fla-gdn", status="refused", note="correctness gate: dq errs 50.1x what is allowed"),
    timed("triton", 6.717, "forward+backward", of_floor=0.2, floor_bound="tanh, matmul"),
    row("xma", "forward+backward", status="oom", note="out of memory"),
    row("mamba2", "", operator="", status="missing", note="import of mamba_ssm failed"),
]  # fmt: skip


def ascii_only(text):
    """expecttest writes ASCII only."""
    return text.replace("─", "-").replace("M²RNN", "M2RNN")


def plain(parts):
    """What a file gets."""
    file = io.StringIO()
    output.put(output.make_console(file), parts)
    text = file.getvalue()
    assert "\x1b" not in text
    return ascii_only(text)


def model(provider, median, **config):
    return dataclasses.replace(timed(provider, median, "train"), kernel="model", config={**CONFIG, **config})


# The same sizes: a model of 2 layers, one of a hybrid pattern, one of 2 layers on another card, and the preset's depth.
MODELS = [
    model("triton", 10.0, layers=2),
    model("triton", 20.0, pattern="MMMA"),
    dataclasses.replace(model("triton", 30.0, layers=2), device="NVIDIA H100"),
    model("triton", 40.0),
]


def test_models_of_other_layers_are_other_problems():
    assert len({row.problem for row in MODELS}) == 3  # the card is not part of what was asked,
    assert len({row.figure for row in MODELS}) == 4  # but a figure is one of a card
    result = compare.compare(MODELS[:1], MODELS[1:2])
    assert (result.changes, [row for row, _ in result.missing], result.new) == ([], MODELS[:1], MODELS[1:2])
    assert compare.compare(MODELS[:1], MODELS[1:2], asked_only=True).missing == []


def test_a_layer_of_a_preset_has_the_widths_of_that_model():
    """A is 1024 wide, while the same sizes written out stand for a layer of N V = 1344."""
    named = dataclasses.replace(MODELS[0], kernel="layer", config=CONFIG)
    written = dataclasses.replace(named, shape="B8,T4096,N84,K64,V16")
    assert named.problem != written.problem
    assert dataclasses.replace(named, kernel="op").problem == dataclasses.replace(written, kernel="op").problem


def test_files_of_several_devices_are_compared_device_by_device():
    h200, h100 = timed("triton", 1.0), dataclasses.replace(timed("triton", 9.0), device="NVIDIA H100")
    slower = dataclasses.replace(h200, median_ms=2.0)
    result = compare.compare([h200, h100], [slower, h100])
    assert sorted(change.ratio for change in result.changes) == [1.0, 2.0]
    assert not result.incomparable
    asked = compare.compare([h200, h100], [slower], asked_only=True)
    assert ([change.ratio for change in asked.changes], asked.missing) == ([2.0], [])
    gone = compare.compare([h200, h100], [slower])
    assert [row for row, _ in gone.missing] == [h100]
    assert compare.compare([h200, h100], [slower], asked_only=True, any_device=True).missing == []


def on_threads(n, median=1.0):
    return dataclasses.replace(timed("cpp", median), device="a CPU", driver=None, config=CONFIG | {"threads": n})


def test_rows_of_other_places_are_told_and_not_compared():
    h200, h100 = timed("triton", 1.0), dataclasses.replace(timed("triton", 9.0), device="NVIDIA H100")
    for before, after, why in (
        (h200, h100, "device NVIDIA H200 against NVIDIA H100"),
        (on_threads(2), on_threads(4, 5.0), "threads 2 against 4"),
        (on_threads(None), on_threads(4), "threads unknown against 4"),
        (on_threads(2), dataclasses.replace(on_threads(4), device=""), "device a CPU against unknown, threads 2 against 4"),
    ):
        result = compare.compare([before], [after])
        assert result == ([], [], [], [(before, after)])
        assert plain(compare.parts_of(result)).splitlines()[-1] == f"not comparable: {after.describe()}: {why}"
        forced = compare.compare([before], [after], any_device=True)
        assert (forced.changes, forced.incomparable) == ([(before, after)], [])
        assert f"{why}: the ratios are of the machines too" in plain(compare.parts_of(forced))
    gpu_threads = dataclasses.replace(h200, config=CONFIG | {"threads": 32})  # of the host: a GPU does not care
    assert compare.compare([h200], [gpu_threads]).changes == [(h200, gpu_threads)]


def test_a_comparison_says_which_revisions_it_is_of():
    after = [dataclasses.replace(row, git="0123456789ab") for row in ROWS[:2]]
    lines = plain(compare.parts_of(compare.compare(ROWS[:2], after))).splitlines()
    where = "2026-01-02, NVIDIA H200, driver 580.1, torch 2.11.0, triton 3.6.0, Python 3.12.3, git"
    assert [f"before: {where} abcdef012345", f"after: {where} 0123456789ab"] == lines[-3:-1]


def test_another_torch_is_compared_and_told():
    newer = dataclasses.replace(ROWS[0], torch="2.13.0")
    assert "another torch: 2.11.0 before, 2.13.0 after" in plain(compare.parts_of(compare.compare(ROWS[:1], [newer])))
    assert "another torch" not in plain(compare.parts_of(compare.compare(ROWS[:1], ROWS[:1])))


def test_panels_hold_rows_that_differ_in_length_and_provider_only():
    longer = [dataclasses.replace(row, T=8192) for row in MODELS]
    shared = [dataclasses.replace(row, config=row.config | {"Nv": 42}) for row in MODELS]
    panels = plots._panels(plots._latest([*MODELS, *longer, *shared]), lambda row: True, lambda row: row.median_ms)
    assert {title: len(rows) for title, rows in panels.items() if "Nv42" not in title} == {
        "model train, A, B8 N84 K64 V16, 2 layers, bfloat16, NVIDIA H200": 2,
        "model train, A, B8 N84 K64 V16, MMMA, bfloat16, NVIDIA H200": 2,
        "model train, A, B8 N84 K64 V16, 2 layers, bfloat16, NVIDIA H100": 2,
        "model train, A, B8 N84 K64 V16, bfloat16, NVIDIA H200": 2,
    }
    assert len(panels) == 8


def test_threads_of_a_cpu_are_another_place():
    rows = [
        dataclasses.replace(timed("cpp", 1.0), device="cpu", driver=None, config=CONFIG | {"threads": n}) for n in (1, 2)
    ]
    assert [row.place for row in rows] == ["cpu, 1 thread", "cpu, 2 threads"]
    assert len({row.figure for row in rows}) == 2
    assert len({row.key for row in rows}) == 1


class Tables(TestCase):
    maxDiff = None

    def test_timings(self):
        self.assertExpectedInline(
            plain(tables.parts_of(ROWS)),
            """\
op A: B8 T4096 N84 K64 V16, bfloat16, clip 1.0
mode              provider  median ms    p20    p80  vs xma  compile s  peak MiB  kept MiB  tokens/s  TFLOP/s  GB/s            of floor  error
----------------------------------------------------------------------------------------------------------------------------------------------
forward           triton        1.484  1.469  1.514   2.77x        2.5       429        90     22.1M     72.1   125          45.4% tanh   0.21
                  xma           4.112  4.071  4.194   1.00x       31.0        91     5,578     7.97M                                      1.70
                  sdpa          0.660  0.653  0.673   6.23x                                    49.6M                                      0.40
                  fla-gdn     refused

forward+backward  triton        6.717  6.650  6.851                                            4.88M                 20.0% tanh, matmul
                  xma             oom
xma (sources 0123456789ab) computes M2RNN
sdpa computes causal softmax attention, 16 heads of 64
fla-gdn forward: correctness gate: dq errs 50.1x what is allowed
xma forward+backward: out of memory
missing mamba2: import of mamba_ssm failed

compile s: first call less a warm one; what a cache on disk holds is not compiled again
peak, kept: beyond the inputs; kept is the results and what backward needs
of floor: lower bound of the hardware / median, and what sets it
error: worst error / error the tolerance allows (peers, layers and models may err 4x; peers 8 roundings)
2026-01-02, NVIDIA H200, driver 580.1, torch 2.11.0, triton 3.6.0, Python 3.12.3, git abcdef012345
""",
        )

    def test_checks(self):
        tensor = {"ok": True, "worst_ratio": 0.4, "worst_slice": "t 0:8"}
        config = {**CONFIG, "repeats": 3, "different_repeats": 0, "tensors": {"y": tensor}}
        good = dataclasses.replace(row("triton", "check"), config=config)
        broken = {"y": tensor, "dW": {"ok": False, "worst_ratio": 3.0, "worst_slice": "all"}}
        bad = dataclasses.replace(
            good, provider="cpp", status="refused", config={**config, "tensors": broken, "different_repeats": 2}
        )
        failed = dataclasses.replace(row("xma", "check"), status="oom", note="out of memory")
        self.assertExpectedInline(
            plain(tables.parts_of([good, bad, failed])),
            """\
B8 T4096 N84 K64 V16: error against the fp64 oracle, of what the rule allows
dtype     clip  provider  worst  where          bits
----------------------------------------------------------
bfloat16  1.0   triton      40%  y [t 0:8]       3/3  pass
bfloat16  1.0   cpp        300%  dW [all]        1/3  FAIL
bfloat16  1.0   xma              out of memory        oom

allowed: 2 x the error of a low-precision eager run + one rounding, per tensor and per time slice; bits: repeats equal to the first run
2026-01-02, NVIDIA H200, driver 580.1, torch 2.11.0, triton 3.6.0, Python 3.12.3, git abcdef012345
""",
        )

    def test_comparison(self):
        after = [timed("triton", 2.0), timed("xma", 4.11), timed("lstm", 9.0)]
        result = compare.compare(ROWS, after)
        self.assertExpectedInline(
            plain(compare.parts_of(result)),
            """\
before and after
kernel  shape                 dtype     mode     provider  before ms  after ms  ratio          kept before  after
-----------------------------------------------------------------------------------------------------------------
op      B8 T4096 N84 K64 V16  bfloat16  forward  triton        1.484     2.000  1.348  slower           90
op      B8 T4096 N84 K64 V16  bfloat16  forward  xma           4.112     4.110  1.000    same        5,578
missing now: op sdpa forward B8 T4096 N84 K64 V16 bfloat16
missing now: op triton forward+backward B8 T4096 N84 K64 V16 bfloat16
new: op lstm forward B8 T4096 N84 K64 V16 bfloat16
before: 2026-01-02, NVIDIA H200, driver 580.1, torch 2.11.0, triton 3.6.0, Python 3.12.3, git abcdef012345
after: 2026-01-02, NVIDIA H200, driver 580.1, torch 2.11.0, triton 3.6.0, Python 3.12.3, git abcdef012345
same: the ranges from p20 to p80 overlap
""",
        )

    def test_gpu_tests(self):
        outcomes = [
            {"test": "t.py::a", "outcome": "passed", "message": ""},
            {"test": "t.py::b[x]", "outcome": "failed", "message": "assert 1 == 2"},
        ]
        self.assertExpectedInline(
            plain(tables.test_tables({"rows": outcomes})),
            """\
GPU tests: 1 failed, 1 passed
test        outcome  why
----------------------------------
t.py::b[x]  failed   assert 1 == 2
""",
        )

    def test_summary(self):
        sweep = [timed(name, ms, T=8192) for name, ms in (("triton", 3.0), ("xma", 9.0))]
        backward = [timed(name, 5.0, "backward") for name in ("triton", "xma")]
        alone = [timed("triton", 1.0, V=32)]
        self.assertExpectedInline(
            ascii_only(
                report.summary([*sweep, *ROWS, *backward, *alone], ["triton", "xma", "sdpa", "fla-gdn", "mamba2"])
            ),
            """\
op, bfloat16, clip 1.0: median ms (peak MiB beyond the inputs); of the same operator, time / that of triton.

| problem | mode | triton | xma | sdpa | fla-gdn |
|---|---|---|---|---|---|
| A: B8 T4096 N84 K64 V16 | forward | 1.484 (429) | 4.112 (91), 2.77x | 0.660 | refused |
| A: B8 T4096 N84 K64 V16 | forward+backward | 6.717 | oom |  |  |

- xma (sources 0123456789ab) computes M2RNN
- sdpa computes causal softmax attention, 16 heads of 64
- 2026-01-02, NVIDIA H200, driver 580.1, torch 2.11.0, triton 3.6.0, Python 3.12.3, git abcdef012345
""",
        )

    def test_models_and_places_apart(self):
        self.assertExpectedInline(
            plain(tables.parts_of(MODELS)),
            """\
model A: B8 T4096 N84 K64 V16, 2 layers, bfloat16, clip 1.0, NVIDIA H200
mode   provider  median ms    p20    p80  vs triton  compile s  peak MiB  kept MiB  tokens/s  TFLOP/s  GB/s  of floor  error
----------------------------------------------------------------------------------------------------------------------------
train  triton        10.00  9.900  10.20      1.00x                                    3.28M

model A: B8 T4096 N84 K64 V16, MMMA, bfloat16, clip 1.0, NVIDIA H200
mode   provider  median ms    p20    p80  vs triton  compile s  peak MiB  kept MiB  tokens/s  TFLOP/s  GB/s  of floor  error
----------------------------------------------------------------------------------------------------------------------------
train  triton        20.00  19.80  20.40      1.00x                                    1.64M

model A: B8 T4096 N84 K64 V16, 2 layers, bfloat16, clip 1.0, NVIDIA H100
mode   provider  median ms    p20    p80  vs triton  compile s  peak MiB  kept MiB  tokens/s  TFLOP/s  GB/s  of floor  error
----------------------------------------------------------------------------------------------------------------------------
train  triton        30.00  29.70  30.60      1.00x                                    1.09M

model A: B8 T4096 N84 K64 V16, bfloat16, clip 1.0, NVIDIA H200
mode   provider  median ms    p20    p80  vs triton  compile s  peak MiB  kept MiB  tokens/s  TFLOP/s  GB/s  of floor  error
----------------------------------------------------------------------------------------------------------------------------
train  triton        40.00  39.60  40.80      1.00x                                     819k

compile s: first call less a warm one; what a cache on disk holds is not compiled again
peak, kept: beyond the inputs; kept is the results and what backward needs
of floor: lower bound of the hardware / median, and what sets it
error: worst error / error the tolerance allows (peers, layers and models may err 4x; peers 8 roundings)
2026-01-02, NVIDIA H200, driver 580.1, torch 2.11.0, triton 3.6.0, Python 3.12.3, git abcdef012345
2026-01-02, NVIDIA H100, driver 580.1, torch 2.11.0, triton 3.6.0, Python 3.12.3, git abcdef012345
""",
        )
        self.assertExpectedInline(
            ascii_only(report.markdown(MODELS)),
            """\
# Benchmark report

## model, A: B8 T4096 N84 K64 V16, 2 layers, bfloat16, clip 1.0, NVIDIA H200

train:

| provider | ms (p20 to p80) | vs triton | peak MiB | kept MiB | tokens/s | TFLOP/s | GB/s | of floor | error |
|---|---|---|---|---|---|---|---|---|---|
| triton | 10.00 (9.900 to 10.20) | 1.00x |  |  | 3.28M |  |  |  |  |

## model, A: B8 T4096 N84 K64 V16, MMMA, bfloat16, clip 1.0, NVIDIA H200

train:

| provider | ms (p20 to p80) | vs triton | peak MiB | kept MiB | tokens/s | TFLOP/s | GB/s | of floor | error |
|---|---|---|---|---|---|---|---|---|---|
| triton | 20.00 (19.80 to 20.40) | 1.00x |  |  | 1.64M |  |  |  |  |

## model, A: B8 T4096 N84 K64 V16, 2 layers, bfloat16, clip 1.0, NVIDIA H100

train:

| provider | ms (p20 to p80) | vs triton | peak MiB | kept MiB | tokens/s | TFLOP/s | GB/s | of floor | error |
|---|---|---|---|---|---|---|---|---|---|
| triton | 30.00 (29.70 to 30.60) | 1.00x |  |  | 1.09M |  |  |  |  |

## model, A: B8 T4096 N84 K64 V16, bfloat16, clip 1.0, NVIDIA H200

train:

| provider | ms (p20 to p80) | vs triton | peak MiB | kept MiB | tokens/s | TFLOP/s | GB/s | of floor | error |
|---|---|---|---|---|---|---|---|---|---|
| triton | 40.00 (39.60 to 40.80) | 1.00x |  |  | 819k |  |  |  |  |

## Where and with what

- 2026-01-02, NVIDIA H200, driver 580.1, torch 2.11.0, triton 3.6.0, Python 3.12.3, git abcdef012345
- 2026-01-02, NVIDIA H100, driver 580.1, torch 2.11.0, triton 3.6.0, Python 3.12.3, git abcdef012345
""",
        )
        others = [dataclasses.replace(row, provider="cpp") for row in MODELS]
        self.assertExpectedInline(
            ascii_only(report.summary([*MODELS, *others], ["triton", "cpp"])),
            """\
Median ms (peak MiB beyond the inputs); of the same operator, time / that of triton.

| problem | mode | triton | cpp |
|---|---|---|---|
| model, bfloat16, clip 1.0, 2 layers, NVIDIA H200, A: B8 T4096 N84 K64 V16 | train | 10.00 | 10.00, 1.00x |
| model, bfloat16, clip 1.0, MMMA, NVIDIA H200, A: B8 T4096 N84 K64 V16 | train | 20.00 | 20.00, 1.00x |
| model, bfloat16, clip 1.0, 2 layers, NVIDIA H100, A: B8 T4096 N84 K64 V16 | train | 30.00 | 30.00, 1.00x |
| model, bfloat16, clip 1.0, NVIDIA H200, A: B8 T4096 N84 K64 V16 | train | 40.00 | 40.00, 1.00x |

- 2026-01-02, NVIDIA H200, driver 580.1, torch 2.11.0, triton 3.6.0, Python 3.12.3, git abcdef012345
- 2026-01-02, NVIDIA H100, driver 580.1, torch 2.11.0, triton 3.6.0, Python 3.12.3, git abcdef012345
""",
        )

    def test_report(self):
        self.assertExpectedInline(
            ascii_only(report.markdown(ROWS)),
            """\
# Benchmark report

## op, B8 T4096 N84 K64 V16, bfloat16, clip 1.0

forward:

| provider | ms (p20 to p80) | vs xma | peak MiB | kept MiB | tokens/s | TFLOP/s | GB/s | of floor | error |
|---|---|---|---|---|---|---|---|---|---|
| triton | 1.484 (1.469 to 1.514) | 2.77x | 429 | 90 | 22.1M | 72.1 | 125 | 45% (tanh) | 0.21 |
| xma | 4.112 (4.071 to 4.194) | 1.00x | 91 | 5,578 | 7.97M |  |  |  | 1.70 |
| sdpa | 0.660 (0.653 to 0.673) | 6.23x |  |  | 49.6M |  |  |  | 0.40 |
| fla-gdn | refused: correctness gate: dq errs 50.1x what is allowed |  |  |  |  |  |  |  |  |

forward+backward:

| provider | ms (p20 to p80) | vs xma | peak MiB | kept MiB | tokens/s | TFLOP/s | GB/s | of floor | error |
|---|---|---|---|---|---|---|---|---|---|
| triton | 6.717 (6.650 to 6.851) |  |  |  | 4.88M |  |  | 20% (tanh, matmul) |  |
| xma | oom: out of memory |  |  |  |  |  |  |  |  |

- xma (sources 0123456789ab) computes M2RNN
- sdpa computes causal softmax attention, 16 heads of 64

## Missing

- mamba2: import of mamba_ssm failed

## Where and with what

- 2026-01-02, NVIDIA H200, driver 580.1, torch 2.11.0, triton 3.6.0, Python 3.12.3, git abcdef012345
""",
        )
