"""Policies: what each keeps, by hand and against softmax written out; what they need; budgets; the tracker."""

import dataclasses

import pytest
import torch
from cases import both, cache
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

import kvevict
from kvevict import policies
from kvevict.policies import (
    LRU,
    NAMED,
    RECOMMENDED,
    TOVA,
    AttentionMass,
    Hybrid,
    KeyDiff,
    Learned,
    Policy,
    Pyramid,
    Random,
    Recency,
    SnapKV,
    Tracker,
    Uniform,
)

B, H, G, S, D = 2, 2, 3, 150, 16


def everything(lengths=None, seed=0):
    """A cache and all that a policy may ask for."""
    keys, values = cache((B, H, S, D, D), seed=seed)
    queries, hidden = cache((B, H * G, S, D, D), seed=seed + 1)[0], cache((1, B, S, 24, 24), seed=seed + 2)[0][0]
    used = torch.randint(-1, 5, (B, H, S), generator=torch.Generator().manual_seed(seed)).int().to(DEVICE)
    return keys, values, dict(queries=queries, hidden=hidden, last_used=used, lengths=lengths)


def learned():
    generator = torch.Generator().manual_seed(3)
    weights = [
        torch.randn(*shape, generator=generator).to(DEVICE) * 0.3
        for shape in ((1, 12, 24), (1, 12), (1, 1, 12), (1, 1))
    ]
    return Learned(weights=tuple(weights))


ALL = {**NAMED, "recommended": RECOMMENDED, "learned": learned(), "snapkv original": SnapKV(variant="original"),
       "attention sums": AttentionMass(normalize=None), "minmax": Hybrid(scale="minmax")}  # fmt: skip


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_every_policy_keeps_what_it_promises(name, ragged):
    policy = ALL[name]
    lengths = torch.tensor([S, 60], device=DEVICE) if ragged else None
    keys, values, observed = everything(lengths)
    before = keys.clone()
    for result in both(lambda: policy.compact(keys, values, keep=0.7, inplace=False, **observed)):
        assert result.indices.shape == (B, H, 105)
        for b, (length, n) in enumerate([(S, 105), (60, 42)] if ragged else [(S, 105)] * B):
            row = result.indices[b, :, :n]
            assert (row.diff(dim=-1) > 0).all() and row.max() < length and (result.indices[b, :, n:] == -1).all()
            sink, recent = policy.protected
            recent = min(recent, n - sink)
            assert (row[:, :sink] == torch.arange(sink, device=DEVICE)).all()
            assert (row[:, n - recent :] == torch.arange(length - recent, length, device=DEVICE)).all()
            for h in range(H):
                assert torch.equal(result.keys[b, h, :n], before[b, h, result.indices[b, h, :n]])
        if ragged:
            assert result.lengths.tolist() == [105, 42]
        if policy.heads == "shared":
            assert torch.equal(result.indices[:, 0], result.indices[:, 1])
    assert torch.equal(keys, before)


@pytest.mark.parametrize("name", ALL)
def test_a_ragged_request_is_treated_as_if_alone(name):
    if name == "random":
        pytest.skip("a row's number is part of its seed")
    keys, values, observed = everything(torch.tensor([S, 90], device=DEVICE))
    together = ALL[name].compact(keys, values, keep=0.5, inplace=False, **observed)
    alone = {
        k: v[1:, ..., :90] if k == "last_used" else v[1:, ..., :90, :] for k, v in observed.items() if k != "lengths"
    }
    single = ALL[name].compact(keys[1:, :, :90], values[1:, :, :90], keep=0.5, inplace=False, **alone)
    assert torch.equal(together.indices[1:, :, :45], single.indices)


def test_small_budgets_keep_sinks_then_the_most_recent():
    keys, values, _ = everything()
    result = KeyDiff().compact(keys, values, keep=10, inplace=False)
    assert result.indices[0, 0].tolist() == [0, 1, 2, 3, *range(S - 6, S)]
    assert KeyDiff().compact(keys, values, keep=3, inplace=False).indices[0, 0].tolist() == [0, 1, 2]


def test_there_is_no_gap_between_recent_and_candidates():
    """H2O's first code lost the token that was leaving the recent window."""
    keys, values, observed = everything()
    mass = torch.zeros(B, H, S, device=DEVICE)
    mass[:, :, S - 33] = 1.0  # just outside the window of 32
    policy = AttentionMass(normalize=None, sink=0)
    kept = policy.compact(keys, values, keep=33, mass=mass, inplace=False).indices[0, 0].tolist()
    assert kept == list(range(S - 33, S))


def test_recency_and_lru_by_hand():
    keys, values = cache((1, 1, 6, D, D))
    kept = Recency(sink=1, recent=0).compact(keys, values, keep=3, inplace=False).indices[0, 0].tolist()
    assert kept == [0, 4, 5]
    used = torch.tensor([[[-1, 3, -1, 5, 3, -1]]], dtype=torch.int32, device=DEVICE)
    order = [3, 1, 4, 5, 2, 0]  # last used; ties to the lower index; never used: the younger
    for n in range(1, 7):
        policy = LRU(sink=0, recent=0)
        kept = policy.compact(keys, values, keep=n, last_used=used, inplace=False).indices[0, 0].tolist()
        assert kept == sorted(order[:n])


def test_random_is_seeded_and_goes_by_position():
    keys, values, _ = everything()

    def kept(seed=0, layer=0):
        result = Random(seed=seed).compact(keys, values, keep=0.5, layer=layer, inplace=False)
        return result.indices

    assert torch.equal(kept(), kept())
    different = [kept(seed=1), kept(layer=1), kept()[:, [1, 0]], kept()[[1, 0]]]
    assert all(not torch.equal(kept(), other) for other in different)
    seen = policies.Observed(keys=keys, positions=torch.arange(S, device=DEVICE).flip(0).expand(B, H, S))
    assert torch.equal(Random().scores(seen), Random().scores(policies.Observed(keys=keys)).flip(-1))
    ranks = [Random(seed=seed).scores(policies.Observed(keys=keys[:1, :1, :4]))[0, 0] for seed in (0, 1, 2**63, 10**30)]
    assert ranks[1].tolist() == [5395756.0, 14252853.0, 15439970.0, 4174586.0] and len(set(map(str, ranks))) == 4
    counts = torch.zeros(S)
    with kvevict.backend("reference"):  # the interpreter would take half a minute
        for seed in range(200):
            counts += torch.bincount(kept(seed)[0, 0].cpu(), minlength=S)
    middle = counts[4:-32]
    assert 0.2 * 200 < middle.min() and middle.max() < 0.55 * 200  # 75 - 36 of 114: 34 % each


def test_hybrid_is_the_sum_of_its_parts():
    keys, values, observed = everything()
    parts = [(0.5, KeyDiff()), (0.2, Recency()), (0.3, SnapKV())]
    seen = policies.Observed(keys=keys, **observed)
    expected = kvevict.combine_scores([(w, p.scores(seen).contiguous()) for w, p in parts])
    hybrid = Hybrid(parts=parts)
    torch.testing.assert_close(hybrid.scores(seen), expected)
    assert hybrid.needs == {"queries"} and hybrid.protected == (4, 64)
    assert Hybrid().needs == {"mass"} and [w for w, _ in Hybrid().parts] == [0.4, 0.3, 0.3]
    with pytest.raises(TypeError, match="parts"):
        Hybrid(parts=[(1.0, "keydiff")])


def test_what_is_missing_is_named():
    keys, values, observed = everything()
    for policy, name in [(SnapKV(), "queries"), (TOVA(), "queries"), (AttentionMass(), "mass"), (LRU(), "last_used"),
                         (Hybrid(), "mass"), (learned(), "hidden")]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name} is None"):
            policy.compact(keys, values, keep=0.5)
    with pytest.raises(ValueError, match="^mass is None"):  # the mass of a window is not the prompt's
        AttentionMass().compact(keys, values, keep=0.5, queries=observed["queries"][:, :, -20:])
    with pytest.raises(TypeError, match="query is no argument"):
        KeyDiff().compact(keys, values, keep=0.5, query=1)
    with pytest.raises(ValueError, match="layer is 5"):
        learned().compact(keys, values, keep=0.5, layer=5, **observed)
    for wrong in (dict(sink=-1), dict(recent=1.5), dict(heads="some")):
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            KeyDiff(**wrong)
    with pytest.raises(ValueError, match="variant"):
        SnapKV(variant="new")
    with pytest.raises(ValueError, match="decay"):
        AttentionMass(decay=1.5)
    assert torch.equal(keys, everything()[0])


@pytest.mark.parametrize("name", ALL)
def test_policies_are_immutable(name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        ALL[name].sink = 7


def test_a_scorer_of_ones_own_takes_one_method():
    class Middle(Policy):
        def scores(self, seen):
            return -(seen.order() - seen.keys.shape[2] / 2).abs()

    keys, values, _ = everything()
    kept = Middle(sink=1, recent=1).compact(keys, values, keep=7, inplace=False).indices[0, 0].tolist()
    assert kept == [0, 73, 74, 75, 76, 77, S - 1]


def test_learned_survives_saving(tmp_path):
    pytest.importorskip("safetensors")
    keys, values, observed = everything()
    learned().save(tmp_path / "weights.safetensors")
    again = Learned.load(tmp_path / "weights.safetensors", recent=8)
    assert again.recent == 8
    seen = policies.Observed(keys=keys, **observed)
    assert torch.equal(again.scores(seen), learned().scores(seen))


def test_a_file_that_is_no_whole_learned_scorer_is_refused(tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    with pytest.raises(FileNotFoundError):
        Learned.load(path)
    learned().save(path)
    whole = path.read_bytes()
    for content in (b"", b"{}", whole[:40], whole[:-4]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path} is no scorer: "):
            Learned.load(path)
    with pytest.raises(ValueError, match=f"{tmp_path} is no scorer: "):
        Learned.load(tmp_path)
    tensors, good = learned().tensors(), {"format": Learned.format}
    for changed, metadata, match in [
        (tensors, None, "is of the format None"), (tensors, {"format": "pt"}, "is of the format 'pt'"),
        ({"w1": tensors["w1"]}, good, r"has \['w1'\]"), ({"other": torch.zeros(1)}, good, r"has \['other'\]"),
        (tensors | {"b1": torch.zeros(1, 11)}, good, r"weights has shapes .*\(1, 11\)"),
        (tensors | {"w2": torch.full((1, 1, 12), float("nan"))}, good, "not finite"),
        (tensors, good | {"shares": "{}"}, "keeps"), (tensors, good | {"shares": "no"}, "Expecting value"),
    ]:  # fmt: skip
        save_file(changed, str(path), metadata=metadata)
        with pytest.raises(ValueError, match=match) as caught:
            Learned.load(path)
        assert str(path) in str(caught.value)
    save_file(tensors, str(path), metadata=good)
    assert torch.equal(policies.Scorer.load(path).weights[0], tensors["w1"])
    with pytest.raises(ValueError, match=r"weights has shapes \[\(3,\)\]: expected W, b or W1, b1, W2, b2"):
        Learned(weights=(torch.zeros(3),))


@settings(max_examples=200, deadline=None)
@given(
    layers=st.integers(1, 40), tokens=st.integers(1, 5000), keep=st.floats(0.001, 1.0), steepness=st.floats(1.0, 100.0)
)
def test_budgets_keep_their_total(layers, tokens, keep, steepness):
    uniform, pyramid = Uniform(keep), Pyramid(keep, steepness)
    total = sum(uniform.per_layer(layers, tokens))
    kept = pyramid.per_layer(layers, tokens)
    assert len(kept) == layers and sum(kept) == total
    assert list(kept) == sorted(kept, reverse=True) and 1 <= kept[-1] and kept[0] <= tokens


def test_budgets_by_hand():
    assert Uniform(0.5).per_layer(3, 9) == (5, 5, 5)
    assert Pyramid(100, steepness=5).per_layer(3, 1000) == (180, 100, 20)
    assert Pyramid(100, steepness=5).per_layer(3, 150) == (150, 100, 50)
    for wrong in (0, 1.5, -3, True):
        with pytest.raises((TypeError, ValueError), match="keep"):
            Uniform(wrong)
    with pytest.raises(ValueError, match="keep is 20"):
        Uniform(20).per_layer(3, 10)
    with pytest.raises(ValueError, match="steepness"):
        Pyramid(0.5, 0.5)


@pytest.mark.parametrize("preserve_order", [True, False])
def test_tracker_follows_the_cache(preserve_order):
    """Every token's mass, last use and position, noted in plain Python by position, through appends, decode steps and
    evictions in place."""
    generator = torch.Generator().manual_seed(0)
    capacity = 60
    keys, values = (torch.zeros(1, H, capacity, D, device=DEVICE) for _ in range(2))
    tracker = Tracker(1, H, capacity, DEVICE)
    truth = [{} for _ in range(H)]  # per head: position -> [mass, last_used]
    length = 0

    def enter(count):
        nonlocal length
        new = [torch.randn(1, H, count, D, generator=generator).to(DEVICE) for _ in range(2)]
        keys[:, :, length : length + count], values[:, :, length : length + count] = new
        first = int(tracker.tokens_seen)
        tracker.append(count)
        for known in truth:
            known.update({position: [0.0, -1] for position in range(first, first + count)})
        length += count

    def check():
        assert tracker.lengths.tolist() == [length]
        for h, known in enumerate(truth):
            assert sorted(tracker.positions[0, h, :length].tolist()) == sorted(known)
            for slot, position in enumerate(tracker.positions[0, h, :length].tolist()):
                assert tracker.mass[0, h, slot].item() == pytest.approx(known[position][0], rel=1e-4)
                assert tracker.last_used[0, h, slot].item() == known[position][1]
        assert (tracker.positions[:, :, length:] == -1).all() and (tracker.mass[:, :, length:] == 0).all()

    enter(40)
    queries = torch.randn(1, H * G, 40, D, generator=generator).to(DEVICE)
    tracker.observe(queries, keys[:, :, :40])
    for h, row in enumerate((kvevict.attention_mass(queries, keys[:, :, :40], reduce="sum") / G)[0].tolist()):
        for position, mass in enumerate(row):
            truth[h][position][0] += mass
    check()
    for round_ in range(3):
        for _ in range(10):
            enter(1)
            query = torch.randn(1, H * G, 1, D, generator=generator).to(DEVICE) * 2
            before = tracker.mass.clone()
            out = tracker.attend(query, keys[:, :, :length], values[:, :, :length], decay=0.9, threshold=0.02)
            assert torch.equal(out, kvevict.decode_attention(query, keys[:, :, :length], values[:, :, :length]))
            weight = tracker.mass - 0.9 * before
            for h, known in enumerate(truth):
                for slot, position in enumerate(tracker.positions[0, h, :length].tolist()):
                    w = weight[0, h, slot].item()
                    known[position][0] = known[position][0] * 0.9 + w
                    if w >= 0.02:
                        known[position][1] = tracker.step
        check()
        policy = [Hybrid(recent=4), LRU(recent=4), AttentionMass(recent=4, grace=4)][round_]
        result = policy.compact(
            keys[:, :, :length], values[:, :, :length], keep=30, tracker=tracker, preserve_order=preserve_order
        )
        length = 30
        kept = [set(tracker.positions[0, h, :30].tolist()) for h in range(H)]
        truth = [{p: v for p, v in known.items() if p in kept[h]} for h, known in enumerate(truth)]
        assert all(len(known) == 30 for known in truth) and result.keys.shape[2] == 30
        check()
    slots = kvevict.evict_slots(tracker.mass[:, :, :length].contiguous(), sink=2)
    gone = tracker.positions.gather(2, slots)
    position = int(tracker.tokens_seen)
    tracker.overwrite(slots)
    for h, known in enumerate(truth):
        del known[gone[0, h, 0].item()]
        known[position] = [0.0, -1]
    check()
    with pytest.raises(ValueError, match="count is 31"):
        tracker.append(31)


def test_tracker_of_ragged_requests():
    tracker = Tracker(2, 1, 10, DEVICE)
    tracker.append(torch.tensor([5, 2], device=DEVICE))
    tracker.append(1)
    assert tracker.positions[:, 0, :6].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, -1, -1, -1]]
    keys, values = cache((2, 1, 6, D, D))
    tracker.observe(cache((2, 2, 6, D, D))[0], keys)
    torch.testing.assert_close(tracker.mass.sum(-1), torch.tensor([[6.0], [3.0]], device=DEVICE))
    result = Recency(sink=0, recent=0).compact(keys, values, keep=0.5, tracker=tracker)
    assert result.lengths.tolist() == [3, 2] and tracker.lengths.tolist() == [3, 2]
    assert tracker.positions[:, 0, :4].tolist() == [[3, 4, 5, -1], [1, 2, -1, -1]]
    tracker.append(1)
    assert tracker.positions[:, 0, :4].tolist() == [[3, 4, 5, 6], [1, 2, 3, -1]]
