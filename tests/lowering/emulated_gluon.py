# SPDX-License-Identifier: Apache-2.0
"""Run a Gluon kernel on CPU tensors: what it computes, not where its registers are.

Triton's interpreter knows no Gluon. But a Gluon kernel is Python over logical tensors, whose layouts say only who holds
what; so its functions run with `gl` replaced by torch. Layouts are ignored, products of the tensor cores that are
written as inline PTX are replaced whole, and programs run one after the other, in order.

Checked on the way: every address that is not masked lies in its tensor; shared memory is NaN until written; what
cp.async copies is there only after the wait for its group; a program waits only for flags that are set; the partitions
of a program do not wait for each other. A warpgroup product is done where it is begun.
"""

from __future__ import annotations

import functools
import itertools
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Block(torch.Tensor):
    """A tensor with what Gluon's has beside."""

    @property
    def type(self) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(layout=None)

    def split(self, *_: Any) -> Any:  # type: ignore[override]
        return self[..., 0], self[..., 1]

    def to(self, dtype: torch.dtype, **_: Any) -> Any:  # type: ignore[override]
        return super().to(dtype)


def block(x: Tensor) -> Any:
    return x.as_subclass(Block)


class Pointer:
    """Into the storage of a tensor; `at` counts elements from its first one."""

    def __init__(self, x: Tensor, at: Any = 0) -> None:
        self.x, self.at = x, at
        self.dtype = types.SimpleNamespace(element_ty=x.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.x, self.at + offset)

    def _cells(self, mask: Any) -> tuple[Tensor, Tensor, Tensor]:
        at = torch.as_tensor(self.at)
        mask = torch.ones((), dtype=torch.bool) if mask is None else torch.as_tensor(mask)
        at, mask = (z.as_subclass(Tensor) for z in torch.broadcast_tensors(at, mask))
        first = self.x.storage_offset()
        flat = self.x.as_strided((self.x.untyped_storage().nbytes() // self.x.element_size(),), (1,), 0)
        used = at[mask] + first
        assert used.numel() == 0 or (int(used.min()) >= 0 and int(used.max()) < flat.numel()), "outside of its tensor"
        return flat, at.long() + first, mask

    def load(self, mask: Any = None) -> Any:
        flat, at, mask = self._cells(mask)
        return block(torch.where(mask, flat[torch.where(mask, at, 0)], torch.zeros((), dtype=flat.dtype)))

    def store(self, x: Any, mask: Any = None) -> None:
        flat, at, mask = self._cells(mask)
        flat[at[mask]] = torch.as_tensor(x).as_subclass(Tensor).expand(at.shape)[mask].to(flat.dtype)


class Shared:
    """Shared memory, or a part of it in another shape."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.dtype, self.shape, self.layout = x, x.dtype, list(x.shape), None

    def index(self, i: Any) -> Shared:
        assert 0 <= int(i) < self.x.shape[0], f"buffer {int(i)} of {self.x.shape[0]}"
        return Shared(self.x[int(i)])

    def permute(self, order: Any) -> Shared:
        return Shared(self.x.permute(order))

    def slice(self, first: int, length: int, dim: int) -> Shared:
        return Shared(self.x.narrow(dim, first, length))

    def reinterpret(self, dtype: Any, shape: Any, layout: Any = None) -> Shared:
        return Shared(self.x.view(shape))

    _reinterpret = reinterpret

    def load(self, layout: Any = None) -> Any:
        return block(self.x.clone())

    def store(self, x: Any) -> None:
        self.x.copy_(x)


class Copies(threading.local):
    """cp.async: nothing is there before the wait for its group. Each partition has groups of its own."""

    def __init__(self) -> None:
        self.now: list[Any] = []
        self.groups: list[list[Any]] = []

    def copy(self, shared: Shared, at: Pointer, mask: Any = None) -> None:
        shared.x.fill_(float("nan"))
        self.now.append((shared, at, mask))

    def commit_group(self) -> None:
        self.groups.append(self.now)
        self.now = []

    def wait_group(self, pending: int) -> None:
        while len(self.groups) > pending:
            for shared, at, mask in self.groups.pop(0):
                shared.x.copy_(at.load(mask))


class Partitions:
    """Of a program, by turns: each runs until it waits for an mbarrier that another has still to arrive at.

    `mbarrier` as kernels see it; a barrier holds how many phases of it are over.
    """

    def __init__(self) -> None:
        self.turn = threading.Condition()
        self.running: list[int] = []  # whose turn it is, and who comes after
        self.stuck = 0  # turns since the last arrival
        self.failure: BaseException | None = None

    MBarrierLayout = staticmethod(lambda: None)

    def init(self, barrier: Shared, count: int) -> None:
        assert count == 1
        barrier.x.zero_()

    def arrive(self, barrier: Shared) -> None:
        barrier.x.add_(1)
        self.stuck = 0

    def wait(self, barrier: Shared, parity: Any) -> None:
        while int(barrier.x) % 2 == int(parity):
            self.stuck += 1
            assert self.stuck <= len(self.running), "the partitions wait for each other"
            with self.turn:
                me = self.running.pop(0)
                self.running.append(me)
                self.turn.notify_all()
                self.turn.wait_for(lambda: self.failure or self.running[0] == me)  # noqa: B023
            if self.failure:
                raise RuntimeError("another partition failed")

    def run(self, functions: list[Callable[[], None]]) -> None:
        self.running = list(range(len(functions)))

        def one(me: int) -> None:
            with self.turn:
                self.turn.wait_for(lambda: self.failure or self.running[0] == me)
            try:
                with torch.no_grad():
                    if not self.failure:
                        functions[me]()
            except BaseException as e:
                self.failure = self.failure or e
            with self.turn:
                self.running.remove(me)
                self.stuck = 0
                self.turn.notify_all()

        threads = [threading.Thread(target=one, args=(i,)) for i in range(len(functions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure:
            raise self.failure


PTX = {
    "tanh.approx": lambda x: torch.tanh(x),
    "rcp.approx": lambda x: torch.sigmoid(x),  # `logistic`
    "rsqrt.approx": lambda x: torch.rsqrt(x),
    "shl.b32 $0, $2, 16": lambda x: x.to(torch.float32),  # `to_float`
    "cvt.rn.satfinite.f16x2": lambda x: x.clamp(-65504, 65504).to(torch.float16),  # `to_half`
    "shfl.sync.idx": lambda x: x,  # `again`
    "prefetch.global.L2": lambda at: at.load(),  # fails where there is no memory
}


def inline_asm(asm: str, constraints: str, args: Any, **_: Any) -> Any:
    (f,) = [f for key, f in PTX.items() if key in asm]
    return f(*args)


class Language:
    """`gl`."""

    float32, int32, int64, int16, int1 = torch.float32, torch.int32, torch.int64, torch.int16, torch.bool
    bfloat16, float16 = torch.bfloat16, torch.float16
    shared_memory_descriptor = Shared
    constexpr = staticmethod(lambda x: x)
    static_range = range
    inline_asm_elementwise = staticmethod(inline_asm)
    SliceLayout = BlockedLayout = DotOperandLayout = staticmethod(lambda *_, **__: None)

    def __init__(self, program: tuple[int, ...], grid: tuple[int, ...], warps: int) -> None:
        self.program, self.grid, self.warps = program, grid, warps
        self.partitions = Partitions()

    def warp_specialize(self, functions: Any, warps: Any, registers: Any) -> None:
        assert [*warps] == [self.warps] * (len(functions) - 1)
        self.partitions.run([functools.partial(f, *arguments) for f, arguments in functions])

    def program_id(self, axis: int) -> Any:
        return block(torch.tensor(self.program[axis] if axis < len(self.program) else 0))

    def num_programs(self, axis: int) -> int:
        return self.grid[axis] if axis < len(self.grid) else 1

    def num_warps(self) -> int:
        return self.warps

    @staticmethod
    def arange(first: int, last: int, layout: Any = None) -> Any:
        return block(torch.arange(first, last))

    @staticmethod
    def full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Any:
        return block(torch.full(tuple(shape), value, dtype=dtype))

    @staticmethod
    def allocate_shared_memory(dtype: Any, shape: Any, layout: Any, value: Any = None) -> Shared:
        if value is not None:
            return Shared(value.as_subclass(Tensor).to(dtype).clone())
        return Shared(torch.full(tuple(shape), float("nan") if dtype.is_floating_point else -1, dtype=dtype))

    expand_dims = staticmethod(lambda x, axis: x.unsqueeze(axis))
    convert_layout = staticmethod(lambda x, layout, **_: x)
    join = staticmethod(lambda x, y: torch.stack([x, y], -1))
    sum = staticmethod(lambda x, axis: x.sum(axis))
    where = staticmethod(torch.where)
    fma = staticmethod(lambda x, y, z: x * y + z)
    broadcast = staticmethod(lambda *x: torch.broadcast_tensors(*x))
    minimum = staticmethod(lambda x, y: torch.minimum(torch.as_tensor(x), torch.as_tensor(y)))
    maximum = staticmethod(lambda x, y: torch.maximum(torch.as_tensor(x), torch.as_tensor(y)))
    load = staticmethod(lambda at, mask=None, other=None: at.load(mask))
    store = staticmethod(lambda at, x, mask=None: at.store(x, mask))


def _only_step(y: Any, u: int, BV: int) -> Any:
    return y * (torch.arange(y.shape[1]) == u)


def _warpgroup_mma(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
    product = (a.x if isinstance(a, Shared) else a).float() @ b.x.float()
    return block(product + acc if use_acc else product)


def _range(*bounds: Any) -> Any:
    """Counts in tensors, as a loop of a kernel does."""
    return (block(torch.tensor(i)) for i in range(*bounds))


def _wait_for(flag: Pointer) -> None:
    assert int(flag.load()) == 1, "waits for a program that has not run"


# By name, wherever a kernel imports it from: tensor-core products, layouts, and what needs more than one program.
REPLACED = {
    "mma_v2": lambda a, b, acc: (a.float() @ b.float()) + acc,
    "outer": lambda x, y, *_: x.float() @ y.float().T,
    "only_step": _only_step,
    "rows_of_step": lambda x, u, *_: x[:, u : u + 1].float(),
    "pick": lambda x, u: x[u],
    "add_outer": lambda acc, x, y, *_: acc + x.float() @ y.float().T,
    "only_step_at": lambda y, first, u, BV: y * (torch.arange(8) == first + u),
    "only_column_at": lambda x, n, D: x * (torch.arange(8) == n),
    "multiply": lambda x, y: (x.float() * y.float()).to(x.dtype),
    "clamp": lambda x, c, one: torch.clamp(x, -c, c),
    "turned": lambda x, *_: x,  # blocks are transposed twice: once across threads, once in name
    "left_operand": lambda x: x,
    "wait_for": _wait_for,
    "hand_over": lambda flag: flag.store(1),
    "only": lambda x, here, shape: torch.where(here, x, 0.0).to(x.dtype),
    "warpgroup_mma": _warpgroup_mma,
    "warpgroup_mma_wait": lambda pending, products: products[0] if len(products) == 1 else products,
    "fence_async_shared": lambda: None,
}
# Their functions of these names are other ones, and plain.
NOT_REPLACED = ("quarters", "backward_wide")


def _namespace(kernel: Any, gl: Language, copies: Copies, made: dict[int, Any]) -> dict[str, Any]:
    """The globals of a kernel's module with every Gluon function in them replaced, and theirs in turn."""
    key = id(kernel.__globals__)
    if key in made:
        return made[key]  # type: ignore[no-any-return]
    space = made[key] = dict(kernel.__globals__, range=_range)
    for name, x in kernel.__globals__.items():
        if name in REPLACED and getattr(x, "__module__", "").rpartition(".")[2] not in NOT_REPLACED:
            space[name] = REPLACED[name]
        elif name == "mbarrier":
            space[name] = gl.partitions
        elif name == "gl":
            space[name] = gl
        elif name == "async_copy":
            space[name] = copies
        elif name == "copy_to_shared":
            space[name] = copies.copy
        elif type(x).__name__ in ("JITFunction", "GluonJITFunction"):
            space[name] = types.FunctionType(x.fn.__code__, _namespace(x.fn, gl, copies, made), name, x.fn.__defaults__)
        elif type(x).__name__ == "ConstexprFunction":
            space[name] = lambda *_, **__: None
    return space


class Emulated:
    """In the place of a kernel: `kernel[(programs, ...)](*arguments, num_warps=...)`."""

    def __init__(self, kernel: Any) -> None:
        self.fn = kernel.fn

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, num_warps: int, maxnreg: int | None = None, **constants: Any) -> None:
            with torch.no_grad():
                for program in itertools.product(*(range(n) for n in grid)):
                    gl, copies = Language(program, grid, num_warps), Copies()
                    space = _namespace(self.fn, gl, copies, {})
                    run = types.FunctionType(self.fn.__code__, space)
                    run(*(_argument(x) for x in args), **constants)

        return launch


def _argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Pointer(x)
    return block(torch.tensor(x)) if isinstance(x, int) else x
