# SPDX-License-Identifier: Apache-2.0
"""Outer products x_t y_tᵀ of rows and columns as tensor-core products, in Gluon. Shared by forward and backward.

k_t v_tᵀ is a product over one index; mma.m16n8k8 contracts eight. So the inputs of eight steps are loaded as operands
at once (ldmatrix, no conversions), X [rows, 8 steps] and Y [8 steps, columns], and for step u all of Y but its line u
is masked away. That is one instruction where multiplying in fp32 takes four, and six to convert the factors.

Tiles lie in natural order here: position = row, position = column.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .tile import PRIVATE_REINTERPRET, _powers, right_layout, turned


@gluon.jit
def in_blocks(shared, C: gl.constexpr, U: gl.constexpr, D: gl.constexpr):
    """Staged steps [C, D] as C / U blocks of U steps, of which `.index(g)` picks one; numbers, D = 1, as lines of U.

    If rows of the layout are turned, it must be with a period that divides U.
    """
    shape: gl.constexpr = [C // U, U] if D == 1 else [C // U, U, D]
    if PRIVATE_REINTERPRET:
        return shared._reinterpret(shared.dtype, shape, shared.layout)
    else:
        return shared.reinterpret(shared.dtype, shape, shared.layout)


@gluon.constexpr_function
def columns_operand(BV, NW):
    """[BV, 8 steps]: the right operand of mma.m16n8k8, transposed; every warp holds it all."""
    registers = [[0, 1]]
    n = 8
    while n < BV:
        registers.append([n, 0])
        n *= 2
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0]] * (NW.bit_length() - 1), [], [BV, 8])


@gluon.jit
def load_rows(eight, L: gl.constexpr):
    """[BK, 8] in L: the left operand, from [8, BK] in shared memory."""
    return eight.permute((1, 0)).load(L)


@gluon.jit
def load_columns(eight, BV: gl.constexpr):
    """[BV, 8]: the right operand, from [8, BV] in shared memory."""
    return eight.permute((1, 0)).load(columns_operand(BV, gl.num_warps()))


@gluon.jit
def _only(y, pair, u: gl.constexpr):
    """Of y [D, 8], the even (u even) or odd columns where `pair`, which both of a pair share; zeros elsewhere."""
    mask = gl.where(pair, gl.full(y.shape, -1, gl.int32, y.type.layout), gl.full(y.shape, 0, gl.int32, y.type.layout))
    if u % 2 == 0:
        return gl.inline_asm_elementwise(
            "{ and.b32 $0, $1, $2; and.b32 $0, $0, 0x0000ffff; }",
            "=r,r,r,r", [y, mask], dtype=y.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            "{ and.b32 $0, $1, $2; and.b32 $0, $0, 0xffff0000; }",
            "=r,r,r,r", [y, mask], dtype=y.dtype, is_pure=True, pack=2,
        )  # fmt: skip


@gluon.jit
def only_step(y, u: gl.constexpr, BV: gl.constexpr):
    """Y with all steps but u set to zero."""
    pair = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, y.type.layout)), 0) // 2 == u // 2
    return _only(y, gl.broadcast(pair, gl.full((BV, 8), True, gl.int1, y.type.layout))[0], u)


@gluon.constexpr_function
def blocks_layout(BK, BV, NW):
    """The tile [BK, BV] seen as [BK / 8, 8, BV / 8, 8]: as `tile_layout`, block of 8 × 8 by block."""
    registers = [[0, 0, 0, 1], [1, 0, 0, 0]]
    registers += [[0, 0, *b, 0] for b in _powers(1, BV // 8)]
    registers += [[*b, 0, 0, 0] for b in _powers(2 * NW, BK // (16 * NW))]
    lanes = [[0, 0, 0, 2], [0, 0, 0, 4], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]]
    warps = [[*b, 0, 0, 0] for b in _powers(2, NW)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [BK // 8, 8, BV // 8, 8])


@gluon.jit
def spread(x, y, BK: gl.constexpr, BV: gl.constexpr, L: gl.constexpr):
    """Operands as tiles in L: in a thread, every 16 × 8 block of the result finds its own four elements of both."""
    BLOCKS: gl.constexpr = blocks_layout(BK, BV, gl.num_warps())
    tile = gl.full((BK // 8, 8, BV // 8, 8), 0.0, x.dtype, BLOCKS)
    x = x.reshape((BK // 8, 8, 8))
    x = gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(2, BLOCKS), assert_trivial=True), 2)
    y = y.reshape((BV // 8, 8, 8)).permute((1, 0, 2))
    y = gl.expand_dims(gl.convert_layout(y, gl.SliceLayout(0, BLOCKS), assert_trivial=True), 0)
    x = gl.broadcast(x, tile)[0].reshape((BK, BV))
    y = gl.broadcast(y, tile)[0].reshape((BK, BV))
    return gl.convert_layout(x, L, assert_trivial=True), gl.convert_layout(y, L, assert_trivial=True)


@gluon.jit
def outer(x, y, BK: gl.constexpr, BV: gl.constexpr, L: gl.constexpr):
    """[BK, BV] in L, fp32: X Y of x [BK, 8] and y [BV, 8], in which one step is left."""
    x, y = spread(x, y, BK, BV, L)
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "{ .reg .f32 z; mov.f32 z, 0f00000000; "
            "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5}, {$6}, {z,z,z,z}; }",
            "=f,=f,=f,=f,r,r,r,r", [x, y], dtype=gl.float32, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            "{ .reg .f32 z; mov.f32 z, 0f00000000; "
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5}, {$6}, {z,z,z,z}; }",
            "=f,=f,=f,=f,r,r,r,r", [x, y], dtype=gl.float32, is_pure=True, pack=4,
        )  # fmt: skip


@gluon.jit
def add_outer(acc, x, y, BK: gl.constexpr, BV: gl.constexpr):
    """acc + X Y."""
    L: gl.constexpr = acc.type.layout
    x, y = spread(x, y, BK, BV, L)
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5}, {$6}, {$8,$9,$10,$11};",
            "=f,=f,=f,=f,r,r,r,r,f,f,f,f", [x, y, acc], dtype=gl.float32, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5}, {$6}, {$8,$9,$10,$11};",
            "=f,=f,=f,=f,r,r,r,r,f,f,f,f", [x, y, acc], dtype=gl.float32, is_pure=True, pack=4,
        )  # fmt: skip


@gluon.jit
def load_W(ptr, V: gl.constexpr, BV: gl.constexpr, TRANSPOSED: gl.constexpr, R: gl.constexpr):
    """W or Wᵀ in layout R."""
    i = gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(1, R)), 1)
    j = gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(0, R)), 0)
    if TRANSPOSED:
        at = j * V + i
    else:
        at = i * V + j
    return gl.load(ptr + at, mask=(i < V) & (j < V), other=0.0)


@gluon.jit
def line_of_ones(u: gl.constexpr, LOW: gl.constexpr, NW: gl.constexpr):
    """[8, 8 steps]: a right operand of ones in step u; X times it is x_u in every column."""
    return only_step(gl.full((8, 8), 1.0, LOW, columns_operand(8, NW)), u, 8)


@gluon.jit
def rows_of_step(x, u: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, L: gl.constexpr):
    """[BK, BV] in L, fp32: x_u of x [BK, 8] in every column; the tensor cores hand it to all threads of a row."""
    NW: gl.constexpr = gl.num_warps()
    BLOCKS: gl.constexpr = blocks_layout(BK, BV, NW)
    r = outer(x, line_of_ones(u, x.dtype, NW), BK, 8, L).reshape((BK // 8, 8, 8))
    r = gl.expand_dims(gl.convert_layout(r, gl.SliceLayout(2, BLOCKS), assert_trivial=True), 2)
    r = gl.broadcast(r, gl.full((BK // 8, 8, BV // 8, 8), 0.0, gl.float32, BLOCKS))[0].reshape((BK, BV))
    return gl.convert_layout(r, L, assert_trivial=True)


@gluon.constexpr_function
def held_by_all(U, NW):
    """[U] with all elements in every thread."""
    return gl.DistributedLinearLayout(_powers(1, U), [[0]] * 5, [[0]] * (NW.bit_length() - 1), [], [U])


@gluon.jit
def pick(x, u: gl.constexpr):
    """Element u of x held by all threads, as a scalar: the compiler folds the selection away."""
    here = gl.arange(0, x.shape[0], x.type.layout) == u
    return gl.sum(gl.where(here, x.to(gl.int32, bitcast=True), 0), 0).to(gl.float32, bitcast=True)


@gluon.jit
def only_step_at(y, first, u: gl.constexpr, BV: gl.constexpr):
    """`only_step` of step first + u; first is even and known at run time."""
    pair = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, y.type.layout)), 0) // 2 == first // 2 + u // 2
    return _only(y, gl.broadcast(pair, gl.full((BV, 8), True, gl.int1, y.type.layout))[0], u)


@gluon.jit
def load_right(eight, L: gl.constexpr):
    """[D, 8 steps] as a right operand of mma.m16n8k16, to be contracted with D, from [8, D] in shared memory."""
    return eight.permute((1, 0)).load(right_layout(L))


@gluon.jit
def only_column_at(x, n, D: gl.constexpr):
    """[D, 8], a right operand, with all columns but n set to zero; a pair of elements stands in one column."""
    R: gl.constexpr = x.type.layout
    here = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, R)), 0) == n
    here = gl.broadcast(here, gl.full((D, 8), True, gl.int1, R))[0]
    mask = gl.where(here, gl.full((D, 8), -1, gl.int32, R), gl.full((D, 8), 0, gl.int32, R))
    return gl.inline_asm_elementwise(
        "and.b32 $0, $1, $2;", "=r,r,r,r", [x, mask], dtype=x.dtype, is_pure=True, pack=2
    )


@gluon.jit
def store_steps(at, tile, steps, stride_t, d_first, D: gl.constexpr, BD: gl.constexpr):
    """Columns of tile [BD, 8], one per step, as rows of memory [8, D]; blocks are turned: a thread has two of a row."""
    x = turned(tile.to(at.dtype.element_ty), BD, 8)
    OUT: gl.constexpr = x.type.layout
    t = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, OUT)), 0)
    d = gl.expand_dims(gl.arange(0, BD, gl.SliceLayout(1, OUT)), 1) + d_first
    ok = t < steps
    if D % BD != 0:
        ok = ok & (d < D)
    gl.store(at + t * stride_t + d, x, mask=ok)
