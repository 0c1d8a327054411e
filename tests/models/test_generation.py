# SPDX-License-Identifier: Apache-2.0
"""Generation equals the uncached forward, alone and batched."""

import dataclasses

import pytest
import torch

from m2rnn_compile.layers import select_rows
from m2rnn_compile.models import generate, left_pad, miniature, preset, sample, stream
from tests.layers.equations import assert_same
from tests.models.helpers import make_model


def uncached_argmax(model, prompt, new):
    x = prompt
    with torch.no_grad():
        for _ in range(new):
            x = torch.cat([x, model(x)[:, -1].argmax(-1, keepdim=True)], 1)
    return x


KINDS = {"G": "GAG", "2": "2A", "R": "RA", "U": "UA", "MGA": "MGA", "MoE": "MA"}


def model_of(kind):
    """A small model with that kind of layer, and so with that kind of cache."""
    config = miniature(preset("hybrid-gated-deltanet+5-7b" if kind == "MoE" else "hybrid-gated-deltanet+1-410m"))
    return make_model(dataclasses.replace(config, pattern=KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_cache_equals_the_uncached_forward(kind):
    model = model_of(kind)
    prompts = [torch.randint(0, 256, (n,)) for n in (70, 4)]
    padded, mask = left_pad(prompts)
    together = generate(model, padded, attention_mask=mask, max_new_tokens=5, prefill_chunk=33)[:, 70:]
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row, uncached_argmax(model, prompt[None], 5)[0, len(prompt) :])
    assert len(set(together.flatten().tolist())) > 3, "a degenerate continuation would prove little"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_on_a_gpu(kind):
    model = model_of(kind).float().cuda()
    x = torch.randint(0, 256, (2, 40), device="cuda")
    with torch.inference_mode():
        cache, logits = model.init_cache(2), []
        for part in x.split([30, *[1] * 10], 1):
            out, cache = model(part, cache=cache)
            logits.append(out)
        expected = model(x)
    assert (torch.cat(logits, 1) - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("prefill_chunk", [None, 1, 3])
def test_greedy_equals_uncached_argmax(prefill_chunk):
    model, prompt = make_model(), torch.randint(0, 256, (2, 7))
    expected = uncached_argmax(model, prompt, 12)
    assert torch.equal(generate(model, prompt, max_new_tokens=12, prefill_chunk=prefill_chunk), expected)
    assert len(set(expected[0, 7:].tolist())) > 3, "a degenerate continuation would prove little"


def test_a_compiled_model_generates_the_same_tokens():
    """As the docstring of `stream` shows it: what torch.compile makes of a module has no truth value of its own."""
    model, prompt = make_model(), torch.randint(0, 256, (2, 7))
    compiled = torch.compile(model, backend="eager")
    got = generate(model, prompt, max_new_tokens=3, forward=compiled)
    assert torch.equal(got, generate(model, prompt, max_new_tokens=3))


@pytest.mark.parametrize("T", [1, 7])
def test_a_prefill_without_padding_attends_as_the_uncached_forward_does(monkeypatch, T):
    """Causal attention needs no [B, 1, T, T] mask while the cache is empty: SDPA's own causal path does."""
    model, prompt = make_model(), torch.randint(0, 256, (2, T))
    masks = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask, is_causal, **options):
        masks.append((attn_mask, is_causal))
        return attend(*args, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with torch.no_grad():
        expected = model(prompt)
        logits, cache = model(prompt, cache=model.init_cache(2))
        assert masks == [(None, True)] * 2
        assert_same(logits, expected)
        token = torch.randint(0, 256, (2, 1))
        again, _ = model(token, cache=cache)
        assert masks[-1][0].shape == (2, 1, 1, T + 1)
        assert_same(again, model(torch.cat([prompt, token], 1))[:, -1:])
        _, cache = model(prompt, cache=model.init_cache(2), attention_mask=torch.ones(2, T))
        assert masks[-1][0].shape == (2, 1, T, T)


def test_left_padded_batch_equals_each_prompt_alone():
    model = make_model()
    prompts = [torch.randint(0, 256, (n,)) for n in (9, 4, 1)]
    padded, mask = left_pad(prompts)
    together = generate(model, padded, attention_mask=mask, max_new_tokens=8, prefill_chunk=4)[:, 9:]
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row, generate(model, prompt[None], max_new_tokens=8)[0, len(prompt) :])


def test_a_lost_cache_would_be_seen():
    model, prompt = make_model(), torch.randint(0, 256, (2, 7))

    def forgetful(x, *, cache, **options):
        logits, new = model(x, cache=cache, **options)
        return logits, (new[0]._replace(conv_state=torch.zeros_like(new[0].conv_state)), *new[1:])

    got = generate(model, prompt, max_new_tokens=12, forward=forgetful)
    assert not torch.equal(got, uncached_argmax(model, prompt, 12))


def test_reordered_cache_continues_the_chosen_rows():
    model, x = make_model(), torch.randint(0, 256, (3, 6))
    rows = torch.tensor([2, 0, 2])
    with torch.no_grad():
        _, cache = model(x, cache=model.init_cache(3))
        token = torch.randint(0, 256, (3, 1))
        got, _ = model(token, cache=select_rows(cache, rows))
        expected = model(torch.cat([x[rows], token], 1))[:, -1:]
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)


def test_stream_is_lazy_and_seeded():
    model, prompt = make_model(), torch.randint(0, 256, (1, 3))
    options = dict(max_new_tokens=10, temperature=1.0, top_k=50, top_p=0.9)
    a, b = (
        [int(t) for t in stream(model, prompt, **options, generator=torch.Generator().manual_seed(s))] for s in (1, 1)
    )
    c = [int(t) for t in stream(model, prompt, **options, generator=torch.Generator().manual_seed(2))]
    assert a == b != c
    first = next(stream(model, prompt, max_new_tokens=10))
    assert first.shape == (1,)
    assert not first.is_inference()


def test_rows_stop_at_their_end_token():
    model, prompt = make_model(), torch.randint(0, 256, (2, 3))
    free = generate(model, prompt, max_new_tokens=10)[:, 3:]
    eos = int(free[0, 2])
    out = generate(model, prompt, max_new_tokens=10, eos_id=eos)[:, 3:]
    first = (out[0] == eos).nonzero()[0, 0]
    assert (out[0, first:] == eos).all()
    assert torch.equal(out[0, : first + 1], free[0, : first + 1])


def test_sampling_filters():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(2000, 4)
    g = torch.Generator().manual_seed(0)
    assert set(sample(logits, temperature=1, top_k=2, generator=g).tolist()) == {0, 1}
    assert set(sample(logits, temperature=1, top_p=0.7, generator=g).tolist()) == {0, 1}
    assert set(sample(logits, temperature=1, top_p=0.81, generator=g).tolist()) == {0, 1, 2}
    assert set(sample(logits, temperature=1, top_p=1e-6, generator=g).tolist()) == {0}
    drawn = torch.bincount(sample(logits, temperature=1, generator=g), minlength=4) / 2000
    # five standard deviations of a frequency over 2000 draws
    assert (drawn - torch.tensor([0.5, 0.3, 0.15, 0.05])).abs().max() < 5 * 0.5 / 2000**0.5
    assert sample(logits).eq(0).all()


def test_top_k_keeps_exactly_k_of_equally_likely_tokens():
    """An untrained or a bf16 model often has ties: k stays the bound that was asked for."""
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]).expand(2000, 5)
    g = torch.Generator().manual_seed(0)
    for k in (1, 2, 4):
        drawn = set(sample(logits, temperature=1, top_k=k, generator=g).tolist())
        assert len(drawn) == k
        assert drawn <= ({1, 2, 3} if k < 4 else {0, 1, 2, 3})


def test_a_temperature_is_zero_or_a_number_that_fp32_can_divide_by():
    logits = torch.tensor([[3e3, -3e3, float("-inf"), 2e3]])
    for good in (0, 1.2e-38, 1e-30, 1e30):
        assert int(sample(logits, temperature=good)) in ({0} if good < 1 else {0, 1, 3})
    for bad in (float("nan"), float("inf"), 1e-320, -1e-320):
        with pytest.raises(ValueError, match=f"`temperature` must be 0 .greedy. or .* got {bad}"):
            sample(logits, temperature=bad)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("value", ["nan", "-inf", "inf"])
def test_logits_that_choose_no_token_are_refused_by_row(temperature, value):
    logits = torch.randn(4, 8)
    logits[1, 3] = float(value)
    logits[3] = float(value)
    options = dict(temperature=temperature, generator=torch.Generator().manual_seed(0))
    if value == "inf" and temperature == 0:  # the most likely token there is
        assert sample(logits)[1] == 3
        return
    rows = r"\[3\]" if value == "-inf" else r"\[1, 3\]"
    with pytest.raises(ValueError, match=rf"row\(s\) {rows} have no most likely token: their largest is {value}"):
        sample(logits, **options)
    assert sample(logits[::2], **options).shape == (2,)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_model_that_has_diverged_is_not_generated_from(temperature):
    model = make_model()
    with torch.no_grad():
        model.transformer.wte.weight[7] = float("nan")  # the head's too: every row's logits hold it
    with pytest.raises(ValueError, match=r"row\(s\) \[0, 1\] have no most likely token: their largest is nan"):
        generate(model, torch.zeros(2, 3, dtype=torch.int64), max_new_tokens=2, temperature=temperature)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_row_that_has_ended_may_turn_nan(temperature):
    model, prompt = make_model(), torch.randint(1, 256, (2, 5))
    steps = iter(range(4))

    def forward(tokens, **options):
        logits, cache = model(tokens, **options)
        logits[1, :, 0] = float("-inf")  # never ends
        logits[0] = float("-inf") if next(steps) == 0 else float("nan")
        logits[0, :, 0].clamp_(min=0)  # ends at once
        return logits, cache

    out = generate(model, prompt, forward=forward, max_new_tokens=4, temperature=temperature, eos_id=0)
    assert not out[0, 5:].any()
    assert out[1, 5:].all()
    if temperature == 0:
        assert torch.equal(out[1:], generate(model, prompt[1:], max_new_tokens=4))


def test_sample_under_vmap():
    logits = torch.randn(3, 2, 8)
    assert torch.equal(torch.vmap(sample)(logits), torch.stack([sample(row) for row in logits]))
    drawn = torch.vmap(lambda row: sample(row, temperature=1.0, top_k=1), randomness="different")(logits)
    assert torch.equal(drawn, logits.argmax(-1))


def test_errors():
    model = make_model()
    with pytest.raises(ValueError, match="T >= 1"):
        generate(model, torch.zeros(1, 0, dtype=torch.int64), max_new_tokens=1)
    with pytest.raises(ValueError, match="at least one prompt"):
        left_pad([])
    prompt = torch.zeros(2, 4, dtype=torch.int64)
    for mask, message in (
        (torch.ones(2, 6), r"must have the shape of `prompt`, \(2, 4\), got \(2, 6\)"),
        (torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), "ends in padding or has a gap"),
        (torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]), "ends in padding or has a gap"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, prompt, max_new_tokens=1, attention_mask=mask)
    for bad in (dict(temperature=-1), dict(temperature=1, top_k=0), dict(temperature=1, top_p=0.0)):
        with pytest.raises(ValueError, match=f"`{list(bad)[-1]}` must be"):
            sample(torch.zeros(1, 4), **bad)
