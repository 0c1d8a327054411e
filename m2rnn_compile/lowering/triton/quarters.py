# SPDX-License-Identifier: Apache-2.0
"""One step of a 64-column state on Hopper, its columns in four quarters, so that tanh and products overlap.

The product of a step, H W = Σ H_i W_i over quarters of H's columns, may begin when the first quarter of H is ready:
its tensor-core instructions run while the special-function unit works on the next quarter. `u` below is the product
of the step to come, seeded with k vᵀ.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .tile import (
    column_layout,
    columns_by_lane,
    in_order,
    in_row_order,
    left_layout,
    row_layout,
    rows_by_lane_group,
    tanh_hardware,
    tile_layout,
    to_float,
    to_half,
)


@gluon.constexpr_function
def quarter_layout(NW):
    return tile_layout(NW, 16, True)


@gluon.jit
def in_quarters(x, BK: gl.constexpr, BV: gl.constexpr):
    """The state-shaped x as four of [BK, BV / 4]: the registers are the same."""
    Q: gl.constexpr = quarter_layout(gl.num_warps())
    a, b = x.reshape((BK, 2, 2, BV // 4)).permute((0, 3, 1, 2)).split()
    x0, x2 = a.split()
    x1, x3 = b.split()
    return (
        gl.convert_layout(x0, Q, assert_trivial=True), gl.convert_layout(x1, Q, assert_trivial=True),
        gl.convert_layout(x2, Q, assert_trivial=True), gl.convert_layout(x3, Q, assert_trivial=True),
    )  # fmt: skip


@gluon.jit
def whole(x0, x1, x2, x3, BK: gl.constexpr, BV: gl.constexpr, L: gl.constexpr):
    """Four quarters as one, in layout L: the registers are the same."""
    x = gl.join(gl.join(x0, x2), gl.join(x1, x3)).permute((0, 2, 3, 1)).reshape((BK, BV))
    return gl.convert_layout(x, L, assert_trivial=True)


@gluon.jit
def quarters_of_W(W, BV: gl.constexpr):
    Q: gl.constexpr = BV // 4
    return W.slice(0, Q, 0), W.slice(Q, Q, 0), W.slice(2 * Q, Q, 0), W.slice(3 * Q, Q, 0)


@gluon.jit
def operand(h, LOW: gl.constexpr, L: gl.constexpr):
    """A quarter as left operand: the registers are the same."""
    return gl.convert_layout(h.to(LOW), left_layout(L), assert_trivial=True)


@gluon.jit
def factors(ks, vs, t, BK: gl.constexpr, BV: gl.constexpr):
    """k and v of step t, still in 16 bits: to be loaded a step before they are needed."""
    NW: gl.constexpr = gl.num_warps()
    return ks.index(t).load(rows_by_lane_group(BK, NW)), vs.index(t).load(columns_by_lane(BV, NW))


@gluon.jit
def outer(k, v, BK: gl.constexpr, BV: gl.constexpr, L: gl.constexpr):
    """k vᵀ, in layout L."""
    k = gl.convert_layout(in_row_order(to_float(k), BK), row_layout(L), assert_trivial=True)
    v = gl.convert_layout(in_order(to_float(v), BV), column_layout(L), assert_trivial=True)
    return gl.expand_dims(k, 1) * gl.expand_dims(v, 0)


@gluon.jit
def begin(h0, h1, h2, h3, seed, W, BV: gl.constexpr, LOW: gl.constexpr, L: gl.constexpr):
    """u of the step after the state h."""
    W0, W1, W2, W3 = quarters_of_W(W, BV)
    u = warpgroup_mma(operand(h0, LOW, L), W0, seed, is_async=True)
    u = warpgroup_mma(operand(h1, LOW, L), W1, u, is_async=True)
    u = warpgroup_mma(operand(h2, LOW, L), W2, u, is_async=True)
    u = warpgroup_mma(operand(h3, LOW, L), W3, u, is_async=True)
    return warpgroup_mma_wait(0, [u])


@gluon.jit
def blend(h, u, g):
    """A quarter of (H_t, Z_t, H_{t-1} - Z_t), g = 1 - f."""
    z = tanh_hardware(u)
    e = h - z
    return h - g * e, z, e


@gluon.jit
def slope(z, g, LOW: gl.constexpr):
    """A quarter of S = (1 - f)(1 - Z²), g = 1 - f. Rounded once: an error of g alone would be every element's."""
    return ((1.0 - z * z) * g).to(LOW)


@gluon.jit
def step(h0, h1, h2, h3, u, seed, g, W, PRODUCT: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr):
    """One step: quarters of H_t, of H_t as products see it, of E = H_{t-1} - Z_t and of S = (1 - f)(1 - Z²); and the
    product of the step to come, under way. g = 1 - f. PRODUCT: whether there is a step to come.

    E, of which only df is made, is in fp16 whatever LOW is: three bits more than bf16 has where E is above 6e-5, no
    fewer above 1e-5, and what is beyond 65504 is held there.
    """
    LOW: gl.constexpr = W.dtype
    L: gl.constexpr = u.type.layout
    W0, W1, W2, W3 = quarters_of_W(W, BV)
    u0, u1, u2, u3 = in_quarters(u, BK, BV)
    h0, z, e = blend(h0, u0, g)
    a0 = h0.to(LOW)
    if PRODUCT:
        seed = warpgroup_mma(operand(a0, LOW, L), W0, seed, is_async=True)
    e0 = to_half(e)
    s0 = slope(z, g, LOW)
    h1, z, e = blend(h1, u1, g)
    a1 = h1.to(LOW)
    if PRODUCT:
        seed = warpgroup_mma(operand(a1, LOW, L), W1, seed, is_async=True)
    e1 = to_half(e)
    s1 = slope(z, g, LOW)
    h2, z, e = blend(h2, u2, g)
    a2 = h2.to(LOW)
    if PRODUCT:
        seed = warpgroup_mma(operand(a2, LOW, L), W2, seed, is_async=True)
    e2 = to_half(e)
    s2 = slope(z, g, LOW)
    h3, z, e = blend(h3, u3, g)
    a3 = h3.to(LOW)
    if PRODUCT:
        seed = warpgroup_mma(operand(a3, LOW, L), W3, seed, is_async=True)
    e3 = to_half(e)
    s3 = slope(z, g, LOW)
    return h0, h1, h2, h3, a0, a1, a2, a3, e0, e1, e2, e3, s0, s1, s2, s3, seed


@gluon.constexpr_function
def vectors_layout(NW):
    """[32 NW, 8]: 16 bytes of a thread, in 16-bit elements."""
    return gl.BlockedLayout([1, 8], [32, 1], [NW, 1], [1, 0])


@gluon.jit
def _vector(x):
    """A quarter as what each thread holds of it, a vector of 8."""
    NW: gl.constexpr = gl.num_warps()
    x = x.reshape((NW, 2, 8, 2, 4, 2)).permute((0, 2, 4, 1, 3, 5)).reshape((32 * NW, 8))
    return gl.convert_layout(x, vectors_layout(NW), assert_trivial=True)


@gluon.jit
def _quarter(x, BK: gl.constexpr, Q: gl.constexpr):
    NW: gl.constexpr = gl.num_warps()
    x = x.reshape((NW, 8, 4, 2, 2, 2)).permute((0, 3, 1, 4, 2, 5)).reshape((BK, 16))
    return gl.convert_layout(x, Q, assert_trivial=True)


@gluon.jit
def _lane_vectors(NW: gl.constexpr):
    L: gl.constexpr = vectors_layout(NW)
    thread = gl.expand_dims(gl.arange(0, 32 * NW, gl.SliceLayout(1, L)), 1)
    return thread * 8 + gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, L)), 0)


@gluon.jit
def note(at, h0, h1, h2, h3, BK: gl.constexpr):
    """Write 16-bit quarters of [64, 16] for the same threads to read back, 16 bytes each."""
    offset = _lane_vectors(gl.num_warps())
    gl.store(at + offset, _vector(h0))
    gl.store(at + BK * 16 + offset, _vector(h1))
    gl.store(at + BK * 32 + offset, _vector(h2))
    gl.store(at + BK * 48 + offset, _vector(h3))


@gluon.jit
def noted(at, BK: gl.constexpr):
    NW: gl.constexpr = gl.num_warps()
    Q: gl.constexpr = quarter_layout(NW)
    offset = _lane_vectors(NW)
    return (
        _quarter(gl.load(at + offset), BK, Q), _quarter(gl.load(at + BK * 16 + offset), BK, Q),
        _quarter(gl.load(at + BK * 32 + offset), BK, Q), _quarter(gl.load(at + BK * 48 + offset), BK, Q),
    )  # fmt: skip


@gluon.constexpr_function
def lines_of_state(NW):
    """[16 NW, 64] in memory order: a thread holds 16 columns of two rows."""
    registers = [[0, 1], [0, 2], [0, 4], [0, 8], [1, 0]]
    lanes = [[0, 16], [0, 32], [2, 0], [4, 0], [8, 0]]
    warps = [[16 * 2**i, 0] for i in range(NW.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [16 * NW, 64])


@gluon.jit
def _state_at(at, row_first, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr):
    X: gl.constexpr = lines_of_state(gl.num_warps())
    i = gl.expand_dims(gl.arange(0, BK, gl.SliceLayout(1, X)), 1) + row_first
    j = gl.expand_dims(gl.arange(0, BV, gl.SliceLayout(0, X)), 0)
    return at + (i * V + j), (i < K) & (j < V)


@gluon.jit
def store_state(at, h0, h1, h2, h3, row_first, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr):
    """Quarters of a state to memory, 16 bytes at a time."""
    NW: gl.constexpr = gl.num_warps()
    x = gl.join(gl.join(h0, h2), gl.join(h1, h3)).permute((0, 2, 3, 1)).reshape((NW, 2, 8, 8, 4, 2))
    x = x.permute((0, 2, 1, 4, 3, 5)).reshape((BK, BV)).to(at.dtype.element_ty)
    to, ok = _state_at(at, row_first, K, V, BK, BV)
    gl.store(to, gl.convert_layout(x, lines_of_state(NW), assert_trivial=True), mask=ok)


@gluon.jit
def load_state(at, row_first, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr):
    """A state in memory, [BK, BV] by position."""
    NW: gl.constexpr = gl.num_warps()
    to, ok = _state_at(at, row_first, K, V, BK, BV)
    x = gl.load(to, mask=ok, other=0.0).reshape((NW, 8, 2, 4, 8, 2)).permute((0, 2, 1, 4, 3, 5)).reshape((BK, BV))
    return gl.convert_layout(x, tile_layout(NW, BV, True), assert_trivial=True)
