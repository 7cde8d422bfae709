"""Exact top-k: lists made by hand, the kernel against the reference, and the promises as properties."""

import math

import pytest
import torch
from cases import both
from conftest import DEVICE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvevict
from kvevict.backends import reference
from kvevict.backends import triton as kernels
from kvevict.kernels.launch_config import MAX_SELECT_SPLITS, select_config

INF, NAN = float("inf"), float("nan")


def select(scores, keep, **options):
    scores = torch.tensor(scores, device=DEVICE)[None, None]
    reference, kernel = both(lambda: kvevict.topk_indices(scores, keep, **options))
    assert torch.equal(reference, kernel)
    return kernel[0, 0].tolist()


def best_first(scores):
    """The order of selection, in plain Python: (row, index) pairs of a dict of scores."""
    return sorted(scores, key=lambda at: (math.isnan(scores[at]), 0.0 if math.isnan(scores[at]) else -scores[at], at))


def expect(row, count, sink=0, recent=0):
    """Kept tokens of a row (a list of its tokens' scores), in plain Python."""
    count = min(count, len(row))
    first = min(sink, count)
    last = len(row) - min(recent, count - first)
    protected = [*range(first), *range(last, len(row))]
    best = best_first({i: row[i] for i in range(first, last)})
    return sorted(protected + best[: count - len(protected)])


def expect_adaptive(rows, keep, floor, sink=0, recent=0):
    """Kept tokens of every head; rows: a list of scores a head; keep: how many each may keep."""
    least = [min(max(sink + recent, math.floor(floor * n + 0.5)), n) for n in keep]
    kept = [set(expect(row, count, sink, recent)) for row, count in zip(rows, least, strict=True)]
    left = min(sum(keep), sum(map(len, rows))) - sum(map(len, kept))
    others = {(h, i): row[i] for h, row in enumerate(rows) for i in range(len(row)) if i not in kept[h]}
    for h, i in best_first(others)[:left]:
        kept[h].add(i)
    return [sorted(tokens) for tokens in kept]


def padded(rows, width):
    return [row + [-1] * (width - len(row)) for row in rows]


def spoiled(*shape, seed=0):
    """Random scores, half of the rows full of ties, zeros of both signs, infinities and NaN."""
    scores = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    few = scores[:, ::2].round()
    few[few == 0] *= -1.0
    few[..., ::5], few[..., 3::7], few[..., 4::9] = NAN, INF, -INF
    scores[:, ::2] = few
    return scores.to(DEVICE)


def test_by_hand():
    assert select([0.1, 0.9, 0.5, 0.7], 2) == [1, 3]
    assert select([1.0, 1.0, 1.0, 1.0], 2) == [0, 1]  # ties to the lower index
    assert select([0.0, -0.0, 0.0, -0.0], 3) == [0, 1, 2]  # zeros tie, whatever their sign
    assert select([-0.0, 0.0, -0.0, 0.0], 1) == [0]
    assert select([-1e-45, -0.0, 0.0], 2) == [1, 2]
    assert select([NAN, -INF, NAN, -INF], 3) == [0, 1, 3]  # NaN ranks below -inf
    assert select([-INF, INF, NAN, 3e38], 2) == [1, 3]
    assert select([-1.0, -2.0, -3.0], 1) == [0]
    assert select([1e-45, 0.0, -1e-45], 2) == [0, 1]  # subnormals are told apart
    assert select([5.0], 1) == [0]
    assert select([5.0, 6.0], 1.0) == [0, 1]


def test_protection_is_a_predicate():
    assert select([-INF, 9.0, INF, INF, NAN], 3, sink=1, recent=1) == [0, 2, 4]
    assert select([NAN, INF, INF, INF, NAN], 2, sink=1, recent=1) == [0, 4]
    assert select([3.4e38] * 6, 4, recent=3) == [0, 3, 4, 5]
    assert select([1.0, 2.0, 3.0], 3, sink=2, recent=1) == [0, 1, 2]


@pytest.mark.parametrize(
    "S, keep, n",
    [(1000, 0.9, 900), (10, 0.35, 4), (100, 0.145, 15), (5, 0.1, 1), (3, 0.5, 2), (1, 0.01, 1), (7, 1.0, 7), (9, 9, 9)],
)
def test_keep_rounds_half_up(S, keep, n):
    assert kvevict.topk_indices(torch.randn(1, 1, S, device=DEVICE), keep).shape == (1, 1, n)


def test_a_share_of_a_short_request_is_a_token_at_least():
    scores = torch.arange(40.0, device=DEVICE).expand(3, 1, 40).contiguous()
    lengths = torch.tensor([40, 1, 4], device=DEVICE)  # a tenth: 4, 0.1 and 0.4 of a token
    for indices in both(lambda: kvevict.topk_indices(scores, 0.1, lengths=lengths)):
        assert indices[:, 0].tolist() == [[36, 37, 38, 39], [0, -1, -1, -1], [3, -1, -1, -1]]


@pytest.mark.parametrize("S, values", [(20000, "random"), (8193, "ties")])
def test_rows_split_over_programs(S, values, monkeypatch):
    """Three runs of four tiles, or of two."""
    monkeypatch.setattr("kvevict.kernels.select_topk.multiprocessors", lambda device: 6)
    scores = torch.randn(1, 2, S, device=DEVICE)
    if values == "ties":
        scores[0, 0], scores[0, 1] = scores[0, 0].round(), 1.0
    scores[0, 0, 5000] = NAN
    for keep, sink, recent in [(0.5, 4, 32), (S, 0, 0), (5000, 0, 4500)]:
        a, b = both(lambda k=keep, s=sink, r=recent: kvevict.topk_indices(scores, k, sink=s, recent=r))
        assert torch.equal(a, b)
    lengths = torch.tensor([4097], device=DEVICE)
    a, b = both(lambda: kvevict.topk_indices(scores, 0.5, lengths=lengths, sink=3, recent=3))
    assert torch.equal(a, b) and (a[..., 2049:] == -1).all() and (a[..., 2048] == 4096).all()


@pytest.mark.parametrize("S", [8200, 32769])
def test_one_program_for_a_long_row(S, monkeypatch):
    """Rows for all multiprocessors: up to 32,768 tokens in registers, longer ones with all rounds in one launch."""
    monkeypatch.setattr("kvevict.kernels.select_topk.multiprocessors", lambda device: 1)
    scores = spoiled(1, 2, S)
    for indices in both(lambda: kvevict.topk_indices(scores, 3000, sink=1, recent=40)):
        assert indices[0].tolist() == [expect(scores[0, h].tolist(), 3000, 1, 40) for h in range(2)]


def test_shared_heads_average():
    scores = torch.tensor([[[1.0, 5.0, 0.0, 3.0], [4.0, 0.0, 0.0, 3.0]]], device=DEVICE)
    for indices in both(lambda: kvevict.topk_indices(scores, 2, heads="shared")):
        assert indices.tolist() == [[[0, 3], [0, 3]]]  # means 2.5, 2.5, 0, 3


def test_ragged_rows_take_their_own_share():
    scores = torch.arange(20.0, device=DEVICE).expand(4, 2, 20).contiguous()
    lengths = torch.tensor([20, 10, 3, 1], device=DEVICE)
    for indices in both(lambda: kvevict.topk_indices(scores, 0.5, sink=1, recent=2, lengths=lengths)):
        assert indices.shape == (4, 2, 10)
        assert indices[0, 0].tolist() == [0, *range(11, 20)]
        assert indices[1, 1].tolist() == [0, 6, 7, 8, 9, -1, -1, -1, -1, -1]
        assert indices[2, 0].tolist() == [0, 2] + [-1] * 8  # too short for 1 + 2: the sink, then the most recent
        assert indices[3, 0].tolist() == [0] + [-1] * 9
    for indices in both(lambda: kvevict.topk_indices(scores, 8, lengths=lengths)):
        assert indices[2, 0].tolist() == [0, 1, 2] + [-1] * 5  # shorter than keep: the whole row


LENGTHS = [[17, 0, 5], [1, 24, 16]]  # of heads


@pytest.mark.parametrize("backend", [reference, kernels], ids=["reference", "triton"])
def test_rows_of_their_own_length_and_count(backend):
    scores, S = spoiled(2, 3, 24), 24
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
    counts = torch.tensor([[4, 0, 24], [1, 24, 3]], device=DEVICE)
    for keep, width in ((counts, S), (None, 7), (counts.clamp(max=9).T.contiguous().T, 9)):
        out = torch.empty(2, 3, width, dtype=torch.int64, device=DEVICE)
        flags = torch.full((3000,), 7, dtype=torch.int32, device=DEVICE)
        backend.topk_indices(scores, keep, 1, 2, False, lengths, out, flags)
        assert not flags.any()
        evicted = torch.empty(2, 3, 3, dtype=torch.int64, device=DEVICE)
        backend.evict_slots(scores, 1, 2, lengths, evicted)
        for b in range(2):
            rows = [scores[b, h, : LENGTHS[b][h]].tolist() for h in range(3)]
            n = [width] * 3 if keep is None else keep[b].tolist()
            assert out[b].tolist() == padded([expect(rows[h], n[h], 1, 2) for h in range(3)], width)
            kept = [expect(row, max(len(row) - 3, 3), 1, 2) for row in rows]
            given_up = [sorted({*range(len(row))} - {*k}) for row, k in zip(rows, kept, strict=True)]
            assert evicted[b].tolist() == padded(given_up, 3)


def test_a_count_for_every_head():
    scores = spoiled(2, 3, 24, seed=1)
    counts = torch.tensor([[4, 1, 24], [1, 30, 3]], device=DEVICE)
    for indices in both(lambda: kvevict.topk_indices(scores, counts, sink=1)):
        for b in range(2):
            expected = [expect(scores[b, h].tolist(), int(counts[b, h]), 1) for h in range(3)]
            assert indices[b].tolist() == padded(expected, 24)
    with pytest.raises(ValueError, match="keep has shape"):
        kvevict.topk_indices(scores, counts[:, :2])
    with pytest.raises(ValueError, match="heads='each'"):
        kvevict.topk_indices(scores, counts, heads="shared")
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="keep is"):
            kvevict.topk_indices(scores, counts * 0)
        keys = scores[..., None]
        for options in ({}, dict(inplace=False), dict(preserve_order=False)):
            with pytest.raises(ValueError, match="keep is"):
                kvevict.keydiff_compact(keys.clone(), keys.clone(), keep=counts * 0, **options)


def adaptive(scores, keep, **options):
    scores = torch.tensor(scores, device=DEVICE)
    reference, kernel = both(lambda: kvevict.topk_indices(scores, keep, heads="adaptive", **options))
    assert torch.equal(reference, kernel)
    return kernel.tolist()


def test_adaptive_by_hand():
    high, low = [9.0, 8.0, 7.0, 6.0], [3.0, 2.0, 5.0, 1.0]
    assert adaptive([[high, low]], 2, floor=0.0) == [[[0, 1, 2, 3], [-1] * 4]]  # one head is starved
    assert adaptive([[high, low]], 2, floor=0.5) == [[[0, 1, 2], [2, -1, -1]]]  # but for its floor
    assert adaptive([[high, low]], 2, floor=0.2) == adaptive([[high, low]], 2, floor=0.0)  # 0.4 rounds to 0
    assert adaptive([[high, low]], 2, floor=0.25) == adaptive([[high, low]], 2, floor=0.5)  # half up
    assert adaptive([[high, low]], 2, floor=1.0) == [[[0, 1], [0, 2]]]  # each
    assert adaptive([[high, low]], 2, floor=0.0, sink=1, recent=1) == [[[0, 3], [0, 3]]]
    assert adaptive([[high, low]], 4) == [[[0, 1, 2, 3]] * 2]
    ties = [0.0, -0.0, 0.0]
    assert adaptive([[ties, ties]], 2, floor=0.5) == [[[0, 1, 2], [0, -1, -1]]]  # ties to the lower head, then index
    assert adaptive([[[NAN, -INF], [NAN, NAN]]], 1, floor=0.0) == [[[0, 1], [-1, -1]]]
    # A floor's token comes before a better one that is none's: the best score of all does not cost head 0 its own.
    assert adaptive([[[-5.0, NAN, NAN], [INF, INF, INF]]], 1, floor=1.0) == [[[0], [0]]]
    assert adaptive([[[NAN, NAN], [INF, INF]]], 1, floor=1.0) == [[[0], [0]]]


@pytest.mark.parametrize("n, floor, sink, recent", [(8, 0.2, 0, 0), (11, 0.5, 2, 3), (5, 0.0, 3, 2), (24, 0.3, 0, 1)])
def test_adaptive_equals_plain_python(n, floor, sink, recent):
    scores = spoiled(2, 3, 24, seed=n)
    scores[0, 1] -= 100.0  # a head that would be starved
    lengths = torch.tensor([24, 9], device=DEVICE)
    for ragged in (None, lengths):
        for keep in (n, n / 24):
            options = dict(floor=floor, sink=sink, recent=recent, lengths=ragged)
            results = both(lambda k=keep, o=options: kvevict.topk_indices(scores, k, heads="adaptive", **o))
            for indices in results:
                for b in range(2):
                    length = 24 if ragged is None else int(ragged[b])
                    own = min(n, length) if keep == n else max(math.floor(n * length / 24 + 0.5), 1)
                    rows = scores[b, :, :length].tolist()
                    expected = expect_adaptive(rows, [own] * 3, floor, sink, recent)
                    assert indices[b].tolist() == padded(expected, indices.shape[2])
                    assert sum(map(len, expected)) == 3 * own


@pytest.mark.parametrize("backend", [reference, kernels], ids=["reference", "triton"])
@pytest.mark.parametrize("share", [False, True])
def test_adaptive_rows_of_their_own_length(backend, share):
    scores = spoiled(2, 3, 24, seed=2)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
    keep = (lengths + 1) // 2 if share else None
    out = torch.empty(2, 3, 24, dtype=torch.int64, device=DEVICE)
    backend.topk_adaptive(scores, 12, keep, (1, 5), 1, 1, lengths, out)
    for b in range(2):
        rows = [scores[b, h, : LENGTHS[b][h]].tolist() for h in range(3)]
        expected = expect_adaptive(rows, [12] * 3 if keep is None else keep[b].tolist(), 0.2, 1, 1)
        assert out[b].tolist() == padded(expected, 24)
        assert sum(map(len, expected)) == (min(36, sum(LENGTHS[b])) if keep is None else int(keep[b].sum()))


def test_adaptive_over_many_heads_is_split_over_programs():
    """Layers stacked as more heads: 9 of 1,000 tokens are one row of 9,000."""
    scores = spoiled(1, 9, 1000, seed=3)
    a, b = both(lambda: kvevict.topk_indices(scores, 0.1, heads="adaptive", sink=2, recent=3))
    assert torch.equal(a, b) and int((a >= 0).sum()) == 900
    assert a[0].tolist() == padded(expect_adaptive(scores[0].tolist(), [100] * 9, 0.2, 2, 3), a.shape[2])


floats = st.one_of(
    st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, INF, -INF, NAN])
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_promises(data):
    S = data.draw(st.integers(1, 60))
    row = data.draw(st.lists(floats, min_size=S, max_size=S))
    keep = data.draw(st.integers(1, S))
    sink = data.draw(st.integers(0, keep))
    recent = data.draw(st.integers(0, keep - sink))
    kept = select(row, keep, sink=sink, recent=recent)
    assert len(kept) == keep and kept == sorted(set(kept))
    protected = set(range(sink)) | set(range(S - recent, S))
    assert protected <= set(kept)

    def better(i, j):  # is token i to be kept rather than j?
        a, b = row[i], row[j]
        if math.isnan(a) or math.isnan(b):
            return not math.isnan(a) or (math.isnan(b) and i < j)
        return a > b or (a == b and i < j)

    chosen, evicted = set(kept) - protected, set(range(S)) - set(kept)
    assert all(better(i, j) for i in chosen for j in evicted)


def test_runs_fill_the_device_and_fit_on_it():
    """All programs of a launch that meets must be on the device at once, 128 registers a thread; and half of it has
    work, unless a row has as many runs as it can have."""
    for rows in range(1, 133):
        for tokens in (8193, 16384, 40000, 1 << 20):
            config = select_config(rows, tokens, 132)
            if config.held:
                continue
            programs, most = rows * config.splits, min(-(-tokens // config.block), MAX_SELECT_SPLITS)
            assert programs <= 132 * (65536 // (32 * config.num_warps * 128))
            assert config.splits * config.chunk >= tokens > (config.splits - 1) * config.chunk
            assert programs >= 66 or config.splits == most
            assert config.num_warps == 8 or 2 * rows <= 132  # or a launch of a program each leaves some without
