# SPDX-License-Identifier: Apache-2.0
"""Weights in sharded safetensors files, the layout that the Hugging Face hub uses, read tensor by tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import CheckpointError, _fault, _faults, _safetensors
from .config import LMConfig
from .lm import HybridLM

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
MODEL_TYPE = "m2rnn_hybrid"  # in config.json; also the name under which `hf` registers the model


class WeightFiles:
    """The tensors of a folder (sharded or not) or of one safetensors file. Reads their names and shapes only.

    Attributes:
        path: the folder or file.
        shapes: shape of every tensor by name.

    Raises:
        CheckpointError: something is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._safe_open = _safetensors().safe_open
        if self.path.is_file():
            files = [self.path]
        elif (self.path / INDEX).exists():
            listed = _read_json(self.path / INDEX).get("weight_map")
            if not isinstance(listed, dict):
                raise CheckpointError(f"{str(self.path / INDEX)!r} holds no `weight_map`; fetch the file again")
            for name, file in listed.items():
                if not isinstance(file, str):
                    raise CheckpointError(
                        f"{str(self.path / INDEX)!r} has in its `weight_map`, in a file's place, {name!r}: {file!r}; "
                        "fetch the file again"
                    )
            files = [self.path / name for name in sorted(set(listed.values()))]
        elif (self.path / SINGLE).exists():
            files = [self.path / SINGLE]
        else:
            raise CheckpointError(
                f"no weights at {str(self.path)!r}: expected a safetensors file, or a folder holding {SINGLE} or "
                f"{INDEX}; check the path"
            )
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        for file in files:
            try:
                with self._safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  (not a dict)
                        self.shapes[name] = tuple(opened.get_slice(name).get_shape())
                        self._file_of[name] = file
            except FileNotFoundError as error:
                raise CheckpointError(f"weights file {str(file)!r} is missing; fetch it") from error
            except Exception as error:  # safetensors raises its own type, and OSError
                raise CheckpointError(f"weights file {str(file)!r} is damaged ({error}); fetch it again") from error

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        with self._safe_open(self._file_of[name], framework="pt") as opened:
            return opened.get_tensor(name)


def save_weights(
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    folder: str | Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> list[Path]:
    """Write tensors into one file, or into numbered shards and an index if they are more than `max_shard_bytes`.

    Shards appear under their names only when all are written; a shard is at least one tensor.

    Returns:
        The files that hold tensors.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    st = _safetensors()
    if max_shard_bytes < 1:
        raise ValueError(f"save_weights: `max_shard_bytes` must be at least 1, got {max_shard_bytes}")
    root = Path(folder)
    partial: list[tuple[Path, list[str]]] = []
    shard: dict[str, Tensor] = {}
    total = held = 0

    def flush() -> None:
        nonlocal shard, held
        path = root / f".partial-{len(partial):05d}-{os.getpid()}.safetensors"
        partial.append((path, list(shard)))
        st.torch.save_file(shard, path, metadata={"format": "pt"})
        shard, held = {}, 0

    try:
        root.mkdir(parents=True, exist_ok=True)
        for name, x in tensors.items() if isinstance(tensors, Mapping) else tensors:
            size = x.numel() * x.element_size()
            if shard and held + size > max_shard_bytes:
                flush()
            shard[name] = x.detach().cpu().contiguous()
            held, total = held + size, total + size
        flush()
        n = len(partial)
        names = [SINGLE] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
        for old in (*root.glob("model-*-of-*.safetensors"), root / SINGLE, root / INDEX):
            old.unlink(missing_ok=True)
        for (path, _), name in zip(partial, names, strict=True):
            os.replace(path, root / name)
        if n > 1:
            weight_map = {t: name for (_, held_names), name in zip(partial, names, strict=True) for t in held_names}
            record = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (root / INDEX).write_text(json.dumps(record, indent=1))
        return [root / name for name in names]
    except (OSError, st.SafetensorError) as error:
        raise CheckpointError(
            f"cannot write weights to {str(root)!r}: {_fault(error)}; free space or choose another folder"
        ) from error
    finally:
        for path, _ in partial:
            path.unlink(missing_ok=True)


def load_weights(
    model: nn.Module,
    files: WeightFiles,
    *,
    convert: Callable[[str, Tensor], Tensor] = lambda name, x: x,
    way_out: str = "build the model from the config.json beside the weights",
) -> None:
    """Copy weights into `model`, one tensor at a time, cast to the model's dtypes.

    Args:
        convert: turns a stored tensor into the model's; must not change its shape.
        way_out: what to do about weights that do not fit.

    Raises:
        CheckpointError: naming the missing, unexpected and mis-shaped tensors; the model is then unchanged.
    """
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    stored = {name: torch.empty(shape, device="meta") for name, shape in files.shapes.items()}
    faults = _faults(own, stored)
    if faults:
        raise CheckpointError(f"weights at {str(files.path)!r} do not fit this model: {faults}; {way_out}")
    with torch.no_grad():
        for name, x in own.items():
            x.copy_(convert(name, files.read(name)))


def save_model(model: HybridLM, folder: str | Path, *, max_shard_bytes: int = 5 * 10**9) -> list[Path]:
    """Write ``config.json`` and the weights; `load_model` and transformers (see `hf`) read them.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    files = save_weights(dict(model.named_parameters()), folder, max_shard_bytes=max_shard_bytes)
    write_config(folder, {"model_type": MODEL_TYPE, "lm": model.config.to_dict()})
    return files


def load_model(
    folder: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> HybridLM:
    """The model that `save_model` wrote, in eval mode.

    Raises:
        CheckpointError: something is missing, damaged, or does not fit.
    """
    record = read_config(folder)
    try:
        config = LMConfig.from_dict(record["lm"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{str(Path(folder) / CONFIG)!r} is not a config of this library ({error}); released lm-engine models "
            "are read by models.lm_engine.load_released"
        ) from error
    files = WeightFiles(folder)
    model = HybridLM(config, device=device, dtype=dtype)
    load_weights(model, files)
    return model.eval()


def write_config(folder: str | Path, values: dict[str, Any]) -> None:
    """Write ``config.json``."""
    try:
        (Path(folder) / CONFIG).write_text(json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write {str(Path(folder) / CONFIG)!r}: {error.strerror}") from error


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        CheckpointError: missing or damaged.
    """
    return _read_json(Path(folder) / CONFIG)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{str(file)!r} is missing; check the path") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(file)!r} cannot be read ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{str(file)!r} holds {type(values).__name__}, expected an object; fetch it again")
    return values
