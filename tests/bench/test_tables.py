# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (tables are as wide as they are)
"""Rendered tables, frozen: EXPECTTEST_ACCEPT=1 python -m pytest tests/bench/test_tables.py writes them anew."""

import dataclasses
import io

from expecttest import TestCase

from bench import compare, output, report, tables
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
