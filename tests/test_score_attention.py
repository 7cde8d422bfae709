"""Attention mass and LSE: both backends equal softmax written out in float64, in every option, shape and dtype."""

import pytest
import torch
from cases import both, cache, crossed
from conftest import DEVICE, HAS_GPU

import kvevict
from kvevict.paged import pages
from kvevict.policies import Observed

# (B, H, S, D), query heads per KV head, queries: odd sizes, tiles that are not full, one query, the whole prompt
SHAPES = [((2, 2, 70, 64), 3, 70), ((1, 2, 300, 64), 4, 33), ((1, 1, 1300, 80), 1, 1), ((1, 1, 100, 576), 2, 20),
          ((1, 2, 1, 128), 2, 1), ((1, 1, 130, 256), 5, 7), ((1, 1, 260, 128), 1, 260),
          ((1, 1, 40, 24), 2, 9)]  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def inputs(shape, G, W, dtype=torch.float32, layout="BHSD"):
    B, H, S, D = shape
    keys, _ = cache((B, H, S, D, D), dtype, layout)
    queries, _ = cache((B, H * G, W, D, D), dtype, layout, seed=1)
    return queries, keys


def weights(queries, keys, scale=None, causal=True):
    """softmax(scale · QKᵀ) of one request, [H, G, W, S], in float64."""
    _, HQ, W, D = queries.shape
    H, S = keys.shape[1:3]
    queries = queries[0].to(torch.float32).double().view(H, HQ // H, W, D)
    logits = queries @ keys[0].to(torch.float32).double()[:, None].transpose(-1, -2) * (scale or D**-0.5)
    if causal:
        later = torch.arange(S, device=keys.device) > (S - W + torch.arange(W, device=keys.device))[:, None]
        logits = logits.masked_fill(later, float("-inf"))
    return logits.softmax(-1), logits.logsumexp(-1)


def reduced(w, reduce, normalize, causal=True, min_distance=0):
    H, G, W, S = w.shape
    seen_by = torch.full((S,), W, device=w.device)
    if causal:
        distance = (S - W + torch.arange(W, device=w.device))[:, None] - torch.arange(S, device=w.device)
        counts = distance >= min_distance
        w, seen_by = w * counts, counts.sum(0).clamp(min=1)
    if reduce == "max":
        return w.amax((1, 2))
    total = (w * w if reduce == "square" else w).sum((1, 2))
    if reduce == "mean":
        return total / (seen_by if normalize else W) / G
    return total / seen_by if normalize else total


@pytest.mark.parametrize("case, dtype", crossed(SHAPES, DTYPES))
def test_equals_softmax_written_out(case, dtype):
    shape, G, W = case
    queries, keys = inputs(shape, G, W, dtype)
    relative = 1e-5 if dtype == torch.float32 else 1e-3
    for b in range(shape[0]):
        w, lse = weights(queries[b : b + 1], keys[b : b + 1])
        for got in both(lambda: kvevict.attention_lse(queries, keys)):
            assert got.dtype == torch.float32 and got.shape == queries.shape[:3]
            torch.testing.assert_close(got[b].double(), lse.flatten(0, 1), rtol=relative, atol=1e-5)
        for got in both(lambda: kvevict.attention_mass(queries, keys)):
            assert got.dtype == torch.float32 and got.shape == keys.shape[:3]
            torch.testing.assert_close(got[b].double(), reduced(w, "mean", None), rtol=relative, atol=0)


def test_queries_of_all_requests_under_a_table():
    """As an engine has them, [tokens, query heads, D]; a table says whose they are."""
    queries, keys = inputs((2, 2, 70, 32), 3, 4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:8].view(2, 4).to(DEVICE)
    tokens = torch.full((12, 6, 32), float("nan"), device=DEVICE)
    tokens[order] = queries.transpose(1, 2)
    given = pages(tokens[:, None], order.int())
    lengths = torch.tensor([70, 50], device=DEVICE)
    expected = kvevict.attention_mass(queries, keys, lengths=lengths)
    for got in both(lambda: kvevict.attention_mass(given, keys, lengths=lengths)):
        torch.testing.assert_close(got, expected)
    for count in (1, 3):
        seen, dense = (Observed(keys=keys, queries=x, lengths=lengths) for x in (given, queries))
        last = seen.last_queries(count)
        assert torch.equal(tokens[last.table.long()].transpose(1, 2), dense.last_queries(count))
    with pytest.raises(ValueError, match="queries has shape"):
        kvevict.attention_mass(given, keys[:1], lengths=lengths[:1])
    with pytest.raises(ValueError, match="queries has blocks of 2 tokens: expected 1"):
        kvevict.attention_mass(pages(tokens.view(6, 2, 6, 32), order.int()), keys, lengths=lengths)
    if DEVICE == "cpu":  # a GPU would assert it, and be spoilt
        with pytest.raises(ValueError, match="the table of queries is .* expected queries from 0 to 11"):
            kvevict.attention_mass(pages(tokens[:, None], order.int() + 12), keys, lengths=lengths)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "square"])
def test_options(reduce, causal):
    queries, keys = inputs((1, 2, 150, 64), 2, 40, torch.bfloat16)
    for normalize in (None,) if reduce == "max" else (None, "count"):
        w, lse = weights(queries, keys, 0.3, causal)
        for given in (None, lse.flatten(0, 1)[None].float()):
            options = dict(scale=0.3, causal=causal, reduce=reduce, normalize=normalize, lse=given)
            for got in both(lambda options=options: kvevict.attention_mass(queries, keys, **options)):
                expected = reduced(w, reduce, normalize, causal)
                torch.testing.assert_close(got[0].double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("W", [150, 40, 1])
@pytest.mark.parametrize("min_distance", [1, 32, 33, 500])
def test_far_attention(min_distance, W):
    queries, keys = inputs((1, 2, 150, 64), 3, W, torch.bfloat16)
    w, _ = weights(queries, keys)
    for reduce, normalize in [("mean", "count"), ("mean", None), ("max", None), ("sum", None), ("square", "count")]:
        options = dict(reduce=reduce, normalize=normalize, min_distance=min_distance)
        for got in both(lambda options=options: kvevict.attention_mass(queries, keys, **options)):
            expected = reduced(w, reduce, normalize, True, min_distance)
            torch.testing.assert_close(got[0].double(), expected, rtol=1e-4, atol=0)
            assert (got[0, :, max(150 - min_distance, 0) :] == 0).all() and not got[0, :, :-min_distance].eq(0).any()


def test_by_hand():
    """Two keys, two queries, logits ln 3 and 0: the last query gives 3/4 and 1/4, the first sees only its own key."""
    keys = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]], device=DEVICE)
    queries = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]], device=DEVICE) * torch.log(torch.tensor(3.0))
    for reduce, normalize, expected in [
        ("sum", None, [1.75, 0.25]), ("mean", None, [0.875, 0.125]), ("max", None, [1.0, 0.25]),
        ("square", None, [1.5625, 0.0625]), ("sum", "count", [0.875, 0.25]), ("mean", "count", [0.875, 0.25]),
        ("sum", 1, [0.75, 0.0]), ("mean", 1, [0.75, 0.0]), ("max", 1, [0.75, 0.0]), ("max", 2, [0.0, 0.0]),
    ]:  # fmt: skip
        options = dict(scale=1, reduce=reduce, normalize=normalize)
        if isinstance(normalize, int):  # far attention: one query is one token later than the first key
            far = dict(min_distance=normalize, normalize="count" if reduce == "mean" else None)
            options = dict(scale=1, reduce=reduce) | far
        for got in both(lambda o=options: kvevict.attention_mass(queries, keys, **o)):
            torch.testing.assert_close(got[0, 0], torch.tensor(expected, device=DEVICE))


@pytest.mark.parametrize("W", [1, 20, pytest.param(90, marks=pytest.mark.slow)])
def test_ragged_requests_are_as_if_alone(W):
    """A request's queries are its last W; one shorter than W has its own queries first, and padding behind them."""
    queries, keys = inputs((3, 2, 90, 64), 2, W)
    lengths = torch.tensor([1, 90, 37], dtype=torch.int32, device=DEVICE)
    for b, length in enumerate(lengths.tolist()):
        keys[b, :, length:] = float("nan")
        queries[b, :, length:] = float("nan")
    far = dict(min_distance=5, normalize="count")
    for options in (dict(), dict(normalize="count"), dict(causal=False), dict(reduce="sum"), far):
        alone = [
            kvevict.attention_mass(queries[b : b + 1, :, :length], keys[b : b + 1, :, :length], **options)
            for b, length in enumerate(lengths.tolist())
        ]
        for got in both(lambda o=options: kvevict.attention_mass(queries, keys, lengths=lengths, **o)):
            for b, length in enumerate(lengths.tolist()):
                torch.testing.assert_close(got[b : b + 1, :, :length], alone[b], atol=1e-6, rtol=1e-5)
                assert (got[b, :, length:] == float("-inf")).all()
    for got in both(lambda: kvevict.attention_lse(queries, keys, lengths=lengths)):
        for b, length in enumerate(lengths.tolist()):
            assert (got[b, :, length:] == float("-inf")).all() and got[b, :, : min(length, W)].isfinite().all()


@pytest.mark.parametrize("layout", ["BSHD", "sliced"])
def test_strides_do_not_matter(layout):
    (q, k), (queries, keys) = (inputs((2, 2, 77, 64), 3, 77, torch.bfloat16, which) for which in ("BHSD", layout))
    for a, b in zip(*(both(lambda x=x: kvevict.attention_mass(*x)) for x in ((q, k), (queries, keys))), strict=True):
        assert torch.equal(a, b)


def test_a_window_of_a_longer_lse_is_taken_as_it_is():
    queries, keys = inputs((1, 2, 60, 64), 2, 60)
    lse = kvevict.attention_lse(queries, keys)
    whole = kvevict.attention_mass(queries[:, :, -8:], keys)
    for got in both(lambda: kvevict.attention_mass(queries[:, :, -8:], keys, lse=lse[:, :, -8:])):
        torch.testing.assert_close(got, whole)


def test_large_logits_neither_overflow_nor_vanish():
    queries, keys = inputs((1, 1, 64, 64), 1, 64)
    keys *= 40
    w, _ = weights(queries, keys)
    for got in both(lambda: kvevict.attention_mass(queries, keys)):
        assert got.isfinite().all()
        torch.testing.assert_close(got[0].double(), reduced(w, "mean", None), rtol=1e-3, atol=1e-6)


def test_nan_key_spoils_only_its_head():
    queries, keys = inputs((1, 2, 50, 64), 2, 10)
    keys[0, 0, 7, 3] = float("nan")
    for got in both(lambda: kvevict.attention_mass(queries, keys)):
        assert got[0, 0].isnan().all() and got[0, 1].isfinite().all()


def test_same_input_same_bytes():
    queries, keys = inputs((1, 2, 1100, 64), 2, 16, torch.bfloat16)
    with kvevict.backend("triton"):
        first, again = (kvevict.attention_mass(queries.clone(), keys.clone()) for _ in range(2))
    assert torch.equal(first, again)


def test_no_matrix_of_queries_by_keys_is_allocated(monkeypatch):
    """The largest tensor that the op asks for is its result, B · H · S numbers; W · S would be 64 times that."""
    largest, empty = [0], torch.empty

    def watched(*arguments, **options):
        result = empty(*arguments, **options)
        largest[0] = max(largest[0], result.numel())
        return result

    queries, keys = inputs((1, 1, 2048, 16), 1, 64)
    monkeypatch.setattr(torch, "empty", watched)
    with kvevict.backend("triton"):
        kvevict.attention_mass(queries, keys)
    assert largest[0] == 2048


def test_attention_compact_is_its_stages():
    queries, keys = inputs((2, 2, 130, 64), 2, 24, torch.bfloat16, "BSHD")
    values = keys.clone()
    lengths = torch.tensor([130, 61], device=DEVICE)
    for backend in ("reference", "triton"):
        with kvevict.backend(backend):
            scores = kvevict.attention_mass(queries, keys, reduce="sum", normalize="count", lengths=lengths)
            scores = kvevict.pool_scores(scores, 5)
            indices = kvevict.topk_indices(scores, 0.4, sink=2, recent=24, heads="shared", lengths=lengths)
            got = kvevict.attention_compact(
                queries, keys, values, keep=0.4, reduce="sum", normalize="count", pool=5, sink=2, recent=24,
                heads="shared", lengths=lengths, inplace=False,
            )  # fmt: skip
            assert torch.equal(got.indices, indices) and got.lengths.tolist() == [52, 24]
            expected = kvevict.compact(keys, values, indices, inplace=False)
            assert torch.equal(got.keys, expected.keys) and torch.equal(got.values, expected.values)


X = torch.randn(1, 2, 10, 16)
BAD = {
    "queries heads": dict(queries=torch.randn(1, 3, 4, 16)),
    "queries W": dict(queries=torch.randn(1, 2, 11, 16)),
    "queries head_dim": dict(queries=torch.randn(1, 2, 4, 8)),
    "queries batch": dict(queries=torch.randn(2, 2, 4, 16)),
    "queries dtype": dict(queries=torch.randn(1, 2, 4, 16).half()),
    "queries list": dict(queries=[1.0]),
    "scale nan": dict(scale=float("nan")),
    "scale text": dict(scale="1"),
    "lse shape": dict(lse=torch.randn(1, 2, 5)),
    "lse dtype": dict(lse=torch.randn(1, 2, 4).half()),
    "reduce median": dict(reduce="median"),
    "normalize sum": dict(normalize="sum"),
    "normalize max": dict(normalize="count", reduce="max"),
    "lengths shape": dict(lengths=torch.tensor([5, 5])),
    "min_distance negative": dict(min_distance=-1),
    "min_distance float": dict(min_distance=2.0),
    "min_distance not causal": dict(min_distance=2, causal=False),
}
if not HAS_GPU:
    BAD["lengths 11"] = dict(lengths=torch.tensor([11]))


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    arguments = dict(queries=torch.randn(1, 2, 4, 16), keys=X) | BAD[case]
    arguments = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    for backend in ("reference", "triton"):
        with kvevict.backend(backend), pytest.raises((TypeError, ValueError), match=case.split()[0]):
            kvevict.attention_mass(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("S", [8192, 32768])
def test_whole_prompts_equal_the_reference(S):
    queries, keys = inputs((1, 2, S, 128), 4, S, torch.bfloat16)
    reference, kernel = both(lambda: kvevict.attention_mass(queries, keys))
    torch.testing.assert_close(kernel, reference, rtol=1e-3, atol=0)


@pytest.mark.gpu
def test_cuda_graph():
    queries, keys = inputs((1, 4, 5000, 128), 4, 64, torch.bfloat16)
    expected = kvevict.attention_mass(queries, keys)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = kvevict.attention_mass(queries, keys)
    got.zero_()
    graph.replay()
    assert torch.equal(got, expected)


def test_a_nan_key_is_seen_by_every_reduction():
    keys, queries = torch.randn(1, 2, 40, 16, device=DEVICE), torch.randn(1, 4, 8, 16, device=DEVICE)
    lse = torch.zeros(1, 4, 8, device=DEVICE)
    keys[0, 1, 3, 5] = float("nan")
    for reduce in ("max", "sum", "square"):
        for mass in both(lambda r=reduce: kvevict.attention_mass(queries, keys, lse=lse, reduce=r)):
            assert mass.isnan().nonzero().tolist() == [[0, 1, 3]]
