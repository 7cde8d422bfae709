"""KeyDiff scores: the kernel equals the reference to float32 rounding, and both equal the formula."""

import pytest
import torch
from cases import both, cache, name
from conftest import DEVICE

import kvevict
from kvevict import ops
from kvevict.backends import reference, triton
from kvevict.kernels import score_keydiff

SHAPES = [(2, 3, 517, 64, 64), (1, 2, 100, 80, 80), (1, 1, 1, 128, 128), (1, 2, 33, 96, 96), (1, 1, 70, 576, 512),
          (1, 2, 40, 112, 112), (1, 1, 700, 192, 128), (1, 1, 60, 256, 256), (2, 2, 25, 5, 5)]  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
ANCHORS = ["unit", "raw", "given"]


def exact(keys, anchor):
    """The formula in float64."""
    keys = keys.to(torch.float32).double()
    norm = keys.norm(dim=-1, keepdim=True)
    if isinstance(anchor, str):
        mean = (keys / norm if anchor == "unit" else keys).mean(2, keepdim=True)
    else:
        mean = anchor.double()[:, :, None]
    return -(keys * mean).sum(-1) / (norm[..., 0] * mean.norm(dim=-1))


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_equals_the_formula(shape, dtype, anchor):
    keys, _ = cache(shape, dtype)
    if anchor == "given":
        anchor = torch.randn(shape[0], shape[1], shape[3], device=DEVICE)
    reference, kernel = both(lambda: kvevict.keydiff_scores(keys, anchor=anchor))
    truth = exact(keys, anchor)
    assert kernel.dtype == torch.float32 and kernel.shape == keys.shape[:3]
    own_error = (reference - truth).abs().max().item()
    assert own_error < 1e-5
    assert (kernel - truth).abs().max().item() <= 2 * own_error + 1e-6


@pytest.mark.parametrize("layout", ["BSHD", "sliced"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=name)
def test_strides_do_not_matter(layout, dtype):
    """Compiled code may add in another order where rows are aligned otherwise: 1e-6, eight times float32's epsilon."""
    dense, strided = (cache((2, 2, 77, 64, 64), dtype, layout=which)[0] for which in ("BHSD", layout))
    for a, b in zip(*(both(lambda x=x: kvevict.keydiff_scores(x)) for x in (dense, strided)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_by_hand():
    keys = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 0.0]], device=DEVICE).reshape(1, 1, 4, 2)
    # unit keys: (1,0) (0,1) (0,1) (0,0); their mean is (1,2)/4, of norm √5/4
    for scores in both(lambda: kvevict.keydiff_scores(keys)):
        expected = torch.tensor([-(1 / 5**0.5), -(2 / 5**0.5), -(2 / 5**0.5), 0.0], device=DEVICE)
        torch.testing.assert_close(scores[0, 0], expected)
    # raw keys: their mean is (3,3)/4
    for scores in both(lambda: kvevict.keydiff_scores(keys, anchor="raw")):
        expected = torch.tensor([-(0.5**0.5), -(0.5**0.5), -(0.5**0.5), 0.0], device=DEVICE)
        torch.testing.assert_close(scores[0, 0], expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=name)
def test_ragged_rows_do_not_see_what_lies_beyond(dtype):
    keys, _ = cache((3, 2, 90, 64, 64))
    lengths = torch.tensor([1, 90, 37], dtype=dtype, device=DEVICE)
    for b, length in enumerate(lengths.tolist()):
        keys[b, :, length:] = float("nan")
    for scores in both(lambda: kvevict.keydiff_scores(keys, lengths=lengths)):
        for b, length in enumerate(lengths.tolist()):
            alone = kvevict.keydiff_scores(keys[b : b + 1, :, :length])
            torch.testing.assert_close(scores[b : b + 1, :, :length], alone, atol=1e-6, rtol=0)
            assert (scores[b, :, length:] == float("-inf")).all()


ONE_LAUNCH, TWO_LAUNCHES = 50, 600  # tokens: a program per row; two passes, several programs per row


def given(anchor, keys):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*keys.shape[:2], keys.shape[3], generator=generator).to(DEVICE) if anchor == "given" else anchor


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("S", [ONE_LAUNCH, TWO_LAUNCHES])
def test_keys_that_are_not_finite_rank_last_and_are_in_no_mean(S, anchor):
    keys, _ = cache((1, 3, S, 64, 64), torch.bfloat16)
    anchor = given(anchor, keys)
    bad = torch.zeros(1, 3, S, dtype=torch.bool, device=DEVICE)
    for token, value in ((7, "nan"), (8, "inf"), (S - 1, "-inf")):
        keys[0, 0, token, token % 64] = float(value)
        bad[0, 0, token] = True
    keys[0, 2], bad[0, 2] = float("nan"), True  # a head without any finite key
    for scores in both(lambda: kvevict.keydiff_scores(keys, anchor=anchor)):
        assert torch.equal(scores.isnan(), bad)
        for h in (0, 1):
            good = ~bad[0, h]
            a = anchor if isinstance(anchor, str) else anchor[:, h : h + 1]
            truth = exact(keys[:, h : h + 1, good], a)[0, 0].float()
            torch.testing.assert_close(scores[0, h, good], truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("S", [3, TWO_LAUNCHES])
def test_the_mean_is_over_the_finite_keys(S):
    """Its norm counts where it is below 1e-8: k·a / (1e-8 · 1e-8) with k = a = (4e-9, 0) is 0.16."""
    keys = torch.tensor([4e-9] + [0.0] * 63, device=DEVICE).repeat(1, 1, S, 1)
    keys[0, 0, 1:-1, 0] = float("nan")
    for scores in both(lambda: kvevict.keydiff_scores(keys, anchor="raw")):
        torch.testing.assert_close(scores[0, 0, [0, -1]], torch.full((2,), -0.16, device=DEVICE))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_given_anchor_that_is_not_finite_gives_nan(value):
    keys, _ = cache((1, 2, 20, 64, 64))
    anchor = torch.ones(1, 2, 64, device=DEVICE)
    anchor[0, 1, 5] = value
    for scores in both(lambda: kvevict.keydiff_scores(keys, anchor=anchor)):
        assert not scores[0, 0].isnan().any() and scores[0, 1].isnan().all()


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("S", [ONE_LAUNCH, TWO_LAUNCHES])
def test_norms_whose_square_is_beyond_float32(S, anchor):
    keys, _ = cache((1, 2, S, 64, 64))
    keys[0, 0] *= 1e30
    keys[0, 1, ::3] *= 1e30  # beside others
    anchor = given(anchor, keys)
    if not isinstance(anchor, str):
        anchor *= 1e25
    truth = exact(keys, anchor).float()
    for scores in both(lambda: kvevict.keydiff_scores(keys, anchor=anchor)):
        torch.testing.assert_close(scores, truth, atol=1e-5, rtol=0)


def test_norms_below_the_epsilons():
    """torch's: a unit key is k / max(‖k‖, 1e-12), a cosine divides by max(‖k‖, 1e-8)."""
    keys = torch.tensor([[1.0, 0.0], [1e-30, 0.0], [1e-11, 0.0], [0.0, 1e-30]], device=DEVICE).reshape(1, 1, 4, 2)
    # unit keys: (1,0) (1e-18,0) (1,0) (0,1e-18)
    for scores in both(lambda: kvevict.keydiff_scores(keys)):
        expected = torch.tensor([-1.0, -1e-22, -1e-3, 0.0], device=DEVICE)
        torch.testing.assert_close(scores[0, 0], expected, atol=1e-30, rtol=1e-5)


def per_head(keys, block_size):
    """A paged cache [blocks, 1, block_size, D] with one block too many, and a table [B, H, columns]."""
    B, H, S, D = keys.shape
    count = B * H * S // block_size
    table = torch.randperm(count + 1, generator=torch.Generator().manual_seed(2))[:count].to(DEVICE)
    pages = torch.full((count + 1, 1, block_size, D), float("nan"), device=DEVICE).to(keys.dtype)
    pages[table] = keys.reshape(count, 1, block_size, D)
    return pages, table.reshape(B, H, S // block_size).to(torch.int32)


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "table-per-head"])
@pytest.mark.parametrize("S", [96, 608])
def test_lengths_of_every_head(S, paged):
    """[B, H], 0 among them: every head is scored as if it were alone, and what lies beyond is not read."""
    keys, _ = cache((2, 3, S, 64, 64), torch.bfloat16)
    lengths = torch.tensor([[S, 0, 1], [S // 2 + 1, S - 1, 33]], dtype=torch.int32, device=DEVICE)
    for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        keys[b, h, lengths[b, h] :] = float("nan")
    rows, table = per_head(keys, 16) if paged else (keys, None)
    if table is not None:
        table[lengths[..., None] <= torch.arange(S // 16, device=DEVICE) * 16] = -1
    out = torch.empty(2, 3, S, device=DEVICE)
    for backend in (reference, triton):
        backend.keydiff_scores(rows, None, True, lengths, out.fill_(7.0), table)
        for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
            length = int(lengths[b, h])
            assert (out[b, h, length:] == float("-inf")).all()
            if length:
                truth = exact(keys[b : b + 1, h : h + 1, :length], "unit")[0, 0]
                torch.testing.assert_close(out[b, h, :length], truth.float(), atol=1e-5, rtol=0)


def test_key_norms_of_every_head():
    keys, _ = cache((2, 2, 32, 64, 64))
    lengths = torch.tensor([[32, 0], [5, 17]], device=DEVICE)
    pages, table = per_head(keys, 16)
    expected = -keys.norm(dim=-1)
    expected[torch.arange(32, device=DEVICE) >= lengths[..., None]] = float("-inf")
    out = torch.empty(2, 2, 32, device=DEVICE)
    for backend in (reference, triton):
        for rows, pages_of in ((keys, None), (pages, table)):
            backend.key_norm_scores(rows, lengths, out.fill_(7.0), pages_of)
            torch.testing.assert_close(out, expected)


def same(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("S, D, dtype", [(1200, 64, torch.bfloat16), (300, 128, torch.float32)], ids=name)
def test_the_same_bits_on_every_number_of_multiprocessors(S, D, dtype, monkeypatch):
    """Runs of another length, and a short row in one launch or two."""
    keys, _ = cache((1, 3, S, D, D), dtype)
    keys[0, 1, 17, 3], keys[0, 2, ::5] = float("nan"), 0.0
    found = []
    for count in (1, 2, 7, 108, 132):
        monkeypatch.setattr(score_keydiff, "multiprocessors", lambda device, count=count: count)
        with kvevict.backend("triton"):
            found.append(kvevict.keydiff_scores(keys))
    assert all(same(found[0], scores) for scores in found[1:])


@pytest.mark.parametrize("S, D, dtype", [(1200, 64, torch.bfloat16), (300, 128, torch.float32)], ids=name)
def test_sums_of_parts_are_those_of_the_whole(S, D, dtype):
    keys, _ = cache((2, 2, S, D, D), dtype)
    keys[0, 1, 17, 3], keys[1, 0, ::5], keys[1, 1] = float("inf"), 0.0, float("nan")
    lengths = torch.tensor([S, S - 70], device=DEVICE)
    for backend in ("reference", "triton"):
        with kvevict.backend(backend):
            whole = ops.anchor_sums(keys, lengths=lengths)
            assert whole[1].tolist() == [[S, S - 1], [S - 70, 0]]
            scores = kvevict.keydiff_scores(keys, lengths=lengths)
            anchor = ops.anchor_mean(*whole)
            assert same(kvevict.keydiff_scores(keys, anchor=anchor, lengths=lengths), scores)
            positions = torch.arange(S, device=DEVICE)
            total = [torch.zeros_like(x) for x in whole]
            for owner in (
                positions < 100,
                (positions >= 100) & (positions % 3 == 0),
                (positions >= 100) & (positions % 3 > 0),
            ):
                part = keys[:, :, owner]
                held = torch.stack([(positions[owner] < length).sum() for length in lengths])
                for sums, more in zip(total, ops.anchor_sums(part, lengths=held), strict=True):
                    sums += more
                own = kvevict.keydiff_scores(part, anchor=anchor, lengths=held)
                assert same(own, scores[:, :, owner])
            assert all(map(torch.equal, total, whole))


def test_sums_by_hand():
    """Each component to a multiple of 2⁻²²: 0.6, 0.8 and 1/√2."""
    keys = torch.tensor([[3.0, 4.0], [1.0, -1.0], [0.0, 0.0], [1e30, 0.0]], device=DEVICE).reshape(1, 1, 4, 2)
    half = round(2**21.5)
    expected = [round(0.6 * 2**22) + half + 2**22, round(0.8 * 2**22) - half]
    for sums, counts in both(lambda: ops.anchor_sums(keys)):
        assert counts.tolist() == [[4]]
        assert sums[0, 0].tolist() == pytest.approx(expected, abs=3)  # rsqrt is not rounded to the nearest everywhere


def test_more_tiles_than_an_int32_adds_up(monkeypatch):
    """Tiles of 4 keys: 550 of them in one run are 550 · 2²² in each of its int32s."""
    monkeypatch.setattr(score_keydiff, "multiprocessors", lambda device: 0)  # so there is one run
    keys = torch.zeros(1, 1, 2200, 512, device=DEVICE, dtype=torch.bfloat16)
    keys[..., 0] = 1.0
    keys[:, :, -200:, 0], keys[:, :, -200:, 1] = 0.0, 1.0  # the mean is (10, 1) / 11
    for scores in both(lambda: kvevict.keydiff_scores(keys)):
        expected = torch.where(torch.arange(2200, device=DEVICE) < 2000, -10 / 101**0.5, -1 / 101**0.5)
        torch.testing.assert_close(scores, expected.expand(1, 1, -1), rtol=0, atol=1e-5)
