"""EvictingCache in transformers' generate: tiny models with random weights, of every family it promises to serve."""

import copy
import logging

import pytest
import torch
from conftest import DEVICE

pytest.importorskip("transformers")

from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvevict
from kvevict.hf import EvictingCache
from kvevict.policies import (
    LRU,
    NAMED,
    RECOMMENDED,
    TOVA,
    AttentionMass,
    Hybrid,
    KeyDiff,
    Learned,
    Pyramid,
    Recency,
    SnapKV,
    Uniform,
)

SET_UP = r'model\.set_attn_implementation\("kvevict"\)'


@pytest.fixture(autouse=True)
def reference_backend():
    """The ops are tested against their kernels elsewhere; here the reference is faster than the interpreter."""
    if DEVICE == "cpu":
        with kvevict.backend("reference"):
            yield
    else:
        yield


def tiny(config_class=LlamaConfig, model_class=LlamaForCausalLM, seed=0, **options):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=120, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, bos_token_id=None,
                 eos_token_id=None)  # fmt: skip
    model = model_class(config_class(**(sizes | options))).eval().to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform attention, so that it matters what is kept
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def plain():
    return tiny()


@pytest.fixture(scope="module")
def ours():
    model = tiny()
    model.set_attn_implementation("kvevict")
    return model


def prompt(length, batch=1, seed=0):
    return torch.randint(1, 120, (batch, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def generate(model, ids, new=12, **options):
    return model.generate(ids, max_new_tokens=new, do_sample=False, **options)


def lengths(cache):
    return [(layer.seen, layer.kept) for layer in cache.report()]


@torch.no_grad()
def by_hand(model, ids, policy, keep, new=12, **observed):
    """Greedy decoding over a DynamicCache whose prompt was evicted outside, positions from the tokens seen."""
    cache = DynamicCache()
    logits = model(ids, past_key_values=cache).logits
    shrunk = [policy.compact(x.keys, x.values, keep=keep, inplace=False, layer=i) for i, x in enumerate(cache.layers)]
    cache = DynamicCache([(c.keys, c.values) for c in shrunk])
    said = []
    for step in range(new):
        said.append(logits[:, -1:].argmax(-1))
        position = torch.full_like(said[-1], ids.shape[1] + step)
        logits = model(said[-1], past_key_values=cache, position_ids=position).logits
    return torch.cat([ids, *said], 1)


@pytest.mark.parametrize("name", NAMED)
def test_keeping_everything_changes_nothing(ours, plain, name):
    ids = prompt(80)
    expected = generate(plain, ids)
    assert torch.equal(generate(ours, ids), expected)  # without our cache
    for options in (dict(keep=1.0), dict(budget=500), dict(keep=500)):
        cache = EvictingCache(ours.config, NAMED[name], **options)
        assert torch.equal(generate(ours, ids, past_key_values=cache), expected)
        assert lengths(cache) == [(91, 91)] * 3


@pytest.mark.parametrize("policy", [KeyDiff(recent=8), Recency(recent=8)])
@pytest.mark.parametrize("keep", [0.5, 0.2, 30])
def test_the_prompt_is_cut_after_its_attention_and_positions_go_on(plain, ours, policy, keep):
    ids = prompt(100)
    expected = by_hand(plain, ids, policy, keep)
    n = keep if isinstance(keep, int) else round(keep * 100)
    for model in (plain, ours):
        cache = EvictingCache(model.config, policy, keep=keep)
        assert torch.equal(generate(model, ids, past_key_values=cache), expected)
        assert lengths(cache) == [(111, n + 11)] * 3
        assert [layer.evicted for layer in cache.report()] == [100 - n] * 3
        assert not torch.equal(expected, generate(model, ids))


@torch.no_grad()
def test_memory_is_given_back(plain):
    cache = EvictingCache(plain.config, KeyDiff(recent=8), keep=0.25)
    plain(prompt(200), past_key_values=cache)
    cache.settle()
    for layer in cache.layers:
        assert layer.keys.shape[2] == 50 and layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
    assert sum(report.bytes for report in cache.report()) == 3 * 2 * 2 * 50 * 16 * 4


def dense_mass(model, ids):
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return [a[0].unflatten(0, (2, 2)) for a in model(ids, output_attentions=True).attentions]


def test_policies_see_the_attention_that_eager_mode_shows(ours):
    ids = prompt(120)
    attentions = dense_mass(ours, ids)  # per layer [H, G, S, S]
    for policy in (AttentionMass(recent=8, grace=8), SnapKV(recent=8), TOVA(recent=8)):
        kept = []
        cache = EvictingCache(ours.config, policy, keep=0.6, on_evict=lambda e, kept=kept: kept.append(e))
        with torch.no_grad():
            ours(ids, past_key_values=cache)
        assert [e.layer for e in kept] == [0, 1, 2] and all(e.kept == 72 and e.before == 120 for e in kept)
        for eviction, w in zip(kept, attentions, strict=True):
            if isinstance(policy, AttentionMass):
                scores = w.sum(2).mean(1) / torch.arange(120, 0, -1, device=DEVICE)
                share = (w.sum(2).mean(1).gather(1, eviction.indices[0]).sum() / w.sum(2).mean(1).sum()).item()
                assert eviction.retained_mass.item() == pytest.approx(share, rel=1e-3)
            elif isinstance(policy, SnapKV):
                votes = w[:, :, -64:, :-64].mean(2)
                votes = torch.nn.functional.avg_pool1d(votes, 5, stride=1, padding=2).mean(1)
                scores = torch.nn.functional.pad(votes, (0, 64))
            else:
                scores = w[:, :, -1].mean((0, 1)).expand(2, -1)
            expected = kvevict.topk_indices(scores[None].contiguous(), 72, sink=4, recent=policy.protected[1])
            assert (expected != eviction.indices).float().mean() < 0.02  # rounding may swap neighbours


@pytest.mark.parametrize("policy", [KeyDiff(recent=8), AttentionMass(recent=8, grace=8), LRU(recent=8), SnapKV(),
                                    Hybrid(recent=8)], ids=lambda p: type(p).__name__)  # fmt: skip
def test_a_budget_holds_for_ever(ours, policy):
    """Through a prompt in chunks, decoding and further turns; the most that a layer ever holds is budget + interval,
    and a chunk while it passes."""
    most = []
    cache = EvictingCache(ours.config, policy, budget=96, interval=16, on_evict=lambda e: most.append(e.before))
    text = generate(ours, prompt(400), new=60, past_key_values=cache, prefill_chunk_size=64)
    for turn in range(3):
        assert max(kept for _, kept in lengths(cache)) <= 96 + 16
        assert {seen for seen, _ in lengths(cache)} == {text.shape[1] - 1}
        text = generate(ours, torch.cat([text, prompt(50, seed=turn)], 1), new=40, past_key_values=cache)
    assert max(most) <= 96 + 16 + 64 and len(most) > 3 * 10
    assert {seen for seen, _ in lengths(cache)} == {text.shape[1] - 1}


def test_a_budget_on_a_model_that_is_not_set_up(plain, ours):
    options = dict(budget=40, interval=8)
    caches = [EvictingCache(model.config, KeyDiff(recent=8), **options) for model in (plain, ours)]
    a, b = (generate(m, prompt(150), new=60, past_key_values=c, prefill_chunk_size=32)
            for m, c in zip((plain, ours), caches, strict=True))  # fmt: skip
    assert torch.equal(a, b) and lengths(caches[0]) == lengths(caches[1])


@torch.no_grad()
def test_a_chunk_sees_the_kept_tokens_and_its_own_past(plain):
    """Token by token or in one chunk, after an eviction: the same logits."""
    results = []
    for pieces in (1, 7):
        cache = EvictingCache(plain.config, KeyDiff(recent=8), keep=0.3)
        plain(prompt(100), past_key_values=cache)
        logits = [plain(part, past_key_values=cache).logits for part in prompt(7, seed=4).split(7 // pieces, dim=1)]
        results.append(torch.cat(logits, 1))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


BATCH = [30, 80, 55]


def learned(seed=0, heads="shared", layers=3, **options):
    torch.manual_seed(seed)
    shapes = (layers, 32, 64), (layers, 32), (layers, 2, 32), (layers, 2)
    return Learned(weights=tuple(torch.randn(shape) for shape in shapes), heads=heads, **options)


def padded():
    ids = torch.zeros(3, 80, dtype=torch.long, device=DEVICE)
    mask = torch.zeros_like(ids)
    for b, length in enumerate(BATCH):
        ids[b, 80 - length :] = prompt(length, seed=b)[0]
        mask[b, 80 - length :] = 1
    return ids, mask


@pytest.mark.parametrize("chunk", [None, 32])
@pytest.mark.parametrize("mode", [dict(keep=0.5), dict(budget=48, interval=8), dict(keep=1.0), dict(keep=Pyramid(0.5))],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("policy", [KeyDiff(recent=8), AttentionMass(recent=8, grace=8), TOVA(recent=8),
                                    Hybrid(recent=8), learned(recent=8)], ids=lambda p: type(p).__name__)  # fmt: skip
def test_each_request_of_a_padded_batch_is_as_if_alone(ours, policy, mode, chunk):
    if chunk and "budget" not in mode:
        pytest.skip("keep= cuts the first forward")
    ids, mask = padded()

    def run(ids, **options):
        cache = EvictingCache(ours.config, policy, **mode)
        with cache.noting_hidden(ours):
            return cache, generate(ours, ids, past_key_values=cache, new=24, **options)

    cache, together = run(ids, attention_mask=mask)
    if chunk:
        cache, _ = run(ids, attention_mask=mask, prefill_chunk_size=chunk)
        assert max(kept for _, kept in lengths(cache)) <= 48 + 8
        return  # chunks of a padded row begin elsewhere than those of the same row alone
    for b, length in enumerate(BATCH):
        _, expected = run(prompt(length, seed=b))
        if "budget" in mode and length < 80:  # alone, a shorter request evicts later than beside a longer one
            continue
        assert torch.equal(together[b, 80 - length :], expected[0]), (b, policy)
        if mode == dict(keep=0.5):
            n = (length + 1) // 2
            assert [layer.lengths[b].item() for layer in cache.layers] == [n + 23] * 3


def test_sampling_beams_and_several_sequences(ours, plain):
    ids = prompt(80)
    for options in (
        dict(num_beams=3, do_sample=False), dict(num_beams=4, num_return_sequences=2, do_sample=False),
        dict(do_sample=True, num_return_sequences=3), dict(do_sample=True, top_k=5),
    ):  # fmt: skip
        results = []
        for cache in (DynamicCache(), EvictingCache(ours.config, KeyDiff(), keep=1.0)):
            torch.manual_seed(1)
            results.append(ours.generate(ids, max_new_tokens=10, past_key_values=cache, **options))
        assert torch.equal(*results), options
        for policy in (KeyDiff(), Hybrid()):
            cache = EvictingCache(ours.config, policy, budget=40, interval=4)
            out = ours.generate(ids, max_new_tokens=20, past_key_values=cache, **options)
            assert out.shape[1] == 100 and max(kept for _, kept in lengths(cache)) <= 44


def test_what_has_to_be_set_up_is_said(plain):
    for policy in (SnapKV(), AttentionMass(), LRU(), Hybrid()):
        with pytest.raises(ValueError, match=SET_UP):
            generate(plain, prompt(40), past_key_values=EvictingCache(plain.config, policy, keep=0.5))
    with pytest.raises(ValueError, match=SET_UP):
        generate(plain, prompt(40), past_key_values=EvictingCache(plain.config, keep=Pyramid(0.5)))


def test_bad_arguments_are_named(plain):
    for options, match in [
        (dict(), "keep is None and budget is None"), (dict(keep=0.5, budget=9), "keep is 0.5 and budget is 9"),
        (dict(keep=1.5), "keep is 1.5"), (dict(budget=0.5), "budget is 0.5"), (dict(budget=0), "budget is 0"),
        (dict(budget=10, pin=10), "more than pin"), (dict(keep=0.5, interval=-1), "interval is -1"),
        (dict(keep=0.5, pin=True), "pin is True"), (dict(keep=0.5, policy="key"), "policy is 'key'"),
        (dict(keep=0.5, policy=7), "policy is 7"), (dict(keep="0.5"), "keep is '0.5'"), (dict(keep=0), "at least 1"),
    ]:  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=match):
            EvictingCache(plain.config, **options)
    with pytest.raises(TypeError, match="model is a str: expected a transformers model or its config"):
        EvictingCache("llama", keep=0.5)
    mixed = Hybrid(parts=((0.5, learned()), (0.5, learned(1))))
    with pytest.raises(ValueError, match="reads hidden states by Learned, Learned: expected one Learned"):
        EvictingCache(plain.config, mixed, budget=50)
    with pytest.raises(ValueError, match="empty"):
        EvictingCache(plain.config, budget=50).evict(0.5)


@torch.no_grad()
def test_hidden_states_are_those_of_the_cached_tokens(plain):
    """The learned scorer's tokens are the ones that it chooses from the hidden states which the model gives out."""
    policy, ids = learned(recent=8), prompt(90)
    cache = EvictingCache(plain.config, policy, keep=0.3)
    with pytest.raises(ValueError, match=r"Learned needs hidden.*cache\.noting_hidden\(model\)"):
        generate(plain, ids, past_key_values=cache)
    cache.reset()
    evictions = []
    cache = EvictingCache(plain.config, policy, budget=200, on_evict=evictions.append)
    with cache.noting_hidden(plain):
        for chunk in ids.split(32, dim=1):
            plain(chunk, past_key_values=cache)
    assert not any(m._forward_pre_hooks for m in plain.modules())
    hidden = plain(ids, output_hidden_states=True).hidden_states
    whole = [layer.keys for layer in cache.layers]
    entered = [plain.model.layers[i].input_layernorm(hidden[i]) for i in range(3)]
    scores = []
    for i, (keys, states) in enumerate(zip(whole, entered, strict=True)):
        scores.append(policy.scores(kvevict.policies.Observed(keys=keys, hidden=states, layer=i)))
    cache.evict(0.5)
    for i in range(3):
        assert torch.equal(evictions[i].indices, policy.choose(scores[i], 0.5))
    cache.evict(20)  # of the 45 left: their hidden states have followed
    for i in range(3):
        left = evictions[i].indices
        expected = policy.choose(scores[i].gather(2, left), 20)
        assert torch.equal(evictions[3 + i].indices, expected)
    assert lengths(cache) == [(90, 20)] * 3


@torch.no_grad()
@pytest.mark.parametrize("policy", [KeyDiff(recent=8), Hybrid(recent=8), SnapKV(recent=8)],
                         ids=lambda p: type(p).__name__)  # fmt: skip
@pytest.mark.parametrize("keep", [0.5, 20, Pyramid(0.5)], ids=str)
def test_evicting_at_will_is_what_keep_does(ours, policy, keep):
    ids = prompt(90)
    expected = generate(ours, ids, past_key_values=EvictingCache(ours.config, policy, keep=keep))
    cache = EvictingCache(ours.config, policy, budget=200)
    first = ours(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
    cache.evict(keep)
    assert torch.equal(generate(ours, torch.cat([ids, first], 1), new=11, past_key_values=cache), expected)


def test_evicting_at_will_says_what_is_wrong(ours):
    cache = EvictingCache(ours.config, SnapKV(), keep=0.5)
    generate(ours, prompt(80), past_key_values=cache)
    with pytest.raises(ValueError, match="nothing was noted for SnapKV"):
        cache.evict(0.5)
    static = EvictingCache(ours.config, budget=50, static=True)
    generate(ours, prompt(30), past_key_values=static, new=4)
    for keep, match in ((1.5, "keep is 1.5"), (0, "keep is 0"), (Pyramid(0.5), "the same for all layers")):
        with pytest.raises(ValueError, match=match):
            static.evict(keep)
    static.evict(20)
    assert lengths(static) == [(33, 20)] * 3


def test_a_pinned_prefix_stays_whole(ours):
    evictions = []
    cache = EvictingCache(ours.config, KeyDiff(recent=8), budget=60, interval=4, pin=30, on_evict=evictions.append)
    generate(ours, prompt(150), new=60, past_key_values=cache)
    assert len(evictions) > 3
    for eviction in evictions:
        assert (eviction.indices[:, :, :30] == torch.arange(30, device=DEVICE)).all()


def test_evictions_are_logged(plain, caplog):
    with caplog.at_level(logging.INFO, logger="kvevict"):
        generate(plain, prompt(100), past_key_values=EvictingCache(plain.config, keep=0.5))
    assert [record.getMessage() for record in caplog.records] == ["kvevict: kept 50 of 100 tokens in layer 2"]


@torch.no_grad()
@pytest.mark.parametrize("keep", [Pyramid(0.3, steepness=3.0), Pyramid(0.5), Pyramid(77)], ids=str)
def test_a_budget_that_differs_by_layer_keeps_what_it_promises(ours, keep):
    """Over all layers, to the token: of a prompt, of each request of a padded batch, and at will."""
    total = {n: sum(keep.per_layer(3, n)) for n in (101, 80)}
    for at_will in (False, True):
        cache = EvictingCache(ours.config, KeyDiff(recent=8), **(dict(budget=300) if at_will else dict(keep=keep)))
        ours(prompt(101), past_key_values=cache)
        if at_will:
            cache.evict(keep)
        assert [kept for _, kept in lengths(cache)] == list(keep.per_layer(3, 101))
        assert sum(kept for _, kept in lengths(cache)) == total[101]
    ids, mask = padded()
    for at_will in (False, True):
        cache = EvictingCache(ours.config, KeyDiff(recent=8), **(dict(budget=300) if at_will else dict(keep=keep)))
        ours(ids, attention_mask=mask, past_key_values=cache)
        if at_will:
            cache.evict(keep)
        for b, n in enumerate(BATCH):
            told = keep.per_layer(3, n) if isinstance(keep.keep, float) or keep.keep <= n else (n,) * 3
            assert [int(layer.lengths[b]) for layer in cache.layers] == list(told)


@torch.no_grad()
def test_an_error_in_evict_changes_no_layer(ours):
    class Raises(KeyDiff):
        def scores(self, seen):
            if seen.layer == 2:
                raise RuntimeError("no scores for layer 2")
            return super().scores(seen)

    for static in (False, True):
        cache = EvictingCache(ours.config, Raises(), budget=400, static=static)
        ours(prompt(200), past_key_values=cache)
        with pytest.raises(RuntimeError, match="layer 2"):
            cache.evict(50)
        assert lengths(cache) == [(200, 200)] * 3
        calls = []

        def on_evict(eviction, calls=calls):
            calls.append(eviction.layer)
            raise RuntimeError("not now")

        cache = EvictingCache(ours.config, KeyDiff(), budget=400, on_evict=on_evict, static=static)
        ours(prompt(200), past_key_values=cache)
        with pytest.raises(RuntimeError, match="not now"):
            cache.evict(50)
        assert lengths(cache) == [(200, 50)] * 3 and calls == [0]


def test_a_scorer_of_too_few_layers_is_refused_before_anything_is_read(plain):
    few = learned(layers=2)
    for policy in (few, Hybrid(parts=((1.0, few), (1.0, KeyDiff())), heads="shared")):
        with pytest.raises(ValueError, match="weights for 2 layers of width 64 and 2 heads: expected 3"):
            EvictingCache(plain.config, policy, keep=0.5)


@torch.no_grad()
def test_evicting_unlike_layers_needs_our_attention_from_then_on(ours, plain):
    cache = EvictingCache(ours.config, KeyDiff(recent=8), budget=200)
    ours(prompt(90), past_key_values=cache)
    cache.evict(Pyramid(0.5))
    cache._config = plain.config
    with pytest.raises(ValueError, match="budgets that differ by layer"):
        plain(prompt(3), past_key_values=cache)
    cache = EvictingCache(plain.config, KeyDiff(recent=8), budget=200)
    plain(prompt(90), past_key_values=cache)
    with pytest.raises(ValueError, match=SET_UP):
        cache.evict(Pyramid(0.5))
    assert lengths(cache) == [(90, 90)] * 3


def of_request(cache, b):
    """Everything that a cache holds and notes of one request, as lists of tensors cut to its length."""
    for layer in cache.layers:
        n = layer.cached() if layer.lengths is None else int(layer.lengths[b])
        notes, tracker = layer.notes, layer.notes.tracker
        yield layer.keys[b, :, :n]
        yield layer.values[b, :, :n]
        yield torch.as_tensor(layer.tail).expand(len(layer.keys))[b]
        if notes.queries is not None:
            yield notes.queries[b, :, -min(n, 64) :]
        if notes.predicted is not None:
            yield notes.predicted[b, :, :n]
        if tracker is not None:
            yield tracker.lengths[b]
            yield tracker.tokens_seen[b]
            for state in (tracker.mass, tracker.last_used, tracker.positions):
                yield state[b, :, :n]


@torch.no_grad()
@pytest.mark.parametrize("how", ["reorder", "select", "select by mask", "repeat"])
@pytest.mark.parametrize("policy", [KeyDiff(recent=8), SnapKV(recent=8), AttentionMass(recent=8, grace=8), learned()],
                         ids=lambda p: type(p).__name__)  # fmt: skip
def test_requests_take_all_that_is_noted_of_them_along(ours, policy, how):
    ids, mask = padded()
    cache = EvictingCache(ours.config, policy, budget=200)
    with cache.noting_hidden(ours):
        ours(ids, attention_mask=mask, past_key_values=cache)
        cache.evict(0.8)
    for layer in cache.layers:  # each request keeps its own share, in the tracker too
        assert layer.lengths.tolist() == [24, 64, 44]
        assert layer.notes.tracker is None or layer.notes.tracker.lengths.tolist() == [24, 64, 44]
    before = [list(of_request(cache, b)) for b in range(3)]
    if how == "reorder":
        cache.reorder_cache(torch.tensor([2, 0, 0], device=DEVICE))
    elif how == "select":
        cache.batch_select_indices(torch.tensor([2, 1], device=DEVICE))
    elif how == "select by mask":
        cache.batch_select_indices(torch.tensor([True, False, True], device=DEVICE))
    else:
        cache.batch_repeat_interleave(2)
    now = {"reorder": [2, 0, 0], "select": [2, 1], "select by mask": [0, 2], "repeat": [0, 0, 1, 1, 2, 2]}[how]
    assert len(before[0]) >= 9
    for i, b in enumerate(now):
        for one, other in zip(before[b], of_request(cache, i), strict=True):
            assert torch.equal(one, other)
    with pytest.raises(ValueError, match=rf"indices has shape \(1,\): expected \({len(now)},\)"):
        cache.batch_select_indices(torch.tensor([True], device=DEVICE))
    cache.evict(0.5)
    assert cache.layers[0].lengths.tolist() == [(round(BATCH[b] * 0.8) + 1) // 2 for b in now]


def test_a_prompt_in_chunks_that_keep_does_not_cut_is_warned_of_once(ours, caplog):
    def read(pieces, keep=0.5):
        cache = EvictingCache(ours.config, KeyDiff(recent=8), keep=keep)
        with torch.no_grad():
            for piece in pieces:
                ours(prompt(piece), past_key_values=cache)

    read([100, 6])  # a question
    read([100, 1, 1, 90])  # a later turn
    generate(ours, prompt(100), past_key_values=EvictingCache(ours.config, KeyDiff(recent=8), keep=0.5))
    assert not caplog.records
    read([32, 32, 32, 4])
    (record,) = caplog.records
    assert record.getMessage().startswith("kvevict: keep= cut the first forward, of 32 tokens, and keeps all of the 32")


def test_the_model_is_all_that_is_needed():
    """Attention is set, names are policies, and it is iterated as a DynamicCache is."""
    model = tiny()
    assert model.config._attn_implementation == "sdpa"
    cache = EvictingCache(model, "recommended", keep=0.5)
    assert model.config._attn_implementation == "kvevict"
    expected = EvictingCache(model.config, RECOMMENDED, keep=0.5)
    assert torch.equal(generate(model, prompt(80), past_key_values=cache),
                       generate(model, prompt(80), past_key_values=expected))  # fmt: skip
    for layer, (keys, values, window) in zip(expected.layers, cache, strict=True):
        assert torch.equal(keys, layer.keys) and torch.equal(values, layer.values) and window is None
    assert len(list(cache)) == 3 and lengths(cache) == [(91, 51)] * 3
    for name in NAMED:
        EvictingCache(model, name, keep=0.5)


def test_a_config_of_fewer_layers_is_named(plain):
    few = copy.deepcopy(plain.config)
    few.num_hidden_layers = 2
    with pytest.raises(ValueError, match="layer_idx is 2: expected less than 2"):
        generate(plain, prompt(20), past_key_values=EvictingCache(few, keep=0.5))


@pytest.mark.parametrize("policy", [KeyDiff(recent=8), AttentionMass(recent=8, grace=8), SnapKV(recent=8)],
                         ids=lambda p: type(p).__name__)  # fmt: skip
def test_a_cache_filled_in_inference_mode_goes_on_outside_of_it(ours, policy):
    said = []
    for mode in (torch.inference_mode, torch.no_grad):
        cache = EvictingCache(ours.config, policy, budget=60, interval=4)
        with mode():
            logits = ours(prompt(50), past_key_values=cache).logits
        for step in range(20):
            logits = ours(prompt(1, seed=step), past_key_values=cache).logits
        cache.crop(-2)
        cache.evict(0.5)
        said.append(logits.detach())
    torch.testing.assert_close(*said)


def test_reset_and_uniform_budget(plain):
    cache = EvictingCache(plain.config, keep=Uniform(0.5))
    first = generate(plain, prompt(80), past_key_values=cache)
    cache.reset()
    cache.reset()
    assert cache.get_seq_length() == 0 and torch.equal(generate(plain, prompt(80), past_key_values=cache), first)


@pytest.mark.parametrize("policy", [KeyDiff(recent=8), Hybrid(recent=8), SnapKV()], ids=lambda p: type(p).__name__)
def test_forwards_with_gradients_on_work_as_without(ours, policy):
    results = []
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            cache = EvictingCache(ours.config, policy, budget=72, interval=4)
            logits = ours(prompt(100), past_key_values=cache).logits
            assert logits.requires_grad == grad
            for step in range(6):
                logits = ours(prompt(1, seed=step), past_key_values=cache).logits
        results.append(logits.detach())
    assert torch.equal(*results)


def test_nothing_is_left_behind(ours):
    generate(ours, prompt(60), past_key_values=EvictingCache(ours.config, Hybrid(), keep=0.5))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in ours.modules())
    assert type(ours).forward is LlamaForCausalLM.forward
