# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python -m m2rnn_compile demo | generate | check-export | models | train``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

DESCRIPTION = """\
M2RNN, the matrix-state non-linear RNN (arXiv 2603.14360), as a compile-native PyTorch op.

Start here:
  python -m m2rnn_compile demo                      train a small language model, under four minutes on 2 cores
  python -m m2rnn_compile demo --data ~/my/texts    the same on your own text files
  python -m m2rnn_compile demo --resume             go on after Ctrl-C; nothing is lost
  python -m m2rnn_compile generate runs/demo-... --prompt "def main("
  python -m m2rnn_compile train --preset hybrid-m2rnn-410m --miniature --data ~/my/texts
  python -m m2rnn_compile models                    the paper's models: pattern, parameters, state, FLOPs
"""

DEMO = """\
Trains a hybrid (M2RNN + attention) byte-level language model under torch.compile(fullgraph=True), then

  1. scores it on files it has never seen, in bits per byte, beside gzip, xz and a unigram model,
  2. continues a prompt with the cached decoder (one step a byte, no matter how long the text is),
  3. exports it with torch.export (any batch, any length) and lets a fresh process reload it and compare outputs.

The text is the Python standard library of the interpreter that runs this, split by file into training and held-out;
--data takes any folder of text files instead. Ctrl-C saves a checkpoint and stops; --resume goes on from it and ends
with the same bits as a run that was never interrupted.

Exit status: 0 all well; 1 the exported model disagrees or training diverged; 2 wrong arguments, data or checkpoint;
130 interrupted (and saved).
"""

DEMO_EXAMPLES = """\
examples:
  python -m m2rnn_compile demo                         fixed number of steps: the same result every time
  python -m m2rnn_compile demo --minutes 10            as many steps as fit into ten minutes of training here
  python -m m2rnn_compile demo --steps 50              a quick look
  python -m m2rnn_compile demo --data ~/books --out runs/books
  python -m m2rnn_compile demo --resume --out runs/books
"""


TRAIN = """\
Trains one of the paper's models on text files: packed documents, AdamW, cosine schedule, gradient accumulation,
torch.compile(fullgraph=True), bf16 autocast on a GPU. Writes a checkpoint every --checkpoint-every steps, one JSON line
a step to log.jsonl, and at the end the model to <out>/model, for models.weights.load_model and transformers.

Ctrl-C saves a checkpoint and stops; --resume --out DIR goes on, with the options the run was started with, and ends
with the same bits as a run that was never interrupted (on the same machine). Where the data or the tokenizer lies
elsewhere now, --data and --tokenizer say so: what is in them, and the last part of each path, must be the same.

Exit status: 0 all well; 1 training diverged; 2 wrong arguments, data or checkpoint; 130 interrupted (and saved).
"""

TRAIN_EXAMPLES = """\
examples:
  python -m m2rnn_compile train --preset hybrid-m2rnn-410m --miniature --data ~/texts
  python -m m2rnn_compile train --preset hybrid-gated-deltanet+1-410m --data corpus/ --tokenizer tokenizer.json \\
      --seq-len 4096 --batch-size 8 --grad-accumulation 16 --steps 25000
  python -m m2rnn_compile train --resume --out runs/train-...
"""


def _number(kind: type[int] | type[float], accepts: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    """An argument type: a number that `accepts` takes; `expected` says which those are."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):  # a comparison with NaN is false
            raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
        return value

    return parse


_positive_int = _number(int, lambda n: n >= 1, "a whole number, at least 1")
_positive_float = _number(float, lambda x: 0 < x < float("inf"), "a number greater than 0")
_non_negative_float = _number(float, lambda x: 0 <= x < float("inf"), "a number, at least 0")
_probability = _number(float, lambda x: 0 < x <= 1, "a number in (0, 1]")
_seed = _number(int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2**63 - 1")


def _path(text: str) -> str:
    """An empty path would mean the current folder; it comes from a shell variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got ''")
    return text


def build_parser() -> argparse.ArgumentParser:
    """The argument parser of ``python -m m2rnn_compile``."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m m2rnn_compile", description=DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train, score, generate, export: the whole library in under four minutes",
        description=DEMO,
        epilog=DEMO_EXAMPLES,
        formatter_class=raw,
    )
    demo.add_argument(
        "--data", type=_path, metavar="PATH", help="folder of text files (default: the standard library's sources)"
    )
    length = demo.add_mutually_exclusive_group()
    length.add_argument("--steps", type=_positive_int, help="optimizer steps (default: 1100)")
    length.add_argument("--minutes", type=_positive_float, help="train for about so long, measured on this machine")
    demo.add_argument("--out", type=_path, metavar="DIR", help="folder of the run (default: a new one below runs/)")
    demo.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint of --out (default: the newest run)"
    )
    demo.add_argument("--seed", type=_seed, help="of weights and data order (default: 0)")
    demo.add_argument("--threads", type=_positive_int, help="CPU threads (default: 2; part of what fixes the bits)")
    demo.add_argument("--eager", action="store_true", help="train without torch.compile (needs no C++ compiler; slow)")

    generate = commands.add_parser(
        "generate",
        help="continue a prompt with a trained model",
        description="Continue a prompt with the model of a run, streaming, with the cached decoder.",
        epilog='example:\n  python -m m2rnn_compile generate runs/demo-... --prompt "import os" --temperature 0.7',
        formatter_class=raw,
    )
    generate.add_argument(
        "checkpoint", type=_path, metavar="RUN", help="folder of a run or of its model, or one of checkpoints/step-..."
    )
    generate.add_argument(
        "--tokenizer", type=_path, metavar="FILE", help="of the model (default: the one beside it, else the run's)"
    )
    generate.add_argument("--prompt", default="", help="text to continue (default: start a new document)")
    generate.add_argument("--max-new-tokens", type=_positive_int, default=400, help="bytes to generate (default: 400)")
    generate.add_argument("--temperature", type=_non_negative_float, default=0.7, help="0 is greedy (default: 0.7)")
    generate.add_argument("--top-k", type=_positive_int, help="draw among the k most likely bytes only")
    generate.add_argument("--top-p", type=_probability, help="draw among the likeliest bytes of this total probability")
    generate.add_argument("--seed", type=_seed, default=0)
    generate.add_argument("--threads", type=_positive_int, default=2)

    models = commands.add_parser(
        "models",
        help="the paper's models: pattern, parameters, state, FLOPs",
        description="List the presets, or one of them layer by layer. Nothing is allocated: models are built on "
        "the meta device.",
        epilog="example:\n  python -m m2rnn_compile models hybrid-gated-deltanet+1-410m",
        formatter_class=raw,
    )
    models.add_argument("name", nargs="?", help="a preset, for its details (default: a table of all)")
    models.add_argument(
        "--context", type=_positive_int, default=4096, help="tokens of context for FLOPs and state (default: 4096)"
    )

    train = commands.add_parser(
        "train",
        help="train one of the paper's models on your files",
        description=TRAIN,
        epilog=TRAIN_EXAMPLES,
        formatter_class=raw,
    )
    train.add_argument("--preset", help="a model of `python -m m2rnn_compile models`")
    train.add_argument("--data", nargs="+", type=_path, metavar="PATH", help="text files, or folders of them")
    train.add_argument("--out", type=_path, metavar="DIR", help="folder of the run (default: a new one below runs/)")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of --out")
    train.add_argument(
        "--miniature",
        action="store_true",
        help="the preset scaled down to a laptop: 8 layers of its pattern, width 128",
    )
    train.add_argument("--layers", type=_positive_int, help="keep only the first so many layers")
    train.add_argument(
        "--tokenizer", type=_path, metavar="FILE", help="a tokenizer.json of `tokenizers` (default: bytes)"
    )
    train.add_argument("--end-token", help="the tokenizer's token between documents (default: the usual ones)")
    train.add_argument("--steps", type=_positive_int, help="optimizer steps (default: 1000)")
    train.add_argument("--batch-size", type=_positive_int, help="rows of a forward pass (default: 8)")
    train.add_argument("--seq-len", type=_positive_int, help="tokens of a row (default: 512)")
    train.add_argument("--grad-accumulation", type=_positive_int, help="forward passes a step (default: 1)")
    train.add_argument("--learning-rate", type=_positive_float, help="peak of the cosine (default: 3e-4)")
    train.add_argument("--warmup", type=_positive_int, help="steps up to it (default: a tenth of the steps)")
    train.add_argument("--checkpoint-every", type=_positive_int, help="steps (default: 200)")
    train.add_argument(
        "--precision", choices=("fp32", "bf16"), help="bf16: autocast (default: bf16 on a GPU, else fp32)"
    )
    train.add_argument("--no-packing", action="store_true", help="let the text of a row run across documents")
    train.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    train.add_argument("--eager", action="store_true", help="without torch.compile")
    train.add_argument("--seed", type=_seed, help="of weights and data order (default: 0)")
    train.add_argument("--threads", type=_positive_int, help="CPU threads (default: 2; part of what fixes the bits)")

    check = commands.add_parser(
        "check-export",
        help="reload an exported model and compare its outputs with recorded ones",
        description="Load a torch.export program and compare it with recorded outputs; exit status 1 if they differ.",
    )
    check.add_argument("program", type=_path, metavar="MODEL.pt2")
    check.add_argument("expected", type=_path, metavar="EXPECTED.safetensors", help="tensors tokens.I and logits.I")
    check.add_argument("--threads", type=_positive_int, default=2)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; user errors are printed, without a traceback, and give 2."""
    from . import cli

    return cli.run(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
