# SPDX-License-Identifier: Apache-2.0
"""What is timed is what is meant."""

import pytest
import torch

from bench import op
from m2rnn_compile import m2rnn
from m2rnn_compile.testing import make_inputs


@pytest.mark.parametrize("which", ["inference", "forward", "forward+backward"])
def test_a_pass_does_what_it_says(which):
    sets = [make_inputs(1, 4, 2, 3, 4, seed=seed, dfinal_state=False) for seed in range(2)]
    variant = op.make_variant(lambda **args: m2rnn(**args, impl="eager"), sets, which)
    result = variant(1)
    expected = m2rnn(*(getattr(sets[1], n) for n in "qkvfW"), impl="eager").y
    scan = result[0] if which == "forward+backward" else result
    assert torch.equal(scan.y, expected)
    assert scan.y.requires_grad == (which != "inference")
    if which == "forward+backward":
        assert [g.shape for g in result[1]] == [getattr(sets[1], n).shape for n in "qkvfW"]


@pytest.mark.parametrize("nbytes, copies", [(200 << 20, 2), (10 << 20, 10), (1, 16)])
def test_buffers_rotate_past_the_cache(nbytes, copies):
    assert op.rotations(nbytes, 50 << 20) == copies


def test_baselines():
    assert op.choose_baseline(None, ["triton", "xma"]) == "xma"
    assert op.choose_baseline(None, ["eager", "reference"]) == "reference"
    assert op.choose_baseline(None, ["cpp", "eager"]) == "cpp"
    assert op.choose_baseline("eager", ["cpp", "eager"]) == "eager"
    with pytest.raises(ValueError, match="not among"):
        op.choose_baseline("triton", ["cpp"])


@pytest.mark.gpu
def test_peak_memory_counts_what_a_call_adds():
    device = torch.device("cuda")
    held = torch.empty(8 << 20, dtype=torch.uint8, device=device)
    extra = op.peak_extra_bytes(lambda: torch.empty(4 << 20, dtype=torch.uint8, device=device), device)
    assert extra == 4 << 20
    del held
