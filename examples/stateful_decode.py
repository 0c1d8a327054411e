# SPDX-License-Identifier: Apache-2.0
"""Prefill a prompt, then decode one token at a time from a state of fixed size: python examples/stateful_decode.py"""

import torch

from m2rnn_compile.layers import select_rows
from m2rnn_compile.models import AttentionConfig, HybridLM, LMConfig, M2RNNConfig, generate

torch.manual_seed(0)
config = LMConfig(256, 64, "MMM", 128, M2RNNConfig(num_heads=4, key_dim=16), AttentionConfig(num_heads=4))
model = HybridLM(config).eval()
prompt = torch.randint(0, 256, (2, 50))

with torch.inference_mode():
    logits, cache = model(prompt, cache=model.init_cache(2))  # the cache is returned, never modified
    size = sum(x.numel() for layer in cache for x in layer) // 2
    tokens = []
    for _ in range(20):
        tokens.append(logits[:, -1].argmax(-1))
        logits, cache = model(tokens[-1][:, None], cache=cache)
    assert sum(x.numel() for layer in cache for x in layer) // 2 == size
    print(f"state of one sequence: {size:,} numbers, the same after 50 tokens and after 70")

    # The same without a cache, reading the whole text again for every token:
    text = prompt
    for _ in range(20):
        text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
print("cached and uncached agree:", torch.equal(torch.stack(tokens, 1), text[:, 50:]))
print("the same in one call:", torch.equal(generate(model, prompt, max_new_tokens=20), text))

swapped = select_rows(cache, torch.tensor([1, 0]))  # reorder or drop sequences of a batch, as beam search does
print("rows of a reordered cache:", swapped[0].state.shape[0])
