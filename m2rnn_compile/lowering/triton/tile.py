# SPDX-License-Identifier: Apache-2.0
"""One warp's tile of the state in Gluon: layouts, staging of inputs, one step. Shared by forward and backward.

Rows and columns of H stand in the tile in an order of our own, because nothing that mixes rows or columns cares about
it as long as W is read in the same order. With J = BK/8 rows to a thread, position 8r + g of the tile holds row gJ + r,
and position 8j + 2c + e holds column c·(BV/4) + 2j + e: what one thread of an mma.m16n8k16 tile (lane 4g + c) needs of
k, q, v or dy is then consecutive in memory, one load of 4 to 16 bytes.

Names: BK rows and BV columns of the tile, LOW the 16-bit dtype of the inputs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2


@gluon.constexpr_function
def _powers(first, count):
    """Bases first, 2·first, ... of an index that takes `count` values."""
    bases = []
    while count > 1:
        bases.append([first])
        first, count = 2 * first, count // 2
    return bases


MMA = gl.constexpr(gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8]))
ROW = gl.constexpr(gl.SliceLayout(1, MMA.value))
COL = gl.constexpr(gl.SliceLayout(0, MMA.value))
LEFT = gl.constexpr(gl.DotOperandLayout(0, MMA.value, 2))
RIGHT = gl.constexpr(gl.DotOperandLayout(1, MMA.value, 2))
RIGHT_COL = gl.constexpr(gl.SliceLayout(1, RIGHT.value))


@gluon.constexpr_function
def rows_by_lane_group(BK):
    """[BK] in memory order: lane 4g + c holds rows gJ to gJ + J - 1."""
    J = BK // 8
    return gl.DistributedLinearLayout(_powers(1, J), [[0], [0], [J], [2 * J], [4 * J]], [], [], [BK])


@gluon.constexpr_function
def rows_by_lane(BK):
    """[BK] in memory order: lane 4g + c holds rows 2cJ to 2cJ + 2J - 1."""
    J = BK // 8
    return gl.DistributedLinearLayout(_powers(1, 2 * J), [[2 * J], [4 * J], [0], [0], [0]], [], [], [BK])


@gluon.constexpr_function
def columns_by_lane(BV):
    """[BV] in memory order: lane 4g + c holds columns c·BV/4 to (c + 1)·BV/4 - 1."""
    return gl.DistributedLinearLayout(_powers(1, BV // 4), [[BV // 4], [BV // 2], [0], [0], [0]], [], [], [BV])


@gluon.constexpr_function
def copy_layout(D):
    """[C, D] of 16-bit elements, 16 bytes a thread."""
    lanes = min(32, D // 8)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [1, 1], [1, 0])


@gluon.constexpr_function
def tile_in_shared(BV):
    """A 16-bit [BK, BV] tile that stmatrix and ldmatrix reach without bank conflicts."""
    chunks = BV // 8  # of 16 bytes in a row
    return gl.SwizzledSharedLayout(vec=8, per_phase=max(1, 8 // chunks), max_phase=min(8, chunks), order=[1, 0])


ROW_MAJOR = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[1, 0]))
LINES = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[2, 1, 0]))
LINE = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0]))


@gluon.jit
def row_of(position, BK: gl.constexpr):
    return position % 8 * (BK // 8) + position // 8


@gluon.jit
def column_of(position, BV: gl.constexpr):
    return position % 8 // 2 * (BV // 4) + position // 8 * 2 + position % 2


@gluon.jit
def stage_rows(shared, ptr, stride_t, stride_d, t, left, d_first, D: gl.constexpr, C: gl.constexpr, BD: gl.constexpr,
               ):  # fmt: skip
    """Begin copying C steps from t of ptr[t, d_first : d_first + BD] to shared; zeros past `left` steps or past D."""
    L: gl.constexpr = copy_layout(BD)
    i = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(1, L)), 1)
    d = gl.expand_dims(gl.arange(0, BD, gl.SliceLayout(0, L)), 0) + d_first
    at = ptr + t.to(gl.int64) * stride_t + (i.to(gl.int64) * stride_t + d * stride_d)
    ok = i < left
    if D % BD != 0:
        ok = ok & (d < D)
    async_copy.async_copy_global_to_shared(shared, at, mask=ok)


@gluon.jit
def stage_gate(shared, ptr, stride_t, t, left, C: gl.constexpr):
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    i = gl.arange(0, C, L)
    at = ptr + t.to(gl.int64) * stride_t + i.to(gl.int64) * stride_t
    async_copy.async_copy_global_to_shared(shared, at, mask=i < left)


@gluon.jit
def finish_gate(shared, left, C: gl.constexpr):
    """Steps past the end get f = 1: they leave H, and its gradient, where they are."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    shared.store(gl.where(gl.arange(0, C, L) < left, shared.load(L), 1.0))


@gluon.jit
def steps_of(shared, C: gl.constexpr, D: gl.constexpr):
    """A staged chunk as C lines of D elements, of which `.index(u)` picks one."""
    return shared._reinterpret(shared.dtype, [C, D], LINE)


@gluon.jit
def to_float(x):
    """fp32 of 16-bit x: bf16 by one shift or mask an element (the compiler would take two for every second one)."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }",
            "=r,=r,r", [x], dtype=gl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(gl.float32)


@gluon.jit
def rows(shared, u, BK: gl.constexpr):
    """[BK, 1] by position, in fp32: line u of a staged chunk, a factor of the rows of the state."""
    x = to_float(shared.index(u).load(rows_by_lane_group(BK)))
    x = x.reshape((8, BK // 8)).permute((1, 0)).reshape((BK,))
    return gl.expand_dims(gl.convert_layout(x, ROW, assert_trivial=True), 1)


@gluon.jit
def in_order(x, BV: gl.constexpr):
    """[BV] in memory order -> [BV] by position."""
    return x.reshape((4, BV // 8, 2)).permute((1, 0, 2)).reshape((BV,))


@gluon.jit
def columns(shared, u, BV: gl.constexpr):
    """[1, BV] by position, in fp32: line u of a staged chunk, a factor of the columns of the state."""
    x = in_order(to_float(shared.index(u).load(columns_by_lane(BV))), BV)
    return gl.expand_dims(gl.convert_layout(x, COL, assert_trivial=True), 0)


@gluon.jit
def sum_own_rows(x, BK: gl.constexpr, BV: gl.constexpr):
    """[8, BV] with columns in memory order: the state-shaped x summed over the rows that one thread holds."""
    x = gl.sum(x.reshape((BK // 8, 8, BV)), 0)
    return x.reshape((8, BV // 8, 4, 2)).permute((0, 2, 1, 3)).reshape((8, BV))


@gluon.jit
def sum_own(x, BK: gl.constexpr, BV: gl.constexpr):
    """[8, 4], one of every thread: the state-shaped x summed over what the thread holds."""
    return gl.sum(gl.sum(gl.sum(x.reshape((BK // 8, 8, BV // 8, 4, 2)), 4), 2), 0)


@gluon.jit
def in_lines(p0, p1, p2, p3, BV: gl.constexpr):
    """Four of [8, BV] as [4, 8, BV]."""
    p = gl.join(gl.join(p0, p2), gl.join(p1, p3))  # the last axis of join is the fastest
    return p.reshape((8, BV, 4)).permute((2, 0, 1))


@gluon.constexpr_function
def lanes_in_thread(BV):
    """[4, 8, BV] with all 8 in one thread."""
    lanes = min(32, BV // 2)
    return gl.BlockedLayout([1, 8, 2], [32 // lanes, 1, lanes], [1, 1, 1], [2, 1, 0])


@gluon.jit
def gate(shared, u):
    """f of step u, [1, 1]."""
    return gl.expand_dims(shared.index(u).load(ROW), 1)


@gluon.jit
def left_operand(x):
    """The state-shaped x as left operand: the registers are the same."""
    return gl.convert_layout(x, LEFT, assert_trivial=True)


@gluon.jit
def column_of_right_operand(shared, u, n, BV: gl.constexpr):
    """[BV, 8], to be contracted with the columns of the state: column n is line u of a chunk, the others zero."""
    x = in_order(shared.index(u).load(columns_by_lane(BV)), BV)
    return only_column(gl.expand_dims(gl.convert_layout(x, RIGHT_COL, assert_trivial=True), 1), n, BV)


@gluon.jit
def rows_of_right_operand(shared, u, n, BK: gl.constexpr):
    """[BK, 8], to be contracted with the rows of the state: column n is line u of a chunk, the others zero."""
    x = shared.index(u).load(rows_by_lane(BK))
    x = x.reshape((4, 2, BK // 8)).permute((2, 0, 1)).reshape((BK,))
    return only_column(gl.expand_dims(gl.convert_layout(x, RIGHT_COL, assert_trivial=True), 1), n, BK)


@gluon.jit
def only_column(x, n, D: gl.constexpr):
    """x [D, 1] in column n of [D, 8], zeros elsewhere; by masking pairs of elements, half of what `where` takes."""
    here = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, RIGHT)), 0) == n
    mask = gl.where(here, gl.full((D, 8), -1, gl.int16, RIGHT), gl.full((D, 8), 0, gl.int16, RIGHT))
    x, mask = gl.broadcast(x, mask)
    return gl.inline_asm_elementwise("and.b32 $0, $1, $2;", "=r,r,r", [x, mask], dtype=x.dtype, is_pure=True, pack=2)


@gluon.jit
def turned(x, BK: gl.constexpr, BV: gl.constexpr):
    """The state-shaped 16-bit x with every 8 × 8 block transposed across the warp, so that rows can be contracted."""
    x = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2
    )
    return x.reshape((BK // 8, 8, BV // 8, 8)).permute((0, 3, 2, 1)).reshape((BK, BV))


@gluon.jit
def tanh_hardware(x):
    """The special-function unit's tanh: one instruction, absolute error up to 2^-11 (PTX ISA, tanh.approx.f32)."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def advance(h, h_low, k, v, f, W):
    """(H_t, Z_t, H_{t-1} - Z_t). The outer product seeds the accumulator; the accumulator layout of one product is,
    register for register, the operand of the next.

    H - (1-f)(H-Z) does not cancel where f is near 1; where f is near 0 it errs by 2^-24 |H|, far below LOW's rounding.
    """
    z = tanh_hardware(mma_v2(left_operand(h_low), W, k * v))
    e = h - z
    return h - (1.0 - f) * e, z, e


@gluon.jit
def load_W(ptr, V: gl.constexpr, BV: gl.constexpr, TRANSPOSED: gl.constexpr):
    """W or Wᵀ in the order of positions, as the right operand of a product with a state-shaped left one."""
    i = column_of(gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(1, RIGHT)), 1), BV)
    j = column_of(gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(0, RIGHT)), 0), BV)
    if TRANSPOSED:
        at = j * V + i
    else:
        at = i * V + j
    return gl.load(ptr + at, mask=(i < V) & (j < V), other=0.0)


@gluon.jit
def multiply(x, y):
    """Elementwise product of 16-bit values, two at a time."""
    if x.dtype == gl.float16:
        return gl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=gl.float16, is_pure=True, pack=2
        )
    else:  # x y + (-0), because mul.bf16x2 needs compute capability 9.0 and fma.bf16x2 8.0
        return gl.inline_asm_elementwise(
            "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }",
            "=r,r,r", [x, y], dtype=gl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip


@gluon.jit
def clamp(x, c):
    """x in [-c, c]; NaN stays NaN."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 m; neg.f32 m, $2; min.NaN.f32 $0, $1, $2; max.NaN.f32 $0, $0, m; }",
        "=f,f,f", [x, gl.full(x.shape, 0.0, gl.float32, x.type.layout) + c], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip
