"""What rows keep, and the blocks that are free then: lists made by hand, and the kernels against plain Python."""

import itertools

import pytest
import torch
from conftest import DEVICE

from kvevict.backends import reference, triton

backends = pytest.mark.parametrize("backend", [reference, triton], ids=["reference", "triton"])
WHOLE = 10**12


def tensor(values, dtype=torch.int64):
    return None if values is None else torch.tensor(values, dtype=dtype, device=DEVICE)


@backends
@pytest.mark.parametrize("lengths, S, keep, share, most, expected", [
    ([9, 4, 1], 9, None, WHOLE // 2, 9, [5, 2, 1]),  # 4.5 up, 2, and a half at least 1
    ([9, 4, 1], 9, None, WHOLE, 6, [6, 4, 1]),
    ([9, 4, 3], 9, [2, 7, 3], WHOLE, 9, [2, 4, 3]),
    ([[9, 0], [1, 8]], 9, None, WHOLE // 4, 9, [[2, 0], [1, 2]]),  # 2.25; a head without a token keeps none
    ([[9, 0], [1, 8]], 9, [3, 5], WHOLE, 9, [[3, 0], [1, 5]]),
    ([9, 4], 9, [[3, 4], [5, 1]], WHOLE, 9, [[3, 4], [4, 1]]),
    (None, 9, [[3, 12]], WHOLE, 9, [[3, 9]]),
    ([4_600_000], 4_600_000, None, 7, 4_600_000, [1]),
    ([4_000_001], 4_600_000, None, WHOLE - 1, 4_600_000, [4_000_001]),
])  # fmt: skip
def test_counts_by_hand(backend, lengths, S, keep, share, most, expected):
    kept, ok = torch.empty_like(tensor(expected)), torch.zeros(1, dtype=torch.bool, device=DEVICE)
    backend.keep_counts(tensor(lengths, torch.int32), S, tensor(keep), share, most, kept, ok)
    assert kept.tolist() == expected and ok.item()


@backends
@pytest.mark.parametrize("lengths, keep, fine", [
    ([9] * 300, [1] * 300, True), ([9] * 300, [1] * 299 + [0], False), ([9, 9], [-1, 1], False),
    ([[9, 0]], [[1, 0]], True), ([[9, 1]], [[1, 0]], False),
])  # fmt: skip
def test_a_row_with_a_token_keeps_one(backend, lengths, keep, fine):
    kept, ok = torch.empty_like(tensor(keep)), torch.zeros(1, dtype=torch.bool, device=DEVICE)
    backend.keep_counts(tensor(lengths), 9, tensor(keep), WHOLE, 9, kept, ok)
    assert ok.item() == fine


@backends
@pytest.mark.parametrize("from_end, freed", [
    (False, [[-1, -1, 12, -1], [21, -1, -1, -1], [-1, -1, -1, 34]]),
    (True, [[10, -1, -1, -1], [-1, -1, -1, -1], [-1, -1, -1, -1]]),
], ids=["front", "tail"])  # fmt: skip
def test_blocks_by_hand(backend, from_end, freed):
    """Blocks of 4 tokens: 12 of which 8 stay, 3 of which none does, 16 of which 12 stay or 13."""
    table = tensor([[10, 11, 12, 99], [21, 99, 99, 99], [31, 32, 33, 34]], torch.int32)
    lengths, kept = tensor([12, 3, 16], torch.int32), tensor([8, 0, 12])
    if from_end:
        kept[2] = 13
    held, found = torch.empty_like(lengths), torch.empty_like(table)
    backend.left_blocks(table, lengths, kept, 4, from_end, held, found)
    assert held.tolist() == kept.tolist() and found.tolist() == freed


@pytest.mark.parametrize("from_end", [False, True], ids=["front", "tail"])
@pytest.mark.parametrize("per_head", [False, True], ids=["table-per-request", "table-per-head"])
def test_every_block_without_a_token_is_free(from_end, per_head):
    B, H, block_size, columns = 2, 3, 3, 300  # two tiles of columns
    generator = torch.Generator().manual_seed(0)
    shape = (B, H) if per_head else (B,)
    table = torch.randperm(B * H * columns, generator=generator)[: torch.Size(shape).numel() * columns]
    table = tensor(table.view(*shape, columns).tolist(), torch.int32)
    lengths = torch.randint(1, columns * block_size + 1, shape, generator=generator).to(DEVICE)
    kept = (lengths * torch.rand(shape, generator=generator).to(DEVICE)).long()
    kept[0] = lengths[0]
    held, freed = torch.empty_like(lengths), torch.empty_like(table)
    triton.left_blocks(table, lengths, kept, block_size, from_end, held, freed)
    assert torch.equal(held, kept)
    for at in itertools.product(*map(range, shape)):
        length, stay = int(lengths[at]), int(kept[at])
        slots = range(length - stay, length + 1) if from_end else range(stay)  # at its end, a next token's as well
        used, full = ({slot // block_size for slot in s} for s in (range(length), slots))
        assert freed[at].tolist() == [int(table[at][c]) if c in used - full else -1 for c in range(columns)]


@backends
def test_slots_from_the_end(backend):
    indices = torch.arange(0, 2100, 3, device=DEVICE).view(1, 1, 700).repeat(1, 3, 1)  # more than one tile
    indices[0, 1, 650:], indices[0, 2] = -1, -1
    out = torch.empty_like(indices)
    backend.slots_from_end(indices, tensor([2100]), out)
    assert out[0, 0].tolist() == [2099 - i for i in range(2097, -1, -3)]
    assert out[0, 1].tolist() == [2099 - i for i in range(1947, -1, -3)] + [-1] * 50
    assert out[0, 2].tolist() == [-1] * 700
