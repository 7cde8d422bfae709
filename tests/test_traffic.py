"""The bytes that keydiff_compact asks for, counted exactly in Triton's interpreter, against the floor."""

import pytest
import torch
from conftest import HAS_GPU

import kvevict
from bench.traffic import KeydiffCompact, counted

pytestmark = pytest.mark.skipif(HAS_GPU, reason="counts in Triton's interpreter")


@pytest.mark.parametrize("preserve_order", [True, False], ids=["ordered", "fewest-moves"])
@pytest.mark.parametrize("keep", [0.5, 0.1])
def test_keydiff_compact_moves_what_it_must(keep, preserve_order):
    S, D, H, e = 8192, 128, 2, 2
    keys, values = (torch.randn(1, H, S, D, dtype=torch.bfloat16) for _ in range(2))
    before = keys.clone()
    with kvevict.backend("triton"), counted() as traffic:
        result = kvevict.keydiff_compact(keys, values, keep=keep, preserve_order=preserve_order)
    n = result.keys.shape[2]
    if preserve_order:
        moved = n
    else:
        moved = int((result.indices[0] != torch.arange(n)).sum()) / H
    floor = KeydiffCompact(H, S, D, e, moved)
    assert traffic["bytes"] <= 1.05 * floor.bytes + 24 * S * H
    assert traffic["bytes"] >= floor.bytes  # the counter counts: two passes over K cannot do with less
    assert not torch.equal(before[:, :, :n], result.keys)
