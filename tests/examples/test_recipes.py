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
        assert tracking.stages(size, at_once=True) == stages[-1:]
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
    layer = M2RNN(tracking.WIDTH, **tracking.M2RNN_SIZES | options)
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
    monkeypatch.setattr(tracking, "stages", lambda *_: [(2, 8), (2, 16)])
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


# Words in segments, the state carried. Rates of zero keep the weights, so that a forward can be made again.


def learned(tracking, rate=0.0, rows=24, **carry):
    """A model of S3 that has learned nothing, its optimizer ready for the second phase."""
    carry = dict(noise=0.0, relabel=True) | carry
    spec = tracking.MODELS[tracking.RECOMMENDED]._replace(carry=carry, learning_rate=rate)
    setting = tracking.Setting(25, 16 * rows, 10, 50)
    return tracking.Training(spec, "S3", setting, 0, torch.device("cpu"))


def carried_steps(phase, count):
    """Words read, products they stood at, whether they began and what was left of them, and what was right, by step."""
    import state_tracking

    for _ in range(count):
        words, products = state_tracking.word_problem(phase.table, tuple(phase.words.shape[1:]), phase.generator)
        before = phase.at.clone(), phase.fresh.clone(), phase.left.clone()
        yield words, *before, phase._learn(words, products)


def test_a_carried_state_is_that_of_the_whole_word(tracking):
    phase = learned(tracking).second_phase(0)
    assert isinstance(phase, tracking.Carried)
    steps = list(carried_steps(phase, 3))
    long = [row for row in range(24) if steps[0][3][row] >= 3]  # those whose first word has three segments
    assert len(long) == 18
    whole = torch.cat([words for words, *_ in steps], 1)[long]
    start = torch.full((len(long), 1), phase.model.start)
    with torch.no_grad():
        logits = phase.model(whole)
        block = phase.model.blocks[0]
        empty = block.sequence_mixer.init_cache(len(long))
        after = block(phase.model.embedding(torch.cat([start, whole], 1)), cache=empty).cache
    torch.testing.assert_close(phase.cache.state[long], after.state, rtol=1e-3, atol=1e-4)
    assert after.state.abs().mean() > 0.01
    assert not phase.cache.state.requires_grad
    # the targets of the third segment start from what the model itself said at the end of the second one
    assert torch.equal(steps[2][1][long], logits[:, 31].argmax(-1))
    said = logits[:, 32:].argmax(-1)
    target = steps[2][1][long]
    for t in range(16):
        target = phase.table[target, whole[:, 32 + t]]
        assert torch.equal(steps[2][4][long][:, t], said[:, t] == target)


def test_words_begin_and_end_at_different_steps_and_have_eight_segments(tracking):
    phase = learned(tracking).second_phase(0)
    fresh = torch.stack([step[2] for step in carried_steps(phase, 24)])
    for row in range(24):
        first = 1 + row % 8
        begun = {0, *range(first, 24, 8)}
        assert {i for i in range(24) if fresh[i, row]} == begun
    phase = learned(tracking).second_phase(0)
    at = torch.stack([step[1] for step in carried_steps(phase, 24)])
    assert not at[fresh].any()  # a word begins with the product that moves nothing
    assert at[~fresh].any()


def test_without_relabelling_a_wrong_word_ends_and_its_rest_has_no_loss(tracking):
    right = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]).bool()
    assert tracking.up_to_first_wrong(right).tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    phase = learned(tracking, relabel=False).second_phase(0)
    losses, update = [], phase._update
    phase._update = lambda loss: (losses.append(loss.item()), update(loss))
    (_, _, _, left, ok), (_, at, fresh, *_) = carried_steps(phase, 2)
    assert torch.equal(fresh, ~ok[:, -1] | (left == 1))
    assert fresh.any()
    assert not at[fresh].any()
    full = learned(tracking, relabel=True).second_phase(0)
    losses_full, update_full = [], full._update
    full._update = lambda loss: (losses_full.append(loss.item()), update_full(loss))
    list(carried_steps(full, 1))
    assert losses[0] < 0.5 * losses_full[0]  # the same words and weights; most products are wrong


def test_noise_on_the_state_comes_between_elements_and_follows_success(tracking):
    training = learned(tracking, noise=0.5, floor=0.1, most=0.6)
    cache = training.model.blocks[0].sequence_mixer.init_cache(500)
    seen, go_on = [], training.model.go_on
    training.model.go_on = lambda words, cache: (seen.append((words.shape[1], cache.state)), go_on(words, cache))[1]
    with torch.no_grad():
        training._go_on(torch.zeros(500, 8, dtype=torch.int64), cache, every=2)
    assert [length for length, _ in seen] == [2, 2, 2, 2]
    assert seen[0][1].std().item() == pytest.approx(0.5, rel=0.02)
    del training.model.go_on
    phase = training.second_phase(0)
    list(carried_steps(phase, 3))  # nothing is right
    assert phase.noise.item() == pytest.approx(0.5 * torch.e**-0.03)
    cache, said, right = phase.cache, phase.at.clone(), torch.ones(24, 16, dtype=torch.bool)
    for _ in range(5):
        phase._move(cache, said, right)
    assert phase.noise.item() == pytest.approx(0.5 * torch.e**0.02)
    for _ in range(30):
        phase._move(cache, said, right)
    assert phase.noise.item() == pytest.approx(0.6)  # never more than the most
    for _ in range(200):
        phase._move(cache, said, ~right)
    assert phase.noise.item() == pytest.approx(0.1)  # nor less than the floor


def test_a_step_with_carried_states_never_waits_for_its_device(tracking):
    """As a CUDA graph needs it: no value read, no tensor made from the host's, no shape that depends on values."""
    from torch.utils._python_dispatch import TorchDispatchMode

    forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "unique", "is_nonzero")

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(function.__name__.split(".")[0])
            if "index" in function.__name__:  # by a mask: a shape that depends on values
                masks.extend(x for x in args[1] or () if isinstance(x, torch.Tensor) and x.dtype == torch.bool)
            return function(*args, **kwargs or {})

    for carry in (dict(), dict(noise=0.1, floor=0.01, relabel=False)):
        names, masks = set(), []
        phase = learned(tracking, **carry).second_phase(0)
        phase.optimizer.step = lambda: None  # PyTorch's; the one for a GPU is `capturable`
        with Seen():
            phase._step()
        assert {"copy_", "masked_fill", "where"} <= names
        assert not names & set(forbidden), names & set(forbidden)
        assert not masks
        assert "randn" not in names


def test_the_second_phase_is_the_same_from_kept_weights(tracking, tmp_path):
    def end(training):
        phase = training.second_phase(3)
        for _ in phase.some_steps():
            pass
        return phase

    first = learned(tracking, rate=2e-3, rows=8, noise=0.1)
    for _ in first.some_steps():
        pass
    first.save(tmp_path / "weights.pt")
    again = learned(tracking, rate=2e-3, rows=8, noise=0.1)
    again.load(tmp_path / "weights.pt")
    before = first.model.head.weight.clone()
    ends = end(first), end(again)
    assert not torch.equal(ends[0].model.head.weight, before)
    for a, b in zip(ends[0].model.parameters(), ends[1].model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert ends[0].done == 25
    assert 0 <= ends[0].right <= 1


def test_models_whose_cache_is_not_all_are_polished(tracking):
    for name, spec in tracking.MODELS.items():
        mixer = tracking.Tracker(spec._replace(hardware_tanh=None), 6).blocks[0].sequence_mixer
        assert spec.carry is None or (mixer.cache_is_all and spec.layers == 1), name
    assert tracking.MODELS[tracking.PAPER].carry is not None
    assert tracking.carry_of(6).at_once
    assert not tracking.carry_of(120).at_once
    assert tracking.carry_of(120, relabel=True).relabel
    assert tracking.carry_of(6).noise == tracking.carry_of(120).noise > tracking.carry_of(120).floor


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
    task = long.Recall(1, keys=64, values=32, noise=16)
    tokens, targets = long.recall(task, 20, 5, 64, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert tokens.shape == targets.shape == (20, 74)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        said = {row[i]: row[i + 1] for i in range(0, 64, 2) if row[i] < 64}
        assert len(said) == 5
        assert all(64 <= value < 96 for value in said.values())
        assert all(96 <= row[i] < 112 for i in range(0, 64, 2) if row[i] not in said)
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
    assert head["threads"] == 1
    assert rows
    assert end["end"]
    assert all({"model", "seed", "summary"} <= row.keys() for row in rows)
    if recipe == "state_tracking":
        assert all(row["carry"]["relabel"] and row["second_steps"] == 25 for row in rows)
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
