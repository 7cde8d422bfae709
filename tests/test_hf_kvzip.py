"""KVzip through an EvictingCache: what it keeps is what the weights of eager attention say."""

import pytest
import torch

pytest.importorskip("transformers")

from test_hf_reconstruct import CHUNK, S, dense, ids, tiny

from kvevict.hf import EvictingCache
from kvevict.policies import KeyDiff, KVzip, Uniform, model_wide

FREE = dict(sink=0, recent=0)


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setenv("KVEVICT_BACKEND", "reference")  # the ops' kernels are tested elsewhere


@pytest.fixture
def read():
    """A model, a context, a prompt, and a cache that has read the context."""

    def make(policy=None, keep=0.3, B=2, **options):
        model, context = tiny(**options), ids(B, S)
        kept = []
        cache = EvictingCache(model, policy or KVzip(**FREE), keep=keep, on_evict=lambda e: kept.append(e.indices))
        with torch.no_grad():
            model(context, past_key_values=cache)
        return model, context, ids(1, 5, seed=1)[0], cache, kept

    return make


def rows(indices):
    return [sorted(i for i in row.tolist() if i >= 0) for layer in indices for row in layer.flatten(0, 1)]


@pytest.mark.parametrize("chunk", [S, CHUNK])
def test_keeps_the_best_of_the_model_by_the_weights_of_the_repetition(read, chunk):
    model, context, prompt, cache, kept = read()
    assert not kept and cache.layers[0].cached() == S  # the cut waits
    cache.reconstruct(model, context, prompt_ids=prompt, chunk=chunk)
    expected = model_wide(dense(model, context, prompt, chunk), 0.3, sink=0, recent=0)
    assert rows(kept) == rows(expected) and len({len(row) for row in rows(kept)}) > 1


def test_the_cache_is_as_it_was_but_for_the_scores(read):
    model, context, prompt, cache, _ = read(keep=Uniform(1.0))
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    cache.reconstruct(model, context)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values) and layer.tokens_seen == S
    assert model.config._attn_implementation == "kvevict"


def test_without_a_prompt_the_text_follows_on_itself(read):
    model, context, _, cache, kept = read()
    cache.reconstruct(model, context)
    expected = dense(model, context, ids(1, 0)[0], S)
    assert rows(kept) == rows(model_wide(expected, 0.3, sink=0, recent=0))


@torch.no_grad()
def test_normalized_weighs_with_values_and_hidden_states(read):
    model, context, prompt, cache, kept = read(KVzip(normalized=True, heads="shared", **FREE), keep=Uniform(1.0), B=1)
    cache.reconstruct(model, context, prompt_ids=prompt)
    text = torch.cat([context, prompt[None], context], 1)
    entering = {}
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, options: entering.update({module.layer_idx: options["hidden_states"]}),
            with_kwargs=True,
        )
        for layer in model.model.layers
    ]
    model.set_attn_implementation("eager")
    attentions = model(text, output_attentions=True, use_cache=False).attentions
    for hook in hooks:
        hook.remove()
    for i, (layer, weights) in enumerate(zip(cache.layers, attentions, strict=True)):
        output = model.model.layers[i].self_attn.o_proj.weight.unflatten(1, (4, 16))  # [M, Hq, Dv]
        values = layer.values[0].repeat_interleave(2, 0)  # [Hq, S, Dv]
        norms = torch.einsum("mhd,hsd->hsm", output, values).norm(dim=-1)
        shares = weights[0, :, S:, :S] * norms[:, None] / entering[i][0, S:].norm(dim=-1)[:, None]
        expected = shares.amax(1).unflatten(0, (2, 2)).amax(1)
        torch.testing.assert_close(layer.notes.repeated[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("heads", ["shared", "each"])
def test_scores_follow_a_cut(read, heads):
    """Cut to 30 and then to 12 tokens a head: as once to 12 of the same scores."""
    model, context, prompt, cache, kept = read(KVzip(heads=heads, **FREE), keep=30, B=1)
    cache.reconstruct(model, context, prompt_ids=prompt)
    first = list(kept)
    kept.clear()
    cache.evict(12)
    twice = [
        sorted(a[i] for i in b) for a, b in zip(rows(first), rows(kept), strict=True)
    ]  # positions among what was kept first
    scores = dense(model, context, prompt, S)
    if heads == "each":
        once = rows(model_wide(scores, 12, sink=0, recent=0))
    else:
        best = [layer.mean(1).topk(12).indices for layer in scores]
        once = [sorted(row.tolist()) for layer in best for row in layer.expand(2, -1)]
    assert twice == once


def test_what_is_not_served_is_refused(read):
    model, context, prompt, cache, _ = read()
    with pytest.raises(ValueError, match=r"KVzip needs cache.reconstruct\(model, input_ids\) before decoding"):
        model(context[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match=r"KVzip needs cache.reconstruct\(model, input_ids\) of what the cache holds"):
        cache.evict(0.5)
    with pytest.raises(ValueError, match=r"input_ids has shape \(2, 49\): expected \(2, 50\)"):
        cache.reconstruct(model, context[:, 1:])
    with pytest.raises(TypeError, match="input_ids"):
        cache.reconstruct(model, context.float())
    assert cache.layers[0].cached() == S and cache.layers[0].notes.repeated is None
    cache.reconstruct(model, context)
    with pytest.raises(ValueError, match="the cache has been cut"):
        cache.reconstruct(model, context)
    with torch.no_grad():
        model(context[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="has no scores of the tokens that came after cache.reconstruct"):
        cache.evict(0.5)
    with pytest.raises(ValueError, match="budget is 30, with KVzip"):
        EvictingCache(model, KVzip(), budget=30)
    with pytest.raises(ValueError, match="policy is KeyDiff: expected KVzip"):
        EvictingCache(model, KeyDiff(), keep=0.5).reconstruct(model, context)


def test_decodes_after_it_and_knows_the_name(read):
    model, context, prompt, cache, kept = read("kvzip", keep=0.9)
    cache.reconstruct(model, context, prompt_ids=prompt)
    said = model.generate(
        torch.cat([context, context[:, :2]], 1), past_key_values=cache, max_new_tokens=3, do_sample=False
    )
    assert said.shape == (2, S + 5) and len(kept) == 2


def test_follows_requests_and_what_is_taken_back(read):
    model, context, prompt, cache, kept = read(keep=Uniform(1.0))
    cache.reconstruct(model, context, prompt_ids=prompt)
    scores = [layer.notes.repeated.clone() for layer in cache.layers]
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([1, 1]))
    for layer, whole in zip(cache.layers, scores, strict=True):
        assert torch.equal(layer.notes.repeated, whole[[1, 1], :, :-3])


@torch.no_grad()
def test_layers_with_a_state_are_refused():
    """The repetition would change it."""
    model = tiny("Lfm2", num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], conv_L_cache=3)
    context = ids(1, S)
    cache = EvictingCache(model, KVzip(), keep=0.5)
    model(context, past_key_values=cache)
    with pytest.raises(ValueError, match="Lfm2ForCausalLM has layers of the kind .* whose state the repetition would"):
        cache.reconstruct(model, context)


@pytest.mark.parametrize("heads", ["each", "shared"])
@torch.no_grad()
def test_scores_are_saved_and_loaded(read, tmp_path, heads):
    """Whole, and once the cache has been cut, into pages where heads are unequal."""
    policy = KVzip(heads=heads, **FREE)
    model, context, prompt, cache, _ = read(policy)
    cache.save_pretrained(tmp_path)
    EvictingCache.from_pretrained(tmp_path, model, policy, keep=0.3).reconstruct(model, context)  # can still be noted
    cache.reconstruct(model, context, prompt_ids=prompt)
    cache.save_pretrained(tmp_path)
    kept = []
    again = EvictingCache.from_pretrained(
        tmp_path, model, policy, keep=0.3, on_evict=lambda eviction: kept.append(eviction.indices)
    )
    for one, other in zip(cache.layers, again.layers, strict=True):
        assert torch.equal(one.notes.repeated, other.notes.repeated)
    again.evict(8)
    loaded = rows(kept)
    cache.on_evict = lambda eviction: kept.append(eviction.indices)
    kept.clear()
    cache.evict(8)
    assert loaded == rows(kept) and sum(map(len, loaded)) == 8 * len(loaded)
