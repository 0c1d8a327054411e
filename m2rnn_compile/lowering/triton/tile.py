# SPDX-License-Identifier: Apache-2.0
"""A program's tile of the state in Gluon: layouts, staging of inputs, one step. Shared by forward and backward.

A tile of BK rows is spread over the NW warps of a program, M blocks of 16 rows each. Rows and columns of H stand in it
in an order of our own, because nothing that mixes rows or columns cares about it as long as W is read in the same
order. Position 16 NW m + 16 w + 8 h + g of the tile holds row 16 M w + 2 M g + 2 m + h, and position 8j + 2c + e holds
column c·(BV/4) + 2j + e: what one thread of a tensor-core tile (warp w, lane 4g + c) needs of k, q, v or dy is then
consecutive in memory, one load of 4 to 16 bytes.

Names: BK rows and BV columns of the tile, LOW the 16-bit dtype of the inputs, L the layout of the tile.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

# Names that Triton changed after 3.6.
PRIVATE_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "_reinterpret"))
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.constexpr_function
def _powers(first, count):
    """Bases first, 2·first, ... of an index that takes `count` values."""
    bases = []
    while count > 1:
        bases.append([first])
        first, count = 2 * first, count // 2
    return bases


@gluon.constexpr_function
def tile_layout(NW, BV, WGMMA):
    """The accumulators of mma.m16n8k16, which every thread holds alike for warpgroup products (Hopper, 4 warps)."""
    if WGMMA:
        return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, BV, 16])
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[NW, 1], instr_shape=[16, 8])


@gluon.constexpr_function
def row_layout(L):
    return gl.SliceLayout(1, L)


@gluon.constexpr_function
def column_layout(L):
    return gl.SliceLayout(0, L)


@gluon.constexpr_function
def left_layout(L):
    return gl.DotOperandLayout(0, L, 2)


@gluon.constexpr_function
def right_layout(L):
    return gl.DotOperandLayout(1, L, 2)


@gluon.constexpr_function
def _anywhere(count, rank=1):
    """Bases of lanes or warps that hold the same."""
    return [[0] * rank for _ in range(count.bit_length() - 1)]


@gluon.constexpr_function
def rows_by_lane_group(BK, NW):
    """[BK] in memory order: lane 4g + c of warp w holds its 2M rows."""
    M = BK // (16 * NW)
    lanes = [[0], [0], [2 * M], [4 * M], [8 * M]]
    return gl.DistributedLinearLayout(_powers(1, 2 * M), lanes, _powers(16 * M, NW), [], [BK])


@gluon.constexpr_function
def rows_by_lane(BK, NW):
    """[BK] in memory order: lane 4g + c of every warp holds, of all warps' rows, those of their lanes 8c to 8c + 7."""
    M = BK // (16 * NW)
    registers = _powers(1, 4 * M) + _powers(16 * M, NW)
    return gl.DistributedLinearLayout(registers, [[4 * M], [8 * M], [0], [0], [0]], _anywhere(NW), [], [BK])


@gluon.jit
def in_row_order(x, BK: gl.constexpr):
    """[BK] in memory order -> [BK] by position."""
    NW: gl.constexpr = gl.num_warps()
    return x.reshape((NW, 8, BK // (16 * NW), 2)).permute((2, 0, 3, 1)).reshape((BK,))


@gluon.constexpr_function
def columns_by_lane(BV, NW):
    """[BV] in memory order: lane 4g + c holds columns c·BV/4 to (c + 1)·BV/4 - 1."""
    lanes = [[BV // 4], [BV // 2], [0], [0], [0]]
    return gl.DistributedLinearLayout(_powers(1, BV // 4), lanes, _anywhere(NW), [], [BV])


@gluon.constexpr_function
def copy_layout(D, NW):
    """[C, D] of 16-bit elements, 16 bytes a thread."""
    lanes = min(32, D // 8)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [NW, 1], [1, 0])


@gluon.constexpr_function
def tile_in_shared(D):
    """16-bit rows of D elements, a tile's or staged steps, that stmatrix and ldmatrix reach without bank conflicts.

    Both take eight rows at once, 16 bytes of each: where these lie is turned from row to row.
    """
    chunks = D // 8  # of 16 bytes in a row
    return gl.SwizzledSharedLayout(vec=8, per_phase=max(1, 8 // chunks), max_phase=min(8, chunks), order=[1, 0])


# What warpgroup products read.
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
ROW_MAJOR = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[1, 0]))
LINES = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[2, 1, 0]))
LINE = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0]))


@gluon.jit
def row_of(position, BK: gl.constexpr):
    NW: gl.constexpr = gl.num_warps()
    M: gl.constexpr = BK // (16 * NW)
    return position // 16 % NW * (16 * M) + position % 8 * (2 * M) + position // (16 * NW) * 2 + position // 8 % 2


@gluon.jit
def column_of(position, BV: gl.constexpr):
    return position % 8 // 2 * (BV // 4) + position // 8 * 2 + position % 2


@gluon.jit
def stage_rows(shared, ptr, stride_t, stride_d, t, left, d_first, D: gl.constexpr, C: gl.constexpr, BD: gl.constexpr,
               zero=0):  # fmt: skip
    """Begin copying C steps from t of ptr[t, d_first : d_first + BD] to shared; zeros past `left` steps or past D.

    zero: 0, as a number that `again` made, has the offsets computed here instead of kept in registers.
    """
    L: gl.constexpr = copy_layout(BD, gl.num_warps())
    i = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(1, L)), 1) + zero
    d = gl.expand_dims(gl.arange(0, BD, gl.SliceLayout(0, L)), 0) + d_first
    at = ptr + t.to(gl.int64) * stride_t + (i.to(gl.int64) * stride_t + d * stride_d)
    ok = i < left
    if D % BD != 0:
        ok = ok & (d < D)
    copy_to_shared(shared, at, mask=ok)


@gluon.jit
def stage_gate(shared, ptr, stride_t, t, left, C: gl.constexpr, zero=0):
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    i = gl.arange(0, C, L) + zero
    at = ptr + t.to(gl.int64) * stride_t + i.to(gl.int64) * stride_t
    copy_to_shared(shared, at, mask=i < left)


@gluon.jit
def finish_gate(shared, left, C: gl.constexpr):
    """Steps past the end get f = 1: they leave H, and its gradient, where they are."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    shared.store(gl.where(gl.arange(0, C, L) < left, shared.load(L), 1.0))


@gluon.jit
def steps_of(shared, C: gl.constexpr, D: gl.constexpr):
    """A staged chunk as C lines of D elements, of which `.index(u)` picks one."""
    if PRIVATE_REINTERPRET:
        return shared._reinterpret(shared.dtype, [C, D], LINE)
    else:
        return shared.reinterpret(shared.dtype, [C, D], LINE)


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
def to_half(x):
    """fp16 of fp32 x; beyond fp16's range its largest number, ±65504. NaN stays NaN."""
    return gl.inline_asm_elementwise(
        "cvt.rn.satfinite.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def rows(shared, u, BK: gl.constexpr, L: gl.constexpr):
    """[BK, 1] by position, in fp32: line u of a staged chunk, a factor of the rows of the state."""
    x = in_row_order(to_float(shared.index(u).load(rows_by_lane_group(BK, gl.num_warps()))), BK)
    return gl.expand_dims(gl.convert_layout(x, row_layout(L), assert_trivial=True), 1)


@gluon.jit
def in_order(x, BV: gl.constexpr):
    """[BV] in memory order -> [BV] by position."""
    return x.reshape((4, BV // 8, 2)).permute((1, 0, 2)).reshape((BV,))


@gluon.jit
def columns(shared, u, BV: gl.constexpr, L: gl.constexpr):
    """[1, BV] by position, in fp32: line u of a staged chunk, a factor of the columns of the state."""
    x = in_order(to_float(shared.index(u).load(columns_by_lane(BV, gl.num_warps()))), BV)
    return gl.expand_dims(gl.convert_layout(x, column_layout(L), assert_trivial=True), 0)


@gluon.jit
def sum_own(x, BK: gl.constexpr, BV: gl.constexpr):
    """[NW, 8, 4], one of every thread: the state-shaped x summed over what the thread holds."""
    NW: gl.constexpr = gl.num_warps()
    x = x.reshape((BK // (16 * NW), NW, 2, 8, BV // 8, 4, 2)).permute((1, 3, 5, 0, 2, 4, 6))
    return gl.sum(x.reshape((NW, 8, 4, BK * BV // (32 * NW))), 3)


@gluon.jit
def in_lines(p0, p1, p2, p3, BV: gl.constexpr):
    """Four of [8 NW, BV] as [4, 8 NW, BV]."""
    p = gl.join(gl.join(p0, p2), gl.join(p1, p3))  # the last axis of join is the fastest
    return p.reshape((8 * gl.num_warps(), BV, 4)).permute((2, 0, 1))


@gluon.constexpr_function
def lines_layout(BV, NW):
    """[4, 8 NW, BV], to be summed over its middle: two columns a thread; columns and steps spread over threads first.

    Loads of 8 bytes go half a warp at a time. With lines of 64 bytes that half reads two at once, which must be
    neighbours: two of one step or, where a warp has all steps, of two steps whose lines are taken in different order.
    """
    columns = [[0, 0, *x] for x in _powers(2, min(32, BV // 2))]
    lines = [[0, *x, 0] for x in _powers(1, 8 * NW)]
    in_warp = 2 - (NW.bit_length() - 1)  # bits of the step that are not the warp's number
    steps, warps = [[1, 0, 0], [2, 0, 0]][:in_warp], [[1, 0, 0], [2, 0, 0]][in_warp:]
    free = 5 - len(columns)  # bits of the lane's number
    steps, own_steps = steps[:free], steps[free:]
    free -= len(steps)
    lines, own_lines = lines[:free], lines[free:]
    return gl.DistributedLinearLayout(
        [[0, 0, 1], *own_lines, *own_steps], columns + lines + steps, warps, [], [4, 8 * NW, BV]
    )


@gluon.jit
def gate(shared, u, L: gl.constexpr):
    """f of step u, [1, 1]."""
    return gl.expand_dims(shared.index(u).load(row_layout(L)), 1)


@gluon.jit
def left_operand(x):
    """The state-shaped x as left operand: the registers are the same."""
    return gl.convert_layout(x, left_layout(x.type.layout), assert_trivial=True)


@gluon.jit
def rows_of_right_operand(shared, u, n, BK: gl.constexpr, L: gl.constexpr):
    """[BK, 8], to be contracted with the rows of the state: column n is line u of a chunk, the others zero."""
    x = in_row_order(shared.index(u).load(rows_by_lane(BK, gl.num_warps())), BK)
    return only_column(x, n, BK, right_layout(L))


@gluon.jit
def only_column(x, n, D: gl.constexpr, R: gl.constexpr):
    """x [D] in column n of [D, 8], zeros elsewhere."""
    x = gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, R), assert_trivial=True), 1)
    return only(x, gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, R)), 0) == n, (D, 8))


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
def advance(h, h_low, seed, f, W):
    """(H_t, Z_t, H_{t-1} - Z_t). The outer product seeds the accumulator; the accumulator layout of one product is,
    register for register, the operand of the next.

    H - (1-f)(H-Z) does not cancel where f is near 1; where f is near 0 it errs by 2^-24 |H|, far below LOW's rounding.
    """
    if isinstance(W, gl.shared_memory_descriptor):
        u = warpgroup_mma_wait(0, [warpgroup_mma(left_operand(h_low), W, seed, is_async=True)])
    else:
        u = mma_v2(left_operand(h_low), W, seed)
    z = tanh_hardware(u)
    e = h - z
    return h - (1.0 - f) * e, z, e


@gluon.jit
def again(x):
    """x, a number that all threads have, such that what depends on it is computed anew and not kept in registers."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def to_cache(at):
    """Begin bringing the lines of these addresses into the L2 cache."""
    gl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.b32 $0, 0; }", "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def only(x, here, shape: gl.constexpr):
    """x where `here`, zeros elsewhere; by masking pairs of elements, half of what `where` takes."""
    yes = gl.full(shape, -1, gl.int16, x.type.layout)
    mask = gl.where(gl.broadcast(here, yes)[0], yes, gl.full(shape, 0, gl.int16, x.type.layout))
    x, mask = gl.broadcast(x, mask)
    return gl.inline_asm_elementwise("and.b32 $0, $1, $2;", "=r,r,r", [x, mask], dtype=x.dtype, is_pure=True, pack=2)


@gluon.jit
def load_W(ptr, V: gl.constexpr, BV: gl.constexpr, TRANSPOSED: gl.constexpr, R: gl.constexpr):
    """W or Wᵀ in the order of positions, in layout R."""
    i = column_of(gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(1, R)), 1), BV)
    j = column_of(gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(0, R)), 0), BV)
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
def clamp(x, c, ONE: gl.constexpr):
    """x in [-c, c]; NaN stays NaN. ONE: in one instruction, which GPUs from compute capability 8.6 on have."""
    c = gl.full(x.shape, 0.0, gl.float32, x.type.layout) + c
    if ONE:  # the smaller magnitude, with the product of the signs
        return gl.inline_asm_elementwise(
            "min.NaN.xorsign.abs.f32 $0, $1, $2;", "=f,f,f", [x, c], dtype=gl.float32, is_pure=True, pack=1
        )
    return gl.inline_asm_elementwise(
        "{ .reg .f32 m; neg.f32 m, $2; min.NaN.f32 $0, $1, $2; max.NaN.f32 $0, $0, m; }",
        "=f,f,f", [x, c], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def columns_in_memory(BK, NW):
    """[8, BK]: the accumulators of a [BK, 8] product, their columns as lines of memory."""
    M = BK // (16 * NW)
    registers = [[1, 0]] + [[0, *x] for x in _powers(1, 2 * M)]
    lanes = [[2, 0], [4, 0], [0, 2 * M], [0, 4 * M], [0, 8 * M]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, *x] for x in _powers(16 * M, NW)], [], [8, BK])
