"""Positions follow a cache's tokens: whatever was evicted, a policy that reads them sees each token's own.

The oracle keeps every key and value that ever came, turns each key back by its place in the log, and never looks at
what the cache notes.
"""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from test_hf import prompt, reference_backend, tiny  # noqa: F401
from test_learned_kv import fitted_to

from kvevict.hf import EvictingCache
from kvevict.hf.places import Places
from kvevict.hf.rotary import before_rope, inv_freq
from kvevict.policies import KeyDiff, Uniform, model_wide


def test_by_hand():
    """Of 6 tokens heads keep 0, 2, 5 and 1, 4; two more come; then the first and the last of the 4 or 5 stay."""
    places = Places.whole(torch.tensor([[6, 6]])).after(
        torch.tensor([[[0, 2, 5], [1, 4, -1]]]), torch.tensor([[6, 6]]), 6
    )
    places = places.advanced(2)
    held = torch.tensor([[5, 4]])
    assert places.of(held, 5)[0, 0].tolist() == [0, 2, 5, 6, 7] and places.of(held, 5)[0, 1, :4].tolist() == [
        1,
        4,
        6,
        7,
    ]
    left = places.after(torch.tensor([[[0, 4], [0, 3]]]), held, 5)
    assert left.of(torch.tensor([[2, 2]]), 2).tolist() == [[[0, 7], [1, 7]]]
    back = left.advanced(1).advanced(-2)  # the new token, and one that was kept, are taken back
    assert back.of(torch.tensor([[1, 1]]), 1).tolist() == [[[0], [1]]]
    assert back.advanced(1).of(torch.tensor([[2, 2]]), 2).tolist() == [[[0, 7], [1, 7]]]


class Log:
    """All keys and values that came to a cache, and what of them each head holds: lists of places in the log."""

    def __init__(self, cache, angles, sink, recent):
        self.layers = [([], []) for _ in cache.layers]
        self.angles, self.protected = angles, (sink, recent)
        self.held = None
        update = cache.update

        def logged(keys, values, layer, *args, **options):
            self.layers[layer][0].append(keys.clone())
            self.layers[layer][1].append(values.clone())
            return update(keys, values, layer, *args, **options)

        cache.update = logged

    def whole(self, layer):
        return tuple(torch.cat(of, 2)[0] for of in self.layers[layer])

    def come(self, count):
        H, total = self.whole(0)[0].shape[:2]
        if self.held is None:
            self.held = [[[] for _ in range(H)] for _ in self.layers]
        for layer in self.held:
            for head in layer:
                head.extend(range(total - count, total))

    def scores(self, layer, head, policy):
        keys, values = self.whole(layer)
        turned = before_rope(keys, self.angles)[head, self.held[layer][head]]
        unit = torch.nn.functional.normalize(turned, dim=-1)
        cosine = torch.nn.functional.cosine_similarity(turned, unit.mean(0)[None], dim=-1)
        if isinstance(policy, KeyDiff):
            return -cosine
        value = values[head, self.held[layer][head]]
        norms = [x.norm(dim=-1, keepdim=True).log() for x in (turned, value)]
        x = torch.cat([turned, value, *norms, cosine[:, None], torch.ones(len(turned), 1)], -1)
        fitted = x @ policy.weights[layer, head]
        z = (-cosine - (-cosine).mean()) / cosine.std(correction=0)
        return fitted + fitted.std(correction=0) * z

    def evict(self, policy, keep):
        """By the best of all, or the mean over a layer's heads."""
        S = max(len(head) for layer in self.held for head in layer)
        scores = [
            torch.stack([
                torch.nn.functional.pad(s, (0, S - len(s)), value=float("-inf"))
                for s in (self.scores(i, h, policy) for h in range(len(layer)))
            ])[None]
            for i, layer in enumerate(self.held)
        ]  # fmt: skip
        sink, recent = self.protected
        if policy.heads == "each":
            lengths = torch.tensor([[len(head) for layer in self.held for head in layer]])
            chosen = [x[0].tolist() for x in model_wide(scores, keep, sink=sink, recent=recent, lengths=lengths)]
        else:
            n = round(keep * S)
            chosen = []
            for layer in scores:
                mean = layer[0].mean(0)[sink : S - recent].topk(n - sink - recent).indices + sink
                row = [*range(sink), *sorted(mean.tolist()), *range(S - recent, S)]
                chosen.append([row] * layer.shape[1])
        self.held = [
            [[held[i] for i in kept if i >= 0] for held, kept in zip(heads, rows, strict=True)]
            for heads, rows in zip(self.held, chosen, strict=True)
        ]

    def check(self, cache):
        for i, layer in enumerate(cache.layers):
            keys, values, _ = layer.whole()
            for h, held in enumerate(self.held[i]):
                for found, logged in zip((keys, values), self.whole(i), strict=True):
                    torch.testing.assert_close(found[0, h, : len(held)], logged[h, held], atol=0, rtol=0)
                assert layer.tokens_of_heads()[0, h] == len(held)


@pytest.mark.parametrize("kind", ["learned, model-wide", "learned, shared", "keydiff, shared"])
@torch.no_grad()
def test_a_cache_that_is_cut_again_keeps_what_its_tokens_own_positions_say(kind):
    model = tiny(head_dim=16)
    heads = "each" if "wide" in kind else "shared"
    options = dict(heads=heads, sink=2, recent=4)
    angles = inv_freq(model)
    policy = KeyDiff(rotary=angles, **options) if "keydiff" in kind else fitted_to(model, **options)
    cache = EvictingCache(model, policy, keep=1.0)
    log = Log(cache, angles, 2, 4)
    ids = prompt(90, seed=5)
    done = 0
    for new, keep in ((50, 0.6), (1, None), (1, None), (20, 0.5), (9, 0.5)):
        model(ids[:, done : done + new], past_key_values=cache)
        done += new
        log.come(new)
        if keep is not None:
            cache.evict(keep)
            log.evict(policy, keep)
        log.check(cache)


@pytest.mark.parametrize("heads", ["each", "shared"])
@torch.no_grad()
def test_a_budget_in_a_padded_batch_knows_each_tokens_position(heads):
    """Turned back by it, a key of the first layer is that of the token which stands there."""
    model = tiny(head_dim=16)
    policy = fitted_to(model, heads=heads, sink=2, recent=4)
    ids = prompt(70, batch=2, seed=3)
    pads = (15, 0)
    mask = torch.ones_like(ids)
    mask[0, : pads[0]] = 0
    cache = EvictingCache(model, policy, budget=30, interval=4)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    for part in (slice(0, 40), slice(40, 60), *(slice(t, t + 1) for t in range(60, 70))):
        options = dict(attention_mask=mask[:, : part.stop], position_ids=position[:, part])
        model(ids[:, part], past_key_values=cache, **options)
    first, layer = model.model.layers[0], cache.layers[0]
    tokens = first.self_attn.k_proj(first.input_layernorm(model.model.embed_tokens(ids))).unflatten(-1, (2, 16))
    positions, seen = layer.positions()
    keys = before_rope(layer.whole()[0], inv_freq(model), positions)
    assert seen.tolist() == [55, 70] and layer.evicted
    for b in range(2):
        for h, n in enumerate(layer.tokens_of_heads()[b].tolist()):
            places = positions[b, h, :n]
            assert (places.diff() > 0).all() and places[-1] == seen[b] - 1
            torch.testing.assert_close(keys[b, h, :n], tokens[b, pads[b] + places, h], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_positions_are_saved_follow_requests_and_what_is_taken_back(tmp_path):
    model = tiny(head_dim=16)
    policy = fitted_to(model, sink=2, recent=4)
    cache = EvictingCache(model, policy, keep=0.5)
    ids = prompt(60, batch=2, seed=4)
    model(ids, past_key_values=cache)
    model(ids[:, :5], past_key_values=cache)
    before = [layer.positions()[0] for layer in cache.layers]
    cache.save_pretrained(tmp_path)
    again = EvictingCache.from_pretrained(tmp_path, model, policy, keep=0.5)
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0]))
    for old, layer, loaded in zip(before, cache.layers, again.layers, strict=True):
        found, seen = layer.positions()
        assert seen.tolist() == [63, 63] and loaded.positions()[1].tolist() == [65, 65]
        assert torch.equal(loaded.positions()[0], old)
        for b in range(2):
            for h, n in enumerate(layer.tokens_of_heads()[b].tolist()):
                assert torch.equal(found[b, h, :n], old[1 - b, h, :n])
    again.evict(0.5)
    assert sum(layer.kept for layer in again.report()) < sum(layer.kept for layer in cache.report())


@torch.no_grad()
def test_what_was_evicted_before_positions_were_noted_is_refused():
    model = tiny(head_dim=16)
    cache = EvictingCache(model, KeyDiff(), keep=0.5)
    model(prompt(40), past_key_values=cache)
    cache.layers[0].policy = KeyDiff(rotary=inv_freq(model))
    with pytest.raises(ValueError, match="KeyDiff reads positions, and tokens were evicted before these were noted"):
        cache.layers[0].choose(0.5)
    with pytest.raises(ValueError, match="static is True .* without their positions"):
        EvictingCache(model, KeyDiff(rotary=inv_freq(model)), budget=30, static=True)
    assert EvictingCache(model, KeyDiff(rotary=inv_freq(model)), keep=Uniform(0.5)).get_seq_length() == 0
