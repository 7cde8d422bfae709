"""The small scorers and what is done with scores: key norms, the learned scorer, pooling, mixtures, slots to evict."""

import pytest
import torch
import torch.nn.functional as F
from cases import both, cache, name
from conftest import DEVICE, HAS_GPU
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvevict

INF, NAN = float("inf"), float("nan")


def row(values):
    return torch.tensor(values, device=DEVICE)[None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=name)
@pytest.mark.parametrize("shape", [(2, 3, 517, 64, 64), (1, 1, 70, 576, 512), (1, 2, 1, 80, 80)], ids=name)
def test_key_norms(shape, dtype):
    keys, _ = cache(shape, dtype, "BSHD")
    for scores in both(lambda: kvevict.key_norm_scores(keys)):
        torch.testing.assert_close(scores, -keys.to(torch.float32).norm(dim=-1), rtol=1e-6, atol=0)


def test_key_norms_of_ragged_rows():
    keys = torch.tensor([[3.0, 4.0], [0.0, 1.0], [NAN, 0.0]], device=DEVICE)[None, None]
    for scores in both(lambda: kvevict.key_norm_scores(keys, lengths=torch.tensor([2], device=DEVICE))):
        assert scores.tolist() == [[[-5.0, -1.0, -INF]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name)
@pytest.mark.parametrize("B, S, M, N", [(2, 70, 96, 50), (1, 1, 576, 288), (3, 40, 64, 1)])
def test_mlp_scores_are_two_linear_layers(B, S, M, N, dtype):
    torch.manual_seed(0)
    first, second = torch.nn.Linear(M, N).to(DEVICE, dtype), torch.nn.Linear(N, 1).to(DEVICE, dtype)
    parameters = [x.detach() for x in (first.weight, first.bias, second.weight, second.bias)]
    hidden = torch.randn(S, B, M, device=DEVICE).to(dtype).transpose(0, 1)
    exact = [x.double() for x in parameters]
    expected = torch.sigmoid(F.linear(F.relu(F.linear(hidden.double(), *exact[:2])), *exact[2:]))[..., 0]
    for scores in both(lambda: kvevict.mlp_scores(hidden, *parameters)):
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    flat = (*parameters[:2], parameters[2][0], parameters[3][0])
    assert torch.equal(kvevict.mlp_scores(hidden, *flat), kvevict.mlp_scores(hidden, *parameters))


def test_mlp_scores_name_what_is_wrong():
    h, w1, b1, w2, b2 = (torch.zeros(s, device=DEVICE) for s in ((1, 5, 8), (4, 8), (4,), (1, 4), (1,)))
    with pytest.raises(ValueError, match="w1"):
        kvevict.mlp_scores(h, w1[:, :7], b1, w2, b2)
    with pytest.raises(ValueError, match="w2"):
        kvevict.mlp_scores(h, w1, b1, w2[:, :3], b2)
    with pytest.raises(TypeError, match="b2"):
        kvevict.mlp_scores(h, w1, b1, w2, b2.half())
    with pytest.raises(TypeError, match="b1"):
        kvevict.mlp_scores(h, w1, None, w2, b2)


def test_pooling_by_hand():
    x = row([3.0, 0.0, 6.0, 0.0, 0.0, -3.0])
    for scores in both(lambda: kvevict.pool_scores(x, 3)):
        torch.testing.assert_close(scores, row([1.0, 3.0, 2.0, 2.0, -1.0, -1.0]))
    for scores in both(lambda: kvevict.pool_scores(x, 3, "max")):
        assert torch.equal(scores, row([3.0, 6.0, 6.0, 6.0, 0.0, 0.0]))
    x = row([3.0, -INF, 6.0, -1.0, NAN, 2.0])  # no token at 1
    for mode, expected in (("avg", [1.0, -INF, 5 / 3, NAN, NAN, NAN]), ("max", [3.0, -INF, 6.0, NAN, NAN, NAN])):
        for scores in both(lambda m=mode: kvevict.pool_scores(x, 3, m)):
            torch.testing.assert_close(scores, row(expected), equal_nan=True)
    for window, ends, expected in ((2, None, [1.0, 3.0, 2.0, 2.0, -INF, -INF]), (9, None, [-INF] * 6),
                                   (2, [5], [1.0, 3.0, 2.0, -INF, -INF, -INF])):  # fmt: skip
        x = row([3.0, 0.0, 6.0, 0.0, 0.0, -3.0])
        lengths = None if ends is None else torch.tensor(ends, device=DEVICE)
        for scores in both(lambda x=x, w=window, n=lengths: kvevict.pool_scores(x, 3, window=w, lengths=n)):
            torch.testing.assert_close(scores, row(expected))
    for scores in both(lambda: kvevict.pool_scores(x, 3, "max", window=2)):
        assert torch.equal(scores, row([3.0, 6.0, 6.0, 6.0, -INF, -INF]))
    for size in (1, 5, 99):
        x = torch.randn(2, 2, 1300, device=DEVICE)
        a, b = both(lambda s=size, x=x: kvevict.pool_scores(x, s))
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="kernel_size is 4"):
        kvevict.pool_scores(x, 4)
    with pytest.raises(ValueError, match="mode"):
        kvevict.pool_scores(x, 3, "median")
    with pytest.raises(ValueError, match="window is -1"):
        kvevict.pool_scores(x, 3, window=-1)


def test_combining_by_hand():
    a, b = row([1.0, 2.0, 4.0, 2.0]), row([-100.0, 300.0, 100.0, -100.0])
    combined = kvevict.combine_scores([(1, a), (2.0, b)])
    torch.testing.assert_close(combined, row([0 + 1 / 3, 0.5 + 2, 1 + 4 / 3, 0.5 + 1 / 3]))
    combined = kvevict.combine_scores([(1, a), (2.0, b)], scale="minmax")
    torch.testing.assert_close(combined, row([0.0, 1 / 3 + 2, 2.0, 1 / 3]))
    combined = kvevict.combine_scores([(1, a), (2.0, b)], scale="l2")
    torch.testing.assert_close(combined, a / 5 + 2 * b / 120000**0.5)
    assert kvevict.combine_scores([(1, row([7.0, 7.0]))], scale="minmax").tolist() == [[[0, 0]]]
    assert kvevict.combine_scores([(1, row([7.0]))]).tolist() == [[[0]]]


def test_combining_infinite_and_extreme_scores_by_hand():
    x = row([1.0, INF, 3.0, -INF, 2.0])
    for scale, expected in (
        ("rank", [0.0, 1.0, 2 / 3, -INF, 1 / 3]), ("minmax", [0.0, 1.0, 1.0, -INF, 0.5]),
        ("l2", [1 / 23**0.5, 3 / 23**0.5, 3 / 23**0.5, -INF, 2 / 23**0.5]),
    ):  # fmt: skip
        torch.testing.assert_close(kvevict.combine_scores([(1, x)], scale=scale), row(expected))
        for alone, value in ((INF, 0.5 if scale == "rank" else 0.0), (0.0, 0.5 if scale == "rank" else 0.0)):
            combined = kvevict.combine_scores([(1, row([alone, alone, -INF]))], scale=scale)
            assert combined.tolist() == [[[value, value, -INF]]]
    for size in (1e-40, 1e-20, 1.0, 1e20, 1e38):
        combined = kvevict.combine_scores([(1, row([3.0, 0.0, -3.0]) * size)], scale="l2")
        torch.testing.assert_close(combined, row([0.5**0.5, 0.0, -(0.5**0.5)]))
        combined = kvevict.combine_scores([(1, row([3.0, 0.0, -3.0]) * size)], scale="minmax")
        torch.testing.assert_close(combined, row([1.0, 0.5, 0.0]))


@pytest.mark.parametrize("scale", ["rank", "minmax", "l2"])
def test_combining_leaves_out_what_is_no_token(scale):
    x = torch.randn(1, 2, 40, device=DEVICE)
    padded = torch.cat([x, torch.full((1, 2, 9), -INF, device=DEVICE)], -1)
    combined = kvevict.combine_scores([(0.3, padded), (-0.7, padded.exp() if scale == "l2" else padded)], scale=scale)
    alone = kvevict.combine_scores([(0.3, x), (-0.7, x.exp() if scale == "l2" else x)], scale=scale)
    torch.testing.assert_close(combined[:, :, :40], alone)
    assert (combined[:, :, 40:] == -INF).all()
    padded[0, 0, 3] = NAN
    combined = kvevict.combine_scores([(1, padded)], scale=scale)
    others = padded[:, :1, [i for i in range(40) if i != 3]]
    assert combined[0, 0, 3].isnan() and combined.isnan().sum() == 1
    got = combined[:, :1, [i for i in range(40) if i != 3]]
    torch.testing.assert_close(got, kvevict.combine_scores([(1, others)], scale=scale))


def test_combining_names_what_is_wrong():
    x = torch.zeros(1, 1, 4, device=DEVICE)
    for parts, match in [
        ([], "parts"), ([(1, x), (1, x[..., :3].contiguous())], r"parts\[1\] scores"), ([("1", x)], "weight"),
        ([(NAN, x)], "weight"), ([(1, x.half())], r"parts\[0\] scores"), ("ab", r"parts\[0\] is str"),
        ([1.0], r"parts\[0\] is float: expected a pair"), ([(1, x), (1, x, 2)], r"parts\[1\] is tuple"),
    ]:  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=match):
            kvevict.combine_scores(parts)
    with pytest.raises(ValueError, match="scale"):
        kvevict.combine_scores([(1, x)], scale="softmax")


def worst(values, count, **options):
    reference, kernel = both(lambda: kvevict.evict_slots(row(values), count, **options))
    assert torch.equal(reference, kernel)
    return kernel[0, 0].tolist()


def test_slots_to_evict_by_hand():
    assert worst([5.0, 1.0, 3.0, 2.0], 2) == [1, 3]
    assert worst([1.0, 1.0, 1.0], 1) == [2]  # of ties the higher index goes
    assert worst([0.0, -0.0, 0.0], 2) == [1, 2]
    assert worst([-INF, 2.0, NAN, 1.0], 1) == [2]
    assert worst([-INF, 2.0, NAN, 1.0], 2) == [0, 2]
    assert worst([-INF, 2.0, 7.0, NAN], 1, sink=1, recent=1) == [1]
    lengths = torch.tensor([3], device=DEVICE)
    assert worst([4.0, 5.0, 6.0, 0.0, 0.0], 2, sink=1, recent=1, lengths=lengths) == [1, -1]
    with pytest.raises(ValueError, match="count is 3"):
        kvevict.evict_slots(row([1.0, 2.0, 3.0, 4.0]), 3, sink=1, recent=1)
    with pytest.raises(ValueError, match="count is 0"):
        kvevict.evict_slots(row([1.0]), 0)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_slots_to_evict_are_what_topk_leaves_out(data):
    S = data.draw(st.integers(2, 60))
    values = data.draw(st.lists(st.sampled_from([0.0, -0.0, 1.0, -2.5, INF, -INF, NAN]), min_size=S, max_size=S))
    count = data.draw(st.integers(1, S - 1))
    sink = data.draw(st.integers(0, S - count))
    recent = data.draw(st.integers(0, S - count - sink))
    kept = kvevict.topk_indices(row(values), S - count, sink=sink, recent=recent)[0, 0].tolist()
    assert sorted(kept + worst(values, count, sink=sink, recent=recent)) == list(range(S))


@pytest.mark.parametrize("S", [9000, pytest.param(20000, marks=pytest.mark.slow)])
def test_slots_of_rows_split_over_programs(S):
    for scores in (torch.randn(1, 2, S, device=DEVICE), torch.randn(1, 2, S, device=DEVICE).round()):
        scores[0, 0, 5000] = NAN
        for count, sink, recent in [(1, 0, 0), (300, 4, 32), (S // 4, 5000, 1000)]:
            options = dict(sink=sink, recent=recent)
            a, b = both(lambda c=count, o=options, s=scores: kvevict.evict_slots(s, c, **o))
            assert torch.equal(a, b)


@pytest.mark.skipif(HAS_GPU, reason="asserted on the device, which ends the process's use of it")
def test_lengths_beyond_the_row():
    for function in (
        kvevict.key_norm_scores,
        lambda x, lengths: kvevict.evict_slots(x[..., 0].contiguous(), lengths=lengths),
    ):
        with pytest.raises(ValueError, match="lengths"):
            function(torch.zeros(1, 1, 4, 8), lengths=torch.tensor([5]))
