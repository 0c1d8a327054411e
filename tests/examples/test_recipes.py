# SPDX-License-Identifier: Apache-2.0
"""The recipes of docs/reproduction.md: their parts, and every one of them run from end to end, much shortened."""

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module", autouse=True)
def _path():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def tracking(_path):
    import state_tracking

    return state_tracking


@pytest.fixture(scope="module")
def swap(_path):
    import layer_swap

    return layer_swap


@pytest.fixture(scope="module")
def long(_path):
    import long_context

    return long_context


# -- state tracking ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task, size", [("parity", 2), ("S3", 6), ("A5", 60), ("S5", 120)])
def test_running_products_are_those_of_permutations(tracking, task, size):
    table, elements = tracking.multiplication_table(task), tracking.permutations(task)
    assert len(elements) == len(set(elements)) == len(table) == size
    assert elements[0] == tuple(range(len(elements[0])))  # nothing moves
    words, products = tracking.word_problem(table, (3, 37), torch.Generator().manual_seed(0))
    for word, answer in zip(words.tolist(), products.tolist(), strict=True):
        places = elements[0]
        for letter, number in zip(word, answer, strict=True):
            places = tuple(elements[letter][p] for p in places)
            assert places == elements[number]
    assert words.max() < size
    assert tracking.word_problem(table, (9, 9), torch.Generator().manual_seed(0), 2)[0].max() < 2


def test_noise_disturbs_q_k_and_v_in_training_only(tracking):
    layer = tracking.MODELS[tracking.RECOMMENDED].make(tracking.WIDTH)
    x = torch.randn(2, 200, tracking.WIDTH)
    qkv, _, g = layer._project(x, pad=True)
    layer.noise, layer.noise_generator = 0.5, torch.Generator().manual_seed(0)
    noisy, _, same_g = layer.train()._project(x, pad=True)
    assert (noisy - qkv).std().item() == pytest.approx(0.5, rel=0.05)
    assert torch.equal(g, same_g)
    assert torch.equal(layer.eval()._project(x, pad=True)[0], qkv)


def test_exact_match_ends_at_the_first_wrong_product(tracking, monkeypatch):
    """A "model" that is right up to a place of its own in each sequence."""
    table = tracking.multiplication_table("S3")
    monkeypatch.setattr(tracking, "TEST_LENGTH", 128)
    monkeypatch.setattr(tracking, "LENGTHS", [1, 32, 64, 100, 128])

    def model(words):
        products = words[:, :1]
        for t in range(1, words.shape[1]):
            products = torch.cat([products, table[products[:, -1:], words[:, t : t + 1]]], 1)
        wrong = products.clone()
        wrong[0::4, 63] += 1  # one of four words is wrong at 64, and right again after
        return torch.nn.functional.one_hot(wrong % 6, 6)

    module = torch.nn.Module()
    module.forward = model
    got = tracking.test(module, tracking.Spec(lambda width: None), table, 40, torch.device("cpu"))
    assert got["exact"] == {1: 1.0, 32: 1.0, 64: 0.75, 100: 0.75, 128: 0.75}
    assert got["last"][128] == 1.0
    assert got["token"][128] == pytest.approx(1 - 0.25 / 128, abs=2e-4)


def test_training_goes_from_few_elements_to_all_and_from_short_words_to_long(tracking):
    for size in (2, 6, 60, 120):
        stages = tracking.stages(size)
        assert stages[-1] == (size, 16)
        assert stages == sorted(stages)
    lengths, shares = zip(*tracking.POLISHING, strict=True)
    assert lengths == tuple(sorted(lengths))
    assert shares == tuple(sorted(shares))
    assert (lengths[-1], shares[-1]) == (128, 1)


@pytest.mark.parametrize("name", ["m2rnn, for state tracking", "m2rnn, the paper's block"])
def test_models_are_the_layer_with_its_options(tracking, name):
    """The recipe's subclass adds nothing to the two main models: the library's layer gives the same numbers."""
    from m2rnn_compile.layers import M2RNN

    torch.manual_seed(0)
    ours = tracking.MODELS[name].make(tracking.WIDTH)
    options = tracking.TRACKING if "for state" in name else {}
    layer = M2RNN(tracking.WIDTH, **tracking.M2RNN_SIZES, **options)
    layer.load_state_dict(ours.state_dict())
    x = torch.randn(2, 9, tracking.WIDTH)
    assert torch.equal(ours(x), layer(x))


def test_every_model_learns_something_and_tells_no_future(tracking):
    words = torch.randint(0, 6, (2, 12))
    for name, spec in tracking.MODELS.items():
        model = tracking.Tracker(spec._replace(hardware_tanh=None), 6).eval()
        with torch.no_grad():
            short, whole = model(words[:, :7]), model(words)
        assert whole.shape == (2, 12, 6), name
        torch.testing.assert_close(whole[:, :7], short, rtol=1e-4, atol=1e-5, msg=name)


def test_a_trained_model_solves_parity_at_many_times_its_length(tracking, monkeypatch):
    """A small one, trained in a few seconds on words of 16 at most."""
    monkeypatch.setattr(tracking, "stages", lambda elements: [(2, 8), (2, 16)])
    monkeypatch.setattr(tracking, "TEST_LENGTH", 256)
    monkeypatch.setattr(tracking, "LENGTHS", [16, 128, 256, 512, 4096][:3])
    spec = tracking.MODELS["m2rnn, for state tracking"]
    training = tracking.Training(spec, "parity", tracking.Setting(400, 256, 10, 100), 0, torch.device("cpu"))
    for length in (8, 16):
        training.use(2, length)
        for _ in range(8):
            for _ in training.some_steps():
                pass
    assert training.right > 0.9
    got = tracking.test(training.model.eval(), spec, training.table, 40, torch.device("cpu"))
    assert got["token"][256] > 0.9


@pytest.mark.parametrize("task", ["parity", "S3", "A5", "S5"])
def test_one_layer_without_a_conv_can_solve_every_task_exactly(tracking, task):
    spec, table = tracking.MODELS[tracking.BY_HAND], tracking.multiplication_table(task)
    model = tracking.Tracker(spec, len(table)).eval()
    tracking.set_by_hand(model, task)
    got = tracking.test(model, spec, table, 4, torch.device("cpu"))
    assert got["exact"][1] == got["exact"][4096] == 1.0
    with torch.no_grad():
        model.blocks[0].sequence_mixer.state_weight[0, 0, 0] *= -1  # one weight of the AND for the first point
    assert tracking.test(model, spec, table, 4, torch.device("cpu"))["exact"][4096] == 0.0


# -- the swap and long context -----------------------------------------------------------------------------------------


def test_models_of_the_swap_have_the_same_size(swap):
    from m2rnn_compile.models import HybridLM

    for size in swap.SIZES.values():
        counts = {m: HybridLM(swap.config_of(m, size), device="meta").num_parameters() for m in swap.MODELS}
        assert all(0.97 * size.parameters < n <= 1.0 * size.parameters for n in counts.values()), counts
    pattern = swap.config_of("hybrid gated deltanet + 1 m2rnn", swap.SIZES["h200"]).pattern
    assert pattern == "MGGGAGGGGGGG"


def test_text_is_split_by_package_without_duplicates(swap, tmp_path, monkeypatch):
    rng = random.Random(0)
    for package in [f"package{i}" for i in range(60)]:
        folder = tmp_path / package
        folder.mkdir()
        (folder / "a.py").write_text("".join(rng.choice("abc ") for _ in range(400)) + package)
        (folder / "copied.py").write_text("x = 1\n" * 100)
        (folder / "binary.txt").write_bytes(b"\0" * 500)
    monkeypatch.setattr(swap.sysconfig, "get_path", lambda room: str(tmp_path if room == "stdlib" else "/nowhere"))
    data = swap.load_text(10**6, 10**6)
    packages = [{name.split("/")[0] for name in files} for files in (data.train_files, data.held_out_files)]
    assert all(packages)
    assert not packages[0] & packages[1]
    assert sum("copied" in name for name in data.train_files + data.held_out_files) == 1
    assert not any("binary" in name for name in data.train_files + data.held_out_files)
    assert swap.load_text(10**6, 10**6).fingerprint == data.fingerprint
    assert len(swap.load_text(2000, 10**6).train) <= 2000 + 10


def test_recall_asks_for_what_was_said(long):
    tokens, targets = long.recall(20, 5, 64, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert tokens.shape == targets.shape == (20, 74)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        said = {row[i]: row[i + 1] for i in range(0, 64, 2) if row[i] < long.KEYS}
        assert len(said) == 5
        assert [w for w in wanted if w != -100] == [said[row[i]] for i in range(64, 74, 2)]
        assert all(w == -100 for w in wanted[:64] + wanted[65::2])


def test_loss_by_position_is_that_of_the_model(long):
    from m2rnn_compile.models import HybridLM, LMConfig, M2RNNConfig

    model = HybridLM(LMConfig(256, 16, "M", 32, M2RNNConfig(num_heads=2, key_dim=4, value_dim=4))).eval()
    text = torch.randint(1, 256, (400,), dtype=torch.uint8)
    got = long.by_position(model, text, 8, 3, torch.device("cpu"))
    piece = torch.stack([text[i * 128 : i * 128 + 129].long() for i in range(3)])
    with torch.no_grad():
        bits = model.loss(piece[:, :-1], piece[:, 1:], reduction="none").mean(0) / torch.log(torch.tensor(2.0))
    assert got[2] == pytest.approx(float(bits[4:8].mean()), abs=1e-3)
    assert got[-1] == pytest.approx(float(bits[64:128].mean()), abs=1e-3)


# -- the programs ------------------------------------------------------------------------------------------------------


def run(recipe, *arguments):
    command = [sys.executable, str(EXAMPLES / f"{recipe}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_env(), timeout=300)


def _env():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    "recipe, options",
    [
        ("state_tracking", ["--only", "m2rnn", "--steps", 0.02]),
        ("layer_swap", ["--only", "^hybrid gated", "--seeds", 0, "--steps", 0.02]),
        ("long_context", ["--only", "^m2rnn", "--seeds", 0, "--steps", 0.02]),
    ],
)
def test_cpu_preset_shortened(recipe, options, tmp_path):
    out, picture = tmp_path / "record.jsonl", tmp_path / "plot.svg"
    plots = ["--plot", picture] if importlib.util.find_spec("matplotlib") else []
    done = run(recipe, "--preset", "cpu", "--out", out, *options, *plots)
    assert done.returncode == 0, done.stderr
    head, *rows, end = map(json.loads, out.read_text().splitlines())
    assert head["kind"] == f"reproduction-{recipe.replace('_', '-')}"
    assert head["preset"] == "cpu"
    assert rows
    assert end["end"]
    assert all({"model", "seed", "summary"} <= row.keys() for row in rows)
    assert not plots or picture.stat().st_size > 1000
    again = run(recipe, "--from-record", out)
    assert again.returncode == 0, again.stderr
    assert rows[0]["model"].split()[0] in again.stdout


@pytest.mark.parametrize("recipe", ["state_tracking", "layer_swap", "long_context"])
def test_help_names_the_presets(recipe):
    done = run(recipe, "--help")
    assert done.returncode == 0
    assert {"--preset", "cpu:", "h200:", "--seeds", "--plot"} <= set(re.findall(r"--\w+|\w[\w-]*:", done.stdout))


def test_records_in_the_repository_can_be_read(tracking):
    import recipes

    found = sorted((ROOT / "bench/results/reproduction").glob("*.jsonl"))
    assert found
    for path in found:
        head, rows = recipes.read_record(path)
        assert head["kind"].startswith("reproduction-"), path
        assert rows, path
