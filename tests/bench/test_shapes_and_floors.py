# SPDX-License-Identifier: Apache-2.0
"""The floors are those of the hardware facts; shapes are read as written."""

import pytest

from bench import floors
from bench.shapes import PRESETS, parse_shape


def test_floors_of_shape_A_are_the_known_ones():
    floor = floors.forward_floor(PRESETS["A"], "bfloat16")
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
    assert floors.forward_floor(shape, "bfloat16").tanh == pytest.approx(1e3 * count / (132 * 16 * 1.98e9))


def test_small_batches_are_bound_by_the_sequence():
    assert floors.forward_floor(parse_shape("B1,T4096,N1,K16,V16"), "bfloat16").bound == "sequential"


def test_forward_backward_is_the_sum_of_both_passes():
    shape = PRESETS["D"]
    both = floors.floor_of_pass(shape, "bfloat16", "forward+backward", floors.H200)
    forward, backward = floors.forward_floor(shape, "bfloat16"), floors.backward_floor(shape, "bfloat16")
    assert both is not None
    assert both[0] == forward.total + backward.total


def test_no_floor_is_guessed_for_an_unknown_card():
    assert floors.find_device("NVIDIA H200") is floors.H200
    assert floors.find_device("NVIDIA GeForce RTX 4090") is None
    assert floors.floor_of_pass(PRESETS["A"], "bfloat16", "forward", None) is None


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
