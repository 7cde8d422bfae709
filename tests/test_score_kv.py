"""Scores from keys before RoPE: kernel and reference equal the formulas in float64."""

import math

import pytest
import torch
from cases import both, cache, name
from conftest import DEVICE

import kvevict
from kvevict import ops
from kvevict.kernels import score_kv

SHAPES = [(2, 3, 517, 64, 64), (1, 2, 100, 80, 80), (1, 1, 1, 128, 128), (1, 2, 40, 96, 64), (1, 1, 33, 72, 128)]


def turns(D, base=10_000.0, pairs=None):
    pairs = D // 2 if pairs is None else pairs
    return base ** -(torch.arange(pairs, device=DEVICE, dtype=torch.float32) / pairs)


def linear(H, width, seed=3):
    return torch.randn(H, width, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def exact(keys, values, weights, inv_freq, positions):
    """(fitted, keydiff) in float64, token by token, by complex numbers."""
    keys, values, weights = keys.double(), values.double(), weights.double()
    B, H, S, D = keys.shape
    pairs = len(inv_freq)
    angle = -positions.expand(B, H, S).double()[..., None] * inv_freq.double()
    z = torch.complex(keys[..., :pairs], keys[..., pairs : 2 * pairs]) * torch.polar(torch.ones_like(angle), angle)
    before = torch.cat([z.real, z.imag, keys[..., 2 * pairs :]], -1)
    norm, value_norm = (x.norm(dim=-1, keepdim=True) for x in (before, values))
    mean = (before / norm).mean(2, keepdim=True)
    cosine = (before * mean).sum(-1, keepdim=True) / norm / mean.norm(dim=-1, keepdim=True)
    features = torch.cat([before, values, norm.log(), value_norm.log(), cosine, torch.ones_like(cosine)], -1)
    return (features * weights[None, :, None]).sum(-1), -cosine[..., 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_equals_the_formula(shape, dtype):
    keys, values = cache(shape, dtype)
    B, H, S, D, DV = shape
    weights, inv_freq = linear(H, D + DV + 4), turns(D)
    truth = exact(keys.float(), values.float(), weights, inv_freq, torch.arange(S, device=DEVICE))
    found = both(lambda: ops.kv_scores(keys, values, weights, inv_freq=inv_freq, return_keydiff=True))
    for of_backend in found:
        for scores, expected in zip(of_backend, truth, strict=True):
            assert scores.dtype == torch.float32 and scores.shape == (B, H, S)
            size = max(expected.abs().max().item(), 1.0)
            assert (scores - expected).abs().max().item() < 2e-6 * size * math.sqrt(D)


@pytest.mark.parametrize("per_head", [False, True], ids=["request", "head"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=name)
def test_positions_of_what_was_kept(per_head, dtype):
    """Tokens that an eviction left, of which each has its position; a million and more of them."""
    keys, values = cache((2, 3, 70, 64, 64))
    shape = (2, 3, 70) if per_head else (2, 70)
    positions = torch.randint(0, 2**20, shape, generator=torch.Generator().manual_seed(5)).to(DEVICE, dtype)
    places = positions if per_head else positions[:, None]
    strided = torch.stack([positions, positions - 7], -1)[..., 0]
    weights = linear(3, 132)
    truth = exact(keys, values, weights, turns(64), places)
    for given in (positions, strided):
        found = both(
            lambda given=given: ops.kv_scores(
                keys, values, weights, inv_freq=turns(64), positions=given, return_keydiff=True
            )
        )
        for scores, expected in zip(found[0], truth, strict=True):
            torch.testing.assert_close(scores.double(), expected, atol=1e-4, rtol=1e-5)
        for scores, expected in zip(found[1], truth, strict=True):  # 0.0015 rad a pair at a million
            torch.testing.assert_close(scores.double(), expected, atol=2e-2, rtol=1e-3)


def test_what_lies_beyond_the_rotary_part_is_not_turned():
    keys, values = cache((1, 2, 50, 80, 64))
    weights = linear(2, 148)
    truth = exact(keys, values, weights, turns(80, pairs=16), torch.arange(50, device=DEVICE))
    for found in both(lambda: ops.kv_scores(keys, values, weights, inv_freq=turns(80, pairs=16), return_keydiff=True)):
        for scores, expected in zip(found, truth, strict=True):
            torch.testing.assert_close(scores.double(), expected, atol=1e-4, rtol=1e-5)


def test_turns_back_what_transformers_turns():
    rope = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = pytest.importorskip("transformers").LlamaConfig(hidden_size=128, num_attention_heads=2, head_dim=64)
    rotary = rope.LlamaRotaryEmbedding(config)
    before, _ = cache((1, 2, 300, 64, 64))
    cosine, sine = rotary(before, torch.arange(300)[None])
    keys = rope.apply_rotary_pos_emb(before, before, cosine.to(DEVICE), sine.to(DEVICE))[1]
    expected = kvevict.keydiff_scores(before)
    for scores in both(lambda: ops.keydiff_scores(keys, inv_freq=rotary.inv_freq.to(DEVICE))):
        torch.testing.assert_close(scores, expected, atol=2e-5, rtol=0)


def test_no_turn_is_keydiff():
    keys, _ = cache((2, 2, 600, 64, 64), torch.bfloat16)
    plain = kvevict.keydiff_scores(keys)
    for scores in both(lambda: ops.keydiff_scores(keys, inv_freq=torch.zeros(32, device=DEVICE))):
        torch.testing.assert_close(scores, plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize("per_head", [False, True], ids=["request", "head"])
def test_ragged_rows_do_not_see_what_lies_beyond(per_head):
    keys, values = cache((3, 2, 90, 64, 64))
    lengths = torch.tensor([[1, 5], [90, 0], [37, 80]] if per_head else [1, 90, 37], device=DEVICE)
    weights = linear(2, 132)
    each = lengths if per_head else lengths[:, None].expand(3, 2)
    for b in range(3):
        for h in range(2):
            keys[b, h, each[b, h] :] = values[b, h, each[b, h] :] = float("nan")
    options = dict(inv_freq=turns(64), return_keydiff=True)
    for found in both(lambda: ops.kv_scores(keys, values, weights, lengths=lengths, **options)):
        for which, scores in enumerate(found):
            for b in range(3):
                for h in range(2):
                    n = int(each[b, h])
                    assert (scores[b, h, n:] == float("-inf")).all()
                    if n:
                        row = (slice(b, b + 1), slice(h, h + 1), slice(n))
                        alone = ops.kv_scores(keys[row], values[row], weights[h : h + 1], **options)[which]
                        torch.testing.assert_close(scores[b, h, :n], alone[0, 0], atol=1e-4, rtol=1e-5)


def test_what_is_not_finite_ranks_last_and_is_in_no_mean():
    keys, values = cache((1, 2, 60, 64, 64), torch.bfloat16)
    weights, inv_freq = linear(2, 132), turns(64)
    keys[0, 0, 7, 3], keys[0, 0, 8, 60], values[0, 1, 9, 0] = float("nan"), float("inf"), float("-inf")
    keys[0, 1, 20] = 1e19
    good = torch.ones(2, 60, dtype=torch.bool, device=DEVICE)
    good[0, [7, 8]] = good[1, 20] = False
    both_good = good.clone()
    both_good[1, 9] = False
    for fitted, keydiff in both(lambda: ops.kv_scores(keys, values, weights, inv_freq=inv_freq, return_keydiff=True)):
        assert torch.equal(keydiff[0].isnan(), ~good)
        assert torch.equal(fitted[0].isnan(), ~both_good)
        for h in range(2):
            at = good[h].nonzero()[:, 0]
            options = dict(inv_freq=inv_freq, positions=at[None])
            alone = ops.keydiff_scores(keys[:, h : h + 1, at], **options)
            torch.testing.assert_close(keydiff[0, h, at], alone[0, 0], atol=1e-5, rtol=0)


def test_zero_keys_and_values():
    keys, values = torch.zeros(1, 1, 20, 64, device=DEVICE), torch.zeros(1, 1, 20, 64, device=DEVICE)
    weights = torch.zeros(1, 132, device=DEVICE)
    weights[0, -4:] = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    for fitted, keydiff in both(lambda: ops.kv_scores(keys, values, weights, inv_freq=turns(64), return_keydiff=True)):
        torch.testing.assert_close(fitted, torch.full((1, 1, 20), 1000 + 11 * math.log(1e-12), device=DEVICE))
        assert (keydiff == 0).all()


@pytest.mark.parametrize("layout", ["BSHD", "sliced"])
def test_strides_do_not_matter(layout):
    weights = linear(2, 132)
    results = []
    for which in ("BHSD", layout):
        keys, values = cache((2, 2, 77, 64, 64), torch.bfloat16, layout=which)
        given = weights if which == "BHSD" else weights.T.contiguous().T
        results.append(both(lambda k=keys, v=values, w=given: ops.kv_scores(k, v, w, inv_freq=turns(64))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-6)


def test_wrong_arguments_are_named():
    keys, values = cache((2, 3, 30, 64, 48))
    weights, inv_freq = linear(3, 116), turns(64)
    wrong = [
        (dict(weights=weights[:2]), r"weights has shape \(2, 116\): expected \(3, 116\)"),
        (dict(weights=weights.double()), "weights has dtype torch.float64"),
        (dict(inv_freq=turns(128)), "inv_freq has 64 elements: expected at most half the head_dim, 64"),
        (dict(inv_freq=None), "inv_freq is NoneType"),
        (dict(positions=torch.arange(30, device=DEVICE)), r"positions has shape \(30,\): expected 2 dimensions"),
        (dict(positions=torch.zeros(2, 29, dtype=torch.long, device=DEVICE)), r"expected \(2, 30\) or \(2, 3, 30\)"),
        (dict(return_keydiff=1), "return_keydiff is 1: expected a bool"),
    ]
    for change, message in wrong:
        options = dict(weights=weights, inv_freq=inv_freq) | change
        with pytest.raises((TypeError, ValueError), match=message):
            ops.kv_scores(keys, values, options.pop("weights"), **options)
    with pytest.raises(ValueError, match="anchor is 'raw': expected 'unit' with inv_freq"):
        ops.keydiff_scores(keys, anchor="raw", inv_freq=inv_freq)
    with pytest.raises(ValueError, match="inv_freq is None"):
        ops.keydiff_scores(keys, positions=torch.zeros(2, 30, dtype=torch.long, device=DEVICE))


def test_the_same_bits_on_every_number_of_multiprocessors(monkeypatch):
    keys, values = cache((1, 3, 700, 64, 64), torch.bfloat16)
    found = []
    for count in (1, 7, 132):
        monkeypatch.setattr(score_kv, "multiprocessors", lambda device, count=count: count)
        with kvevict.backend("triton"):
            found.append(ops.kv_scores(keys, values, linear(3, 132), inv_freq=turns(64), return_keydiff=True))
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))
