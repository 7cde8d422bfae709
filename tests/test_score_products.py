"""Products of keys and values with matrices: both backends equal the formulas in float64."""

import pytest
import torch
from cases import both, cache, name
from conftest import DEVICE

import kvevict

SHAPES = [(2, 2, 130, 64, 64), (1, 1, 33, 80, 48), (1, 2, 1, 128, 128), (1, 1, 40, 320, 576), (1, 3, 20, 24, 8)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def symmetric(*shape):
    x = drawn(*shape, shape[-1])
    return x @ x.mT / shape[-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_quadratic_scores_equal_the_formula(shape, dtype):
    keys, _ = cache(shape, dtype, "BSHD")
    (B, H, S, D, _), G = shape, 3
    linear, quadratic = drawn(B, H * G, D), symmetric(B, H * G, D)
    k = keys.float().double().repeat_interleave(G, 1)
    exact = torch.einsum("bhsi,bhij,bhsj->bhs", k, quadratic.double(), k) + (k * linear[:, :, None]).sum(-1)
    for found in both(lambda: kvevict.quadratic_scores(keys, linear, quadratic)):
        assert found.dtype == torch.float32 and found.shape == (B, H * G, S)
        torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=2e-5 * D)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_projected_norms_equal_the_formula(shape, dtype):
    _, values = cache(shape, dtype, "sliced")
    (B, H, S, _, DV), G, M = shape, 2, 150
    weight = drawn(M, H * G * DV).to(torch.bfloat16 if dtype.itemsize == 1 else dtype)
    heads = weight.double().view(M, H, G, DV)
    exact = torch.einsum("bhsd,mhgd->bhgsm", values.float().double(), heads).abs().sum(-1).mean(2)
    for found in both(lambda: kvevict.projected_norms(values, weight)):
        assert found.dtype == torch.float32 and found.shape == (B, H, S)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_by_hand():
    keys = torch.tensor([[[[1.0, 2.0], [0.0, -1.0]]]], device=DEVICE)
    linear = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]], device=DEVICE)
    quadratic = torch.tensor([[[[2.0, 1.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]]], device=DEVICE)
    for found in both(lambda: kvevict.quadratic_scores(keys, linear, quadratic)):
        assert found.tolist() == [[[7.0, 0.0], [10.0, -2.0]]]  # 2 + 4 + 1, 0; 4 + 6, 1 - 3
    weight = torch.tensor([[1.0, -1.0, 0.0, 1.0], [0.0, 2.0, 1.0, 0.0], [3.0, 0.0, 0.0, 0.0]], device=DEVICE)
    for found in both(lambda: kvevict.projected_norms(keys, weight)):
        assert found.tolist() == [[[5.5, 2.0]]]  # (1 + 4 + 3 and 2 + 1 + 0) / 2, (1 + 2 + 0 and 1 + 0 + 0) / 2


@pytest.mark.parametrize("per_head", [False, True], ids=["request", "head"])
def test_ragged_rows_do_not_see_what_lies_beyond(per_head):
    keys, values = cache((2, 2, 70, 64, 64))
    lengths = torch.tensor([[1, 0], [70, 33]] if per_head else [5, 70], device=DEVICE)
    each = lengths if per_head else lengths[:, None].expand(2, 2)
    linear, quadratic, weight = drawn(2, 4, 64), symmetric(2, 4, 64), drawn(96, 4 * 64)
    whole = kvevict.quadratic_scores(keys, linear, quadratic), kvevict.projected_norms(values, weight)
    keys, values = keys.clone(), values.clone()
    for b in range(2):
        for h in range(2):
            keys[b, h, each[b, h] :] = values[b, h, each[b, h] :] = float("nan")
    for scores, norms in both(
        lambda: (kvevict.quadratic_scores(keys, linear, quadratic, lengths=lengths),
                 kvevict.projected_norms(values, weight, lengths=lengths))
    ):  # fmt: skip
        for found, expected, group in ((scores, whole[0], 2), (norms, whole[1], 1)):
            for b in range(2):
                for head in range(2 * group):
                    n = int(each[b, head // group])
                    torch.testing.assert_close(found[b, head, :n], expected[b, head, :n], rtol=1e-5, atol=1e-4)
                    assert (found[b, head, n:] == float("-inf")).all()


def test_what_is_not_finite_spoils_its_own_token_alone():
    keys, values = cache((1, 2, 40, 64, 64), torch.bfloat16)
    linear, quadratic, weight = drawn(1, 4, 64), symmetric(1, 4, 64), drawn(96, 4 * 64).bfloat16()
    keys[0, 1, 7, 3], values[0, 0, 9, 5] = float("nan"), float("nan")
    for scores, norms in both(
        lambda: (kvevict.quadratic_scores(keys, linear, quadratic), kvevict.projected_norms(values, weight))
    ):
        assert scores.isnan().nonzero().tolist() == [[0, 2, 7], [0, 3, 7]]
        assert norms.isnan().nonzero().tolist() == [[0, 0, 9]]


def test_wrong_arguments_are_named():
    keys, values = cache((2, 2, 10, 16, 24))
    linear, quadratic, weight = drawn(2, 4, 16), symmetric(2, 4, 16), drawn(30, 96)
    for change, message in [
        (dict(linear=linear[:1]), r"linear has shape \(1, 4, 16\): expected \(2, a multiple of 2, 16\)"),
        (dict(linear=linear[:, :3]), "linear has shape"),
        (dict(linear=linear.half()), "linear has dtype"),
        (dict(quadratic=quadratic[:, :2]), r"quadratic has shape .*expected \(2, 4, 16, 16\)"),
        (dict(lengths=torch.ones(3, device=DEVICE).int()), "lengths has shape"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            kvevict.quadratic_scores(**(dict(keys=keys, linear=linear, quadratic=quadratic) | change))
    for change, message in [
        (dict(weight=weight[:, :50]), r"weight has shape \(30, 50\): expected \(model width, a multiple of 48\)"),
        (dict(weight=weight.half()), "weight has dtype"),
        (dict(values=values[0]), "values has shape"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            kvevict.projected_norms(**(dict(values=values, weight=weight) | change))
