"""Selection over ranks, in one process: each rank's counts and slots, kernel against reference, and all of them
together against what a sorted list of the whole sequence keeps."""

import itertools

import pytest
import torch
from cases import both
from conftest import DEVICE
from launches import launches
from test_select_topk import expect, spoiled

import kvevict
from kvevict.backends import reference
from kvevict.backends import triton as kernels
from kvevict.distributed import positions_of
from kvevict.kernels.primitives import INTERPRETED


def digits(tokens):
    """(bits, [(left, width)]) of a search, as distributed.py makes it."""
    bits = max(tokens - 1, 1).bit_length()
    widths = [8] * 4 + [min(8, bits - done) for done in range(0, bits, 8)]
    return bits, [(32 + bits - sum(widths[: i + 1]), width) for i, width in enumerate(widths)]


def limits_of(lengths, kept, sink, recent):
    """[B, 4] for requests of these lengths that keep so many tokens."""
    rows = []
    for length, n in zip(lengths, kept, strict=True):
        sinks = min(sink, n)
        recents = min(recent, n - sinks)
        rows.append([sinks, length - recents, length, n - sinks - recents])
    return torch.tensor(rows, device=DEVICE)


def search(backend, parts, limits, tokens, most):
    """What each rank ends up with, of parts (scores, positions); and all that was computed on the way."""
    bits, of_digits = digits(tokens)
    before, summed, log = [None] * len(parts), None, []
    for left, width in of_digits:
        after = [torch.empty(*s.shape[:2], 5, dtype=torch.int64, device=DEVICE) for s, _ in parts]
        counts = [torch.empty(*s.shape[:2], 2**width, dtype=torch.int32, device=DEVICE) for s, _ in parts]
        for rank, (scores, positions) in enumerate(parts):
            backend.count_digits(scores, positions, limits, before[rank], summed, bits, left, after[rank], counts[rank])
        before, summed = after, sum(counts)
        log += [*after, *counts]
    found = []
    for (scores, positions), state in zip(parts, before, strict=True):
        B, H, L = scores.shape
        out = torch.empty(B, H, min(most, L), dtype=torch.int64, device=DEVICE)
        held = torch.empty(B, H, dtype=torch.int64, device=DEVICE)
        backend.kept_slots(scores, positions, state, summed, bits, out, held)
        found.append((out, held))
    return found, log


def dealt(scores, layout, ranks, shared=True):
    """Parts of scores [B, H, S]: positions without or with a stride for heads, and a slot without a token behind."""
    B, H, S = scores.shape
    parts = []
    for rank in range(ranks):
        own = positions_of(layout, S, ranks, rank).to(DEVICE)
        places = torch.nn.functional.pad(own, (0, 1), value=-1)
        mine = torch.nn.functional.pad(scores[..., own], (0, 1), value=float("inf"))  # is no token's score
        places = places.expand(B, H, -1)
        parts.append((mine, places if shared else places.contiguous()))
    return parts


@pytest.mark.parametrize("layout, ranks, S", [("zigzag", 2, 300), ("striped", 3, 70), ("contiguous", 4, 9)])
@pytest.mark.parametrize("sink, recent", [(0, 0), (2, 3)])
def test_ranks_keep_what_one_process_keeps(layout, ranks, S, sink, recent):
    scores = spoiled(2, 2, S, seed=S)
    lengths, kept = [S, max(S // 3, 1)], [S // 2, max(S // 6, 1)]
    parts = dealt(scores, layout, ranks, shared=sink > 0)
    limits = limits_of(lengths, kept, sink, recent)
    found, log = search(kernels, parts, limits, S, S // 2)
    expected, log_too = search(reference, parts, limits, S, S // 2)
    for got, wanted in zip([*log, *itertools.chain(*found)], [*log_too, *itertools.chain(*expected)], strict=True):
        assert torch.equal(got, wanted)
    for b, h in itertools.product(range(2), range(2)):
        whole = []
        for (out, held), (_, places) in zip(found, parts, strict=True):
            slots, count = out[b, h], int(held[b, h])
            assert (slots[count:] == -1).all() and (slots[:count].diff() > 0).all()
            whole += places[b, h, slots[:count]].tolist()
        assert sorted(whole) == expect(scores[b, h, : lengths[b]].tolist(), kept[b], sink, recent)


def test_runs_of_a_row_and_a_place_beyond_24_bits(monkeypatch):
    """Two runs of two tiles, ties in both; positions of 31 bits, the widest number there is."""
    monkeypatch.setattr("kvevict.kernels.select_ranks.multiprocessors", lambda device: 1)
    S, apart = 5000, 2**31 // 5000
    scores = spoiled(1, 2, S)
    places = (torch.arange(S, device=DEVICE) * apart + apart - 1).expand(1, 2, S)
    limits = torch.tensor([[0, 2**31, 2**31, 2500]], device=DEVICE)
    found, log = search(kernels, [(scores, places)], limits, 2**31, 2500)
    expected, log_too = search(reference, [(scores, places)], limits, 2**31, 2500)
    for got, wanted in zip([*log, *found[0]], [*log_too, *expected[0]], strict=True):
        assert torch.equal(got, wanted)
    assert torch.equal(found[0][0], kvevict.topk_indices(scores, 2500))


@pytest.mark.parametrize("backend", [reference, kernels], ids=["reference", "triton"])
@pytest.mark.parametrize("need, kept", [(0, [0, 9]), (3, [0, 1, 2, 3, 9]), (8, list(range(10))), (20, list(range(10)))])
def test_none_all_and_more_than_there_are(backend, need, kept):
    """An earlier eviction may have left fewer than a share of the length."""
    scores = torch.arange(10.0, device=DEVICE).flip(0)[None, None].contiguous()
    places = torch.arange(10, device=DEVICE)[None, None]
    ((out, held),), _ = search(backend, [(scores, places)], torch.tensor([[1, 9, 10, need]], device=DEVICE), 10, 10)
    assert out[0, 0].tolist() == kept + [-1] * (10 - len(kept)) and held.item() == len(kept)


@pytest.mark.parametrize("backend", [reference, kernels], ids=["reference", "triton"])
def test_nothing_is_written_beyond_the_slots(backend):
    """Positions that are none, of a caller who was not asked for checks: fewer slots than tokens that would stay."""
    scores, places = torch.zeros(1, 1, 8, device=DEVICE), torch.zeros(1, 1, 8, dtype=torch.int64, device=DEVICE)
    ((out, held),), _ = search(backend, [(scores, places)], torch.tensor([[0, 8, 8, 1]], device=DEVICE), 8, 3)
    assert out[0, 0].tolist() == [0, 1, 2] and held.item() == 3


def test_both_as_ops():
    scores, places = spoiled(1, 2, 20), torch.arange(20, device=DEVICE).expand(1, 2, 20)
    limits = limits_of([20], [7], 1, 1)
    a, b = both(lambda: search(torch.ops.kvevict, [(scores, places)], limits, 20, 7)[0][0])
    assert torch.equal(a[0], b[0]) and a[1].tolist() == [[7, 7]]
    assert torch.equal(a[0], kvevict.topk_indices(scores, 7, sink=1, recent=1))


@pytest.mark.skipif(DEVICE != "cpu" or not INTERPRETED, reason="counted in the interpreter")
def test_launches():
    """One for each digit and a clear of its counts; two at the end."""
    parts, limits = dealt(spoiled(2, 3, 300), "striped", 1), limits_of([300] * 2, [50] * 2, 4, 32)
    with kvevict.backend("triton"), launches() as names:
        search(torch.ops.kvevict, parts, limits, 300, 50)
    names = [name for name in names if name != "aten::add"]  # of ranks, in `search`
    assert names == ["aten::zero_", "count_digits_kernel"] * 6 + ["kept_slots_kernel"] * 2
