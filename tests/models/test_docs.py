# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/models.md run, one after the other, as they stand."""

import re
from pathlib import Path

import pytest

pytest.importorskip("safetensors")
pytest.importorskip("transformers", reason="needs transformers; pip install 'm2rnn-compile[hf]'")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")
TEXT = (Path(__file__).parents[2] / "docs/models.md").read_text()


def test_examples_run(tmp_path, capfd):
    names: dict = {}
    for code in re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL):
        exec(compile(code.replace("/tmp/", f"{tmp_path}/"), "docs/models.md", "exec"), names)
    out = capfd.readouterr().out
    assert "410191176" in out
    for line in ("layer 0: M²RNN -> Gated DeltaNet; pattern GMMMAMMM;", "GMAGGMAGGMAG"):
        assert line in out
        assert line in TEXT
