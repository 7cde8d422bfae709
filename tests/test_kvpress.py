"""kvpress scores as we do, where it has the method. It wants an older transformers than the rest of the project:

.venv-peers/bin/python -m pip install pytest hypothesis   # beside what `make quality-peers` installs
KVEVICT_BACKEND=reference PYTHONPATH=. .venv-peers/bin/python -m pytest tests/test_kvpress.py
"""

import pytest
import torch

kvpress = pytest.importorskip("kvpress")

import transformers
from test_hf import prompt, tiny
from transformers import DynamicCache

import kvevict
from bench.kvpress_press import PolicyPress
from kvevict import models
from kvevict.hf import EvictingCache
from kvevict.hf.rotary import inv_freq
from kvevict.hf.weights import output_weights
from kvevict.policies import (
    LRU,
    RECOMMENDED,
    TOVA,
    AttentionMass,
    ExpectedAttention,
    KeyDiff,
    LearnedKV,
    Observed,
    SnapKV,
)


@pytest.fixture(scope="module")
def layers():
    """Of a tiny model: (attention module, its input, keys, values, queries) for each layer, and the model."""
    model = tiny(num_hidden_layers=2)
    cache = DynamicCache()
    with torch.no_grad(), models.capture(model) as captured:
        model(prompt(130), past_key_values=cache)
    found = []
    for i, layer in enumerate(cache.layers):
        module = model.model.layers[i].self_attn
        module.rotary_emb = model.model.rotary_emb  # as a press's hooks set it
        queries, hidden = captured.of(i)
        found.append((module, hidden, layer.keys, layer.values, queries))
    return model, found


def press_scores(press, module, hidden, keys, values, model):
    positions = torch.arange(keys.shape[2])[None]
    more = {"position_embeddings": model.model.rotary_emb(hidden, positions)}
    with torch.no_grad():
        return press.score(module, hidden, keys, values, None, more)


def test_expected_attention(layers):
    model, found = layers
    policy = ExpectedAttention(rotary=inv_freq(model))
    for i, (module, hidden, keys, values, queries) in enumerate(found):
        theirs = press_scores(kvpress.ExpectedAttentionPress(), module, hidden, keys, values, model)
        with kvevict.backend("reference"):
            ours = policy.scores(Observed(keys=keys, values=values, queries=queries, layer=i))
        torch.testing.assert_close(ours[..., 4:], theirs[..., 4:], rtol=1e-3, atol=1e-6)


def test_norms_of_critical_kv(layers):
    model, found = layers
    plain = SnapKV()
    policy = SnapKV(value_norms="output", output=output_weights(model))
    for i, (module, hidden, keys, values, queries) in enumerate(found):
        norms = kvpress.CriticalKVPress.vwl1norm(values, module).detach()
        seen = Observed(keys=keys, values=values, queries=queries, layer=i)
        with kvevict.backend("reference"):
            torch.testing.assert_close(policy.norms(seen), norms, rtol=1e-5, atol=1e-6)
            press = kvpress.SnapKVPress()
            theirs = (press_scores(press, module, hidden, keys, values, model) + 1e-4) * norms
            before = slice(0, 130 - 64)
            torch.testing.assert_close(policy.scores(seen)[..., before], theirs[..., before], rtol=1e-3, atol=1e-6)
            assert not torch.allclose(plain.scores(seen)[..., before], theirs[..., before], rtol=1e-1)


def pressed(press, model):
    cache = DynamicCache()
    with torch.no_grad(), kvevict.backend("reference"), press(model):
        model(prompt(130), past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9])
def test_our_keydiff_as_a_press_keeps_what_their_own_does(layers, ratio):
    model, _ = layers
    ours = pressed(PolicyPress(ratio, KeyDiff(sink=0, recent=0)), model)
    theirs = pressed(kvpress.KeyDiffPress(ratio), model)
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):  # theirs by score, ours by position
            assert a.shape == b.shape
            torch.testing.assert_close(a.sort(2)[0], b.sort(2)[0])


@pytest.mark.parametrize("policy", [RECOMMENDED, AttentionMass(), SnapKV(), ExpectedAttention()])
def test_a_press_shows_a_policy_what_our_own_capture_does(layers, policy):
    """The first layer's input is whole for both, as is what later ones read: layers are cut after they attended."""
    model, found = layers
    press = PolicyPress(0.75, policy)
    for i, (layer, (_, hidden, keys, values, queries)) in enumerate(zip(pressed(press, model), found, strict=True)):
        with kvevict.backend("reference"):
            seen = Observed(keys=keys, values=values, queries=queries, hidden=hidden, layer=i)
            kept = press.policy.select(seen, 32)
        for mine, whole in zip(layer, (keys, values), strict=True):
            expected = whole.gather(2, kept[..., None].expand(-1, -1, -1, whole.shape[3]))
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family, options", [
    ("Granite", dict(attention_multiplier=0.05)), ("Phi3", dict(partial_rotary_factor=0.5)),
])  # fmt: skip
def test_a_press_keeps_what_an_evicting_cache_does(family, options):
    """A scale of the logits that is the model's own; RoPE of a half of each head."""
    model = tiny(getattr(transformers, f"{family}Config"), getattr(transformers, f"{family}ForCausalLM"), **options)
    ours, cache = pressed(PolicyPress(0.5, TOVA()), model), EvictingCache(model, TOVA(), keep=65)
    with torch.no_grad(), kvevict.backend("reference"):
        model(prompt(130), past_key_values=cache)
    for layer, held in zip(ours, cache.layers, strict=True):
        torch.testing.assert_close(layer, (held.keys, held.values), rtol=1e-4, atol=1e-5)


def test_a_press_refuses_what_it_cannot_serve():
    with pytest.raises(ValueError, match="policy reads last_used"):
        PolicyPress(0.5, LRU())
    with pytest.raises(ValueError, match="heads 'adaptive'"):
        PolicyPress(0.5, KeyDiff(heads="adaptive"))
    scorer = LearnedKV(weights=torch.zeros(2, 2, 20), inv_freq=torch.ones(4))
    with pytest.raises(ValueError, match="heads='shared'"):
        PolicyPress(0.5, scorer)
