"""Expected Attention, DefensiveKV and CriticalKV's norms: the published formulas, written out here once more; and an
EvictingCache that hands them a model's weights."""

import dataclasses
import math

import pytest
import torch
from cases import both, cache
from conftest import DEVICE

import kvevict
from kvevict.policies import OF_MODEL, DefensiveKV, ExpectedAttention, Hybrid, KeyDiff, ModelWide, Observed, SnapKV
from kvevict.policies.rotary import before_rope, turned

H, G, D, M = 2, 3, 16, 40
ANGLES = 100.0 ** -torch.linspace(0, 1, D // 2)


def observed(S=80, B=1, W=None, seed=0):
    """Keys, values and the last W queries of B requests, and W_O of one layer."""
    keys, values = cache((B, H, S, D, D), seed=seed)
    queries = cache((B, H * G, S, D, D), seed=seed + 1)[0] * 1.5 + 0.3
    weight = torch.randn(M, H * G * D, generator=torch.Generator().manual_seed(seed + 2)).to(DEVICE)
    return dict(keys=keys, values=values, queries=queries[:, :, S - (W or S) :]), weight


def l1_norms(values, weight):
    """[B, H, S] in float64: mean over a group's heads of the L1 norm of W_O's part times the value."""
    heads = weight.double().view(M, H, G, D)
    return torch.einsum("bhsd,mhgd->bhgsm", values.double(), heads).abs().sum(-1).mean(2)


def expected_attention(keys, values, queries, future=512, sinks=4):
    """As kvpress 0.5.5 computes it, of one request: a rotation matrix of each later position, and their mean."""
    S = keys.shape[2]
    angle = torch.cat([ANGLES, ANGLES]).double().to(DEVICE)
    half = D // 2
    P = torch.zeros(D, D, device=DEVICE).double()
    P[half:, :half], P[:half, half:] = torch.eye(half), -torch.eye(half)

    def rotation(position):
        return torch.diag((position * angle).cos()) + torch.diag((position * angle).sin()) @ P

    plain = torch.stack([queries[:, :, t].double() @ rotation(t) for t in range(sinks, S)], 2)  # R(t)ᵀ q
    mean = plain.mean(2)
    centred = plain - mean[:, :, None]
    covariance = torch.einsum("bnsi,bnsj->bnij", centred, centred) / plain.shape[2]
    R = torch.stack([rotation(S + t) for t in range(future)]).mean(0)
    mean, covariance = mean @ R.T, R @ covariance @ R.T
    later = keys[:, :, sinks:].double().repeat_interleave(G, 1)
    logits = torch.einsum("bhnd,bhd->bhn", later, mean) / math.sqrt(D)
    logits = logits + torch.einsum("bhni,bhij,bhnj->bhn", later, covariance, later) / D / 2
    return logits.softmax(-1).view(1, H, G, -1).mean(2) * values[:, :, sinks:].double().norm(dim=-1)


def test_expected_attention_is_the_published_formula():
    seen, _ = observed()
    exact = expected_attention(**seen)
    policy = ExpectedAttention(rotary=ANGLES)
    for scores in both(lambda: policy.scores(Observed(**seen))):
        torch.testing.assert_close(scores[..., 4:].double(), exact, rtol=1e-3, atol=1e-7)
        assert (scores[..., :4] == scores[..., 4:].amax(-1, keepdim=True)).all()
    plain = dataclasses.replace(policy, value_norms=None).scores(Observed(**seen))
    torch.testing.assert_close(plain[..., 4:].sum(-1), torch.ones(1, H, device=DEVICE))


def test_queries_in_parts_are_those_of_the_whole(monkeypatch):
    seen, _ = observed()
    policy = ExpectedAttention(rotary=ANGLES)
    whole = policy.scores(Observed(**seen))
    monkeypatch.setattr("kvevict.policies.expected.AT_ONCE", 7)
    torch.testing.assert_close(policy.scores(Observed(**seen)), whole, rtol=1e-4, atol=1e-8)


def test_turning_and_turning_back():
    x = cache((1, 1, 30, D, D))[0]
    positions = torch.arange(30, device=DEVICE)
    angle = positions[:, None] * ANGLES.to(DEVICE)
    again = before_rope(turned(x, angle.cos(), angle.sin()), ANGLES.to(DEVICE), positions)
    torch.testing.assert_close(again, x, atol=1e-5, rtol=0)
    by_hand = turned(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.zeros(2), torch.ones(2))
    assert by_hand.tolist() == [-3.0, -4.0, 1.0, 2.0, 5.0]


def defensive(keys, values, queries, weight):
    """[H, S] in float64, of one request, a row of attention at a time; infinite where a token goes first."""
    S, W = keys.shape[2], 32
    n = S - W
    most, mean = torch.zeros(H, n).double(), torch.zeros(H, n).double()
    drawn = 0.0
    for h in range(H):
        for g in range(G):
            for w in range(W):
                query = queries[0, h * G + g, w - W].double()
                row = (keys[0, h, : n + w + 1].double() @ query / math.sqrt(D)).softmax(0).cpu()[:n]
                pooled = torch.tensor([row[max(i - 2, 0) : i + 3].sum() / 5 for i in range(n)]).double()
                most[h] = torch.maximum(most[h], pooled / pooled.sum() * row.sum())
                mean[h] += row / (G * W)
    norms = l1_norms(values, weight)[0, :, :n].cpu()
    scores = most.clamp(min=most.mean(-1, keepdim=True)) * norms / norms.sum(-1, keepdim=True)
    for h in range(H):
        drawn = float(mean[h].sum())
        held = 0.0
        for i in mean[h].argsort(descending=True).tolist():
            held += float(mean[h, i]) / drawn
            if held >= 0.9 - (1.0 - drawn):
                break
            scores[h, i] = 1.0 + mean[h, i]
    return scores


def test_defensive_is_the_published_formula():
    seen, weight = observed(S=90)
    exact = defensive(**seen, weight=weight)
    policy = DefensiveKV(output=(weight,))
    for scores in both(lambda: policy.scores(Observed(**seen))):
        torch.testing.assert_close(scores[0, :, :58].double().cpu(), exact, rtol=1e-4, atol=1e-7)
        assert (scores[..., 58:] == float("-inf")).all() and 0 < (exact > 1).sum() < exact.numel()
    assert policy.protected == (4, 32) and policy.heads == "adaptive"


def test_what_goes_first_by_hand():
    """The window draws 0.2, so that of the rest, in parts of 0.8, less than 0.7 goes first: 0.5, but not 0.25 more."""
    mean = torch.tensor([[[0.2, 0.4, 0.1, 0.1]]])
    assert DefensiveKV._first(mean).tolist() == [[[False, True, False, False]]]
    assert DefensiveKV._first(torch.tensor([[[0.04, 0.04]]])).tolist() == [[[False, False]]]


@pytest.mark.parametrize("variant", ["kvpress", "original"])
def test_value_norms_weigh_attention(variant):
    seen, weight = observed(S=100, W=64)
    before = 100 - (64 if variant == "kvpress" else 32)
    plain = SnapKV(variant=variant).scores(Observed(**seen))[..., :before].double()
    norms = l1_norms(seen["values"], weight)[..., :before]
    for policy, expected in [
        (SnapKV(variant=variant, value_norms="output", output=(weight,)), (plain + 1e-4) * norms),
        (SnapKV(variant=variant, value_norms="l2"), plain * seen["values"][:, :, :before].double().norm(dim=-1)),
    ]:
        for scores in both(lambda policy=policy: policy.scores(Observed(**seen))):
            torch.testing.assert_close(scores[..., :before].double(), expected, rtol=1e-4, atol=1e-9)
            assert (scores[..., before:] == float("-inf")).all()


def every():
    _, weight = observed()
    return {
        "expected": ExpectedAttention(rotary=ANGLES),
        "defensive": DefensiveKV(output=(weight,), heads="each"),
        "critical": SnapKV(value_norms="output", output=(weight,)),
        "mixture": Hybrid(parts=((0.5, ExpectedAttention(rotary=ANGLES)), (0.5, KeyDiff()))),
    }


@pytest.mark.parametrize("policy", every().values(), ids=every())
def test_ragged_requests_are_as_if_alone(policy):
    """The second is shorter than the window, with its queries in front; what lies beyond is not read."""
    seen, _ = observed(S=70, B=3, W=70)
    lengths = torch.tensor([70, 20, 45], device=DEVICE)
    spoiled = {name: x.clone() for name, x in seen.items()}
    for b, n in enumerate(lengths.tolist()):
        for x in spoiled.values():
            x[b, :, n:] = float("nan")
    for indices in both(lambda: policy.select(Observed(**spoiled, lengths=lengths), 0.7)):
        for b, n in enumerate(lengths.tolist()):
            alone = Observed(**{name: x[b : b + 1, :, :n] for name, x in seen.items()})
            expected = policy.select(alone, 0.7)
            assert torch.equal(indices[b : b + 1, :, : expected.shape[2]], expected)
            assert (indices[b, :, expected.shape[2] :] == -1).all()


def test_what_is_not_bound_or_does_not_fit_is_refused():
    seen, weight = observed()
    for policy, message in [
        (ExpectedAttention(), "rotary is None: expected RoPE's angles"),
        (DefensiveKV(), "output is None: expected W_O of each layer, which DefensiveKV reads"),
        (SnapKV(value_norms="output", output=(weight[:, 16:],)), r"output has W_O of shape \(40, 80\)"),
        (SnapKV(value_norms="output", output=(None, weight)), "layer is 0: expected one of those that output has"),
    ]:
        with pytest.raises(ValueError, match=message):
            policy.select(Observed(**seen), 0.8)
    with pytest.raises(ValueError, match="value_norms is 'l1'"):
        SnapKV(value_norms="l1")
    with pytest.raises(ValueError, match="future is 0"):
        ExpectedAttention(future=0)
    assert {name: policy.unbound for name, policy in OF_MODEL.items()} == {
        "expected-attention": {"rotary"}, "defensivekv": {"output"}, "criticalkv": {"output"},
    }  # fmt: skip
    mixture = Hybrid(parts=((1, ExpectedAttention()), (1, DefensiveKV(heads="each"))))
    assert mixture.unbound == {"rotary", "output"} and not mixture.by_row
    assert not mixture.bound(rotary=ANGLES, output=(weight,)).unbound


class TestCache:
    @pytest.fixture(autouse=True)
    def reference(self):
        pytest.importorskip("transformers")
        with kvevict.backend("reference" if DEVICE == "cpu" else "triton"):
            yield

    @pytest.mark.parametrize("name", OF_MODEL)
    def test_a_name_is_enough(self, name):
        """What the cache keeps is what the policy chooses of the model's own keys, values and queries."""
        from test_hf import prompt, tiny

        from kvevict import models
        from kvevict.hf import EvictingCache
        from kvevict.hf.rotary import inv_freq
        from kvevict.hf.weights import output_weights

        model, seen = tiny(num_hidden_layers=2), []
        cut = EvictingCache(model, name, keep=0.6, on_evict=seen.append)
        model.generate(prompt(100), past_key_values=cut, max_new_tokens=3, do_sample=False)
        policy = OF_MODEL[name].bound(rotary=inv_freq(model), output=output_weights(model))
        from transformers import DynamicCache

        whole = DynamicCache()
        with torch.no_grad(), models.capture(model) as captured:
            model(prompt(100), past_key_values=whole)
        for i, eviction in enumerate(seen):
            layer = whole.layers[i]
            known = Observed(keys=layer.keys, values=layer.values, queries=captured.queries[i][0], layer=i)
            expected = policy.select(known, 0.6)
            assert torch.equal(eviction.indices, expected[..., : eviction.indices.shape[2]])
        assert [layer.kept for layer in cut.report()] == [62, 62]

    def test_what_is_not_served_is_refused_at_once(self):
        from test_hf import prompt, tiny

        from kvevict.hf import EvictingCache

        model = tiny(num_hidden_layers=2)
        for name, what in [("expected-attention", "rotary"), ("defensivekv", "output")]:
            with pytest.raises(ValueError, match=f"model is its config: expected the model itself, whose {what}"):
                EvictingCache(model.config, name, keep=0.5)
        with pytest.raises(ValueError, match="ExpectedAttention, which reads all queries of a prompt: expected keep="):
            EvictingCache(model, "expected-attention", budget=50)
        with pytest.raises(ValueError, match="DefensiveKV, which reads W_O of all heads of a layer at once"):
            EvictingCache(model, "defensivekv", budget=50)
        held = EvictingCache(model, DefensiveKV(heads="each"), budget=50, interval=8)
        model.generate(prompt(90), past_key_values=held, max_new_tokens=20, do_sample=False)
        assert held.report()[0].kept <= 58
        together = EvictingCache(model, DefensiveKV(heads="each"), keep=ModelWide(0.5))  # Layer-DefensiveKV
        model.generate(prompt(90), past_key_values=together, max_new_tokens=3, do_sample=False)
        held = [layer.tokens_of_heads().sum() for layer in together.layers]
        assert sum(map(int, held)) == 2 * 2 * 47 and held[0] != held[1]

    @pytest.mark.parametrize("name", OF_MODEL)
    def test_padded_requests_are_cut_as_if_alone(self, name):
        from test_hf import prompt, tiny

        from kvevict.hf import EvictingCache

        model, policy = tiny(num_hidden_layers=2), dataclasses.replace(OF_MODEL[name], heads="each")
        ids, shorter = prompt(90, batch=2), 70
        ids[1, : 90 - shorter] = 0
        mask = (ids != 0).long()

        def evicted(ids, mask):
            seen = []
            cache = EvictingCache(model, policy, keep=0.8, on_evict=seen.append)
            model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=3, do_sample=False)
            return [eviction.indices for eviction in seen]

        for together, *alone in zip(
            evicted(ids, mask),
            evicted(ids[:1], mask[:1]),
            evicted(ids[1:, -shorter:], mask[1:, -shorter:]),
            strict=True,
        ):
            for b, indices in enumerate(alone):
                assert torch.equal(together[b, :, : indices.shape[2]], indices[0])
                assert (together[b, :, indices.shape[2] :] == -1).all()
