# SPDX-License-Identifier: Apache-2.0
"""State tracking: word problems over parity, S3, A5 and S5, trained at length 128 and tested at every length to 4096.

    python examples/state_tracking.py --preset cpu
    python examples/state_tracking.py --preset h200 --out bench/results/reproduction/state-tracking-h200.jsonl

A model reads a start token and then elements of a group, one a step, and says after each what their product is so far.
*Exact match* at length L is the share of test sequences whose products 1 to L are all right.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import recipes
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from m2rnn_compile.layers import M2RNN, Attention, Block, GatedDeltaNet, M2RNNCache, RMSNorm, SwiGLU, param_groups
from m2rnn_compile.layers.conv import CausalConv

TRAIN_LENGTH, TEST_LENGTH = 128, 4096
LENGTHS = sorted({2**i for i in range(13)} | set(range(64, TEST_LENGTH + 1, 64)))
ENOUGH = 0.7  # share of right training words at which training goes on to the next stage
POLISHING = ((32, 0.4), (64, 0.7), (TRAIN_LENGTH, 1.0))  # length of words, up to which share of the steps
CHECK = 25  # steps between looks at the training accuracy; also how many batches are drawn at once

# -- the tasks ---------------------------------------------------------------------------------------------------------


def permutations(task: str) -> list[tuple[int, ...]]:
    """Elements of a group (parity, S<n> or A<n>) as permutations, those of the fewest neighbour swaps first."""
    n = 2 if task == "parity" else int(task[1:])
    inversions = lambda p: sum(p[i] > p[j] for i in range(n) for j in range(i + 1, n))
    found = sorted(itertools.permutations(range(n)), key=lambda p: (inversions(p), p))
    return [p for p in found if inversions(p) % 2 == 0] if task[0] == "A" else found


def multiplication_table(task: str) -> Tensor:
    """``table[a, b]``: number of the element that does a first, then b."""
    elements = permutations(task)
    number = {p: i for i, p in enumerate(elements)}
    return torch.tensor([[number[tuple(b[a_i] for a_i in a)] for b in elements] for a in elements])


def word_problem(
    table: Tensor, shape: tuple[int, ...], generator: torch.Generator, elements: int | None = None
) -> tuple[Tensor, Tensor]:
    """Random words ``[..., T]`` of the first `elements` (default: all), and their running products.

    A log-depth scan: the products of 2, 4, 8, ... neighbours.
    """
    words = torch.randint(elements or len(table), shape, generator=generator, device=table.device)
    products, reach = words, 1
    while reach < shape[-1]:
        products = torch.cat([products[..., :reach], table[products[..., :-reach], products[..., reach:]]], -1)
        reach *= 2
    return words, products


# -- the models --------------------------------------------------------------------------------------------------------


class Varied(M2RNN):
    """The layer with parts taken away.

    Args:
        gate, residual, norm: keep ``· SiLU(g)``, ``+ D ⊙ v`` and the RMSNorm.
        forget: keep the forget gate; without it f = 0.
    """

    cache_is_all = True  # what it needs of the elements before is in its cache

    def __init__(
        self,
        hidden_size: int,
        *,
        gate: bool = True,
        residual: bool = True,
        norm: bool = True,
        forget: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, **options)
        self.keeps = gate, residual, norm
        if not forget:
            self.decay_gate = AlwaysForget()

    def _gate_and_norm(self, y: Tensor, v: Tensor, g: Tensor) -> Tensor:
        gate, residual, norm = self.keeps
        y = (y + self.D * v if residual else y).flatten(-2)
        y = y * F.silu(g) if gate else y
        return self.output_projection(self.g_norm(y) if norm else y)


class AlwaysForget(nn.Module):
    def forward(self, x_f: Tensor) -> Tensor:
        return torch.zeros_like(x_f, dtype=torch.float32)


class ConvOnly(Varied):
    """The causal conv without the SiLU after it. ``taps``: start as in the paper, or at "identity"."""

    cache_is_all = False  # the inputs of its conv are not there

    def __init__(self, hidden_size: int, *, taps: str = "random", **options: Any) -> None:
        super().__init__(hidden_size, **options | dict(conv_size=None))
        self.short_conv = CausalConv(self.projection_sizes[0], 4, init_std=self.init_std)
        if taps == "identity":
            start_at_identity(self.short_conv)

    def _project(self, x: Tensor, pad: bool) -> tuple[Tensor, Tensor, Tensor]:
        qkv, x_f, g = super()._project(x, pad)
        return self.short_conv(qkv)[0], x_f, g


def conv_and_silu(hidden_size: int, **options: Any) -> Varied:
    """The paper's conv and SiLU, with the taps starting at the identity (a width of 1 leaves the SiLU only)."""
    layer = Varied(hidden_size, **options)
    assert layer.conv1d is not None
    start_at_identity(layer.conv1d)
    return layer


def start_at_identity(conv: CausalConv) -> None:
    with torch.no_grad():
        conv.weight.zero_()[:, 0, -1] = 1


class FullGRU(nn.Module):
    """torch.nn.GRU (cuDNN's on a GPU), its state as wide as the residual stream."""

    def __init__(self, hidden_size: int, **_: Any) -> None:
        super().__init__()
        self.gru = nn.GRU(hidden_size, hidden_size, batch_first=True)

    def forward(self, x: Tensor, cache: None = None) -> Tensor:
        return self.gru(x)[0]


class Carry(NamedTuple):
    """How a state that is carried from one segment of a word to the next is trained (see `Carried`)."""

    noise: float = 0.0  # standard deviation of what is added to H while the rule is learned, and at first later
    floor: float = 0.0  # at least so much later
    most: float = 0.15  # at most so much later
    relabel: bool = True  # a wrong word goes on from the product the model said; else it ends and a new one begins
    sure: float = 0.8  # share of right segments above which a carried state bears more noise
    every: tuple[int, int] = (2, 4)  # elements between noise and noise: while the rule is learned, and later
    at_once: bool = True  # learn from words of 16 over all elements at once
    enough: float = 0.9  # share of right training words at which carrying begins
    rate: float = 1.0  # learning rate at the beginning of carrying, of that while the rule is learned
    segment: int = 16


def carry_of(elements: int, **changes: Any) -> Carry:
    """What was found for groups of that size, see docs/reproduction.md: small ones learn from words of 16 at once."""
    both = dict(noise=0.15, floor=0.02, most=0.3, relabel=False, rate=0.5)
    return Carry(**both | (dict(at_once=False, enough=ENOUGH) if elements >= 60 else {}) | changes)


class Spec(NamedTuple):
    """A model: how a mixer is made, layers, whether autocast takes bf16 (None: on a GPU only), which tanh the
    recurrence takes on a GPU, whether its state is carried in the second phase of training (changes to `carry_of`; None
    polishes), and whether its weights are set (`set_by_hand`) instead of trained."""

    make: Callable[..., nn.Module]
    layers: int = 1
    bf16: bool | None = False
    hardware_tanh: bool | None = None
    learning_rate: float = 2e-3
    carry: dict[str, Any] | None = None
    by_hand: bool = False

    def autocast(self, device: torch.device) -> torch.autocast:
        bf16 = device.type == "cuda" if self.bf16 is None else self.bf16
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def m2rnn_spec(make: Callable[..., nn.Module], bf16: bool | None = None, **more: Any) -> Spec:
    return Spec(make, bf16=bf16, **dict(carry={}) | more)


WIDTH = 128
M2RNN_SIZES: dict[str, Any] = dict(num_heads=4, key_dim=8, value_dim=64)
DELTANET: dict[str, Any] = dict(num_heads=4, key_dim=32, value_dim=32)

# What has to change in the paper's block for it to track state, all of it options of the layer; see
# docs/reproduction.md for why. The sizes matter for S5: a row of H follows one of five points, which takes 25 of its V
# columns (one for each pair of old place and new place).
TRACKING: dict[str, Any] = dict(
    num_heads=8, conv_size=None, state_weight_init="normal", init_std=WIDTH**-0.5, dt_init=(0.5, 2.0)
)
BARE: dict[str, Any] = dict(gate=False, residual=False, norm=False, forget=False)


def paper(**options: Any) -> Callable[..., nn.Module]:
    """The block of the released models, with changes."""
    return partial(Varied, **M2RNN_SIZES | options)


def tracking(**options: Any) -> Callable[..., nn.Module]:
    """The block for state tracking, with changes."""
    return paper(**TRACKING | options)


PAPER, RECOMMENDED = "m2rnn, the paper's block", "m2rnn, for state tracking"
QUICK = "m2rnn, for state tracking, quick"
WITHOUT_NOISE: dict[str, Any] = dict(noise=0.0, relabel=True, rate=1.0)
BY_HAND = "m2rnn, for state tracking, by hand"
MODELS: dict[str, Spec] = {
    RECOMMENDED: m2rnn_spec(tracking()),
    # enough for S3 in fp32, and what two CPU cores learn in minutes; in bf16 it was 0 % at 4096
    QUICK: m2rnn_spec(tracking(num_heads=4), carry=WITHOUT_NOISE),
    PAPER: m2rnn_spec(paper(), carry=WITHOUT_NOISE),
    "gru": Spec(FullGRU),
    "gated deltanet": Spec(partial(GatedDeltaNet, **DELTANET)),
    "gated deltanet [-1, 1]": Spec(partial(GatedDeltaNet, **DELTANET, allow_neg_eigval=True)),
    "gated deltanet, 2 layers": Spec(partial(GatedDeltaNet, **DELTANET), layers=2),
    "gated deltanet [-1, 1], 2 layers": Spec(partial(GatedDeltaNet, **DELTANET, allow_neg_eigval=True), layers=2),
    "softmax attention, 2 layers": Spec(partial(Attention, num_heads=4, rope_theta=10_000.0), layers=2),
}
BASELINES = tuple(MODELS)[3:]
MODELS |= {
    # from the paper's block towards the other
    "paper + init 1/√d": m2rnn_spec(paper(init_std=WIDTH**-0.5)),
    "paper + init 1/√d, W normal": m2rnn_spec(paper(init_std=WIDTH**-0.5, state_weight_init="normal")),
    "paper + init 1/√d, no conv": m2rnn_spec(paper(init_std=WIDTH**-0.5, conv_size=None)),
    "paper + no conv, W normal": m2rnn_spec(paper(conv_size=None, state_weight_init="normal")),
    # from the block for state tracking back, one change at a time
    "tracking, conv and SiLU": m2rnn_spec(tracking(conv_size=4)),
    "tracking, SiLU": m2rnn_spec(partial(conv_and_silu, **M2RNN_SIZES | TRACKING | dict(conv_size=1))),
    "tracking, conv": m2rnn_spec(partial(ConvOnly, **M2RNN_SIZES | TRACKING), carry=None),
    "tracking, conv from identity": m2rnn_spec(
        partial(ConvOnly, **M2RNN_SIZES | TRACKING, taps="identity"), carry=None
    ),
    "tracking, conv from identity, SiLU": m2rnn_spec(
        partial(conv_and_silu, **M2RNN_SIZES | TRACKING | dict(conv_size=4))
    ),
    "tracking, W identity": m2rnn_spec(tracking(state_weight_init="identity")),
    "tracking, W orthogonal": m2rnn_spec(tracking(state_weight_init="orthogonal")),
    "tracking, init 0.02": m2rnn_spec(tracking(init_std=0.02)),
    "tracking, dt as in the paper": m2rnn_spec(tracking(dt_init=(1e-3, 0.1))),
    "tracking, f = 0": m2rnn_spec(tracking(forget=False)),
    "tracking, no gate": m2rnn_spec(tracking(gate=False)),
    "tracking, no residual": m2rnn_spec(tracking(residual=False)),
    "tracking, no norm": m2rnn_spec(tracking(norm=False)),
    "bare recurrence": m2rnn_spec(tracking(**BARE)),
    "bare recurrence, W identity": m2rnn_spec(tracking(**BARE, state_weight_init="identity")),
    BY_HAND: Spec(tracking(), by_hand=True),
    # the size, the second phase of training, and (on a GPU) the numerics
    "tracking, 4 heads": m2rnn_spec(tracking(num_heads=4)),
    "tracking, K = 16": m2rnn_spec(tracking(key_dim=16)),
    "tracking, polished": m2rnn_spec(tracking(), carry=None),
    "tracking, no noise": m2rnn_spec(tracking(), carry=dict(noise=0.0)),
    "tracking, noise to 0.15": m2rnn_spec(tracking(), carry=dict(most=0.15)),
    "tracking, noise to 0.5": m2rnn_spec(tracking(), carry=dict(most=0.5, sure=0.7)),
    "tracking, 12 heads": m2rnn_spec(tracking(num_heads=12)),
    "tracking, exact tanh": m2rnn_spec(tracking(), hardware_tanh=False),
    "tracking, fp32": m2rnn_spec(tracking(), bf16=False),
    "tracking, fp32, approximate tanh": m2rnn_spec(tracking(), bf16=False, hardware_tanh=True),
}


class Tracker(nn.Module):
    """Embedding, pre-norm blocks of a mixer and a SwiGLU, norm, a linear head over the group."""

    def __init__(self, spec: Spec, elements: int, width: int = WIDTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(elements + 1, width)  # the last one is the start token
        blocks = [Block(width, spec.make(width), SwiGLU(width, 2 * width)) for _ in range(spec.layers)]
        self.blocks, self.norm, self.head = nn.ModuleList(blocks), RMSNorm(width), nn.Linear(width, elements)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.start = elements

    def forward(self, words: Tensor) -> Tensor:
        """Logits of the product after each element of ``words [B, T]``."""
        x = self.embedding(F.pad(words, (1, 0), value=self.start))
        for block in self.blocks:
            x = block(x).x
        return self.head(self.norm(x)[:, 1:]).float()

    def after_start(self) -> M2RNNCache:
        """What a word begins with: the cache after the start token, one row. For one block of M²RNN."""
        (block,) = self.blocks
        start = torch.full((1, 1), self.start, device=self.embedding.weight.device)
        return self.go_on(start, block.sequence_mixer.init_cache(1))[1]

    def go_on(self, words: Tensor, cache: M2RNNCache) -> tuple[Tensor, M2RNNCache]:
        """Logits of the products in words that go on from a cache, and the cache after them."""
        (block,) = self.blocks
        out = block(self.embedding(words), cache=cache)
        return self.head(self.norm(out.x)).float(), out.cache


@contextlib.contextmanager
def tanh_of(spec: Spec) -> Iterator[None]:
    """The choice between the exact and the hardware's tanh where it is not the dtype's own.

    The public function has no such choice (exact in fp32, the hardware's in 16 bits); the Triton lowering has.
    """
    if spec.hardware_tanh is None:
        yield
        return
    from m2rnn_compile.lowering import triton as lowering

    chosen, own = spec.hardware_tanh, lowering._numerics
    lowering._numerics = lambda v, _: own(v, chosen)
    try:
        yield
    finally:
        lowering._numerics = own


@torch.no_grad()
def set_by_hand(model: Tracker, task: str, strength: float = 10.0) -> None:
    """Weights that solve a task exactly, at every length: one layer is enough, and this is how.

    Head n follows point n (the last one is where the others are not). Its columns are the pairs (i, j) of places, +1 if
    the point was at i and is at j now, else -1. Σ_i H[(i, j)] is -3 if the point is at j, else -5; W adds it to all
    columns (j, k), the element's v adds 4 to those with j -> k and 2 to the others, and the sum is positive only where
    both are so: an AND. tanh brings every error back to ±1.
    """
    elements, mixer = permutations(task), model.blocks[0].sequence_mixer
    assert isinstance(mixer, Varied)
    n, V, K = len(elements[0]), mixer.value_dim, mixer.key_dim
    for parameter in model.parameters():
        parameter.zero_()
    for norm in (model.blocks[0].ln_1, mixer.g_norm, model.norm):
        norm.weight.fill_(1)
    model.embedding.weight[:, 0] = 1  # the same for all, and one dimension each
    model.embedding.weight[:, 1 : len(elements) + 2] += torch.eye(len(elements) + 1)
    scale = float(model.blocks[0].ln_1(model.embedding.weight[:1])[0, 0])
    q, k, v, _, g = mixer.input_projection.weight.split([K, K, *(mixer.num_heads * size for size in (V, 1, V))])
    q[0, 0] = k[0, 0] = 1 / scale
    g[:, 0] = 1
    mixer.decay_gate.A_log.fill_(4)
    mixer.decay_gate.dt_bias.fill_(10)  # f = 0
    v = v.view(mixer.num_heads, V, -1)
    for head in range(n - 1):
        v[head, :, model.start + 1] = -strength / scale
        v[head, head, model.start + 1] = strength / scale  # the start token: from place 0 to its own
        for i in range(n):
            mixer.state_weight[head, i : n * n : n, i * n : (i + 1) * n] = strength
            for j in range(n):
                for number, element in enumerate(elements):
                    v[head, i * n + j, number + 1] = strength * (n - 1 if element[i] == j else n - 3) / scale
                mixer.output_projection.weight[head * n + j, head * V + i * n + j] = 1e3
    for number, element in enumerate(elements):
        for head in range(n - 1):
            model.head.weight[number, head * n + element[head]] = 1


# -- training ----------------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """How long and on how much: words of short lengths come in larger batches."""

    steps: int  # of learning at most: it ends when enough words of its last stage are right
    tokens: int
    test_sequences: int
    second: int  # steps of the second phase, on longer words, the learning rate going down

    def batch(self, length: int) -> int:
        return min(self.tokens // length, self.tokens // 16)


class Training:
    """A model's optimizer step for words of one length after another; on a GPU each length is one CUDA graph.

    The words of CHECK steps are drawn at once; a counter on the device says which of them come next, so that a replayed
    graph goes through them, and through the table of learning rates, by itself.
    """

    def __init__(self, spec: Spec, task: str, setting: Setting, seed: int, device: torch.device) -> None:
        torch.manual_seed(seed)
        self.spec, self.setting, self.device = spec, setting, device
        self.table = multiplication_table(task).to(device)
        self.carry = None if spec.carry is None else carry_of(len(self.table), **spec.carry)
        self.model = Tracker(spec, len(self.table)).to(device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.noise_generator = torch.Generator(device).manual_seed(seed)
        self.reached: dict[str, int] = {}  # steps after which each stage began
        self.noise = torch.tensor(self.carry.noise if self.carry else 0.0, device=device)
        self.rate = torch.tensor(0.0, device=device)
        self._new_optimizer(0.95 if self.carry is None else 0.99)
        self._start([spec.learning_rate * min(1, (i + 1) / 100) for i in range(setting.steps + 1)])
        self.stages = stages(len(self.table), self.carry is not None and self.carry.at_once)
        self.use(*self.stages[0])

    def _new_optimizer(self, beta2: float) -> None:
        gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            param_groups(self.model, 0.01), lr=self.rate, betas=(0.9, beta2), fused=gpu or None, capturable=gpu
        )

    def _start(self, rates: list[float]) -> None:
        """The first of steps with these learning rates."""
        self.rates = torch.tensor(rates, device=self.device)
        self.step = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.exact = torch.zeros((), device=self.device)
        self.done, self.length, self.right = 0, 0, 0.0
        self.graph: torch.cuda.CUDAGraph | None = None

    def save(self, file: Path) -> None:
        """What `second_phase` depends on, besides its seed, and what the record says of how it came about."""
        state = dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict())
        facts = dict(done=self.done, right=self.right, reached=self.reached)
        recipes.save_weights(dict(of=made_by(self.setting), **facts, **state), file)

    def load(self, file: Path) -> None:
        saved = recipes.load_weights(file, made_by(self.setting), self.device)
        self.done, self.right, self.reached = saved["done"], saved["right"], saved["reached"]
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate  # the tensor that the steps write

    def second_phase(self, seed: int) -> Training:
        """What comes when the rule is learned.

        The learning rate goes down: small steps make the rule exact. The gradients are almost zero between spikes,
        which a short memory of their squares would take for the full step.
        """
        self.generator.manual_seed(seed + 10**3)
        self.noise_generator.manual_seed(seed)
        if self.carry is not None:
            return Carried(self)
        self._new_optimizer(0.999)
        self._start(falling(self.spec.learning_rate / 2, 0.01, self.setting.second, warm_up=100))
        return self

    def next_words(self) -> None:
        """Before every CHECK steps of the second phase. Polishing takes longer and longer words."""
        share = self.done / self.setting.second
        self.use(len(self.table), next(length for length, end in POLISHING if share < end))

    def use(self, elements: int, length: int) -> None:
        """Train on words of `length` over the first `elements` from now on."""
        if self.length != length:
            self.graph = None
        self.elements, self.length = elements, length
        shape = (CHECK, self.setting.batch(length), length)
        if self.graph is None:
            self.words = torch.zeros(shape, dtype=torch.int64, device=self.device)
            self.products = torch.zeros_like(self.words)

    def _one_step(self) -> None:
        with tanh_of(self.spec):
            self._step()

    def _step(self) -> None:
        batch = self.step % CHECK
        words, products = (x.index_select(0, batch)[0] for x in (self.words, self.products))
        self.rate.copy_(self.rates.index_select(0, self.step)[0])
        right = self._learn(words, products)
        self.exact += right.all(1).float().mean()
        self.step += 1

    def _learn(self, words: Tensor, products: Tensor) -> Tensor:
        """An optimizer step. Returns which products were right."""
        with self.spec.autocast(self.device):
            if self.carry is not None and self.carry.noise:
                start = self.model.after_start()
                cache = M2RNNCache(*(x.expand(len(words), *x.shape[1:]) for x in start))
                logits, _ = self._go_on(words, cache, self.carry.every[0])
            else:
                logits = self.model(words)
        self._update(F.cross_entropy(logits.flatten(0, 1), products.flatten()))
        return logits.argmax(-1) == products

    def _go_on(self, words: Tensor, cache: M2RNNCache, every: int) -> tuple[Tensor, M2RNNCache]:
        """`Tracker.go_on`, with noise on H before every so many elements: only a state that repairs itself, tanh far in
        saturation, keeps the loss small."""
        assert self.carry is not None
        if not self.carry.noise:
            return self.model.go_on(words, cache)
        logits = []
        for piece in words.split(every, 1):
            noise = torch.empty_like(cache.state).normal_(generator=self.noise_generator)
            said, cache = self.model.go_on(piece, cache._replace(state=cache.state + self.noise * noise))
            logits.append(said)
        return torch.cat(logits, 1), cache

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def some_steps(self) -> Iterator[None]:
        """CHECK steps; yields once they are under way, and sees then how many of their words were right."""
        self.exact.zero_()
        words, products = word_problem(self.table, tuple(self.words.shape), self.generator, self.elements)
        self.words.copy_(words)
        self.products.copy_(products)
        for i in range(CHECK):
            if self.device.type == "cuda" and i == 3 and self.graph is None:  # the first ones make buffers, compile
                self._capture()
            self._one_step() if self.graph is None else self.graph.replay()
        self.done += CHECK
        yield
        self.right = self.exact.item() / CHECK  # waits for the GPU

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        if self.carry is not None and self.carry.noise:
            graph.register_generator_state(self.noise_generator)
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            self._one_step()
        self.graph = graph


class Carried(Training):
    """The second phase for a block of M²RNN: long words in segments, the state carried from one to the next, detached.

    A gradient crosses one segment only: across a whole word of 128 it is that of chaos until the states contract. Each
    row of the batch is in a word of its own, of TRAIN_LENGTH elements, the first ones shorter so that they begin and
    end at different steps. After a wrong product, either the next targets start from the product that the model said
    (`Carry.relabel`: the state is to hold what is said, whatever it was), or the rest of the segment has no loss and
    the word ends with it. Where the rule was learned with noise on H, it goes on with as much as still leaves a share
    `Carry.sure` of the segments right.

    It goes on with the optimizer that the rule was learned with, at once: with a new one and a warm-up S3 took many
    more steps. Where each row stands is on the device, and written in place within the step: a CUDA graph holds it too.
    """

    def __init__(self, learned: Training) -> None:
        assert learned.carry is not None
        self.spec, self.setting, self.device, self.carry = learned.spec, learned.setting, learned.device, learned.carry
        self.table, self.model, self.noise = learned.table, learned.model, learned.noise
        self.generator, self.noise_generator = learned.generator, learned.noise_generator
        self.optimizer, self.rate = learned.optimizer, learned.rate
        (block,) = self.model.blocks
        assert block.sequence_mixer.cache_is_all
        self._start(falling(self.spec.learning_rate * self.carry.rate, 0.02, self.setting.second))
        self.use(len(self.table), self.carry.segment)
        rows, self.segments = self.words.shape[1], TRAIN_LENGTH // self.carry.segment
        self.cache = block.sequence_mixer.init_cache(rows)
        self.at = torch.zeros(rows, dtype=torch.int64, device=self.device)  # the product each word stands at
        self.fresh = torch.ones(rows, dtype=torch.bool, device=self.device)  # a new word begins
        self.left = 1 + torch.arange(rows, device=self.device) % self.segments  # segments to the end of the word

    def next_words(self) -> None:
        """Always segments."""

    def _learn(self, words: Tensor, products: Tensor) -> Tensor:
        products = self.table[self.at[:, None], products]
        with self.spec.autocast(self.device):
            start = self.model.after_start()
            begins = (self.fresh.view(-1, *[1] * (x.dim() - 1)) for x in start)
            cache = M2RNNCache(*map(torch.where, begins, start, self.cache))
            logits, cache = self._go_on(words, cache, self.carry.every[1])
        right = logits.argmax(-1) == products
        loss = F.cross_entropy(logits.flatten(0, 1), products.flatten(), reduction="none").view_as(right)
        self._update((loss if self.carry.relabel else loss * up_to_first_wrong(right)).mean())
        self._move(cache, logits[:, -1].argmax(-1), right)
        return right

    @torch.no_grad()
    def _move(self, cache: M2RNNCache, said: Tensor, right: Tensor) -> None:
        """To the next segment of every word."""
        for kept, new in zip(self.cache, cache, strict=True):
            kept.copy_(new)
        self.left -= 1
        self.fresh.copy_(self.left == 0)
        if not self.carry.relabel:
            self.fresh |= ~right[:, -1]
        self.left.masked_fill_(self.fresh, self.segments)
        self.at.copy_(said.masked_fill(self.fresh, 0))  # element 0 moves nothing
        if self.carry.noise:
            sure = torch.sign(right.all(1).float().mean() - self.carry.sure)
            self.noise.mul_(torch.exp(0.01 * sure)).clamp_(self.carry.floor, self.carry.most)


def up_to_first_wrong(right: Tensor) -> Tensor:
    """1 for the products of each row before its first wrong one and for that one, then 0."""
    return F.pad(right[:, :-1].long().cumprod(1), (1, 0), value=1)


def falling(peak: float, end: float, steps: int, warm_up: int = 1) -> list[float]:
    """Learning rates: constant for a fifth of all steps, after a warm-up, then down to a share `end` of the peak."""
    down = lambda i: end ** max(0.0, (i / steps - 0.2) / 0.8)
    return [peak * min(1, (i + 1) / warm_up) * down(i) for i in range(steps + 1)]


def stages(elements: int, at_once: bool = False) -> list[tuple[int, int]]:
    """(elements, length) of the words in turn while the rule is learned: over few elements, then all, then longer ones.

    Over all of S5 at once, even words of length 3 teach a model nothing for thousands of steps; a GRU excepted. M²RNN
    learns small groups from the last stage `at_once`, and carries its state better then; a GRU did not learn S3 from it
    in 700 steps. No longer words here: at the full learning rate, words much longer than what is right so far undo what
    was learned.
    """
    few = [(n, 8) for n in (5, 11, 31, 60) if n < elements]
    return [(elements, 16)] if at_once else [*few, (elements, 8), (elements, 16)]


def train_and_test(
    title: str, task: str, seed: int, setting: Setting, device: torch.device, weights: Path | None = None
) -> Any:
    """A job for `recipes.run_jobs`. With a folder for `weights`, a rule that is there already is not learned again;
    what the second phase makes of it lies beside it, to look at.

    It goes from one of the `stages` to the next, and from the last one to the second phase (carried states, or
    polishing), when enough training words are all right; at the latest by a schedule that leaves every model 40 % of
    its steps for the last stage.
    """
    spec, started = MODELS[title], time.perf_counter()
    training = Training(spec, task, setting, seed, device)
    file = kept_file(weights, task, title, seed)
    kept = file is not None and file.exists()
    if spec.by_hand:
        set_by_hand(training.model.cpu(), task)
        training.model.to(device)
        training.done = setting.steps
    if file is not None and kept:
        training.load(file)
    waiting = list(training.stages)
    of = len(waiting)
    enough = ENOUGH if training.carry is None else training.carry.enough
    while not kept and training.done < setting.steps and (waiting or training.right <= enough):
        late = training.done >= 0.6 * setting.steps * (of - len(waiting)) / max(1, of - 1)
        if waiting and (training.right > ENOUGH or late):
            training.use(*waiting.pop(0))
            training.reached[f"{training.elements} elements, length {training.length}"] = training.done
        for _ in training.some_steps():
            said = f"{training.elements} elements, length {training.length}, {training.right:.0%} right"
            yield training.done / setting.steps, said
    if file is not None and not kept:
        training.save(file)
    learned, learned_right, reached = training.done, training.right, training.reached
    if not spec.by_hand:
        training = training.second_phase(seed)
        while training.done < setting.second:
            training.next_words()
            for _ in training.some_steps():
                said = f"{'carried' if training.carry else 'polishing'}, {training.length}, {training.right:.0%} right"
                yield training.done / setting.second, said
    seconds = time.perf_counter() - started
    if file is not None:
        trained = dict(of=made_by(setting), model=training.model.state_dict())
        recipes.save_weights(trained, file.with_name(f"{file.stem}, trained.pt"))
    yield 1.0, "testing"
    measured = test(training.model.eval(), spec, training.table, setting.test_sequences, device)
    if spec.bf16 is None and device.type == "cuda":
        fp32 = test(training.model, spec._replace(bf16=False), training.table, setting.test_sequences, device)
        measured["exact_in_fp32"] = fp32["exact"]
    row = dict(
        task=task, model=title, seed=seed, steps=learned, steps_at_most=setting.steps, tokens=setting.tokens,
        parameters=sum(p.numel() for p in training.model.parameters()), reached=reached,
        learned=round(learned_right, 4), kept_weights=kept, second_steps=0 if spec.by_hand else setting.second,
        carry=training.carry and training.carry._asdict(), noise_at_end=round(training.noise.item(), 4),
        train_exact=round(training.right, 4), seconds=round(seconds, 1),
        test_sequences=setting.test_sequences, **measured,
    )  # fmt: skip
    row["summary"] = f"exact match at 128 {row['exact'][128]:.1%}, at 512 {row['exact'][512]:.1%}, at 4096 " + (
        f"{row['exact'][4096]:.1%}"
    )
    return row


def kept_file(weights: Path | None, task: str, title: str, seed: int) -> Path | None:
    """Where a run's weights are kept; those set by hand are not."""
    if weights is None or MODELS[title].by_hand:
        return None
    return weights / f"{task}, {title.replace('/', ':')}, seed {seed}.pt"


def made_by(setting: Setting) -> dict[str, int]:
    """What kept weights depend on, besides what their file's name says."""
    return dict(steps=setting.steps, tokens=setting.tokens)


@torch.no_grad()
def test(model: nn.Module, spec: Spec, table: Tensor, sequences: int, device: torch.device) -> dict[str, Any]:
    """Exact match, and the share of right products, at every length; on words that no training seed draws."""
    generator = torch.Generator(device).manual_seed(10**6)
    right = []
    at_once = 250 if device.type == "cuda" else 50
    for start in range(0, sequences, at_once):
        words, products = word_problem(table, (min(at_once, sequences - start), TEST_LENGTH), generator)
        with tanh_of(spec), spec.autocast(device):
            right.append(model(words).argmax(-1) == products)
    ok = torch.cat(right)
    exact = ok.cumprod(1).double().mean(0).cpu()
    token = (ok.double().mean(0).cumsum(0).cpu()) / torch.arange(1, TEST_LENGTH + 1)
    last = ok.double().mean(0).cpu()
    at = lambda x: {L: round(float(x[L - 1]), 5) for L in LENGTHS}
    return dict(exact=at(exact), token=at(token), last=at(last))


# -- presets, tables, plot ---------------------------------------------------------------------------------------------

PRESETS = {
    "cpu": "S3: two blocks of M²RNN, GRU, Gated DeltaNet; 1 seed; under 5 minutes on 2 cores",
    "h200": "S5, S3, A5, parity: the same and softmax attention; variants; M²RNN of 3 seeds, in bf16; pick by --only,\n"
    "      or let --minutes 7 start what fits into 9 minutes of one GPU",
    "cpu-long": "as h200 with smaller batches, hours on 2 cores: pick runs with --only, --seeds and --minutes",
}


def plan(preset: str, steps: float) -> Iterator[tuple[str, str, Setting, int]]:
    """(task, model, setting, seeds) of every run."""
    scale = lambda n: max(CHECK, round(n * steps / CHECK) * CHECK)
    others = (RECOMMENDED, QUICK, PAPER, BY_HAND, *BASELINES)
    variants = [model for model in MODELS if model not in others]
    if preset == "cpu":
        for model in (QUICK, PAPER, "gru", "gated deltanet [-1, 1]"):
            second = 1200 if model == QUICK else 250  # the paper's block has learned nothing to carry
            yield "S3", model, Setting(scale(700), 1024, max(2, round(100 * min(1, steps))), scale(second)), 1
        return
    if preset == "cpu-long":
        for task, length, second in (("S5", 7000, 8000), ("S3", 1500, 2000), ("A5", 6000, 8000), ("parity", 800, 800)):
            for model in (RECOMMENDED, QUICK, PAPER, BY_HAND, *BASELINES):
                tests = 1000 if model in (RECOMMENDED, BY_HAND) else 200
                yield task, model, Setting(scale(length), 2048, tests, scale(second)), 3
        for model in variants:
            yield "S3", model, Setting(scale(1500), 2048, 200, scale(2000)), 3
        return
    long, short = (
        Setting(scale(n), 8192, tests, scale(n2)) for n, n2, tests in ((6000, 40000, 4000), (3000, 8000, 1000))
    )
    for task, setting in (("S5", long), ("S3", short)):
        yield task, RECOMMENDED, setting, 3
    for model in ("tracking, noise to 0.5", "tracking, 12 heads"):
        yield "S5", model, long, 3
    for model in ("tracking, 4 heads", "tracking, noise to 0.15", "tracking, no noise", "tracking, polished"):
        yield "S5", model, long, 1
    for task in ("S3", "S5"):
        for model in (BY_HAND, PAPER, *BASELINES):
            yield task, model, short, 1
    for task, setting in (("A5", long), ("parity", short)):
        for model in (RECOMMENDED, BY_HAND):
            yield task, model, setting, 3
    for model in variants:
        yield "S3", model, short, 1


def unnamed(preset: str, name: str, patterns: Sequence[re.Pattern[str]] | None) -> bool:
    """Whether a run is left out until --only names it: on a GPU fp32, slow at V = 64 (see the docs)."""
    return preset == "h200" and "fp32" in name and not any("fp32" in pattern.pattern for pattern in patterns or ())


def tables(rows: list[dict[str, Any]], console: Console) -> None:
    """One table a task: exact match at some lengths, the worst and the best seed."""
    shown = (128, 512, 1024, 4096)
    for task in dict.fromkeys(row["task"] for row in rows):
        table = Table(title=f"{task}: exact match in %, worst and best seed")
        table.add_column("model")
        for L in shown:
            table.add_column(f"at {L}", justify="right")
        table.add_column("right products to 4096", justify="right")
        table.add_column("seeds", justify="right")
        for model in dict.fromkeys(row["model"] for row in rows if row["task"] == task):
            of = [row for row in rows if row["task"] == task and row["model"] == model]
            style = "bold green" if min(at(row["exact"], 4096) for row in of) >= 0.999 else ""
            cells = [spread(of, "exact", L) for L in shown]
            table.add_row(model, *cells, spread(of, "token", 4096), str(len(of)), style=style)
        console.print(table)


def spread(rows: list[dict[str, Any]], key: str, length: int) -> str:
    """The smallest and the largest value in %, or the one that both are."""
    values = [at(row[key], length) for row in rows]
    return " … ".join(dict.fromkeys(f"{100 * x:.2f}" for x in (min(values), max(values))))


def at(curve: dict[Any, float], length: int) -> float:
    """A curve's value; JSON has made its keys strings."""
    return curve[length] if length in curve else curve[str(length)]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Exact match against length, the mean over seeds; one panel a task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    shown = [RECOMMENDED, QUICK, PAPER, BY_HAND, *BASELINES]
    made, axes = recipes.figure(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        for i, model in enumerate(m for m in shown if any(r["model"] == m and r["task"] == task for r in rows)):
            curves = [row["exact"] for row in rows if row["task"] == task and row["model"] == model]
            mean = [sum(at(c, L) for c in curves) / len(curves) for L in LENGTHS]
            axis.plot(LENGTHS, mean, label=model, color=f"C{shown.index(model)}", linewidth=2.5 if i < 2 else 1.3)
        axis.axvline(TRAIN_LENGTH, color="grey", linestyle=":")
        axis.set(title=task, xscale="log", xlabel="length (trained to the dotted line)", ylabel="exact match")
        axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="x-small")
    recipes.save_figure(made, path)


def main(argv: list[str] | None = None) -> int:
    parser = recipes.parser("state_tracking", __doc__ or "", PRESETS)
    at_once = "runs that share the device (default: 12 on a GPU, else 1)"
    parser.add_argument("--concurrent", type=int, choices=range(1, 65), metavar="1..64", help=at_once)
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="keep weights there; test those that are there")
    return recipes.main(parser, argv, "state-tracking", measure, tables, plot)


def measure(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    runs = [
        (f"{task}, {model}, seed {seed}", task, model, setting, seed)
        for task, model, setting, seeds in plan(args.preset, args.steps)
        for seed in ([0] if MODELS[model].by_hand else args.seeds or range(seeds))
        if recipes.matches(f"{task}, {model}", args.only)
    ]
    later = {title for title, _, model, *_ in runs if unnamed(args.preset, model, args.only)}
    titles = [f"{title} (if --only names fp32)" if title in later else title for title, *_ in runs]
    if recipes.listed(titles, args, console):
        return []
    runs = [run for run in runs if run[0] not in later]
    device = recipes.device_of(args.preset)
    for _, task, model, setting, seed in runs:
        file = kept_file(args.weights, task, model, seed)
        if file is not None and file.exists():
            recipes.load_weights(file, made_by(setting), torch.device("cpu"))  # refused before anything runs
    jobs = [
        (title, partial(train_and_test, model, task, seed, setting, device, args.weights))
        for title, task, model, setting, seed in runs
    ]
    concurrent = args.concurrent or (12 if device.type == "cuda" else 1)
    return recipes.measure(args, console, "state-tracking", device, jobs, concurrent=concurrent)


if __name__ == "__main__":
    sys.exit(main())
