"""KeyDiff scores: the kernel equals the reference to float32 rounding, and both equal the formula."""

import pytest
import torch
from cases import both, cache, name
from conftest import DEVICE

import kvevict

SHAPES = [(2, 3, 517, 64, 64), (1, 2, 100, 80, 80), (1, 1, 1, 128, 128), (1, 2, 33, 96, 96), (1, 1, 70, 576, 512),
          (1, 2, 40, 112, 112), (1, 1, 2100, 192, 128), (1, 1, 60, 256, 256), (2, 2, 25, 5, 5)]  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def exact(keys, anchor):
    """The formula in float64."""
    keys = keys.to(torch.float32).double()
    norm = keys.norm(dim=-1, keepdim=True)
    if isinstance(anchor, str):
        mean = (keys / norm if anchor == "unit" else keys).mean(2, keepdim=True)
    else:
        mean = anchor.double()[:, :, None]
    return -(keys * mean).sum(-1) / (norm[..., 0] * mean.norm(dim=-1))


@pytest.mark.parametrize("anchor", ["unit", "raw", "given"])
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
    dense, strided = (cache((2, 2, 77, 64, 64), dtype, layout=which)[0] for which in ("BHSD", layout))
    for a, b in zip(*(both(lambda x=x: kvevict.keydiff_scores(x)) for x in (dense, strided)), strict=True):
        assert torch.equal(a, b)


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


def test_nan_key_spoils_only_its_head():
    keys, _ = cache((1, 2, 50, 64, 64))
    keys[0, 0, 7, 3] = float("nan")
    for scores in both(lambda: kvevict.keydiff_scores(keys)):
        assert scores[0, 0].isnan().all() and not scores[0, 1].isnan().any()


def test_same_input_same_bytes():
    keys, _ = cache((1, 4, 1500, 64, 64), torch.bfloat16)
    with kvevict.backend("triton"):
        assert torch.equal(kvevict.keydiff_scores(keys), kvevict.keydiff_scores(keys.clone()))
