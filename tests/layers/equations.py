# SPDX-License-Identifier: Apache-2.0
"""The layer once more, straight from the equations: loops over sequences and steps, torch's own conv1d, no shared code.

Slow on purpose and independent on purpose: nothing here calls into m2rnn_compile. In fp64 it is the oracle of the layer
tests, in fp32 the "careful eager run" that sets their tolerance.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer(
    params: dict[str, Tensor], x_BTD: Tensor, *, K: int, heads: dict[str, int], clip: float | None, lengths=None
) -> Tensor:
    """y of an M²RNN layer with state dict `params`; with `lengths`, x is [1, T, D] of sequences one after the other.

    heads: {"q", "k", "v", "f", "g", "w"} and N under "n".
    """
    if lengths is not None:
        parts = [part for part in x_BTD.split(list(lengths), 1) if part.shape[1]]
        return torch.cat([layer(params, part, K=K, heads=heads, clip=clip) for part in parts], 1)
    N, V = params["D"].shape
    B, T, _ = x_BTD.shape
    sizes = [heads["q"] * K, heads["k"] * K, heads["v"] * V, heads["f"], heads["g"] * V]
    q, k, v, x_f, g = (x_BTD @ params["input_projection.weight"].T).split(sizes, -1)
    conv_in = torch.cat([q, k, v], -1)
    if "conv1d.weight" in params:
        weight = params["conv1d.weight"]
        width = weight.shape[-1]
        conv_out = F.conv1d(conv_in.transpose(1, 2), weight, padding=width - 1, groups=weight.shape[0])[:, :, :T]
        q, k, v = F.silu(conv_out.transpose(1, 2)).split(sizes[:3], -1)
    f = torch.exp(-torch.exp(params["decay_gate.A_log"]) * F.softplus(x_f + params["decay_gate.dt_bias"]))

    def head(x: Tensor, count: int, n: int) -> Tensor:
        return x.unflatten(-1, (count, -1))[..., n // (N // count), :]

    columns = []
    for n in range(N):
        q_n, k_n, v_n = head(q, heads["q"], n), head(k, heads["k"], n), head(v, heads["v"], n)
        f_n, g_n = f[..., n // (N // heads["f"])], head(g, heads["g"], n)
        W = params["state_weight"][n // (N // heads["w"])]
        h = x_BTD.new_zeros(B, K, V)
        ys = []
        for t in range(T):
            z = torch.tanh(h @ W + k_n[:, t, :, None] * v_n[:, t, None, :])
            h = f_n[:, t, None, None] * h + (1 - f_n[:, t, None, None]) * z
            ys.append(torch.einsum("bkv,bk->bv", h, q_n[:, t]))
            if clip is not None and h.requires_grad:
                h = h.view_as(h)  # y_t read H_t above: only the carried gradient is clipped
                h.register_hook(lambda grad: grad.clamp(-clip, clip))
        y = torch.stack(ys, 1) if ys else x_BTD.new_zeros(B, 0, V)
        columns.append((y + params["D"][n] * v_n) * F.silu(g_n))
    o = torch.cat(columns, -1)
    o = o / torch.sqrt((o * o).mean(-1, keepdim=True) + 1e-5) * params["g_norm.weight"]
    return o @ params["output_projection.weight"].T


def run(module: torch.nn.Module, x: Tensor, dy: Tensor, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """y and the gradient of x and every parameter of `module`, by the equations in `dtype`."""
    params = {n: p.detach().to(dtype).requires_grad_() for n, p in module.named_parameters()}
    x = x.detach().to(dtype).requires_grad_()
    heads = dict(q=module.num_q_heads, k=module.num_k_heads, v=module.num_v_heads, f=module.num_f_heads)
    heads |= dict(g=module.num_g_heads, w=module.state_weight.shape[0])
    y = layer(params, x, K=module.key_dim, heads=heads, clip=module.state_grad_clip, **options)
    grads = torch.autograd.grad(y, [x, *params.values()], dy.to(dtype))
    return {"y": y.detach(), **dict(zip(["dx", *(f"d{n}" for n in params)], grads, strict=True))}


def run_module(module: torch.nn.Module, x: Tensor, dy: Tensor, **options) -> dict[str, Tensor]:
    """The same through `module` itself (or a compiled form of it)."""
    x = x.detach().requires_grad_()
    params = {n.removeprefix("_orig_mod."): p for n, p in module.named_parameters()}
    y = module(x, **options)
    grads = torch.autograd.grad(y, [x, *params.values()], dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(["dx", *(f"d{n}" for n in params)], grads, strict=True))}


def assert_same(
    got: dict[str, Tensor] | Tensor, expected: dict[str, Tensor] | Tensor, *, roundings: int = 1000
) -> None:
    """Equal up to `roundings` roundings of the dtype at the size of the largest element.

    For two orders of the same sums in the same dtype: a path of some tens of steps holds a few hundred roundings, and
    the gains along it are of order one.
    """
    if isinstance(got, Tensor):
        got, expected = {"result": got}, {"result": expected}
    assert got.keys() == expected.keys()
    for name, b in expected.items():
        a = got[name]
        assert a.shape == b.shape, f"{name}: {tuple(a.shape)} against {tuple(b.shape)}"
        if b.numel() == 0:
            continue
        a, b = a.detach(), b.detach()
        error, allowed = float((a - b).abs().max()), roundings * torch.finfo(b.dtype).eps * float(b.abs().max())
        assert error <= allowed, f"{name}: differs by {error:.3e}, allowed {allowed:.3e}"
