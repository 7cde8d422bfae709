"""Attention peaks: both backends equal the definition in float64, a row at a time."""

import pytest
import torch
from cases import both, cache, name
from conftest import DEVICE

import kvevict

# (B, H, S, D), query heads per KV head, queries, pool: tiles that are not full, runs of the keys, edges that meet
SHAPES = [((2, 2, 150, 64), 3, 32, 5), ((1, 1, 1300, 80), 1, 8, 7), ((1, 2, 36, 128), 2, 33, 5),
          ((1, 1, 70, 320), 4, 32, 1), ((1, 1, 40, 24), 2, 9, 31)]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


def inputs(shape, G, W, dtype=torch.float32, layout="BHSD"):
    B, H, S, D = shape
    queries = cache((B, H * G, W, D, D), dtype, layout, seed=1)[0]
    return queries, cache((B, H, S, D, D), dtype, layout)[0]


def exact(queries, keys, pool):
    """[H, n] of one request in float64."""
    H, S, (HQ, W, D) = keys.shape[1], keys.shape[2], queries.shape[1:]
    n, half = S - W, pool // 2
    most = torch.zeros(H, n).double()
    for hq in range(HQ):
        h = hq * H // HQ
        key = keys[0, h].float().double().cpu()
        for w in range(W):
            row = (key[: n + w + 1] @ queries[0, hq, w].float().double().cpu() / D**0.5).softmax(0)[:n]
            padded = torch.cat([torch.zeros(half), row, torch.zeros(half)]).double()
            pooled = padded.unfold(0, pool, 1).mean(-1)
            most[h] = torch.maximum(most[h], pooled * row.sum() / pooled.sum())
    return most


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", SHAPES, ids=name)
def test_equals_the_definition(case, dtype):
    shape, G, W, pool = case
    queries, keys = inputs(shape, G, W, dtype, "BSHD")
    n = shape[2] - W
    for b in range(shape[0]):
        expected = exact(queries[b : b + 1], keys[b : b + 1], pool)
        for peaks in both(lambda: kvevict.attention_peaks(queries, keys, pool)):
            assert peaks.dtype == torch.float32 and peaks.shape == shape[:3]
            torch.testing.assert_close(peaks[b, :, :n].double().cpu(), expected, rtol=1e-4, atol=0)
            assert (peaks[b, :, n:] == float("-inf")).all()


def test_by_hand():
    """A query gives three tokens 1/2, 1/4 and 1/8, and itself the rest. Averaged over three, that is 1/4, 7/24 and 1/8,
    2/3 in all, which is scaled to 7/8 again."""
    keys = torch.log(torch.tensor([4.0, 2.0, 1.0, 1.0], device=DEVICE)).view(1, 1, 4, 1)
    queries = torch.ones(1, 1, 1, 1, device=DEVICE)
    expected = torch.tensor([6.0, 7.0, 3.0], device=DEVICE) / 16 * 7 / 8
    for peaks in both(lambda: kvevict.attention_peaks(queries, keys, 3, scale=1.0)):
        torch.testing.assert_close(peaks[0, 0, :3], expected)
        assert peaks[0, 0, 3] == float("-inf")


@pytest.mark.parametrize("per_head", [False, True], ids=["request", "head"])
def test_ragged_rows_do_not_see_what_lies_beyond(per_head):
    queries, keys = inputs((3, 2, 90, 64), 2, 32)
    lengths = torch.tensor([[1, 0], [90, 33], [37, 60]] if per_head else [5, 90, 37], device=DEVICE)
    each = lengths if per_head else lengths[:, None].expand(3, 2)
    for b in range(3):
        for h in range(2):
            keys[b, h, each[b, h] :] = float("nan")
    for peaks in both(lambda: kvevict.attention_peaks(queries, keys, 5, lengths=lengths)):
        for b in range(3):
            for h in range(2):
                n = max(int(each[b, h]) - 32, 0)
                assert (peaks[b, h, n:] == float("-inf")).all()
                if n:
                    row = queries[b : b + 1, 2 * h : 2 * h + 2], keys[b : b + 1, h : h + 1, : n + 32]
                    torch.testing.assert_close(peaks[b, h, :n].double().cpu(), exact(*row, 5)[0], rtol=1e-4, atol=0)


def test_a_nan_key_spoils_only_its_head():
    queries, keys = inputs((1, 2, 80, 64), 2, 32, torch.bfloat16)
    keys[0, 1, 7, 3] = float("nan")
    for peaks in both(lambda: kvevict.attention_peaks(queries, keys, 5)):
        assert peaks[0, 0, :48].isfinite().all() and peaks[0, 1, :48].isnan().all()


def test_wrong_arguments_are_named():
    queries, keys = inputs((1, 2, 40, 16), 2, 8)
    for change, message in [
        (dict(pool=4), "pool is 4: expected an odd number"), (dict(pool=0), "pool is 0"),
        (dict(queries=queries[:, :3]), "queries has 3 heads"), (dict(scale="1"), "scale is '1'"),
        (dict(lse=torch.zeros(1, 4, 7, device=DEVICE)), "lse has shape"),
        (dict(lengths=torch.ones(2, device=DEVICE).int()), "lengths has shape"),
    ]:  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            kvevict.attention_peaks(**(dict(queries=queries, keys=keys, pool=5) | change))
