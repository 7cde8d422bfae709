"""Eviction over the ranks of a process group: 2 and 4 gloo ranks against one process. distributed_ranks.py has them."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from distributed_ranks import RANKS, positions_of

from kvevict import distributed

SCRIPT = pathlib.Path(__file__).with_name("distributed_ranks.py")
ON_CPUS = {"KVEVICT_BACKEND": "reference", "TRITON_INTERPRET": "1", "GLOO_SOCKET_IFNAME": "lo"}
ON_BOTH = ["matrix", "cut_decode_cut", "mass", "rebalance", "collectives", "cuts_unlike_the_last"]
CHECKS = [
    *(f"{check}@{ranks}" for ranks in (2, 4) for check in ON_BOTH),
    "scores_with_ties_everywhere@4", "a_rank_without_tokens@4", "layers_in_one_call@4", "bad_input@4",
    "positions_on_request@4", "interpreted@2", "compiles_whole@2", "one_rank@2", "a_mesh_is_a_group@4",
    "group_is_one@4", "prompt_in_parts@2", "tensor_parallel@4", "tensor_parallel.py --tokens 300@2",
]  # fmt: skip


def run(checks, path, seconds, environment=ON_CPUS):
    """{check: None, or the error of the rank that was the first to fail}; what never ran is missing."""
    environment = {**os.environ, **environment}
    environment["PYTHONPATH"] = str(SCRIPT.parent.parent)
    command = [sys.executable, SCRIPT, *checks, path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {one["check"]: one["error"] for one in sorted(found, key=lambda one: one["error"] is not None)}, done.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run(CHECKS, tmp_path_factory.mktemp("ranks") / "store", 300)  # 30 on two idle cores


@pytest.mark.parametrize("check", CHECKS)
def test_ranks_agree_with_one_process(results, check):
    found, stderr = results
    assert check in found, f"did not run: {stderr[-3000:]}"
    assert found[check] is None, found[check]


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_on_gpus_agree_with_one_process(ranks, tmp_path):
    """Over NCCL; what is captured in a graph replays with equal bits."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    names = ["matrix", "cut_decode_cut", "mass", "rebalance", "scores_with_ties_everywhere", "graph"]
    checks = [f"{name}@{ranks}gpus" for name in names]
    found, stderr = run(checks, tmp_path / "store", 600, {"KVEVICT_BACKEND": "triton"})
    assert found == dict.fromkeys(checks), stderr[-3000:]


def test_ranks_agree_where_their_collectives_take_tensors(monkeypatch):
    """A group made without a backend, on a machine with GPUs."""
    monkeypatch.setattr(distributed.dist, "get_backend_config", lambda group: "cuda:nccl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert distributed._device_of(None) == torch.device("cuda", 1)
    monkeypatch.setattr(distributed.dist, "get_backend_config", lambda group: "cpu:gloo,cuda:gloo")
    assert distributed._device_of(None) == torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_case_of_the_matrix(ranks, tmp_path):
    found, stderr = run([f"matrix_whole@{ranks}"], tmp_path / "store", 1200)
    assert found == {f"matrix_whole@{ranks}": None}, stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("example", [
    "tensor_parallel.py@3", "context_parallel.py@2", "context_parallel.py --layout striped@4",
])  # fmt: skip
def test_examples_with_a_real_model(example, tmp_path):
    found, stderr = run([example], tmp_path / "store", 300)
    assert found == {example: None}, stderr[-3000:]


@pytest.mark.parametrize("layout, expected", [
    ("contiguous", [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]),
    ("zigzag", [[0, 1], [2, 3], [4, 5], [6, 7, 8, 9]]),
    ("striped", [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]),
])  # fmt: skip
def test_positions_by_hand(layout, expected):
    assert [positions_of(layout, 10, RANKS, rank).tolist() for rank in range(RANKS)] == expected


def test_positions_of_blocks_and_of_a_long_zigzag():
    assert positions_of("striped", 10, 2, 1, block=3).tolist() == [3, 4, 5, 9]
    assert positions_of("zigzag", 16, 2, 0).tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    every = torch.cat([positions_of("zigzag", 1001, 8, rank) for rank in range(8)])
    assert torch.equal(every.sort().values, torch.arange(1001))


@pytest.mark.parametrize("wrong, message", [
    (dict(layout="round"), "layout is 'round'"), (dict(rank=4), "rank is 4: expected at most 3"),
    (dict(tokens=0), "tokens is 0"), (dict(block=2), "block is 2: expected 1, because layout is 'zigzag'"),
])  # fmt: skip
def test_wrong_layouts_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        positions_of(**dict(layout="zigzag", tokens=10, ranks=4, rank=0) | wrong)
