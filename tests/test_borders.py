"""One token, one query, one split too many or too few: what mutations of the kernels have survived, each with the
smallest case that shows it. On both backends; expected values are worked out by hand."""

import math

import pytest
import torch
from cases import as_bytes, both, name
from conftest import DEVICE

import kvevict
from kvevict.paged import paged_attention_mass, paged_compact, paged_decode_attention, paged_scores

ZEROS = [[[-0.0, 0.0, -0.0, 0.0]]]


def test_minus_zero_is_no_less_than_zero():
    scores = torch.tensor(ZEROS, device=DEVICE)
    for kept in both(lambda: kvevict.topk_indices(scores, 2)):
        assert kept.tolist() == [[[0, 1]]]
    for slots in both(lambda: kvevict.evict_slots(scores, 1)):
        assert slots.tolist() == [[[3]]]
    for slots in both(lambda: kvevict.evict_slots(scores.flip(2), 1)):
        assert slots.tolist() == [[[3]]]


def rising(S, dtype):
    """Queries and keys [1, 1, S, 1] whose logit i is 4 · i for every query, exact in bfloat16: of the keys that a query
    sees, the last one has nearly all the weight, so that one key more or less shows."""
    keys = (torch.arange(S, device=DEVICE) / 4).to(dtype)[None, None, :, None]
    return torch.full_like(keys, 16.0), keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("W, S", [(3, 3), (1, 5), (2, 5), (70, 70), (33, 70), (16, 33), (130, 130)])
def test_a_query_sees_its_own_key_and_none_behind(W, S, dtype):
    queries, keys = rising(S, dtype)
    queries = queries[:, :, :W]
    own = torch.arange(S - W, S, device=DEVICE)  # each query's token
    rest = [math.log(sum(math.exp(-4 * j) for j in range(min(int(i) + 1, 9)))) for i in own]
    expected = 4.0 * own + torch.tensor(rest, device=DEVICE)
    for lse in both(lambda: kvevict.attention_lse(queries, keys, scale=1.0)):
        torch.testing.assert_close(lse[0, 0], expected, rtol=1e-6, atol=1e-5)

    # Key i draws exp(-4 (w - i)) of query w ≥ i, and nothing of those before it.
    column = [sum(math.exp(4 * i - float(expected[w])) for w in range(W) if S - W + w >= i) for i in range(S)]
    for given in (None, lse):
        for mass in both(lambda given=given: kvevict.attention_mass(queries, keys, scale=1.0, lse=given, reduce="sum")):
            torch.testing.assert_close(mass[0, 0], torch.tensor(column, device=DEVICE), rtol=1e-4, atol=1e-6)

    # exp(-4 d) of the query d tokens later is what a key draws most of those: the nearest one that counts, if any is.
    for d in (1, 3, S - 1):
        most = [max((math.exp(4 * i - float(expected[w])) for w in range(W) if S - W + w >= i + d), default=0.0)
                for i in range(S)]  # fmt: skip
        options = dict(scale=1.0, reduce="max", min_distance=d)
        for mass in both(lambda options=options: kvevict.attention_mass(queries, keys, **options)):
            torch.testing.assert_close(mass[0, 0], torch.tensor(most, device=DEVICE), rtol=1e-4, atol=0)


def test_every_split_counts_in_the_anchor():
    splits, run, D = 9, 128, 512  # more splits than a tile of so wide keys holds
    S = splits * run
    keys = torch.zeros(1, 1, S, D, device=DEVICE)
    keys[:, :, :-run, 0], keys[:, :, -run:, 1] = 1.0, 1.0  # the mean key is (8, 1) / 9
    for scores in both(lambda: kvevict.keydiff_scores(keys)):
        expected = torch.where(torch.arange(S, device=DEVICE) < S - run, -8 / math.sqrt(65), -1 / math.sqrt(65))
        torch.testing.assert_close(scores[0, 0], expected, rtol=0, atol=1e-5)


def test_mass_and_last_used_have_strides_of_their_own():
    B, H, S = 2, 3, 5
    queries, keys = torch.zeros(B, H, 1, 8, device=DEVICE), torch.randn(B, H, S, 8, device=DEVICE)

    def decode():
        mass = torch.zeros(B, H, S + 2, device=DEVICE)
        used = torch.full((H, B, S + 7), -1, dtype=torch.int32, device=DEVICE)
        options = dict(mass=mass[..., :S], last_used=used.transpose(0, 1)[..., 3 : 3 + S], step=9)
        kvevict.decode_attention(queries, keys, keys, **options)
        return mass, used

    for mass, used in both(decode):  # a zero query attends to all alike
        torch.testing.assert_close(mass[..., :S], torch.full((B, H, S), 1 / S, device=DEVICE))
        assert (mass[..., S:] == 0).all()
        assert (used[..., 3 : 3 + S] == 9).all() and (used[..., :3] == -1).all() and (used[..., 3 + S :] == -1).all()


def paged(lengths):
    cache = torch.randn(4, 4, 1, 8, device=DEVICE)
    return cache, cache.clone(), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("wrong", [-1, 4], ids=["below", "above"])
def test_a_block_that_holds_one_token_is_checked(wrong):
    keys, values, lengths = paged([5])
    before = keys.clone()
    table = torch.tensor([[2, wrong]], dtype=torch.int32, device=DEVICE)
    query, kept = torch.zeros(1, 1, 1, 8, device=DEVICE), torch.tensor([[[0, 4]]], device=DEVICE)
    for call in (
        lambda: paged_scores(keys, table, lengths),
        lambda: paged_attention_mass(query, keys, table, lengths),
        lambda: paged_decode_attention(query, keys, values, table, lengths),
        lambda: paged_compact(keys, values, table, lengths, kept),
    ):
        with pytest.raises(ValueError, match="block_tables"):
            call()
    assert torch.equal(keys, before)


def test_a_block_that_holds_one_token_of_two_requests_is_refused():
    keys, values, lengths = paged([5, 1])
    table = torch.tensor([[2, 0], [0, 3]], dtype=torch.int32, device=DEVICE)
    kept = torch.tensor([[[0, 4]], [[0, -1]]], device=DEVICE)
    with pytest.raises(ValueError, match="block_tables"):
        paged_compact(keys, values, table, lengths, kept)


@pytest.mark.parametrize("overlap", ["expanded values", "values that are keys", "values one element behind keys"])
def test_values_that_share_memory_are_refused_before_a_write(overlap):
    memory = torch.randn(2, 2, 4, 16, device=DEVICE)
    keys = memory[..., :8]
    values = {
        "expanded values": memory[:, :, :1, 8:].expand(-1, -1, 4, -1),
        "values that are keys": keys,
        "values one element behind keys": memory[..., 7:15],
    }[overlap]
    before, indices = memory.clone(), torch.tensor([1, 3], device=DEVICE).expand(2, 2, 2).contiguous()
    for preserve_order in (True, False):
        with pytest.raises(ValueError, match="values"):
            kvevict.compact(keys, values, indices, preserve_order=preserve_order)
        assert torch.equal(memory, before)


def test_values_right_before_keys_share_nothing():
    memory = torch.randn(1 * 2 * 4 * (8 + 16), device=DEVICE)
    values, keys = memory[:64].view(1, 2, 4, 8), memory[64:].view(1, 2, 4, 16)
    expected = keys[:, :, [1, 3]].clone(), values[:, :, [1, 3]].clone()
    result = kvevict.compact(keys, values, torch.tensor([[[1, 3]] * 2], device=DEVICE))
    assert torch.equal(result.keys, expected[0]) and torch.equal(result.values, expected[1])


def test_a_share_is_exact_to_twelve_digits():
    scores = torch.randn(1, 1, 3, device=DEVICE)
    assert kvevict.topk_indices(scores, 0.499999999999).shape[2] == 1
    assert kvevict.topk_indices(scores, 0.5).shape[2] == 2


def test_one_row_of_indices_may_have_any_stride():
    keys = torch.randn(1, 1, 6, 8, device=DEVICE)
    indices = torch.tensor([[[1, 5, 3, 0]]], device=DEVICE)[..., ::2]  # 1 and 3
    for result in both(lambda: kvevict.compact(keys, keys.clone(), indices, inplace=False)):
        assert torch.equal(result.keys, keys[:, :, [1, 3]])


def test_a_share_of_a_short_request_keeps_a_token():
    scores = torch.tensor([[[3.0, 1, 2, 0, 5, 4, 7, 6, 9, 8]]] * 4, device=DEVICE)
    lengths = torch.tensor([1, 2, 4, 10], device=DEVICE)  # a tenth: 0.1, 0.2, 0.4, 1 tokens
    for kept in both(lambda: kvevict.topk_indices(scores, 0.1, lengths=lengths)):
        assert kept.tolist() == [[[0]], [[0]], [[0]], [[8]]]
    keys = torch.arange(40.0, device=DEVICE).view(4, 1, 10, 1)
    for result in both(lambda: kvevict.keydiff_compact(keys, keys, keep=0.1, lengths=lengths, inplace=False)):
        assert result.lengths.tolist() == [1, 1, 1, 1]


def test_float8_rows_move_as_they_are():
    keys = torch.randn(1, 1, 4, 8, device=DEVICE).to(torch.float8_e4m3fn)
    indices = torch.tensor([[[1, 3]]], device=DEVICE)
    for result in both(lambda: kvevict.compact(keys, keys.clone(), indices, inplace=False)):
        assert torch.equal(as_bytes(result.keys), as_bytes(keys)[:, :, [1, 3]])


def test_the_least_budget_is_what_is_protected():
    from kvevict.vllm.settings import Settings

    assert Settings("keydiff", 36).build().protected == (4, 32)
    assert Settings("keydiff", 1, interval=0, sink=0, recent=0).budget == 1
    for budget, sink, recent in ((35, None, None), (3, 2, 2), (3, 4, 0), (0, 0, 0)):
        with pytest.raises(ValueError, match=f"budget is {budget}"):
            Settings("keydiff", budget, sink=sink, recent=recent)


def test_slots_are_given_up_when_budget_and_interval_are_passed():
    from kvevict.paged.tail import skip

    assert skip(64 + 32, budget=64, interval=32, block_size=16) == 0
    assert skip(64 + 33, budget=64, interval=32, block_size=16) == 32
