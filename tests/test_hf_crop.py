"""Taking tokens back: crop, and the decoding methods of transformers that crop what they guessed wrong."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from test_hf import (  # noqa: F401
    by_hand,
    generate,
    learned,
    lengths,
    ours,
    padded,
    plain,
    prompt,
    reference_backend,
    tiny,
)

from kvevict.hf import EvictingCache
from kvevict.policies import RECOMMENDED, TOVA, AttentionMass, KeyDiff, Pyramid, SnapKV

HELP = dict(
    assistant=lambda: dict(assistant_model=tiny(seed=5)),
    itself=lambda: dict(assistant_model=tiny()),  # every guess is right
    lookup=lambda: dict(prompt_lookup_num_tokens=10, eos_token_id=1000),  # 5.0 fails where there is none
)
judged_first = pytest.mark.skipif(
    not hasattr(transformers.Cache, "activate_past_recording"), reason="older versions do not say that they will crop"
)


def repetitive(length):
    """A prompt in which lookup finds candidates."""
    return prompt(length // 4).repeat(1, 4)


@pytest.mark.parametrize("mode", [dict(keep=1.0), dict(keep=500), dict(budget=500)], ids=str)
@pytest.mark.parametrize("helper", HELP)
def test_assisted_decoding_says_what_greedy_says(ours, plain, helper, mode):  # noqa: F811
    ids = repetitive(80)
    expected = generate(plain, ids, new=24)
    for model in (plain, ours):
        cache = EvictingCache(model.config, KeyDiff(recent=8), **mode)
        assert torch.equal(generate(model, ids, new=24, past_key_values=cache, **HELP[helper]()), expected)
        assert lengths(cache) == [(103, 103)] * 3


@torch.no_grad()
def speculate(model, cache, ids, expected, wrong):
    """Decoding by guesses, of which the first ones are right and `wrong` are not. (transformers' own would read a
    prompt again that is cached already, into a DynamicCache too.)"""
    if hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()
    said = ids
    while said.shape[1] < expected.shape[1]:
        right = expected[:, said.shape[1] : said.shape[1] + 2]
        guesses = torch.cat([right, (right[:, -1:] + 1 + torch.arange(wrong, device=ids.device)) % 120], 1)
        seen = cache.get_seq_length()
        position = torch.arange(seen, seen + 1 + guesses.shape[1], device=ids.device)[None]
        logits = model(torch.cat([said[:, -1:], guesses], 1), past_key_values=cache, position_ids=position).logits
        own = logits.argmax(-1)
        matches = int((own[:, :-1] == guesses).long().cumprod(-1).sum())
        said = torch.cat([said, own[:, : matches + 1]], 1)
        cache.crop(matches - guesses.shape[1])
    return said


@pytest.mark.parametrize("mode", [dict(keep=0.5), dict(budget=100)], ids=str)
@pytest.mark.parametrize("policy", [KeyDiff(recent=4), RECOMMENDED, AttentionMass(recent=8, grace=8)],
                         ids=lambda p: type(p).__name__)  # fmt: skip
def test_decoding_by_guesses_over_an_evicted_cache_says_what_greedy_says(ours, policy, mode):  # noqa: F811
    ids = prompt(80)
    cache = EvictingCache(ours.config, policy, **mode)
    with torch.no_grad():
        ours(ids[:, :-1], past_key_values=cache)
    if "budget" in mode:
        cache.evict(0.5)
    expected = generate(ours, ids, new=25, past_key_values=copy.deepcopy(cache))
    said = speculate(ours, cache, ids, expected, wrong=9)
    assert torch.equal(said[:, :105], expected)
    assert lengths(cache) == [(said.shape[1] - 1, 40 + said.shape[1] - 80)] * 3


@judged_first
def test_the_first_round_of_assisted_decoding_sees_the_whole_prompt(plain):  # noqa: F811
    """The prompt is cut when its first guesses have been judged: with those that were right, without the others."""
    ids = repetitive(80)
    for helper, policy in (("itself", KeyDiff(recent=8)), ("assistant", KeyDiff(recent=8))):
        evictions = []
        cache = EvictingCache(plain.config, policy, keep=0.5, on_evict=evictions.append)
        said = generate(plain, ids, new=24, past_key_values=cache, **HELP[helper]())
        assert [e.before for e in evictions] == [evictions[0].before] * 3
        right = evictions[0].before - 80
        assert (right > 0) == (helper == "itself")
        whole = generate(plain, ids, new=right) if right else ids
        assert torch.equal(said, by_hand(plain, whole, policy, 0.5, new=24 - right))


@judged_first
def test_more_candidates_than_recent_tokens(plain, ours, caplog):  # noqa: F811
    """Guesses are judged before eviction, so it takes nothing that must be given back."""
    ids = repetitive(120)
    for model in (plain, ours):
        for mode in (dict(keep=0.5), dict(budget=60, interval=8)):
            cache = EvictingCache(model.config, KeyDiff(recent=4), **mode)
            said = generate(model, ids, new=30, past_key_values=cache, prompt_lookup_num_tokens=50)
            assert said.shape == (1, 150) and {seen for seen, _ in lengths(cache)} == {149}
    assert not [record for record in caplog.records if record.name == "kvevict"]  # they are no prompt in chunks
    cache = EvictingCache(ours.config, TOVA(recent=4), budget=60, interval=8)
    said = generate(ours, ids, new=30, past_key_values=cache, prompt_lookup_num_tokens=90)
    assert said.shape == (1, 150) and max(kept for _, kept in lengths(cache)) <= 68


@torch.no_grad()
def test_crop(plain):  # noqa: F811
    cache = EvictingCache(plain.config, KeyDiff(recent=8), keep=0.5)
    plain(prompt(100), past_key_values=cache)
    first = plain(prompt(5, seed=1), past_key_values=cache).logits
    cache.crop(-5)
    assert lengths(cache) == [(100, 50)] * 3
    torch.testing.assert_close(plain(prompt(5, seed=1), past_key_values=cache).logits, first)
    cache.crop(-9)  # into the recent tokens of the prompt, which eviction protects
    assert lengths(cache) == [(96, 46)] * 3
    cache.crop(0)
    with pytest.raises(ValueError, match="tokens_to_remove is -20: expected at least -4"):
        cache.crop(-20)
    cache.crop(95)  # to this length, as older versions of transformers mean it
    assert lengths(cache) == [(95, 45)] * 3
    with pytest.raises(ValueError, match="tokens_to_remove is 3"):
        cache.crop(3)
    for wrong in (-1.5, "-1", True):
        with pytest.raises(TypeError, match=f"tokens_to_remove is {wrong!r}"):
            cache.crop(wrong)
    assert lengths(cache) == [(95, 45)] * 3


@torch.no_grad()
def test_a_budget_below_the_protected_tokens_can_be_cropped_as_far_as_it_kept_the_last(plain):  # noqa: F811
    evictions = []
    cache = EvictingCache(plain.config, KeyDiff(sink=4, recent=32), budget=10, interval=0, on_evict=evictions.append)
    plain(prompt(50), past_key_values=cache)
    cache.settle()
    assert evictions[0].indices[0, 0].tolist() == [0, 1, 2, 3, 44, 45, 46, 47, 48, 49]
    with pytest.raises(ValueError, match="expected at least -6"):
        cache.crop(-7)
    cache.crop(-6)
    assert lengths(cache) == [(44, 4)] * 3


@torch.no_grad()
def test_nothing_given_up_is_all_croppable_and_twice_cut_is_not(plain):  # noqa: F811
    cache = EvictingCache(plain.config, KeyDiff(recent=8), keep=1.0)
    plain(prompt(60), past_key_values=cache)
    cache.crop(-50)
    assert lengths(cache) == [(10, 10)] * 3
    cache = EvictingCache(plain.config, KeyDiff(recent=8), budget=200)
    plain(prompt(60), past_key_values=cache)
    cache.evict(30)
    cache.crop(-3)
    cache.evict(27)  # gives up nothing: 5 of the 8 recent tokens are left, and no others are known to be the last
    with pytest.raises(ValueError, match="expected at least -5"):
        cache.crop(-6)
    cache.crop(-5)


@torch.no_grad()
def test_a_refused_crop_changes_no_layer(ours):  # noqa: F811
    cache = EvictingCache(ours.config, KeyDiff(recent=8), budget=200)
    ours(prompt(60), past_key_values=cache)
    cache.evict(Pyramid(30, steepness=10.0))
    ours(prompt(4, seed=1), past_key_values=cache)
    last = cache.layers[2]
    assert last.cached() == 3 + 4  # no sink is to be had below 4, and nothing recent with them
    before = lengths(cache)
    with pytest.raises(ValueError, match="expected at least -4"):
        cache.crop(-6)
    assert lengths(cache) == before


def same_as_fresh(model, policy, ids, mask, count, keep=0.5):
    """Reading, cropping and evicting keeps what eviction keeps that never saw the tokens which were cropped."""
    kept = []
    for whole in (True, False):
        evictions = []
        cache = EvictingCache(model.config, policy, budget=400, on_evict=evictions.append)
        width = ids.shape[1] - (0 if whole else count)
        with cache.noting_hidden(model):
            model(ids[:, : width - 4 + (0 if whole else 4)], attention_mask=mask[:, : width - 4 + (0 if whole else 4)],
                  past_key_values=cache)  # fmt: skip
            if whole:
                model(ids[:, -4:], attention_mask=mask, past_key_values=cache)
                cache.crop(-count)
        cache.evict(keep)
        kept.append((evictions, cache))
    (cropped, a), (fresh, b) = kept
    for one, other in zip(cropped, fresh, strict=True):
        assert torch.equal(one.indices, other.indices)
    assert lengths(a) == lengths(b)
    for one, other in zip(a.layers, b.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys)
        assert (one.lengths is None) == (other.lengths is None)
        assert one.lengths is None or torch.equal(one.lengths, other.lengths)


@torch.no_grad()
@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("policy", [KeyDiff(recent=8), TOVA(recent=8), SnapKV(recent=8), RECOMMENDED, learned()],
                         ids=["KeyDiff", "TOVA", "SnapKV", "RECOMMENDED", "Learned"])  # fmt: skip
def test_evicting_after_a_crop(ours, policy, batch):  # noqa: F811
    """Queries, hidden states, lengths: all of them forget the cropped tokens."""
    ids, mask = (prompt(90), torch.ones(1, 90, dtype=torch.long)) if batch == "one" else padded()
    same_as_fresh(ours, policy, ids, mask, count=7)


@torch.no_grad()
def test_a_tracker_forgets_cropped_tokens(ours):  # noqa: F811
    """What they gave to others' mass stays; they themselves and their positions go."""
    ids, mask = padded()
    cache = EvictingCache(ours.config, AttentionMass(recent=8, grace=8), budget=400)
    ours(ids[:, :-4], attention_mask=mask[:, :-4], past_key_values=cache)
    before = [(layer.notes.tracker.lengths.clone(), layer.notes.tracker.positions.clone()) for layer in cache.layers]
    ours(ids[:, -4:], attention_mask=mask, past_key_values=cache)
    cache.crop(-4)
    for layer, (held, positions) in zip(cache.layers, before, strict=True):
        tracker = layer.notes.tracker
        assert torch.equal(tracker.lengths, held) and torch.equal(layer.lengths, held)
        assert torch.equal(tracker.positions[:, :, : positions.shape[2]], positions)
        assert (tracker.positions[:, :, positions.shape[2] :] == -1).all()
    cache.evict(0.5)


@torch.no_grad()
def test_cropping_every_query_is_said(ours):  # noqa: F811
    cache = EvictingCache(ours.config, TOVA(recent=8), budget=400)
    ours(prompt(100), past_key_values=cache)
    cache.crop(-80)
    with pytest.raises(ValueError, match="TOVA needs queries.*cropped"):
        cache.evict(0.5)
    ours(prompt(3, seed=1), past_key_values=cache)
    cache.evict(0.5)
    assert lengths(cache) == [(23, 12)] * 3


def test_a_sliding_window_that_cannot_be_cropped_refuses_for_all():
    model = tiny(transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM, head_dim=16, sliding_window=24,
                 num_hidden_layers=4, layer_types=["full_attention", "sliding_attention"] * 2)  # fmt: skip
    cache = EvictingCache(model.config, KeyDiff(recent=8), keep=1.0)
    with torch.no_grad():
        model(prompt(60), past_key_values=cache)
    before = lengths(cache)
    with pytest.raises((RuntimeError, ValueError), match="crop"):
        cache.crop(-3)
    assert lengths(cache) == before
