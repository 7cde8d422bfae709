"""Paged ops give what the dense ops give on the same tokens, wherever the blocks lie; and the pool loses nothing."""

import pytest
import torch
import torch.nn.functional as F
from cases import as_bytes, both, name
from conftest import DEVICE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvevict
from kvevict.paged import (
    PagedPool,
    PoolExhausted,
    paged_attention_mass,
    paged_compact,
    paged_decode_attention,
    paged_keydiff_compact,
    paged_kv_scores,
    paged_scores,
)
from kvevict.policies import NAMED, KeyDiff, SnapKV

H, D = 2, 16
LENGTHS = [70, 33, 1, 96]
LAYOUTS = ("NHD", "HND", "flash")
BLOCKS = (1, 16, 256)
# Every block size and every layout once in `make test`; the other pairs in `make test-all`.
PAGES = [
    pytest.param(size, layout, marks=() if BLOCKS.index(size) == LAYOUTS.index(layout) else pytest.mark.slow)
    for size in BLOCKS
    for layout in LAYOUTS
]


class Paged:
    """Random requests in a paged cache of some layout, and the same tokens dense."""

    def __init__(self, block_size, layout="NHD", dtype=torch.float32, lengths=LENGTHS, seed=0):
        generator = torch.Generator().manual_seed(seed)
        columns = -(-max(lengths) // block_size) + 1
        blocks = len(lengths) * columns + 5
        order = torch.randperm(blocks, generator=generator)[: len(lengths) * columns]
        self.table = order.view(len(lengths), columns).int().to(DEVICE)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        self.block_size, self.S = block_size, columns * block_size
        for b, length in enumerate(lengths):  # what lies beyond a request is not to be read
            self.table[b, -(-length // block_size) :] = -(10**6)
        shape = dict(NHD=(2, blocks, block_size, H, D), HND=(2, blocks, H, block_size, D),
                     flash=(blocks, 2, block_size, H, D))[layout]  # fmt: skip
        memory = torch.randn(shape, generator=generator).to(dtype).to(DEVICE)
        self.memory = memory
        if layout == "HND":
            memory = memory.transpose(2, 3)
        self.keys, self.values = memory.unbind(1 if layout == "flash" else 0)

    def dense(self, cache, b):
        """[1, H, length, D] of request b."""
        slots = torch.arange(int(self.lengths[b]), device=DEVICE)
        rows = as_bytes(cache)[self.table[b, slots // self.block_size].long(), slots % self.block_size]
        return rows.transpose(0, 1)[None].view(cache.dtype)

    def requests(self):
        return [(b, self.dense(self.keys, b), self.dense(self.values, b)) for b in range(len(self.lengths))]


@pytest.mark.parametrize("block_size, layout", PAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=name)
def test_scores_are_the_dense_ones(block_size, layout, dtype):
    paged = Paged(block_size, layout, dtype)
    for anchor in ("unit", "raw"):
        for scores in both(lambda anchor=anchor: paged_scores(paged.keys, paged.table, paged.lengths, anchor=anchor)):
            assert scores.shape == (4, H, paged.S)
            for b, keys, _ in paged.requests():
                expected = kvevict.keydiff_scores(keys, anchor=anchor)[0]
                length = keys.shape[2]
                torch.testing.assert_close(scores[b, :, :length], expected, rtol=1e-5, atol=1e-5)
                assert (scores[b, :, length:] == float("-inf")).all()


@pytest.mark.parametrize("min_distance", [0, 3])
@pytest.mark.parametrize("block_size, layout", PAGES)
def test_attention_is_the_dense_one(block_size, layout, min_distance):
    paged = Paged(block_size, layout)
    queries = torch.randn(4, 2 * H, 8, D, device=DEVICE)
    options = dict(reduce="sum", min_distance=min_distance)
    masses = both(lambda: paged_attention_mass(queries, paged.keys, paged.table, paged.lengths, **options))
    outputs = both(
        lambda: paged_decode_attention(queries[:, :, :1], paged.keys, paged.values, paged.table, paged.lengths)
    )
    for mass, output in zip(masses, outputs, strict=True):
        for b, keys, values in paged.requests():
            W = min(8, keys.shape[2])
            expected = kvevict.attention_mass(queries[b : b + 1, :, :W].contiguous(), keys, **options)[0]
            torch.testing.assert_close(mass[b, :, : keys.shape[2]], expected, rtol=1e-5, atol=1e-6)
            truth = F.scaled_dot_product_attention(queries[b : b + 1, :, :1], keys, values, enable_gqa=True)
            torch.testing.assert_close(output[b : b + 1], truth, rtol=1e-5, atol=1e-5)


def fitted(seed=3):
    generator = torch.Generator().manual_seed(seed)
    inv_freq = 100.0 ** -torch.linspace(0, 1, D // 2)
    return torch.randn(H, 2 * D + 4, generator=generator).to(DEVICE), inv_freq.to(DEVICE)


@pytest.mark.parametrize("where", ["slots", "requests", "heads"])
@pytest.mark.parametrize("block_size, layout", PAGES)
def test_fitted_scores_are_the_dense_ones(block_size, layout, where):
    """Positions: of slots that were never evicted, of each request's slots, of each head's."""
    paged, (weights, inv_freq) = Paged(block_size, layout), fitted()
    shape = (4, paged.S) if where == "requests" else (4, H, paged.S)
    places = torch.randint(0, 4000, shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    given = None if where == "slots" else places
    options = dict(inv_freq=inv_freq, positions=given)
    cache = (paged.keys, paged.values, paged.table, paged.lengths)
    alone = both(lambda: paged_scores(paged.keys, paged.table, paged.lengths, **options))
    found = both(lambda: paged_kv_scores(*cache, weights, **options, return_keydiff=True))
    for (scores, keydiff), keydiff_alone in zip(found, alone, strict=True):
        assert scores.shape == (4, H, paged.S) and torch.equal(keydiff, keydiff_alone)
        for b, keys, values in paged.requests():
            n = keys.shape[2]
            own = dict(inv_freq=inv_freq, positions=None if given is None else places[b : b + 1, ..., :n])
            expected = kvevict.ops.kv_scores(keys, values, weights, **own, return_keydiff=True)
            for got, wanted in zip((scores, keydiff), expected, strict=True):
                torch.testing.assert_close(got[b, :, :n], wanted[0], rtol=1e-5, atol=5e-5)
                assert (got[b, :, n:] == float("-inf")).all()


@pytest.mark.parametrize("as_requests", [False, True], ids=["tables of heads", "heads as requests"])
def test_fitted_scores_of_heads_of_unequal_length(as_requests):
    generator, lengths = torch.Generator().manual_seed(2), torch.tensor([[20, 0], [5, 31]])
    weights, inv_freq = fitted()
    keys, values = (torch.randn(12, 8, 1, D, generator=generator).to(DEVICE) for _ in range(2))
    table = torch.full((2, H, 4), -1, dtype=torch.int32)
    used = torch.arange(4) * 8 < lengths[..., None]
    table[used] = torch.randperm(12, generator=generator)[: int(used.sum())].int()
    places = torch.randint(0, 999, (2, H, 32), generator=generator).to(DEVICE)
    table, lengths = table.to(DEVICE), lengths.to(DEVICE)
    arguments = (table, lengths, weights)
    positions = places
    if as_requests:  # a request has a token: the head without any is left out
        there = lengths.flatten() > 0
        of_rows = weights.expand(2, H, -1).flatten(0, 1)[there, None]
        arguments = (table.flatten(0, 1)[there], lengths.flatten()[there], of_rows)
        positions = places.flatten(0, 1)[there]
    options = dict(inv_freq=inv_freq, positions=positions)
    for scores in both(lambda: paged_kv_scores(keys, values, *arguments, **options)):
        if as_requests:
            whole = torch.full((2 * H, 1, 32), float("-inf"), device=DEVICE)
            whole[there] = scores
            scores = whole.view(2, H, 32)
        assert (scores[0, 1] == float("-inf")).all()
        for b, h in ((0, 0), (1, 0), (1, 1)):
            n = int(lengths[b, h])
            rows = [x[table[b, h].long().clamp(min=0)].flatten(0, 1)[:n, 0][None, None] for x in (keys, values)]
            own = dict(inv_freq=inv_freq, positions=places[b : b + 1, h, :n])
            expected = kvevict.ops.kv_scores(*rows, weights[h : h + 1], **own)[0, 0]
            torch.testing.assert_close(scores[b, h, :n], expected, rtol=1e-5, atol=5e-5)


KEEPS = [0.5, 20, torch.tensor([35, 10, 1, 7])]


@pytest.mark.parametrize("preserve_order", [True, False], ids=["ordered", "fewest-moves"])
@pytest.mark.parametrize("to", ["front", "tail"])
@pytest.mark.parametrize("block_size, layout", PAGES)
@pytest.mark.parametrize("keep", KEEPS, ids=["share", "count", "each"])
def test_keydiff_keeps_what_the_dense_op_keeps(keep, block_size, layout, to, preserve_order):
    results = []
    for backend in ("reference", "triton"):
        paged = Paged(block_size, layout)
        before, memory = paged.requests(), paged.memory.clone()
        options = dict(sink=2, recent=3, to=to, preserve_order=preserve_order)
        keep_here = keep.to(DEVICE) if isinstance(keep, torch.Tensor) else keep
        with kvevict.backend(backend):
            result = paged_keydiff_compact(
                paged.keys, paged.values, paged.table, paged.lengths, keep=keep_here, **options
            )
        written = torch.zeros(paged.keys.shape[:2], dtype=torch.bool, device=DEVICE)
        for b, keys, values in before:
            length = keys.shape[2]
            own = int(keep[b]) if isinstance(keep, torch.Tensor) else keep
            own = min(own, length) if isinstance(own, int) else max(int(own * length + 0.5), 1)
            sink, recent = min(2, own), min(3, max(own - 2, 0))
            expected = kvevict.keydiff_compact(keys, values, keep=own, sink=sink, recent=recent, inplace=False)
            assert int(result.lengths[b]) == own
            slots = torch.arange(own, device=DEVICE) + (length - own if to == "tail" else 0)
            blocks = paged.table[b, slots // block_size].long()
            written[blocks, slots % block_size] = True
            for cache, rows in ((paged.keys, expected.keys), (paged.values, expected.values)):
                found = cache[blocks, slots % block_size].transpose(0, 1)
                if preserve_order:
                    assert torch.equal(found, rows[0])
                else:  # the same rows, in another order
                    assert torch.equal(found.sort(1).values, rows[0].sort(1).values)
            used = -(-length // block_size)
            if to == "front":
                free = paged.table[b, -(-own // block_size) : used].tolist()
            else:
                free = paged.table[b, : (length - own) // block_size].tolist()
            assert [x for x in result.freed_blocks[b].tolist() if x >= 0] == free
        assert result.lengths.dtype == torch.int32 and result.freed_blocks.dtype == torch.int32
        # Nothing else was written, in any block.
        keys = paged.memory.clone()
        paged.memory.copy_(memory)
        untouched = [(keys_, cache) for keys_, cache in ((paged.keys, 0), (paged.values, 1))]
        after = Paged(block_size, layout)
        after.memory.copy_(keys)
        for cache, index in untouched:
            now = (after.keys, after.values)[index]
            assert torch.equal(now[~written], cache[~written])
        results.append((result, keys))
    assert torch.equal(results[0][1], results[1][1])
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))


def test_by_hand():
    """Two blocks of 4, tokens 0 to 6 in blocks 2 and 0; 1, 3 and 6 stay."""
    for to, rows, freed in (("front", [1, 3, 6, 3, 4, 5, 6], [[-1, 0]]), ("tail", [0, 1, 2, 3, 1, 3, 6], [[2, -1]])):
        for backend in ("reference", "triton"):
            cache = torch.full((3, 4, 1, 1), -9.0, device=DEVICE)
            cache[2, :, 0, 0] = torch.arange(0.0, 4)
            cache[0, :3, 0, 0] = torch.arange(4.0, 7)
            values = cache.clone()
            table, lengths = torch.tensor([[2, 0]], dtype=torch.int32, device=DEVICE), torch.tensor([7], device=DEVICE)
            indices = torch.tensor([[[1, 3, 6]]], device=DEVICE)
            with kvevict.backend(backend):
                result = paged_compact(cache, values, table, lengths, indices, to=to)
            assert torch.cat([cache[2].flatten(), cache[0].flatten()]).tolist() == [*rows, -9.0]
            assert torch.equal(cache, values) and result.lengths.tolist() == [3]
            assert result.freed_blocks.tolist() == freed


@pytest.mark.parametrize("to", ["front", "tail"])
def test_scales_move_with_their_rows(to):
    paged = Paged(16, dtype=torch.float8_e4m3fn)
    scales = torch.rand(2, *paged.keys.shape[:3], device=DEVICE)
    float_keys = paged.keys.float() * scales[0][..., None]
    expected = Paged(16)
    expected.keys.copy_(float_keys), expected.values.copy_(paged.values.float() * scales[1][..., None])
    for backend in ("reference", "triton"):
        keys, values, moved = paged.keys.clone(), paged.values.clone(), scales.clone()
        k, v = expected.keys.clone(), expected.values.clone()
        with kvevict.backend(backend):
            paged_keydiff_compact(keys, values, paged.table, paged.lengths, keep=0.5, to=to, key_scales=moved[0],
                                  value_scales=moved[1])  # fmt: skip
            indices = kvevict.topk_indices(
                paged_scores(paged.keys, paged.table, paged.lengths), 0.5, lengths=paged.lengths
            )
            paged_compact(k, v, paged.table, paged.lengths, indices, to=to)
        assert torch.equal(keys.float() * moved[0][..., None], k)
        assert torch.equal(values.float() * moved[1][..., None], v)


def test_indices_end_with_their_own_request_and_scales_are_checked_before_anything_moves():
    paged = Paged(4, lengths=[10, 3])
    blocks, size = paged.keys.shape[:2]
    scales = torch.rand(2, blocks, size, H, device=DEVICE)
    whole, short = torch.arange(3, device=DEVICE).expand(2, H, 3), torch.arange(2, device=DEVICE).expand(2, H, 2)
    beyond, unlike = whole.clone(), whole.clone()
    beyond[1, :, 2] = 3  # below S, but the request has tokens 0 to 2
    unlike[0, 1, 2] = -1
    before = paged.memory.clone()
    for indices, options, message in (
        (beyond, {}, "indices"),
        (unlike, {}, "as many tokens in every KV head"),
        (whole, dict(key_scales=scales[0], value_scales=scales[0]), "value_scales shares memory with key_scales"),
        (
            whole,
            dict(key_scales=scales[0], value_scales=scales[1, :, :, :1].expand(-1, -1, H)),
            "value_scales has shape",
        ),
        (whole, dict(key_scales=paged.keys[..., 0], value_scales=scales[1]), "key_scales shares memory with key_cache"),
    ):
        for backend in ("reference", "triton"):
            for to in ("front", "tail"):
                with kvevict.backend(backend), pytest.raises(ValueError, match=message):
                    paged_compact(paged.keys, paged.values, paged.table, paged.lengths, indices + 0, to=to, **options)
        assert torch.equal(paged.memory, before)
    for keep in (0, -3):
        with pytest.raises(ValueError, match="keep"):
            counts = torch.tensor([2, keep], device=DEVICE)
            paged_keydiff_compact(paged.keys, paged.values, paged.table, paged.lengths, keep=counts)
    strided = short.permute(2, 0, 1).contiguous().permute(1, 2, 0) + 1
    for backend in ("reference", "triton"):
        moved = Paged(4, lengths=[10, 3])
        with kvevict.backend(backend):
            paged_compact(moved.keys, moved.values, moved.table, moved.lengths, strided)
        for b in range(2):
            assert torch.equal(moved.dense(moved.keys, b)[:, :, :2], paged.dense(paged.keys, b)[:, :, 1:3])


def test_bad_input_is_named_and_nothing_is_written():
    paged = Paged(16)
    keys, values, table, lengths = paged.keys, paged.values, paged.table, paged.lengths
    before = paged.memory.clone()
    shared = table.clone()
    shared[1, 0] = shared[0, 1]
    beyond = table.clone()
    beyond[0, 0] = len(keys)
    indices = torch.arange(5, device=DEVICE).expand(4, H, 5)
    weights, angles = fitted()
    for call, match in [
        (lambda: paged_scores(keys[0], table, lengths), "key_cache has shape"),
        (lambda: paged_scores(keys, table.long(), lengths), "block_tables has dtype"),
        (lambda: paged_scores(keys, table, lengths[:2]), "lengths has shape"),
        (lambda: paged_scores(keys, table, lengths, anchor="mean"), "anchor is 'mean'"),
        (lambda: paged_compact(keys, values, table, lengths, indices, to="back"), "to is 'back'"),
        (lambda: paged_compact(keys, values[:2], table, lengths, indices), "value_cache has shape"),
        (lambda: paged_compact(keys, values, table, lengths, indices, key_scales=keys[..., 0]), "key_scales"),
        (lambda: paged_keydiff_compact(keys, values, table, lengths, keep=1.5), "keep is 1.5"),
        (lambda: paged_keydiff_compact(keys, values, table, lengths, keep=4, sink=3, recent=2), "sink . recent"),
        (lambda: paged_keydiff_compact(keys, values, table, lengths, keep=lengths[:1]), "keep has shape"),
        (lambda: paged_kv_scores(keys, keys, table, lengths, weights[:1], inv_freq=angles), "weights has shape"),
        (
            lambda: paged_kv_scores(keys, keys, table, lengths, weights, inv_freq=angles, positions=table),
            "positions has shape",
        ),
        (lambda: paged_kv_scores(keys, keys, table, lengths, weights[None], inv_freq=angles), "weights has shape"),
        (lambda: paged_scores(keys, table, lengths, anchor="raw", inv_freq=angles), "anchor is"),
        (lambda: paged_scores(keys, table, lengths, positions=table), "inv_freq is None"),
        (lambda: paged_attention_mass(keys[:4, :1].transpose(1, 2), keys, table, lengths, reduce="min"), "reduce is"),
    ]:
        with pytest.raises((TypeError, ValueError), match=match):
            call()
    if DEVICE == "cpu":
        for backend in ("reference", "triton"):
            with kvevict.backend(backend):
                with pytest.raises(ValueError, match="block_tables.*no block twice: shared blocks"):
                    paged_keydiff_compact(keys, values, shared, lengths, keep=0.5)
                with pytest.raises(ValueError, match="block_tables.*blocks from 0 to"):
                    paged_keydiff_compact(keys, values, beyond, lengths, keep=0.5)
                with pytest.raises(ValueError, match="lengths is"):
                    paged_keydiff_compact(keys, values, table, lengths * 10, keep=0.5)
                paged_scores(keys, shared, lengths)  # reading shared blocks is fine
    assert torch.equal(paged.memory, before)


@pytest.mark.parametrize("counts", [False, True], ids=["share", "counts"])
def test_compiles_whole(counts):
    paged = Paged(16)

    def call(keys, values, table, lengths):
        keep = lengths.clamp(max=9) if counts else 0.5
        return paged_keydiff_compact(keys, values, table, lengths, keep=keep, sink=1, to="tail")

    with kvevict.backend("reference"):
        copies = paged.keys.clone(), paged.values.clone()
        expected = call(*copies, paged.table, paged.lengths)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(
            paged.keys, paged.values, paged.table, paged.lengths
        )
    assert all(torch.equal(a, b) for a, b in zip(expected, compiled, strict=True))
    assert torch.equal(copies[0], paged.keys) and torch.equal(copies[1], paged.values)


@pytest.mark.gpu
def test_captured_in_a_graph():
    paged = Paged(16)
    keys, values = paged.keys.clone(), paged.values.clone()
    expected = paged_keydiff_compact(keys, values, paged.table, paged.lengths, keep=0.5, sink=1)
    memory = paged.memory.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = paged_keydiff_compact(paged.keys, paged.values, paged.table, paged.lengths, keep=0.5, sink=1)
    paged.memory.copy_(memory)
    graph.replay()
    assert torch.equal(result.freed_blocks, expected.freed_blocks)
    assert torch.equal(paged.keys, keys) and torch.equal(paged.values, values)


# The pool.

LAYERS = 2


def pool(num_blocks=12, block_size=8, **options):
    sizes = dict(layers=LAYERS, kv_heads=H, head_dim=D, device=DEVICE)
    return PagedPool(num_blocks, block_size, **(sizes | options))


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(LAYERS, H, count, D, generator=generator).to(DEVICE) for _ in range(2))


@pytest.fixture
def reference():
    with kvevict.backend("reference" if DEVICE == "cpu" else "auto"):
        yield


def test_pool_holds_what_was_appended_and_attends_over_it():
    pages, parts = pool(), {}
    for request in ("a", "b"):
        pages.allocate(request)
        parts[request] = []
    for step, (request, count) in enumerate((("a", 13), ("b", 5), ("a", 1), ("b", 20), ("a", 9))):
        parts[request].append(tokens(count, step))
        pages.append(request, *parts[request][-1])
    queries = torch.randn(2, 2 * H, 1, D, device=DEVICE)
    for layer in range(LAYERS):
        output = pages.attend(["a", "b"], layer, queries)
        for b, request in enumerate(("a", "b")):
            keys, values = (torch.cat(x, 2)[layer : layer + 1] for x in zip(*parts[request], strict=True))
            found = pages.gather(request, layer)
            assert torch.equal(found[0], keys) and torch.equal(found[1], values)
            truth = F.scaled_dot_product_attention(queries[b : b + 1], keys, values, enable_gqa=True)
            torch.testing.assert_close(output[b : b + 1], truth, rtol=1e-5, atol=1e-5)
    assert pages.statistics().tokens == 48 and pages.statistics().free_blocks == 12 - 3 - 4


@pytest.mark.parametrize("policy", [*NAMED, "function"])
def test_pool_evicts_by_any_policy(policy, reference):
    pages = pool()
    pages.allocate("a")
    keys, values = tokens(70)
    pages.append("a", keys, values)
    queries = torch.randn(LAYERS, 1, 2 * H, 70, D, device=DEVICE)
    chosen = NAMED[policy] if policy != "function" else lambda keys: -keys[..., 0]
    if policy == "lru":
        with pytest.raises(ValueError, match="last_used is None"):
            pages.evict("a", chosen, 0.25)
        assert pages.statistics().free_blocks == 3
        return
    freed = pages.evict("a", chosen, 40, queries=queries)
    assert freed == 4 and pages.length("a") == 40 and pages.tokens_seen("a") == 70
    for layer in range(LAYERS):
        dense = keys[layer : layer + 1], values[layer : layer + 1]
        if policy == "function":
            index = keys[layer, :, :, 0].topk(40, largest=False).indices.sort(-1).values[..., None].expand(-1, -1, D)
            expected = keys[layer].gather(1, index)[None]
        else:
            expected = chosen.compact(*dense, keep=40, inplace=False, queries=queries[layer], layer=layer).keys
        assert torch.equal(pages.gather("a", layer)[0], expected)
    pages.append("a", *tokens(3, 1))
    assert torch.equal(pages.gather("a", 1)[1][0, :, 40:], tokens(3, 1)[1][1])
    assert pages.statistics().tokens_evicted == 30


def test_exhaustion_is_an_error_and_loses_nothing(reference):
    pages = pool(num_blocks=4)
    pages.allocate("a"), pages.allocate("b")
    pages.append("a", *tokens(20))
    pages.append("b", *tokens(8))
    state = pages.statistics()
    for call in (lambda: pages.append("b", *tokens(1)), lambda: pages.require(1)):
        with pytest.raises(PoolExhausted, match="blocks is 1: expected at most 0"):
            call()
    assert pages.statistics() == state and torch.equal(pages.gather("a", 0)[0][0], tokens(20)[0][0])
    pages.idle("b")
    with pytest.raises(PoolExhausted):
        pages.append("b", *tokens(1))  # does not make room for itself
    assert pages.statistics().idle_requests == 1
    pages.idle("a")
    pages.append("b", *tokens(1))  # the other one does
    assert pages.statistics().requests_evicted == 1 and pages.statistics().free_blocks == 2
    with pytest.raises(ValueError, match="request is 'a'"):
        pages.gather("a", 0)


def test_the_least_recently_used_idle_request_goes_first(reference):
    pages = pool(num_blocks=6)
    for request in "abc":
        pages.allocate(request)
        pages.append(request, *tokens(16))
    for request in "abc":
        pages.idle(request)
    pages.attend(["a"], 0, torch.randn(1, H, 1, D, device=DEVICE))  # no longer idle
    assert pages.require(2) == ["b"] and pages.require(2) == []
    with pytest.raises(PoolExhausted, match="expected at most 4"):
        pages.require(5)
    assert pages.require(4) == ["c"]


def test_bad_arguments_of_the_pool(reference):
    pages = pool()
    pages.allocate("a")
    keys, values = tokens(4)
    for call, match in [
        (lambda: pages.allocate("a"), "request is 'a'"), (lambda: pages.append("x", keys, values), "request is 'x'"),
        (lambda: pages.append("a", keys[:1], values), "keys has shape"),
        (lambda: pages.append("a", keys, values[:, :, :2]), "values has 2 tokens"),
        (lambda: pages.append("a", keys.double(), values), "keys has dtype"),
        (lambda: pages.evict("a", KeyDiff(), 0.5), "has no tokens"), (lambda: pages.free("x"), "request is 'x'"),
        (lambda: pool(num_blocks=0), "num_blocks is 0"), (lambda: pool(dtype=torch.int64), "dtype is"),
        (lambda: pages.block_table([]), r"requests is \[\]: expected at least one"),
    ]:  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=match):
            call()
    pages.append("a", keys, values)
    for policy, keep, match in ((KeyDiff(), 0, "keep is 0"), (SnapKV(), 0.5, "queries is None"),
                                (lambda keys: keys, 2, "policy gave")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            pages.evict("a", policy, keep)
    assert pages.length("a") == 4 and torch.equal(pages.gather("a", 0)[0][0], keys[0])


def test_heads_of_a_pool_keep_and_free_their_own(reference):
    """By hand: of 20 tokens in blocks of 8 (3 each), heads keep 3, 12, 1 and 20."""
    pages = pool(num_blocks=16, per_head=True)
    pages.allocate("a")
    keys, values = tokens(20)
    pages.append("a", keys, values)
    assert pages.key_cache.shape == (16, 8, 1, D) and pages.statistics().free_blocks == 16 - 4 * 3
    counts = torch.tensor([[3, 12], [1, 20]], device=DEVICE)
    assert pages.evict("a", lambda keys: -keys[..., 0], counts) == 2 + 1 + 2
    assert pages.statistics().tokens == 36 and pages.length("a") == 20
    for layer in range(LAYERS):
        table, lengths = pages.block_table(["a"], layer)
        assert lengths.tolist() == [counts[layer].tolist()] and table.shape[:2] == (1, H)
        found = pages.gather("a", layer)
        for h, count in enumerate(counts[layer].tolist()):
            kept = keys[layer, h, :, 0].topk(count, largest=False).indices.sort().values
            assert torch.equal(found[0][0, h, :count], keys[layer, h, kept])
            assert torch.equal(found[1][0, h, :count], values[layer, h, kept])
            assert not found[0][0, h, count:].any()
    assert pages.evict("a", KeyDiff(recent=2), 0.5) == 0 + 1 + 0 + 1
    assert pages.block_table(["a"], 0)[1].tolist() == [[2, 6]] and pages.block_table(["a"], 1)[1].tolist() == [[1, 10]]
    pages.free("a")
    assert pages.statistics().free_blocks == 16


@pytest.mark.parametrize("per_head", [False, True])
def test_policies_that_read_positions_evict_once(per_head, reference):
    """Afterwards a slot is not the position of its token."""
    pages = pool(per_head=per_head)
    pages.allocate("a")
    pages.append("a", *tokens(9))
    policy = KeyDiff(sink=0, recent=0, rotary=[0.5])
    pages.evict("a", policy, 6)
    with pytest.raises(ValueError, match="reads positions, .* expected a request that has kept all of its 9 tokens"):
        pages.evict("a", policy, 3)
    assert pages.length("a") == 6


def test_bad_arguments_of_a_pool_per_head(reference):
    pages, plain = pool(per_head=True), pool()
    for each in (pages, plain):
        each.allocate("a")
        each.append("a", *tokens(9))
    counts = torch.full((LAYERS, H), 3, device=DEVICE)
    for call, match in [
        (lambda: pool(per_head=1), "per_head is 1"),
        (lambda: pages.block_table(["a"]), "layer is None"),
        (lambda: pages.gather("a", LAYERS), f"layer is {LAYERS}"),
        (lambda: pages.evict("a", KeyDiff(), counts[:1]), "keep has shape"),
        (lambda: pages.evict("a", KeyDiff(), counts.float()), "keep has dtype"),
        (lambda: pages.evict("a", KeyDiff(), counts - 3), "keep is"),
        (lambda: plain.evict("a", KeyDiff(), counts), "keep is a tensor: expected .* per_head=True"),
        (lambda: plain.evict("a", KeyDiff(heads="adaptive"), 3), "policy has heads='adaptive': .* per_head=True"),
    ]:
        with pytest.raises((TypeError, ValueError), match=match):
            call()
    for each in (pages, plain):
        assert torch.equal(each.gather("a", 1)[0][0], tokens(9)[0][1])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_block_is_lost_or_held_twice(data, reference):
    pages, contents = pool(num_blocks=10, block_size=4), {}
    for step in range(40):
        action = data.draw(st.sampled_from(["allocate", "append", "append", "evict", "free", "idle"]))
        request = data.draw(st.integers(0, 4))
        if action == "allocate" and request not in contents:
            pages.allocate(request)
            contents[request] = []
        elif request in contents:
            rows = contents[request]
            if action == "append":
                count = data.draw(st.integers(1, 12))
                keys, values = tokens(count, step)
                gone = set(contents)
                try:
                    pages.append(request, keys, values)
                    rows += keys[0, 0, :, 0].tolist()
                except PoolExhausted:
                    pass
                gone -= set(pages._requests)
                for other in gone:
                    del contents[other]
            elif action == "evict" and rows:
                keep = data.draw(st.integers(1, len(rows)))
                pages.evict(request, lambda keys: -torch.arange(keys.shape[2]).expand(keys.shape[:3]).float(), keep)
                del rows[keep:]
            elif action == "free":
                pages.free(request)
                del contents[request]
            elif action == "idle":
                pages.idle(request)
        held = [block for state in pages._requests.values() for row in state.blocks for block in row]
        assert sorted(held + pages._free) == list(range(10))
        assert set(pages._requests) == set(contents)
        for name_, rows in contents.items():
            assert pages.length(name_) == len(rows)
            if rows:
                assert pages.gather(name_, 0)[0][0, 0, :, 0].tolist() == rows
