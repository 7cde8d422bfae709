"""The public ops: end to end, bad input, torch.compile, custom-op checks, backends, the traps of the field."""

import inspect
import os
import shutil
import subprocess
import sys

import pytest
import torch
from cases import assert_same, both, cache, copy_of, name
from conftest import DEVICE, HAS_GPU

import kvevict
from bench.traffic import counted
from kvevict import validate
from kvevict.ops import keydiff_compact


@pytest.mark.parametrize("preserve_order", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("heads", ["each", "shared"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=name)
def test_keydiff_compact_is_its_three_stages(dtype, ragged, heads, inplace, preserve_order):
    keys, values = cache((2, 3, 130, 64, 32), dtype, "BSHD")
    lengths = torch.tensor([130, 61], device=DEVICE) if ragged else None
    options = dict(inplace=inplace, preserve_order=preserve_order)
    for backend in ("reference", "triton"):
        with kvevict.backend(backend):
            scores = kvevict.keydiff_scores(keys, lengths=lengths)
            indices = kvevict.topk_indices(scores, 0.4, sink=4, recent=8, heads=heads, lengths=lengths)
            expected = kvevict.compact(copy_of(keys), copy_of(values), indices, **options)
            if ragged:
                expected = expected._replace(lengths=torch.tensor([52, 24], device=DEVICE))
            got = keydiff_compact(copy_of(keys), copy_of(values), keep=0.4, sink=4, recent=8, heads=heads,
                                  lengths=lengths, **options)  # fmt: skip
            assert_same(got, expected)


def test_untouched_requests_stay():
    keys, values = cache((3, 2, 50, 16, 16))
    lengths = torch.tensor([50, 5, 50], device=DEVICE)
    before = keys.clone()
    for result in both(lambda: keydiff_compact(keys.clone(), values.clone(), keep=20, lengths=lengths)):
        assert torch.equal(result.keys[1, :, :20], before[1, :, :20])  # shorter than keep: nothing moves
        assert result.lengths.tolist() == [20, 5, 20]


NOT_CONTIGUOUS = torch.randn(1, 2, 10, 16).transpose(2, 3)
BAD = {
    "keys rank": dict(keys=torch.randn(2, 10, 16)),
    "keys empty": dict(keys=torch.randn(1, 2, 0, 16), values=torch.randn(1, 2, 0, 16)),
    "keys int": dict(keys=torch.ones(1, 2, 10, 16, dtype=torch.int64)),
    "keys list": dict(keys=[1.0]),
    "keys grad": dict(keys=torch.randn(1, 2, 10, 16, requires_grad=True)),
    "keys strides": dict(keys=NOT_CONTIGUOUS.expand(1, 2, 16, 10), values=torch.randn(1, 2, 16, 10)),
    "keys expanded": dict(keys=torch.randn(1, 1, 10, 16).expand(1, 2, 10, 16)),
    "values expanded": dict(values=torch.randn(1, 1, 10, 16).expand(1, 2, 10, 16)),
    "values shape": dict(values=torch.randn(1, 2, 9, 16)),
    "values dtype": dict(values=torch.randn(1, 2, 10, 16).half()),
    "values device": dict(values=torch.empty(1, 2, 10, 16, device="meta")),
    "keep 0": dict(keep=0),
    "keep 0.0": dict(keep=0.0),
    "keep -1": dict(keep=-1),
    "keep nan": dict(keep=float("nan")),
    "keep 1.5": dict(keep=1.5),
    "keep 11": dict(keep=11),
    "keep True": dict(keep=True),
    "keep text": dict(keep="half"),
    "sink 6": dict(sink=3, recent=3),
    "sink -1": dict(sink=-1),
    "recent float": dict(recent=1.0),
    "heads all": dict(heads="all"),
    "anchor mean": dict(anchor="mean"),
    "anchor shape": dict(anchor=torch.randn(1, 2, 8)),
    "lengths 0": dict(lengths=torch.tensor([0])),
    "lengths 11": dict(lengths=torch.tensor([11])),
    "lengths shape": dict(lengths=torch.tensor([5, 5])),
    "lengths dtype": dict(lengths=torch.tensor([5.0])),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_bad_input_is_named_and_nothing_is_written(case, backend):
    if HAS_GPU and case in ("lengths 0", "lengths 11"):
        pytest.skip("asserted on the device, which ends the process's use of it")
    arguments = dict(keys=torch.randn(1, 2, 10, 16), values=torch.randn(1, 2, 10, 16), keep=0.5) | BAD[case]
    if HAS_GPU:
        move = {k: v.to(DEVICE) for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.device.type == "cpu"}
        if case == "keys grad":
            move["keys"] = move["keys"].detach().requires_grad_()
        if case in ("keys expanded", "values expanded"):
            move[case.split()[0]] = torch.randn(1, 1, 10, 16, device=DEVICE).expand(1, 2, 10, 16)
        arguments |= move
    writable = [t for t in (arguments["keys"], arguments["values"]) if isinstance(t, torch.Tensor) and not t.is_meta]
    before = [t.detach().clone() for t in writable]
    with kvevict.backend(backend), pytest.raises((TypeError, ValueError), match=case.split()[0]):
        keydiff_compact(arguments.pop("keys"), arguments.pop("values"), **arguments)
    assert all(torch.equal(a, b) for a, b in zip(before, writable, strict=True))


@pytest.mark.skipif(HAS_GPU, reason="asserted on the device, which ends the process's use of it")
@pytest.mark.parametrize("row", [[3, 1], [1, 1], [0, 10], [-1, 2], [-2, 0]], ids=str)
def test_indices_must_ascend_within_the_row(row):
    keys, values = cache((1, 1, 10, 16, 16))
    before = keys.clone()
    for options in (dict(), dict(inplace=False), dict(preserve_order=False)):
        with pytest.raises(ValueError, match="indices"):
            kvevict.compact(keys, values, torch.tensor([[row]]), **options)
    assert torch.equal(keys, before)


def strided(x, dim=0):
    """The same values in memory of another order: no stride is 1 but by chance."""
    wide = torch.empty(*x.shape, 3, dtype=x.dtype, device=x.device)
    wide[..., 1] = x
    return wide[..., 1]


def test_small_arguments_may_have_any_strides():
    keys, values = cache((2, 3, 30, 16, 8))
    indices = torch.stack([torch.randperm(30)[:12].sort()[0] for _ in range(6)]).view(2, 3, 12).to(DEVICE)
    for options in (dict(), dict(inplace=False), dict(preserve_order=False)):
        for expected, got in (
            both(lambda i=i, o=options: kvevict.compact(copy_of(keys), copy_of(values), i, **o))
            for i in (indices, strided(indices), indices.permute(2, 0, 1).contiguous().permute(1, 2, 0))
        ):
            assert_same(got, expected)
            if options.get("preserve_order", True):
                assert torch.equal(expected.keys, keys.gather(2, indices[..., None].expand(-1, -1, -1, 16)))
    hidden, w1, b1, w2, b2 = (torch.randn(*shape, device=DEVICE) for shape in ((2, 9, 16), (8, 16), (8,), (8,), (1,)))
    expected = torch.sigmoid(torch.relu(hidden @ w1.T + b1) @ w2 + b2)
    for got in both(lambda: kvevict.mlp_scores(hidden, strided(w1), strided(b1), strided(w2), strided(b2))):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    lengths = torch.tensor([30, 7], device=DEVICE)
    expected, got = both(lambda: kvevict.keydiff_scores(keys, lengths=strided(lengths)))
    torch.testing.assert_close(got, expected)
    assert (expected[1, :, 7:] == float("-inf")).all() and expected[1, :, :7].isfinite().all()


def test_flags_and_sizes_are_checked():
    keys, values = cache((1, 2, 10, 16, 16))
    queries, scores = torch.randn(1, 4, 1, 16, device=DEVICE), torch.randn(1, 2, 10, device=DEVICE)
    used = torch.zeros(1, 2, 10, dtype=torch.int32, device=DEVICE)
    for call, message in (
        (lambda: keydiff_compact(keys, values, keep=4, inplace="no"), "inplace is 'no'"),
        (lambda: keydiff_compact(keys, values, keep=4, preserve_order=1), "preserve_order is 1"),
        (lambda: kvevict.attention_mass(queries, keys, causal="x"), "causal is 'x'"),
        (lambda: kvevict.attention_lse(queries, keys, causal=None), "causal is None"),
        (lambda: kvevict.pool_scores(scores, 2**40 + 1), "kernel_size is 1099511627777"),
        (lambda: kvevict.topk_indices(scores, torch.ones(1, 2, dtype=torch.int64, device="meta")), "keep is on meta"),
        (lambda: kvevict.key_norm_scores(torch.nested.nested_tensor([keys[0], keys[0]])), "keys is a nested"),
        (lambda: kvevict.decode_attention(queries, keys, values, last_used=used, step=2**31), "step is 2147483648"),
        (
            lambda: kvevict.topk_indices(scores, 3, heads="shared", lengths=torch.full((1, 2), 5, device=DEVICE)),
            "heads is 'shared'",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_lengths_are_checked_once_per_version():
    scores, lengths = torch.randn(2, 2, 9, device=DEVICE), torch.tensor([9, 4], device=DEVICE)
    with kvevict.backend("triton"), counted() as first:
        kvevict.evict_slots(scores, lengths=lengths)
    with kvevict.backend("triton"), counted() as second:
        kvevict.evict_slots(scores, lengths=lengths)
    assert (first.launches, second.launches) == (2, 1)
    for change in (lambda x: x.fill_(10), lambda x: x.fill_(0), lambda x: torch.full_like(x, 10)):
        lengths = torch.tensor([9, 4], device=DEVICE)
        kvevict.evict_slots(scores, lengths=lengths)
        lengths = change(lengths)
        with pytest.raises(ValueError, match="lengths"):
            kvevict.evict_slots(scores, lengths=lengths)
    with torch.inference_mode():  # tensors without a version are checked every time
        lengths = torch.tensor([9, 4], device=DEVICE)
        kvevict.evict_slots(scores, lengths=lengths)
        lengths.fill_(10)
        with pytest.raises(ValueError, match="lengths"):
            kvevict.evict_slots(scores, lengths=lengths)


def test_autocast_changes_nothing():
    keys, queries = cache((1, 2, 50, 32, 32))[0], torch.randn(1, 4, 20, 32, device=DEVICE)
    with kvevict.backend("reference"):
        expected = kvevict.attention_mass(queries, keys)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert torch.equal(kvevict.attention_mass(queries, keys), expected)


def test_another_share_compiles_whole():
    """A second float makes torch.compile treat the argument as symbolic."""
    scores = torch.randn(1, 2, 40, device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(lambda s, keep: kvevict.topk_indices(s, keep), fullgraph=True, backend="aot_eager")
    for keep, n in ((0.5, 20), (0.25, 10), (0.1, 4)):
        assert compiled(scores, keep).shape[2] == n


def test_memory_of_keys_and_values_must_be_apart():
    x = torch.randn(1, 2, 20, 32, device=DEVICE)
    for keys, values in ((x, x), (x[..., :16], x[..., 8:24]), (x[:, :, 1:], x[:, :, :-1])):
        with pytest.raises(ValueError, match="values shares memory"):
            keydiff_compact(keys, values, keep=0.5)
    keydiff_compact(x[..., :16], x[..., 16:], keep=0.5)
    keydiff_compact(x, x, keep=0.5, inplace=False)


def test_backend_by_name_never_falls_back(monkeypatch):
    keys, _ = cache((1, 1, 8, 16, 16))
    with pytest.raises(ValueError, match="cuda"), kvevict.backend("cuda"):
        pass
    monkeypatch.setenv("KVEVICT_BACKEND", "nothing")
    with pytest.raises(ValueError, match="KVEVICT_BACKEND"):
        kvevict.keydiff_scores(keys)
    monkeypatch.setenv("KVEVICT_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not HAS_GPU:
        with pytest.raises(ValueError, match="triton"):
            kvevict.keydiff_scores(keys)


def test_backends_have_one_interface():
    from kvevict.backends import reference, triton

    assert sorted(reference.__all__) == sorted(triton.__all__)
    assert {"keydiff_scores", "attention_mass", "topk_indices", "move_rows"} < set(reference.__all__)
    for function in reference.__all__:
        ours, theirs = (list(inspect.signature(getattr(b, function)).parameters) for b in (reference, triton))
        assert ours == theirs, function


def test_works_where_triton_cannot_be_imported():
    program = """
import sys
sys.modules["triton"] = None
import torch, kvevict
k = torch.randn(1, 2, 50, 16)
c = kvevict.keydiff_compact(k, k.clone(), keep=0.5, sink=4)
assert c.keys.shape == (1, 2, 25, 16)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "KVEVICT_BACKEND")}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_opcheck():
    keys, values = cache((2, 2, 20, 16, 16))
    scores = torch.randn(2, 2, 20, device=DEVICE)
    queries, hidden = torch.randn(2, 4, 5, 16, device=DEVICE), torch.randn(2, 20, 16, device=DEVICE)
    indices = torch.arange(0, 20, 2, device=DEVICE).expand(2, 2, 10).contiguous()
    lengths = torch.tensor([20, 7], device=DEVICE)
    pages = torch.randn(2, 12, 2, 4, 16, device=DEVICE)  # blocks of 4 tokens
    table = torch.arange(10, dtype=torch.int32, device=DEVICE).view(2, 5)
    ops = torch.ops.kvevict
    calls = [
        (ops.keydiff_scores.default, (keys, None, True, lengths, torch.zeros(2, 2, 20, device=DEVICE))),
        (
            ops.anchor_sums.default,
            (keys, lengths, *(torch.zeros(*shape, dtype=torch.int64, device=DEVICE) for shape in ((2, 2, 16), (2, 2)))),
        ),
        (
            ops.kv_scores.default,
            (
                keys,
                keys.clone(),
                torch.randn(2, 36, device=DEVICE),
                torch.ones(8, device=DEVICE),
                None,
                lengths,
                torch.zeros(2, 2, 20, device=DEVICE),
                torch.zeros(2, 2, 20, device=DEVICE),
            ),
        ),
        (
            ops.attention_peaks.default,
            (
                queries,
                keys,
                torch.zeros(2, 4, 5, device=DEVICE),
                0.25,
                5,
                lengths,
                torch.zeros(2, 2, 20, device=DEVICE),
            ),
        ),
        (
            ops.quadratic_scores.default,
            (
                keys,
                queries[:, :, 0],
                torch.zeros(2, 4, 16, 16, device=DEVICE),
                lengths,
                torch.zeros(2, 4, 20, device=DEVICE),
            ),
        ),
        (
            ops.projected_norms.default,
            (values, torch.ones(30, 64, device=DEVICE), lengths, torch.zeros(2, 2, 20, device=DEVICE)),
        ),
        (ops.topk_indices.default, (scores, None, 1, 2, False, None, False, torch.zeros_like(indices))),
        (
            ops.topk_adaptive.default,
            (scores, 10, None, 1, 5, 1, 2, None, False, torch.zeros(2, 2, 20).long().to(DEVICE)),
        ),
        (ops.topk_move.default, (scores, None, 1, 2, False, None, torch.zeros_like(indices), keys, values)),
        (ops.move_rows.default, (keys, values, indices, None, False)),
        (ops.move_rows.default, (keys, values, indices, torch.zeros_like(indices), False)),
        (ops.move_rows.default, (*pages, indices[:, :, :3], None, False, table, lengths, True)),
        (ops.keydiff_scores.default, (pages[0], None, True, lengths, torch.zeros(2, 2, 20, device=DEVICE), table)),
        (ops.keep_counts.default, (lengths, 20, None, 10**11, 20, torch.zeros_like(lengths).long())),
        (
            ops.left_blocks.default,
            (table, lengths, lengths // 2, 4, True, torch.zeros_like(lengths), torch.zeros_like(table)),
        ),
        (ops.key_norm_scores.default, (keys, lengths, torch.zeros(2, 2, 20, device=DEVICE))),
        (ops.attention_lse.default, (queries, keys, 0.25, True, lengths, torch.zeros(2, 4, 5, device=DEVICE))),
        (
            ops.attention_mass.default,
            (
                queries,
                keys,
                torch.zeros(2, 4, 5, device=DEVICE),
                0.25,
                True,
                "mean",
                True,
                lengths,
                torch.zeros(2, 2, 20, device=DEVICE),
            ),
        ),
        (
            ops.decode_attention.default,
            (
                queries[:, :, :1],
                keys,
                values,
                0.25,
                None,
                scores.clone(),
                0.5,
                None,
                3,
                0.1,
                torch.zeros(2, 4, 1, 16, device=DEVICE),
            ),
        ),
        (
            ops.mlp_scores.default,
            (
                hidden,
                torch.randn(8, 16, device=DEVICE),
                hidden[0, 0, :8],
                hidden[0, 1, :8],
                hidden[0, 2, :1],
                torch.zeros(2, 20, device=DEVICE),
            ),
        ),
        (ops.pool_scores.default, (scores, 5, True, 3, lengths, torch.zeros_like(scores))),
        (ops.combine_ranks.default, ([scores, scores.clone()], [0.5, 2.0], lengths, torch.zeros_like(scores))),
        (ops.evict_slots.default, (scores, 1, 1, lengths, torch.zeros_like(indices)[:, :, :3].contiguous())),
        (
            ops.copy_rows.default,
            (keys, values, indices, None, False, keys[:, :, :10].clone(), values[:, :, :10].clone()),
        ),
        (
            ops.allot_blocks.default,
            (
                lengths[:, None].expand(2, 2).contiguous(),
                torch.arange(8, dtype=torch.int32, device=DEVICE),
                8,
                10,
                torch.zeros(2, 2, 2, dtype=torch.int32, device=DEVICE),
                torch.zeros(1, dtype=torch.int32, device=DEVICE),
            ),
        ),
        (
            ops.count_digits.default,
            (
                scores,
                indices.new_tensor(range(20)).expand(2, 2, 20),
                torch.tensor([[1, 18, 20, 5], [0, 7, 7, 3]], device=DEVICE),
                torch.tensor([0, 5, 1, 18, 20], device=DEVICE).expand(2, 2, 5).contiguous(),
                torch.ones(2, 2, 256, dtype=torch.int32, device=DEVICE),
                5,
                21,
                torch.zeros(2, 2, 5, dtype=torch.int64, device=DEVICE),
                torch.zeros(2, 2, 256, dtype=torch.int32, device=DEVICE),
            ),
        ),
        (
            ops.kept_slots.default,
            (
                scores,
                indices.new_tensor(range(20)).expand(2, 2, 20),
                torch.tensor([2**30, 5, 1, 18, 20], device=DEVICE).expand(2, 2, 5).contiguous(),
                torch.ones(2, 2, 32, dtype=torch.int32, device=DEVICE),
                5,
                torch.zeros(2, 2, 10, dtype=torch.int64, device=DEVICE),
                torch.zeros(2, 2, dtype=torch.int64, device=DEVICE),
            ),
        ),
    ]
    from kvevict.backends import reference

    inside = {"check_rows", "fill_holes", "move_flags", "slots_from_end"}  # parts of other ops
    assert {op.name().partition("::")[2].partition(".")[0] for op, _ in calls} == {
        *reference.__all__,
        "topk_move",  # two of them in one
        "allot_blocks",  # plain torch
    } - inside
    with kvevict.backend("reference"):
        for op, arguments in calls:
            torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_traces_it_whole(dynamic):
    def step(keys, values, lengths):
        result = keydiff_compact(keys, values, keep=0.5, sink=2, recent=2, lengths=lengths)
        return result.keys * 2, result.indices, result.lengths

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for S in (40, 56):
        keys, values = cache((2, 2, S, 16, 16), seed=S)
        lengths = torch.tensor([S, 9], device=DEVICE)
        k, v = keys.clone(), values.clone()
        expected, got = step(k, v, lengths), compiled(keys, values, lengths)
        for a, b in zip(expected, got, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(k, keys) and torch.equal(v, values)  # written in place there too
    if not HAS_GPU:
        with pytest.raises(Exception, match="lengths"):
            compiled(keys, values, torch.tensor([S, S + 1]))


def test_tensors_of_more_than_2_31_elements_are_addressed():
    """Offsets are int64: a view whose rows lie 2³¹ elements apart, over little memory actually touched."""
    if not HAS_GPU:
        pytest.skip("needs 4 GiB of GPU memory")
    storage = torch.empty(2**31 + 2**20, dtype=torch.uint8, device=DEVICE)
    rows = storage.as_strided((1, 2, 64, 64), (2**31 + 2**19, 2**31, 64, 1))
    rows.copy_(torch.randint(0, 255, rows.shape, dtype=torch.uint8, device=DEVICE))
    before = rows.clone()
    indices = torch.arange(1, 64, 2, device=DEVICE).expand(1, 2, 32).contiguous()
    result = kvevict.compact(rows, before.clone(), indices)
    assert torch.equal(result.keys, before[:, :, 1::2])


# Traps that users of other packages reported.


def test_bf16_masses_of_ties_have_one_rule():
    keys = torch.randint(-1, 2, (1, 2, 300, 3), device=DEVICE).to(torch.bfloat16)  # 27 distinct keys: many ties
    for indices in both(lambda: kvevict.topk_indices(kvevict.keydiff_scores(keys), 0.5)):
        for h in range(2):
            kept = set(indices[0, h].tolist())
            for i in kept:
                equal = (keys[0, h, :i] == keys[0, h, i]).all(-1).nonzero().flatten().tolist()
                assert kept.issuperset(equal)  # every equal key before a kept one is kept


def test_a_share_is_the_decimal_it_was_written_as():
    assert validate.kept_tokens(0.5000004, 1_000_000, 0, 0) == 500_000
    assert validate.kept_tokens(0.5000005, 1_000_000, 0, 0) == 500_001  # half up
    assert validate.kept_lengths(0.5000005, torch.tensor([1_000_000, 1, 3])).tolist() == [500_001, 1, 2]
    assert validate.kept_tokens(1e-300, 10, 0, 0) == 1


def test_keep_is_not_lost_to_float_error():
    assert int(1000 * (1 - 0.9)) == 99  # how a share is often taken of what a ratio of 0.9 leaves
    assert validate.kept_tokens(0.1, 1000, 0, 0) == 100
    for S in range(1, 400):
        for percent in range(1, 101):
            exact = max(1, (2 * percent * S + 100) // 200)
            assert validate.kept_tokens(percent / 100, S, 0, 0) == exact
            lengths = torch.tensor([S])
            if S % 57 == 0:
                assert validate.kept_lengths(percent / 100, lengths).item() == exact


def test_padding_is_never_kept_in_place_of_a_token():
    keys, values = cache((2, 2, 40, 16, 16))
    lengths = torch.tensor([40, 11], device=DEVICE)
    for result in both(lambda: keydiff_compact(keys.clone(), values.clone(), keep=0.9, recent=2, lengths=lengths)):
        assert result.lengths.tolist() == [36, 10]
        assert (result.indices[1, :, :10] < 11).all() and (result.indices[1, :, 10:] == -1).all()
        assert (result.indices[1, :, 8:10] == torch.tensor([9, 10], device=DEVICE)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("S, H", [(4096, 8), (131072, 8), (1048576, 1)])
def test_large_shapes_equal_the_reference(S, H):
    keys, values = (torch.randn(1, H, S, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    scores = kvevict.keydiff_scores(keys)
    a, b = both(lambda: kvevict.topk_indices(scores, 0.5, sink=4, recent=32))
    assert torch.equal(a, b)
    expected = values.gather(2, a[..., None].expand(-1, -1, -1, 128))
    for _ in range(3):  # a race would show now and then
        result = kvevict.compact(keys.clone(), values.clone(), a)
        assert torch.equal(result.values, expected)


@pytest.mark.gpu
def test_cuda_graph():
    keys, values = (torch.randn(1, 8, 20000, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    k, v = keys.clone(), values.clone()
    keydiff_compact(k, v, keep=0.5, sink=4)  # compile before capture
    graph = torch.cuda.CUDAGraph()
    k.copy_(keys), v.copy_(values)
    with torch.cuda.graph(graph):
        result = keydiff_compact(k, v, keep=0.5, sink=4)
    expected = keydiff_compact(keys.clone(), values.clone(), keep=0.5, sink=4)
    for _ in range(2):
        k.copy_(keys), v.copy_(values)
        graph.replay()
        assert_same(result, expected)


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
def test_compute_sanitizer():
    program = """
import torch, kvevict
k, v = (torch.randn(2, 2, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
for preserve_order in (True, False):
    kvevict.keydiff_compact(k, v, keep=0.5, sink=4, preserve_order=preserve_order)
torch.cuda.synchronize()
"""
    command = ["compute-sanitizer", "--error-exitcode", "9", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
