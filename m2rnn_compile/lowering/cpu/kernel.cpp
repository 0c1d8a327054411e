// SPDX-License-Identifier: Apache-2.0
// M²RNN scan on a CPU: forward, and backward that recomputes each chunk from its checkpoint.
//
// No torch headers: plain pointers and strides come in through `Args` (mirrored by ctypes in __init__.py), so that the
// build takes seconds. All matrices of the state's size are rows of V values padded with zeros to VP, a multiple of the
// SIMD width L; the rows (K of them) never mix, only y, dv, df and dW sum over them.
//
// Work is split over (sequence, head). Every sum has an order that depends on the shapes alone, never on the number of
// threads, so the same inputs give the same bits. Sums over heads that share an input, and over sequences for dW, go
// through partials: see `backward`.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <numeric>
#include <utility>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#define INLINE inline __attribute__((always_inline))

// ---------------------------------------------------------------------------------------------- interface with Python

enum DType : int64_t { F32 = 0, F64 = 1, BF16 = 2, F16 = 3 };

struct Strided {  // x[b, t, head, element]; strides in elements
    char* data;
    int64_t dtype, heads, stride_b, stride_t, stride_h, stride_e;
};

struct Args {
    Strided q, k, v, f;          // inputs; f has no last dimension
    Strided y;                   // forward: output y. backward: input dy, data may be null
    Strided dq, dk, dv, df;      // backward outputs, contiguous
    const void* W;               // [Nw, V, V], state dtype, contiguous; so are all states below
    const void* initial;         // [S, N, K, V] or null
    void* final_state;           // forward output [S, N, K, V]
    void* checkpoints;           // [B, NC, N, K, V]: forward writes, backward reads
    const void* dfinal;          // [S, N, K, V] or null
    void* dW;                    // backward output [Nw, V, V], state dtype
    void* dinitial;              // backward output [S, N, K, V]
    const int64_t* bounds;       // packed: [S + 1] starts of the sequences, else null
    int64_t B, T, S, N, Nw, K, V, C, NC, threads, is_double;
    double clip;                 // infinity: none
};

// ------------------------------------------------------------------------------------- elements in and out of memory

static INLINE uint32_t bits_of(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
static INLINE float float_of(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }

struct bf16 { uint16_t u; };
struct fp16 { uint16_t u; };

static INLINE float widen(float x) { return x; }
static INLINE double widen(double x) { return x; }
static INLINE float widen(bf16 x) { return float_of(uint32_t(x.u) << 16); }
static INLINE float widen(fp16 x) {
    const uint32_t sign = uint32_t(x.u & 0x8000) << 16, exponent = (x.u >> 10) & 31, mantissa = x.u & 0x3ff;
    const uint32_t normal = ((exponent == 31 ? 255u : exponent + 112u) << 23) | (mantissa << 13);
    const uint32_t tiny = bits_of(float(int32_t(mantissa)) * 0x1p-24f);  // exact, and immune to denormals-are-zero
    return float_of(sign | (exponent == 0 ? tiny : normal));
}

template <class R> static INLINE void narrow(R x, float& out) { out = float(x); }
template <class R> static INLINE void narrow(R x, double& out) { out = double(x); }
template <class R> static INLINE void narrow(R x, bf16& out) {  // round to nearest even
    const uint32_t u = bits_of(float(x));
    const bool nan = (u & 0x7fffffff) > 0x7f800000;
    out.u = nan ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
template <class R> static INLINE void narrow(R x, fp16& out) {  // round to nearest even
    const uint32_t u = bits_of(float(x)), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
    uint32_t h;
    if (a > 0x7f800000) {
        h = 0x7e00;  // NaN
    } else if (a >= 0x47800000) {
        h = 0x7c00;  // 65536 and above; [65520, 65536) reaches infinity by the carry of the rounding below
    } else if (a < 0x38800000) {
        h = bits_of(float_of(a) + 0.5f) - 0x3f000000;  // subnormal: 0.5 has fp16's smallest step as its ulp
    } else {
        h = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
    }
    out.u = uint16_t(sign | h);
}

static INLINE char* row_address(const Strided& x, int64_t b, int64_t t, int64_t h) {
    static const int64_t size[] = {4, 8, 2, 2};
    return x.data + (b * x.stride_b + t * x.stride_t + h * x.stride_h) * size[x.dtype];
}

template <class X, class R> static void load_as(const char* from, int64_t stride, int64_t n, R* out) {
    const X* x = reinterpret_cast<const X*>(from);
    if (stride == 1) {
        for (int64_t i = 0; i < n; ++i) out[i] = R(widen(x[i]));
    } else {
        for (int64_t i = 0; i < n; ++i) out[i] = R(widen(x[i * stride]));
    }
}

template <class R> static void load_row(const Strided& x, int64_t b, int64_t t, int64_t h, int64_t n, R* out) {
    const char* from = row_address(x, b, t, h);
    switch (x.dtype) {
        case F32: return load_as<float>(from, x.stride_e, n, out);
        case F64: return load_as<double>(from, x.stride_e, n, out);
        case BF16: return load_as<bf16>(from, x.stride_e, n, out);
        default: return load_as<fp16>(from, x.stride_e, n, out);
    }
}

template <class X, class R> static void store_as(char* to, int64_t n, const R* from) {
    X* x = reinterpret_cast<X*>(to);
    for (int64_t i = 0; i < n; ++i) narrow(from[i], x[i]);
}

// The last dimension of every output is contiguous.
template <class R> static void store_row(const Strided& x, int64_t b, int64_t t, int64_t h, int64_t n, const R* from) {
    char* to = row_address(x, b, t, h);
    switch (x.dtype) {
        case F32: return store_as<float>(to, n, from);
        case F64: return store_as<double>(to, n, from);
        case BF16: return store_as<bf16>(to, n, from);
        default: return store_as<fp16>(to, n, from);
    }
}

// ------------------------------------------------------------------------------------------------------------- SIMD

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, ACCUMULATORS = 16;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, ACCUMULATORS = 8;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, ACCUMULATORS = 16;
#else
constexpr int VECTOR_BYTES = 16, ACCUMULATORS = 8;
#endif

template <class R> struct Simd;

template <> struct Simd<float> {
    typedef float Vec __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t Int __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t Lane;
    static constexpr int MANTISSA = 23;
    static constexpr Lane ONE = 0x3f800000, SIGN = INT32_MIN;
    static constexpr float MAGIC = 0x1.8p23f, SATURATED = 20.f;       // tanh(x) rounds to 1 from 2x = 18.1
    static constexpr float LN2_HI = 0x1.62e4p-1f, LN2_LO = 0x1.7f7d1cp-20f;  // HI has 15 bits: n * HI is exact
    // (expm1(r) - r) / r² on |r| <= ln2 / 2, highest power first; interpolated at Chebyshev nodes (relative error of
    // expm1 2e-8)
    static constexpr int TERMS = 5;
    static constexpr float POLY[TERMS] = {0.00139262504f, 0.00836323295f, 0.0416665524f, 0.166665763f, 0.5f};
};

template <> struct Simd<double> {
    typedef double Vec __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t Int __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t Lane;
    static constexpr int MANTISSA = 52;
    static constexpr Lane ONE = 0x3ff0000000000000, SIGN = INT64_MIN;
    static constexpr double MAGIC = 0x1.8p52, SATURATED = 40.;
    static constexpr double LN2_HI = 0x1.62e42fefap-1, LN2_LO = 0x1.cf79abc9e3b3ap-40;
    static constexpr int TERMS = 12;  // Taylor: 1/13! ... 1/2!
    static constexpr double POLY[TERMS] = {1 / 6227020800., 1 / 479001600., 1 / 39916800., 1 / 3628800., 1 / 362880.,
                                           1 / 40320., 1 / 5040., 1 / 720., 1 / 120., 1 / 24., 1 / 6., 1 / 2.};
};

template <class R> using Vec = typename Simd<R>::Vec;
template <class R> constexpr int LANES = VECTOR_BYTES / int(sizeof(R));

template <class R> static INLINE Vec<R> load(const R* p) {
    Vec<R> x;
    std::memcpy(&x, __builtin_assume_aligned(p, VECTOR_BYTES), VECTOR_BYTES);
    return x;
}
template <class R> static INLINE void store(R* p, Vec<R> x) {
    std::memcpy(__builtin_assume_aligned(p, VECTOR_BYTES), &x, VECTOR_BYTES);
}
template <class R> static INLINE Vec<R> splat(R x) { return x - Vec<R>{}; }  // not x + {}: -0 stays -0

// tanh x = e / (e + 2) with e = expm1(2|x|), and the sign of x put back: odd, within 2 ulp everywhere (small x too: no
// cancellation, e is a polynomial there) and within 1 near ±1, exactly 1 from |x| = 9.1 on (fp32), NaN for NaN.
template <class R> static INLINE Vec<R> tanh_(Vec<R> x) {
    using S = Simd<R>;
    using Int = typename S::Int;
    const Int bits = (Int)x;
    Vec<R> a = (Vec<R>)(bits & ~S::SIGN);
    a = a + a;
    a = a > S::SATURATED ? splat<R>(S::SATURATED) : a;  // false for NaN, which goes on
    const Vec<R> shifted = a * R(1.4426950408889634074) + S::MAGIC;  // the integer n = round(a / ln 2) in the low bits
    const Vec<R> n = shifted - S::MAGIC;
    const Vec<R> r = (a - n * S::LN2_HI) - n * S::LN2_LO;
    Vec<R> p = splat<R>(S::POLY[0]);
#pragma GCC unroll 16
    for (int i = 1; i < S::TERMS; ++i) p = p * r + S::POLY[i];
    p = (r * r) * p + r;                                                       // expm1(r)
    const Vec<R> scale = (Vec<R>)(((Int)shifted << S::MANTISSA) + S::ONE);     // 2^n
    const Vec<R> e = p * scale + (scale - R(1));
    // Above 1/2 take 1 - 2 / (e + 2), which rounds once where it matters: backward multiplies by 1 - z², and there an ulp
    // of z near 1 is a large error.
    const Int large = e > R(2);
    const Vec<R> q = (large ? splat<R>(2) : e) / (e + R(2));
    return (Vec<R>)((Int)(large ? R(1) - q : q) | (bits & S::SIGN));
}

// Sum LANES vectors into one whose lane l is the sum of the lanes of vector l, by a tree: `Leaf(l)` gives vector l.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLE 1
#endif
#endif
#ifdef HAS_SHUFFLE
template <class R, int M, int... l> static INLINE Vec<R> fold(Vec<R> a, Vec<R> b, std::integer_sequence<int, l...>) {
    constexpr int L = LANES<R>;
    const Vec<R> x = __builtin_shufflevector(a, b, ((l / M) % 2 ? L + l - M : l)...);
    const Vec<R> y = __builtin_shufflevector(a, b, ((l / M) % 2 ? L + l : l + M)...);
    return x + y;
}
template <class R, int M, class Leaf> static INLINE Vec<R> sum_lanes(const Leaf& leaf, int first) {
    if constexpr (M == 1) {
        return leaf(first);
    } else {
        return fold<R, M / 2>(sum_lanes<R, M / 2>(leaf, first), sum_lanes<R, M / 2>(leaf, first + M / 2),
                              std::make_integer_sequence<int, LANES<R>>{});
    }
}
#else
template <class R, int M, class Leaf> static INLINE Vec<R> sum_lanes(const Leaf& leaf, int first) {
    Vec<R> sum{};
    for (int l = 0; l < M; ++l) {
        const Vec<R> x = leaf(first + l);
        for (int i = 0; i < LANES<R>; ++i) sum[l] += x[i];
    }
    return sum;
}
#endif

// out[r] = Σ_c M[r, c] x[c]. `out` has room for a multiple of LANES.
template <class R> static INLINE void row_dots(const R* M, const R* x, int64_t K, int64_t VP, R* out) {
    constexpr int L = LANES<R>;
    for (int64_t r0 = 0; r0 < K; r0 += L) {
        const auto leaf = [&](int l) {
            const R* row = M + std::min(r0 + l, K - 1) * VP;  // lanes beyond K repeat the last row and are not used
            Vec<R> sum = load(row) * load(x);
            for (int64_t c = L; c < VP; c += L) sum += load(row + c) * load(x + c);
            return sum;
        };
        store(out + r0, sum_lanes<R, L>(leaf, 0));
    }
}

// Calls body(integral_constant<int, n>, first) over [0, total) in blocks of MAX, then of halves of it.
template <int MAX, class Body> static INLINE void in_blocks(int64_t total, const Body& body, int64_t first = 0) {
    for (; first + MAX <= total; first += MAX) body(std::integral_constant<int, MAX>{}, first);
    if constexpr (MAX > 1) in_blocks<MAX / 2>(total, body, first);
}

constexpr int rows_for(int cols) { return std::min(8, ACCUMULATORS / cols); }

// Tiles of 4, 2, 1 vectors of columns; the compile-time width VT (0: any) leaves only those that occur.
template <class R, int VT, class Body> static INLINE void in_column_tiles(int64_t VP, const Body& body) {
    constexpr int L = LANES<R>, NV = (VT + L - 1) / L, MAX = VT == 0 || NV >= 4 ? 4 : NV >= 2 ? 2 : 1;
    in_blocks<MAX>(VP / L, [&](auto cols, int64_t c) { body(cols, c * L); });
}

// ---------------------------------------------------------------------------------------------------------- one step

// Sizes that every function below needs. VT > 0 fixes V at compile time.
template <class R, int VT> struct Sizes {
    static constexpr int L = LANES<R>;
    static constexpr bool PADDED = VT == 0 || VT % L != 0;
    int64_t K, V_, VP_;
    const R* mask;  // VP lanes: all bits set in the first V, else zero
    INLINE int64_t V() const { return VT ? VT : V_; }
    INLINE int64_t VP() const { return VT ? (VT + L - 1) / L * L : VP_; }
    // Padding lanes must stay zero: infinity times a zero of the padding would put a NaN there.
    INLINE Vec<R> masked(Vec<R> x, int64_t column) const {
        using Int = typename Simd<R>::Int;
        return PADDED ? (Vec<R>)((Int)x & (Int)load(mask + column)) : x;
    }
};

// Z = tanh(H W + k vᵀ), H' = f H + (1 - f) Z, y = H'ᵀ q. Z and y are skipped when null.
template <class R, int VT, bool KEEP_Z, bool READ>
static INLINE void one_step(const Sizes<R, VT>& n, const R* __restrict H, const R* __restrict W, const R* __restrict q,
                            const R* __restrict k, const R* __restrict v, R f, R* __restrict next, R* __restrict Z,
                            R* __restrict y) {
    constexpr int L = LANES<R>;
    const int64_t V = n.V(), VP = n.VP();
    const R g = R(1) - f;
    in_column_tiles<R, VT>(VP, [&](auto cols, int64_t column) {
        constexpr int COLS = decltype(cols)::value;
        Vec<R> v_[COLS], out[COLS];
        for (int c = 0; c < COLS; ++c) v_[c] = load(v + column + c * L), out[c] = Vec<R>{};
        in_blocks<rows_for(COLS)>(n.K, [&](auto rows, int64_t row) {
            constexpr int ROWS = decltype(rows)::value;
            const R* h = H + row * VP;
            Vec<R> acc[ROWS][COLS];
            for (int r = 0; r < ROWS; ++r)
                for (int c = 0; c < COLS; ++c) acc[r][c] = k[row + r] * v_[c];
#pragma GCC unroll 4
            for (int64_t i = 0; i < V; ++i) {
                Vec<R> w[COLS];
                for (int c = 0; c < COLS; ++c) w[c] = load(W + i * VP + column + c * L);
                for (int r = 0; r < ROWS; ++r)
                    for (int c = 0; c < COLS; ++c) acc[r][c] += h[r * VP + i] * w[c];
            }
            Vec<R> sum[COLS];
            for (int r = 0; r < ROWS; ++r) {
                for (int c = 0; c < COLS; ++c) {
                    const int64_t at = r * VP + column + c * L;
                    const Vec<R> z = n.masked(tanh_<R>(acc[r][c]), column + c * L);
                    const Vec<R> new_h = f * load(h + at) + g * z;
                    store(next + row * VP + at, new_h);
                    if (KEEP_Z) store(Z + row * VP + at, z);
                    if (READ) sum[c] = r == 0 ? new_h * q[row] : sum[c] + new_h * q[row + r];
                }
            }
            if (READ)
                for (int c = 0; c < COLS; ++c) out[c] += sum[c];
        });
        if (READ)
            for (int c = 0; c < COLS; ++c) store(y + column + c * L, out[c]);
    });
}

// carry += dU Wᵀ, given WT = Wᵀ.
template <class R, int VT>
static INLINE void add_product(const Sizes<R, VT>& n, const R* __restrict dU, const R* __restrict WT,
                               R* __restrict carry) {
    constexpr int L = LANES<R>;
    const int64_t V = n.V(), VP = n.VP();
    in_column_tiles<R, VT>(VP, [&](auto cols, int64_t column) {
        constexpr int COLS = decltype(cols)::value;
        in_blocks<rows_for(COLS)>(n.K, [&](auto rows, int64_t row) {
            constexpr int ROWS = decltype(rows)::value;
            const R* u = dU + row * VP;
            R* out = carry + row * VP + column;
            // from zero: with f near 1, dU is far smaller than f D, and adding its products one by one to f D would
            // round at the size of f D every time
            Vec<R> acc[ROWS][COLS] = {};
#pragma GCC unroll 4
            for (int64_t j = 0; j < V; ++j) {
                Vec<R> w[COLS];
                for (int c = 0; c < COLS; ++c) w[c] = load(WT + j * VP + column + c * L);
                for (int r = 0; r < ROWS; ++r)
                    for (int c = 0; c < COLS; ++c) acc[r][c] += u[r * VP + j] * w[c];
            }
            for (int r = 0; r < ROWS; ++r)
                for (int c = 0; c < COLS; ++c) {
                    R* to = out + r * VP + c * L;
                    store(to, load(to) + acc[r][c]);
                }
        });
    });
}

// dW += Hᵀ dU over `rows` rows (all steps of a chunk at once: the accumulators stay in registers).
template <class R, int VT>
static INLINE void accumulate_dW(const Sizes<R, VT>& n, const R* __restrict H, const R* __restrict dU, int64_t rows,
                                 R* __restrict dW) {
    constexpr int L = LANES<R>;
    const int64_t VP = n.VP();
    const int64_t at_once = std::max<int64_t>(32, 16384 / (2 * VP * int64_t(sizeof(R))));  // both inputs fit in L1
    for (int64_t first = 0; first < rows; first += at_once) {
        const int64_t last = std::min(rows, first + at_once);
        in_column_tiles<R, VT>(VP, [&](auto cols, int64_t column) {
            constexpr int COLS = decltype(cols)::value;
            in_blocks<ACCUMULATORS / COLS>(n.V(), [&](auto block, int64_t i) {
                constexpr int I = decltype(block)::value;
                Vec<R> acc[I][COLS] = {};  // from zero: a sum in blocks errs less than one long running sum
                for (int64_t r = first; r < last; ++r) {
                    Vec<R> u[COLS];
                    for (int c = 0; c < COLS; ++c) u[c] = load(dU + r * VP + column + c * L);
                    for (int a = 0; a < I; ++a)
                        for (int c = 0; c < COLS; ++c) acc[a][c] += H[r * VP + i + a] * u[c];
                }
                for (int a = 0; a < I; ++a)
                    for (int c = 0; c < COLS; ++c) {
                        R* to = dW + (i + a) * VP + column + c * L;
                        store(to, load(to) + acc[a][c]);
                    }
            });
        });
    }
}

// The elementwise part of a reverse step, all sizes [K, VP]:
//     D = clip(carry) + q dyᵀ;  df = Σ D (H - Z) (left per lane);  dU = (1 - f) D (1 - Z²);  dv = dUᵀ k;  carry = f D
// dU replaces Z.
template <class R, int VT>
static INLINE void reverse_step(const Sizes<R, VT>& n, R* __restrict carry, const R* __restrict H,
                                R* __restrict Z_then_dU, const R* __restrict q, const R* __restrict k,
                                const R* __restrict dy, R f, R clip, R* __restrict df, R* __restrict dv) {
    constexpr int L = LANES<R>;
    const int64_t VP = n.VP();
    const R g = R(1) - f, floor = -clip;
    const Vec<R> hi = splat<R>(clip), lo = splat<R>(floor);
    Vec<R> df_[2] = {};
    for (int64_t c = 0; c < VP; c += L) {
        const Vec<R> dy_ = load(dy + c);
        Vec<R> dv_[2] = {};
        in_blocks<2>(n.K, [&](auto rows, int64_t row) {
            for (int r = 0; r < decltype(rows)::value; ++r) {
                const int64_t at = (row + r) * VP + c;
                Vec<R> D = load(carry + at);
                D = D > hi ? hi : D;  // comparisons are false for NaN, which goes on
                D = D < lo ? lo : D;
                D = n.masked(D + q[row + r] * dy_, c);
                const Vec<R> z = load(Z_then_dU + at);
                df_[r] += D * (load(H + at) - z);
                const Vec<R> dU = (g * D) * (R(1) - z * z);
                store(Z_then_dU + at, dU);
                dv_[r] += dU * k[row + r];
                store(carry + at, f * D);
            }
        });
        store(dv + c, dv_[0] + dv_[1]);
    }
    store(df, df_[0] + df_[1]);
}

// ------------------------------------------------------------------------------------------------- memory and layout

// 64-byte aligned and not initialised.
template <class R> class Buffer {
  public:
    explicit Buffer(int64_t size)
        : data_(static_cast<R*>(::operator new(std::max<int64_t>(size, 1) * sizeof(R), std::align_val_t{64}))) {}
    ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    R* get() const { return data_; }

  private:
    R* data_;
};

static int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// [rows, V] dense to and from [rows, VP] padded with zeros.
template <class R> static void pad_rows(const R* from, int64_t rows, int64_t V, int64_t VP, R* to) {
    for (int64_t r = 0; r < rows; ++r) {
        if (from) std::memcpy(to + r * VP, from + r * V, V * sizeof(R));
        const int64_t filled = from ? V : 0;
        std::memset(to + r * VP + filled, 0, (VP - filled) * sizeof(R));
    }
}
template <class R> static void unpad_rows(const R* from, int64_t rows, int64_t V, int64_t VP, R* to) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * V, from + r * VP, V * sizeof(R));
}

struct Span {  // where sequence s lies: x[b, start : end], and the checkpoint slot of its first chunk
    int64_t b, start, end, slot;
    int64_t length() const { return end - start; }
};

static Span span(const Args& a, int64_t s) {
    if (!a.bounds) return {s, 0, a.T, 0};
    return {0, a.bounds[s], a.bounds[s + 1], a.C ? a.bounds[s] / a.C + s : 0};
}

template <class R> static R* checkpoint(const Args& a, const Span& x, int64_t chunk, int64_t head) {
    return static_cast<R*>(a.checkpoints) + ((x.b * a.NC + x.slot + chunk) * a.N + head) * a.K * a.V;
}

static std::vector<int64_t> longest_first(const Args& a) {
    std::vector<int64_t> order(a.S);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t x, int64_t y) { return span(a, x).length() > span(a, y).length(); });
    return order;
}

static int threads_for(const Args& a, int64_t tasks) {
    const double multiplies = double(a.B) * a.T * a.N * a.K * a.V * a.V;
    if (multiplies < 1e5) return 1;  // waking a thread costs more than it saves
    return int(std::max<int64_t>(1, std::min(a.threads, tasks)));
}

static int thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// The weights of all heads, padded, and optionally transposed; and the mask of the lanes in use.
template <class R> struct Weights {
    int64_t VP;
    Buffer<R> W, WT, mask;
    Weights(const Args& a, bool transposed)
        : VP(round_up(a.V, LANES<R>)), W(a.Nw * a.V * VP), WT(transposed ? a.Nw * a.V * VP : 0), mask(VP) {
        const R* from = static_cast<const R*>(a.W);
        pad_rows(from, a.Nw * a.V, a.V, VP, W.get());
        if (transposed) {
            std::fill_n(WT.get(), a.Nw * a.V * VP, R(0));
            for (int64_t n = 0; n < a.Nw; ++n)
                for (int64_t i = 0; i < a.V; ++i)
                    for (int64_t j = 0; j < a.V; ++j)
                        WT.get()[(n * a.V + j) * VP + i] = from[(n * a.V + i) * a.V + j];
        }
        std::memset(mask.get(), 0, VP * sizeof(R));
        std::memset(mask.get(), 0xff, a.V * sizeof(R));
    }
};

// ----------------------------------------------------------------------------------------------------------- forward

template <class R, int VT> static void forward(const Args& a) {
    const Weights<R> weights(a, false);
    const int64_t K = a.K, V = a.V, VP = weights.VP, KP = round_up(K, LANES<R>), N = a.N, tasks = a.S * N;
    const Sizes<R, VT> n{K, V, VP, weights.mask.get()};
    const int threads = threads_for(a, tasks);
    const int64_t scratch_size = 2 * K * VP + 2 * KP + 2 * VP;
    const Buffer<R> all_scratch(threads * scratch_size);
    const std::vector<int64_t> order = longest_first(a);

#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t s = order[task / N], head = task % N;
        const Span x = span(a, s);
        R* H = all_scratch.get() + thread_number() * scratch_size;
        R* next = H + K * VP;
        R *q = next + K * VP, *k = q + KP, *v = k + KP, *y = v + VP;
        std::fill_n(v, VP, R(0));
        const R* W = weights.W.get() + head / (N / a.Nw) * V * VP;
        const int64_t q_head = head / (N / a.q.heads), k_head = head / (N / a.k.heads);
        const int64_t v_head = head / (N / a.v.heads), f_head = head / (N / a.f.heads);
        const int64_t state_at = (s * N + head) * K * V;
        pad_rows(a.initial ? static_cast<const R*>(a.initial) + state_at : nullptr, K, V, VP, H);
        for (int64_t t = x.start; t < x.end; ++t) {
            if (a.C && (t - x.start) % a.C == 0)
                unpad_rows(H, K, V, VP, checkpoint<R>(a, x, (t - x.start) / a.C, head));
            R f;
            load_row(a.q, x.b, t, q_head, K, q);
            load_row(a.k, x.b, t, k_head, K, k);
            load_row(a.v, x.b, t, v_head, V, v);
            load_row(a.f, x.b, t, f_head, 1, &f);
            one_step<R, VT, false, true>(n, H, W, q, k, v, f, next, nullptr, y);
            store_row(a.y, x.b, t, head, V, y);
            std::swap(H, next);
        }
        unpad_rows(H, K, V, VP, static_cast<R*>(a.final_state) + state_at);
    }
}

// ---------------------------------------------------------------------------------------------------------- backward
//
// Sequences are dealt to G "lanes"; a lane walks its sequences one after the other, each from its last chunk to its
// first. A task is one chunk of one (lane, head). dW is summed per (lane, head) in that fixed order and over lanes, then
// heads, at the end: G bounds the memory, whatever the number of sequences.
//
// When heads share q, k, v or f, their contributions to its gradient meet in partials of one chunk per (lane, head),
// [G, N, C, K or V]: all tasks walk one chunk, wait for each other, and add up the heads in ascending order. Nothing is
// ever as large as T times heads. Without sharing the gradients go straight to their place and nobody waits.

struct Chunk { int64_t s, index; };

template <class R, int VT> class Backward {
    static constexpr int L = LANES<R>;
    const Args& a;
    const int64_t K, V, N, KP, VP, G, C;
    const Weights<R> weights;
    const Sizes<R, VT> n;
    const bool share_q, share_k, share_v, share_f;
    const int threads;
    const int64_t scratch_size;
    const Buffer<R> scratch, carry, dW, part_q, part_k, part_v, part_f;
    std::vector<std::vector<Chunk>> lanes;

    static int64_t longest(const Args& a) {
        int64_t most = 1;
        for (int64_t s = 0; s < a.S; ++s) most = std::max(most, span(a, s).length());
        return most;
    }

  public:
    explicit Backward(const Args& a)
        : a(a), K(a.K), V(a.V), N(a.N), KP(round_up(K, L)), VP(round_up(V, L)),
          G(std::max<int64_t>(1, std::min(a.S, (256 + N - 1) / N))), C(std::min(a.C, longest(a))), weights(a, true),
          n{K, V, VP, weights.mask.get()}, share_q(a.q.heads < N), share_k(a.k.heads < N), share_v(a.v.heads < N),
          share_f(a.f.heads < N), threads(threads_for(a, G * N)),
          // H before every step and after the last, Z, and rows of every step: k, q [KP]; v, dy, dv [VP]; df [L]; f
          scratch_size(round_up((2 * C + 1) * K * VP + C * (2 * KP + 2 * VP + L + 1) + VP + KP + L, L)),
          scratch(threads * scratch_size), carry(G * N * K * VP), dW(G * N * V * VP),
          part_q(share_q ? G * N * C * KP : 0), part_k(share_k ? G * N * C * KP : 0),
          part_v(share_v ? G * N * C * VP : 0), part_f(share_f ? G * N * C : 0), lanes(G) {
        std::fill_n(dW.get(), G * N * V * VP, R(0));
        std::vector<int64_t> load(G, 0);
        for (int64_t s : longest_first(a)) {  // to the lane with the least to do
            const int64_t chunks = (span(a, s).length() + a.C - 1) / a.C;
            const int64_t lane = std::min_element(load.begin(), load.end()) - load.begin();
            load[lane] += chunks;
            for (int64_t i = chunks; i-- > 0;) lanes[lane].push_back({s, i});
        }
    }

    void run() {
        const int64_t state = N * K * V;
        for (int64_t s = 0; s < a.S; ++s) {  // no step: the gradient passes through
            if (span(a, s).length() > 0) continue;
            R* to = static_cast<R*>(a.dinitial) + s * state;
            if (a.dfinal) std::copy_n(static_cast<const R*>(a.dfinal) + s * state, state, to);
            else std::fill_n(to, state, R(0));
        }
        size_t waves = 0;
        for (const auto& lane : lanes) waves = std::max(waves, lane.size());
        const bool shared = share_q || share_k || share_v || share_f;
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            if (!shared) {
#pragma omp for schedule(dynamic, 1)
                for (int64_t task = 0; task < G * N; ++task)
                    for (const Chunk& chunk : lanes[task / N]) walk(task, chunk);
            } else {
                for (size_t wave = 0; wave < waves; ++wave) {
#pragma omp for schedule(dynamic, 1)
                    for (int64_t task = 0; task < G * N; ++task)
                        if (wave < lanes[task / N].size()) walk(task, lanes[task / N][wave]);
#pragma omp for schedule(static)
                    for (int64_t i = 0; i < G * C; ++i)
                        if (wave < lanes[i / C].size()) add_heads(i / C, i % C, lanes[i / C][wave]);
                }
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < a.Nw * V; ++i) add_dW(i / V, i % V);
        }
    }

  private:
    // One chunk of one head: states again from the checkpoint, then the reverse sweep, then dW.
    void walk(int64_t task, const Chunk& chunk) {
        const int64_t lane = task / N, head = task % N, size = K * VP, state_at = (chunk.s * N + head) * K * V;
        const Span x = span(a, chunk.s);
        const int64_t first = x.start + chunk.index * a.C, steps = std::min(a.C, x.end - first);
        const R* W = weights.W.get() + head / (N / a.Nw) * V * VP;
        const R* WT = weights.WT.get() + head / (N / a.Nw) * V * VP;
        R* carry_ = carry.get() + task * size;

        R* H = scratch.get() + thread_number() * scratch_size;
        R* Z = H + (C + 1) * size;
        R *k = Z + C * size, *v = k + C * KP, *q = v + C * VP, *dy = q + C * KP, *df = dy + C * VP;
        R *dv = df + C * L + L, *row = dv + VP, *f = row + KP;
        std::fill_n(v, C * VP, R(0));   // the padding has to be zero
        std::fill_n(dy, C * VP, R(0));  // and so is dy when there is none

        pad_rows(checkpoint<R>(a, x, chunk.index, head), K, V, VP, H);
        for (int64_t i = 0; i < steps; ++i) {
            const int64_t t = first + i;
            load_row(a.q, x.b, t, head / (N / a.q.heads), K, q + i * KP);
            load_row(a.k, x.b, t, head / (N / a.k.heads), K, k + i * KP);
            load_row(a.v, x.b, t, head / (N / a.v.heads), V, v + i * VP);
            load_row(a.f, x.b, t, head / (N / a.f.heads), 1, f + i);
            if (a.y.data) load_row(a.y, x.b, t, head, V, dy + i * VP);
            one_step<R, VT, true, false>(n, H + i * size, W, nullptr, k + i * KP, v + i * VP, f[i], H + (i + 1) * size,
                                         Z + i * size, nullptr);
            R* dq = share_q ? part_q.get() + (task * C + i) * KP : row;
            row_dots(H + (i + 1) * size, dy + i * VP, K, VP, dq);
            if (!share_q) store_row(a.dq, x.b, t, head, K, dq);
        }

        if (x.end == first + steps)
            pad_rows(a.dfinal ? static_cast<const R*>(a.dfinal) + state_at : nullptr, K, V, VP, carry_);
        for (int64_t i = steps; i-- > 0;) {
            const int64_t t = first + i;
            R* dU = Z + i * size;
            R* dv_ = share_v ? part_v.get() + (task * C + i) * VP : dv;
            R* dk = share_k ? part_k.get() + (task * C + i) * KP : row;
            reverse_step(n, carry_, H + i * size, dU, q + i * KP, k + i * KP, dy + i * VP, f[i], R(a.clip), df + i * L,
                         dv_);
            add_product(n, dU, WT, carry_);
            row_dots(dU, v + i * VP, K, VP, dk);
            if (!share_v) store_row(a.dv, x.b, t, head, V, dv_);
            if (!share_k) store_row(a.dk, x.b, t, head, K, dk);
        }
        accumulate_dW(n, H, Z, steps * K, dW.get() + (lane * N + head) * V * VP);

        for (int64_t i = 0; i < steps; i += L) {
            alignas(VECTOR_BYTES) R sums[L];
            store(sums, sum_lanes<R, L>([&](int l) { return load(df + std::min(i + l, steps - 1) * L); }, 0));
            for (int64_t l = 0; l < std::min<int64_t>(L, steps - i); ++l) {
                if (share_f) part_f.get()[task * C + i + l] = sums[l];
                else store_row(a.df, x.b, first + i + l, head, 1, sums + l);
            }
        }
        if (chunk.index == 0) unpad_rows(carry_, K, V, VP, static_cast<R*>(a.dinitial) + state_at);
    }

    // Step i of a lane's chunk: the heads that share an input, in ascending order.
    void add_heads(int64_t lane, int64_t i, const Chunk& chunk) const {
        const Span x = span(a, chunk.s);
        const int64_t t = x.start + chunk.index * a.C + i;
        if (t >= x.end) return;
        const auto add = [&](const Strided& out, const Buffer<R>& part, int64_t width, int64_t stride) {
            const int64_t group = N / out.heads;
            for (int64_t h = 0; h < out.heads; ++h) {
                R* sum = part.get() + ((lane * N + h * group) * C + i) * stride;  // the first head's place
                for (int64_t m = 1; m < group; ++m)
                    for (int64_t e = 0; e < width; ++e) sum[e] += sum[m * C * stride + e];
                store_row(out, x.b, t, h, width, sum);
            }
        };
        if (share_q) add(a.dq, part_q, K, KP);
        if (share_k) add(a.dk, part_k, K, KP);
        if (share_v) add(a.dv, part_v, V, VP);
        if (share_f) add(a.df, part_f, 1, 1);
    }

    // Row i of dW of a weight head: lanes inside heads, both in ascending order.
    void add_dW(int64_t weight_head, int64_t i) const {
        const int64_t group = N / a.Nw;
        R* out = static_cast<R*>(a.dW) + (weight_head * V + i) * V;
        std::fill_n(out, V, R(0));
        for (int64_t head = weight_head * group; head < (weight_head + 1) * group; ++head) {
            for (int64_t lane = 0; lane < G; ++lane) {
                const R* from = dW.get() + ((lane * N + head) * V + i) * VP;
                for (int64_t j = 0; j < V; ++j) out[j] += from[j];
            }
        }
    }
};

// ------------------------------------------------------------------------------------------------------ entry points

template <class R, int VT> struct RunForward { static void run(const Args& a) { forward<R, VT>(a); } };
template <class R, int VT> struct RunBackward { static void run(const Args& a) { Backward<R, VT>(a).run(); } };

// 0: done; 1: out of memory.
template <template <class, int> class Run> static int dispatch(const Args& a) {
    try {
        if (a.is_double) Run<double, 0>::run(a);
        else if (a.V == 16) Run<float, 16>::run(a);
        else if (a.V == 32) Run<float, 32>::run(a);
        else if (a.V == 64) Run<float, 64>::run(a);
        else Run<float, 0>::run(a);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

extern "C" {
// Changes with the layout of Args.
int m2rnn_args_size() { return int(sizeof(Args)); }
int m2rnn_forward(const Args* a) { return dispatch<RunForward>(*a); }
int m2rnn_backward(const Args* a) { return dispatch<RunBackward>(*a); }
// For tests of the approximation alone.
void m2rnn_tanh_f32(const float* x, float* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const Vec<float> z = tanh_<float>(splat<float>(x[i]));
        out[i] = z[0];
    }
}
void m2rnn_tanh_f64(const double* x, double* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const Vec<double> z = tanh_<double>(splat<double>(x[i]));
        out[i] = z[0];
    }
}
}
