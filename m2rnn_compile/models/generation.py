# SPDX-License-Identifier: Apache-2.0
"""Generation with the cached decoder: prefill once, then one step a token; equal to the uncached forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..ops.library import functorch_active
from .lm import HybridLM

SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny


def left_pad(prompts: Sequence[Tensor], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Put prompts of different lengths into one batch, padded on the left.

    Args:
        prompts: one-dimensional int64 tensors, none empty.

    Returns:
        ``(tokens [B, T], attention_mask [B, T] bool)``, T being the longest prompt.

    Raises:
        ValueError: no prompts, or an empty one.
    """
    if not prompts or any(p.dim() != 1 or p.numel() == 0 for p in prompts):
        raise ValueError(
            "left_pad: needs at least one prompt, each a one-dimensional tensor of at least one token, got shapes "
            f"{[tuple(p.shape) for p in prompts]}; start an empty prompt with a begin-of-text token"
        )
    T = max(len(p) for p in prompts)
    tokens = prompts[0].new_full((len(prompts), T), pad_id)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, p in enumerate(prompts):
        tokens[row, T - len(p) :] = p
        mask[row, T - len(p) :] = True
    return tokens, mask


def sample(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token a row.

    Args:
        logits: ``[B, vocab]``.
        temperature: 0 takes the most likely token; else at least the smallest normal number of fp32.
        top_k: draw among the k most likely only; of equally likely ones, as many as fit into k.
        top_p: draw among the fewest most likely tokens whose probabilities add up to at least p.
        generator: source of randomness, on the logits' device.

    Returns:
        int64 ``[B]``.

    Raises:
        ValueError: options out of range; or a row of logits has no most likely token: NaN, nothing above -inf, or, when
            drawing, inf. To look, the CPU waits for the device; so under torch.compile, inside of torch.vmap and while
            a CUDA graph is captured nobody looks.
    """
    if not (temperature == 0 or SMALLEST_TEMPERATURE <= temperature < math.inf):  # false for NaN
        raise ValueError(
            f"sample: `temperature` must be 0 (greedy) or a finite number of at least {SMALLEST_TEMPERATURE:.3g}, the "
            f"smallest of fp32, got {temperature}"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"sample: `top_k` must be at least 1, got {top_k}; None keeps all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"sample: `top_p` must be in (0, 1], got {top_p}; None keeps all tokens")
    top = logits.amax(-1, keepdim=True)
    _check_top(top.squeeze(-1), drawn=temperature != 0)
    if temperature == 0:
        return logits.argmax(-1)
    # From the largest down: dividing by a small temperature overflows towards -inf only, which is a probability of 0.
    logits = (logits.float() - top.float()) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, kept.indices, kept.values)
    if top_p is not None:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        drop = ordered.cumsum(-1) - ordered >= top_p  # the mass before a token: the first one always stays
        logits = logits.masked_fill(drop.scatter(-1, order, drop), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def _check_top(top_B: Tensor, *, drawn: bool) -> None:
    """Refuse rows whose largest logit, which is NaN if any is, chooses no token."""
    if torch.compiler.is_compiling() or functorch_active():
        return
    if top_B.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    bad = top_B.isnan() | (top_B == float("-inf")) | (top_B == float("inf") if drawn else False)
    if bool(bad.any()):
        rows = bad.nonzero()[:, 0].tolist()
        raise ValueError(
            f"sample: `logits` of row(s) {rows} have no most likely token: their largest is {top_B[rows[0]].item()}; "
            "check the weights, which may have diverged, or for fp16 try bf16"
        )


def stream(
    model: HybridLM,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
    prefill_chunk: int | None = None,
    forward: Callable[..., tuple[Tensor, tuple]] | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every row, ``[B]`` int64, until `max_new_tokens` or until every row has met `eos_id`.

    Args:
        model: the language model.
        prompt: int64 ``[B, T]``, T >= 1; see `left_pad` for prompts of different lengths.
        attention_mask: ``[B, T]``, False on left padding.
        temperature, top_k, top_p, generator: see `sample`.
        eos_id: a row that has produced it yields it from then on, whatever its logits are.
        prefill_chunk: run the prompt through the model in pieces of this many tokens (bounds memory; same result).
        forward: called instead of `model`, for example ``torch.compile(model)``.

    Raises:
        ValueError: arguments that do not fit (at the first token).
    """
    if prompt.dim() != 2 or prompt.shape[1] == 0:
        raise ValueError(
            f"stream: `prompt` must be integers [B, T] with T >= 1, got shape {tuple(prompt.shape)}; "
            "start an empty prompt with a begin-of-text token"
        )
    if max_new_tokens < 0:
        raise ValueError(f"stream: `max_new_tokens` must be >= 0, got {max_new_tokens}")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ValueError(f"stream: `prefill_chunk` must be at least 1, got {prefill_chunk}")
    B, T = prompt.shape
    if attention_mask is not None:
        real = attention_mask.to(torch.bool)
        if real.shape != prompt.shape:
            raise ValueError(
                f"stream: `attention_mask` must have the shape of `prompt`, {tuple(prompt.shape)}, got "
                f"{tuple(real.shape)}"
            )
        if not bool(real[:, -1].all()) or bool((real[:, :-1] & ~real[:, 1:]).any()):
            raise ValueError(
                "stream: `attention_mask` must be False on padding at the left of each row and True from there to the "
                "end, but a row ends in padding or has a gap; see left_pad"
            )
    call = model if forward is None else forward
    cache = model.init_cache(B, device=prompt.device)
    done = torch.zeros(B, dtype=torch.bool, device=prompt.device)
    # inference_mode is entered around each call, not around the yields: the consumer's code runs outside of it.
    size = prefill_chunk or T
    logits = None
    for start in range(0, T, size):
        part = slice(start, start + size)
        mask = None if attention_mask is None else attention_mask[:, part]
        with torch.inference_mode():
            logits, cache = call(prompt[:, part], cache=cache, attention_mask=mask, logits_to_keep=1)
    for i in range(max_new_tokens):
        assert logits is not None
        with torch.inference_mode():
            last = logits[:, -1]
            if eos_id is not None:
                last = last.masked_fill(done[:, None], 0)  # NaN in a row that has ended is no reason to stop the others
            token = sample(last, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            if eos_id is not None:
                token = torch.where(done, eos_id, token)
                done = done | (token == eos_id)
        yield token.clone()  # an ordinary tensor outside of inference mode
        if i + 1 == max_new_tokens or (eos_id is not None and bool(done.all())):
            return
        with torch.inference_mode():
            logits, cache = call(token[:, None], cache=cache)


def generate(model: HybridLM, prompt: Tensor, *, max_new_tokens: int, **options: object) -> Tensor:
    """The prompt followed by up to `max_new_tokens` new tokens, int64 ``[B, T + new]``; options as in `stream`."""
    new = list(stream(model, prompt, max_new_tokens=max_new_tokens, **options))  # type: ignore[arg-type]
    return torch.cat([prompt, *(t[:, None] for t in new)], 1)
