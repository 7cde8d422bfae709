"""decode_attention: the output of scaled_dot_product_attention, and a true account of what each token was used for."""

import pytest
import torch
import torch.nn.functional as F
from cases import both, cache, crossed, name
from conftest import DEVICE, HAS_GPU

import kvevict
from kvevict.paged import paged_decode_attention

SHAPES = [(2, 2, 70, 64, 64), (1, 2, 1300, 64, 32), (1, 1, 300, 80, 80), (1, 1, 100, 576, 512), (1, 1, 1, 128, 128)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def query(shape, G, dtype, seed=5):
    B, H, _, D, _ = shape
    return cache((B, H * G, 1, D, D), dtype, seed=seed)[0]


def dense(q, k, v):
    """(output [B, Hq, 1, Dv], weights averaged over the group [B, H, S]) in float64."""
    B, HQ, _, D = q.shape
    H = k.shape[1]
    q, k, v = (x.to(torch.float32).double() for x in (q, k, v))
    w = (q.view(B, H, HQ // H, D) @ k.transpose(-1, -2) / D**0.5).softmax(-1)
    return (w @ v).view(B, HQ, 1, -1), w.mean(2)


@pytest.mark.parametrize("shape, dtype, G", crossed(SHAPES, DTYPES, [4, 1, 20]))
def test_equals_attention_written_out(shape, dtype, G):
    keys, values = cache(shape, dtype)
    q = query(shape, G, dtype)
    expected, weight = dense(q, keys, values)
    resolution = {torch.float32: 1e-6, torch.float16: 1e-3}.get(dtype, 8e-3)

    def run():
        mass = torch.full(keys.shape[:3], 2.0, device=DEVICE)
        used = torch.full(keys.shape[:3], -1, dtype=torch.int32, device=DEVICE)
        return kvevict.decode_attention(q, keys, values, mass=mass, decay=0.5, last_used=used, step=7), mass, used

    for out, mass, used in both(run):
        assert out.shape == expected.shape
        assert out.dtype == (torch.bfloat16 if dtype.itemsize == 1 else dtype)
        torch.testing.assert_close(out.double(), expected, rtol=2 * resolution, atol=2 * resolution)
        torch.testing.assert_close(mass.double(), 1 + weight, rtol=1e-5, atol=0)
        clear = (weight - 1e-3).abs() > 1e-6
        assert torch.equal((used == 7)[clear], (weight >= 1e-3)[clear]) and ((used == 7) | (used == -1)).all()


def test_equals_sdpa_through_strides():
    keys, values = cache((2, 2, 90, 64, 64), torch.bfloat16, "BSHD")
    q = cache((2, 6, 1, 64, 64), torch.bfloat16, "BSHD", seed=3)[0]
    expected = F.scaled_dot_product_attention(q.float(), keys.float(), values.float(), enable_gqa=True)
    for out in both(lambda: kvevict.decode_attention(q, keys, values)):
        torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)


def test_only_tokens_of_the_request_are_touched():
    keys, values = cache((3, 2, 600, 32, 32))
    q = query((3, 2, 600, 32, 32), 2, torch.float32)
    lengths = torch.tensor([600, 1, 257], device=DEVICE)
    for b, length in enumerate(lengths.tolist()):
        keys[b, :, length:], values[b, :, length:] = float("nan"), float("nan")

    def run():
        mass = torch.ones(3, 2, 600, device=DEVICE)
        used = torch.full((3, 2, 600), -1, dtype=torch.int32, device=DEVICE)
        out = kvevict.decode_attention(
            q, keys, values, lengths=lengths, mass=mass, last_used=used, step=3, threshold=0.0
        )
        return out, mass, used

    for out, mass, used in both(run):
        for b, length in enumerate(lengths.tolist()):
            expected, weight = dense(q[b : b + 1], keys[b : b + 1, :, :length], values[b : b + 1, :, :length])
            torch.testing.assert_close(out[b : b + 1].double(), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(mass[b : b + 1, :, :length].double(), 1 + weight, rtol=1e-5, atol=0)
            assert (mass[b, :, length:] == 1).all() and (used[b, :, length:] == -1).all()
            assert (used[b, :, :length] == 3).all()


def test_tracking_one_of_the_two():
    keys, values = cache((1, 2, 40, 16, 16))
    q = query((1, 2, 40, 16, 16), 2, torch.float32)
    storage = torch.ones(1, 2, 50, device=DEVICE)
    for backend in ("reference", "triton"):
        with kvevict.backend(backend):
            plain = kvevict.decode_attention(q, keys, values)
            storage.fill_(1)
            assert torch.equal(kvevict.decode_attention(q, keys, values, mass=storage[:, :, :40]), plain)
            assert (storage[:, :, 40:] == 1).all() and (storage[:, :, :40] > 1).all()
            used = torch.zeros(1, 2, 40, dtype=torch.int32, device=DEVICE)
            kvevict.decode_attention(q, keys, values, last_used=used, step=9, threshold=0.05)
            assert 0 < (used == 9).sum() < 80


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_200_steps(backend):
    """A growing cache in a fixed buffer: output, accumulated mass and the LRU victims of every step."""
    B, H, G, D, start, steps = 2, 2, 3, 16, 40, 200 if backend == "reference" else 40
    capacity = start + steps
    keys, values = cache((B, H, capacity, D, D), torch.float32)
    queries = cache((B, H * G, steps, D, D), torch.float32, seed=9)[0] * 2
    mass = torch.zeros(B, H, capacity, device=DEVICE)
    used = torch.full((B, H, capacity), -1, dtype=torch.int32, device=DEVICE)
    lengths = torch.full((B,), start, dtype=torch.int32, device=DEVICE)
    expected_mass = torch.zeros(B, H, capacity, dtype=torch.float64, device=DEVICE)
    last_used = [[{} for _ in range(H)] for _ in range(B)]  # plain Python: token -> step
    with kvevict.backend(backend):
        for step in range(steps):
            lengths += 1
            n = start + step + 1
            q = queries[:, :, step : step + 1]
            out = kvevict.decode_attention(
                q, keys, values, lengths=lengths, mass=mass, decay=0.99, last_used=used, step=step, threshold=0.02
            )
            expected, weight = dense(q, keys[:, :, :n], values[:, :, :n])
            torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
            expected_mass *= 0.99
            expected_mass[:, :, :n] += weight
            for b in range(B):
                for h in range(H):
                    for token in (weight[b, h] >= 0.02).nonzero().flatten().tolist():
                        last_used[b][h][token] = step
            if step % 20 == 19:
                recency = torch.where(used >= 0, used, torch.arange(capacity, device=DEVICE) - capacity).float()
                victims = kvevict.evict_slots(recency, 5, lengths=lengths)
                for b in range(B):
                    for h in range(H):
                        known = last_used[b][h]  # never used: the oldest first; equal steps: the later token first
                        order = sorted(range(n), key=lambda t, k=known: (k.get(t, -1), -t if t in k else t))
                        assert victims[b, h].tolist() == sorted(order[:5])
    torch.testing.assert_close(mass.double(), expected_mass, rtol=1e-5, atol=1e-7)


def chunk(q, k, v, lengths):
    """(out, LSE, weights averaged over the group [B, H, W, S]) of the last W queries in float64, row by row."""
    (B, HQ, W, D), (H, S), G = q.shape, k.shape[1:3], q.shape[1] // k.shape[1]
    q, k, v = (x.to(torch.float32).double() for x in (q, k, v))
    out = torch.zeros(B, HQ, W, v.shape[3], dtype=torch.float64, device=q.device)
    lse = torch.full((B, HQ, W), float("-inf"), dtype=torch.float64, device=q.device)
    weights = torch.zeros(B, H, W, S, dtype=torch.float64, device=q.device)
    for b in range(B):
        for head in range(HQ):
            h, length = head // G, lengths[b][head // G]
            for w in range(min(W, length)):
                seen = max(length - W, 0) + w + 1
                logits = k[b, h, :seen] @ q[b, head, w] / D**0.5
                lse[b, head, w] = logits.logsumexp(0)
                weight = (logits - lse[b, head, w]).exp()
                out[b, head, w] = weight @ v[b, h, :seen]
                weights[b, h, w, :seen] += weight / G
    return out, lse, weights


@pytest.mark.parametrize("W, lengths, dtype", crossed(
    [5, 1, 2, 64], [[[70, 0], [9, 33]], [[70, 70], [70, 70]], [[70, 70], [4, 4]]], [torch.float32, torch.bfloat16]
))  # fmt: skip
def test_a_chunk_of_queries_is_causal_among_itself(W, lengths, dtype):
    shape = (2, 2, 70, 16, 24)
    keys, values = cache(shape, dtype)
    q = cache((2, 6, W, 16, 16), dtype, "BSHD", seed=5)[0]
    given = torch.tensor(lengths, device=DEVICE)
    for b, row in enumerate(lengths):
        for h, length in enumerate(row):
            keys[b, h, length:], values[b, h, length:] = float("nan"), float("nan")
    if all(row[0] == row[1] for row in lengths):
        given = None if lengths == [[70, 70], [70, 70]] else given[:, 0]
    expected, lse, weights = chunk(q, keys.nan_to_num(), values.nan_to_num(), lengths)
    resolution = 1e-6 if dtype == torch.float32 else 8e-3

    def run():
        mass = torch.full(keys.shape[:3], 2.0, device=DEVICE)
        used = torch.full(keys.shape[:3], -1, dtype=torch.int32, device=DEVICE)
        out = kvevict.decode_attention(q, keys, values, lengths=given, mass=mass, decay=0.5, last_used=used, step=7,
                                       threshold=0.1, return_lse=True)  # fmt: skip
        return *out, mass, used

    inside = torch.arange(70, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[..., None]
    for out, found, mass, used in both(run):
        torch.testing.assert_close(out.double(), expected, rtol=2 * resolution, atol=2 * resolution)
        torch.testing.assert_close(found.double(), lse, rtol=1e-5, atol=1e-5)
        drawn = torch.where(inside, 1 + weights.sum(2), 2.0)
        torch.testing.assert_close(mass.double(), drawn, rtol=1e-5, atol=0)
        most = weights.amax(2)
        clear = ((most - 0.1).abs() > 1e-5) & inside
        assert torch.equal((used == 7)[clear], (most >= 0.1)[clear]) and (used[~inside] == -1).all()


@pytest.mark.parametrize(
    "W, lengths",
    [(1, [[70, 0], [9, 33]]), (2, [[1, 64], [0, 0]]), (7, [[70, 0], [9, 33]]), (64, [[70]])],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_pages_of_unequal_heads_under_a_group_of_many_queries(W, lengths, dtype):
    """All of W queries see every cached token of their head: they are one group, [B, H·G·W, 1, D]."""
    B, H, G, D, DV, size, columns = len(lengths), len(lengths[0]), 3, 16, 24, 8, 10
    generator = torch.Generator().manual_seed(W)
    order = torch.randperm(B * H * columns, generator=generator).view(B, H, columns).int().to(DEVICE)
    held = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    used = torch.arange(columns, device=DEVICE) * size < held[..., None]
    table = torch.where(used, order, -1)
    keys, values = (torch.full((B * H * columns, size, 1, width), float("nan"), device=DEVICE) for width in (D, DV))
    keys, values = keys.to(dtype), values.to(dtype)
    q = cache((B, H, G * W, D, D), dtype, seed=3)[0]
    expected = torch.zeros(B, H, G * W, DV, dtype=torch.float64, device=DEVICE)
    lse = torch.full((B, H, G * W), float("-inf"), dtype=torch.float64, device=DEVICE)
    for b in range(B):
        for h in range(H):
            length = lengths[b][h]
            k, v = (torch.randn(length, width, generator=generator).to(DEVICE).to(dtype) for width in (D, DV))
            for token in range(length):
                keys[order[b, h, token // size], token % size, 0] = k[token]
                values[order[b, h, token // size], token % size, 0] = v[token]
            if length:
                logits = q[b, h].double() @ k.double().T / D**0.5
                lse[b, h] = logits.logsumexp(-1)
                expected[b, h] = logits.softmax(-1) @ v.double()
    resolution = 1e-6 if dtype == torch.float32 else 8e-3
    folded = q.view(B, H * G * W, 1, D)
    for out, found in both(lambda: paged_decode_attention(folded, keys, values, table, held, return_lse=True)):
        out, found = out.view(B, H, G * W, DV).double(), found.view(B, H, G * W).double()
        torch.testing.assert_close(out, expected, rtol=2 * resolution, atol=2 * resolution)
        torch.testing.assert_close(found, lse, rtol=1e-5, atol=1e-5)
        assert not out[held == 0].any() and (found[held == 0] == float("-inf")).all()


def test_parts_of_a_cache_add_up_under_the_lse_of_all():
    keys, values = cache((1, 2, 600, 16, 16))
    q = query((1, 2, 600, 16, 16), 2, torch.float32)
    for backend in ("reference", "triton"):
        with kvevict.backend(backend):
            whole, lse = kvevict.decode_attention(q, keys, values, return_lse=True)
            lse = lse.transpose(0, 1).contiguous().transpose(0, 1)
            mass = torch.zeros(1, 2, 600, device=DEVICE)
            parts = [
                kvevict.decode_attention(q, keys[:, :, run], values[:, :, run], lse=lse, mass=mass[:, :, run])
                for run in (slice(0, 350), slice(350, 600))
            ]
            torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(mass.sum(-1), torch.ones(1, 2, device=DEVICE), rtol=1e-5, atol=0)


BAD = {
    "queries too many": dict(queries=torch.randn(1, 2, 11, 16)),
    "lse shape": dict(lse=torch.randn(1, 2, 2)),
    "return_lse text": dict(return_lse="yes"),
    "mass shape": dict(mass=torch.zeros(1, 2, 9)),
    "mass dtype": dict(mass=torch.zeros(1, 2, 10).half()),
    "mass shares memory": dict(mass=torch.zeros(1, 1, 10).expand(1, 2, 10)),
    "last_used dtype": dict(last_used=torch.zeros(1, 2, 10), step=1),
    "step missing": dict(last_used=torch.zeros(1, 2, 10, dtype=torch.int32)),
    "step -1": dict(step=-1),
    "decay 2": dict(decay=2.0),
    "threshold text": dict(threshold="1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_nothing_is_written(case):
    arguments = dict(queries=torch.randn(1, 2, 1, 16), keys=torch.randn(1, 2, 10, 16), values=torch.randn(1, 2, 10, 16),
                     mass=torch.zeros(1, 2, 10)) | BAD[case]  # fmt: skip
    if HAS_GPU and case == "mass shares memory":
        arguments["mass"] = torch.zeros(1, 1, 10, device=DEVICE).expand(1, 2, 10)
    arguments = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    for backend in ("reference", "triton"):
        with kvevict.backend(backend), pytest.raises((TypeError, ValueError), match=case.split()[0]):
            kvevict.decode_attention(**arguments)
    assert (arguments["mass"] == 0).all()


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_torch_compile_traces_it_whole(dynamic):
    def step(q, keys, values, mass, lengths):
        out = kvevict.decode_attention(q, keys, values, lengths=lengths, mass=mass, decay=0.9)
        scores = kvevict.combine_scores([(0.5, kvevict.attention_mass(q, keys, lengths=lengths)), (0.5, mass)])
        return out, kvevict.evict_slots(kvevict.pool_scores(scores, 3), 2, lengths=lengths)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for S in (40, 56):
        keys, values = cache((2, 2, S, 16, 16), seed=S)
        q = query((2, 2, S, 16, 16), 2, torch.float32)
        lengths = torch.tensor([S, 9], device=DEVICE)
        masses = [torch.rand(2, 2, S, generator=torch.Generator().manual_seed(1)).to(DEVICE) for _ in range(2)]
        expected, got = step(q, keys, values, masses[0], lengths), compiled(q, keys, values, masses[1], lengths)
        assert all(torch.equal(a, b) for a, b in zip((*expected, masses[0]), (*got, masses[1]), strict=True))


@pytest.mark.gpu
def test_cuda_graph():
    keys, values = cache((1, 8, 5000, 128, 128), torch.bfloat16)
    q = query((1, 8, 5000, 128, 128), 4, torch.bfloat16)
    mass = torch.zeros(1, 8, 5000, device=DEVICE)
    expected = kvevict.decode_attention(q, keys, values, mass=mass)
    once = mass.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kvevict.decode_attention(q, keys, values, mass=mass)
    mass.zero_(), out.zero_()
    graph.replay()
    assert torch.equal(out, expected) and torch.equal(mass, once)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_mass_and_last_used_may_lie_differently(backend):
    """A mass that is a slice of a larger buffer, beside a last_used that is not, and the other way round."""
    keys, values = cache((2, 2, 20, 16, 16))
    q = query((2, 2, 20, 16, 16), 2, torch.float32)
    results = []
    for wide_mass, wide_used in ((False, False), (True, False), (False, True)):
        mass = torch.zeros(2, 2, 50 if wide_mass else 20, device=DEVICE)
        used = torch.full((2, 2, 70 if wide_used else 20), -1, dtype=torch.int32, device=DEVICE)
        with kvevict.backend(backend):
            kvevict.decode_attention(
                q, keys, values, mass=mass[..., :20], last_used=used[..., :20], step=7, threshold=0.05
            )
        assert (mass[..., 20:] == 0).all() and (used[..., 20:] == -1).all()
        results.append((mass[..., :20], used[..., :20]))
    assert (results[0][1] == 7).any() and (results[0][1] == -1).any()
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
