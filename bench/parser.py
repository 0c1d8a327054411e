# SPDX-License-Identifier: Apache-2.0
"""The command line of `python -m bench`: options and help texts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from m2rnn_compile.models import MIXERS

from .arguments import MODES_OF, clip
from .providers import PROVIDERS
from .shapes import CHECK_SHAPES, PRESETS

EXAMPLES = """examples:
  python -m bench info                                     what to paste into a bug report
  python -m bench op --preset cpu                          the scan on a CPU, in less than a minute
  python -m bench op --preset A,B,C,D --xma ~/accelerated-model-architectures
  python -m bench op --preset A --T 1024,4096,16384 --out sweep.jsonl
  python -m bench step --preset cpu                        one token of decoding
  python -m bench layer --shape B4,T512,N8,K32,V16 --provider cpp,sdpa
  python -m bench model --preset cpu                       training and generation, tokens/s
  python -m bench check                                    accuracy and determinism; exit code 1 on failure
  python -m bench compare before.jsonl after.jsonl
  python -m bench compare --rev HEAD~1 -- op --preset cpu --provider cpp
  python -m bench report sweep.jsonl --out report.md --plot plots/
"""

RUN_EXAMPLES = {
    "op": """  python -m bench op --preset A --dry-run                  who would run, and how much memory it takes
  python -m bench op --preset cpu --provider cpp,sdpa --mode forward
  python -m bench op --preset cpu --out now.jsonl --out now.md
  python -m bench op --preset cpu --fail-above 1.2 --baseline before.jsonl""",
    "step": """  python -m bench step --preset cpu
  python -m bench step --preset A --T 1024,65536 --provider triton,sdpa   context matters to attention only""",
    "layer": """  python -m bench layer --preset cpu --provider cpp,cpp-compile,sdpa
  python -m bench layer --preset A --mode forward""",
    "model": """  python -m bench model --preset cpu
  python -m bench model --preset A --layers 4 --T 1024,4096 --mode generate
  python -m bench model --preset A --pattern MMMAMMMM""",
}
ABOUT = {
    "op": ("time and memory of the scan", "Times the scan: forward, backward and both."),
    "step": ("one decoding step", "Times one token of decoding: m2rnn_step, and what peers do for one token."),
    "layer": (
        "the whole layer",
        "Times layers.M2RNN and, of the same width, the authors' layer (their op, conv1d, eager tail),\n"
        "layers.GatedDeltaNet on fla's kernel and layers.Attention.",
    ),
    "model": (
        "tokens/s of a language model",
        "Times a training step (forward, backward, AdamW) and one generated token after a context of T.",
    ),
}
HOW = """Every timing is preceded by a correctness gate on the same inputs; what fails it is not timed, and the exit
code is 1. Providers run side by side in rounds, caches flushed before each call; figures are medians with p20 and
p80. Rows are written as they come: Ctrl-C keeps the finished ones."""
EXIT_CODES = """exit codes:
  0    nothing below
  1    a row was refused by the correctness gate, no provider gave a time, a check failed, or --fail-above was exceeded
       or had nothing to compare
  2    bad arguments or files
  130  Ctrl-C
  141  whoever read the output has stopped; finished rows are kept
  rows that ran out of memory or raised an error leave 0, as long as another row has a time"""


ANY_DEVICE = "compare rows of another device or number of CPU threads too, which are not comparable otherwise"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is for --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="python -m bench",
        description="Benchmarks and numerical checks of m2rnn_compile.",
        epilog=EXAMPLES + "\n" + EXIT_CODES,
        formatter_class=formatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    shown = commands.add_parser("info", help="versions, GPU, clocks, caches, providers", formatter_class=formatter)
    shown.add_argument("--xma", metavar="PATH", help="root of a checkout of accelerated-model-architectures")
    for kernel in ABOUT:
        _add_run(commands, kernel, formatter)

    checked = commands.add_parser(
        "check",
        help="accuracy against the fp64 oracle, and bitwise determinism",
        description="Error against the fp64 oracle: at most 2 x that of a low-precision eager run, for every output\n"
        "and gradient, per time slice; and the same bits on every repeat. Exit code 1 on failure.",
        epilog=f"examples:\n  python -m bench check\n  python -m bench check --preset A --dtype bf16 --provider triton "
        f"--repeats 50\n\nby default three small awkward shapes: {'; '.join(map(str, CHECK_SHAPES))}\n"
        "and triton on a GPU, reference, eager and cpp on a CPU; xma, the authors' kernel, by name only",
        formatter_class=formatter,
    )
    _add_common(checked, dtype="fp32 and bf16, and fp16 on a GPU")
    checked.add_argument("--clip", default="none,1,0.1", help="state-gradient clips (default: %(default)s)")
    checked.add_argument("--repeats", type=int, default=3, help="repeats compared bit for bit (default: %(default)s)")

    compared = commands.add_parser(
        "compare",
        help="two files of rows, or this tree and a git revision",
        description="Matches rows by kernel, sizes, dtype, mode, provider, device and, on a CPU, threads.\n"
        "With --rev, what follows -- is run twice: with the package of that revision (from a git worktree, in a\n"
        "process of its own) and with this tree's.",
        epilog="examples:\n  python -m bench compare before.jsonl after.jsonl --fail-above 1.1\n"
        "  python -m bench compare --rev v0.1 -- op --preset cpu --provider cpp",
        formatter_class=formatter,
    )
    compared.add_argument("files", nargs="*", metavar="FILE", help="before and after; with --rev the run, after --")
    compared.add_argument("--rev", metavar="REVISION", help="commit, tag or branch to compare this tree with")
    compared.add_argument(
        "--fail-above",
        type=float,
        metavar="RATIO",
        help="exit with 1 if after / before exceeds it, a row went missing, or nothing could be compared",
    )
    compared.add_argument("--any-device", action="store_true", help=ANY_DEVICE)

    reported = commands.add_parser(
        "report",
        help="Markdown (and plots) of files of rows",
        description="Markdown on stdout or to --out; with --plot and matplotlib also latency.png, memory.png (against "
        "T),\ntokens.png (tokens/s against context) and floor.png, as far as the rows have the figures.\n"
        "With --summary one table, a line for each preset and mode, and one plot, summary.svg: time and memory\n"
        "against T.",
        epilog="examples:\n  python -m bench report bench/results/op-h200-20261124.json\n"
        "  python -m bench report sweep.jsonl --out report.md --plot plots/\n"
        "  python -m bench report op.jsonl sweep.jsonl --summary --provider triton,xma,fla-gdn,sdpa --plot plots/",
        formatter_class=formatter,
    )
    reported.add_argument("file", nargs="+", type=Path, metavar="FILE")
    reported.add_argument("--out", type=Path, metavar="FILE", help="where the Markdown goes (default: stdout)")
    reported.add_argument("--plot", type=Path, metavar="FOLDER", help="write the plots here (extra: plot)")
    reported.add_argument("--summary", action="store_true", help="one table and one plot instead of everything")
    reported.add_argument("--provider", metavar="LIST", help="these only, in this order (default: all in the files)")
    reported.add_argument("--against", metavar="PROVIDER", help="whom ratios refer to")

    printed = commands.add_parser("show", help="print the tables of files again", formatter_class=formatter)
    printed.add_argument("file", nargs="+", type=Path, metavar="FILE")
    printed.add_argument("--against", metavar="PROVIDER", help="whom ratios refer to")
    return parser


def _add_run(commands: argparse._SubParsersAction, kernel: str, formatter: Any) -> None:
    presets = "\n".join(f"  {name:<4} {shape}" for name, shape in PRESETS.items())
    providers = "\n".join(f"  {p.name:<18} {p.about}" for p in PROVIDERS if kernel in p.build)
    brief, about = ABOUT[kernel]
    parser = commands.add_parser(
        kernel,
        help=brief,
        description=f"{about}\n\n{HOW}",
        epilog=f"presets:\n{presets}\n\nproviders:\n{providers}\n\nmodes: {', '.join(MODES_OF[kernel])}\n\n"
        f"examples:\n{RUN_EXAMPLES[kernel]}\n\n{EXIT_CODES}",
        formatter_class=formatter,
    )
    _add_common(parser, dtype="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--mode", metavar="LIST", help="of the modes below")
    parser.add_argument("--clip", type=clip, default=1.0, metavar="C", help="state-gradient clip, or none (default: 1)")
    parser.add_argument("--against", metavar="PROVIDER", help="whom ratios refer to (default: xma, else reference)")
    parser.add_argument("--runs", type=int, default=20, help="runs of each provider (default: %(default)s)")
    parser.add_argument("--min-runs", type=int, default=3, help="runs even of what exceeds the budget (default: 3)")
    parser.add_argument(
        "--budget", type=float, default=1.0, metavar="SECONDS", help="per provider and mode (default: 1)"
    )
    parser.add_argument(
        "--gate-steps",
        type=int,
        metavar="N",
        help="let the correctness gate look at the first N steps only, and the row say so (default: all, for the scan)",
    )
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="rows to compare with")
    parser.add_argument(
        "--fail-above",
        type=float,
        metavar="RATIO",
        help="exit with 1 if a time is more than RATIO times its baseline's, a row of the baseline went missing, or "
        "nothing could be compared",
    )
    parser.add_argument("--any-device", action="store_true", help=ANY_DEVICE)
    parser.add_argument("--dry-run", action="store_true", help="print shapes and predicted memory, run nothing")
    if kernel == "model":
        letters = ", ".join(f"{letter} {mixer.title}" for letter, mixer in MIXERS.items())
        parser.add_argument("--layers", type=int, metavar="L", help="layers (default: the preset's)")
        parser.add_argument("--pattern", metavar="TEXT", help="a letter a layer, for our providers: " + letters)


def _add_common(parser: argparse.ArgumentParser, *, dtype: str) -> None:
    parser.add_argument("--preset", action="append", metavar="LIST", help=f"of {', '.join(PRESETS)}; repeatable")
    parser.add_argument(
        "--shape",
        action="append",
        metavar="SIZES",
        help="B4,T512,N8,K32,V16, with Nq2 and so on for head counts other than 1 (q, k) and N (v, f, W); repeatable",
    )
    parser.add_argument("--T", metavar="LIST", help="run each shape at these lengths instead of its own")
    parser.add_argument("--dtype", metavar="LIST", help=f"of bf16, fp16, fp32, fp64 (default: {dtype})")
    parser.add_argument("--provider", metavar="LIST", help="by name, or all (default: those that suit the device)")
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda where there is one)")
    parser.add_argument("--xma", metavar="PATH", help="root of a checkout of accelerated-model-architectures")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="recorded as the revision, for a copy without git history")
    parser.add_argument(
        "--out",
        action="append",
        type=Path,
        metavar="FILE",
        help=".jsonl, .csv or .md; repeatable (default: bench/results/...jsonl)",
    )
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines instead of tables")
