# SPDX-License-Identifier: Apache-2.0
"""The training loop: compiled steps, a log, checkpoints, and a resume that continues bit by bit."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layers import param_groups
from . import checkpoint
from .config import LMConfig
from .corpus import Corpus, most_boundaries, pack
from .data import SEPARATOR, ByteData, batch_at
from .lm import HybridLM

LOG = "log.jsonl"
PRECISIONS = ("fp32", "bf16")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train. Two runs with equal configs and equal data give equal bits on one machine.

    Attributes:
        steps: optimizer steps.
        batch_size, seq_len: tokens of a forward pass.
        grad_accumulation: forward passes a step; their gradients are averaged.
        learning_rate: peak; `warmup` steps linearly up to it, then cosine down to `min_lr_ratio` of it.
        weight_decay, betas, eps: of AdamW; see `layers.param_groups` for what is decayed.
        grad_clip: bound on the gradient's norm.
        seed: of the initial weights and the order of the data.
        checkpoint_every: steps between checkpoints.
        compile: train under torch.compile(fullgraph=True).
        precision: "fp32", or "bf16" for autocast (weights, optimizer and states stay fp32).
        packed: documents do not see each other, in any layer; else a row is one stream of text.
        device: "cpu" or "cuda"; the latter needs one when a `Trainer` is made.
        threads: CPU threads; sums are split by thread, so another number gives other last bits.
    """

    steps: int
    batch_size: int = 8
    seq_len: int = 256
    learning_rate: float = 3e-3
    min_lr_ratio: float = 0.05
    warmup: int = 50
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-10
    grad_clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 200
    compile: bool = True
    threads: int = 2
    grad_accumulation: int = 1
    precision: str = "fp32"
    packed: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "checkpoint_every", "threads", "grad_accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig: `{name}` must be at least 1, got {getattr(self, name)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"TrainConfig: `precision` must be one of {PRECISIONS}, got {self.precision!r}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len * self.grad_accumulation

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of one step (from 0): linear warm-up, then a cosine."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / self.steps))
        return self.learning_rate * warm * (self.min_lr_ratio + (1 - self.min_lr_ratio) * cosine)


class Step(NamedTuple):
    """One optimizer step, as logged. `loss` is in nats per token before the step, `step` counts from 1."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float

    @property
    def bits_per_byte(self) -> float:
        return self.loss / math.log(2)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is left."""


class Trainer:
    """A model, its optimizer and its data; each step is a pure function of them and the step's number.

    Args:
        model_config, config: what to train and how.
        data: see `data.load_folder` and `corpus.load_corpus`.
        out: folder for the checkpoints and the log; created if need be.

    Raises:
        ValueError: CUDA is asked for, and torch sees none.

    Attributes:
        model, optimizer: as they are after `step` steps.
        step: optimizer steps done.
    """

    def __init__(self, model_config: LMConfig, config: TrainConfig, data: ByteData | Corpus, out: str | Path) -> None:
        if torch.device(config.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"Trainer: `config.device` is {config.device!r}, and torch sees no CUDA device here; use device='cpu', "
                "or a machine with one"
            )
        self.config, self.data, self.out = config, data, Path(out)
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.model = HybridLM(model_config).to(config.device)  # drawn on the CPU: the same weights on every device
        on_gpu = config.device != "cpu"
        _make_deterministic()
        groups = param_groups(self.model, config.weight_decay)
        options: dict[str, Any] = dict(lr=config.learning_rate, betas=config.betas, eps=config.eps)
        self.optimizer = torch.optim.AdamW(groups, fused=True if on_gpu else None, **options)
        self._separator = data.separator if isinstance(data, Corpus) else SEPARATOR
        self._boundaries = 0
        if config.packed:
            self._boundaries = most_boundaries(data.train, self._separator, config.seq_len)
        self.step = 0
        self._saved_config: LMConfig | None = None  # in the newest checkpoint; a swap makes a new one
        self._checked_config = self.model.config  # the model's when its parameters were last those of the optimizer
        # The shapes are the same in every step: static ones compile faster and run faster.
        loss = self.model.loss
        self._loss = torch.compile(loss, fullgraph=True, dynamic=False) if config.compile else loss

    @property
    def model_config(self) -> LMConfig:
        """Of the model as it is now: `swap_layer` changes it."""
        return self.model.config

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        return self.out / checkpoint.CHECKPOINTS

    def save(self) -> Path:
        """Write a checkpoint of the current step.

        Raises:
            CheckpointError: it cannot be written.
            TrainingError: see `train_step`.
        """
        self._check_optimizer()
        state = {
            "model": self.model_config.to_dict(),
            "train": _as_json(self.config),
            "data": self.data.fingerprint,
            "step": self.step,
            "random_state": torch.get_rng_state().numpy().tobytes().hex(),
        }
        folder = checkpoint.save(
            self.checkpoints, step=self.step, model=self.model, optimizer=self.optimizer, state=state
        )
        self._saved_config = self.model_config
        return folder

    def resume(self) -> None:
        """Continue from the newest checkpoint below `out`.

        That of a model with a swapped layer needs a Trainer made with the swapped config, which its state.json holds.

        Raises:
            CheckpointError: none there, damaged, or written with another config or other data.
        """
        saved = checkpoint.load(self.checkpoints)
        options = "resume with the options it was started with"
        names = "the last part of a path and what lies below it" if isinstance(self.data, Corpus) else "relative paths"
        for title, got, expected, way_out in (
            ("model config", _of_model(saved.state.get("model")), _of_model(self.model_config.to_dict()), options),
            ("training config", saved.state.get("train"), _as_json(self.config), options),
            (
                "data",
                saved.state.get("data"),
                self.data.fingerprint,
                f"a document's name ({names}), its content and the order must be as they were",
            ),
        ):
            if got != expected:
                raise checkpoint.CheckpointError(
                    f"checkpoint {str(saved.path)!r} was written with another {title} ({_difference(got, expected)}); "
                    f"{way_out}, or start afresh in another folder"
                )
        checkpoint.restore_model(saved, self.model)
        checkpoint.restore_optimizer(saved, self.model, self.optimizer)
        self._saved_config = self.model_config
        try:
            self.step = int(saved.state["step"])
            random_state = torch.frombuffer(bytearray.fromhex(saved.state["random_state"]), dtype=torch.uint8)
            torch.set_rng_state(random_state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise checkpoint.CheckpointError(
                f"checkpoint file {str(saved.path / checkpoint.STATE)!r} is damaged ({error}); start afresh in "
                "another folder"
            ) from error

    # -- steps -------------------------------------------------------------------------------------------------------

    def batch(self, number: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens, targets and document boundaries of one forward pass, counted over all steps."""
        c = self.config
        tokens, targets = batch_at(self.data.train, number, batch_size=c.batch_size, seq_len=c.seq_len, seed=c.seed)
        cu_seqlens = None
        if c.packed:
            tokens, cu_seqlens = pack(tokens, self._separator, self._boundaries)
            targets = targets.reshape_as(tokens)
            cu_seqlens = cu_seqlens.to(c.device)
        return tokens.to(c.device), targets.to(c.device), cu_seqlens

    def forward_backward(self, number: int) -> Tensor:
        """Add the gradients of one forward pass, as its share of a step; returns its loss."""
        tokens, targets, cu_seqlens = self.batch(number)
        low = self.config.precision == "bf16"
        with torch.autocast(torch.device(self.config.device).type, torch.bfloat16, enabled=low):
            loss = self._loss(tokens, targets, cu_seqlens=cu_seqlens)
        (loss / self.config.grad_accumulation).backward()
        return loss.detach()

    def _check_optimizer(self) -> None:
        """A layer swapped without the optimizer would stay as it was drawn, and no checkpoint could be written."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        own = {id(p): name for name, p in self.model.named_parameters()}
        left_out = [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in held]
        strangers = len(held - own.keys())
        if left_out or strangers:
            more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
            first = f"does not hold {left_out[0]}{more}" if left_out else "holds all of the model's"
            raise TrainingError(
                f"the optimizer {first}, and {strangers} parameters that are not the model's. A swap takes it along: "
                'swap_layer(trainer.model, index, "M", optimizer=trainer.optimizer); what was frozen then, or swapped '
                "without it, needs a new one: trainer.optimizer = torch.optim.AdamW(layers.param_groups(trainer.model, "
                "weight_decay)), whose moments begin anew"
            )
        self._checked_config = self.model.config

    def train_step(self) -> Step:
        """One optimizer step.

        Raises:
            TrainingError: the loss is not finite (the weights are left as before the step), or the optimizer's
                parameters are not those of the model, in which a layer was swapped.
        """
        if self._checked_config is not self.model.config:  # a swap makes a new one
            self._check_optimizer()
        start = time.perf_counter()
        learning_rate = self.config.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        passes = self.config.grad_accumulation
        losses = [self.forward_backward(self.step * passes + i) for i in range(passes)]
        loss = torch.stack(losses).mean()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        values = loss.item(), grad_norm.item()
        if not all(map(math.isfinite, values)):
            left = "There is no checkpoint yet"
            if checkpoint.list_steps(self.checkpoints):
                left = f"The checkpoints in {str(self.checkpoints)!r} are from before"
            raise TrainingError(
                f"step {self.step + 1}: loss {values[0]}, gradient norm {values[1]}: not finite. {left}; start afresh "
                f"with a lower learning rate (was {self.config.learning_rate})"
            )
        self.optimizer.step()
        self.step += 1
        return Step(self.step, *values, learning_rate, time.perf_counter() - start)

    def seconds_per_step(self, repeats: int = 6) -> float:
        """Time of a step's forward and backward once compiled; changes neither weights nor optimizer nor `step`."""
        best = math.inf
        for _ in range(repeats + 1):  # the first one compiles
            start = time.perf_counter()
            self.forward_backward(0)
            best = min(best, time.perf_counter() - start)
        self.optimizer.zero_grad(set_to_none=True)
        return best

    def run(
        self, on_step: Callable[[Step], None] = lambda _: None, *, stop: Callable[[], bool] = lambda: False
    ) -> bool:
        """Train to the end, logging every step and writing checkpoints; True if the end was reached.

        Args:
            on_step: told about every step after it is logged.
            stop: asked between steps; if it says so, the run is saved and ends early.

        Raises:
            TrainingError, CheckpointError: see `train_step` and `save`.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        _cut_log(self.out / LOG, self.step)  # an earlier run in this folder may have ended before its first checkpoint
        written = checkpoint.step_folder(self.checkpoints, self.step).exists()
        saved = self.step if written and self._saved_config is self.model_config else -1
        with (self.out / LOG).open("a", buffering=1) as log:
            while self.step < self.config.steps and not stop():
                done = self.train_step()
                log.write(json.dumps(done._asdict()) + "\n")
                on_step(done)
                if self.step % self.config.checkpoint_every == 0:
                    self.save()
                    saved = self.step
        if saved != self.step:
            self.save()
        return self.step >= self.config.steps


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a request that `Trainer.run` can be asked for; a second one interrupts at once.

    Outside of the main thread signals cannot be handled, and the request never comes.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def bits_per_byte(
    model: HybridLM, data: Tensor, *, seq_len: int, batch_size: int = 16, separator: int = SEPARATOR
) -> tuple[float, int]:
    """Mean bits the model needs for each byte (or other token) of `data`, separators left out as targets.

    Every byte is predicted from the bytes before it in a window of up to `seq_len` that overlaps the window before by
    half, so all but the first bytes have at least ``seq_len / 2`` bytes of context.

    Returns:
        ``(bits per byte, bytes counted)``.

    Raises:
        ValueError: fewer than two bytes, or no length or batch of at least 1.
    """
    for name, size in (("seq_len", seq_len), ("batch_size", batch_size)):
        if size < 1:
            raise ValueError(f"bits_per_byte: `{name}` must be at least 1, got {size}")
    if len(data) < 2:
        raise ValueError(f"bits_per_byte: needs at least two bytes, got {len(data)}")
    stride = max(1, seq_len // 2)
    stream = data.long()
    device = next(model.parameters()).device
    # Window w predicts positions w·stride + 1 ...; the first half of every window but the first is context only.
    starts = torch.arange(0, max(1, len(stream) - 1 - (seq_len - stride)), stride)
    steps = starts[:, None] + torch.arange(seq_len)
    inside = steps + 1 < len(stream)
    tokens = stream[steps.clamp_max(len(stream) - 1)]
    targets = stream[(steps + 1).clamp_max(len(stream) - 1)]
    fresh = (torch.arange(seq_len) >= seq_len - stride)[None, :] | (starts == 0)[:, None]
    counted = inside & fresh & (targets != separator)
    nats = 0.0
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for rows in torch.arange(len(starts)).split(batch_size):
            nll = model.loss(tokens[rows].to(device), targets[rows].to(device), reduction="none")
            nats += float(nll.cpu().double()[counted[rows]].sum())
    model.train(was_training)
    count = int(counted.sum())
    return nats / math.log(2) / max(1, count), count


def _make_deterministic() -> None:
    """The same bits from the same inputs: cuBLAS and what sums gradients of embeddings must be told.

    On a CPU, compiled code would add the embedding's gradients by atomics from several threads, in whatever order.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A help for debugging; it would fill every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _as_json(config: TrainConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _of_model(config: Any) -> Any:
    """A config's dict without what says nothing about the model (see `LMConfig.sized`)."""
    return {k: v for k, v in config.items() if k != "sized"} if isinstance(config, dict) else config


def _difference(got: Any, expected: Any) -> str:
    """The first few fields in which two configs differ."""
    if not (isinstance(got, dict) and isinstance(expected, dict)):
        files = "the files, their names or tokenizer differ"
        return f"got {type(got).__name__}" if isinstance(expected, dict) else files
    keys = [k for k in sorted(set(got) | set(expected)) if got.get(k) != expected.get(k)]
    return "; ".join(f"{k}: saved {got.get(k)!r}, now {expected.get(k)!r}" for k in keys[:3])


def _cut_log(path: Path, step: int) -> None:
    """Drop what was logged after the checkpoint, and a last line cut short, so that the log tells one history."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in kept))
    os.replace(partial, path)
