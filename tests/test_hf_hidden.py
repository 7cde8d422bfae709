"""A scorer of hidden states in a cache: what it says of a token is held, follows it, and is all that is held.

The oracle keeps every hidden state that entered an attention, and scores it in float64 when asked.
"""

import copy
from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers")

from test_hf import prompt, reference_backend, tiny  # noqa: F401
from test_hf_places import Log

from kvevict.hf import EvictingCache
from kvevict.policies import Fixed, Hybrid, KeyDiff, Learned, LearnedKV, ModelWide, Shares


def scorer(model, seed=0, kind="linear", **fields):
    config, generator = model.config, torch.Generator().manual_seed(seed)
    L, H, M = config.num_hidden_layers, config.num_key_value_heads, config.hidden_size
    shapes = {"linear": ((L, H, M), (L, H)), "network": ((L, 9, M), (L, 9), (L, H, 9), (L, H))}[kind]
    return Learned(weights=tuple(torch.randn(shape, generator=generator) for shape in shapes), **fields)


def entering(model):
    """A list for each layer, to which its attention's inputs are added as they pass."""
    told = [[] for _ in model.model.layers]
    for layer, states in zip(model.model.layers, told, strict=True):
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, options, states=states: states.append(options["hidden_states"].detach().clone()),
            with_kwargs=True,
        )
    return told


def said(policy, states, layer):
    """[B, H, T] float64."""
    *first, w, b = (x[layer].double() for x in policy.weights)
    x = torch.cat(states[layer], 1).double()
    if first:
        x = (x @ first[0].T + first[1]).clamp(min=0)
    return (x @ w.T + b).transpose(1, 2)


class HiddenLog(Log):
    states = None

    def scores(self, layer, head, policy):
        return said(policy, self.states, layer)[0, head, self.held[layer][head]].float()


@pytest.mark.parametrize("kind", ["linear", "network"])
@pytest.mark.parametrize("heads", ["each", "shared"])
@torch.no_grad()
def test_a_cache_that_is_cut_again_keeps_what_was_said_of_its_tokens(kind, heads):
    """Prompt, decoding, chunks, over pages too; and nobody asks for noting_hidden."""
    model = tiny(head_dim=16)
    policy = scorer(model, kind=kind, heads=heads, sink=2, recent=4)
    cache = EvictingCache(model, policy, keep=1.0)
    log = HiddenLog(cache, None, 2, 4)
    log.states = entering(model)
    ids, done = prompt(90, seed=5), 0
    for new, keep in ((50, 0.6), (1, None), (1, None), (20, 0.5), (9, 0.5)):
        model(ids[:, done : done + new], past_key_values=cache)
        done += new
        log.come(new)
        if keep is not None:
            cache = copy.deepcopy(cache)
            cache.update = log_updates(log, cache)
            cache.evict(keep)
            log.evict(policy, keep)
        log.check(cache)


def log_updates(log, cache):
    update = type(cache).update.__get__(cache)

    def logged(keys, values, layer, *args, **options):
        for kept, new in zip(log.layers[layer], (keys, values), strict=True):
            kept.append(new.clone())
        return update(keys, values, layer, *args, **options)

    return logged


def held_scores(layer):
    """[B, H, slots]: as whole() has the tokens."""
    return layer.notes.all_predicted(None if layer.pages is None else layer.pages.lengths)


@pytest.mark.parametrize("heads", ["each", "shared"])
@torch.no_grad()
def test_a_budget_in_a_padded_batch_holds_each_tokens_score(heads):
    """A token is known by its key: of the log's keys it is the one that is equal."""
    model = tiny(head_dim=16)
    policy = scorer(model, heads=heads, sink=2, recent=4)
    cache = EvictingCache(model, policy, budget=30, interval=4)
    keys = [[] for _ in cache.layers]
    update = cache.update

    def logged(key_states, value_states, layer, *args, **options):
        keys[layer].append(key_states.clone())
        return update(key_states, value_states, layer, *args, **options)

    cache.update = logged
    states, ids = entering(model), prompt(70, batch=2, seed=3)
    mask = torch.ones_like(ids)
    mask[0, :15] = 0
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    for part in (slice(0, 40), slice(40, 60), *(slice(t, t + 1) for t in range(60, 70))):
        options = dict(attention_mask=mask[:, : part.stop], position_ids=position[:, part])
        model(ids[:, part], past_key_values=cache, **options)
    for i, layer in enumerate(cache.layers):
        assert layer.evicted
        held, expected, every = held_scores(layer), said(policy, states, i), torch.cat(keys[i], 2)
        whole = layer.whole()[0]
        assert held.shape == whole.shape[:3] and held.dtype == torch.float32
        for b in range(2):
            for h, n in enumerate(layer.tokens_of_heads()[b].tolist()):
                same = (whole[b, h, :n, None] == every[b, h]).all(-1)
                assert (same.sum(-1) >= 1).all()
                places = same.int().argmax(-1)
                torch.testing.assert_close(held[b, h, :n].double(), expected[b, h, places], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("heads", ["each", "shared"])
@torch.no_grad()
def test_scores_are_saved_follow_requests_and_what_is_taken_back(tmp_path, heads):
    model = tiny(head_dim=16)
    policy = scorer(model, heads=heads, sink=2, recent=4)
    cache = EvictingCache(model, policy, keep=0.5)
    ids = prompt(60, batch=2, seed=4)
    model(ids, past_key_values=cache)
    model(ids[:, :5], past_key_values=cache)
    before = [held_scores(layer) for layer in cache.layers]
    cache.save_pretrained(tmp_path)
    again = EvictingCache.from_pretrained(tmp_path, model, policy, keep=0.5)
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0]))
    for old, layer, loaded in zip(before, cache.layers, again.layers, strict=True):
        assert torch.equal(held_scores(loaded), old)
        for b in range(2):
            for h, n in enumerate(layer.tokens_of_heads()[b].tolist()):
                assert torch.equal(held_scores(layer)[b, h, :n], old[1 - b, h, :n])
    again.evict(0.5)
    assert sum(layer.kept for layer in again.report()) < sum(layer.kept for layer in cache.report())
    other = scorer(model, heads=heads, sink=2, recent=4, seed=5)
    with pytest.raises(ValueError, match="holds what another scorer said of its tokens"):
        EvictingCache.from_pretrained(tmp_path, model, other, keep=0.5)


@torch.no_grad()
def test_what_came_untold_is_refused_when_it_is_asked_for():
    model = tiny(head_dim=16)
    policy = scorer(model, heads="shared")
    cache = EvictingCache(model.config, policy, keep=0.5)
    model.set_attn_implementation("kvevict")
    with pytest.raises(ValueError, match="needs hidden: make the cache with the model"):
        model(prompt(60), past_key_values=cache)
    cache.reset()
    with cache.noting_hidden(model):
        model(prompt(60), past_key_values=cache)
    model(prompt(3), past_key_values=cache)
    with cache.noting_hidden(model):
        model(prompt(3), past_key_values=cache)
    with pytest.raises(ValueError, match="Learned needs hidden, which was not noted of all tokens"):
        cache.evict(0.5)
    other = EvictingCache(model, policy, keep=1.0)
    model(prompt(60), past_key_values=other)
    with pytest.raises(ValueError, match="Learned reads hidden states, which was not noted"):
        other.evict(0.5, scorer(model, seed=1, heads="shared"))
    other.evict(0.5, replace(policy, heads="each"))  # whose weights said it


@torch.no_grad()
def test_a_scorer_of_another_model_is_refused_at_an_eviction_too():
    model, wider = tiny(head_dim=16), tiny(head_dim=16, hidden_size=32)
    cache = EvictingCache(model, KeyDiff(), keep=1.0)
    model(prompt(60), past_key_values=cache)
    wrong = LearnedKV(weights=torch.ones(3, 2, 36), inv_freq=torch.ones(8), heads="shared")
    for policy, match in (
        (wrong, "inv_freq of other RoPE"), (Hybrid(parts=((1.0, wrong), (1.0, KeyDiff()))), "inv_freq of other RoPE"),
        (LearnedKV(weights=torch.ones(2, 2, 36), inv_freq=torch.ones(8)), r"expected \(3, 2, 36\)"),
        (scorer(wider), "3 layers of width 32 and 2 heads: expected 3, 64 and 2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            cache.evict(0.5, policy)
    assert cache.report()[0].kept == 60


def test_shares_of_a_scorer_are_those_of_the_layers_where_heads_share_their_tokens(tmp_path):
    model = tiny(head_dim=16)
    table = torch.tensor([[[0.1, 0.3], [0.4, 0.6], [0.9, 0.7]]])
    scorer(model, metadata={"model": "tiny"}, shares=Shares((0.5,), table)).save(tmp_path / "s.safetensors")
    policy = Learned.load(tmp_path / "s.safetensors", heads="shared")
    assert policy.metadata == {"model": "tiny"} and torch.equal(policy.shares.table, table)
    budget = EvictingCache(model, policy, keep=0.5)._budget
    assert isinstance(budget, Fixed) and budget.per_layer(3, 60) == Fixed(table[0].mean(1), 0.5).per_layer(3, 60)
    assert isinstance(EvictingCache(model, Learned.load(tmp_path / "s.safetensors"), keep=0.5)._budget, ModelWide)
    ids = prompt(60)
    cache = EvictingCache(model, policy, keep=0.5)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert [layer.kept for layer in cache.report()] == list(budget.per_layer(3, 60))
