"""The fitted scorer: its features, its regression, its files, and RoPE's angles as a model has them."""

import numpy
import pytest
import torch

transformers = pytest.importorskip("transformers")

from cases import cache
from conftest import DEVICE
from test_hf import prompt, reference_backend, tiny  # noqa: F401

from kvevict.hf import EvictingCache
from kvevict.hf.fit import features, fit
from kvevict.hf.rotary import before_rope, inv_freq
from kvevict.policies import Hybrid, KeyDiff, LearnedKV, ModelWide, Observed, Uniform, model_wide
from kvevict.policies.learned_kv import mixed


def scorer(L=2, H=2, D=64, seed=0, **fields):
    generator = torch.Generator().manual_seed(seed)
    return LearnedKV(
        weights=torch.randn(L, H, 2 * D + 4, generator=generator), inv_freq=10_000.0 ** -torch.linspace(0, 1, D // 2),
        **fields,
    )  # fmt: skip


def test_mixed_by_hand():
    fitted = torch.tensor([[[1.0, 2.0, 6.0, float("nan"), float("-inf")]]])  # mean 3, variance 14/3
    keydiff = torch.tensor([[[-1.0, 0.0, 1.0, 0.5, float("-inf")]]])  # mean 0, variance 2/3
    found = mixed(fitted, keydiff)[0, 0].tolist()
    assert found[:3] == pytest.approx([1 - 7**0.5, 2.0, 6 + 7**0.5])
    assert numpy.isnan(found[3]) and found[4] == float("-inf")
    alike = mixed(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.5, 0.5]]]))
    assert alike.tolist() == [[[1.0, 2.0]]]


@pytest.mark.parametrize("mix", [False, True])
def test_scores_are_the_products_of_the_features(mix):
    keys, values = cache((1, 2, 70, 64, 64))
    policy = scorer(mix=mix)
    for layer in range(2):
        x = features(keys, values, policy.inv_freq.to(DEVICE))
        expected = (x * policy.weights[layer, :, None, :-1].to(DEVICE)).sum(-1) + policy.weights[layer, :, -1:].to(
            DEVICE
        )
        if mix:
            expected = mixed(expected[None], -x[None, ..., -1])[0]
        seen = Observed(keys=keys, values=values, layer=layer)
        torch.testing.assert_close(policy.scores(seen)[0], expected, atol=1e-3, rtol=1e-4)
    with pytest.raises(ValueError, match="layer is 2: expected 0 to 1"):
        policy.scores(Observed(keys=keys, values=values, layer=2))


def test_ragged_rows_are_scored_as_if_alone():
    keys, values = cache((2, 2, 50, 64, 64))
    lengths = torch.tensor([50, 20], device=DEVICE)
    keys[1, :, 20:] = values[1, :, 20:] = float("nan")
    found = scorer().scores(Observed(keys=keys, values=values, lengths=lengths))
    alone = scorer().scores(Observed(keys=keys[1:, :, :20], values=values[1:, :, :20]))
    torch.testing.assert_close(found[1, :, :20], alone[0], atol=1e-4, rtol=1e-5)
    assert (found[1, :, 20:] == float("-inf")).all()


def test_fit_on_a_model_predicts_what_it_has_not_seen():
    model = tiny(num_hidden_layers=2)
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(1, 120, (160,), generator=generator) for _ in range(6)]
    calls = []
    found = fit(model, texts, torch.tensor([5, 6, 7]), held_out=2, metadata={"model": "tiny"},
                progress=lambda *call: calls.append(call))  # fmt: skip
    assert found.policy.weights.shape == (2, 2, 2 * 16 + 4) and len(found.correlation["learned"]) == 2
    assert sum(found.correlation["learned"]) / 2 > 0.2
    assert calls == [(i, 6) for i in range(1, 7)]
    found.policy.check(model.config, 2, 2, 16)
    again = fit(model, texts, torch.tensor([5, 6, 7]), held_out=2)
    assert torch.equal(again.policy.weights, found.policy.weights)
    for wrong, message in ((texts[:1], "texts has 1"), ([texts[0][:20], *texts], r"texts\[0\] has 20 tokens")):
        with pytest.raises(ValueError, match=message):
            fit(model, wrong, torch.tensor([5]))


def test_files(tmp_path):
    policy = scorer(metadata={"model": "tiny", "config": "abc"})
    policy.save(tmp_path / "a.safetensors")
    loaded = LearnedKV.load(tmp_path / "a.safetensors", sink=7, mix=False)
    assert torch.equal(loaded.weights, policy.weights) and torch.equal(loaded.inv_freq, policy.inv_freq)
    assert loaded.metadata == policy.metadata and loaded.sink == 7 and not loaded.mix
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="b.safetensors is no scorer"):
        LearnedKV.load(tmp_path / "b.safetensors")
    with pytest.raises(FileNotFoundError):
        LearnedKV.load(tmp_path / "c.safetensors")
    config = tiny().config
    with pytest.raises(ValueError, match="fitted to tiny, config abc"):
        policy.check(config, 2, 2, 64)
    with pytest.raises(ValueError, match=r"expected \(3, 2, 36\)"):
        scorer().check(config, 3, 2, 16)
    with pytest.raises(ValueError, match="there is no learned scorer for this llama model.*kvevict train"):
        LearnedKV.of_model(config)


def test_its_scores_compare_over_the_model():
    keys, values = cache((1, 2, 60, 64, 64))
    scores = [scorer(seed=layer).scores(Observed(keys=keys, values=values, layer=layer)) for layer in range(2)]
    kept = model_wide(scores, 0.5, sink=4, recent=8)
    assert sum(int((indices >= 0).sum()) for indices in kept) == 2 * 2 * 30


FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, dict(head_dim=16)),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM, dict(head_dim=16)),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_keys_before_rope_are_what_the_model_projects(family):
    config_class, model_class, options = FAMILIES[family]
    model = tiny(config_class, model_class, num_hidden_layers=1, layer_types=["full_attention"], **options)
    projected = []
    attention = next(module for module in model.modules() if hasattr(module, "k_proj"))
    (getattr(attention, "k_norm", None) or attention.k_proj).register_forward_hook(lambda m, i, o: projected.append(o))
    held = transformers.DynamicCache()
    model(torch.arange(1, 41, device=DEVICE)[None], past_key_values=held)
    before = projected[0].reshape(1, 40, 2, 16) if projected[0].ndim == 3 else projected[0]
    before = before.transpose(1, 2) if before.shape[1] == 40 else before
    torch.testing.assert_close(before_rope(held.layers[0].keys, inv_freq(model)), before, atol=1e-4, rtol=1e-4)


def test_rope_of_another_kind_is_refused():
    glm = tiny(transformers.GlmConfig, transformers.GlmForCausalLM, head_dim=16)
    with pytest.raises(ValueError, match="GlmForCausalLM turns other pairs"):
        inv_freq(glm)
    yarn = tiny(rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=10_000.0,
                                     original_max_position_embeddings=1024))  # fmt: skip
    with pytest.raises(ValueError, match="RoPE of the kind 'yarn'"):
        inv_freq(yarn)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no module that knows RoPE"):
        inv_freq(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=50)))


def test_keydiff_before_rope():
    keys, _ = cache((1, 2, 60, 64, 64))
    frequencies = 10_000.0 ** -torch.linspace(0, 1, 32)
    plain = KeyDiff().scores(Observed(keys=before_rope(keys.cpu(), frequencies).to(DEVICE)))
    found = KeyDiff(rotary=frequencies).scores(Observed(keys=keys))
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)
    assert KeyDiff(rotary=frequencies) == KeyDiff(rotary=frequencies.tolist()) != KeyDiff()


def fitted_to(model, **fields):
    """A scorer of a tiny model, with weights of no meaning."""
    config = model.config
    generator = torch.Generator().manual_seed(7)
    shape = (config.num_hidden_layers, config.num_key_value_heads, 2 * config.head_dim + 4)
    return LearnedKV(weights=torch.randn(shape, generator=generator), inv_freq=inv_freq(model).cpu(), **fields)


@torch.no_grad()
def test_a_cache_keeps_what_the_scorer_says_over_the_whole_model():
    """In the batch, too, whose shorter request has padding on its left: each is as if alone."""
    model = tiny(head_dim=16)
    policy = fitted_to(model, recent=4)
    ids = prompt(60, batch=2, seed=3)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    together = EvictingCache(model, policy, keep=0.25)
    model(ids, attention_mask=mask, position_ids=position, past_key_values=together)
    for b, tokens in ((0, 40), (1, 60)):
        held = transformers.DynamicCache()
        model(ids[b : b + 1, -tokens:], past_key_values=held)
        seen = [Observed(keys=layer.keys, values=layer.values, layer=i) for i, layer in enumerate(held.layers)]
        expected = model_wide([policy.scores(x) for x in seen], 0.25, sink=4, recent=4)
        for layer, indices, x in zip(together.layers, expected, seen, strict=True):
            keys, _, lengths = layer.whole()
            counts = (indices >= 0).sum(-1)[0]
            assert lengths[b].tolist() == counts.tolist()
            for h, n in enumerate(counts.tolist()):
                torch.testing.assert_close(keys[b, h, :n], x.keys[0, h, indices[0, h, :n]], atol=1e-4, rtol=1e-4)
        assert sum(int((indices >= 0).sum()) for indices in expected) == 3 * 2 * (tokens // 4)


@torch.no_grad()
def test_what_is_not_served_is_refused():
    model = tiny(head_dim=16)
    with pytest.raises(ValueError, match=r"expected \(3, 2, 36\)"):
        EvictingCache(model, scorer(), keep=0.5)
    with pytest.raises(ValueError, match="there is no learned scorer for this llama model"):
        EvictingCache(model, "learned", keep=0.5)


@torch.no_grad()
def test_a_prompt_in_chunks_is_cut_when_it_has_been_read():
    """keep=1.0 keeps all, in order: positions are slots still."""
    model = tiny(head_dim=16)
    policy = fitted_to(model, recent=4)
    whole, pieces = (EvictingCache(model, policy, keep=keep) for keep in (0.25, 1.0))
    model(prompt(60), past_key_values=whole)
    for piece in prompt(60).split(20, dim=1):
        model(piece, past_key_values=pieces)
    pieces.evict(0.25)
    for one, other in zip(whole.layers, pieces.layers, strict=True):
        for a, b in zip(one.whole(), other.whole(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_plain_number_is_model_wide_unless_heads_say_otherwise():
    model = tiny(head_dim=16)
    for heads, kind in (("each", ModelWide), ("adaptive", Uniform), ("shared", Uniform)):
        assert type(EvictingCache(model, fitted_to(model, heads=heads), keep=0.25)._budget) is kind


def test_the_package_carries_smollm2s():
    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, rope_parameters=dict(rope_type="default", rope_theta=100_000.0),
    )  # fmt: skip
    policy = LearnedKV.of_model(config)
    assert policy.weights.shape == (30, 3, 132) and policy.metadata["model"] == "SmolLM2-135M"
    policy.check(config, 30, 3, 64)
    cache = EvictingCache(config, "learned", keep=0.1)
    assert isinstance(cache._budget, ModelWide)


def _of(kind, **options):
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**(sizes | options))
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    "kind, options, said",
    [("SmolLM3", {}, "layer 3 of SmolLM3ForCausalLM caches keys that its rotation has not made"),
     ("HunYuanDenseV1", {}, "layer 0 of HunYuanDenseV1ForCausalLM caches keys that its rotation has not made"),
     ("Glm", {}, "layer 0 of GlmForCausalLM turns other pairs")],
)  # fmt: skip
def test_a_model_that_turns_keys_otherwise_is_refused(kind, options, said):
    if not hasattr(transformers, f"{kind}ForCausalLM"):
        pytest.skip("older versions have it not")
    with pytest.raises(ValueError, match=said):
        inv_freq(_of(kind, **options))


def test_part_of_a_head_may_be_turned():
    assert len(inv_freq(_of("Phi"))) == 4


def test_a_scorer_of_other_rope_is_refused_in_a_mixture_too():
    model = tiny(head_dim=16)
    policy = fitted_to(model)
    other = LearnedKV(weights=policy.weights, inv_freq=policy.inv_freq * 2)
    for one in (other, Hybrid(parts=((1.0, other), (1.0, KeyDiff())))):
        with pytest.raises(ValueError, match="inv_freq of other RoPE than the model's"):
            EvictingCache(model, one, keep=0.5)
    with pytest.raises(ValueError, match="a cast of the model .* has rounded in the model"):
        EvictingCache(tiny(head_dim=16).bfloat16(), policy, keep=0.5)
    with pytest.raises(ValueError, match="weights has values that are not finite"):
        LearnedKV(weights=policy.weights * float("nan"), inv_freq=policy.inv_freq)
    wide = LearnedKV(weights=torch.ones(3, 2, 100), inv_freq=policy.inv_freq)
    with pytest.raises(ValueError, match=r"expected \(3, 2, 36\)"):
        EvictingCache(model, wide, keep=0.5)
