"""The figures that `python -m bench model` computes from machine code, against figures found by hand."""

import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench.l2 import L2, interleaved, share_missed

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def figures():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parent)
    done = subprocess.run([sys.executable, HERE / "model_figures.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_loop_runs_as_often_as_its_arguments_say(figures):
    # 11 trips, each one load and one store of 16 bytes a thread, however ptxas unrolls them.
    assert figures["double"] == {"LDG": pytest.approx(11), "STG": pytest.approx(11)}


def test_bytes_waves_and_time_of_a_launch(figures):
    cost = figures["cost"]
    moved = 2 * 264 * 11 * 512 * 4  # every element read and written once
    assert cost["bytes"] == cost["asked_bytes"] == moved
    assert cost["programs"] == 264 and cost["waves"] == 1 and cost["programs_fit"] >= 2
    # Two programs on each multiprocessor; a warp has 512 bytes of one tile under way, or of as many as are unrolled.
    assert cost["in_flight_bytes"] % (2 * 4 * 512) == 0 and cost["in_flight_bytes"] > 0
    # One warp waits 600 ns for each of its tiles, unless they are loaded together.
    assert 600e-9 < cost["seconds"] < 11 * 700e-9 and cost["bound"] == "latency"


def test_a_loop_that_depends_on_data_is_an_error_that_names_it(figures):
    assert "chain_kernel" in figures["unknown"] and "while at > 0:" in figures["unknown"]


def test_programs_take_turns():
    assert list(interleaved([[1, 2, 3], [4], [5, 6]], 2)) == [1, 4, 2, 3, 5, 6]
    assert list(interleaved([[1, 2], [3, 4]], 1)) == [1, 2, 3, 4]
    assert list(interleaved([[1, 2], [3]], 9)) == [1, 3, 2]


def test_what_was_read_last_is_in_l2():
    l2 = L2(30)
    assert [l2.read(("k", tile), 10) for tile in (0, 1, 2, 0, 3, 0, 1)] == [
        False,
        False,
        False,
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("tokens, resident, left", [
    (32768, 1000, 1 - 25 / 64),  # 64 MiB of keys: the last 25 that the first pass reads are there
    (8192, 1000, 0.0),  # 16 MiB: all of them
    (32768, 128, 1 - 25 / 64),  # in waves the last programs are those that the second pass begins with
])  # fmt: skip
def test_the_second_pass_finds_the_end_of_the_first(tokens, resident, left):
    keys = SimpleNamespace(ptr=torch.empty(1, dtype=torch.bfloat16), width=SimpleNamespace(value=128))
    arguments = dict(keys=keys, splits=64, chunk=tokens // 64, S=tokens, BLOCK_S=32)
    first, second = (
        SimpleNamespace(kernel=kernel, programs=8 * 64, arguments=arguments)
        for kernel in ("partial_anchor_kernel", "keydiff_scores_kernel")
    )
    l2 = L2(25 << 20)
    assert share_missed(first, l2, resident) == 1.0
    assert share_missed(second, l2, resident) == pytest.approx(left, abs=0.01)
    forwards = L2(25 << 20)
    again = [share_missed(first, forwards, resident) for _ in range(2)]
    assert again == [
        1.0,
        1.0 if left else 0.0,
    ]  # forwards, the oldest tiles go just before they are asked for
    assert share_missed(SimpleNamespace(kernel="decode_run_kernel"), l2, resident) is None


def test_stages_of_keydiff_compact(figures):
    *stages, whole = figures["stages"]
    assert {stage["stage"] for stage in stages} == {"anchor", "score", "select", "move"} and whole["stage"] == "all"
    once = 8 * 4096 * 128 * 2  # K, and so V
    by_name = {stage["stage"]: stage for stage in stages}
    assert by_name["anchor"]["bytes"] == once  # nothing has read it before
    assert by_name["score"]["bytes"] == by_name["select"]["bytes"] == 0  # 8 MiB of keys are in L2 by then
    assert by_name["move"]["bytes"] == 1.5 * once  # half of V read, half of both written
    assert whole["floor_us"] == pytest.approx(4 * once / 3.0e12 * 1e6)
    for stage in stages:
        assert stage["computed_us"] > stage["launches"] >= 1  # a microsecond between launches
        assert stage["instructions"] > 0
    for key in ("bytes", "instructions", "launches", "computed_us"):
        assert whole[key] == pytest.approx(sum(stage[key] for stage in stages))


def test_decoding_over_unequal_heads_takes_no_longer_than_over_equal_ones(figures):
    """Eight heads, the longest with three times the mean."""
    equal, unequal = figures["decode"]
    assert unequal["bytes"] == pytest.approx(equal["bytes"], rel=1e-2)
    assert equal["floor_us"] < unequal["computed_us"] <= 1.1 * equal["computed_us"]


def test_a_slot_takes_the_next_program_when_it_is_done(figures):
    assert figures["ends"] == [3, 4, 5]


def test_programs_that_fit(figures):
    code = (
        "from bench.model import H100; print([H100.fit(4, 93, 2048), H100.fit(16, 128, 0), H100.fit(4, 32, 100 << 10)])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    # 96 registers × 32 lanes: five warps in each quarter of 16,384; 512 threads of 128 registers; 100 KiB of 228.
    assert json.loads(done.stdout) == [5, 1, 2]
