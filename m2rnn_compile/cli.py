# SPDX-License-Identifier: Apache-2.0
"""Runs a command of ``python -m m2rnn_compile`` and turns what goes wrong into a message and an exit status."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import shutil
import signal
import sys

from .models.checkpoint import CheckpointError
from .models.data import DataError

# Command -> (module of this package, function (args, console) -> exit status). Loaded when it is asked for.
COMMANDS = {
    "demo": ("demo", "run_demo"),
    "generate": ("demo", "run_generate"),
    "check-export": ("demo", "run_check_export"),
    "models": ("models_command", "run_models"),
    "train": ("train_command", "run_train"),
}


class UserError(ValueError):
    """Something the user can put right; printed without a traceback."""


def need_compiler() -> None:
    """Refuse to go on where torch.compile cannot work on the CPU.

    Raises:
        UserError: no C++ compiler is found.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    if not any(shutil.which(name) for name in names):
        raise UserError(
            f"torch.compile needs a C++ compiler for the CPU; looked for {', '.join(names)}. "
            "Install one (Debian, Ubuntu: apt-get install g++; macOS: xcode-select --install), or give --eager"
        )


def run(args: argparse.Namespace) -> int:
    """Run one parsed command line; returns the exit status."""
    module, function = COMMANDS[args.command]
    try:
        from rich.console import Console
        from rich.markup import escape

        command = getattr(importlib.import_module(f".{module}", __package__), function)
    except ImportError as error:
        print(
            f"error: this command needs the package `{error.name}`; run: pip install 'm2rnn-compile[demo]'",
            file=sys.stderr,
        )
        return 2
    for text in (sys.stdout, sys.stderr):
        if isinstance(text, io.TextIOWrapper):
            text.reconfigure(errors="replace")  # not every terminal has our letters
    from .models.train import TrainingError

    def complain(title: str, message: str) -> None:
        Console(stderr=True, highlight=False).print(f"[bold red]{title}:[/] {escape(message)}", soft_wrap=True)

    try:
        return int(command(args, Console(highlight=False)))
    except (UserError, DataError, CheckpointError) as error:
        complain("error", str(error))
        return 2
    except TrainingError as error:
        complain("training stopped", str(error))
        return 1
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail again
        return 128 + signal.SIGPIPE
    except OSError as error:
        complain("error", f"{error.strerror}: {error.filename!r}" if error.filename else str(error))
        return 2
