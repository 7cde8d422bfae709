"""Unequal layers and heads: counts by hand and as properties, choices over heads and layers against plain Python."""

import math

import pytest
import torch
from cases import both
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from kvevict.policies import (
    NAMED,
    TOVA,
    AttentionMass,
    Fixed,
    Hybrid,
    KeyDiff,
    LayerWide,
    ModelWide,
    Observed,
    Policy,
    Pyramid,
    Recency,
    Shares,
    SnapKV,
    Tracker,
    Uniform,
    budgets,
    model_wide,
)

NAN = float("nan")


def best_first(scores):
    """Keys of a dict of scores, the best first, NaN last, ties in order."""
    return sorted(scores, key=lambda at: (math.isnan(scores[at]), 0.0 if math.isnan(scores[at]) else -scores[at], at))


def row_of(scores, count, sink, recent):
    """Kept tokens of a row of scores, in plain Python: protection, then the best."""
    count = min(count, len(scores))
    first = min(sink, count)
    last = len(scores) - min(recent, count - first)
    protected = [*range(first), *range(last, len(scores))]
    return sorted(protected + best_first({i: scores[i] for i in range(first, last)})[: count - len(protected)])


def over_rows(rows, n, floor, sink, recent):
    """Kept tokens of each of some rows that keep n each on average: their floors, then the best of all."""
    least = min(max(sink + recent, math.floor(floor * n + 0.5)), n)
    kept = [set(row_of(row, least, sink, recent)) for row in rows]
    left = min(n * len(rows), sum(map(len, rows))) - sum(map(len, kept))
    others = {(r, i): x for r, row in enumerate(rows) for i, x in enumerate(row) if i not in kept[r]}
    for r, i in best_first(others)[:left]:
        kept[r].add(i)
    return [sorted(tokens) for tokens in kept]


def tokens(row):
    """The indices of a row without its padding, which has to be behind them."""
    found = [i for i in row if i >= 0]
    assert row == found + [-1] * (len(row) - len(found))
    return found


def few_values(*shape, seed=0):
    """Scores full of ties, some NaN."""
    scores = torch.randint(0, 6, shape, generator=torch.Generator().manual_seed(seed)).float()
    return scores.masked_fill(scores == 5, NAN).to(DEVICE)


class Given(Policy):
    """Scores as they are given, in the first element of the keys; they compare over the whole model."""

    comparable = "model"

    def scores(self, seen):
        return seen.keys[..., 0].float().contiguous()


# Counts.


def test_fixed_by_hand():
    shares = torch.tensor([[0.6, 0.2], [0.1, 0.1]])
    assert Fixed(shares, 0.25).per_head(2, 2, 100) == ((60, 20), (10, 10))
    assert Fixed(shares, 25).per_head(2, 2, 100) == ((60, 20), (10, 10))
    assert Fixed(10 * shares, 0.25).per_head(2, 2, 100) == ((60, 20), (10, 10))  # ratios alone count
    # 20 tokens are protected, so 60 are left for two heads that share 3 to 1: 45, and no fewer than 20 for the other.
    assert Fixed(shares, 0.25).per_head(2, 2, 100, protected=20) == ((40, 20), (20, 20))
    assert Fixed(shares, 0.25).per_head(2, 2, 100, protected=50) == ((25, 25), (25, 25))
    # Half of the tokens: 120 for the first head are 100, the others share what is left 2 to 1 to 1.
    assert Fixed(shares, 0.5).per_head(2, 2, 100) == ((100, 50), (25, 25))
    assert Fixed(shares, 1.0).per_head(2, 2, 100) == ((100, 100), (100, 100))
    # 10 tokens for three equal heads: ⌊c · share⌋ is 3 each, the one that is missing is the first head's.
    assert Fixed(torch.tensor([[0.2, 0.1, 0.1], [0.1, 0.1, 0.1]]), 3).per_head(2, 3, 9) == ((6, 3, 3), (2, 2, 2))
    # One token a head, for the model's smallest shares too.
    assert Fixed(torch.tensor([[1.0, 1e-6]]), 0.5).per_head(1, 2, 10) == ((9, 1),)


def test_fixed_per_layer_by_hand():
    shares = torch.tensor([[0.6, 0.2], [0.1, 0.1]])  # 0.4 and 0.1
    for budget in (Fixed(shares, 0.25, per="layer"), Fixed(shares.mean(1), 0.25), Fixed(shares.mean(1), 0.25, "head")):
        assert (budget.per, budget.spread) == ("layer", "layers")
        assert budget.per_layer(2, 100) == (40, 10)
        assert budget.per_head(2, 3, 100, protected=36) == ((40, 40, 40), (10, 10, 10))
    assert Fixed(shares, 0.25).per_layer(2, 100) == (40, 10)
    assert Fixed(shares, 0.25).spread == "heads"


@pytest.mark.parametrize("factor", [1e-30, 1e12])
def test_only_the_ratios_of_shares_count(factor):
    shares = factor * torch.tensor([[6.0, 4.0], [1.0, 9.0]])
    assert Fixed(shares, 50).per_head(2, 2, 1000) == ((60, 40), (10, 90))


def test_fixed_takes_the_shares_of_its_keep():
    """Measured at 0.2 and 0.6; a number of tokens is a share of those there are."""
    table = torch.tensor([[[0.1, 0.3]], [[0.6, 0.6]]])
    shares = Shares((0.2, 0.6), table)
    assert Fixed(shares, 0.2).per_head(1, 2, 100) == ((10, 30),)
    assert Fixed(shares, 20).per_head(1, 2, 100) == ((10, 30),)
    assert Fixed(shares, 0.6).per_head(1, 2, 100) == ((60, 60),)
    assert Fixed(shares, 40).per_head(1, 2, 100) == ((35, 45),)  # half-way: 0.35, 0.45
    assert Fixed(shares, 0.1).per_head(1, 2, 100) == ((5, 15),)


def test_fixed_reads_files_and_packaged_shares(tmp_path, monkeypatch):
    shares = Shares((0.2,), torch.tensor([[[0.1, 0.3]]]))
    path = tmp_path / "tiny.safetensors"
    shares.save(path)
    monkeypatch.setattr("kvevict.policies.shares._packaged", lambda: {"tiny": shares})
    for source in (path, str(path), "tiny", shares):
        assert Fixed(source, 0.2).per_head(1, 2, 100) == ((10, 30),)
    assert Fixed("tiny", 0.2) == Fixed("tiny", 0.2) and hash(Fixed("tiny", 0.2)) == hash(Fixed("tiny", 0.2))
    assert Fixed("tiny", 0.2) != Fixed("tiny", 0.3)


def test_fixed_says_what_does_not_fit():
    shares = torch.tensor([[0.6, 0.2], [0.1, 0.1]])
    for wrong, match in [
        (shares[None], r"shares has shape \(1, 2, 2\)"), (shares[:0], "shares has shape"), (-shares, "table is"),
        ("gpt-9", "name is 'gpt-9'"), ([0.5], "shares is list"),
    ]:  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=match):
            Fixed(wrong, 0.5)
    with pytest.raises(FileNotFoundError):
        Fixed("none.safetensors", 0.5)
    with pytest.raises(ValueError, match="per is 'row'"):
        Fixed(shares, 0.5, per="row")
    with pytest.raises(ValueError, match="keep is 1.5"):
        Fixed(shares, 1.5)
    with pytest.raises(ValueError, match="2 layers: expected 3"):
        Fixed(shares, 0.5).per_layer(3, 10)
    with pytest.raises(ValueError, match="2 heads a layer: expected 8"):
        Fixed(shares, 0.5).per_head(2, 8, 10)
    with pytest.raises(ValueError, match="keep is 20"):
        Fixed(shares, 20).per_head(2, 2, 10)


def fixed_by_steps(weights, total, least, most):
    """⌊c · weight⌋ within bounds by walking through every c at which a count changes, in fractions."""
    from fractions import Fraction

    exact = [Fraction(max(round(w / max(weights) * 2**40), 1)) for w in weights]
    best = [least] * len(exact)
    for c in sorted({Fraction(k) / w for w in exact for k in range(least + 1, most + 1)}):
        counts = [min(max(math.floor(c * w), least), most) for w in exact]
        if sum(counts) > total:
            break
        best = counts
    order = sorted((i for i in range(len(best)) if best[i] < most), key=lambda i: (-exact[i], i))
    for i in order[: total - sum(best)]:
        best[i] += 1
    return best


def test_two_shares_that_grow_at_nearly_the_same_c():
    """0.1 · 2⁴⁰ is rounded up, so that this head has its second token just before the other its fifth."""
    assert budgets._shared_out([1.0, 1.0, 0.25, 0.125, 0.125, 0.1], 30, 1, 10) == [10, 10, 4, 2, 2, 2]


@settings(max_examples=150, deadline=None)
@given(
    weights=st.lists(st.one_of(st.floats(1e-9, 2.0), st.sampled_from([0.1, 0.2, 0.4])), min_size=1, max_size=8),
    most=st.integers(1, 40), data=st.data(),
)  # fmt: skip
def test_fixed_counts_are_those_of_the_largest_c(weights, most, data):
    n = data.draw(st.integers(1, most))
    least = data.draw(st.integers(1, n))
    total = n * len(weights)
    counts = budgets._shared_out(weights, total, least, most)
    assert counts == fixed_by_steps(weights, total, least, most)
    assert sum(counts) == total and min(counts) >= least and max(counts) <= most


@settings(max_examples=100, deadline=None)
@given(
    layers=st.integers(1, 12), heads=st.integers(1, 5), count=st.integers(1, 2**62), keep=st.floats(0.001, 1.0),
    protected=st.integers(0, 200), seed=st.integers(0, 9),
)  # fmt: skip
def test_budgets_keep_their_total_over_heads(layers, heads, count, keep, protected, seed):
    shares = torch.rand(layers, heads, generator=torch.Generator().manual_seed(seed)) ** 4 + 1e-6
    n = Uniform(keep).per_layer(1, count)[0]
    for budget in (Uniform(keep), Pyramid(keep), Fixed(shares, keep), Fixed(shares, keep, per="layer")):
        per_layer, per_head = budget.per_layer(layers, count), budget.per_head(layers, heads, count, protected)
        assert len(per_layer) == layers and sum(per_layer) == layers * n
        assert [len(row) for row in per_head] == [heads] * layers and sum(map(sum, per_head)) == layers * heads * n
        if budget.spread == "layers":
            assert per_head == tuple((kept,) * heads for kept in per_layer)
        least = max(min(protected, n), 1) if budget.spread == "heads" else 1
        assert all(least <= kept <= count for row in per_head for kept in row)
    # A larger share keeps no less.
    kept = torch.tensor(Fixed(shares, keep).per_head(layers, heads, count)).flatten()
    assert (kept[shares.flatten().argsort()].diff() >= 0).all()


def test_counts_that_follow_from_scores_are_not_told_before():
    assert LayerWide(0.5).per_layer(3, 9) == (5, 5, 5) and LayerWide(0.5).floor == 0.2
    assert [b.spread for b in (Uniform(1), Pyramid(1), LayerWide(1), ModelWide(1))] == [
        "layers", "layers", "layer-wide", "model-wide"]  # fmt: skip
    with pytest.raises(ValueError, match="LayerWide has no counts of heads"):
        LayerWide(0.5).per_head(3, 2, 9)
    for ask in (lambda: ModelWide(0.5).per_layer(3, 9), lambda: ModelWide(0.5).per_head(3, 2, 9)):
        with pytest.raises(ValueError, match="ModelWide has no counts of layers"):
            ask()
    for make in (lambda: LayerWide(0.5, floor=1.2), lambda: LayerWide(1.5), lambda: ModelWide(0)):
        with pytest.raises(ValueError, match="floor is|keep is"):
            make()


# Choices.


def test_policies_say_what_their_scores_compare_over():
    over = {name: policy.comparable for name, policy in NAMED.items()}
    assert {name for name, where in over.items() if where == "layer"} == {"keydiff", "attention", "snapkv"}
    assert set(over.values()) == {"row", "layer"} and Hybrid().comparable == "row"
    for make in (KeyDiff, AttentionMass, SnapKV):
        assert make(heads="adaptive").floor == 0.2
        with pytest.raises(ValueError, match=f"{make.__name__} compare within a layer.*over a model.*Fixed"):
            make().require_comparable("model")
    with pytest.raises(ValueError, match="Recency compare within a row.*over a layer.*Fixed"):
        Recency(heads="adaptive")
    with pytest.raises(ValueError, match="floor is -0.5"):
        KeyDiff(floor=-0.5)
    Given().require_comparable("model")


@pytest.mark.parametrize(
    "sink, recent, floor, keep", [(0, 0, 0.0, 5), (1, 2, 0.2, 0.3), (2, 3, 0.0, 4), (0, 0, 1.0, 7)]
)
def test_adaptive_heads_against_plain_python(sink, recent, floor, keep):
    """Ties, NaN, ragged requests, a budget smaller than the protection; what is kept is moved with its lengths."""
    B, H, S = 2, 3, 24
    scores = few_values(B, H, S)
    scores[0, 1] = -1.0  # starved: its floor and protection are all that it gets
    keys = scores[..., None].expand(B, H, S, 4).contiguous()
    lengths = torch.tensor([S, 11], device=DEVICE)
    policy = Given(heads="adaptive", sink=sink, recent=recent, floor=floor)
    for result in both(lambda: policy.compact(keys, keys, keep=keep, lengths=lengths, inplace=False)):
        for b, length in enumerate([S, 11]):
            n = keep if isinstance(keep, int) else math.floor(keep * length + 0.5)
            protection = min(sink, n), min(recent, max(n - sink, 0))
            expected = over_rows(scores[b, :, :length].tolist(), n, floor, *protection)
            assert [tokens(row) for row in result.indices[b].tolist()] == expected
            assert result.lengths[b].tolist() == [len(row) for row in expected] and sum(map(len, expected)) == n * H
            for h, row in enumerate(expected):
                assert torch.equal(result.keys[b, h, : len(row)].nan_to_num(), keys[b, h, row].nan_to_num())


def test_counts_for_each_head_against_plain_python():
    B, H, S = 2, 3, 24
    scores = few_values(B, H, S)
    keys = scores[..., None].expand(B, H, S, 4).contiguous()
    counts = torch.tensor([[S, 1, 7], [3, 40, 9]], device=DEVICE)
    lengths = torch.tensor([S, 11], device=DEVICE)
    for heads in ("each", "adaptive"):
        policy = Given(heads=heads, sink=2, recent=3)
        for result in both(lambda p=policy: p.compact(keys, keys, keep=counts, lengths=lengths, inplace=False)):
            for b, length in enumerate([S, 11]):
                for h in range(H):
                    expected = row_of(scores[b, h, :length].tolist(), int(counts[b, h]), 2, 3)
                    assert tokens(result.indices[b, h].tolist()) == expected
                    assert result.lengths[b, h] == len(expected)
    with pytest.raises(ValueError, match="keep is a tensor.*heads='each'"):
        Given(heads="shared").choose(scores, counts)


def test_model_wide_against_plain_python():
    """Layers of unlike head counts, one of them starved, NaN and ties over layers, ragged requests."""
    B, S = 2, 20
    layers = [few_values(B, 2, S, seed=1), few_values(B, 1, S, seed=2), few_values(B, 3, S, seed=3)]
    layers[1][0] = -7.0
    lengths = torch.tensor([S, 9], device=DEVICE)
    for keep, sink, recent in [(0.3, 0, 0), (5, 1, 2), (3, 2, 9), (S, 0, 0)]:
        for chosen in both(lambda k=keep, s=sink, r=recent: model_wide(layers, k, sink=s, recent=r, lengths=lengths)):
            assert [tuple(of_layer.shape[:2]) for of_layer in chosen] == [(B, 2), (B, 1), (B, 3)]
            for b, length in enumerate([S, 9]):
                rows = [row for of_layer in layers for row in of_layer[b, :, :length].tolist()]
                n = keep if isinstance(keep, int) else math.floor(keep * length + 0.5)
                most = keep if isinstance(keep, int) else math.floor(keep * S + 0.5)  # what protection has to fit
                kept_sink = min(sink, most)
                expected = over_rows(rows, n, 0.0, kept_sink, min(recent, most - kept_sink))
                assert [tokens(row) for of_layer in chosen for row in of_layer[b].tolist()] == expected


def test_model_wide_by_hand():
    first = torch.tensor([[[9.0, 1.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0]]], device=DEVICE)
    second = torch.tensor([[[3.0, 8.0, 7.0, 3.0]]], device=DEVICE)
    for chosen in both(lambda: model_wide([first, second], 2, sink=0, recent=0)):
        # 9, 8, 7, then three of six 3s: those of the lower layer first.
        assert [[tokens(row) for row in of_layer[0].tolist()] for of_layer in chosen] == [[[0], [0, 1, 2]], [[1, 2]]]
    for chosen in both(lambda: model_wide([first, second], 2, sink=1, recent=1)):
        assert [[tokens(row) for row in of_layer[0].tolist()] for of_layer in chosen] == [[[0, 3]] * 2, [[0, 3]]]


def test_model_wide_says_what_is_wrong():
    scores = torch.zeros(1, 2, 8, device=DEVICE)
    for layers, keep, match in [
        ([], 2, "scores is empty"), ([scores, scores[:, :, :4]], 2, r"scores\[1\] has shape"),
        ([scores, scores.double()], 2, r"scores\[1\] has dtype"), ([scores], 9, "keep is 9"),
        ([scores], 0.0, "keep is"),
    ]:  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=match):
            model_wide(layers, keep, sink=0, recent=0)


# What follows a cache whose heads hold unequal numbers.


def test_policies_score_heads_of_unequal_lengths_as_if_alone(monkeypatch):
    """[B, H] lengths: every head is scored as a cache of its own tokens. The ops' kernels are tested elsewhere."""
    monkeypatch.setenv("KVEVICT_BACKEND", "reference")
    B, H, G, S, D = 2, 2, 3, 90, 16
    generator = torch.Generator().manual_seed(0)
    keys, queries = (torch.randn(B, heads, S, D, generator=generator).to(DEVICE) for heads in (H, H * G))
    lengths = torch.tensor([[90, 70], [66, 81]], device=DEVICE)
    for policy in (KeyDiff(), SnapKV(), SnapKV(variant="original"), Hybrid(parts=((0.5, SnapKV()), (0.5, Recency())))):
        window = queries[:, :, -policy.window :] if policy.window else None
        whole = policy.scores(Observed(keys=keys, queries=window, lengths=lengths))
        for b, h in [(0, 0), (0, 1), (1, 0), (1, 1)]:
            length = int(lengths[b, h])
            own = None if window is None else window[b : b + 1, h * G : h * G + G]
            alone = policy.scores(Observed(keys=keys[b : b + 1, h : h + 1, :length], queries=own))
            torch.testing.assert_close(whole[b, h, :length], alone[0, 0], rtol=1e-5, atol=1e-6)


def test_the_last_query_is_that_of_the_request_not_of_its_shortest_head(monkeypatch):
    """Heads have 40 and 10 tokens, the request 40 queries of its own in front of padding."""
    monkeypatch.setenv("KVEVICT_BACKEND", "reference")
    generator = torch.Generator().manual_seed(1)
    keys, queries = (torch.randn(1, 2, 64, 16, generator=generator).to(DEVICE) for _ in range(2))
    seen = Observed(keys=keys, queries=queries, lengths=torch.tensor([[40, 10]], device=DEVICE))
    scores = TOVA().scores(seen)
    for h, length in enumerate([40, 10]):
        expected = (keys[0, h, :length] @ queries[0, h, 39] / 4).softmax(-1)
        torch.testing.assert_close(scores[0, h, :length], expected, rtol=1e-5, atol=1e-6)


def test_a_tracker_follows_unequal_heads():
    tracker = Tracker(1, 2, 12, DEVICE)
    tracker.append(6)
    keys = few_values(1, 2, 6, seed=4)[..., None].expand(1, 2, 6, 4).contiguous()
    counts = torch.tensor([[4, 2]], device=DEVICE)
    Recency(sink=0, recent=0).compact(keys, keys.clone(), keep=counts, tracker=tracker)
    assert tracker.lengths.tolist() == [[4, 2]]
    assert tracker.positions[0, :, :5].tolist() == [[2, 3, 4, 5, -1], [4, 5, -1, -1, -1]]
    tracker.append(1)
    tracker.append(torch.tensor([2], device=DEVICE))
    assert tracker.positions[0, :, :8].tolist() == [[2, 3, 4, 5, 6, 7, 8, -1], [4, 5, 6, 7, 8, -1, -1, -1]]
    assert tracker.lengths.tolist() == [[7, 5]] and tracker.tokens_seen.tolist() == [9]
    keys = torch.randn(1, 2, 7, 4, device=DEVICE)
    tracker.observe(torch.randn(1, 2, 1, 4, device=DEVICE), keys)
    torch.testing.assert_close(tracker.mass.sum(-1), torch.ones(1, 2, device=DEVICE))
    assert (tracker.mass[0, 1, 5:] == 0).all() and torch.equal(tracker.observed(keys).lengths, tracker.lengths)
    tracker.overwrite(torch.tensor([[[6], [0]]], device=DEVICE))
    with pytest.raises(ValueError, match="slots is"):
        tracker.overwrite(torch.tensor([[[6], [5]]], device=DEVICE))
    tracker.drop_last(3)
    assert tracker.lengths.tolist() == [[4, 2]] and tracker.positions[0, 1, :3].tolist() == [9, 5, -1]
