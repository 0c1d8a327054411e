# SPDX-License-Identifier: Apache-2.0
"""The same command line on a GPU: what only differs there (events, the allocator's figures, poisoned blocks)."""

import pytest
import torch

from bench import cli, files, memory

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "argv, modes",
    [
        (["op"], {"forward", "backward", "forward+backward"}),
        (["step"], {"inference"}),
        (["layer"], {"forward", "backward", "forward+backward"}),
        (["model", "--layers", "2"], {"train", "generate"}),
        (["check", "--clip", "1"], {"check"}),
    ],
)
def test_every_run_is_timed_and_passes_its_gate(argv, modes, tmp_path):
    path = tmp_path / "rows.jsonl"
    shape = ["--shape", "B2,T70,N4,K16,V16", "--dtype", "bf16", "--provider", "triton"]
    runs = [] if argv[0] == "check" else ["--runs", "3"]
    assert cli.main([*argv, *shape, *runs, "--out", str(path)]) == 0
    rows = files.read(path)
    assert {(row.provider, row.mode, row.status) for row in rows} == {("triton", mode, "ok") for mode in modes}
    if argv[0] == "op":
        assert all(row.peak_mib > 0 for row in rows)
        (forward,) = [row for row in rows if row.mode == "forward"]
        assert forward.kept_mib >= 2 * 70 * 4 * 16 * 2 / 2**20  # y at least


def test_memory_of_a_call_is_what_the_allocator_says():
    device = torch.device("cuda")
    x = torch.ones(2**20, device=device)
    assert memory.peak_bytes(lambda: x + 1 + 1, device) == 2 * x.nbytes
    assert memory.kept_bytes(lambda: x + 1 + 1, [x], device) == x.nbytes


def test_memory_that_a_call_forgets_to_write_holds_nans():
    device = torch.device("cuda")
    with memory.poisoned(device, 1 << 26):
        assert torch.empty(1 << 20, device=device).isnan().any()
