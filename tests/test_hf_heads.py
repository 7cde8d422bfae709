"""EvictingCache whose layers and heads keep unequal numbers of tokens, against a dense cache that gives nothing up: its
attention, written here by hand, hides from each head what that head has given up."""

import copy
import weakref
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from conftest import DEVICE

pytest.importorskip("transformers")

import transformers
from test_hf import BATCH, generate, learned, ours, padded, plain, prompt, reference_backend, tiny  # noqa: F401
from test_hf_models import NEW, build, full_layers
from test_hf_saved import rewritten
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

import kvevict
from kvevict.hf import EvictingCache
from kvevict.hf.pages import BLOCK_SIZE, Pages
from kvevict.policies import (
    LRU,
    RECOMMENDED,
    RECOMMENDED_FOR_SHARES,
    TOVA,
    AttentionMass,
    Fixed,
    Hybrid,
    KeyDiff,
    KeyNorm,
    LayerWide,
    ModelWide,
    Pyramid,
    Recency,
    Shares,
    SnapKV,
    Uniform,
)

GONE: dict[int, torch.Tensor] = {}  # layer -> [B, H, S] bool: what its heads do not see


def masked_attention(module, query, key, value, attention_mask, scaling=None, s_aux=None, **_):
    """softmax(scaling · q·k) · v in float64 over what the model's mask shows and the head has not given up."""
    B, Hq, T, D = query.shape
    H, S = key.shape[1:3]
    visible = torch.ones(T, S, dtype=torch.bool, device=DEVICE).tril(S - T).expand(B, H, T, S)
    if attention_mask is not None:
        visible = attention_mask.expand(B, H, T, S)
    gone = GONE.get(module.layer_idx)
    if gone is not None:
        visible = visible & ~torch.nn.functional.pad(gone, (0, S - gone.shape[2]))[:, :, None]
    visible = visible.repeat_interleave(Hq // H, 1)
    keys, values = (x.double().repeat_interleave(Hq // H, 1) for x in (key, value))
    logits = query.double() @ keys.transpose(2, 3) * (D**-0.5 if scaling is None else scaling)
    logits = logits.masked_fill(~visible, float("-inf"))
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.double().view(1, Hq, 1, 1).expand(B, Hq, T, 1)], -1)
    weights = logits.softmax(-1).nan_to_num(0.0)[..., :S]
    return (weights @ values).to(query.dtype).transpose(1, 2), None


AttentionInterface.register("masked by hand", masked_attention)
AttentionMaskInterface.register("masked by hand", sdpa_mask)


@dataclass(frozen=True, kw_only=True)
class Norms(KeyNorm):
    """Scores that are taken to mean the same in all layers."""

    comparable: ClassVar[str] = "model"


class Pair:
    """A model with an EvictingCache, and its double with a DynamicCache and attention masked by hand, which go through
    the same forwards. `held[layer][b][h]` are the positions that the evictions have left."""

    def __init__(self, model, policy, **options):
        self.ours, self.theirs = model, copy.deepcopy(model)
        self.theirs.set_attn_implementation("masked by hand")
        self.cache = EvictingCache(model, policy, on_evict=self.evicted, **options)
        self.dense = DynamicCache(config=model.config)
        self.layers = full_layers(model)
        self.heads = model.config.num_key_value_heads
        self.mask = torch.empty(0, 0)
        self.evictions = []

    def evicted(self, eviction):
        self.evictions.append(eviction)
        rows = self.held[eviction.layer]
        for b, heads in enumerate(eviction.indices.tolist()):
            for h, indices in enumerate(heads):
                kept = [i for i in indices if i >= 0]
                assert kept == sorted(set(kept)) and indices[len(kept) :] == [-1] * (len(indices) - len(kept))
                rows[b][h] = [rows[b][h][i] for i in kept]

    @torch.no_grad()
    def forward(self, ids, mask=None):
        """The same tokens through both: logits agree where there are tokens."""
        B, new = ids.shape
        mask = torch.ones_like(ids) if mask is None else mask
        if self.mask.numel() == 0:
            self.mask = mask[:, :0]
            self.held = {layer: [[[] for _ in range(self.heads)] for _ in range(B)] for layer in self.layers}
        start = self.mask.shape[1]
        self.mask = torch.cat([self.mask, mask], 1)
        GONE.clear()
        for layer, rows in self.held.items():
            GONE[layer] = torch.ones(B, self.heads, start, dtype=torch.bool, device=DEVICE)
            for b, heads in enumerate(rows):
                for h, held in enumerate(heads):
                    GONE[layer][b, h, held] = False
                    held += [start + i for i in range(new) if mask[b, i]]
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]
        options = dict(attention_mask=self.mask, position_ids=positions)
        expected = self.theirs(ids, past_key_values=self.dense, **options).logits
        found = self.ours(ids, past_key_values=self.cache, **options).logits
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)

    def decode(self, steps, seed=50):
        for step in range(steps):
            self.forward(prompt(1, batch=len(self.mask), seed=seed + step))

    def counts(self, b=0):
        """Tokens of each head in each layer."""
        return [[len(held) for held in self.held[layer][b]] for layer in self.layers]

    def check_holdings(self):
        """The cache holds what it must, in no more memory than promised."""
        for report, layer in zip(self.cache.report(), self.cache._evicting(), strict=True):
            counts = [[len(held) for held in heads] for heads in self.held[layer.index]]
            most = max(sum(of_request) for of_request in counts)
            assert report.kept == (2 * most + self.heads) // (2 * self.heads)
            assert (report.fewest, report.most) == (min(map(min, counts)), max(map(max, counts)))
            assert (report.seen, layer.tokens_of_heads().tolist()) == (self.mask.shape[1], counts)
            keys, values, lengths = layer.whole()
            since = layer.cached()
            paged = [max(n - since, 0) for of_request in counts for n in of_request]
            width = keys.shape[3] * keys.element_size() + values.shape[3] * values.element_size()
            tail, pages = (
                sum(x.untyped_storage().nbytes() for x in held)
                for held in ((layer.keys, layer.values), (layer.pages.keys, layer.pages.values))
            )
            assert pages <= (sum(paged) + BLOCK_SIZE * len(paged)) * width and report.bytes == tail + pages


def unequal(model, seed=0):
    """Shares [L, H] of the heads, up to twenty times one another."""
    shape = len(full_layers(model)), model.config.num_key_value_heads
    return (3 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 3).exp()


def shares_of(kind, model, keep):
    """(policy, budget) of each way to unequal heads, and of unequal layers."""
    policy = KeyDiff(sink=2, recent=4)
    return {
        "fixed": (policy, Fixed(unequal(model), keep)),
        "fixed by queries": (replace(RECOMMENDED, heads="each", sink=2, recent=4), Fixed(unequal(model), keep)),
        "layer-wide": (policy, LayerWide(keep, floor=0.1)),
        "adaptive": (SnapKV(variant="original", heads="adaptive", floor=0.0), keep),
        "fixed per layer": (policy, Fixed(unequal(model), keep, per="layer")),
        "adaptive, unequal layers": (replace(policy, heads="adaptive"), Fixed(unequal(model), keep, per="layer")),
        "model-wide": (Norms(sink=2, recent=4), ModelWide(keep)),
    }[kind]


KINDS = ["fixed", "fixed by queries", "layer-wide", "adaptive", "adaptive, unequal layers", "model-wide"]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_a_dense_cache_masked_per_head(kind):
    model = tiny(num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    policy, keep = shares_of(kind, model, 0.4)
    pair = Pair(model, policy, keep=keep)
    pair.forward(prompt(150))
    counts = pair.counts()
    assert sum(map(sum, counts)) == 3 * 4 * 60
    assert len({n for of_layer in counts for n in of_layer}) > 4
    pair.check_holdings()
    pair.forward(prompt(7, seed=1))  # a chunk
    steps = 60 if kind == "fixed" else 12
    pair.decode(steps)
    pair.forward(prompt(20, seed=2))
    assert pair.counts() == [[n + 27 + steps for n in of_layer] for of_layer in counts]
    assert len(pair.evictions) == 3  # the prompt is cut once
    pair.check_holdings()


@pytest.mark.parametrize("kind", KINDS)
def test_each_request_of_a_padded_batch_has_its_own_share(kind):
    model = tiny(num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    policy, keep = shares_of(kind, model, 0.5)
    pair = Pair(model, policy, keep=keep)
    pair.forward(*padded())
    for b, length in enumerate(BATCH):
        assert sum(map(sum, pair.counts(b))) == 3 * 4 * ((length + 1) // 2)
        alone = Pair(model, policy, keep=keep)
        alone.forward(prompt(length, seed=b))
        assert alone.counts() == pair.counts(b)
    pair.check_holdings()
    pair.decode(8)
    # A chunk of which the second request has two tokens, the third none.
    mask = torch.tensor([[1] * 6, [0] * 4 + [1] * 2, [0] * 6], device=DEVICE)
    pair.forward(prompt(6, batch=3, seed=7), mask)
    pair.decode(4, seed=90)
    pair.check_holdings()


def test_a_padded_chunk_right_behind_the_cut():
    """A tail that is shorter than the chunk, or empty: the op has such queries in front, the model behind."""
    model = tiny()
    pair = Pair(model, KeyDiff(sink=2, recent=4), keep=Fixed(unequal(model), 0.5))
    pair.forward(*padded())
    pair.forward(prompt(5, batch=3, seed=7), torch.tensor([[0] * 5, [0] * 3 + [1] * 2, [1] * 5], device=DEVICE))
    pair.decode(3)
    pair.check_holdings()


@pytest.mark.parametrize("budget", [Fixed(torch.ones(3), 1), Fixed(torch.ones(3, 2), 1), Pyramid(1)])
def test_one_token_and_all_of_them_are_not_the_same(ours, budget):  # noqa: F811
    """1 == 1.0 in Python, and budgets are looked up."""
    for keep, expected in ((1, 1), (1.0, 50)):
        cache = EvictingCache(ours, KeyDiff(), keep=replace(budget, keep=keep))
        generate(ours, prompt(50), new=1, past_key_values=cache)
        assert [layer.kept for layer in cache.report()] == [expected] * 3


@pytest.mark.parametrize("keep", [0.5, 12])
@pytest.mark.parametrize("kind", [*KINDS, "fixed per layer"])
def test_a_request_without_a_token_keeps_none(kind, keep):
    model = tiny()
    policy, budget = shares_of(kind, model, keep)
    pair = Pair(model, policy, keep=budget)
    pair.forward(prompt(24, batch=2), torch.tensor([[1] * 24, [0] * 24], device=DEVICE))
    assert pair.counts(1) == [[0, 0]] * 3 and sum(map(sum, pair.counts(0))) == 3 * 2 * 12
    pair.forward(prompt(6, batch=2, seed=1), torch.tensor([[1] * 6, [0] * 2 + [1] * 4], device=DEVICE))
    pair.decode(1)
    if policy.needs == set():
        pair.cache.evict(budget)
        pair.decode(1)


@pytest.mark.parametrize("kind", ["fixed by queries", "layer-wide", "model-wide"])
def test_a_padded_prompt_in_chunks(kind):
    """Requests that have no token yet keep none when others are cut."""
    model = tiny()
    policy, budget = shares_of(kind, model, 12)
    pair = Pair(model, policy, budget=budget, interval=2)
    ids, mask = padded()
    for chunk, shown in zip(ids.split(20, 1), mask.split(20, 1), strict=True):
        pair.forward(chunk, shown)
        pair.check_holdings()
    pair.decode(6)
    pair.check_holdings()
    assert len(pair.evictions) >= 3 * 4


def test_a_prompt_in_inference_mode():
    model = tiny()
    pair = Pair(model, KeyDiff(sink=2, recent=4), budget=Fixed(unequal(model), 40), interval=8)
    with torch.inference_mode():
        pair.forward(*padded())
        pair.decode(2)
    pair.decode(10)
    pair.cache.reorder_cache(torch.tensor([0, 1, 2], device=DEVICE))
    pair.decode(1)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "mistral", "phi3", "gpt_oss"])
@pytest.mark.parametrize("kind", ["fixed", "model-wide"])
def test_families(family, kind):
    """gemma3: half of the layers have a window, and scale logits by another number; gpt_oss: attention sinks."""
    model = build(family)
    policy, keep = shares_of(kind, model, 0.4)
    for ids, mask in ((prompt(70), None), padded()):
        pair = Pair(model, policy, keep=keep)
        pair.forward(ids, mask)
        pair.forward(prompt(5, batch=len(ids), seed=1))
        pair.decode(5)
        pair.check_holdings()


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_holds_for_ever(kind):
    """Later evictions read the pages and what came since: through chunks, decoding, further turns."""
    model = tiny()
    policy, budget = shares_of(kind, model, 48)
    budget = Uniform(budget) if isinstance(budget, int) else budget
    pair = Pair(model, policy, budget=budget, interval=8)
    for turn in range(2):
        for seed in range(3):
            pair.forward(prompt(30, seed=10 * turn + seed))
            assert sum(map(sum, pair.counts())) <= 3 * 2 * (48 + 8) + (0 if "wide" in kind else 6)
        pair.decode(18, seed=60 + 30 * turn)
        assert sum(map(sum, pair.counts())) <= 3 * 2 * (48 + 8)
    assert len(pair.evictions) >= 3 * 7
    pair.check_holdings()


def test_a_layer_may_be_left_with_nothing(tmp_path):
    """Of all layers' best tokens none may be of one layer. It goes on, and is saved."""
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(100)  # KeyNorm: the larger, the worse
    pair = Pair(model, Norms(sink=0, recent=0), keep=ModelWide(0.3))
    pair.forward(prompt(80))
    assert pair.counts()[1] == [0, 0] and sum(map(sum, pair.counts())) == 3 * 2 * 24
    pair.cache.save_pretrained(tmp_path)
    options = dict(keep=ModelWide(0.3), on_evict=pair.evicted, device=DEVICE)
    pair.cache = EvictingCache.from_pretrained(tmp_path, model, Norms(sink=0, recent=0), **options)
    pair.cache.evict(0.9)
    pair.forward(prompt(6, seed=1))
    pair.decode(3)
    pair.cache.evict(0.5)
    pair.forward(prompt(6, seed=2))
    pair.check_holdings()


@pytest.mark.parametrize("kind", KINDS)
def test_evicting_at_will_is_what_keep_does(kind):
    """After chunks, a first time; and once more, of what is left, a share of which each budget takes in its own way."""
    model = tiny()
    policy, keep = shares_of(kind, model, 0.6)
    straight = Pair(model, policy, keep=keep)
    straight.forward(prompt(90))
    pair = Pair(model, policy, budget=200)
    for chunk in prompt(90).split(32, dim=1):
        pair.forward(chunk)
    pair.cache.evict(keep)
    assert pair.held == straight.held
    pair.check_holdings()
    pair.forward(prompt(4, seed=1))
    assert sum(map(sum, pair.counts())) == 3 * 2 * (54 + 4)
    before = [weakref.ref(layer.pages.keys) for layer in pair.cache.layers]
    pair.cache.evict(shares_of(kind, model, 0.5)[1])
    assert [pages() for pages in before] == [None] * 3  # their memory is free
    assert sum(map(sum, pair.counts())) <= 3 * 2 * 29 + 6  # a head's half is rounded
    assert sum(map(sum, pair.counts())) >= 3 * 2 * 29 - 20  # and shares may be more than a head has left
    pair.decode(3)
    pair.cache.evict(40)  # of each head, at most
    assert max(map(max, pair.counts())) <= 40 or kind == "adaptive" or "layers" in kind
    pair.decode(3)
    pair.check_holdings()
    before = copy.deepcopy(pair.held)
    pair.cache.evict(1.0)
    assert pair.held == before
    pair.decode(1)


def test_layers_of_unequal_length_choose_together():
    model = tiny()
    pair = Pair(model, Norms(sink=2, recent=4), budget=ModelWide(40), interval=4)
    pair.forward(prompt(40))
    pair.cache.evict(Fixed(torch.tensor([1.0, 2.0, 3.0]), 0.5))
    assert pair.counts() == [[10, 10], [20, 20], [30, 30]]
    pair.forward(prompt(30, seed=1))
    assert sum(map(sum, pair.counts())) == 3 * 2 * 40 and len(pair.evictions) == 6
    pair.decode(2)
    pair.check_holdings()


def test_tokens_since_the_cut_can_be_cropped():
    model = tiny()
    pair = Pair(model, KeyDiff(sink=2, recent=4), keep=Fixed(unequal(model), 0.5))
    pair.forward(prompt(60))
    with pytest.raises(ValueError, match="expected at least -0"):
        pair.cache.crop(-1)
    pair.forward(prompt(7, seed=1))
    for count in (3, 4):
        pair.cache.crop(-count)
        pair.dense.crop(-count)
        pair.mask = pair.mask[:, :-count]
        pair.held = {i: [[row[:-count] for row in heads] for heads in rows] for i, rows in pair.held.items()}
        pair.check_holdings()
        pair.decode(1)
        pair.forward(prompt(3, seed=count))
    with pytest.raises(ValueError, match="expected at least -8"):
        pair.cache.crop(-9)


@pytest.mark.parametrize("mode", ["keep", "budget"])
def test_saved_caches_answer_as_before(mode, tmp_path):
    model = tiny()
    policy = replace(RECOMMENDED, heads="each", sink=2, recent=4)
    options = dict(keep=Fixed(unequal(model), 0.4))
    if mode == "budget":
        options = dict(budget=Fixed(unequal(model), 40), interval=8)
    pair = Pair(model, policy, **options)
    pair.forward(*padded())
    pair.cache.save_pretrained(tmp_path / "at once")
    pair.decode(3)
    pair.cache.save_pretrained(tmp_path / "later")
    pair.cache = EvictingCache.from_pretrained(
        tmp_path / "later", model, policy, device=DEVICE, on_evict=pair.evicted, **options
    )
    pair.check_holdings()
    pair.decode(12)
    pair.forward(prompt(9, batch=3, seed=3))
    pair.check_holdings()
    assert len(pair.evictions) == 3 if mode == "keep" else len(pair.evictions) > 6
    with pytest.raises(
        ValueError, match=r"has heads of unequal length, and policy has heads 'shared': expected 'each'"
    ):
        EvictingCache.from_pretrained(tmp_path / "later", model, RECOMMENDED, budget=40, device=DEVICE)
    at_once = EvictingCache.from_pretrained(tmp_path / "at once", model, policy, device=DEVICE, **options)
    assert [layer.cached() for layer in at_once.layers] == [0] * 3
    assert at_once.get_seq_length() == 80
    loaded = EvictingCache.from_pretrained(tmp_path / "later", model.config, KeyDiff(), keep=0.5)  # of equal heads else
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="budgets that differ by layer or head"):
        model(prompt(1, batch=3), past_key_values=loaded)


@pytest.mark.parametrize("kind", ["fixed", "model-wide"])
def test_beams_and_batches_that_change(kind):
    model = tiny()
    policy, keep = shares_of(kind, model, 0.5)
    pair = Pair(model, policy, keep=keep)
    pair.forward(*padded())
    pair.decode(2)
    for cache in (pair.cache, pair.dense):
        cache.batch_select_indices(torch.tensor([2, 0], device=DEVICE))
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([1, 3, 0, 2], device=DEVICE))
    order = [2, 0, 2, 0]
    pair.mask = pair.mask[order]
    pair.held = {i: [[list(row) for row in rows[b]] for b in order] for i, rows in pair.held.items()}
    pair.decode(2)
    pair.cache.evict(0.8)
    pair.decode(1)
    pair.check_holdings()


def test_generate_with_beams_and_samples():
    """Everything kept, in pages: the tokens of a DynamicCache."""
    model = tiny()
    for options in (dict(num_beams=2, do_sample=False), dict(num_beams=3, num_return_sequences=2, do_sample=False),
                    dict(do_sample=True, num_return_sequences=3)):  # fmt: skip
        said = []
        for cache in (DynamicCache(), EvictingCache(model, KeyDiff(), keep=Fixed(unequal(model), 1.0))):
            torch.manual_seed(1)
            said.append(model.generate(prompt(60), max_new_tokens=10, past_key_values=cache, **options))
        assert torch.equal(*said)
        cache = EvictingCache(model, KeyDiff(recent=4), budget=Fixed(unequal(model), 30), interval=4)
        assert model.generate(prompt(60), max_new_tokens=12, past_key_values=cache, **options).shape[1] == 72


def test_assisted_generation_crops_what_was_wrong():
    """Eviction waits for the crop. The prompt itself is cut after it."""
    model = tiny()
    for kind in ("fixed", "model-wide"):
        policy, keep = shares_of(kind, model, 0.5)
        ids = prompt(20).repeat(1, 3)
        said = [
            generate(model, ids, past_key_values=EvictingCache(model, policy, keep=keep), **options)
            for options in (dict(), dict(prompt_lookup_num_tokens=3))
        ]
        assert said[0].shape == said[1].shape
        cache = EvictingCache(model, policy, keep=keep)
        generate(model, ids, past_key_values=cache, prompt_lookup_num_tokens=3)
        assert sum(r.kept for r in cache.report()) < 3 * 60


DEFECTS = {
    "lengths": (
        lambda x: x.update({"1.pages.lengths": x["1.pages.lengths"][:1]}),
        r"expected counts of shape \(3, 2\)",
    ),
    "negative": (lambda x: x["1.pages.lengths"].fill_(-1), "none below 0"),
    "total": (lambda x: x["1.pages.lengths"].add_(1), "has pages.keys of shape"),
    "values": (lambda x: x.update({"1.pages.values": x["1.pages.values"][:-1]}), "has pages.values of shape"),
    "type": (lambda x: x.update({"1.pages.keys": x["1.pages.keys"].half()}), "and torch.float32"),
    "no keys": (lambda x: x.pop("1.pages.keys"), "has no 'pages.keys'"),
}


@pytest.mark.parametrize("defect", DEFECTS)
@torch.no_grad()
def test_defects_of_saved_pages_are_named(ours, tmp_path, defect):  # noqa: F811
    ids, mask = padded()
    cache = EvictingCache(ours, KeyDiff(recent=4), keep=Fixed(unequal(ours), 0.5))
    ours(ids, attention_mask=mask, past_key_values=cache)
    cache.save_pretrained(tmp_path)
    change, match = DEFECTS[defect]
    rewritten(tmp_path, lambda _, tensors: change(tensors))
    with pytest.raises(ValueError, match=rf"cache\.safetensors .*{match}"):
        EvictingCache.from_pretrained(tmp_path, ours, KeyDiff(), keep=0.5, device=DEVICE)


def test_what_is_not_served_is_refused_at_once(plain, ours):  # noqa: F811
    fixed = Fixed(unequal(plain), 0.5)
    int_fixed = Fixed(unequal(plain), 40)
    for policy, options, match in [
        (RECOMMENDED, dict(keep=fixed), r"policy has heads 'shared': expected dataclasses\.replace\(policy"),
        (RECOMMENDED, dict(keep=LayerWide(0.5)), "policy has heads 'shared'"),
        (Recency(), dict(keep=LayerWide(0.5)), "scores of Recency compare within a row"),
        (KeyDiff(), dict(keep=ModelWide(0.5)), "scores of KeyDiff compare within a layer"),
        (KeyDiff(), dict(keep=Fixed(torch.ones(4, 2), 0.5)), "shares are of 4 layers: expected 3"),
        (KeyDiff(), dict(keep=Fixed(torch.ones(3, 4), 0.5)), "shares are of 4 heads a layer: expected 2"),
        (KeyDiff(), dict(keep=Fixed(torch.ones(4, 2), 0.5, per="layer")), "shares are of 4 layers: expected 3"),
        (KeyDiff(), dict(budget=fixed), "budget is 0.5: expected an int"),
        (KeyDiff(), dict(budget=int_fixed, static=True), "static is True, and heads are to keep unequal"),
        (AttentionMass(), dict(budget=int_fixed), "by AttentionMass, which reads mass: expected with budget="),
        (AttentionMass(heads="adaptive"), dict(budget=40), "by AttentionMass, which reads mass"),
        (LRU(), dict(budget=int_fixed), "by LRU, which reads last_used"),
    ]:
        with pytest.raises(ValueError, match=match):
            EvictingCache(plain.config, policy, **options)
    other = Shares((1.0,), torch.ones(1, 3, 2), {"config": "0123456789abcdef", "model": "other-1b"})
    with pytest.raises(ValueError, match="shares are of other-1b with config 0123456789abcdef: expected "):
        EvictingCache(plain.config, keep=Fixed(other, 0.5))
    falcon = tiny(transformers.FalconConfig, transformers.FalconForCausalLM, alibi=False, multi_query=False)
    with pytest.raises(ValueError, match='need "kvevict" attention, which FalconForCausalLM cannot use'):
        EvictingCache(falcon, keep=Fixed(torch.ones(3, 2), 0.5))
    with pytest.raises(ValueError, match="kv_lora_rank 24"):
        EvictingCache(build("deepseek_v3").config, keep=LayerWide(0.5))
    if hasattr(transformers, "Gemma4TextConfig"):
        config = transformers.Gemma4TextConfig(num_kv_shared_layers=2)
        with pytest.raises(ValueError, match="num_kv_shared_layers 2"):
            EvictingCache(config, keep=LayerWide(0.5))
    with pytest.raises(ValueError, match="budgets that differ by layer or head"):  # of the config alone
        generate(plain, prompt(40), past_key_values=EvictingCache(plain.config, keep=fixed))
    cache = EvictingCache(ours, KeyDiff(), budget=100, static=True)
    generate(ours, prompt(40), past_key_values=cache)
    with pytest.raises(ValueError, match="static is True, and heads"):
        cache.evict(fixed)


@pytest.mark.skipif(not NEW, reason="another cache in older versions")
def test_keys_and_values_of_a_models_own_making_are_refused():
    model = build("diffllama")  # attends over its values twice, in other arrangements
    cache = EvictingCache(model, KeyDiff(), keep=LayerWide(0.5))
    with pytest.raises(ValueError, match="DiffLlama.* attends more than once over what it caches"):
        generate(model, prompt(40), past_key_values=cache)
    assert cache.get_seq_length() == 0
    cache = EvictingCache(model, KeyDiff(), budget=100)
    generate(model, prompt(40), past_key_values=cache)
    cache.evict(LayerWide(0.5))
    with pytest.raises(ValueError, match="DiffLlama.* attends more than once over what it caches"):
        generate(model, prompt(60), past_key_values=cache)


def test_gradients_end_at_the_prompt(ours):  # noqa: F811
    cache = EvictingCache(ours, KeyDiff(recent=4), keep=Fixed(unequal(ours), 0.5))
    with torch.enable_grad():
        ours(prompt(40), past_key_values=cache).logits.sum().backward()
        ours.zero_grad()
        with pytest.raises(ValueError, match=r"gradients are wanted.*torch\.no_grad"):
            ours(prompt(3), past_key_values=cache)
    ours.model.layers[0].self_attn.attention_dropout = 0.5
    with torch.no_grad(), pytest.raises(ValueError, match=r"dropout is wanted.*model\.eval"):
        ours.train()(prompt(3), past_key_values=cache)
    ours.eval().model.layers[0].self_attn.attention_dropout = 0.0
    assert cache.get_seq_length() == 40  # as it was
    with torch.no_grad():
        ours(prompt(3), past_key_values=cache)
    assert cache.get_seq_length() == 43


@torch.no_grad()
def test_layers_are_cut_one_by_one(ours):  # noqa: F811
    """When a layer is cut, those before it hold pages, and those behind it nothing yet; but for a choice over all."""
    for kind in KINDS[:-1]:
        policy, keep = shares_of(kind, ours, 0.5)
        seen = []

        def note(eviction, seen=seen):
            layers = cache.layers  # noqa: B023
            seen.append([(x.pages is not None, x.tokens_seen) for x in layers])

        cache = EvictingCache(ours, policy, keep=keep, on_evict=note)
        ours(prompt(80), past_key_values=cache)
        assert seen == [[(True, 80)] * n + [(False, 0)] * (3 - n) for n in (1, 2, 3)]


@torch.no_grad()
def test_decoding_makes_no_dense_copy(ours, monkeypatch):  # noqa: F811
    cache = EvictingCache(ours, SnapKV(variant="original"), budget=Fixed(unequal(ours), 60), interval=16)
    ours(prompt(100), past_key_values=cache)
    monkeypatch.setattr(Pages, "dense", None)
    for step in range(16):
        ours(prompt(1, seed=step), past_key_values=cache)
    with pytest.raises(TypeError):  # before an eviction it is made
        ours(prompt(1), past_key_values=cache)
    with pytest.raises(ValueError, match=r"layer 0 hold unequal numbers.*layers\[i\]\.whole\(\)"):
        list(cache)


def test_the_smallest_share_of_a_head_holds_what_is_pinned():
    model = tiny()
    keep = Fixed(torch.tensor([[1.0, 1.0], [10.0, 10.0], [10.0, 10.0]]), 30)
    for options in (dict(keep=keep), dict(budget=keep, interval=4)):
        pair = Pair(model, KeyDiff(sink=0, recent=2), pin=16, **options)
        pair.forward(prompt(100))
        assert pair.counts() == [[18, 18], [36, 36], [36, 36]]
        assert all(row[:16] == list(range(16)) for rows in pair.held.values() for row in rows[0])


def test_unequal_layers_alone_need_no_pages(ours):  # noqa: F811
    cache = EvictingCache(ours, RECOMMENDED, keep=Fixed(unequal(ours), 0.5, per="layer"))
    generate(ours, prompt(80), past_key_values=cache)
    assert all(layer.pages is None for layer in cache.layers)
    assert sum(r.kept - 11 for r in cache.report()) == 3 * 40 and len({r.kept for r in cache.report()}) == 3


@pytest.mark.skipif(DEVICE != "cpu", reason="the other tests run the kernels there")
def test_the_kernels_in_the_interpreter():
    """A prompt that is padded, a chunk that is, a decode step, an eviction from pages, and a step."""
    model = tiny(num_hidden_layers=1)
    shares = torch.tensor([[1.0, 4.0]])
    with kvevict.backend("triton"):
        pair = Pair(model, KeyDiff(sink=2, recent=4), keep=Fixed(shares, 0.5))
        pair.forward(prompt(40, batch=2), torch.tensor([[1] * 40, [0] * 15 + [1] * 25]))
        assert pair.counts(0) == [[8, 32]] and pair.counts(1) == [[6, 20]]
        pair.forward(prompt(3, batch=2, seed=1), torch.tensor([[0] * 2 + [1], [1] * 3]))
        pair.decode(1)
        pair.cache.evict(0.5)
        pair.decode(1)
        pair.check_holdings()


def test_recommended_by_name_lets_heads_choose_where_they_keep_their_own_number(ours):  # noqa: F811
    of_heads = EvictingCache(ours, "recommended", keep=Fixed(torch.ones(3, 2), 0.5))
    assert of_heads._policy is RECOMMENDED_FOR_SHARES
    for keep in (0.5, Fixed(torch.ones(3, 2), 0.5, per="layer")):
        assert EvictingCache(ours, "recommended", keep=keep)._policy is RECOMMENDED


@pytest.mark.slow
def test_smollm2():
    """A real model with shares of a real kind: a few heads hold most."""
    from kvevict import models

    try:
        model, tokenizer = models.load(device=DEVICE)
    except models.Unavailable as error:
        pytest.skip(str(error))
    ids = torch.tensor([tokenizer(models.sample_text()[:3000])["input_ids"][:420]], device=DEVICE)
    pair = Pair(model, KeyDiff(), keep=Fixed(unequal(model) ** 2, 0.25))
    pair.forward(ids[:, :400])
    counts = [n for of_layer in pair.counts() for n in of_layer]
    assert sum(counts) == 30 * 3 * 100 and min(counts) == 36 and max(counts) >= 300
    pair.check_holdings()
    pair.forward(ids[:, 400:410])
    for token in ids[:, 410:].split(1, dim=1):
        pair.forward(token)
    pair.check_holdings()


@torch.no_grad()
def test_another_policy_may_choose_of_what_was_noted():
    model = tiny()
    ids = prompt(60)
    for other, keep in ((KeyDiff(sink=1, recent=2), 0.5), (TOVA(), 0.25)):
        held = EvictingCache(model, Hybrid(parts=((1.0, KeyDiff()), (1.0, TOVA()))), budget=100)
        alone = EvictingCache(model, other, budget=100)
        for cache in (held, alone):
            model(ids, past_key_values=cache)
        held.evict(keep, other)
        alone.evict(keep)
        for one, two in zip(held.layers, alone.layers, strict=True):
            assert torch.equal(one.keys, two.keys) and one.croppable() <= two.croppable()
    cache = EvictingCache(model, KeyDiff(), budget=100)
    model(ids, past_key_values=cache)
    with pytest.raises(
        ValueError, match="TOVA reads queries, which was not noted: expected one that reads no more than K"
    ):
        cache.evict(0.5, TOVA())
    with pytest.raises(ValueError, match="AttentionMass reads attention, which was not noted"):
        cache.evict(0.5, AttentionMass())
