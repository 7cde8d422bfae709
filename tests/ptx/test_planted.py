"""Does the instrument see errors? Each one is planted into compiled code that is right, and must be reported."""

import re

import pytest
import torch
import triton
import triton.language as tl

import ptx
from kvevict.backends import reference
from kvevict.backends import triton as kernels

S, n, D = 300, 200, 128  # blocks of 64 rows: 4 programs


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def move():
    slots = torch.arange(S - n, S)[None, None]  # every program overwrites what the two before it read
    kernels.move_rows(normal(1, 1, S, D), normal(1, 1, S, D), slots, True)


@triton.jit
def variance_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Two sums over all warps, the second of what the first one gives."""
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
    mean = tl.sum(x, 0) / n
    x = tl.where(offsets < n, x - mean, 0.0)
    tl.store(out_ptr + offsets, x * x / tl.sum(x * x, 0), mask=offsets < n)


def variance():
    variance_kernel[(1,)](normal(200).float(), torch.empty(200), 200, BLOCK=256)


def attention_lse():
    kernels.attention_lse(normal(1, 1, 100, D), normal(1, 1, S, D), 0.1, True, None, torch.empty(1, 1, 100))


SELECTED = torch.empty(1, 1, 4000, dtype=torch.int64)
reference.topk_indices(normal(1, 1, 8200).float().round(), None, 0, 0, False, None, SELECTED)


def select():
    """Five programs on one row, which meet between the rounds."""
    scores = normal(1, 1, 8200).float().round()
    indices = torch.empty(1, 1, 4000, dtype=torch.int64)
    kernels.topk_indices(scores, None, 0, 0, False, None, indices)
    assert torch.equal(indices, SELECTED)


def reported(emulator, run, error=None, seeds=1) -> set[str]:
    """The kinds of what is seen within a few interleavings, an EmulationError by its first words."""
    kinds = set()

    def rewrite(code):
        changed = error(code)
        assert changed != code, "nothing was planted"
        return changed

    for seed in range(seeds):
        with emulator.using(seed=seed, rewrite=error and rewrite) as problems:
            try:
                run()
            except ptx.EmulationError as stopped:
                kinds.add(next(x for x in ("deadlock", "outside every tensor") if x in str(stopped)))
            kinds |= problems.kinds()
    return kinds


def no_barrier_before_the_release(code):
    barrier = code.rindex("bar.sync", 0, re.search(r"\w+\.global\.gpu\.release", code).start())
    return code[:barrier] + "// " + code[barrier:]


def relaxed_release(code):
    return code.replace(".gpu.release.", ".gpu.relaxed.")


def relaxed_acquire(code):
    return code.replace(".gpu.acquire.", ".gpu.relaxed.").replace(".gpu.acq_rel.", ".gpu.relaxed.")


def no_wait(code):
    """Whatever the flag says, it is read as set."""
    return re.sub(r"(@!?%p\d+ )?ld\.global\.gpu\.acquire\.b32 (%r\d+),.*;", r"mov.b32 \2, 1;", code)


def flag_never_set(code):
    return re.sub(r"(\.gpu\.release\.exch\.b32 %r\d+, \[[^]]*\], )%r\d+", r"\g<1>0", code)


WRITE = "race: write of what another program reads"


@pytest.mark.parametrize("error, expected", [
    (no_barrier_before_the_release, WRITE),
    (relaxed_release, WRITE),
    (relaxed_acquire, WRITE),
    (no_wait, WRITE),
    (flag_never_set, "deadlock"),
])  # fmt: skip
def test_the_order_of_moves(emulator, error, expected):
    assert reported(emulator, move, seeds=4) == set()
    assert expected in reported(emulator, move, error, seeds=4)


def test_the_meeting_of_runs(emulator):
    """Without the order that the meeting gives, what other programs counted is read too early."""
    assert reported(emulator, select) == set()
    for error in (relaxed_acquire, relaxed_release):
        assert "race: read of another program's write" in reported(emulator, select, error)


@pytest.mark.slow
def test_a_meeting_is_left_as_a_replay_needs_it(emulator, monkeypatch):
    """In random orders, and in the same memory: as a CUDA graph launches it again."""
    empty, buffers = torch.empty, {}

    def again(*shape, **options):
        key = str((shape, options))
        if key not in buffers:
            buffers[key] = empty(*shape, **options)
        return buffers[key]

    monkeypatch.setattr(torch, "empty", again)
    assert reported(emulator, select, seeds=4) == set()
    assert len(buffers) == 3  # out, the counts, the meeting


def without_mask(access):
    return lambda code: re.sub(rf"@!?%p\d+ (?={access})", "", code)


@pytest.mark.parametrize("run, access", [
    (move, r"ld\.global\.v4"), (move, r"ld\.global\.(v2\.)?b64"), (variance, "ld.global"), (variance, "st.global"),
])  # fmt: skip
def test_a_missing_mask(emulator, run, access):
    assert "outside every tensor" in reported(emulator, run, without_mask(access))


def test_a_missing_barrier(emulator):
    """Each one matters: before the partial sums are read, before their sum is, before that memory is written again."""
    barriers = []

    def find(code):
        barriers.extend(found.start() for found in re.finditer("bar.sync", code))
        return code + "\n"

    assert reported(emulator, variance, find) == set()
    assert len(barriers) >= 3
    for at in barriers:
        kinds = reported(emulator, variance, lambda code, at=at: code[:at] + "// " + code[at:])
        assert {kind.partition(":")[0] for kind in kinds} == {"shared"}


def test_a_copy_that_is_not_waited_for(emulator):
    def error(code):
        return re.sub(r"(cp\.async\.wait_group\s+)(\d+)", lambda found: found[1] + str(int(found[2]) + 1), code)

    assert reported(emulator, attention_lse) == set()
    assert "shared: access of bytes that cp.async is still writing" in reported(emulator, attention_lse, error)
