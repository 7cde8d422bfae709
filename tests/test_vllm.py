"""The vLLM plugin. The settings anywhere; a real engine (`make test-vllm`) with SmolLM2 where vLLM is installed."""

import functools
import importlib.util
import json
import multiprocessing
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
    plain = dict(additional_config={}, cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
                 speculative_config=None, kv_transfer_config=None, model_config=SimpleNamespace(is_mm_prefix_lm=False),
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
    assert Settings.read(config(**on(policy="tova"), parallel=dict(tensor_parallel_size=2))).policy == "tova"
    assert Settings("tova", 50).build().protected == (4, 32) and "recommended" in POLICIES


@pytest.mark.parametrize(
    ("changes", "match"),
    [(on(policy="lru"), "policy is 'lru'"), (on(policy="attention"), "policy is 'attention'"),
     (on(budget=0), "budget is 0"), (on(budget=20), "budget is 20"),
     (on(interval=-1), "interval is -1"), (on(keep=0.5), "kvevict is .*keep"),
     (dict(additional_config=dict(kvevict="keydiff")), "kvevict is 'keydiff'"),
     (on(prefix=-1), "prefix is -1"), (on(scorer="x"), "scorer is 'x': expected None"),
     (on() | dict(speculative_config=object()), "no speculative_config"),
     (on() | dict(kv_transfer_config=object()), "no kv_transfer_config"),
     (on() | dict(parallel=dict(pipeline_parallel_size=2)), "pipeline_parallel_size=1"),
     (on() | dict(parallel=dict(decode_context_parallel_size=2)), "decode_context_parallel_size=1"),
     (on() | dict(parallel=dict(use_ubatching=True)), "enable_dbo=False"),
     (on() | dict(cache_config=SimpleNamespace(kv_sharing_fast_prefill=True)), "kv_sharing_fast_prefill=False"),
     (on() | dict(model_config=SimpleNamespace(is_mm_prefix_lm=True)), "a model whose images")],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_work_is_refused(changes, match, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ValueError, match=match):
        Settings.read(config(**changes))


def test_a_process_that_vllm_started_ends_with_the_line_alone(monkeypatch):
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: 1)
    with pytest.raises(SystemExit, match="kvevict: budget is 0"):
        Settings.read(config(**on(budget=0)))


def test_without_vllm_the_plugin_says_so_in_a_line(monkeypatch):
    from kvevict.vllm import register

    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModuleNotFoundError, match="^kvevict.vllm needs vllm, the engine whose plugin it is$"):
        register()


def run(scenario, **environment):
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    plain["PYTHONPATH"] = str(ENGINE.parent)  # for vLLM's workers
    return subprocess.run(
        [sys.executable, str(ENGINE), json.dumps(scenario)], capture_output=True, text=True, env=plain | environment
    )


@functools.cache
def result(scenario, **environment):
    done = run(json.loads(scenario), **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Where a tiny model lies, by name."""
    folder = tmp_path_factory.mktemp("tiny")

    @functools.cache
    def saved(name):
        import vllm_tiny

        return str(vllm_tiny.save(name, folder))

    return saved


def waves(model, kvevict=None, engine=None, environment=None, **scenario):
    options = dict(max_num_batched_tokens=512) | (engine or {})
    given = dict(kind="waves", model=model, kvevict=kvevict, engine=options) | scenario
    outcome = result(json.dumps(given), **environment or {})
    assert outcome["free"] == outcome["total"] and outcome["preempted"] == 0
    return outcome


@needs_vllm
def test_off_or_with_room_it_changes_nothing(tiny):
    without = waves(tiny("llama"), environment=dict(VLLM_PLUGINS="none"))  # vLLM does not even load the plugin
    for other in (waves(tiny("llama")), waves(tiny("llama"), dict(policy="keydiff", budget=1800))):
        assert other["tokens"] == without["tokens"] and other["most_used"] == without["most_used"]


# A KV space for 6 requests of about 1,000 tokens and their answers, 9 blocks of 128 each, and 12 requests.
CROWD = dict(requests=12, engine=dict(num_gpu_blocks_override=55, max_num_batched_tokens=1024))
EVICTING = dict(policy="recommended", budget=256)


def crowd(kvevict=None, kind="answer"):
    return result(json.dumps(CROWD | dict(kvevict=kvevict, kind=kind)))


@needs_vllm
def test_twice_as_many_requests_fit_and_facts_survive_as_in_evicting_cache():
    without, evicting = crowd(), crowd(EVICTING)
    assert all(without["hits"]) and without["most_running"] == 6
    assert without["most_used"] == 6 * 8  # at least 8 blocks for each of the 6 that fit
    assert evicting["most_running"] == 12 and evicting["preempted"] == 0
    assert evicting["free"] == evicting["total"] == 54
    # At rest a request holds 256 to 383 tokens: 2 whole blocks, and a partial one on either side of nothing.
    assert evicting["most_used"] <= 12 * 4
    assert sum(evicting["hits"]) >= sum(crowd(EVICTING, kind="evicting_cache")["hits"])


@needs_vllm
def test_preempted_requests_begin_anew_and_finish(tiny):
    """Short prompts are let in together, and their answers outgrow the room before they are cut."""
    tight = dict(kind="outgrow", requests=6, tokens=110, new=400, kvevict=dict(policy="keydiff", budget=256),
                 model=tiny("llama"), engine=dict(num_gpu_blocks_override=14, max_num_batched_tokens=256))  # fmt: skip
    outcome = result(json.dumps(tight))
    assert outcome["preempted"] > 0 and outcome["free"] == outcome["total"] == 13
    assert outcome["lengths"] == [400] * 6


@needs_vllm
@pytest.mark.parametrize("prefix", [0, 100])
def test_a_thousand_random_steps_lose_no_block(tiny, prefix):
    churn = dict(kind="churn", steps=1000 if prefix == 0 else 200, model=tiny("llama"),
                 kvevict=dict(policy="keydiff", budget=128, interval=32, prefix=prefix),
                 engine=dict(num_gpu_blocks_override=30, max_num_batched_tokens=512,
                             enable_prefix_caching=True))  # fmt: skip
    outcome = result(json.dumps(churn))
    assert outcome["free"] == outcome["total"] == 29
    assert min(outcome["added"], outcome["finished"], outcome["aborted"]) > (20 if prefix == 0 else 3)


@needs_vllm
@pytest.mark.parametrize("prefix", [0, 200])
def test_prefix_caching_shares_blocks_and_changes_no_token(tiny, prefix):
    """vllm_engine checks after every step: exact references, no shared or cached block where a cut may write."""
    # Each prompt in one step: what a chunk ends with decides what is kept, and a hit moves where chunks end.
    outcomes = [
        waves(tiny("llama"), dict(policy="keydiff", budget=64, prefix=prefix, interval=0),
              dict(max_num_batched_tokens=16384, enable_prefix_caching=on))
        for on in (False, True)
    ]  # fmt: skip
    assert outcomes[0]["tokens"] == outcomes[1]["tokens"]
    # Of prompts with 300 tokens in common 2 blocks of 128 are, or what of them lies before a cut may write.
    saved = outcomes[0]["scheduled"] - outcomes[1]["scheduled"]
    assert saved == 28 * (128 if prefix == 0 else 256)


@needs_vllm
@pytest.mark.parametrize("policy", ["recommended", "snapkv", "learned", "keynorm"])
def test_many_requests_are_cut_as_each_alone(tiny, tmp_path, policy):
    """vllm_engine compares every cut of every layer, token by token, in prompts that are read in chunks."""
    settings = dict(policy=policy, budget=128, prefix=100 if policy != "recommended" else 0)
    if policy == "learned":
        from kvevict.policies import LearnedKV

        weights = torch.randn(4, 4, 68, generator=torch.Generator().manual_seed(0))
        LearnedKV(weights=weights, inv_freq=1e4 ** (-torch.arange(16) / 16)).save(tmp_path / "scorer")
        settings["scorer"] = str(tmp_path / "scorer")
    outcome = waves(tiny("llama"), settings, dict(max_num_batched_tokens=256, enable_prefix_caching=True), checked=True)
    assert outcome["cuts"] > 60
    assert max(map(int, outcome["queries"])) == (64 if policy == "snapkv" else 1)


@needs_vllm
@pytest.mark.parametrize(
    ("backend", "layout", "size"),
    [("FLASH_ATTN", "LBNHC", 16), ("FLASH_ATTN", "BLHNC", 32), ("TRITON_ATTN", "BLNHC", 32),
     ("TRITON_ATTN", "LBHNC", 16),
     ("FLASHINFER", "LBNHC", 16), ("FLASHINFER", "LBHNC", 32)],
)  # fmt: skip
def test_gpu_backends_with_faked_kernels_say_what_the_cpu_says(tiny, backend, layout, size):
    settings = dict(policy="recommended", budget=96, interval=32)
    expected = waves(tiny("llama"), settings, dict(block_size=32), requests=12)
    fake = dict(backend=backend, layout=layout)
    outcome = waves(tiny("llama"), settings, dict(block_size=size), requests=12, fake=fake, checked=True)
    assert outcome["tokens"] == expected["tokens"] and outcome["cuts"] > 60 and not outcome["wrong"]


@needs_vllm
def test_two_ranks_choose_what_one_does(tiny):
    """Of 20 requests, every layer's every cut, by hash."""
    of = dict(kind="traced", requests=20, model=tiny("llama"), kvevict=dict(policy="recommended", budget=128))
    one, two = (result(json.dumps(of | dict(engine=dict(tensor_parallel_size=ranks))),
                       VLLM_CPU_OMP_THREADS_BIND="nobind") for ranks in (1, 2))  # fmt: skip
    assert len(one["chosen"]) == 1 and len(two["chosen"]) == 2 and len(one["chosen"][0]) >= 4
    assert two["chosen"] == one["chosen"] * 2
    assert two["tokens"] == one["tokens"]


@needs_vllm
def test_the_granule_is_whole_blocks_of_the_scheduler_whatever_they_become():
    from kvevict.vllm.manager import EvictingSpec

    spec = EvictingSpec(block_size=16, num_kv_heads=1, head_size=32, dtype=torch.float32, policy="keydiff", budget=100,
                        interval=40, prefix=20, most_in_flight=1)  # fmt: skip
    assert spec.granule == 48 and spec.prefix == 32 and spec.never_written == 80
    larger = spec.copy_with_new_block_size(64)
    assert larger.granule == larger.prefix == 64
    smaller = larger.copy_with_new_block_size(16)  # the worker's kernels
    assert [smaller.skip(64 + n) for n in (140, 163, 164, 228)] == [larger.skip(64 + n) for n in (140, 163, 164, 228)]
    assert [larger.skip(64 + n) for n in (-64, 0, 140, 163, 164, 228)] == [0, 0, 0, 0, 64, 128]


@needs_vllm
@pytest.mark.parametrize("name", ["gemma4eq", "gemma3n"])
def test_hybrids_are_cut_once_where_their_caches_end(tiny, name):
    """Full-attention layers whose blocks vLLM enlarges; layers that share another layer's cache."""
    outcome = waves(tiny(name), EVICTING | dict(budget=128), checked=True)
    assert outcome["cuts"] > 30


@needs_vllm
@pytest.mark.parametrize(
    ("name", "match"),
    [("llama80", "the CPU backend stores keys for 'vec16': expected 'vec'"),
     ("sliding", "cannot evict in this model, none of whose layers has full attention")],
)  # fmt: skip
def test_a_model_that_cannot_be_served_is_refused_at_start(tiny, name, match):
    done = run(dict(kind="waves", model=tiny(name), kvevict=EVICTING))
    assert done.returncode != 0 and match in done.stderr


@needs_vllm
def test_other_backends_refuse(monkeypatch):
    from kvevict.vllm import refused

    monkeypatch.setattr(refused, "get_current_vllm_config", lambda: config(**on()))
    with pytest.raises(
        ValueError, match="cannot evict with attention_backend=FLEX_ATTENTION: expected one of CPU_ATTN"
    ):
        refused.FLEX_ATTENTION.get_impl_cls()()
    assert refused.FLEX_ATTENTION is refused.FLEX_ATTENTION and refused.FLEX_ATTENTION.get_name() == "FLEX_ATTENTION"
    assert refused.MAMBA2.get_builder_cls().__name__ == "Builder" and refused.TRITON_MLA.is_mla()
    assert refused.MAMBA2.full_cls_name() == ("kvevict.vllm.refused", "MAMBA2")
    with pytest.raises(AttributeError):
        _ = refused.CPU_ATTN


SERVE = pathlib.Path(__file__).parent.parent / "bench/serve_vllm.py"


@needs_vllm
def test_the_server_streams_aborts_and_is_empty_in_the_end(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SERVE), "--stream", "--requests", "8", "--out", str(tmp_path)],
                          capture_output=True, text=True, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["finished"] == 6 and told["aborted"] == 2 and told["usage"] == 0
    assert told["line"].count("kvevict evicts by recommended in 30 of 30 layers") == 1


@needs_vllm
def test_the_server_answers_the_openai_client(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SERVE), "--requests", "4", "--new", "16", "--out", str(tmp_path)],
                          capture_output=True, text=True, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path / "serve_vllm.json").read_text())["rows"]
    assert [row["eviction"] for row in rows] == ["off", "keydiff, budget 256", "recommended, budget 256"]
    for row in rows[1:]:
        assert row["most_blocks_used"] < rows[0]["most_blocks_used"] and 0 < row["eviction_share"] < 0.5
    assert all(len(row["answers"]) == 4 for row in rows)
