"""The bytes that the ops ask for, counted exactly in Triton's interpreter, against the floor."""

import pytest
import torch
from conftest import HAS_GPU

import kvevict
from bench.traffic import counted
from kvevict.kernels.launch_config import score_config
from kvevict.paged import paged_decode_attention
from kvevict.traffic import DecodeAttention, KeydiffCompact, KvScores, WindowMass

pytestmark = pytest.mark.skipif(HAS_GPU, reason="counts in Triton's interpreter")


@pytest.mark.parametrize("preserve_order", [True, False], ids=["ordered", "fewest-moves"])
@pytest.mark.parametrize("keep", [0.5, 0.1])
def test_keydiff_compact_moves_what_it_must(keep, preserve_order):
    S, D, H, e = 8192, 128, 2, 2
    keys, values = (torch.randn(1, H, S, D, dtype=torch.bfloat16) for _ in range(2))
    before = keys.clone()
    with kvevict.backend("triton"), counted() as traffic:
        result = kvevict.keydiff_compact(keys, values, keep=keep, preserve_order=preserve_order)
    n = result.keys.shape[2]
    if preserve_order:
        moved = n
    else:
        moved = int((result.indices[0] != torch.arange(n)).sum()) / H
    floor = KeydiffCompact(H, S, D, e, moved)
    anchors = (
        H * score_config(H, S, D, e, 132, two_passes=True).splits * 3 * 8 * (D + 1)
    )  # added to (twice), read: in L2
    assert anchors <= H * S * D * e / 10
    assert traffic.bytes <= 1.05 * floor.bytes + 24 * S * H + anchors
    assert traffic.bytes >= floor.bytes  # the counter counts: two passes over K cannot do with less
    assert not torch.equal(before[:, :, :n], result.keys)


@pytest.mark.parametrize("W", [1, 32])
def test_window_mass_reads_keys_twice(W):
    S, D, H, G, e = 8192, 128, 2, 4, 2
    keys, queries = torch.randn(1, H, S, D).bfloat16(), torch.randn(1, H * G, W, D).bfloat16()
    with kvevict.backend("triton"), counted() as traffic:
        kvevict.attention_mass(queries, keys)
    floor = WindowMass(H, G, W, S, D, e)
    blocks = S // 128 * 2  # each block of keys, and each run of them, reads the group's queries: from L2
    assert floor.bytes <= traffic.bytes <= 1.05 * floor.bytes + blocks * H * G * W * (D * e + 4)


@pytest.mark.parametrize("tracked", [False, True])
def test_decode_attention_reads_the_cache_once(tracked):
    S, D, H, G, e = 8192, 128, 2, 4, 2
    keys, values = (torch.randn(1, H, S, D).bfloat16() for _ in range(2))
    query, mass = torch.randn(1, H * G, 1, D).bfloat16(), torch.zeros(1, H, S)
    with kvevict.backend("triton"), counted() as traffic:
        kvevict.decode_attention(query, keys, values, mass=mass if tracked else None)
    floor = DecodeAttention(H, G, S, D, D, e, tracked)
    assert floor.bytes <= traffic.bytes <= 1.05 * floor.bytes


@pytest.mark.parametrize("lengths", [[1024] * 4, [3072, 512, 512, 0]], ids=["equal", "unequal"])
def test_decode_attention_reads_each_kept_row_of_a_page_once(lengths):
    """Heads of unequal length, one with nothing, cost what equal ones of the same total do."""
    D, H, G, e, size = 128, 4, 4, 2, 16
    columns = max(lengths) // size
    keys, values = (torch.randn(sum(lengths) // size, size, 1, D).bfloat16() for _ in range(2))
    used = torch.arange(columns) * size < torch.tensor(lengths)[:, None]
    table = torch.full((1, H, columns), -1, dtype=torch.int32)
    table[0, used] = torch.randperm(len(keys)).int()
    query, held = torch.randn(1, H * G, 1, D).bfloat16(), torch.tensor([lengths], dtype=torch.int32)
    with kvevict.backend("triton"), counted() as traffic:
        paged_decode_attention(query, keys, values, table, held)
    floor = sum(DecodeAttention(1, G, length, D, D, e, tracked=False).bytes for length in lengths)
    places = 2 * 4 * sum(lengths)  # a block's number for each token's key and value, from L1
    assert floor + places <= traffic.bytes - traffic.by_kernel["check_rows_kernel"] <= 1.05 * floor + places


def test_key_norms_read_keys_once():
    keys = torch.randn(1, 2, 4096, 64).bfloat16()
    with kvevict.backend("triton"), counted() as traffic:
        kvevict.key_norm_scores(keys)
    assert traffic.bytes == keys.nbytes + 4 * keys[..., 0].numel()


def test_the_learned_scorer_asks_for_at_most_a_fitted_share_more_than_keydiff():
    """K twice and V once, where KeyDiff reads K twice. KeyDiff before RoPE costs what KeyDiff does, and beside the
    fitted score what is written of it."""
    S, D, H, e = 8192, 64, 1, 2
    keys, values = (torch.randn(1, H, S, D).bfloat16() for _ in range(2))
    weights, inv_freq = torch.randn(H, 2 * D + 4), torch.rand(D // 2)
    asked = {}
    for name, call in [
        ("keydiff", lambda: kvevict.keydiff_scores(keys)),
        ("before RoPE", lambda: kvevict.keydiff_scores(keys, inv_freq=inv_freq)),
        ("fitted", lambda: kvevict.kv_scores(keys, values, weights, inv_freq=inv_freq)),
        ("both", lambda: kvevict.kv_scores(keys, values, weights, inv_freq=inv_freq, return_keydiff=True)),
    ]:
        with kvevict.backend("triton"), counted() as traffic:
            call()
        asked[name] = traffic.bytes
    assert asked["fitted"] <= 1.6 * asked["keydiff"]
    assert asked["before RoPE"] <= 1.02 * asked["keydiff"]
    assert asked["both"] - asked["fitted"] == 4 * H * S
    floor = KvScores(H, S, D, e, D)
    assert floor.bytes <= asked["fitted"] <= 1.25 * floor.bytes


def test_far_attention_reads_no_more_than_attention():
    keys, queries = torch.randn(1, 1, 1024, 64).bfloat16(), torch.randn(1, 2, 300, 64).bfloat16()
    asked = []
    for min_distance in (0, 1, 200):
        with kvevict.backend("triton"), counted() as traffic:
            kvevict.attention_mass(queries, keys, min_distance=min_distance)
        asked.append(traffic.bytes)
    assert asked[0] >= asked[1] > asked[2]  # queries that count for no key of a block are not read for it
