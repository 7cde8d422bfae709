"""Every kernel and option, as compiled, against the reference: selection and moves bit for bit, scores to float32
rounding. No race, hazard or address outside a tensor (see emulate.py)."""

import itertools
import pathlib

import pytest
import torch
from cases import as_bytes, copy_of, name

from kvevict.backends import reference
from kvevict.backends import triton as kernels

BF16, FP16, FP32, E4M3, E5M2 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2
DTYPES = (BF16, FP16, FP32, E4M3, E5M2)
DIMS = (64, 80, 128, 256)
INF, NAN = float("inf"), float("nan")


def matrix(*axes, quick):
    """Every combination; those that are not in `quick` are for `make test-ptx`."""
    combinations = list(itertools.product(*axes))
    assert set(quick) <= set(combinations)
    return [
        pytest.param(*c, marks=() if c in quick else pytest.mark.slow, id="-".join(map(name, c))) for c in combinations
    ]


def normal(*shape, dtype=FP32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unwritten(*shape, dtype=FP32):
    return torch.full(shape, NAN if dtype.is_floating_point else -77, dtype=dtype)


def pages(B, H, S, D, dtype, seed=0, block_size=16):
    """A paged cache [blocks, H, block_size, D] with spare blocks, and a table [B, columns] in random order."""
    columns = -(-S // block_size)
    blocks = B * columns + 5
    cache = normal(blocks, block_size, H, D, dtype=dtype, seed=seed).transpose(1, 2)
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(9))
    return cache, order[: B * columns].reshape(B, columns).to(torch.int32)


def kept(B, H, S, n, seed=0, padding=0):
    """[B, H, n] ascending tokens; the last `padding` of request 0 are -1."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(S, generator=generator)[:n].sort()[0] for _ in range(B * H)]
    indices = torch.stack(rows).reshape(B, H, n)
    if padding:
        indices[0, :, -padding:] = -1
    return indices


def both(op, *arguments, out):
    """What the arguments at the positions `out` hold after the kernel, and after the reference."""
    results = []
    for backend in (kernels, reference):
        given = [copy_of(x) if k in out else x for k, x in enumerate(arguments)]
        getattr(backend, op)(*given)
        results.append([given[k] for k in out])
    return zip(*results, strict=True)


def assert_same(op, *arguments, out):
    for got, expected in both(op, *arguments, out=out):
        assert torch.equal(as_bytes(got), as_bytes(expected))


def assert_close(op, *arguments, out, error):
    for got, expected in both(op, *arguments, out=out):
        torch.testing.assert_close(got, expected, rtol=0, atol=error, equal_nan=True)


# Scores. Cosines are at most 1: an error of 4e-6 is 32 units of float32, the sum of 256 products may have that.


@pytest.mark.parametrize("dtype, D, S", matrix(DTYPES, DIMS, (77, 1200), quick=[
    (BF16, 128, 1200), (E4M3, 80, 77), (FP32, 64, 77), (FP16, 256, 77),
]))  # fmt: skip
def test_keydiff(dtype, D, S):
    keys, out = normal(2, 2, S, D, dtype=dtype), unwritten(2, 2, S)
    lengths = torch.tensor([S, S // 2 + 3], dtype=torch.int32)
    assert_close("keydiff_scores", keys, None, True, None, out, out=[4], error=4e-6)
    assert_close("keydiff_scores", keys, None, False, lengths, out, out=[4], error=2e-5)  # a mean near 0 is less exact


def test_anchor_sums():
    """To the last bit of rsqrt: 700 keys, each of whose elements may be rounded to the other side."""
    keys, lengths = normal(2, 2, 700, 128, dtype=BF16), torch.tensor([700, 333], dtype=torch.int32)
    sums, counts = unwritten(2, 2, 128, dtype=torch.int64), unwritten(2, 2, dtype=torch.int64)
    assert_close("anchor_sums", keys, lengths, sums, counts, out=[2, 3], error=700)


def test_keydiff_of_odd_keys():
    keys, anchor = normal(2, 3, 130, 128, dtype=BF16), normal(2, 3, 128, seed=9)
    keys[0, 0, 3], keys[1, 1, 5, 2], keys[1, 2, 7, 1] = 0, NAN, INF
    assert_close("keydiff_scores", keys, anchor, True, None, unwritten(2, 3, 130), out=[4], error=4e-6)


@pytest.mark.parametrize("view", ["sliced", "BSHD"])
def test_keydiff_of_views(view):
    keys = normal(2, 3, 700, 128, dtype=BF16)[:, :, 100:640]
    if view == "BSHD":
        keys = keys.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close("keydiff_scores", keys, None, True, None, unwritten(2, 3, 540), out=[4], error=4e-6)


@pytest.mark.parametrize("dtype, D", matrix(DTYPES, DIMS, quick=[(BF16, 128), (E4M3, 80)]))
def test_key_norm(dtype, D):
    keys, lengths = normal(2, 2, 300, D, dtype=dtype), torch.tensor([[300, 101], [1, 299]], dtype=torch.int32)
    assert_close("key_norm_scores", keys, lengths, unwritten(2, 2, 300), out=[2], error=2e-5)


@pytest.mark.parametrize("average", [True, False])
def test_pool(average):
    scores = normal(2, 3, 700)
    scores[:, :, 650:], scores[0, 0, 5] = -INF, NAN
    lengths = torch.tensor([700, 300])
    assert_close("pool_scores", scores, 5, average, 64, lengths, unwritten(2, 3, 700), out=[5], error=1e-6)


def test_ranks():
    parts = [normal(2, 3, 200), normal(2, 3, 200).round()]
    parts[0][:, :, 150:160], parts[1][0, 0, 5] = -INF, NAN
    lengths = torch.tensor([[200, 130, 1], [0, 64, 65]], dtype=torch.int32)
    assert_close("combine_ranks", parts, [0.5, 0.25], lengths, unwritten(2, 3, 200), out=[3], error=1e-6)


@pytest.mark.parametrize("dtype, shape", matrix((BF16, FP16, FP32), ((2, 100, 96, 48), (1, 70, 130, 64)), quick=[
    (BF16, (2, 100, 96, 48)),
]))  # fmt: skip
def test_mlp(dtype, shape):
    B, S, M, N = shape
    hidden, w1 = normal(B, S, M, dtype=dtype), (normal(N, M, seed=1) * M**-0.5).to(dtype)
    b1, w2, b2 = (normal(size, dtype=dtype, seed=size) for size in (N, N, 1))
    assert_close("mlp_scores", hidden, w1, b1, w2, b2, unwritten(B, S), out=[5], error=5e-5)


# Attention: products of 16-bit floats are summed in float32, in another order than torch's.


@pytest.mark.parametrize("dtype, D, W, S", matrix(DTYPES, DIMS, (1, 3, 200), (300,), quick=[
    (BF16, 128, 3, 300), (BF16, 64, 200, 300),
]))  # fmt: skip
def test_attention(dtype, D, W, S):
    queries, keys = normal(2, 4, W, D, dtype=dtype), normal(2, 2, S, D, dtype=dtype, seed=1)
    lengths, scale = torch.tensor([S, S - S // 3]), D**-0.5
    lse, out = torch.empty(2, 4, W), unwritten(2, 2, S)
    reductions = [(True, "mean", True)]
    if W == 3:
        reductions += [(False, "sum", False), (True, "max", False), (True, "square", True)]
    for causal, reduce, count in reductions:
        assert_close("attention_lse", queries, keys, scale, causal, lengths, unwritten(2, 4, W), out=[5], error=3e-5)
        reference.attention_lse(queries, keys, scale, causal, lengths, lse)
        arguments = (queries, keys, lse, scale, causal, reduce, count, lengths, out)
        assert_close("attention_mass", *arguments, out=[8], error=1e-4)


@pytest.mark.parametrize("dtype, D, S", matrix(DTYPES, DIMS, (100, 700), quick=[
    (BF16, 64, 700), (E4M3, 80, 100),
]))  # fmt: skip
def test_decode(dtype, D, S):
    """With and without the mass and the last use of each token; values narrower than keys."""
    queries, keys = normal(2, 8, 1, D, dtype=dtype), normal(2, 2, S, D, dtype=dtype, seed=1)
    values = normal(2, 2, S, 64, dtype=dtype, seed=2)
    out = unwritten(2, 8, 1, 64, dtype=BF16 if dtype.itemsize == 1 else dtype)
    mass, used, lengths = torch.rand(2, 2, S), torch.full((2, 2, S), 3, dtype=torch.int32), torch.tensor([S, S // 2])
    error = 1e-5 if dtype is FP32 else 2e-2
    plain = (queries, keys, values, D**-0.5, None, None, 1.0, None, 0, 0.0, out)
    assert_close("decode_attention", *plain, out=[10], error=error)
    tracked = (queries, keys, values, D**-0.5, lengths, mass, 0.5, used, 7, 1e-2, out)
    assert_close("decode_attention", *tracked, out=[10], error=error)
    assert_close("decode_attention", *tracked, out=[5], error=1e-5)
    assert_same("decode_attention", *tracked, out=[7])


# Selection


def scores_of(kind, *shape):
    random = normal(*shape)
    if kind == "odd":  # NaN, infinities, both zeros, subnormals
        for seed, value in enumerate((NAN, -INF, INF, -0.0, 0.0, 1e-40, -1e-40), start=1):
            random[normal(*shape, seed=seed) > 1] = value
        return random
    return {"random": random, "ties": (random * 2).round(), "equal": random * 0 + 1.5, "nan": random * NAN}[kind]


KINDS = ("random", "ties", "odd", "equal", "nan")


@pytest.mark.parametrize("kind, S", matrix(KINDS, (1, 5, 100, 4097, 12400), quick=[
    *((kind, S) for kind in KINDS for S in (1, 5, 100)), ("odd", 4097), ("ties", 12400),
]))  # fmt: skip
def test_selection(kind, S):
    """4,097 tokens are more than one tile; 12,400 are split over programs."""
    scores = scores_of(kind, 2, 2, S)
    for n, sink, recent in ((max(S // 2, 1), 0, 0), (max(S // 3, 1), 2, 3), (S, 1, 1)):
        out = unwritten(2, 2, n, dtype=torch.int64)
        assert_same(
            "topk_indices", scores, None, min(sink, n), min(recent, max(n - sink, 0)), False, None, out, out=[6]
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_selection_of_long_rows_in_registers(kind, monkeypatch):
    monkeypatch.setattr("kvevict.kernels.select_topk.multiprocessors", lambda device: 1)
    scores = scores_of(kind, 1, 2, 8200)
    assert_same("topk_indices", scores, None, 2, 3, False, None, unwritten(1, 2, 3000, dtype=torch.int64), out=[6])


@pytest.mark.parametrize("kind, S", matrix(KINDS, (5, 100, 4097, 12400), quick=[
    ("odd", 5), ("ties", 100),
]))  # fmt: skip
def test_ragged_selection(kind, S):
    scores = scores_of(kind, 2, 2, S)
    lengths, keep = torch.tensor([S, S // 2 + 1]), torch.tensor([S // 2, S // 5 + 1])
    for shared in (False, True):
        out = unwritten(2, 1 if shared else 2, int(keep.max()), dtype=torch.int64)
        assert_same("topk_indices", scores, keep, 1, 1, shared, lengths, out, out=[6])
    for n in (1, S // 3 + 1):
        assert_same("evict_slots", scores, 2, 3, lengths, unwritten(2, 2, n, dtype=torch.int64), out=[4])


@pytest.mark.parametrize("kind, S", matrix(KINDS, (5, 100, 5000, 8200), quick=[("odd", 5), ("ties", 100)]))
def test_selection_over_heads(kind, S):
    scores = scores_of(kind, 2, 3, S)
    lengths = torch.tensor([[S, S // 2, 1], [S // 2 + 1, S, S]], dtype=torch.int32)
    for n, sink, recent, ragged in ((S // 3 + 1, 0, 0, False), (S // 2, 1, 1, True)):
        arguments = (scores, n, None, (1, 2), sink, recent, lengths if ragged else None)
        assert_same("topk_adaptive", *arguments, unwritten(2, 3, S, dtype=torch.int64), out=[7])


@pytest.mark.parametrize("kind, S", matrix(KINDS, (5, 100, 4200), quick=[("odd", 5), ("ties", 100)]))
def test_selection_over_ranks(kind, S):
    """All digits of a search and its end, on one of two ranks; the other's counts are the same. 4,200 tokens are three
    runs."""
    scores, places, bits = scores_of(kind, 2, 2, S), torch.arange(0, 2 * S, 2).expand(2, 2, S), (2 * S).bit_length()
    limits = torch.tensor([[3, 2 * S - 2, 2 * S, S // 2], [0, S, S, S // 3 + 1]])
    before, summed, above = None, None, 32 + bits
    while above > 0:
        left = max(above - 8, 0)
        after, counts = unwritten(2, 2, 5, dtype=torch.int64), unwritten(2, 2, 2 ** (above - left), dtype=torch.int32)
        arguments = (scores, places, limits, before, summed, bits, left, after, counts)
        assert_same("count_digits", *arguments, out=[7, 8])
        reference.count_digits(*arguments)
        before, summed, above = after, 2 * counts, left
    out, held = unwritten(2, 2, S // 2 + 3, dtype=torch.int64), unwritten(2, 2, dtype=torch.int64)
    assert_same("kept_slots", scores, places, before, summed, bits, out, held, out=[5, 6])


@pytest.mark.parametrize("wrong", ["nothing", "length", "block"])
def test_rows_are_checked(wrong):
    _, table = pages(2, 1, 100, 8, FP32)
    lengths = torch.tensor([100, 67 if wrong != "length" else 113], dtype=torch.int32)
    table[1, 6] = 10**6 if wrong == "nothing" else 3  # beyond 67 tokens: not looked at
    table[0, 6] = -1 if wrong == "block" else 3
    assert_same("check_rows", lengths, 112, table, 19, 16, torch.ones(1, dtype=torch.bool), out=[5])


@pytest.mark.parametrize("keep", [None, [7, 60], [[7, 1], [90, 60]]])
def test_counts(keep):
    lengths = torch.tensor([100, 67], dtype=torch.int32)
    keep = None if keep is None else torch.tensor(keep)
    kept = unwritten(2, dtype=torch.int64) if keep is None else torch.full_like(keep, -77)
    assert_same("keep_counts", lengths, 112, keep, 3 * 10**11, 50, kept, torch.zeros(1, dtype=torch.bool), out=[5, 6])


@pytest.mark.parametrize("from_end", [False, True])
def test_left_blocks(from_end):
    _, table = pages(2, 1, 100, 8, FP32)
    lengths, kept = torch.tensor([100, 67], dtype=torch.int32), torch.tensor([50, 67])
    arguments = (table, lengths, kept, 16, from_end, torch.full_like(lengths, -77), torch.full_like(table, -77))
    assert_same("left_blocks", *arguments, out=[5, 6])


# Moves


@pytest.mark.parametrize("dtype, dims", matrix((*DTYPES, torch.int8), tuple((D, 64) for D in DIMS), quick=[
    (BF16, (128, 64)), (E4M3, (80, 64)),
]))  # fmt: skip
def test_moves(dtype, dims):
    S, n = 160, 90
    keys, values = ((normal(2, 2, S, D, seed=D) * 50).to(dtype) for D in dims)
    indices = kept(2, 2, S, n, padding=20)
    slots = torch.empty_like(indices)
    reference.fill_holes(indices, slots)
    ends = torch.tensor([[S, S - 3], [S - 5, S]])
    assert_same("slots_from_end", indices.clamp(max=S - 6), ends, unwritten(2, 2, n, dtype=torch.int64), out=[2])
    assert_same("fill_holes", indices, unwritten(2, 2, n, dtype=torch.int64), out=[1])
    assert_same("move_rows", keys, values, indices, True, out=[0, 1])
    assert_same("move_rows", keys, values, slots, False, out=[0, 1])
    new = [torch.full((2, 2, n, D), 1).to(dtype) for D in dims]
    assert_same("copy_rows", keys, values, indices, *new, out=[3, 4])


# Paged caches


@pytest.mark.parametrize("dtype, D", matrix((BF16, FP32, E4M3), DIMS, quick=[(BF16, 64)]))
def test_paged(dtype, D):
    S, scale = 160, D**-0.5
    (keys, table), (values, _) = pages(2, 2, S, D, dtype), pages(2, 2, S, D, dtype, seed=3)
    lengths, out = torch.tensor([150, 67], dtype=torch.int32), unwritten(2, 2, S)
    assert_close("keydiff_scores", keys, None, True, lengths, out, table, out=[4], error=4e-6)
    assert_close("key_norm_scores", keys, lengths, out, table, out=[2], error=2e-5)
    queries, lse = normal(2, 4, 3, D, dtype=dtype), torch.empty(2, 4, 3)
    reference.attention_lse(queries, keys, scale, True, lengths, lse, table)
    assert_close("attention_lse", queries, keys, scale, True, lengths, unwritten(2, 4, 3), table, out=[5], error=3e-5)
    assert_close(
        "attention_mass", queries, keys, lse, scale, True, "mean", True, lengths, out, table, out=[8], error=1e-4
    )
    query, result = queries[:, :, :1], unwritten(2, 4, 1, D, dtype=BF16 if dtype.itemsize == 1 else dtype)
    arguments = (query, keys, values, scale, lengths, None, 1.0, None, 0, 0.0, result, table)
    assert_close("decode_attention", *arguments, out=[10], error=1e-5 if dtype is FP32 else 2e-2)
    indices = kept(2, 2, 60, 40)
    assert_same("move_rows", keys, values, indices, True, table, out=[0, 1])
    assert_same("move_rows", keys, values, indices, True, table, lengths, out=[0, 1])


def test_no_kernel_is_missing():
    here = pathlib.Path(__file__).read_text()
    launchers = set(kernels.__all__) - {"move_flags"}  # that one launches nothing
    assert [op for op in launchers if f'"{op}"' not in here] == []


# Scores from keys before RoPE: sums of 256 products of unit size, and angles to 2⁻³² turns a position.


def angles(pairs):
    return 10_000.0 ** -(torch.arange(pairs) / pairs)


@pytest.mark.parametrize("dtype, D, pairs, S", [(BF16, 128, 64, 1200), (E4M3, 80, 40, 77), (FP32, 64, 16, 77),
                                                (BF16, 120, 60, 77)], ids=name)  # fmt: skip
def test_kv_scores(dtype, D, pairs, S):
    keys, values = (normal(2, 2, S, D, dtype=dtype, seed=seed) for seed in (0, 1))
    weights = normal(2, 2 * D + 4, seed=2) / 8
    lengths = torch.tensor([S, S // 3])
    positions = torch.arange(S).expand(2, 2, S) + torch.tensor([0, 1000])[:, None]
    scores = unwritten(2, 2, S), unwritten(2, 2, S)
    arguments = keys, values, weights, angles(pairs), positions, lengths, *scores
    assert_close("kv_scores", *arguments, out=(6, 7), error=3e-4)


def test_keydiff_before_rope_in_pages():
    keys, table = pages(2, 2, 70, 64, BF16)
    out = unwritten(2, 2, table.shape[1] * 16)
    arguments = keys, None, None, angles(32), None, torch.tensor([70, 33], dtype=torch.int32), None, out, table
    assert_close("kv_scores", *arguments, out=(7,), error=1e-5)


def test_far_attention():
    """A whole prompt and a window, whose queries count from so many tokens on."""
    for W, S, distance in ((200, 300, 33), (3, 300, 7), (200, 300, 1000)):
        queries, keys = normal(2, 4, W, 64, dtype=BF16), normal(2, 2, S, 64, dtype=BF16, seed=1)
        lengths, scale = torch.tensor([S, S - S // 3]), 0.125
        lse, out = torch.empty(2, 4, W), unwritten(2, 2, S)
        reference.attention_lse(queries, keys, scale, True, lengths, lse)
        arguments = (queries, keys, lse, scale, True, "mean", True, lengths, out, None, distance)
        assert_close("attention_mass", *arguments, out=[8], error=1e-4)


def test_mass_of_queries_under_a_table_and_of_merged_runs():
    """One query in 1,100 tokens: its log-sum-exp is that of two runs."""
    rows, keys = normal(7, 4, 1, 64, dtype=BF16), normal(2, 2, 1100, 64, dtype=BF16, seed=1)
    table, lengths, out = torch.tensor([[5], [2]], dtype=torch.int32), torch.tensor([1100, 700]), unwritten(2, 2, 1100)
    arguments = (rows, keys, None, 0.125, True, "mean", False, lengths, out, None, 0, table)
    assert_close("attention_mass", *arguments, out=[8], error=1e-4)


def test_fitted_scores_of_heads_as_requests_in_pages():
    keys, table = pages(3, 1, 70, 64, BF16)
    out, weights = unwritten(3, 1, table.shape[1] * 16), normal(3, 1, 132, seed=2) / 8
    positions = torch.randint(0, 5000, out.shape, generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([70, 33, 1], dtype=torch.int32)
    arguments = keys, keys, weights, angles(32), positions, lengths, out, None, table
    assert_close("kv_scores", *arguments, out=(6,), error=3e-4)


@pytest.mark.parametrize("dtype, D, S", matrix((BF16, FP16, FP32, E4M3), (64, 80, 128, 320), (70,), quick=[
    (BF16, 128, 70), (FP32, 64, 70),
]))  # fmt: skip
def test_products(dtype, D, S):
    """Sums of D² products, and of M · D; those of a 16-bit matrix and its remainder are 16 bits exact."""
    keys, linear = normal(2, 2, S, D, dtype=dtype), normal(2, 4, D, seed=1)
    half = normal(2, 4, D, D, seed=2)
    quadratic, lengths = half @ half.mT / D**1.5, torch.tensor([S, S // 3])
    arguments = keys, linear, quadratic, lengths, unwritten(2, 4, S)
    assert_close("quadratic_scores", *arguments, out=[4], error=1e-4 * D**0.5)
    weight = normal(100, 4 * D, dtype=BF16 if dtype.itemsize == 1 else dtype, seed=3)
    assert_close("projected_norms", keys, weight, lengths, unwritten(2, 2, S), out=[3], error=1e-3 * D**0.5)


@pytest.mark.parametrize("dtype, D, S", matrix((BF16, FP32, E4M3), (64, 80, 128), (150, 700), quick=[(BF16, 64, 150)]))
def test_attention_peaks(dtype, D, S):
    queries, keys = normal(2, 4, 32, D, dtype=dtype), normal(2, 2, S, D, dtype=dtype, seed=1)
    lengths, scale, lse = torch.tensor([S, S // 2]), D**-0.5, torch.empty(2, 4, 32)
    reference.attention_lse(queries, keys, scale, True, lengths, lse)
    assert_close("attention_peaks", queries, keys, lse, scale, 5, lengths, unwritten(2, 2, S), out=[6], error=1e-4)
