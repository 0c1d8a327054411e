// SPDX-License-Identifier: Apache-2.0
// The inference ops m2rnn::scan and m2rnn::step for processes without Python code of ours: an exported or AOTInductor
// program finds them after torch.ops.load_library (Python) or dlopen (C++). Schemas as in ops/scan.py and ops/step.py.
//
// The program was checked when it was exported; what can differ at run time are sizes that were dynamic, and those are
// checked here, for they become addresses.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <string_view>
#include <tuple>

#include "kernel.cpp"

namespace {

using at::Tensor;
using std::optional;

Strided strided(const Tensor& x) {
    static const auto code = [](at::ScalarType t) {
        switch (t) {
            case at::kFloat: return F32;
            case at::kDouble: return F64;
            case at::kBFloat16: return BF16;
            case at::kHalf: return F16;
            default: TORCH_CHECK(false, "m2rnn: inputs must be float32, float64, bfloat16 or float16, got ", t);
        }
    };
    TORCH_CHECK(x.device().is_cpu(), "m2rnn: this library runs on CPU tensors, got one on ", x.device());
    return {static_cast<char*>(x.data_ptr()), code(x.scalar_type()), x.size(2), x.stride(0), x.stride(1), x.stride(2),
            x.dim() == 4 ? x.stride(3) : 0};
}

std::tuple<Tensor, Tensor, Tensor> scan(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& f, const Tensor& W,
    const optional<Tensor>& initial_state, const optional<Tensor>& cu_seqlens, optional<double>, int64_t chunk,
    c10::string_view) {
    TORCH_CHECK(chunk == 0, "m2rnn: this library holds the forward pass only; export under torch.no_grad()");
    const int64_t B = v.size(0), T = v.size(1), K = q.size(3), V = v.size(3);
    for (const Tensor& x : {q, k, v, f})
        TORCH_CHECK(x.size(0) == B && x.size(1) == T, "m2rnn: q, k, v and f must agree in batch and time, got ",
                    x.sizes(), " beside ", v.sizes());
    TORCH_CHECK(k.size(3) == K && W.size(1) == V && W.size(2) == V, "m2rnn: sizes K and V do not agree");
    const auto wide = v.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const int64_t N = std::max({q.size(2), k.size(2), v.size(2), f.size(2), W.size(0)});
    for (int64_t heads : {q.size(2), k.size(2), v.size(2), f.size(2), W.size(0)})
        TORCH_CHECK(heads > 0 && N % heads == 0, "m2rnn: a head count of ", heads, " does not divide ", N);

    Args a{};
    a.q = strided(q), a.k = strided(k), a.v = strided(v), a.f = strided(f);
    a.B = B, a.T = T, a.S = B, a.N = N, a.Nw = W.size(0), a.K = K, a.V = V;
    a.threads = at::get_num_threads(), a.is_double = wide == at::kDouble;
    a.clip = std::numeric_limits<double>::infinity();
    Tensor bounds;
    if (cu_seqlens.has_value()) {
        bounds = cu_seqlens->to(at::kCPU, at::kLong).contiguous();
        const int64_t* at = bounds.data_ptr<int64_t>();
        a.S = bounds.numel() - 1;
        TORCH_CHECK(B == 1 && a.S >= 1 && at[0] == 0 && at[a.S] == T,
                    "m2rnn: cu_seqlens must run from 0 to T = ", T, ", with a batch of 1");
        for (int64_t s = 0; s < a.S; ++s) TORCH_CHECK(at[s] <= at[s + 1], "m2rnn: cu_seqlens must not decrease");
        a.bounds = at;
    }
    Tensor W_ = W.to(wide).contiguous(), initial;
    a.W = W_.data_ptr();
    if (initial_state.has_value()) {
        TORCH_CHECK(initial_state->sizes() == at::IntArrayRef({a.S, N, K, V}),
                    "m2rnn: initial_state must have shape [", a.S, ", ", N, ", ", K, ", ", V, "], got ",
                    initial_state->sizes());
        initial = initial_state->to(wide).contiguous();
        a.initial = initial.data_ptr();
    }
    Tensor y = at::empty({B, T, N, V}, v.options()), final_state = at::empty({a.S, N, K, V}, v.options().dtype(wide));
    Tensor checkpoints = at::empty({B, 0, N, K, V}, v.options().dtype(wide));
    a.y = strided(y), a.final_state = final_state.data_ptr(), a.checkpoints = checkpoints.data_ptr();
    TORCH_CHECK(m2rnn_forward(&a) == 0, "m2rnn: the kernel could not allocate its buffers");
    return {y, final_state, checkpoints};
}

std::tuple<Tensor, Tensor> step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& f, const Tensor& W,
                                const Tensor& initial_state, c10::string_view impl) {
    auto [y, state, _] = scan(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), f.unsqueeze(1), W, initial_state,
                              std::nullopt, std::nullopt, 0, impl);
    return {y.squeeze(1), state};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(m2rnn, m) {
    m.def(
        "scan(Tensor q, Tensor k, Tensor v, Tensor f, Tensor W, Tensor? initial_state, Tensor? cu_seqlens, "
        "float? state_grad_clip, int chunk, str impl) -> (Tensor, Tensor, Tensor)");
    m.def(
        "step(Tensor q, Tensor k, Tensor v, Tensor f, Tensor W, Tensor initial_state, str impl) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(m2rnn, CPU, m) {
    m.impl("scan", scan);
    m.impl("step", step);
}
