"""Policies on far attention: what a Tracker notes through decoding is what one pass over all queries gives."""

import pytest
import torch
from cases import both, cache
from conftest import DEVICE

import kvevict
from kvevict.policies import TOVA, AttentionMass, Hybrid, KeyDiff, Tracker

FAR = AttentionMass(min_distance=8, recent=4, grace=0)
FAR_MAX = AttentionMass(reduce="max", normalize=None, min_distance=8, recent=4, grace=0)


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("lengths", [None, [50, 31]], ids=["equal", "ragged"])
def test_a_tracker_notes_far_attention_token_by_token(reduce, lengths):
    """A prompt of all but six tokens, and six decode steps: as if all queries had come at once."""
    keys, values = cache((2, 2, 50, 16, 16))
    queries = cache((2, 6, 50, 16, 16), seed=1)[0]
    ends = torch.tensor(lengths or [50, 50], device=DEVICE)

    def noted():
        tracker = Tracker(2, 2, 50, DEVICE, reduce=reduce, min_distance=5)
        tracker.append(ends - 6)
        tracker.observe(queries[:, :, :44], keys[:, :, :44])
        for step in range(6, 0, -1):
            tracker.append(1)
            last = (ends - step)[:, None, None, None].expand(-1, 6, 1, 16)
            most = 51 - step
            out = tracker.attend(queries.gather(2, last), keys[:, :, :most], values[:, :, :most])
            assert out.shape == (2, 6, 1, 16)
        return tracker.mass

    group, masses = 3 if reduce == "sum" else 1, both(noted)
    for b in range(2):
        n = int(ends[b])
        row = (slice(b, b + 1), slice(None), slice(n))
        with kvevict.backend("reference"):
            expected = kvevict.attention_mass(queries[row], keys[row], reduce=reduce, min_distance=5) / group
        for mass in masses:
            torch.testing.assert_close(mass[row], expected, rtol=1e-5, atol=1e-7)
            assert (mass[b, :, n - 5 :] == 0).all()


@pytest.mark.parametrize("policy", [FAR, FAR_MAX], ids=["mean", "max"])
def test_keeps_what_far_queries_attend_to(policy):
    keys, values = cache((1, 2, 60, 16, 16))
    queries = cache((1, 4, 60, 16, 16), seed=1)[0]
    weights = (
        (queries.view(2, 2, 60, 16) @ keys[0, :, None].mT / 4)
        .masked_fill(torch.ones(60, 60, dtype=torch.bool, device=DEVICE).triu(1), float("-inf"))
        .softmax(-1)
    )  # [heads, group, queries, keys]
    far = torch.ones(60, 60, dtype=torch.bool, device=DEVICE).tril(-8)
    weights = weights.masked_fill(~far, 0.0)
    scores = weights.amax((1, 2)) if policy.reduce == "max" else weights.sum((1, 2)) / far.sum(0).clamp(min=1)
    scores[:, :4], scores[:, -8:] = float("inf"), float("inf")
    expected = scores.topk(20).indices.sort(-1).values
    for result in both(lambda: policy.compact(keys, values, keep=20, inplace=False, queries=queries)):
        assert torch.equal(result.indices[0], expected)


def test_arguments_are_checked():
    assert FAR.protected == (4, 8) and AttentionMass(min_distance=64).protected == (4, 64)
    with pytest.raises(ValueError, match="min_distance is -1"):
        AttentionMass(min_distance=-1)
    with pytest.raises(ValueError, match="reduce is 'mean'"):
        AttentionMass(reduce="mean")
    with pytest.raises(ValueError, match="normalize is 'count': expected None with reduce='max'"):
        AttentionMass(reduce="max")
    with pytest.raises(ValueError, match="parts read mass of several kinds"):
        Hybrid(parts=((1, FAR), (1, AttentionMass())))
    mixture = Hybrid(parts=((1, TOVA()), (1, FAR_MAX), (1, KeyDiff())))
    assert mixture.noted == ("max", 8) and mixture.protected == (4, 32) and Hybrid().noted == ("sum", 0)


@pytest.mark.parametrize("policy", [FAR, FAR_MAX], ids=["mean", "max"])
def test_a_cache_notes_it(policy):
    """keep= cuts a prompt by it; budget= goes on noting it while tokens are decoded and evicted."""
    pytest.importorskip("transformers")
    from test_hf import prompt, tiny

    from kvevict.hf import EvictingCache

    model = tiny(num_hidden_layers=2)
    with kvevict.backend("reference" if DEVICE == "cpu" else "triton"):
        seen = []
        cache = EvictingCache(model, policy, keep=0.5, on_evict=seen.append)
        model(prompt(60), past_key_values=cache)
        whole = EvictingCache(model, AttentionMass(min_distance=8, reduce=policy.reduce, normalize=None), budget=200)
        model(prompt(60), past_key_values=whole)
        for layer, eviction in enumerate(seen):
            mass = whole.layers[layer].notes.tracker.mass
            assert (mass[:, :, -8:] == 0).all() and (mass[:, :, :-8] > 0).all()
            scores = mass if policy is FAR_MAX else mass / (52 - torch.arange(60, device=DEVICE)).clamp(min=1)
            expected = kvevict.topk_indices(scores.contiguous(), 30, sink=4, recent=8)
            assert torch.equal(eviction.indices, expected)
        held = EvictingCache(model, policy, budget=24, interval=4)
        model.generate(prompt(60), past_key_values=held, max_new_tokens=12, do_sample=False)
        assert held.get_seq_length() == 71 and held.report()[0].kept <= 28
