"""What attention masks may say to an EvictingCache: padding on the left, and nothing else is taken for it."""

import pytest
import torch
from conftest import DEVICE

transformers = pytest.importorskip("transformers")

from test_hf import BATCH, generate, lengths, ours, padded, plain, prompt, reference_backend, tiny  # noqa: F401
from transformers import DynamicCache

from kvevict.hf import EvictingCache, masks
from kvevict.policies import TOVA, AttentionMass, KeyDiff, Pyramid

CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()


def four_d(is_token, new=None):
    """transformers' mask of tokens [B, S] for the last `new` queries, from the definition: a loop."""
    B, S = is_token.shape
    new = S if new is None else new
    mask = torch.zeros(B, 1, new, S, dtype=torch.bool, device=is_token.device)
    for b in range(B):
        for q in range(new):
            for k in range(S - new + q + 1):
                mask[b, 0, q, k] = is_token[b, k]
    return mask


def test_left_padding_is_read():
    is_token = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    shown = masks.read(four_d(is_token), 6)
    assert torch.equal(shown.is_token, is_token) and not shown.ahead
    assert masks.read(None, 6)[:3] == masks.read(four_d(is_token[1:2]), 6)[:3] == masks.ALL[:3]
    shown = masks.read(four_d(is_token[:2], new=3), 3)
    assert shown.is_token is None and not shown.past_whole  # padding before the new tokens
    shown = masks.read(four_d(is_token, new=5), 5)
    assert shown.is_token[0].tolist() == [False, True, True, True, True]
    floats = torch.zeros(3, 1, 6, 6).masked_fill(~four_d(is_token), torch.finfo(torch.float32).min)
    assert torch.equal(masks.read(floats, 6).is_token, is_token)
    assert torch.equal(masks.read(floats.masked_fill(floats < 0, float("-inf")), 6).is_token, is_token)


def test_a_block_that_sees_ahead_is_no_padding():
    image = CAUSAL.clone()
    image[1:4, 1:4] = True
    shown = masks.read(image[None, None], 6)
    assert shown[:3] == (None, True, True)


def change(row, column, value):
    mask = CAUSAL.clone()
    mask[row, column] = value
    return mask[None, None]


@pytest.mark.parametrize(
    "mask",
    [
        change(5, 1, False),  # one query does not see one token
        change(slice(None), 2, False),  # no query does: a hole
        change(slice(3, None), slice(0, 3), False),  # two texts in one row
        change(slice(None), 5, False),  # padding on the right
        change(3, 0, False)[:, :, 2:],  # one query of a chunk does not see one token of its past
        torch.zeros(1, 1, 6, 6).masked_fill(~CAUSAL, -1e4),  # not low enough to hide
        torch.zeros(1, 1, 6, 6).masked_fill(~CAUSAL, float("-inf")) - CAUSAL * 0.5,  # a bias
        torch.stack([CAUSAL, change(5, 1, False)[0, 0]])[None],  # unlike heads
        CAUSAL[None],
    ],
    ids=["one", "hole", "packed", "right", "chunk", "weak", "bias", "heads", "3-D"],
)
def test_what_is_not_left_padding_is_refused(mask):
    with pytest.raises(ValueError, match="attention_mask"):
        masks.read(mask, mask.shape[2] if mask.ndim == 4 else 6)


@torch.no_grad()
def test_no_token_is_lost_to_a_mask_that_hides_some(ours):  # noqa: F811
    """A prompt of 60 whose last query may not see the first 20: 40 stayed, silently, as if 20 were padding."""
    mask = torch.ones(60, 60, dtype=torch.bool, device=DEVICE).tril()
    mask[40:, :20] = False
    cache = EvictingCache(ours.config, KeyDiff(recent=8), budget=200)
    with pytest.raises(ValueError, match="attention_mask hides or weighs tokens"):
        ours(prompt(60), attention_mask=mask[None, None], past_key_values=cache)
    assert lengths(cache) == [(0, 0)] * 3
    ours(prompt(60), past_key_values=cache)  # the refused forward left nothing
    assert lengths(cache) == [(60, 60)] * 3
    evicted = EvictingCache(ours.config, KeyDiff(recent=8), keep=0.5)
    ours(prompt(60), past_key_values=evicted)
    hides = torch.ones(1, 1, 4, 34, dtype=torch.bool, device=DEVICE)
    hides[..., 3] = False
    with pytest.raises(ValueError, match="attention_mask hides"):
        ours(prompt(4), attention_mask=hides, past_key_values=evicted)
    assert evicted.layers[0].cached() == 30


@torch.no_grad()
@pytest.mark.parametrize("keep", [200, 0.5], ids=["whole", "cut"])
def test_a_padded_batch_whose_mask_hides_more_later_is_refused(ours, keep):  # noqa: F811
    """Padding hides a part of the past already: the mask may hide that, and no token beside it."""
    ids, mask = padded()
    turn = prompt(4, batch=3, seed=5)
    whole = torch.cat([mask, torch.ones_like(turn)], 1)
    hides = whole.clone()
    hides[:, -8:-6] = 0
    cache = EvictingCache(ours.config, KeyDiff(recent=8), keep=keep)
    ours(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
    position = (whole.cumsum(-1) - 1)[:, -4:]
    before = [layer.tokens() for layer in cache.layers]
    with pytest.raises(ValueError, match="attention_mask hides cached tokens"):
        ours(turn, attention_mask=hides, position_ids=position, past_key_values=cache)
    assert [layer.tokens() for layer in cache.layers] == before
    ours(turn, attention_mask=whole, position_ids=position, past_key_values=cache)
    assert [layer.tokens() for layer in cache.layers] == [[n + 4 for n in layer] for layer in before]


@torch.no_grad()
@pytest.mark.parametrize("policy", [AttentionMass(recent=8, grace=8), TOVA(recent=8)], ids=lambda p: type(p).__name__)
def test_a_refused_chunk_takes_nothing_of_what_was_noted_before_it(ours, policy):  # noqa: F811
    """What is noted of attention comes after the check of the mask: the chunk has noted nothing to take back."""
    mask = torch.ones(1, 65, dtype=torch.long, device=DEVICE)
    mask[0, 3:6] = 0
    kept = []
    for refused in (True, False):
        cache = EvictingCache(ours.config, policy, budget=200)
        ours(prompt(60), past_key_values=cache)
        if refused:
            with pytest.raises(ValueError, match="attention_mask hides cached tokens"):
                ours(prompt(5, seed=1), attention_mask=mask, past_key_values=cache)
        cache.evict(0.5)
        kept.append(cache.layers[0].keys)
    assert torch.equal(*kept)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_a_4d_mask_of_left_padding_is_honoured(ours, dtype):  # noqa: F811
    ids, mask = padded()
    whole = four_d(mask.bool())
    if dtype != torch.bool:
        whole = torch.zeros(whole.shape, device=DEVICE).masked_fill(~whole, torch.finfo(dtype).min)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    results = []
    for given in (mask, whole):
        cache = EvictingCache(ours.config, KeyDiff(recent=8), keep=0.5)
        ours(ids, attention_mask=given, position_ids=position, past_key_values=cache)
        results.append(cache)
    for a, b in zip(*(cache.layers for cache in results), strict=True):
        assert b.lengths.tolist() == [(length + 1) // 2 for length in BATCH]
        assert torch.equal(a.lengths, b.lengths)
        torch.testing.assert_close(a.keys, b.keys)


@torch.no_grad()
def test_padding_in_a_later_turn_is_seen(ours):  # noqa: F811
    """A batch without padding whose second turn has some: each request is as if alone."""
    first, mask = prompt(40, batch=2, seed=3), torch.ones(2, 40, dtype=torch.long, device=DEVICE)
    turn, turn_mask = prompt(10, batch=2, seed=4), torch.ones(2, 10, dtype=torch.long, device=DEVICE)
    turn_mask[0, :6] = 0
    together = EvictingCache(ours.config, TOVA(recent=8), budget=200)
    ours(first, attention_mask=mask, past_key_values=together)
    whole = torch.cat([mask, turn_mask], 1)
    position = (whole.cumsum(-1) - 1)[:, 40:]
    logits = ours(turn, attention_mask=whole, position_ids=position, past_key_values=together).logits[:, -1]
    together.evict(0.5)
    for b, tokens in enumerate((4, 10)):
        alone = EvictingCache(ours.config, TOVA(recent=8), budget=200)
        ours(first[b : b + 1], past_key_values=alone)
        expected = ours(turn[b : b + 1, -tokens:], past_key_values=alone).logits[0, -1]
        torch.testing.assert_close(logits[b], expected, rtol=1e-4, atol=1e-4)
        alone.evict(0.5)
        for one, other in zip(alone.layers, together.layers, strict=True):
            n = one.cached()
            assert other.lengths[b] == n
            torch.testing.assert_close(other.keys[b, :, :n], one.keys[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_forward_that_was_refused_behind_a_sliding_layer_is_remembered():
    """The window has taken the tokens by then: the next forward would attend over them."""
    model = tiny(transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM, head_dim=16, sliding_window=24,
                 layer_types=["sliding_attention", "full_attention", "sliding_attention"])  # fmt: skip
    cache = EvictingCache(model, KeyDiff(recent=8), budget=200)
    hole = torch.ones(1, 30, dtype=torch.long, device=DEVICE)
    hole[0, 7] = 0
    with pytest.raises(ValueError, match="attention_mask"):
        model(prompt(30), attention_mask=hole, past_key_values=cache)
    with pytest.raises(ValueError, match=r"30 where the others have 0: call reset\(\)"):
        model(prompt(30), past_key_values=cache)
    cache.reset()
    expected = model(prompt(30), past_key_values=DynamicCache(config=model.config)).logits
    torch.testing.assert_close(model(prompt(30), past_key_values=cache).logits, expected)


def test_a_prompt_one_token_at_a_time_is_padded_too(ours):  # noqa: F811
    ids, mask = padded()
    expected = EvictingCache(ours.config, KeyDiff(recent=8), budget=200)
    generate(ours, ids, new=1, attention_mask=mask, past_key_values=expected)
    cache = EvictingCache(ours.config, KeyDiff(recent=8), budget=200)
    generate(ours, ids, new=1, attention_mask=mask, past_key_values=cache, prefill_chunk_size=1)
    for one, other in zip(expected.layers, cache.layers, strict=True):
        assert other.lengths.tolist() == one.lengths.tolist() == BATCH
        for b, n in enumerate(BATCH):
            torch.testing.assert_close(other.keys[b, :, :n], one.keys[b, :, :n], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_mask_that_is_written_over_is_read_again(ours):  # noqa: F811
    ids, mask = padded()
    buffer = four_d(torch.ones_like(mask).bool())
    for values in (torch.ones_like(mask), mask):
        buffer.copy_(four_d(values.bool()))
        cache = EvictingCache(ours.config, KeyDiff(), budget=200)
        ours(ids, attention_mask=buffer, past_key_values=cache)
    assert cache.layers[0].lengths.tolist() == BATCH


def test_a_batch_whose_padding_cannot_be_seen_is_refused(plain):  # noqa: F811
    """Not warned of: what is evicted would be wrong. With the model it is seen."""
    ids, mask = padded()
    cache = EvictingCache(plain.config, keep=0.5)
    with pytest.raises(ValueError, match=r'a batch of 3 requests.*set_attn_implementation\("kvevict"\)'):
        generate(plain, ids, attention_mask=mask, past_key_values=cache)
    model = tiny()
    cache = EvictingCache(model, keep=0.5)
    generate(model, ids, attention_mask=mask, past_key_values=cache)
    assert cache.layers[0].lengths.tolist() == [(n + 1) // 2 + 11 for n in BATCH]
    model.set_attn_implementation("sdpa")  # taken back
    with pytest.raises(ValueError, match="a batch of 3"):
        generate(model, ids, attention_mask=mask, past_key_values=EvictingCache(model.config, keep=0.5))


def test_a_single_padded_request_is_seen():
    ids, mask = padded()
    model = tiny()
    cache = EvictingCache(model, KeyDiff(recent=8), keep=0.5)
    said = generate(model, ids[:1], attention_mask=mask[:1], past_key_values=cache)
    alone = EvictingCache(model, KeyDiff(recent=8), keep=0.5)
    assert torch.equal(said[:, 50:], generate(model, prompt(30, seed=0), past_key_values=alone))
    assert cache.layers[0].lengths.tolist() == [15 + 11]


@torch.no_grad()
def test_layers_of_unlike_length_have_masks_of_their_own(ours):  # noqa: F811
    """A chunk over a cache whose layers kept unlike numbers is what its tokens are one by one."""
    results = []
    for pieces in (1, 7):
        cache = EvictingCache(ours.config, KeyDiff(recent=8), keep=Pyramid(0.3))
        ours(prompt(100), past_key_values=cache)
        logits = [ours(part, past_key_values=cache).logits for part in prompt(7, seed=4).split(7 // pieces, dim=1)]
        results.append(torch.cat(logits, 1))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_without_our_cache_masks_are_not_looked_at(ours):  # noqa: F811
    mask = torch.ones(30, 30, dtype=torch.bool, device=DEVICE).tril()
    mask[20:, :10] = False
    ours(prompt(30), attention_mask=mask[None, None], past_key_values=DynamicCache())


def one_padded():
    """ids [2, 30], whose first request has 8 tokens of padding; mask, and positions."""
    ids = prompt(30, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :8] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def test_a_forward_without_a_mask_between_padded_ones_is_as_one_with_it():
    model = tiny()
    ids, mask, position = one_padded()
    outputs = []
    for middle in (mask[:, :21], None):
        cache = EvictingCache(model, KeyDiff(), keep=1.0)
        model(ids[:, :20], attention_mask=mask[:, :20], position_ids=position[:, :20], past_key_values=cache)
        model(ids[:, 20:21], attention_mask=middle, position_ids=position[:, 20:21], past_key_values=cache)
        options = dict(attention_mask=mask[:, :22], position_ids=position[:, 21:22])
        outputs.append(model(ids[:, 21:22], past_key_values=cache, **options).logits)
    torch.testing.assert_close(*outputs)


@torch.no_grad()
def test_requests_that_change_places_take_what_their_masks_showed_along():
    model = tiny()
    ids, mask, position = one_padded()
    cache = EvictingCache(model, KeyDiff(), keep=1.0)
    model(ids[:, :20], attention_mask=mask[:, :20], position_ids=position[:, :20], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = mask.flip(0)
    options = dict(attention_mask=swapped[:, :21], position_ids=position.flip(0)[:, 20:21])
    assert model(ids[:, 20:21], past_key_values=cache, **options).logits.isfinite().all()
    with pytest.raises(ValueError, match="attention_mask hides cached tokens"):
        model(ids[:, 21:22], attention_mask=mask[:, :22], position_ids=position[:, 21:22], past_key_values=cache)


@pytest.mark.skipif(not hasattr(transformers, "Lfm2ForCausalLM"), reason="older versions have it not")
@torch.no_grad()
def test_a_refusal_behind_layers_of_another_kind_is_remembered():
    torch.manual_seed(0)
    sizes = dict(vocab_size=128, hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"], **sizes)
    model = transformers.Lfm2ForCausalLM(config).eval()
    cache = EvictingCache(model, KeyDiff(), keep=1.0)
    ids = prompt(30)
    model(ids[:, :20], past_key_values=cache)
    hidden = torch.ones(1, 24)
    hidden[0, 5:8] = 0
    with pytest.raises(ValueError, match="attention_mask hides cached tokens"):
        model(ids[:, 20:24], attention_mask=hidden, past_key_values=cache)
    with pytest.raises(ValueError, match=r"a forward was refused in layer 1, .* call reset\(\)"):
        model(ids[:, 20:24], past_key_values=cache)
    cache.reset()
    model(ids[:, :20], past_key_values=cache)
