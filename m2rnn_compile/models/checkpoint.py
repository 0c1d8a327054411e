# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: safetensors for tensors, JSON for the rest, written atomically, checked when read.

A checkpoint is a folder ``step-00000123`` with ``model.safetensors`` (names as in the model), ``optimizer.safetensors``
(``<state>.<parameter>``) and ``state.json`` (config, step, random state, a hash of the other two files, and which
parameters the optimizer had no state of: those of a layer swapped in after the last step). It is
built under a temporary name and renamed when complete, so an interruption leaves either the whole of it or nothing.
Where the same step is saved again, the checkpoint before it is put aside as ``.replaced-step-…`` for that moment, and
is read from there if the process died in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FORMAT = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
ASIDE = ".replaced-"  # begins the name of a checkpoint while another of its step takes its place
CHECKPOINTS = "checkpoints"  # where a run's folder keeps them


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another model; the message names the file, the fault and the way out."""


class Checkpoint(NamedTuple):
    """What a checkpoint folder holds.

    Attributes:
        path: the folder.
        model: tensors by parameter name.
        optimizer: tensors by ``<state>.<parameter>``.
        state: the rest, as it was given to `save`.
        stateless: parameters that the optimizer had no state of.
    """

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    stateless: tuple[str, ...] = ()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError(
            "checkpoints need the package `safetensors`, which is not installed; run: pip install safetensors"
        ) from error
    return safetensors


def step_folder(root: str | Path, step: int) -> Path:
    """Where the checkpoint of one step lies below `root`."""
    return Path(root) / f"step-{step:08d}"


def list_steps(root: str | Path) -> list[int]:
    """Steps with a complete checkpoint below `root`, ascending."""
    if not Path(root).is_dir():
        return []
    names = (p.name.removeprefix(ASIDE) for p in Path(root).iterdir() if p.is_dir())
    return sorted({int(n[5:]) for n in names if n.startswith("step-") and n[5:].isdigit()})


def _aside(target: Path) -> Path:
    return target.with_name(ASIDE + target.name)


def save(
    root: str | Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write the checkpoint of `step` below `root` and remove all but the newest `keep`.

    Args:
        state: JSON-serialisable; comes back from `load` as it is.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: the folder cannot be written (the older checkpoints are untouched, one of this step too).
    """
    st = _safetensors()
    target = step_folder(root, step)
    partial = target.with_name(f".partial-{target.name}-{os.getpid()}")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        st.torch.save_file(_plain(dict(model.named_parameters()) | dict(model.named_buffers())), partial / MODEL)
        st.torch.save_file(
            _plain({} if optimizer is None else _optimizer_tensors(model, optimizer)), partial / OPTIMIZER
        )
        files = {
            name: {"bytes": (partial / name).stat().st_size, "sha256": _sha256(partial / name)}
            for name in (MODEL, OPTIMIZER)
        }
        stateless = [] if optimizer is None else _stateless(model, optimizer)
        record = {"format": FORMAT, "step": step, "files": files, "stateless": stateless, "state": state}
        (partial / STATE).write_text(json.dumps(record, indent=1))
        for name in (MODEL, OPTIMIZER, STATE):
            _fsync(partial / name)
        if target.exists():  # the same step again, perhaps with a layer swapped since
            shutil.rmtree(_aside(target), ignore_errors=True)
            os.replace(target, _aside(target))
        os.replace(partial, target)
        _fsync(Path(root))
    except BaseException as error:  # a second Ctrl-C too leaves nothing half written behind
        shutil.rmtree(partial, ignore_errors=True)
        if _aside(target).exists() and not target.exists():
            os.replace(_aside(target), target)
        if not isinstance(error, (OSError, st.SafetensorError)):
            raise
        raise CheckpointError(
            f"cannot write checkpoint {str(target)!r}: {_fault(error)}; free space or choose another folder"
        ) from error
    shutil.rmtree(_aside(target), ignore_errors=True)
    for old in list_steps(root)[:-keep]:
        for folder in (step_folder(root, old), _aside(step_folder(root, old))):
            shutil.rmtree(folder, ignore_errors=True)
    return target


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint: a ``step-…`` folder, or a folder of such, or a run's folder (the newest step is taken).

    Raises:
        CheckpointError: something is missing or damaged.
    """
    st = _safetensors()
    folder = Path(path)
    if not folder.is_dir():
        fault = "it is not a folder" if folder.exists() else "there is no such folder"
        raise CheckpointError(f"no checkpoint at {str(folder)!r}: {fault}; check the path")
    if not (folder / STATE).exists() and not folder.name.startswith("step-"):
        if (folder / CHECKPOINTS).is_dir():
            folder = folder / CHECKPOINTS
        steps = list_steps(folder)
        if not steps:
            raise CheckpointError(
                f"no checkpoint in {str(folder)!r}: expected a folder step-… holding {STATE}; check the path"
            )
        folder = step_folder(folder, steps[-1])
    if not folder.exists():
        folder = _aside(folder)
    out = _way_out(folder)
    try:
        record = json.loads((folder / STATE).read_text())
        step, files, state = record["step"], record["files"], record["state"]
        known = {name: (files[name]["bytes"], files[name]["sha256"]) for name in (MODEL, OPTIMIZER)}
        stateless = tuple(record.get("stateless", ()))
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint file {str(folder / STATE)!r} is missing; {out}") from error
    except OSError as error:
        raise CheckpointError(
            f"checkpoint file {str(folder / STATE)!r} cannot be read: {error.strerror}; {out}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint file {str(folder / STATE)!r} is damaged ({error!r}); {out}") from error
    if record.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} has format {record.get('format')!r}, this version reads {FORMAT}; "
            "use the version of m2rnn_compile that wrote it"
        )
    tensors = {}
    for name, (size, sha256) in known.items():
        file = folder / name
        if not file.exists():
            raise CheckpointError(f"checkpoint file {str(file)!r} is missing; {out}")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"checkpoint file {str(file)!r} is truncated or was changed: {file.stat().st_size} bytes, "
                f"expected {size}; {out}"
            )
        if _sha256(file) != sha256:
            raise CheckpointError(
                f"checkpoint file {str(file)!r} is corrupt: its content does not match its hash; {out}"
            )
        tensors[name] = st.torch.load_file(file)
    if not isinstance(state, dict) or not isinstance(step, int):
        raise CheckpointError(
            f"checkpoint file {str(folder / STATE)!r} is damaged (step or state of a wrong type); {out}"
        )
    return Checkpoint(folder, tensors[MODEL], tensors[OPTIMIZER], state, stateless)


def restore_model(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Copy the weights into `model`.

    Raises:
        CheckpointError: naming the missing, unexpected and mis-shaped tensors; the model is then unchanged.
    """
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    faults = _faults(own, checkpoint.model)
    if faults:
        raise CheckpointError(
            f"checkpoint file {str(checkpoint.path / MODEL)!r} does not fit this model: {faults}; "
            "it was written with another config: build the model from the config in its state.json, or choose "
            "another --out"
        )
    with torch.no_grad():
        for name, x in own.items():
            x.copy_(checkpoint.model[name])


def restore_optimizer(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Copy the optimizer's state (not its options: those are the caller's).

    Raises:
        CheckpointError: a tensor is missing or mis-shaped.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    states = sorted({key.partition(".")[0] for key in checkpoint.optimizer})
    for group in optimizer.param_groups:
        for p in group["params"]:
            if names[id(p)] in checkpoint.stateless:
                optimizer.state.pop(p, None)
                continue
            restored = {}
            for key in states:
                name = f"{key}.{names[id(p)]}"
                x = checkpoint.optimizer.get(name)
                if x is None or (x.dim() > 0 and x.shape != p.shape):
                    got = "missing" if x is None else f"of shape {tuple(x.shape)}, expected {tuple(p.shape)}"
                    raise CheckpointError(
                        f"checkpoint file {str(checkpoint.path / OPTIMIZER)!r} does not fit this model: {name} "
                        f"is {got}; " + _way_out(checkpoint.path)
                    )
                counter_on_cpu = x.dim() == 0 and not (group.get("fused") or group.get("capturable"))
                restored[key] = x.clone() if counter_on_cpu else x.to(p.device, copy=True)
            optimizer.state[p] = restored


def _fault(error: BaseException) -> str:
    """What the system says; safetensors' own error, which is no OSError, has it in its text."""
    return getattr(error, "strerror", None) or str(error)


def _faults(own: dict[str, Tensor], stored: dict[str, Tensor]) -> str:
    missing, unexpected = sorted(set(own) - set(stored)), sorted(set(stored) - set(own))
    shapes = [
        f"{n} has shape {list(stored[n].shape)}, expected {list(own[n].shape)}"
        for n in own
        if n in stored and stored[n].shape != own[n].shape
    ]
    parts = []
    for title, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shapes)):
        if names:
            parts.append(
                f"{title}: " + ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            )
    return "; ".join(parts)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {f"{key}.{names[id(p)]}": x for p, entry in optimizer.state.items() for key, x in entry.items()}


def _stateless(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Of all parameters: one that is not in this optimizer (a frozen layer's) may be in the one that goes on."""
    return [n for n, p in model.named_parameters() if not optimizer.state.get(p)]


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().cpu().contiguous() for name, x in tensors.items()}


def _way_out(folder: Path) -> str:
    others = {s: step_folder(folder.parent, s) for s in list_steps(folder.parent)}
    older = [s for s, other in others.items() if folder not in (other, _aside(other))]
    if older:
        return f"delete the folder {str(folder)!r} to go on from {step_folder(folder.parent, older[-1]).name}"
    return f"delete the folder {str(folder)!r} and start again; there is no older checkpoint beside it"


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
