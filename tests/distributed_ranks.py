"""What test_distributed.py runs on four ranks, gloo on one machine: `python distributed_ranks.py NAME ... --file F`.

A process is started once and forked: so torch is imported once. Each check runs on every rank of its group, the others
wait; the first that fails ends all of them.
"""

import contextlib
import functools
import itertools
import json
import os
import pathlib
import random
import runpy
import socket
import sys
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import kvevict
from kvevict import distributed
from kvevict.distributed import Shard, positions_of

RANKS = 4
EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
LAYOUTS = [("contiguous", 1), ("zigzag", 1), ("striped", 1), ("striped", 16)]


def seeded(*shape, seed):
    """The same numbers on every device."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return x.to(torch.get_default_device())


def drawn(high, *shape, seed):
    x = torch.randint(high, shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return x.to(torch.get_default_device())


def make(kind, B, H, S, D, dtype):
    keys, values = seeded(B, H, S, D, seed=S + B), seeded(B, H, S, D + 8, seed=S).to(dtype)
    if kind == "ties":  # five different keys only: a row is ties and nothing else
        few = drawn(5, B, H, S, 1, seed=S)
        keys = keys[:, :, :5].gather(2, few.expand(-1, -1, -1, D))
    if kind == "zero":
        keys[:, :, ::3] = 0.0
    if kind == "nan":
        keys[:, :, S // 2 :: 7, 3] = float("nan")
    if kind == "skewed":
        keys = keys + 3 * seeded(B, H, 1, D, seed=1) * torch.linspace(0, 1, S)[:, None]
    return keys.to(dtype), values


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def check_kept(shard, want, own, places=None):
    """The shard is this rank's part of what one process kept: `want`, of tokens at `places` (0, 1, ...)."""
    for b, h in itertools.product(*map(range, shard.counts.shape)):
        kept = want.indices[b, h][want.indices[b, h] >= 0]
        kept = kept if places is None else places[b, h, kept]
        mine, count = torch.isin(kept, own if own.ndim == 1 else own[b, h]), int(shard.counts[b, h])
        assert count == int(mine.sum())
        assert torch.equal(shard.positions[b, h, :count], kept[mine])
        assert (shard.positions[b, h, count:] == -1).all()
        for got, expected in ((shard.keys, want.keys), (shard.values, want.values)):
            assert torch.equal(bits(got[b, h, :count]), bits(expected[b, h, : len(kept)][mine]))


def one_case(group, kind, shape, dtype, layout, heads, ragged, selection, inplace):
    B, H, S, D = shape
    keys, values = make(kind, B, H, S, D, dtype)
    lengths = torch.tensor([S, S // 3][:B] if B > 1 else [S - S // 5]) if ragged else None
    options = dict(zip(("keep", "sink", "recent"), selection, strict=True), heads=heads, lengths=lengths)
    want = kvevict.keydiff_compact(keys, values, inplace=False, **options)
    own = positions_of(layout[0], S, group.size(), dist.get_rank(group), layout[1])
    mine = [x[:, :, own].clone() for x in (keys, values)]
    before = [x.clone() for x in mine]
    got = distributed.keydiff_compact(
        *mine, positions=own, tokens=S, group=group, inplace=inplace, **options
    )  # fmt: skip
    check_kept(got, want, own)
    for x, old, new in zip(mine, before, got[:2], strict=True):
        if inplace:
            assert new.data_ptr() == x.data_ptr() or not own.numel()
        else:
            assert torch.equal(bits(x), bits(old))


MATRIX = list(itertools.product(
    ["random", "ties", "zero", "nan", "skewed"], [(1, 2, 64, 16), (2, 3, 257, 32), (1, 2, 600, 64)],
    [torch.float32, torch.bfloat16, torch.float16], LAYOUTS, ["each", "shared"], [False, True],
    [(0.5, 4, 8), (17, 0, 0), (0.1, 2, 3)], [False, True],
))  # fmt: skip


def check_matrix(group, count=60):
    """A sample in which every value of every axis occurs tens of times; `matrix_whole` runs all of it."""
    for case in random.Random(0).sample(MATRIX, count):
        try:
            one_case(group, *case)
        except Exception as error:
            raise AssertionError(f"case {case}") from error


def check_matrix_whole(group):
    check_matrix(group, len(MATRIX))


def check_interpreted(group):
    with kvevict.backend("triton"):
        one_case(group, "nan", (1, 2, 150, 32), torch.bfloat16, ("zigzag", 1), "each", True, (0.3, 2, 4), True)


def check_scores_with_ties_everywhere(group):
    """Scores of three values, NaN and -inf: the position decides."""
    S, rank = 300, dist.get_rank(group)
    values_of = torch.tensor([0.0, -0.0, 1.0, -1.0, float("nan"), float("-inf")])
    scores = values_of[drawn(6, 2, 2, S, seed=0)]
    keys, values = make("random", 2, 2, S, 16, torch.float32)
    for keep, heads in ((1, "each"), (150, "each"), (299, "each"), (300, "each"), (77, "shared")):
        indices = kvevict.topk_indices(scores, keep, heads=heads)
        want = kvevict.compact(keys, values, indices, inplace=False)
        own = positions_of("striped", S, group.size(), rank, 7)
        got = distributed.compact_by_scores(
            scores[..., own].contiguous(), keys[:, :, own], values[:, :, own], positions=own.int(), tokens=S,
            group=group, keep=keep, heads=heads,
        )  # fmt: skip
        check_kept(got, want, own)


def check_a_rank_without_tokens(group):
    """Five tokens in contiguous runs of two: the fourth rank has none. And a slot that holds none."""
    rank, S = dist.get_rank(group), 5
    keys, values = make("random", 1, 2, S, 16, torch.float32)
    own = positions_of("contiguous", S, group.size(), rank)
    assert own.numel() == [2, 2, 1, 0][rank]
    options = dict(tokens=S, group=group)
    for keep in (1, 3, 5):
        want = kvevict.keydiff_compact(keys, values, keep=keep, inplace=False)
        got = distributed.keydiff_compact(keys[:, :, own], values[:, :, own], positions=own, keep=keep, **options)
        check_kept(got, want, own)
        query = seeded(1, 4, 1, 16, seed=3)
        expected = kvevict.decode_attention(query, want.keys, want.values)
        torch.testing.assert_close(distributed.decode_attention(query, got, group=group), expected)
        even = distributed.rebalance(got, group=group)
        assert int(even.counts.max()) <= 2
        torch.testing.assert_close(distributed.decode_attention(query, even, group=group), expected)
    window = seeded(1, 4, 3, 16, seed=4)
    got = distributed.attention_mass(window, keys[:, :, own], positions=own, **options)
    expected = kvevict.attention_mass(window, keys)
    torch.testing.assert_close(got[..., : len(own)], expected[..., own])
    none = torch.zeros(1, 2, dtype=torch.int64)
    empty = Shard(keys[:, :, :1], values[:, :, :1], torch.full((1, 2, 1), -1), none)
    assert (distributed.decode_attention(query, empty, group=group) == 0).all()


def append(shard, key, value, position):
    """The shard with one more token behind each head's last."""
    at = shard.counts[..., None, None]
    keys, values = (
        F.pad(rows, (0, 0, 0, 1)).scatter(2, at.expand(-1, -1, 1, rows.shape[3]), new)
        for rows, new in ((shard.keys, key), (shard.values, value))
    )
    positions = F.pad(shard.positions, (0, 1), value=-1).scatter(2, at[..., 0], position)
    return Shard(keys, values, positions, shard.counts + 1)


def check_cut_decode_cut(group):
    rank, P, (B, H, S, D) = dist.get_rank(group), group.size(), (2, 2, 200, 32)
    for heads, layout in (("each", ("zigzag", 1)), ("shared", ("striped", 16))):
        keys, values = make("skewed", B, H, S, D, torch.float32)
        own = positions_of(layout[0], S, P, rank, layout[1])
        options = dict(heads=heads, sink=4, recent=8)
        want = kvevict.keydiff_compact(keys, values, keep=0.5, inplace=False, **options)
        got = distributed.keydiff_compact(
            keys[:, :, own], values[:, :, own], positions=own, tokens=S, group=group, keep=0.5, **options
        )
        cached, places = [want.keys, want.values], want.indices
        for step in range(10):
            query, key, value = (seeded(B, heads_, 1, width, seed=7 * step + heads_)
                                 for heads_, width in ((2 * H, D), (H, D), (H, D + 8)))  # fmt: skip
            cached = [torch.cat([x, new], 2) for x, new in zip(cached, (key, value), strict=True)]
            places = torch.cat([places, torch.full((B, H, 1), S + step)], -1)
            if (S + step) % P == rank:
                got = append(got, key, value, S + step)
            torch.testing.assert_close(
                distributed.decode_attention(query, got, group=group), kvevict.decode_attention(query, *cached)
            )
        again = kvevict.keydiff_compact(*cached, keep=60, inplace=False, **options)
        before = got.positions
        for inplace in (False, True):
            cut = distributed.keydiff_compact(
                got.keys, got.values, positions=before, tokens=S + 10, group=group, keep=60, inplace=inplace, **options
            )
            check_kept(cut, again, before, places)


def check_cuts_unlike_the_last(group):
    """After a cut that protects nothing, one that protects keeps as many all the same; after heads chose apart they
    cannot share."""
    rank, P, (B, H, S, D) = dist.get_rank(group), group.size(), (1, 2, 100, 16)
    keys, values = make("random", B, H, S, D, torch.float32)
    own = positions_of("striped", S, P, rank)
    got = distributed.keydiff_compact(
        keys[:, :, own], values[:, :, own], positions=own, tokens=S, group=group, keep=40, inplace=False
    )
    before = everyone(got.positions, group)
    again = dict(positions=got.positions, tokens=S, group=group, keep=20, inplace=False)
    cut = distributed.keydiff_compact(got.keys, got.values, sink=4, recent=8, **again)
    counts = cut.counts.clone()
    dist.all_reduce(counts, group=group)
    assert (counts == 20).all(), counts
    after = everyone(cut.positions, group)
    for h in range(H):
        first, second = ({int(x) for part in positions for x in part[0, h]} for positions in (before, after))
        there = {x for x in first if 0 <= x < 4 or x >= S - 8}
        assert 0 < len(there) < 12 and there <= second <= first
    del again["group"]
    message = "those of all heads alike, as they share tokens"
    raises(distributed.keydiff_compact, message, group, keys=got.keys, values=got.values, heads="shared", **again)


def check_mass(group):
    rank, P = dist.get_rank(group), group.size()
    for (B, H, S, D), W, layout, reduce, ragged in (
        ((2, 2, 90, 32), 16, ("contiguous", 1), "mean", False), ((2, 2, 90, 32), 16, ("striped", 1), "max", True),
        ((2, 1, 64, 16), 64, ("zigzag", 1), "sum", False), ((2, 2, 70, 32), 1, ("striped", 16), "mean", True),
    ):  # fmt: skip
        keys, _ = make("random", B, H, S, D, torch.float32)
        queries = seeded(B, 2 * H, W, D, seed=5)
        lengths = torch.tensor([S, 9]) if ragged else None  # fewer than W, too
        want = kvevict.attention_mass(queries, keys, reduce=reduce, lengths=lengths)
        own = positions_of(layout[0], S, P, rank, layout[1])
        got = distributed.attention_mass(
            queries, keys[:, :, own], positions=own, tokens=S, group=group, reduce=reduce, lengths=lengths
        )
        torch.testing.assert_close(got, want[..., own], rtol=1e-5, atol=1e-6)


def check_rebalance(group):
    rank, P, S = dist.get_rank(group), group.size(), 200
    for dtype in (torch.float32, torch.bfloat16):
        keys, values = make("skewed", 2, 3, S, 16, dtype)
        own = positions_of("contiguous", S, P, rank)
        got = distributed.keydiff_compact(
            keys[:, :, own], values[:, :, own], positions=own, tokens=S, group=group, keep=41, sink=2
        )
        even = distributed.rebalance(got, group=group)
        want = kvevict.keydiff_compact(keys, values, keep=41, sink=2, inplace=False)
        counts = torch.stack(everyone(even.counts, group))
        assert (counts.amax(0) - counts.amin(0)).max() <= 1 and (counts.sum(0) == 41).all()
        check_kept(even, want, even.positions)  # each token with its own K and V
        where = torch.cat(everyone(even.positions, group), -1).sort(-1).values[..., -41:]
        assert torch.equal(where, want.indices)
        again = distributed.rebalance(even, group=group)  # nothing to do
        assert torch.equal(again.positions, even.positions) and torch.equal(bits(again.keys), bits(even.keys))


def everyone(x, group):
    """[x of each rank]; x may have any shape."""
    is_tensor, found = isinstance(x, torch.Tensor), [None] * group.size()
    dist.all_gather_object(found, x.cpu() if is_tensor else x, group=group)
    return [one.to(x.device) for one in found] if is_tensor else found


def check_layers_in_one_call(group):
    """Of a tensor of layers: three of them as more of B: the same as one by one, with the collectives of one."""
    S, own = 130, positions_of("zigzag", 130, group.size(), dist.get_rank(group))
    keys, values = make("random", 3, 2, S, 16, torch.float32)
    options = dict(positions=own, tokens=S, group=group, keep=0.3, sink=2)
    with collectives() as sent:
        together = distributed.keydiff_compact(keys[:, :, own], values[:, :, own], **options)
    with collectives() as sent_by_one:
        for layer in range(3):
            alone = distributed.keydiff_compact(
                keys[layer : layer + 1, :, own], values[layer : layer + 1, :, own], **options
            )
            for a, b in zip(together, alone, strict=True):
                assert torch.equal(a[layer : layer + 1], b)
    assert len(sent_by_one) == 3 * len(sent)


@contextlib.contextmanager
def collectives():
    """[(name, bytes of this rank's tensor)] of what is sent inside."""
    sent, saved = [], {}

    def counting(name, function, which):
        def call(*args, **options):
            sent.append((name, args[which].nbytes))
            return function(*args, **options)

        return call

    for module, name, which in (
        (dist, "all_reduce", 0), (distributed, "_all_gather", 1), (dist, "all_to_all_single", 1)
    ):  # fmt: skip
        saved[module, name] = getattr(module, name)
        setattr(module, name, counting(name.lstrip("_"), saved[module, name], which))
    try:
        yield sent
    finally:
        for (module, name), function in saved.items():
            setattr(module, name, function)


def check_collectives(group):
    """Their number and payload are those that docs/distributed.md states, whatever L."""
    rank, P, (B, H, S, D) = dist.get_rank(group), group.size(), (2, 3, 300, 32)
    keys, values = make("random", B, H, S, D, torch.bfloat16)
    own = positions_of("contiguous", S, P, rank)
    part = keys[:, :, own], values[:, :, own]
    agree, digit = ("all_reduce", 16), ("all_reduce", B * H * 256 * 4)
    with collectives() as sent:
        got = distributed.keydiff_compact(*part, positions=own, tokens=S, group=group, keep=0.5)
    anchor, first = ("all_reduce", B * H * (D + 1) * 8), ("all_reduce", B * H * 257 * 4)  # and the protected tokens
    assert sent == [
        agree,
        anchor,
        first,
        *[digit] * 3,
        digit,
        ("all_reduce", B * H * 2 * 4),
    ]  # 9 bits of position: 8 and 1
    with collectives() as sent:
        distributed.compact_by_scores(
            torch.zeros(B, H, len(own)), *part, positions=own, tokens=S, group=group, keep=0.5, heads="shared"
        )
    one_head = ("all_reduce", B * 256 * 4)
    assert sent == [agree, ("all_reduce", B * 257 * 4), *[one_head] * 3, one_head, ("all_reduce", B * 2 * 4)]
    with collectives() as sent:
        distributed.decode_attention(seeded(B, 6, 1, D, seed=0).bfloat16(), got, group=group)
    assert sent == [agree, ("all_gather", B * 6 * (D + 8 + 1) * 4)]
    with collectives() as sent:
        distributed.attention_mass(seeded(B, 6, 8, D, seed=0).bfloat16(), part[0], positions=own, tokens=S, group=group)
    assert sent == [agree, ("all_gather", B * 6 * 8 * 4)]
    with collectives() as sent:
        distributed.rebalance(got, group=group)
    counts = torch.stack(everyone(got.counts, group)).flatten(1)
    total = counts.sum(0)
    surplus = (counts[rank] - (total // P + (rank < total % P))).clamp(min=0).sum()
    row = (D + D + 8) * 2 + 8
    assert sent == [agree, ("all_gather", B * H * 8), ("all_to_all_single", int(surplus) * row)]


def check_bad_input(group):
    """A clear error on every rank, whichever is at fault, and nothing written."""
    rank, P, S = dist.get_rank(group), group.size(), 40
    keys, values = make("random", 2, 2, S, 16, torch.float32)
    own = positions_of("contiguous", S, P, rank)
    good = dict(keys=keys[:, :, own], values=values[:, :, own], positions=own, tokens=S, keep=0.5, inplace=True)
    at_fault = {
        "dtype": (dict(keys=good["keys"].half(), values=good["values"].half()), "dtype is torch.float16 on rank 1"),
        "values' dtype": (dict(values=good["values"].half()), "values has dtype torch.float16"),
        "tokens": (dict(tokens=S + 1), "tokens is 41 on rank 1 of the group: expected 40"),
        "keep": (dict(keep=0.25), "keep is 0.25 on rank 1"),
        "keep too large": (dict(keep=S + 1), "keep is 41: expected an int from 1 to 40"),
        "keep of tensors": (dict(keep=torch.ones(2, 2)), "keep is Tensor"),
        "heads": (dict(heads="adaptive"), "heads is 'adaptive'"),
        "anchor": (dict(anchor="raw"), "anchor is 'raw': expected 'unit' or a tensor"),
        "anchor's shape": (dict(anchor=torch.ones(2, 2, 8)), "anchor has shape"),
        "positions": (dict(positions=own[:-1]), "positions has shape"),
        "positions' dtype": (dict(positions=own.float()), "positions has dtype"),
        "lengths": (dict(lengths=torch.tensor([S, 5])), "lengths is (40, 5) on rank 1 of the group: expected False"),
        "lengths' values": (dict(lengths=torch.tensor([S, 0])), "lengths is [40, 0]: expected values from 1 to 40"),
        "expanded": (dict(keys=good["keys"][:, :1].expand(2, 2, -1, -1)), "keys has shape"),
    }  # fmt: skip
    before = [x.clone() for x in (keys, values)]
    for change, message in at_fault.values():
        for whose in ({1}, set(range(P))):
            if len(whose) > 1 and ("on rank 1" in message):
                continue
            raises(distributed.keydiff_compact, message, group, **good | (change if rank in whose else {}))
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])
    shard = distributed.keydiff_compact(group=group, **good | dict(inplace=False))
    query = seeded(2, 4, 1, 16, seed=0)
    raises(
        distributed.decode_attention,
        "queries has W = 2",
        group,
        queries=seeded(2, 4, 2 if rank == 1 else 1, 16, seed=0),
        shard=shard,
    )
    raises(
        distributed.decode_attention, "shard is tuple", group, queries=query, shard=tuple(shard) if rank == 0 else shard
    )
    for call in (distributed.rebalance, functools.partial(distributed.decode_attention, query)):
        wrong = shard._replace(counts=shard.counts + (99 if rank == 1 else 0))
        raises(call, "values from 0 to", group, shard=wrong)
    raises(distributed.rebalance, "shard.counts has shape", group, shard=shard._replace(counts=shard.counts[:1]))
    scores = torch.zeros(2, 2, len(own))
    for wrong, message in ((None, "scores is NoneType"), (scores.double(), "scores has dtype torch.float64")):
        raises(distributed.compact_by_scores, message, group, scores=wrong if rank == 1 else scores, **good)
    raises(distributed.attention_mass, "reduce is 'square'", group, queries=query, keys=good["keys"], positions=own,
           tokens=S, reduce="square")  # fmt: skip


def check_group_is_one(group):
    """Before any collective: all ranks make the same mistake, or are not in the group."""
    rank = dist.get_rank()
    mine = dist.new_group([1])
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "cp"))
    keys, values = make("random", 1, 2, 8, 16, torch.float32)
    arguments = dict(keys=keys, values=values, positions=torch.arange(8), tokens=8, keep=3)
    raises(distributed.keydiff_compact, "group is a mesh of 2 dimensions: expected one of them", mesh, **arguments)
    raises(distributed.keydiff_compact, "group is str: expected a process group", "WORLD", **arguments)
    if rank == 1:
        assert int(distributed.keydiff_compact(group=mine, **arguments).counts[0, 0]) == 3
    else:
        raises(distributed.keydiff_compact, "expected a process group with this rank", mine, **arguments)


def raises(function, message, group, **arguments):
    try:
        function(group=group, **arguments)
    except (TypeError, ValueError) as error:
        assert message in str(error), f"{error}: expected {message}"
    else:
        raise AssertionError(f"no error: expected {message}")


def check_positions_on_request(group):
    """TORCH_DISTRIBUTED_DEBUG."""
    rank, S = dist.get_rank(group), 40
    keys, values = make("random", 1, 2, S, 16, torch.float32)
    own = positions_of("striped", S, group.size(), rank)
    arguments = dict(keys=keys[:, :, own], values=values[:, :, own], tokens=S, keep=0.5)
    dist.set_debug_level(dist.DebugLevel.INFO)
    try:
        distributed.keydiff_compact(group=group, positions=own, **arguments)
        shared = own.clone()
        shared[-1] = 39  # the last rank's
        last_behind = own.clone()
        last_behind[3] = -1
        for wrong, message in (
            (own.flip(0), "positions are wrong on 1 of"), (own + S, "expected to ascend below 40"),
            (last_behind, "-1 only behind"), (shared, "each to be on one rank only"),
        ):  # fmt: skip
            positions = wrong if rank == 0 else own
            raises(distributed.keydiff_compact, message, group, positions=positions, **arguments)
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)


def check_compiles_whole(group):
    S, own = 60, positions_of("zigzag", 60, group.size(), dist.get_rank(group))
    keys, values = make("random", 1, 2, S, 16, torch.float32)

    def step(keys, values, positions):
        return distributed.keydiff_compact(keys, values, positions=positions, tokens=S, group=group, keep=20, sink=2)

    def attend(query, *shard):
        return distributed.decode_attention(query, Shard(*shard), group=group)

    arguments = keys[:, :, own], values[:, :, own], own
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    shard = step(*arguments)
    for got, expected in zip(compiled(*arguments), shard, strict=True):
        assert torch.equal(got, expected)
    query = seeded(1, 4, 1, 16, seed=2)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, *shard), attend(query, *shard))

    def by_mass(queries, keys, values, positions, lengths):
        own = dict(positions=positions, tokens=S, group=group, lengths=lengths)
        scores = distributed.attention_mass(queries, keys, **own)
        return distributed.compact_by_scores(scores, keys, values, keep=0.3, recent=4, heads="shared", **own)

    arguments = seeded(1, 4, 8, 16, seed=4), *arguments, torch.tensor([50])
    compiled = torch.compile(by_mass, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*arguments), by_mass(*arguments), strict=True):
        assert torch.equal(got, expected)


def check_graph(group):
    """A cut and a decode step, captured, replay with the bits of what is launched one by one, over other values too."""
    S, own = 300, positions_of("zigzag", 300, group.size(), dist.get_rank(group))

    def step(keys, values, query):
        shard = distributed.keydiff_compact(
            keys, values, positions=own, tokens=S, group=group, keep=100, sink=4, recent=8
        )
        return *shard, distributed.decode_attention(query, shard, group=group)

    given = {
        kind: [*(x[:, :, own] for x in make(kind, 2, 2, S, 32, torch.bfloat16)), seeded(2, 4, 1, 32, seed=3).bfloat16()]
        for kind in ("random", "ties", "skewed")
    }
    static = [x.clone() for x in given["random"]]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles, and connects the ranks
        for _ in range(2):
            step(*static)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*static)
    for values in given.values():
        for x, new in zip(static, values, strict=True):
            x.copy_(new)
        graph.replay()
        for got, expected in zip(captured, step(*values), strict=True):
            assert torch.equal(bits(got), bits(expected))


def check_one_rank(group):
    """A group of one rank equals the op."""
    alone = dist.new_group([dist.get_rank(group)], use_local_synchronization=True)
    S = 90
    keys, values = make("nan", 2, 2, S, 16, torch.bfloat16)
    got = distributed.keydiff_compact(
        keys, values, positions=torch.arange(S), tokens=S, group=alone, keep=0.4, sink=3, recent=2
    )
    want = kvevict.keydiff_compact(keys, values, keep=0.4, sink=3, recent=2, inplace=False)
    assert torch.equal(got.positions, want.indices) and torch.equal(bits(got.keys), bits(want.keys))
    query = seeded(2, 4, 1, 16, seed=0).bfloat16()
    expected = kvevict.decode_attention(query, want.keys, want.values)
    torch.testing.assert_close(distributed.decode_attention(query, got, group=alone), expected)
    queries = seeded(2, 4, 8, 16, seed=0)
    mass = distributed.attention_mass(
        queries, keys.float().nan_to_num(), positions=torch.arange(S), tokens=S, group=alone
    )
    torch.testing.assert_close(mass, kvevict.attention_mass(queries, keys.float().nan_to_num()), rtol=1e-5, atol=1e-7)


def check_a_mesh_is_a_group(group):
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    own = positions_of("striped", 40, RANKS, mesh.get_local_rank())
    keys, values = make("random", 1, 2, 40, 16, torch.float32)
    found = [
        distributed.keydiff_compact(keys[:, :, own], values[:, :, own], positions=own, tokens=40, group=which, keep=9)
        for which in (group, mesh, None)
    ]
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def check_tensor_parallel(group):
    """transformers spreads a tiny Llama's 8 KV heads over ranks: each keeps of its heads what one process does."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    from kvevict.hf import EvictingCache
    from kvevict.policies import RECOMMENDED, TOVA, KeyDiff, LayerWide

    config = LlamaConfig(
        hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=8,
        head_dim=16, vocab_size=128, max_position_embeddings=512,
    )  # fmt: skip
    rank, H = dist.get_rank(group), 8 // group.size()
    with tempfile.TemporaryDirectory() as folder:
        folder = everyone(folder, group)[0]
        torch.manual_seed(0)
        one = LlamaForCausalLM(config).eval()
        if rank == 0:
            one.save_pretrained(folder)
        dist.barrier(group)
        options = dict(dtype=torch.float32, distributed_config=DistributedConfig(tp_size=group.size()))
        spread = LlamaForCausalLM.from_pretrained(folder, **options).eval()
        dist.barrier(group)
    ids = torch.randint(0, 128, (2, 90), generator=torch.Generator().manual_seed(1))

    def kept(model, policy, **options):
        """What each layer keeps of `ids`, and what is said after another prompt."""
        found = []
        cache = EvictingCache(
            model, policy, on_evict=lambda eviction: found.append(eviction.indices.clone()), **options
        )
        model(ids, past_key_values=cache)
        cache.settle()
        said = model.generate(
            ids[:1, :5], do_sample=False, max_new_tokens=6, past_key_values=EvictingCache(model, policy, keep=0.5)
        )
        return found, said

    with torch.no_grad():
        for policy in (KeyDiff(heads="shared", recent=4), TOVA(), RECOMMENDED, KeyDiff(recent=4)):
            expected, said = kept(one, policy, keep=0.3)
            for options in (dict(), dict(group=group)):
                found, said_too = kept(spread, policy, keep=0.3, **options)
                assert len(found) == len(expected) == 2 and torch.equal(said, said_too)
                for whole, own in zip(expected, found, strict=True):
                    assert own.shape == (2, H, 27) and torch.equal(own, whole[:, rank * H : rank * H + H])
        spread._device_mesh = None  # as of a model that was spread by other means
        pair = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][rank // 2]
        for change, message in (
            (dict(), "this rank sees 2 of the model's 8 KV heads: expected group="),
            (dict(group=pair), "group has 2 ranks"),
            (dict(policy=KeyDiff(), keep=LayerWide(0.3)), "heads are to keep unequal numbers of tokens"),
            (dict(policy=KeyDiff(heads="shared"), static=True, keep=None, budget=20), "static is True"),
        ):  # fmt: skip
            cache = EvictingCache(spread, **dict(policy=TOVA(), keep=0.3) | change)
            try:
                spread(ids, past_key_values=cache)
            except ValueError as error:
                assert message in str(error), error
            else:
                raise AssertionError(f"no error: expected {message}")
        kept(spread, KeyDiff(), keep=0.3)  # each head for itself


def check_prompt_in_parts(group):
    """examples/context_parallel.py on GPUs: torch's ring over a flash attention that is made up here for CPUs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    example = runpy.run_path(str(EXAMPLES / "context_parallel.py"))

    def flash(query, key, value, dropout=0.0, causal=False, return_debug_mask=False, *, scale=None):
        logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), float("-inf"))
        none = torch.zeros((), dtype=torch.int64)
        return logits.softmax(-1) @ value, logits.logsumexp(-1), none, none, 0, 0, none, none, none

    def scaled_dot_product_attention(query, key, value, is_causal, scale):  # which torch replaces by this name
        return op(query, key, value, 0.0, is_causal, scale=scale)[0]

    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_flash_attention", flash, "CPU")
    op = torch.ops.aten._scaled_dot_product_flash_attention
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=256,
    )  # fmt: skip
    model, text, rank = LlamaForCausalLM(config).eval(), drawn(64, 1, 48, seed=0), dist.get_rank(group)
    mesh = dist.device_mesh.DeviceMesh.from_group(group, "cpu")
    saved = F.scaled_dot_product_attention
    with torch.no_grad():
        expected = example["cached"](model, text)
        F.scaled_dot_product_attention = scaled_dot_product_attention
        try:
            got = example["read_in_parts"](model, text, mesh)
        finally:
            F.scaled_dot_product_attention = saved
    own = positions_of("zigzag", 48, group.size(), rank)
    for part, every in zip(got, expected, strict=True):
        torch.testing.assert_close(part, every[:, :, own], rtol=1e-4, atol=1e-5)


def run(rank, names, path):
    """names: CHECK@RANKS."""
    torch.set_num_threads(1)
    patience = timedelta(seconds=600 if any("whole" in check for check in names) else 60)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=RANKS, timeout=patience)
    groups = {size: dist.new_group(list(range(size))) for size in (2, RANKS)}
    for name in names:
        check, size = name.split("@")
        try:
            if rank < int(size):
                globals()[f"check_{check}"](groups[int(size)])
        except BaseException:
            print(json.dumps({"check": name, "rank": rank, "error": traceback.format_exc()}), flush=True)
            os._exit(1)
        if rank == 0:
            print(json.dumps({"check": name, "error": None}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def run_on_gpus(rank, names, path, ranks):
    """One GPU a rank; all tensors are made there."""
    torch.cuda.set_device(rank)
    torch.set_default_device("cuda")
    dist.init_process_group(init_method=f"file://{path}", rank=rank, world_size=ranks)  # NCCL by itself
    for name in names:
        error = None
        try:
            globals()[f"check_{name.split('@')[0]}"](dist.group.WORLD)
            torch.cuda.synchronize()
        except BaseException:
            error = traceback.format_exc()
        if error is not None or rank == 0:
            print(json.dumps({"check": name, "rank": rank, "error": error}), flush=True)
        if error is not None:
            os._exit(1)
    dist.destroy_process_group()


def run_example(rank, ranks, port, arguments):
    """As torchrun does; the examples compare with one process themselves."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_PORT=port)
    sys.argv = [str(EXAMPLES / arguments[0]), *arguments[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


def run_examples(names):
    """names: EXAMPLE.py ARGUMENTS@RANKS."""
    os.environ["MASTER_ADDR"] = "localhost"
    for name in names:
        arguments, ranks = name.split("@")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        error = None
        try:
            mp.start_processes(run_example, (int(ranks), port, arguments.split()), int(ranks), start_method="fork")
        except mp.ProcessRaisedException as raised:
            error = str(raised)
        print(json.dumps({"check": name, "error": error}), flush=True)


if __name__ == "__main__":
    *names, path = sys.argv[1:]
    examples = [name for name in names if ".py" in name]
    on_gpus = [name for name in names if name.endswith("gpus")]  # CHECK@RANKSgpus
    checks = [name for name in names if name not in (*examples, *on_gpus)]
    if examples or {"tensor_parallel", "prompt_in_parts"} & {name.split("@")[0] for name in checks}:
        import kvevict.hf  # noqa: F401 - takes seconds, here once for all ranks
    if checks:
        mp.start_processes(run, (checks, path), nprocs=RANKS, start_method="fork")
    for ranks in {int(name.split("@")[1].removesuffix("gpus")) for name in on_gpus}:
        own = [name for name in on_gpus if name.endswith(f"@{ranks}gpus")]
        mp.start_processes(run_on_gpus, (own, f"{path}{ranks}", ranks), nprocs=ranks, start_method="spawn")
    run_examples(examples)
