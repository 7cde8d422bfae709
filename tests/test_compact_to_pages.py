"""A dense cache cut into pages, a table for each head, against plain Python."""

import pytest
import torch
from cases import as_bytes, both, cache, name
from conftest import DEVICE

import kvevict
from kvevict import validate
from kvevict.paged import compact_to_pages

B, H, S, D, DV, M, SIZE, BLOCKS = 2, 3, 30, 16, 24, 12, 4, 20
COUNTS = [[12, 0, 5], [4, 8, 1]]
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.uint8]


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def chosen(seed=0):
    """[B, H, M] ascending, COUNTS of each head."""
    generator = torch.Generator().manual_seed(seed)
    rows = [sorted(torch.randperm(S, generator=generator)[:count].tolist()) for own in COUNTS for count in own]
    return torch.tensor([row + [-1] * (M - len(row)) for row in rows], device=DEVICE).view(B, H, M)


def pages(dtype=torch.float32, layout="apart"):
    """Random key and value caches, so that what is written and what is not both show."""
    generator = torch.Generator().manual_seed(1)
    shape = (BLOCKS, SIZE, 1, D + DV)
    memory = torch.randint(0, 40, shape, generator=generator).float().to(dtype).to(DEVICE)
    if layout == "apart":
        return [as_bytes(x).clone().view(dtype) for x in (memory[..., :D], memory[..., D:])]
    return [memory[..., :D], memory[..., D:]]  # a key's row and its value's in one


FREE = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(2)).int().to(DEVICE)


def expected_pages(keys, values, indices, caches, free):
    """Plain Python: (tables, lengths, taken), and the caches as they must be, as bytes."""
    free, tables = list(free), []
    wanted = [as_bytes(x).clone() for x in caches]
    taken = 0
    for b in range(B):
        tables.append([])
        for h in range(H):
            tokens = [i for i in indices[b][h] if i >= 0]
            own = [free[taken + i] for i in range(-(-len(tokens) // SIZE))]
            taken += len(own)
            tables[b].append(own)
            for slot, token in enumerate(tokens):
                for rows, new in zip((keys, values), wanted, strict=True):
                    new[own[slot // SIZE], slot % SIZE, 0] = as_bytes(rows)[b, h, token]
    return tables, taken, wanted


@pytest.mark.parametrize("layout", ["BHSD", "BSHD", "sliced", "expanded", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_every_kept_row_lies_where_its_table_says(dtype, layout):
    keys, values = cache((B, H, S, D, DV), dtype, "BHSD" if layout in ("expanded", "interleaved") else layout)
    if layout == "expanded":
        keys, values = (x[:, :1].expand(-1, H, -1, -1) for x in (keys, values))
    indices = chosen()
    before = [as_bytes(x).clone() for x in (keys, values)]

    def run():
        caches = pages(dtype, "side by side" if layout == "interleaved" else "apart")
        tables, taken, wanted = expected_pages(keys, values, indices.tolist(), caches, FREE.tolist())
        result = compact_to_pages(keys, values, indices, *caches, FREE)
        for found, new in zip(caches, wanted, strict=True):
            assert torch.equal(as_bytes(found), new)
        assert result.block_tables.tolist() == [[own + [-1] * (3 - len(own)) for own in row] for row in tables]
        assert result.lengths.tolist() == COUNTS and result.taken.tolist() == [taken] == [9]
        assert {x.dtype for x in result} == {torch.int32}

    both(run)
    assert all(torch.equal(as_bytes(x), old) for x, old in zip((keys, values), before, strict=True))


def test_by_hand():
    """Two heads of 4 tokens, of which the first keeps 3 and the second none, in blocks of 2."""
    keys = torch.arange(8.0, device=DEVICE).view(1, 2, 4, 1)
    indices = torch.tensor([[[0, 2, 3], [-1, -1, -1]]], device=DEVICE)
    for backend in ("reference", "triton"):
        caches = [torch.full((3, 2, 1, 1), -9.0, device=DEVICE) for _ in range(2)]
        with kvevict.backend(backend):
            result = compact_to_pages(keys, -keys, indices, *caches, int32([2, 0, 1]), columns=3)
        assert result.block_tables.tolist() == [[[2, 0, -1], [-1, -1, -1]]]
        assert result.lengths.tolist() == [[3, 0]] and result.taken.tolist() == [2]
        assert caches[0].flatten().tolist() == [3, -9, -9, -9, 0, 2]
        assert caches[1].flatten().tolist() == [-3, -9, -9, -9, 0, -2]


def test_a_second_call_takes_the_next_blocks():
    """Layer after layer from one list of free blocks, with what `taken` says: nothing of the first layer is written."""
    keys, values = cache((B, H, S, D, DV))
    caches = pages()
    first = compact_to_pages(keys, values, chosen(), *caches, FREE)
    held = [x.clone() for x in caches]
    second = compact_to_pages(-keys, -values, chosen(1), *caches, FREE[int(first.taken) :])
    blocks = [{block for block in x.block_tables.flatten().tolist() if block >= 0} for x in (first, second)]
    assert not blocks[0] & blocks[1] and len(blocks[0]) == len(blocks[1]) == 9
    own = sorted(blocks[0])
    assert all(torch.equal(x[own], old[own]) for x, old in zip(caches, held, strict=True))


def good():
    (keys, values), (key_cache, value_cache) = cache((B, H, S, D, DV)), pages()
    return dict(keys=keys, values=values, indices=chosen(), key_cache=key_cache, value_cache=value_cache, free=FREE)


def with_one(x, at, value):
    x = x.clone()
    x[at] = value
    return x


def in_one_allocation(a):
    """keys that end where key_cache begins, but for one row."""
    memory = torch.zeros(a["keys"].numel() + a["key_cache"].numel() - D, device=DEVICE)
    keys, key_cache = memory[: a["keys"].numel()], memory[-a["key_cache"].numel() :]
    return dict(keys=keys.view(B, H, S, D), key_cache=key_cache.view(BLOCKS, SIZE, 1, D))


BAD = [
    ("keys has shape", lambda a: dict(keys=a["keys"][0])),
    ("values has shape", lambda a: dict(values=a["values"][:, :1])),
    ("indices has dtype", lambda a: dict(indices=a["indices"].int())),
    ("indices has shape", lambda a: dict(indices=a["indices"][:, :1])),
    ("(?s)indices is .*ascend", lambda a: dict(indices=a["indices"].flip(2))),
    ("(?s)indices is .*0 to 29", lambda a: dict(indices=with_one(a["indices"], (0, 0, 11), S))),
    ("key_cache has dtype", lambda a: dict(key_cache=a["key_cache"].half())),
    ("key_cache has shape", lambda a: dict(key_cache=a["key_cache"][:, :, 0])),
    ("key_cache .*expected .num_blocks, block_size, 1, 16", lambda a: dict(key_cache=a["key_cache"][..., :8])),
    ("key_cache .*num_blocks, block_size, 1", lambda a: dict(key_cache=a["key_cache"].repeat(1, 1, H, 1))),
    ("value_cache has shape", lambda a: dict(value_cache=a["value_cache"][:-1])),
    ("value_cache .*share memory", lambda a: dict(value_cache=a["value_cache"][:1].expand(BLOCKS, -1, -1, -1))),
    ("value_cache shares", lambda a: dict(values=a["keys"], value_cache=a["key_cache"])),
    ("key_cache shares memory with keys", in_one_allocation),
    ("free has dtype", lambda a: dict(free=a["free"].long())),
    ("free is .*enough blocks", lambda a: dict(free=a["free"][:8])),
    ("free is .*no block twice", lambda a: dict(free=with_one(a["free"], 8, int(FREE[0])))),
    ("free is .*blocks from 0 to 19", lambda a: dict(free=a["free"] + 12)),
    ("counts is .*from 0 to 8, columns", lambda a: dict(columns=2)),
    ("columns is 0", lambda a: dict(columns=0)),
    ("columns is 3.0", lambda a: dict(columns=3.0)),
]


@pytest.mark.skipif(DEVICE != "cpu", reason="values are asserted on the device")
@pytest.mark.parametrize("message, spoil", BAD, ids=[message for message, _ in BAD])
def test_what_is_wrong_is_named_and_nothing_is_written(message, spoil):
    arguments = good()
    arguments |= spoil(arguments)
    before = {key: x.clone() for key, x in arguments.items() if isinstance(x, torch.Tensor)}
    for backend in ("reference", "triton"):
        with kvevict.backend(backend), pytest.raises((TypeError, ValueError), match=message):
            compact_to_pages(**arguments)
    assert all(torch.equal(arguments[key], x) for key, x in before.items())


def test_a_source_among_the_blocks_is_seen_whatever_its_strides():
    memory = torch.randn(3, SIZE, 1, D, device=DEVICE)
    keys = memory[2:].transpose(1, 2)  # one request of one head: the last block, strided as blocks are
    free, indices = int32([0]), torch.zeros(1, 1, 1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="key_cache shares memory with keys"):
        compact_to_pages(keys, keys, indices, memory, memory.clone(), free)


def test_offsets_are_int64():
    """Blocks 2³⁰ elements apart, of which few are touched."""
    keys = torch.randint(0, 255, (1, 2, 9, D), dtype=torch.uint8, device=DEVICE)
    indices = torch.tensor([[[0, 2, 4, 5, 8], [1, 3, -1, -1, -1]]], device=DEVICE)
    for backend in ("reference", "triton"):
        new_keys = torch.empty_strided((4, 2, 1, D), (2**30, D, D, 1), dtype=torch.uint8, device=DEVICE)
        new_values = torch.empty((4, 2, 1, D), dtype=torch.uint8, device=DEVICE)
        with kvevict.backend(backend):
            compact_to_pages(keys, keys, indices, new_keys, new_values, int32([3, 2, 1, 0]))
        found = new_keys[[3, 2, 1, 0]].flatten(0, 1)[:, 0]
        assert torch.equal(found[:5], keys[0, 0, indices[0, 0]]) and torch.equal(found[6:], keys[0, 1, [1, 3]])


def test_compiles_whole():
    def call(keys, values, indices, key_cache, value_cache, free):
        rows = compact_to_pages(keys, values, indices, key_cache, value_cache, free)
        return (*rows, key_cache + 1)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with kvevict.backend("reference" if DEVICE == "cpu" else "auto"):
        for m in (12, 9):
            arguments, others = ({**good(), "indices": chosen()[..., :m].contiguous()} for _ in range(2))
            expected, got = call(*arguments.values()), compiled(*others.values())
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
            assert torch.equal(arguments["value_cache"], others["value_cache"])
        if DEVICE == "cpu":
            with pytest.raises(Exception, match="free is .*enough blocks"):
                compiled(**good() | dict(free=FREE[:2]))


def test_no_value_is_read_by_the_host(monkeypatch):
    """But by the checks of a CPU's values, which a GPU makes on the device."""
    arguments, expected = good(), good()
    with kvevict.backend("triton"):
        compact_to_pages(**expected)

        def refuse(*_, **__):
            raise AssertionError("the host reads a tensor's value")

        monkeypatch.setattr(validate, "require", lambda *_: None)
        for read in ("__bool__", "__int__", "__float__", "__index__", "__len__", "item", "tolist", "numpy", "nonzero"):
            monkeypatch.setattr(torch.Tensor, read, refuse)
        compact_to_pages(**arguments)
    monkeypatch.undo()
    assert torch.equal(arguments["key_cache"], expected["key_cache"])


@pytest.mark.gpu
def test_captured_in_a_graph():
    arguments, expected = good(), good()
    rows = compact_to_pages(**expected)
    caches = [arguments["key_cache"], arguments["value_cache"]]
    before = [x.clone() for x in caches]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compact_to_pages(**arguments)
    for x, old in zip(caches, before, strict=True):
        x.copy_(old)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, rows, strict=True))
    assert all(torch.equal(x, expected[name]) for x, name in zip(caches, ("key_cache", "value_cache"), strict=True))
