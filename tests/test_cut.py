"""One cut of many requests in a paged cache, by any policy: as each request alone would be cut, in few launches."""

import pytest
import torch
from conftest import DEVICE
from launches import launches
from test_paged import D, H, Paged

import kvevict
from kvevict.paged import Cut, paged_compact, pages
from kvevict.policies import NAMED, RECOMMENDED, Hybrid, KeyNorm, LearnedKV, Observed

G = 3
KEEP = [40, 33, 1, 50]
SERVED = {name: policy for name, policy in NAMED.items() if policy.needs <= {"queries", "values"}}
SERVED["recommended"] = RECOMMENDED
SERVED["learned"] = Hybrid(
    parts=((1.0, LearnedKV(weights=torch.randn(1, H, 2 * D + 4), inv_freq=torch.rand(D // 2))),), heads="shared"
)


def observed(paged, policy, queries):
    seen = dict(lengths=paged.lengths, scale=0.3)
    if "queries" in policy.needs:
        seen["queries"] = queries
    return seen


def window(paged, W, seed=1):
    return torch.randn(len(paged.lengths), G * H, W, D, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def cut_of(paged, policy, keep=KEEP):
    kept = torch.tensor(keep, device=DEVICE)
    return Cut(paged.table, paged.lengths, kept, max(keep), paged.block_size, sink=1, recent=2, heads=policy.heads)


@pytest.mark.parametrize("name", sorted(SERVED.keys() - {"random"}))
def test_every_policy_cuts_each_request_as_it_would_alone(name):
    policy = SERVED[name]
    for backend in ("reference", "triton"):
        with kvevict.backend(backend):
            paged, before = Paged(16), Paged(16)
            queries = window(paged, max(1, min(policy.window, 33)))
            seen = Observed(keys=pages(paged.keys, paged.table), values=pages(paged.values, paged.table),
                            **observed(paged, policy, queries))  # fmt: skip
            cut, scores = cut_of(paged, policy), policy.scores(seen)
            indices = cut.select(scores).expand(-1, H, -1)
            cut.move(scores, paged.keys, paged.values)
            for b, (length, keep) in enumerate(zip(paged.lengths.tolist(), KEEP, strict=True)):
                if length < queries.shape[2]:
                    continue  # it has padding among its queries, which alone it would not
                keep = min(keep, length)
                dense = dict(keys=before.dense(before.keys, b), values=before.dense(before.values, b), scale=0.3)
                if "queries" in policy.needs:
                    dense["queries"] = queries[b : b + 1]
                scores = policy.scores(Observed(**dense))
                alone = kvevict.topk_indices(scores, keep, sink=min(1, keep), recent=min(2, keep - min(1, keep)),
                                             heads=policy.heads)  # fmt: skip
                assert torch.equal(indices[b, :, :keep], alone[0]) and (indices[b, :, keep:] == -1).all()
                for cache, old in ((paged.keys, dense["keys"]), (paged.values, dense["values"])):
                    rows = old.gather(2, alone[..., None].expand(-1, -1, -1, D))
                    assert torch.equal(paged.dense(cache, b)[:, :, length - keep :], rows)


def test_scores_of_one_head_are_all_heads_selection():
    for backend in ("reference", "triton"):
        with kvevict.backend(backend):
            paged, other = Paged(16), Paged(16)
            scores = torch.randn(4, 1, paged.S, generator=torch.Generator().manual_seed(2)).to(DEVICE)
            cut = cut_of(paged, RECOMMENDED)
            cut.move(scores, paged.keys, paged.values)
            indices = cut.select(scores).expand(-1, H, -1)
            paged_compact(other.keys, other.values, other.table, other.lengths, indices.contiguous(), to="tail")
            assert torch.equal(paged.memory, other.memory)
    with pytest.raises(ValueError, match="scores has shape"):
        cut_of(paged, KeyNorm()).move(scores, paged.keys, paged.values)


def test_pages_are_checked():
    paged = Paged(16)
    keys = pages(paged.keys, paged.table)
    assert keys.shape == (4, H, paged.S, D) and keys.device == paged.keys.device
    with pytest.raises(ValueError, match="cache has shape"):
        pages(paged.keys[0], paged.table)
    with pytest.raises(TypeError, match="values is Tensor: expected Pages"):
        kvevict.kv_scores(keys, paged.values, torch.zeros(H, 2 * D + 4), inv_freq=torch.ones(2), lengths=paged.lengths)
    with pytest.raises(TypeError, match="lengths is NoneType"):
        kvevict.keydiff_scores(keys)
    with pytest.raises(TypeError, match="keys is Pages"):
        kvevict.compact(keys, keys, torch.zeros(4, H, 1, dtype=torch.int64))
    for wrong, match in ((dict(most=0), "most is 0"), (dict(heads="adaptive"), "heads is 'adaptive'"),
                         (dict(keep=torch.zeros(3, dtype=torch.int64)), "keep has shape")):  # fmt: skip
        options = dict(keep=torch.ones(4, dtype=torch.int64), most=1, block_size=16) | wrong
        with pytest.raises(ValueError, match=match):
            Cut(paged.table, paged.lengths, **options)


@pytest.mark.skipif(DEVICE != "cpu", reason="counted in the interpreter")
@pytest.mark.parametrize("requests", [1, 8])
@pytest.mark.parametrize(("name", "most"), [("keydiff", 3), ("keynorm", 3), ("recommended", 6), ("snapkv", 5)])
def test_a_layer_costs_few_launches_however_many_requests(name, most, requests):
    few_launches(name, most, [80] * requests)


@pytest.mark.skipif(DEVICE != "cpu", reason="counted in the interpreter")
@pytest.mark.parametrize(("name", "most"), [("keydiff", 5), ("keynorm", 3), ("recommended", 8), ("snapkv", 5)])
def test_of_long_requests_as_well(name, most):
    """Whose keys are cut into runs, two for the LSE."""
    few_launches(name, most, [1100, 1024])


def few_launches(name, most, lengths):
    requests = len(lengths)
    policy, paged = SERVED[name], Paged(16, lengths=lengths)
    cut = cut_of(paged, policy, keep=[40] * requests)
    rows = torch.randn(requests * 40, G * H, D, device=DEVICE)
    table = torch.arange(requests * 40, device=DEVICE, dtype=torch.int32).view(requests, 40)
    table = table[:, -max(1, min(policy.window, 40)) :]

    def layer():
        queries = pages(rows[:, None], table) if "queries" in policy.needs else None
        seen = Observed(keys=pages(paged.keys, paged.table), values=pages(paged.values, paged.table),
                        **observed(paged, policy, queries))  # fmt: skip
        cut.move(policy.scores(seen), paged.keys, paged.values)

    layer()  # the first one checks tables and lengths for all
    with launches() as counted:
        layer()
    assert len(counted) <= most, counted
