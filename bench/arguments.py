# SPDX-License-Identifier: Apache-2.0
"""What the text of a command line means: lists, dtypes, clips, shapes, devices. Errors name the option."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from m2rnn_compile.models import MIXERS

from .floors import MODES
from .shapes import GPU_PRESETS, PRESETS, Shape, parse_shape

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
MODES_OF = {
    "op": MODES,
    "step": ("inference",),
    "layer": MODES,
    "model": (*MODES, "train", "generate"),
}


def items(text: str, option: str) -> list[str]:
    """A comma-separated list; what is named twice counts once."""
    parts = [item.strip() for item in text.split(",")]
    if not all(parts):
        raise ValueError(f"{option} {text!r}: an empty item in a list")
    return list(dict.fromkeys(parts))


def clip(text: str) -> float | None:
    """A state-gradient clip, or none."""
    if text.lower() == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number ≥ 0 nor 'none'")
    return value


def clips(text: str) -> list[float | None]:
    """A list of clips."""
    try:
        return [clip(item) for item in items(text, "--clip")]
    except argparse.ArgumentTypeError as e:
        raise ValueError(f"--clip: {e}") from e


def dtypes(text: str) -> list[torch.dtype]:
    """A list of `bf16`, `fp16`, `fp32`, `fp64` or torch's own names."""
    names = items(text, "--dtype")
    for name in names:
        if name not in DTYPES:
            raise ValueError(f"--dtype {name!r} is unknown; expected bf16, fp16, fp32 or fp64")
    return list(dict.fromkeys(DTYPES[name] for name in names))


def ratio(value: float | None, option: str) -> None:
    """A limit on a ratio is a number above 0: nothing is ever above NaN."""
    if value is not None and not value > 0:
        raise ValueError(f"{option} must be above 0, got {value}")


def one_of(name: str | None, known: Sequence[str], option: str) -> None:
    """A name that is known, if there is one."""
    if name is not None and name not in known:
        raise ValueError(f"{option} {name!r} is unknown; expected {', '.join(known) or 'nothing: there is none'}")


def modes(text: str | None, kernel: str, default: Sequence[str]) -> list[str]:
    """Modes that a kernel has."""
    if text is None:
        return list(default)
    known = MODES_OF[kernel]
    chosen = items(text, "--mode")
    unknown = [mode for mode in chosen if mode not in known]
    if unknown:
        raise ValueError(f"--mode {', '.join(unknown)}: unknown for {kernel}; expected {', '.join(known)}")
    return chosen


def pattern(text: str | None, layers: int | None) -> str | None:
    """A letter a layer, of those that models have a mixer for."""
    if layers is not None and layers < 1:
        raise ValueError(f"--layers must be at least 1, got {layers}")
    if text is None:
        return None
    if not text or set(text) - set(MIXERS):
        letters = ", ".join(f"{letter} ({mixer.title})" for letter, mixer in MIXERS.items())
        raise ValueError(f"--pattern {text!r}: expected a letter a layer, of {letters}; such as MMMA")
    if layers is not None:
        raise ValueError("--layers and --pattern: give one; the pattern has a letter for each layer")
    return text


def shapes(
    presets: Sequence[str] | None, written: Sequence[str] | None, lengths: str | None, default: Sequence[Shape]
) -> list[Shape]:
    """Shapes of --preset and --shape, each at every length of --T."""
    result: list[Shape] = []
    for text in presets or ():
        for name in items(text, "--preset"):
            if name not in PRESETS:
                raise ValueError(f"--preset {name!r} is unknown; expected {', '.join(PRESETS)}")
            result.append(PRESETS[name])
    for text in written or ():
        names = text.split(",")
        result += [PRESETS[name] for name in names] if all(n in PRESETS for n in names) else [parse_shape(text)]
    result = list(dict.fromkeys(result or default))
    if lengths is None:
        return result
    try:
        numbers = [int(item) for item in items(lengths, "--T")]
    except ValueError as e:
        raise ValueError(f"--T {lengths!r}: expected whole numbers, such as 1024,4096") from e
    if min(numbers) < 1:
        raise ValueError(f"--T {lengths!r}: a length must be at least 1")
    return list(dict.fromkeys(shape.with_length(T) for shape in result for T in numbers))


def device(text: str | None) -> torch.device:
    """A CPU or a CUDA device that is there."""
    try:
        chosen = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as e:
        raise ValueError(f"--device {text!r}: {str(e).splitlines()[0]}") from e
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {text!r}: timings are implemented for cpu and cuda")
    if chosen.type == "cuda":
        count = torch.cuda.device_count()
        if (chosen.index or 0) >= count:
            raise ValueError(f"--device {text!r}: this machine has {count} CUDA device(s)")
        chosen = torch.device("cuda", chosen.index or 0)
        torch.cuda.set_device(chosen)
    return chosen


def refuse_gpu_presets_on_cpu(chosen: Sequence[Shape], on: torch.device, asked: str | None) -> None:
    """The paper's shapes take minutes a call on a CPU: whoever wants that says --device cpu."""
    names = [shape.name for shape in chosen if shape.name in GPU_PRESETS]
    if names and on.type == "cpu" and asked is None:
        raise ValueError(
            f"preset {', '.join(names)} is meant for a GPU and torch sees none (torch.cuda.is_available() is False); "
            "use --preset cpu, --dry-run, or insist with --device cpu"
        )
