"""EvictingCache on tiny models of many families: those that it promises to serve, each with padding too, and those
that it must refuse or serve in part."""

import gc
import logging
import weakref

import pytest
import torch
from conftest import DEVICE

pytest.importorskip("transformers")

import transformers
from test_hf import BATCH, generate, learned, padded, prompt, reference_backend, tiny  # noqa: F401
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvevict.hf import EvictingCache
from kvevict.hf import attention as our_attention
from kvevict.policies import LRU, TOVA, AttentionMass, Hybrid, KeyDiff, KeyNorm, Pyramid, Recency, SnapKV

HALF = dict(
    head_dim=16, sliding_window=24, num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2
)
MLA = dict(q_lora_rank=None, kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
           num_key_value_heads=4, first_k_dense_replace=8)  # fmt: skip
PROMISED = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, dict(sliding_window=None)),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, dict(head_dim=16)),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM, {}),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM, HALF),
    "gpt_oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM,
                HALF | dict(num_local_experts=2, num_experts_per_tok=1)),
    "diffllama": (transformers.DiffLlamaConfig, transformers.DiffLlamaForCausalLM, {}),
}  # fmt: skip
# Latents are cached from 5.17 on; older versions have a DiffLlama, and layers, of other kinds.
NEW = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 17)
if not NEW:
    del PROMISED["diffllama"]
LATENT = {
    "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM, MLA),
    "deepseek_v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM, MLA),
}


def build(family, seed=0):
    config, model_class, options = (PROMISED | LATENT)[family]
    model = tiny(config, model_class, seed, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, mean=1.0, generator=torch.Generator(DEVICE).manual_seed(seed))
    return model


def full_layers(model):
    return [i for i, x in enumerate(DynamicCache(config=model.config).layers) if not x.is_sliding]


def logits_of(model, ids, mask, cache):
    """Of a prompt's last position and of a few tokens after it."""
    with torch.no_grad():
        found = [model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1]]
        for step in range(6):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            position = mask.sum(-1, keepdim=True) - 1
            token = prompt(1, batch=len(mask), seed=step)
            found.append(model(token, attention_mask=mask, position_ids=position, past_key_values=cache).logits[:, -1])
    return torch.stack(found)


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("family", PROMISED | LATENT)
def test_the_whole_cache_gives_what_the_model_gives(family):
    """In the attention that the model comes with and in ours, for a prompt and for a padded batch."""
    theirs, ours = build(family), build(family)
    single, batch = (prompt(70), torch.ones(1, 70, dtype=torch.long, device=DEVICE)), padded()
    expected = [logits_of(theirs, *inputs, DynamicCache(config=theirs.config)) for inputs in (single, batch)]
    cache = EvictingCache(theirs.config, KeyDiff(), keep=1.0)
    assert torch.equal(logits_of(theirs, *single, cache), expected[0])
    for inputs, logits in zip((single, batch), expected, strict=True):
        cache = EvictingCache(ours, KeyDiff(), keep=1.0)
        assert ours.config._attn_implementation == "kvevict"
        torch.testing.assert_close(logits_of(ours, *inputs, cache), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", [KeyDiff(recent=8), Hybrid(parts=((0.5, TOVA()), (0.5, KeyDiff())), recent=8)],
                         ids=["KeyDiff", "TOVA + KeyDiff"])  # fmt: skip
@pytest.mark.parametrize("family", PROMISED)
def test_each_request_of_a_padded_batch_is_evicted_as_if_alone(family, policy):
    model = build(family)
    ids, mask = padded()
    evictions = []
    for keep in (0.5, Pyramid(0.5)):
        cache = EvictingCache(model, policy, keep=keep, on_evict=evictions.append)
        together = generate(model, ids, attention_mask=mask, past_key_values=cache)
        assert [e.layer for e in evictions] == full_layers(model)
        in_batch, evictions[:] = list(evictions), []
        for b, length in enumerate(BATCH):
            alone = EvictingCache(model, policy, keep=keep, on_evict=evictions.append)
            expected = generate(model, prompt(length, seed=b), past_key_values=alone)
            assert torch.equal(together[b, 80 - length :], expected[0])
            for one, other in zip(evictions, in_batch, strict=True):
                n = one.indices.shape[2]
                assert torch.equal(one.indices[0], other.indices[b, :, :n]) and (other.indices[b, :, n:] == -1).all()
            evictions.clear()


def test_hidden_states_are_noted_whatever_projections_are_called():
    model = build("phi3")  # one for queries, keys and values
    cache = EvictingCache(model, learned(recent=8), keep=0.5)
    with cache.noting_hidden(model):
        generate(model, prompt(60), past_key_values=cache)
    assert {r.kept for r in cache.report()} == {30 + 11}
    with pytest.raises(ValueError, match="no module named"), cache.noting_hidden(torch.nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize("family", PROMISED)
def test_a_budget_is_held(family):
    model = build(family)
    cache = EvictingCache(model, Hybrid(parts=((0.5, TOVA()), (0.5, KeyDiff())), recent=8), budget=40, interval=4)
    ids, mask = padded()
    generate(model, ids, attention_mask=mask, past_key_values=cache, new=20)
    assert [(r.layer, r.seen) for r in cache.report()] == [(i, 99) for i in full_layers(model)]
    assert all(r.kept <= 44 for r in cache.report())


def test_attention_sinks_are_those_of_eager():
    """GPT-OSS: one more logit per head. A decode step too, over an evicted cache."""
    theirs, ours = build("gpt_oss"), build("gpt_oss")
    theirs.set_attn_implementation("eager")
    ours.set_attn_implementation("kvevict")
    ids = prompt(60)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-6)
        caches = [EvictingCache(model.config, KeyDiff(recent=8), keep=0.5) for model in (theirs, ours)]
        for step in range(3):
            a, b = (model(ids, past_key_values=cache).logits
                    for model, cache in zip((theirs, ours), caches, strict=True))  # fmt: skip
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
            ids = prompt(1, seed=step)


@pytest.mark.parametrize("policy", [AttentionMass(), LRU(), Hybrid()], ids=lambda p: type(p).__name__)
def test_attention_sinks_are_not_tracked(policy):
    model = build("gpt_oss")
    with pytest.raises(ValueError, match="attention sinks of GptOssAttention"):
        generate(model, prompt(60), past_key_values=EvictingCache(model, policy, keep=0.5))


def test_policies_see_the_attention_scale_of_the_model():
    """Gemma 3 and Granite scale logits by another number than 1/√head_dim: TOVA keeps what eager's weights say."""
    model = tiny(transformers.Qwen3Config, transformers.Qwen3ForCausalLM, head_dim=16)
    granite = tiny(transformers.GraniteConfig, transformers.GraniteForCausalLM, attention_multiplier=0.05)
    for model in (model, granite):  # noqa: B020, PLR1704
        evictions = []
        cache = EvictingCache(model, TOVA(sink=0, recent=0), keep=20, on_evict=evictions.append)
        with torch.no_grad():
            model(prompt(60), past_key_values=cache)
            model.set_attn_implementation("eager")
            weights = model(prompt(60), output_attentions=True).attentions
        for eviction, w in zip(evictions, weights, strict=True):
            expected = w[0, :, -1].mean(0)[:-1].topk(19).indices.sort().values
            assert torch.equal(eviction.indices[0, 0, :-1], expected)


@pytest.mark.skipif(not NEW, reason="older versions cache keys and values")
@pytest.mark.parametrize("family", LATENT)
def test_latents_are_evicted_by_what_reads_keys_alone(family):
    """MLA: one latent per token, of which all heads' keys and values are made, is cached and scored."""
    model = build(family)
    ids, mask = padded()
    for policy in (KeyDiff(recent=8), KeyNorm(recent=8), Recency(recent=8)):
        evictions = []
        cache = EvictingCache(model, policy, keep=0.5, on_evict=evictions.append)
        together = generate(model, ids, attention_mask=mask, past_key_values=cache)
        assert [layer.keys.shape[1] for layer in cache.layers] == [1] * 3
        assert [layer.keys.shape[3] for layer in cache.layers] == [24] * 3  # kv_lora_rank: not the rotary part
        for b, length in enumerate(BATCH):
            alone = EvictingCache(model, policy, keep=0.5)
            expected = generate(model, prompt(length, seed=b), past_key_values=alone)
            assert torch.equal(together[b, 80 - length :], expected[0])
    cache = EvictingCache(model, KeyDiff(recent=8), budget=40, interval=4)
    generate(model, ids, attention_mask=mask, past_key_values=cache, new=20)
    assert all(r.kept <= 44 for r in cache.report())


@pytest.mark.skipif(not NEW, reason="other layers in older versions")
def test_static_buffers_of_latents_refuse_padding():
    model = build("deepseek_v3")
    ids, mask = padded()
    options = dict(budget=60, interval=8)
    caches = [EvictingCache(model, KeyDiff(recent=8), static=static, **options) for static in (False, True)]
    said = [generate(model, prompt(70, batch=2), new=6, past_key_values=cache) for cache in caches]
    assert torch.equal(*said)
    with pytest.raises(ValueError, match="the prompts have padding"):
        generate(model, ids, attention_mask=mask,
                 past_key_values=EvictingCache(model, KeyDiff(recent=8), static=True, **options))  # fmt: skip


@pytest.mark.skipif(not NEW, reason="older versions cache keys and values")
@pytest.mark.parametrize("policy", [TOVA(), SnapKV(), AttentionMass(), LRU()], ids=lambda p: type(p).__name__)
def test_latents_are_not_what_queries_attend_to(policy):
    model = build("deepseek_v3")
    cache = EvictingCache(model, policy, keep=0.5)
    with pytest.raises(ValueError, match="DeepseekV3Attention does not attend over what it caches.*keys alone"):
        generate(model, prompt(60), past_key_values=cache)
    assert cache.get_seq_length() == 0  # as it was


@pytest.mark.parametrize("sizes", [
    dict(num_kv_shared_layers=2, global_head_dim=16), dict(global_head_dim=32, num_global_key_value_heads=1),
], ids=["shared", "wide"])  # fmt: skip
def test_gemma_4(sizes):
    """Its last layers may attend to the keys of earlier ones, and those that grow have heads of another size and number
    than those with a window; with padding too."""
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("a newer transformers has it")
    options = dict(HALF, hidden_size_per_layer_input=8, vocab_size_per_layer_input=120, **sizes)
    model, ours = (tiny(transformers.Gemma4TextConfig, transformers.Gemma4ForCausalLM, **options) for _ in range(2))
    ids, mask = padded()
    expected = logits_of(model, ids, mask, DynamicCache(config=model.config))
    got = logits_of(ours, ids, mask, EvictingCache(ours, KeyDiff(), keep=1.0))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    together = generate(
        ours, ids, attention_mask=mask, past_key_values=EvictingCache(ours, KeyDiff(recent=8), keep=0.5)
    )
    for b, length in enumerate(BATCH):
        cache = EvictingCache(ours, KeyDiff(recent=8), keep=0.5)
        assert torch.equal(together[b, 80 - length :], generate(ours, prompt(length, seed=b), past_key_values=cache)[0])


@pytest.mark.parametrize("config", [transformers.BloomConfig(), transformers.FalconConfig(alibi=True),
                                    transformers.MptConfig()], ids=lambda c: c.model_type)  # fmt: skip
def test_distance_biases_are_refused(config):
    with pytest.raises(ValueError, match=rf"{config.model_type}.*ALiBi"):
        EvictingCache(config, keep=0.5)


@pytest.mark.skipif(not NEW, reason="other layers in older versions")
def test_layers_of_other_kinds_are_named():
    for config, kind in (
        (transformers.FalconH1Config(num_hidden_layers=2), "LinearAttentionAndFullAttentionLayer"),
        (transformers.MambaConfig(num_hidden_layers=2), "no layer that grows"),
    ):
        with pytest.raises(ValueError, match=rf"{config.model_type}, which has .*{kind}"):
            EvictingCache(config, keep=0.5)
    if hasattr(transformers, "DeepseekV32Config"):
        with pytest.raises(ValueError, match="DynamicIndexedLayer"):
            EvictingCache(transformers.DeepseekV32Config(num_hidden_layers=2), keep=0.5)


def of_its_own(kind):
    """A model that cannot use our attention."""
    if kind == "gemma2":  # soft-capped
        return tiny(transformers.Gemma2Config, transformers.Gemma2ForCausalLM, head_dim=16, sliding_window=24,
                    num_hidden_layers=4)  # fmt: skip
    return tiny(transformers.FalconConfig, transformers.FalconForCausalLM, alibi=False, multi_query=False)


@pytest.mark.parametrize("kind", ["gemma2", "falcon"])
def test_a_model_that_cannot_use_our_attention(kind, caplog):
    """It is said once. Keys are scored; what needs our attention is refused, and padding is seen and refused."""
    model = of_its_own(kind)
    with caplog.at_level(logging.WARNING, logger="kvevict"):
        for _ in range(2):
            cache = EvictingCache(model, KeyDiff(recent=8), keep=0.5)
    (record,) = (record for record in caplog.records if record.name == "kvevict")
    assert record.getMessage().startswith(f"kvevict: {type(model).__name__} computes attention in a way of its own")
    assert model.config._attn_implementation != "kvevict"
    generate(model, prompt(60), past_key_values=cache)
    assert {(r.seen, r.kept) for r in cache.report()} == {(71, 41)}
    beams = EvictingCache(model, KeyDiff(recent=8), keep=0.5)
    assert model.generate(prompt(60), num_beams=3, max_new_tokens=4, past_key_values=beams).shape == (1, 64)
    for policy, keep, match in (
        (TOVA(), 0.5, "TOVA needs queries.*which this model cannot use"),
        (KeyDiff(), Pyramid(0.5), "budgets that differ by layer.*which this model cannot use"),
    ):
        with pytest.raises(ValueError, match=match):
            generate(model, prompt(60), past_key_values=EvictingCache(model, policy, keep=keep))
    ids, mask = padded()
    for rows in (slice(None), slice(0, 1)):  # one request may be padded too
        cache = EvictingCache(model, KeyDiff(), keep=0.5)
        with pytest.raises(ValueError, match="attention_mask has padding"):
            generate(model, ids[rows], attention_mask=mask[rows], past_key_values=cache)
        assert cache.get_seq_length() == 0
    cache = EvictingCache(model, KeyDiff(), keep=0.5)
    with pytest.raises(ValueError, match="attention_mask has padding"):  # of the model inside, too
        model.base_model(ids[:1], attention_mask=mask[:1], past_key_values=cache)
    generate(model, ids, attention_mask=mask)  # without our cache


def test_layers_in_front_that_do_not_evict_have_not_grown_either():
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    model = tiny(transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM, sliding_window=24, layer_types=kinds)
    cache = EvictingCache(model.config, keep=0.5)
    with pytest.raises(ValueError, match="a batch of 2 requests"):
        model(prompt(30, batch=2), past_key_values=cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [0, 0, 0]


def test_soft_capped_attention_is_refused():
    model = of_its_own("gemma2")
    model.set_attn_implementation("kvevict")
    with pytest.raises(ValueError, match="Gemma2Attention has attention with softcap"):
        model(prompt(20))


def test_attention_that_does_not_reach_ours_is_said():
    """A model that is told to use "kvevict" and does not: what would be wrong is refused."""
    model = of_its_own("falcon")
    model.config._attn_implementation_internal = "kvevict"
    mask = torch.zeros(1, 1, 30, 30).masked_fill(torch.ones(30, 30).triu(1).bool(), float("-inf")).to(DEVICE)
    for batch, policy, match in ((2, KeyDiff(), "padding is not seen"), (1, TOVA(), "TOVA cannot read it")):
        with pytest.raises(ValueError, match=rf'no attention.*has reached "kvevict".*{match}'), torch.no_grad():
            model(prompt(30, batch=batch), attention_mask=mask.expand(batch, -1, -1, -1),
                  past_key_values=EvictingCache(model.config, policy, keep=0.5))  # fmt: skip


def test_a_guard_keeps_no_model_alive():
    model = of_its_own("falcon")
    EvictingCache(model, keep=0.5)
    assert model.base_model in our_attention._guarded
    model = weakref.ref(model)
    gc.collect()
    assert model() is None
