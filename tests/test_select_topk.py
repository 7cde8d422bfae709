"""Exact top-k: lists made by hand, the kernel against the reference, and the promises as properties."""

import math

import pytest
import torch
from cases import both
from conftest import DEVICE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvevict

INF, NAN = float("inf"), float("nan")


def select(scores, keep, **options):
    scores = torch.tensor(scores, device=DEVICE)[None, None]
    reference, kernel = both(lambda: kvevict.topk_indices(scores, keep, **options))
    assert torch.equal(reference, kernel)
    return kernel[0, 0].tolist()


def test_by_hand():
    assert select([0.1, 0.9, 0.5, 0.7], 2) == [1, 3]
    assert select([1.0, 1.0, 1.0, 1.0], 2) == [0, 1]  # ties to the lower index
    assert select([0.0, -0.0, 0.0, -0.0], 3) == [0, 1, 2]  # zeros tie, whatever their sign
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


@pytest.mark.parametrize("S", [8193, 20000])
@pytest.mark.parametrize("values", ["random", "few", "one"])
def test_rows_split_over_programs(S, values):
    scores = torch.randn(1, 2, S, device=DEVICE)
    scores = {"random": scores, "few": scores.round(), "one": torch.ones_like(scores)}[values]
    scores[0, 0, 5000] = NAN
    for keep, sink, recent in [(1, 0, 0), (0.5, 4, 32), (S, 0, 0), (5000, 4500, 0), (5000, 0, 4500)]:
        a, b = both(lambda k=keep, s=sink, r=recent: kvevict.topk_indices(scores, k, sink=s, recent=r))
        assert torch.equal(a, b)
    lengths = torch.tensor([4097], device=DEVICE)
    a, b = both(lambda: kvevict.topk_indices(scores, 0.5, lengths=lengths, sink=3, recent=3))
    assert torch.equal(a, b) and (a[..., 2049:] == -1).all() and (a[..., 2048] == 4096).all()


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
