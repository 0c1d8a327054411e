# SPDX-License-Identifier: Apache-2.0
"""The floors are those of the hardware facts; shapes are read as written."""

import pytest

from bench import floors
from bench.shapes import PRESETS, parse_shape


def forward_floor(shape, dtype="bfloat16"):
    return floors.floor_of(floors.scan_work(shape, dtype)["forward"], dtype, floors.H200)


def test_floors_of_shape_A_are_the_known_ones():
    floor = forward_floor(PRESETS["A"])
    assert round(floor.tanh, 2) == 0.67
    assert round(floor.matmul, 2) == 0.15
    assert round(floor.memory, 2) == 0.05
    assert 0.2 <= round(floor.sequential, 2) <= 0.3
    assert floor.bound == "tanh"
    assert floor.total == floor.tanh


def test_tanh_floor_counts_one_per_state_element_and_step():
    shape = PRESETS["A"]
    count = shape.B * shape.T * shape.N * shape.K * shape.V
    assert count == pytest.approx(2.8e9, rel=0.01)
    assert forward_floor(shape).tanh == pytest.approx(1e3 * count / (132 * 16 * 1.98e9))


def test_small_batches_are_bound_by_the_sequence():
    assert forward_floor(parse_shape("B1,T4096,N1,K16,V16")).bound == "sequential"


def test_forward_backward_is_the_sum_of_both_passes():
    work = floors.scan_work(PRESETS["D"], "bfloat16")
    ms = {mode: floors.floor_of_mode(work, "bfloat16", mode, floors.H200)[0] for mode in floors.MODES}
    assert ms["forward+backward"] == ms["forward"] + ms["backward"]
    assert ms["inference"] == ms["forward"] < ms["backward"]


def test_fp32_products_are_slower_than_half_ones():
    shape = PRESETS["D"]
    assert forward_floor(shape, "float32").matmul > 5 * forward_floor(shape, "bfloat16").matmul


def test_no_floor_is_guessed_for_an_unknown_card():
    assert floors.find_device("NVIDIA H200") is floors.H200
    assert floors.find_device("NVIDIA GeForce RTX 4090") is None
    assert floors.floor_of_mode(floors.scan_work(PRESETS["A"], "bfloat16"), "bfloat16", "forward", None) is None


def test_a_step_is_bound_by_reading_and_writing_the_state():
    shape = PRESETS["A"]
    work = floors.step_work(shape, "bfloat16")["forward"]
    state = 4 * shape.B * shape.N * shape.K * shape.V
    assert 2 * state < work.bytes < 2.2 * state
    assert floors.floor_of(work, "bfloat16", floors.H200).bound == "memory"


def test_the_host_has_a_floor_where_its_clock_is_known():
    host = floors.host(2)
    if host is None:
        pytest.skip("neither AVX2 nor AVX-512, or no clock in /proc/cpuinfo")
    assert host.tanh_per_s < host.fp32_flops
    assert floors.host(4).fp32_flops == pytest.approx(2 * host.fp32_flops)


def test_peers_are_sized_by_the_width_of_the_papers_models():
    assert {name: shape.width for name, shape in PRESETS.items()} == {
        "A": 1024, "B": 1536, "C": 1536, "D": 1024, "cpu": 128
    }  # fmt: skip
    assert PRESETS["B"].with_length(128).width == 1536


def test_notation_and_presets_agree():
    cpu, written = PRESETS["cpu"], parse_shape("B4,T512,N8,K32,V16")
    assert {**written.as_dict(), "name": "cpu"} == cpu.as_dict()
    assert str(parse_shape("B1,T2,N4,K8,V16,Nq2,Nw1")) == "B1 T2 N4 K8 V16 Nq2 Nw1"


@pytest.mark.parametrize(
    "text, message",
    [
        ("E", "expected a preset"),
        ("B4,T512", "N, K, V missing"),
        ("B4,B4,T5,N1,K1,V1", "given twice"),
        ("B0,T5,N1,K1,V1", "B must be at least 1"),
        ("B1,T5,N4,K1,V1,Nq3", "Nq must divide N = 4, got 3"),
        ("", "not a size"),
    ],
)
def test_bad_shapes_say_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        parse_shape(text)


def test_a_layer_adds_its_projections_to_the_work_of_its_mixer():
    shape = PRESETS["A"]
    mixer = floors.scan_work(shape, "bfloat16")
    tokens, weights = shape.B * shape.T, 10**6
    layer = floors.layer_work(mixer, tokens, 1024, weights, "bfloat16")
    assert layer["forward"].flops == mixer["forward"].flops + 2 * tokens * weights
    assert layer["forward"].tanh == mixer["forward"].tanh
    assert layer["forward"].bytes == 2 * (2 * tokens * 1024 + weights)
    assert layer["backward"].flops - mixer["backward"].flops == 4 * tokens * weights


def test_modes_of_a_model_have_work_of_their_own():
    one = floors.Work(1, 1, 1, 1)
    work = {"forward": one, "backward": one, "optimizer": one, "generate": one}
    counts = {mode: len(floors.work_of_mode(work, mode)) for mode in ("inference", "forward+backward", "train")}
    assert counts == {"inference": 1, "forward+backward": 2, "train": 3}
    assert floors.work_of_mode(work, "generate") == [one]
