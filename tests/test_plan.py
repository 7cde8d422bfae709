"""The planner: its figures against real caches, transformers' configurations, and sums done by hand."""

import json
import pathlib
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import kvevict
from kvevict import planner
from kvevict.models import Unavailable

GIB = 2**30


def test_llama_2_7b_at_128k_holds_2_gib_a_layer():
    """Not 4 GB a layer and 128 GB in all, as it is sometimes told: K and V of 32 heads of 128 in two bytes."""
    plan = kvevict.plan("llama-2-7b", context="128K", dtype="bf16")
    assert plan.layer_bytes == 2 * GIB and plan.cache_before == 64 * GIB
    assert plan.cache_after == 32 * GIB and plan.kept == 65536 and plan.bytes_per_token == 2**19
    assert kvevict.plan("llama-2-7b", context=131072, cache_dtype="fp8").cache_before == 32 * GIB
    assert kvevict.plan("llama-2-7b", context=131072, batch=4, keep=0.25).cache_after == 64 * GIB


@pytest.mark.parametrize(
    ("name", "preset"),
    [("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"), ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
     ("meta-llama/Llama-3.1-70B-Instruct", "llama-3.1-70b"), ("llama2-13b", "llama-2-13b"),
     ("Qwen/Qwen3-8B", "qwen3-8b"),
     ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"), ("mistralai/Mistral-7B-v0.1", "mistral-7b-v0.1"),
     ("google/gemma-3-27b-it", "gemma-3-27b"), ("deepseek-ai/DeepSeek-V3", "deepseek-v3"),
     ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"), ("openai/gpt-oss-20b", "gpt-oss-20b"),
     ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"), ("google/gemma-4-E4B-it", "gemma-4-e4b"),
     ("Qwen/Qwen3-235B-A22B", "qwen3-235b-a22b"), ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.1-70b")],
)  # fmt: skip
def test_presets_go_by_their_usual_names(name, preset):
    asked, known = kvevict.plan(name, context=1024), kvevict.plan(preset, context=1024)
    assert (asked.model, known.model) == (name, preset)
    assert f"shaped as the preset {preset}" in asked.notes
    assert replace(asked, model=preset, notes=known.notes) == known


def test_layers_of_every_kind():
    eight = kvevict.plan("llama-3-8b", context="8K")
    assert eight.cache_before == 8192 * 32 * 2 * 8 * 128 * 2 == GIB
    gemma = kvevict.plan("gemma-3-27b", context="32K", keep=0.5)
    token = 2 * 16 * 128 * 2
    assert gemma.layers == {"full": 10, "sliding": 52}
    assert gemma.cache_before == token * (10 * 32768 + 52 * 1024)
    assert gemma.cache_after == token * (10 * 16384 + 52 * 1024)
    assert gemma.bytes_per_token == 10 * token and gemma.window_bytes == 52 * 1024 * token
    four = kvevict.plan("gemma-4-31b", context="32K", keep=0.5)  # 10 layers of 4 heads of 512, 50 of 16 of 256
    assert four.cache_before == 2 * 2 * (10 * 32768 * 4 * 512 + 50 * 1024 * 16 * 256)
    assert four.bytes_per_token == 2 * 2 * 10 * 4 * 512 and four.limit == 2**18
    shared = kvevict.plan("gemma-4-e2b", context=1024)  # the last 20 of 35 read what others cached
    assert shared.layers == {"full": 3, "sliding": 12, "shared": 20}
    assert shared.cache_before == 2 * 2 * (3 * 1024 * 512 + 12 * 512 * 256)
    deepseek = kvevict.plan("deepseek-v3", context="32K")
    assert deepseek.cache_before == 61 * 32768 * (512 + 64) * 2
    assert any("MLA" in note for note in deepseek.notes)
    sliding = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=64, sliding_window=128)
    assert [layer.kind for layer in planner.model_layers(sliding)] == ["sliding"] * 2
    assert [layer.kind for layer in planner.model_layers(sliding | dict(use_sliding_window=False))] == ["full"] * 2
    mixed = sliding | dict(layer_types=["linear_attention", "full_attention"])
    assert [layer.kind for layer in planner.model_layers(mixed)] == ["none", "full"]


# In a process of its own: conftest's torch.empty would give the meta device memory.
COUNT = """
import json, transformers
from kvevict import planner
found = {}
for name, preset in planner.presets().items():
    options = {key: value for key, value in preset.items() if key not in ("model_type", "parameters")}
    config = transformers.AutoConfig.for_model(preset["model_type"], **options)
    same = planner.model_layers(preset) == planner.model_layers(config.to_dict())
    found[name] = planner._parameters(preset | dict(parameters=None)), same
print(json.dumps(found))
"""


def test_presets_are_what_transformers_builds():
    pytest.importorskip("transformers")
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found == {name: [preset["parameters"], True] for name, preset in planner.presets().items()}


HOSTILE = {
    "num_hidden_layers is None": dict(num_hidden_layers=None),
    "num_hidden_layers is 1000000000000": dict(num_hidden_layers=10**12),
    "num_attention_heads is 0": dict(num_attention_heads=0),
    "num_attention_heads is True": dict(num_attention_heads=True),
    "num_key_value_heads is -8": dict(num_key_value_heads=-8),
    "head_dim is 64.0": dict(head_dim=64.0),
    "hidden_size is many": dict(head_dim=None, hidden_size="many"),
    "sliding_window is []": dict(sliding_window=[]),
    "layer_types are full_attention": dict(layer_types="full_attention"),
    "expected 32 strings": dict(layer_types=["full_attention"]),
    "layer_types are [['x']": dict(layer_types=[["x"]] * 32),
    "qk_rope_head_dim is None": dict(kv_lora_rank=512),
    "kv_lora_rank is x": dict(kv_lora_rank="x"),
    "sliding_window_pattern is 0": dict(sliding_window=64, use_sliding_window=True, sliding_window_pattern=0),
    "parameters is lots": dict(parameters="lots"),
}


@pytest.mark.parametrize("match", HOSTILE)
def test_a_hostile_configuration_is_named(match, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(planner.presets()["llama-3-8b"] | HOSTILE[match]))
    with pytest.raises(ValueError, match=re.escape(match)):
        kvevict.plan(path)


def test_what_is_no_configuration_is_refused(tmp_path):
    path = tmp_path / "config.json"
    llama = planner.presets()["llama-3-8b"]
    for content in ("[]", "7", "null", '{"text_config": 3}', "{", "[" * 100_000, "\ud800", json.dumps(llama)[:-9]):
        path.write_text(content, errors="surrogatepass")
        with pytest.raises(Unavailable, match=f"the configuration {path}"):
            kvevict.plan(tmp_path)
    for model_type in (None, 3, "no such thing"):
        path.write_text(json.dumps(llama | dict(parameters=None, model_type=model_type)))
        with pytest.raises(Unavailable, match="cannot build the model to count its parameters: .{9,200}$"):
            kvevict.plan(path)
    odd = dict(quantization_config=["fp8"]), dict(quantization_config=dict(kv_cache_scheme=8, kv_cache_quant_algo=8))
    for config in odd:
        path.write_text(json.dumps(llama | config))
        assert kvevict.plan(path).cache_dtype == "bfloat16"


FAMILIES = {
    "llama": dict(model_type="llama"),
    "gemma3": dict(model_type="gemma3_text", sliding_window=64, head_dim=16, num_hidden_layers=6),
    "qwen3": dict(model_type="qwen3", head_dim=32),
    "gemma4": dict(model_type="gemma4_text", sliding_window=64, head_dim=16, global_head_dim=16, num_hidden_layers=6,
                   layer_types=["sliding_attention", "full_attention"] * 3, num_kv_shared_layers=2,
                   hidden_size_per_layer_input=8, vocab_size_per_layer_input=64),
    "deepseek_v3": dict(model_type="deepseek_v3", kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16,
                        v_head_dim=16, q_lora_rank=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
                        topk_group=1, moe_intermediate_size=32, num_key_value_heads=4),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_those_of_real_caches(family):
    transformers = pytest.importorskip("transformers")
    from kvevict.hf import EvictingCache

    options = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, pad_token_id=0) | FAMILIES[family]  # fmt: skip
    config = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    plan = kvevict.plan(config, context=200, batch=3, dtype="float32", keep=0.25)
    assert plan.weights == sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
    ids = torch.randint(1, 64, (3, 200))
    whole, cut = transformers.DynamicCache(config=config), EvictingCache(model, keep=0.25)
    with kvevict.backend("reference"):
        for cache in (whole, cut):
            model(ids, past_key_values=cache)
        report = cut.report()
    slack = sum(kind == "sliding" for kind in (layer.kind for layer in planner.model_layers(config.to_dict())))
    window_row = 3 * 2 * 2 * 16 * 4  # transformers keeps window - 1 tokens of a sliding layer between forwards
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in whole.layers if layer.keys is not None)
    assert plan.cache_before == held + slack * window_row
    assert sum(r.bytes for r in report) == plan.cache_after - (slack * 64 * window_row)
    assert len(report) == plan.layers["full"]


@torch.no_grad()
def test_bytes_where_full_layers_are_wider_and_share_less():
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        "gemma4_text", vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, global_head_dim=32, num_global_key_value_heads=1, attention_k_eq_v=True,
        layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=64, hidden_size_per_layer_input=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    whole = transformers.DynamicCache(config=config)
    model(torch.randint(1, 64, (3, 200)), past_key_values=whole)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in whole.layers)
    row_of_windows = 2 * 3 * 2 * 2 * 16 * 4  # transformers keeps window - 1 tokens
    assert kvevict.plan(config, context=200, batch=3, dtype="float32").cache_before == held + row_of_windows


def test_what_fits_is_the_most_that_fits():
    plan = kvevict.plan("llama-3-8b", context="32K", batch=2, gpu_memory="80GiB", keep=0.5)

    def used(context, batch, keep=None):
        kept = None if keep is None else int(keep * context + 0.5)
        layers = planner.model_layers(planner.presets()["llama-3-8b"])
        return plan.weights + planner.cache_bytes(layers, context, 2, batch, kept)

    memory = 80 * GIB
    for most, keep in ((plan.largest_context_before, None), (plan.largest_context_after, 0.5)):
        assert used(most, 2, keep) <= memory < used(most + 2, 2, keep)
    for most, keep in ((plan.largest_batch_before, None), (plan.largest_batch_after, 0.5)):
        assert used(32768, most, keep) <= memory < used(32768, most + 1, keep)
    assert plan.largest_batch_after >= 2 * plan.largest_batch_before
    small = kvevict.plan("llama-3-70b", gpu_memory="80GiB")  # the weights alone do not fit
    assert small.largest_context_before == small.largest_batch_after == 0
    assert kvevict.plan("llama-3-8b").largest_batch_after is None


def test_evicting_pays_after_as_many_steps_as_it_costs():
    plan = kvevict.plan("llama-3-8b", context=32768, keep=0.5, bandwidth=1e12)
    rows, D, e, S, n = 8, 128, 2, 32768, 16384
    moved = 32 * rows * (S * (2 * D * e + 4) + (4 * S + 8 * n) + (8 * n + 2 * n * 2 * D * e))
    assert plan.eviction_seconds == pytest.approx(moved / 1e12)
    assert plan.saved_seconds_per_step == pytest.approx((plan.cache_before - plan.cache_after) / 1e12)
    assert plan.break_even_steps == pytest.approx(plan.eviction_seconds / plan.saved_seconds_per_step)
    assert 3 < plan.break_even_steps < 5  # two passes over K, and half of K and V read and written
    assert kvevict.plan("llama-3-8b", keep=1.0).break_even_steps is None
    assert plan.workspace == 8 * (4 * S + 8 * n)


def test_what_is_quoted_of_budgets_is_what_a_cache_serves():
    """Of all tasks together, with the budgets that a policy's scores allow, as a share of the whole cache's answers."""
    pytest.importorskip("transformers")
    from bench import publish

    cells = [("all", "whole", "whole", 0.5), ("all", "keydiff", "head shares", 0.4), ("all", "keydiff", "shared", 1.0),
             ("all", "recommended", "shared", 0.1),
             ("fact", "keydiff", "head shares", 1.0), ("all", "keydiff", "model-wide", 1.0),
             ("all", "kvzip", "model-wide", 1.0), ("all", "learned", "model-wide", 0.25)]  # fmt: skip
    results = [dict(task=t, policy=p, column=c, keep=0.1, hits=hits, questions=20) for t, p, c, hits in cells]
    found = publish.of_budgets(results, "a model", 500, "seen")
    about = dict(model="a model", tokens=500, mode="seen", keep=0.1, samples=20)
    assert found == [
        dict(about, policy="KeyDiff", budget="head shares", kept=0.8),
        dict(about, policy="RECOMMENDED", budget="equal", kept=0.2),
        dict(about, policy="learned", budget="model-wide", kept=0.5),
    ]


def test_recommendations_are_what_was_measured():
    root = pathlib.Path(__file__).parent.parent
    quoted = json.loads((root / "kvevict/data/quality.json").read_text())["rows"]
    pytest.importorskip("transformers")
    from bench import publish

    assert quoted == publish.rows(root / "bench/results/cpu")
    for use in planner.USES:
        advice = planner.recommend(use, 2048)
        assert advice.policy in ("RECOMMENDED", "KeyDiff", "learned") and advice.keep in (0.8, 0.5, 0.25, 0.1)
        assert advice.budget in planner.BUDGETS and advice.expected >= planner.USES[use][0]
        assert "SmolLM2-135M" in advice.measured and "samples" in advice.measured
    seen, unseen = planner.recommend("question answering", 1000), planner.recommend("research", 1000)
    assert (seen.budget, unseen.budget) == ("equal", "head shares")  # unequal heads earn what an unseen question costs


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [(dict(context="12X"), ValueError, "context is '12X'"), (dict(context=0), ValueError, "context is 0"),
     (dict(batch=0), ValueError, "batch is 0"), (dict(dtype="int3"), ValueError, "dtype is 'int3'"),
     (dict(gpu_memory="much"), ValueError, "gpu_memory is 'much'"),
     (dict(gpu_memory="8"), ValueError, "gpu_memory is '8': expected bytes, or a number with a unit"),
     (dict(keep=1.5), ValueError, "keep is 1.5"),
     (dict(keep=5), TypeError, "keep is 5"), (dict(bandwidth=0), ValueError, "bandwidth is 0"),
     (dict(use="poetry"), ValueError, "use is 'poetry'"), (dict(model="no/such/folder.json"), Unavailable, "no/such")],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_named(options, error, match):
    with pytest.raises(error, match=match):
        kvevict.plan(**(dict(model="llama-3-8b") | options))


def test_an_unknown_name_is_answered_at_once(monkeypatch):
    """With what is close, what there is, and what to do; the hub's client alone would try for minutes."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in ("lama-3-8b", "Qwen/Qwen3-9B", "nothing like it", "nobody/nothing"):
        start = time.perf_counter()
        with pytest.raises(Unavailable) as refusal:
            kvevict.plan(name)
        assert time.perf_counter() - start < 1.5  # a second, on a machine that may be busy
        message = str(refusal.value)
        assert message.startswith(f"model is {name!r}") and "\n" not in message
        presets = "presets are " + ", ".join(planner.presets())  # by far the longest, so last
        assert message.endswith(f"; `--model FOLDER/config.json` takes any model's configuration; {presets}")
    with pytest.raises(Unavailable, match=r"^model is 'lama-3-8b' \(did you mean llama-3-8b or .*\?\): no preset"):
        kvevict.plan("lama-3-8b")
    with pytest.raises(Unavailable, match="http://127.0.0.1:9 does not answer"):
        kvevict.plan("nobody/nothing")


def shown(capsys, *arguments, **options):
    planner.show(kvevict.plan(*arguments, **options))
    return " ".join(capsys.readouterr().out.split())


def test_what_is_shown(capsys):
    pytest.importorskip("rich")
    said = shown(capsys, "meta-llama/Llama-3.1-8B", context=2**18, gpu_memory="20GiB", keep=0.25)
    assert said.startswith("meta-llama/Llama-3.1-8B, 262,144 tokens") and "128.00 KiB" in said
    assert "the model's own limit │ 131,072 tokens" in said
    assert "note: 262,144 tokens are beyond the model's own limit, 131,072" in said
    assert '"recommended": attention of the last query and KeyDiff' in said
    small = shown(capsys, "llama-3.1-70b", gpu_memory="80GiB")
    assert "not the weights" in small and "the weights alone, 131.42 GiB in bfloat16, do not fit 80.00 GiB" in small
    assert "largest context" not in small
    sliding = shown(capsys, "mistral-7b-v0.1", gpu_memory="80GiB")
    assert "there is nothing to evict from" in sliding and "largest context │ any" in sliding
    assert "keep" not in sliding and "per token" not in sliding and "for general" not in sliding
    assert kvevict.plan("mistral-7b-v0.1").recommendation is None


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "kvevict", "plan", *arguments], capture_output=True, text=True)


def test_command_line(tmp_path, capsys):
    cli = pytest.importorskip("kvevict.cli")
    done = command("--model", "llama-2-7b", "--context", "128K", "--batch", "4", "--dtype", "bf16", "--gpu-memory",
                   "80GiB", "--keep", "0.5", "--json", "--plot", str(tmp_path / "plan.png"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    expected = kvevict.plan("llama-2-7b", context="128K", batch=4, gpu_memory="80GiB").to_dict()
    assert result == json.loads(json.dumps(expected)) and result["cache_before"] == 256 * GIB
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    (tmp_path / "config.json").write_text(json.dumps(planner.presets()["qwen3-4b"]))
    done = command("--model", str(tmp_path), "--context", "4K")
    assert done.returncode == 0 and "576.00 MiB" in done.stdout and "computed at" in done.stdout, done.stdout
    for arguments in (["--model", str(tmp_path / "none.json")], ["--model", "llama-3-8b", "--context", "x"],
                      ["--model", "llama-3-8b", "--plot", "/no/such/a.png"]):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            cli.app(["plan", *arguments])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.startswith("kvevict plan: ")
        assert len(said.strip().splitlines()) == 1 and arguments[-1] in said
