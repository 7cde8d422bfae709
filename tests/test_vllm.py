"""The vLLM plugin. The settings anywhere; a real engine (`make test-vllm`) with SmolLM2 where vLLM is installed."""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvevict.paged.tail import skip
from kvevict.vllm.settings import POLICIES, VARIABLE, Settings

ENGINE = pathlib.Path(__file__).with_name("vllm_engine.py")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")


@given(st.integers(0, 5000), st.integers(1, 2000), st.integers(0, 300), st.sampled_from([1, 16, 128]))
def test_skip_is_whole_blocks_and_leaves_the_budget(computed, budget, interval, block_size):
    gone = skip(computed, budget, interval, block_size)
    assert gone % block_size == 0 and 0 <= gone <= computed
    if computed <= budget + interval:
        assert gone == 0
    else:
        assert budget <= computed - gone < budget + block_size
    assert skip(computed + 1, budget, interval, block_size) >= gone
    assert skip(torch.tensor([computed]), budget, interval, block_size).tolist() == [gone]


def test_skip_by_hand():
    assert [skip(n, 100, 32, 16) for n in (0, 100, 131, 132, 133, 147, 148)] == [0, 0, 0, 0, 32, 32, 48]
    assert [skip(n, 100, 0, 1) for n in (99, 100, 101, 102)] == [0, 0, 1, 2]


def config(**changes):
    parallel = dict(pipeline_parallel_size=1, tensor_parallel_size=1, decode_context_parallel_size=1)
    plain = dict(additional_config={}, cache_config=SimpleNamespace(enable_prefix_caching=False),
                 speculative_config=None, kv_transfer_config=None,
                 parallel_config=SimpleNamespace(**(parallel | changes.pop("parallel", {}))))  # fmt: skip
    return SimpleNamespace(**(plain | changes))


def on(**settings):
    return dict(additional_config=dict(kvevict=dict(policy="keydiff", budget=256) | settings))


def test_settings_come_from_the_configuration_or_the_environment(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Settings.read(config()) is None
    assert Settings.read(config(**on(sink=2))) == Settings("keydiff", 256, sink=2)
    monkeypatch.setenv(VARIABLE, json.dumps(dict(policy="recency", budget=100, interval=0)))
    assert Settings.read(config()) == Settings("recency", 100, interval=0)
    assert Settings.read(config(**on())).policy == "keydiff"
    monkeypatch.setenv(VARIABLE, "keydiff")
    with pytest.raises(ValueError, match="KVEVICT_VLLM is 'keydiff': expected JSON"):
        Settings.read(config())
    assert Settings.read(config(**on(policy="tova"))).policy == "tova"  # without tensor parallelism
    assert Settings("tova", 50).build().protected == (4, 32) and "recommended" in POLICIES


@pytest.mark.parametrize(
    ("changes", "match"),
    [(on(policy="snapkv"), "policy is 'snapkv'"), (on(budget=0), "budget is 0"), (on(budget=20), "budget is 20"),
     (on(interval=-1), "interval is -1"), (on(keep=0.5), "kvevict is .*keep"),
     (dict(additional_config=dict(kvevict="keydiff")), "kvevict is 'keydiff'"),
     (on() | dict(speculative_config=object()), "no speculative decoding"),
     (on() | dict(kv_transfer_config=object()), "no KV transfer"),
     (on() | dict(parallel=dict(pipeline_parallel_size=2)), "pipeline_parallel_size=1"),
     (on() | dict(parallel=dict(decode_context_parallel_size=2)), "no context parallelism"),
     (on(policy="tova") | dict(parallel=dict(tensor_parallel_size=2)), "selects per head, not tova")],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_work_is_refused(changes, match, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ValueError, match=match):
        Settings.read(config(**changes))


def run(scenario, **environment):
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(ENGINE), json.dumps(scenario)], capture_output=True, text=True, env=plain | environment
    )


@functools.cache
def result(scenario, **environment):
    done = run(json.loads(scenario), **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


# A KV space for 6 requests of about 1,000 tokens and their answers, 9 blocks of 128 each, and 12 requests.
CROWD = dict(requests=12, engine=dict(num_gpu_blocks_override=55, max_num_batched_tokens=1024))
EVICTING = dict(policy="recommended", budget=256)


def crowd(kvevict=None, kind="answer", **environment):
    return result(json.dumps(CROWD | dict(kvevict=kvevict, kind=kind)), **environment)


@needs_vllm
def test_off_or_with_room_it_changes_nothing():
    without = crowd(VLLM_PLUGINS="none")  # vLLM does not even load the plugin
    assert all(without["hits"]) and without["most_running"] == 6
    for other in (crowd(), crowd(dict(policy="keydiff", budget=1800))):
        assert other["tokens"] == without["tokens"]
        assert other["most_used"] == without["most_used"] and other["preempted"] == 0


@needs_vllm
def test_twice_as_many_requests_fit_and_facts_survive_as_in_evicting_cache():
    evicting = crowd(EVICTING)
    assert evicting["most_running"] == 12 and evicting["preempted"] == 0
    assert evicting["free"] == evicting["total"] == 54
    # At rest a request holds 256 to 383 tokens: 2 whole blocks, and a partial one on either side of nothing.
    assert evicting["most_used"] <= 12 * 4
    assert crowd()["most_used"] == 6 * 8  # at least 8 blocks for each of the 6 that fit
    assert sum(evicting["hits"]) >= sum(crowd(EVICTING, kind="evicting_cache")["hits"])


@needs_vllm
def test_preempted_requests_begin_anew_and_finish():
    """Short prompts are let in together, and their answers outgrow the room before they are cut."""
    tight = dict(requests=6, tokens=110, new=400, kvevict=dict(policy="keydiff", budget=256),
                 engine=dict(num_gpu_blocks_override=14, max_num_batched_tokens=256))  # fmt: skip
    outcome = result(json.dumps(tight))
    assert outcome["preempted"] > 0 and outcome["free"] == outcome["total"] == 13
    assert [len(tokens) for tokens in outcome["tokens"]] == [400] * 6


@needs_vllm
def test_a_thousand_random_steps_lose_no_block():
    churn = dict(kind="churn", steps=1000, kvevict=dict(policy="keydiff", budget=128, interval=32),
                 engine=dict(num_gpu_blocks_override=30, max_num_batched_tokens=512))  # fmt: skip
    outcome = result(json.dumps(churn))
    assert outcome["free"] == outcome["total"] == 29
    assert min(outcome["added"], outcome["finished"], outcome["aborted"]) > 20


@needs_vllm
def test_prefix_caching_shares_blocks_and_changes_no_token(tmp_path):
    """vllm_engine checks after every step: exact references, no shared or cached block where a cut may write."""
    import vllm_tiny

    of = dict(kind="waves", model=str(vllm_tiny.save("llama", tmp_path)), kvevict=dict(policy="keydiff", budget=128))
    # Each prompt in one step: what a chunk ends with decides what is kept, and a hit moves where chunks end.
    whole = dict(max_num_batched_tokens=16384)
    outcomes = [result(json.dumps(of | dict(engine=whole | dict(enable_prefix_caching=on)))) for on in (False, True)]
    assert outcomes[0]["tokens"] == outcomes[1]["tokens"]
    assert outcomes[1]["scheduled"] < outcomes[0]["scheduled"]
    assert all(outcome["free"] == outcome["total"] for outcome in outcomes)


@needs_vllm
def test_the_granule_is_whole_blocks_of_the_scheduler_whatever_they_become():
    from kvevict.vllm.manager import EvictingSpec

    spec = EvictingSpec(block_size=16, num_kv_heads=1, head_size=32, dtype=torch.float32, budget=100, interval=40,
                        most_in_flight=1)  # fmt: skip
    assert spec.granule == spec.never_written == 48
    larger = spec.copy_with_new_block_size(64)
    assert larger.granule == 64
    smaller = larger.copy_with_new_block_size(16)  # the worker's kernels
    assert [smaller.skip(n) for n in (140, 163, 164, 228)] == [larger.skip(n) for n in (140, 163, 164, 228)]
    assert [larger.skip(n) for n in (140, 163, 164, 228)] == [0, 0, 64, 128]


@needs_vllm
@pytest.mark.parametrize(
    ("name", "match"),
    [("llama80", "the CPU backend stores keys for 'vec16': expected 'vec'"),
     ("gemma3n", "expected a layer with a cache of its own, not ")],
)  # fmt: skip
def test_a_model_that_cannot_be_served_is_refused_at_start(name, match, tmp_path):
    import vllm_tiny

    done = run(dict(kind="waves", model=str(vllm_tiny.save(name, tmp_path)), kvevict=EVICTING))
    assert done.returncode != 0 and match in done.stderr


@needs_vllm
def test_the_server_answers_the_openai_client(tmp_path):
    script = pathlib.Path(__file__).parent.parent / "bench/serve_vllm.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), "--requests", "4", "--out", str(tmp_path)], capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path / "serve_vllm.json").read_text())["rows"]
    assert [row["eviction"] for row in rows] == ["off", "recommended, budget 256"]
    assert rows[1]["most_blocks_used"] < rows[0]["most_blocks_used"]
    assert all(len(row["answers"]) == 4 for row in rows)
