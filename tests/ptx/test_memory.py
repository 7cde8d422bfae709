"""What must be found: addresses that are none, hazards in shared memory, races in global memory, deadlock. And what
must not be reported: the same accesses, put in order."""

import numpy as np
import pytest
import torch

import ptx
from ptx.assemble import module, word_of_thread, words

SEEDS = range(6)
OWN_SHARED = "shl.b32 %r90, %r1, 2;"  # the address of the thread's own word
LEADER = "setp.eq.s32 %p9, %r1, 0;"


def run(emulator, body, tensors, grid=(1,), threads=64, shared=0, **settings) -> set[str]:
    """The kinds of problems seen."""
    with emulator.using(**settings) as problems:
        emulator.run(module(body, len(tensors), threads), tensors, grid, shared)
        return problems.kinds()


def over_seeds(emulator, body, make, grid, **settings) -> set[str]:
    return set().union(*(run(emulator, body, make(), grid, seed=seed, **settings) for seed in SEEDS))


# Addresses


@pytest.mark.parametrize("access", ["ld.global.b32 %r2, [%rd9+{}];", "st.global.b32 [%rd9+{}], %r1;"])
@pytest.mark.parametrize("offset", [-4, 4])
def test_outside_every_tensor(emulator, access, offset):
    body = word_of_thread("%rd9", "%rd1") + "\n" + access.format(offset)
    with pytest.raises(ptx.EmulationError, match=r"1 of 64 threads outside every tensor.* of 0 of 256 bytes"):
        run(emulator, body, [words(64)])


def test_masked_threads_access_nothing(emulator):
    body = word_of_thread("%rd9", "%rd1") + "\nsetp.lt.s32 %p1, %r1, 10;\n@%p1 st.global.b32 [%rd9], 7;"
    out = words(10)
    assert run(emulator, body, [out]) == set()
    assert out.tolist() == [7] * 10
    with pytest.raises(ptx.EmulationError, match="54 of 64 threads outside"):
        run(emulator, body.replace("@%p1", ""), [out])


def test_misaligned(emulator):
    with pytest.raises(ptx.EmulationError, match="not a multiple of 8"):
        run(emulator, "ld.global.b64 %rd8, [%rd1+4];", [words(64)])
    with pytest.raises(ptx.EmulationError, match="not a multiple of 16"):
        run(emulator, "ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd1+8];", [words(64)])
    with pytest.raises(ptx.EmulationError, match="shared address is not a multiple of 8"):
        run(emulator, "st.shared.b64 [global_smem+4], %rd1;", [words(64)], shared=64)


def test_outside_shared_memory(emulator):
    with pytest.raises(ptx.EmulationError, match="outside 252 bytes"):
        run(emulator, f"{OWN_SHARED}\nst.shared.b32 [%r90], %r1;", [words(1)], shared=252)


def test_two_tensors_in_one_access(emulator):
    a, b, out = (torch.arange(32, dtype=torch.int32) + 100 * k for k in range(3))
    body = f"""
        and.b32 %r2, %r1, 1;
        setp.eq.b32 %p1, %r2, 0;
        selp.b64 %rd7, %rd1, %rd2, %p1;
        {word_of_thread("%rd8", "%rd7")}
        {word_of_thread("%rd9", "%rd3")}
        ld.global.b32 %r3, [%rd8];
        st.global.b32 [%rd9], %r3;
    """
    run(emulator, body, [a, b, out], threads=32)
    assert out.tolist() == [t if t % 2 == 0 else 100 + t for t in range(32)]


# Shared memory: each thread writes its word; each reads the word of the thread 32 before or after it

EXCHANGE = f"""
    {OWN_SHARED}
    st.shared.b32 [%r90], %r1;
    {{barrier}}
    xor.b32 %r2, %r90, {{distance}};
    ld.shared.b32 %r3, [%r2];
    {word_of_thread("%rd9", "%rd1")}
    st.global.b32 [%rd9], %r3;
"""


@pytest.mark.parametrize("distance, barrier, found", [
    (128, "", {"shared: read after another warp's write, no barrier between"}),
    (128, "bar.warp.sync -1;", {"shared: read after another warp's write, no barrier between"}),
    (128, "bar.sync 0;", set()),
    (4, "", set()),  # within the warp, whose threads are in step
])  # fmt: skip
def test_shared_memory_is_read_after_a_barrier(emulator, distance, barrier, found):
    out = words(64)
    assert run(emulator, EXCHANGE.format(distance=distance, barrier=barrier), [out], shared=256) == found
    if not found:
        assert out.tolist() == [t ^ distance // 4 for t in range(64)]


@pytest.mark.parametrize("barrier", ["", "bar.sync 0;"])
@pytest.mark.parametrize("first, second, found", [
    ("ld.shared.b32 %r3, [%r2];", "st.shared.b32 [%r90], %r1;", "write of what another warp reads"),
    ("ld.shared.b32 %r3, [global_smem];", "@%p9 st.shared.b32 [%r90], %r1;", "write of what another warp reads"),
    ("st.shared.b32 [%r2], %r1;", "st.shared.b32 [%r90], %r1;", "write after another warp's write"),
    ("atom.shared.add.u32 %r3, [%r2], 1;", "ld.shared.b32 %r4, [%r90];", "read after another warp's atomic"),
    ("red.shared.add.u32 [global_smem], 1;", "ld.shared.b32 %r4, [global_smem];", "read after another warp's atomic"),
    ("ld.shared.b32 %r3, [%r2];", "atom.shared.add.u32 %r4, [%r90], 1;", "atomic of what another warp reads"),
])  # fmt: skip
def test_hazards_of_shared_memory(emulator, first, second, found, barrier):
    body = f"{OWN_SHARED}\n{LEADER}\nxor.b32 %r2, %r90, 128;\n{first}\n{barrier}\n{second}"
    kinds = run(emulator, body, [words(1)], shared=256)
    assert kinds == (set() if barrier else {f"shared: {found}, no barrier between"})


COPY = f"""
    {OWN_SHARED}
    shl.b32 %r91, %r1, 4;
    cvt.u64.u32 %rd7, %r91;
    add.s64 %rd8, %rd1, %rd7;
    cp.async.cg.shared.global [%r91], [%rd8], 16;
    cp.async.commit_group;
    {{wait}}
    {{barrier}}
    xor.b32 %r2, %r91, {{distance}};
    ld.shared.b32 %r3, [%r2];
    {word_of_thread("%rd9", "%rd2")}
    st.global.b32 [%rd9], %r3;
"""


@pytest.mark.parametrize("wait, barrier, distance, found", [
    ("", "bar.sync 0;", 16, "shared: access of bytes that cp.async is still writing"),
    ("cp.async.wait_group 1;", "bar.sync 0;", 16, "shared: access of bytes that cp.async is still writing"),
    ("cp.async.wait_group 0;", "", 1024 // 2, "shared: read after another warp's write, no barrier between"),
    ("cp.async.wait_group 0;", "bar.sync 0;", 1024 // 2, None),
    ("cp.async.wait_all;", "bar.sync 0;", 16, None),
])  # fmt: skip
def test_copies_are_waited_for(emulator, wait, barrier, distance, found):
    source, out = torch.arange(256, dtype=torch.int32), words(64, -1)
    body = COPY.format(wait=wait, barrier=barrier, distance=distance)
    assert run(emulator, body, [source, out], shared=1024) == ({found} if found else set())
    if found is None:
        assert out.tolist() == [4 * (t ^ distance // 16) for t in range(64)]
    elif "still" in found:
        assert out.tolist() != [4 * (t ^ distance // 16) for t in range(64)]  # it lands as late as it may


# Global memory, within a program


@pytest.mark.parametrize("threads, barrier, found", [
    (64, "", {"race: read of another warp's write, no barrier between"}),
    (64, "bar.sync 0;", set()),
    (32, "", set()),
])  # fmt: skip
def test_warps_exchange_through_global_memory(emulator, threads, barrier, found):
    body = f"""
        {word_of_thread("%rd9", "%rd1")}
        st.global.b32 [%rd9], %r1;
        {barrier}
        xor.b32 %r2, %r1, {threads // 2};
        mad.wide.u32 %rd8, %r2, 4, %rd1;
        ld.global.b32 %r3, [%rd8];
    """
    assert run(emulator, body, [words(threads)], threads=threads) == found


def test_two_threads_write_one_address(emulator):
    assert run(emulator, "st.global.b32 [%rd1], %r1;", [words(1)], threads=32) == {
        "race: two threads write one address, different values"
    }
    assert run(emulator, "st.global.b32 [%rd1], 5;", [words(1)], threads=32) == set()


# Global memory, between programs


def test_programs_write_what_is_there_already(emulator):
    """The same value from everyone is no race; different values are one, in whatever order they come."""
    same, own = "st.global.b32 [%rd1], 5;", "mov.u32 %r2, %ctaid.x;\nst.global.b32 [%rd1], %r2;"
    assert over_seeds(emulator, same, lambda: [words(1, 5)], (3,)) == set()
    assert over_seeds(emulator, own, lambda: [words(1)], (3,)) == {"race: write over another program's write"}


def test_plain_reads_race_with_atomics(emulator):
    body = "atom.global.gpu.relaxed.add.u32 %r2, [%rd1], 1;\n{}\nld.global.b32 %r3, [%rd1];"
    for barrier in ("", "bar.sync 0;"):
        kinds = over_seeds(emulator, body.format(barrier), lambda: [words(1)], (3,))
        assert "race: plain read of another program's atomic" in kinds


PASS = f"""
    {LEADER}
    mov.u32 %r80, %ctaid.x;
    setp.ne.s32 %p1, %r80, 0;
    @%p1 bra $L__reader;
    {word_of_thread("%rd9", "%rd1")}
    st.global.b32 [%rd9], 42;
    {{barrier}}
    {{release}}
    bra.uni $L__end;
    $L__reader:
    {{wait}}
    {{barrier_after}}
    xor.b32 %r2, %r1, 32;
    mad.wide.u32 %rd8, %r2, 4, %rd1;
    ld.global.b32 %r3, [%rd8];
    {word_of_thread("%rd7", "%rd3")}
    st.global.b32 [%rd7], %r3;
    $L__end:
"""
RELEASE = "@%p9 st.global.gpu.release.b32 [%rd2], 1;"
WAIT = """
    $L__spin:
    ld.global.gpu.acquire.b32 %r4, [%rd2];
    setp.eq.s32 %p2, %r4, 0;
    @%p2 bra $L__spin;
"""
# whoever comes second, the reader or the writer, is the one that is reported
UNORDERED = {"race: read of another program's write", "race: write of what another program reads"}


@pytest.mark.parametrize("name, changes, racy", [
    ("as it should be", {}, False),
    ("exchange", {"release": "@%p9 atom.global.gpu.release.exch.b32 %r5, [%rd2], 1;"}, False),
    ("a read-modify-write waits", {"wait": WAIT.replace("ld.global.gpu.acquire.b32 %r4, [%rd2]",
                                                        "atom.global.gpu.acquire.add.u32 %r4, [%rd2], 0")}, False),
    ("no barrier before the release", {"barrier": ""}, True),
    ("no barrier after the acquire", {"barrier_after": ""}, True),
    ("relaxed release", {"release": RELEASE.replace("release", "relaxed")}, True),
    ("relaxed acquire", {"wait": WAIT.replace("acquire", "relaxed")}, True),
    ("no wait", {"wait": ""}, True),
])  # fmt: skip
def test_a_message_between_programs(emulator, name, changes, racy):
    parts = {"barrier": "bar.sync 0;", "release": RELEASE, "wait": WAIT, "barrier_after": "bar.sync 0;", **changes}
    kinds, outs = set(), []
    for seed in SEEDS:
        tensors = [words(64), words(1), words(64)]
        kinds |= run(emulator, PASS.format(**parts), tensors, (2,), seed=seed)
        outs.append(tensors[2].tolist())
    assert kinds <= UNORDERED and bool(kinds) == racy
    assert racy or outs == [[42] * 64] * len(SEEDS)


def test_a_write_after_another_program_has_read(emulator):
    """The other way round: program 1 reads, program 0 overwrites, unordered; and in order, by a message."""
    body = PASS.format(barrier="", release="", wait="", barrier_after="")
    assert "race: write of what another program reads" in over_seeds(
        emulator, body, lambda: [words(64), words(1), words(64)], (2,)
    )


def test_a_copy_may_read_until_it_is_waited_for(emulator):
    """Program 0 copies and says too early that it has read; program 1 overwrites what it copies."""
    body = f"""
        {LEADER}
        mov.u32 %r80, %ctaid.x;
        setp.ne.s32 %p1, %r80, 0;
        shl.b32 %r91, %r1, 4;
        cvt.u64.u32 %rd7, %r91;
        add.s64 %rd8, %rd1, %rd7;
        @%p1 bra $L__writer;
        cp.async.cg.shared.global [%r91], [%rd8], 16;
        cp.async.commit_group;
        {{early}}
        bar.sync 0;
        {RELEASE}
        cp.async.wait_group 0;
        bra.uni $L__end;
        $L__writer:
        {WAIT}
        bar.sync 0;
        st.global.b32 [%rd8], 1;
        $L__end:
    """
    for early, racy in (("", True), ("cp.async.wait_group 0;", False)):
        kinds = over_seeds(emulator, body.format(early=early), lambda: [words(256), words(1)], (2,), shared=1024)
        assert kinds <= UNORDERED and bool(kinds) == racy


@pytest.mark.parametrize("seed", [None, 0])
def test_deadlock(emulator, seed):
    body = PASS.format(barrier="bar.sync 0;", release="", wait=WAIT, barrier_after="bar.sync 0;")
    with pytest.raises(ptx.EmulationError, match="deadlock, 1 programs wait, 0 have not started"):
        run(emulator, body, [words(64), words(1), words(64)], (2,), seed=seed)


def test_programs_that_are_not_resident_cannot_be_waited_for(emulator):
    """Program 0 waits for program 1, which starts when program 0 has ended."""
    body = PASS.replace("setp.ne.s32 %p1", "setp.eq.s32 %p1").format(
        barrier="bar.sync 0;", release=RELEASE, wait=WAIT, barrier_after="bar.sync 0;"
    )
    assert run(emulator, body, [words(64), words(1), words(64)], (2,), resident=2) == set()
    with pytest.raises(ptx.EmulationError, match="deadlock, 1 programs wait, 1 have not started"):
        run(emulator, body, [words(64), words(1), words(64)], (2,), resident=1)


def test_warps_at_different_barriers(emulator):
    body = """
        setp.lt.s32 %p1, %r1, 32;
        @%p1 bra $L__low;
        bar.sync 0;
        bra.uni $L__end;
        $L__low:
        bar.sync 0;
        $L__end:
    """
    with pytest.raises(ptx.EmulationError, match="different barriers"):
        run(emulator, body, [words(1)])


def test_interleavings_differ_by_seed_and_are_repeatable(emulator):
    """A lost update: every program reads, then writes one more."""
    body = "ld.global.gpu.relaxed.b32 %r2, [%rd1];\nadd.s32 %r2, %r2, 1;\nst.global.gpu.relaxed.b32 [%rd1], %r2;"

    def result(seed):
        out = words(1)
        run(emulator, body, [out], (8,), threads=32, seed=seed)
        return out.item()

    results = [result(seed) for seed in range(20)]
    assert results == [result(seed) for seed in range(20)]
    assert len(set(results)) > 2


# Counts


def test_counts(emulator):
    body = f"""
        {word_of_thread("%rd9", "%rd1")}
        ld.global.b32 %r2, [%rd9];
        mad.wide.u32 %rd8, %r1, 32, %rd1;
        ld.global.b32 %r3, [%rd8];
        shl.b32 %r4, %r1, 7;
        st.shared.b32 [%r4], %r2;
        {OWN_SHARED}
        st.shared.b32 [%r90+4096], %r2;
    """
    emulator.counts.clear()
    run(emulator, body, [torch.zeros(1024, dtype=torch.int32)], threads=32, shared=8192, measure=True)
    (counts,) = emulator.counts
    loads, stores, shared = counts.traffic()
    own, strided = (counts.global_accesses[k] for k in sorted(counts.global_accesses))
    # a storage may begin anywhere within a sector
    assert own[[0, 1, 3, 4]].tolist() == [1, 32, 128, 128] and own[2] in (4, 5) and own[5] in (1, 2)
    assert strided[[0, 1, 2, 3]].tolist() == [1, 32, 32, 128] and strided[5] in (8, 9)
    assert np.array_equal(loads, own + strided) and not stores.any()
    assert shared.tolist() == [2, 32 + 1, 2]  # all in one bank; each in its own
    assert counts.by_class() == {
        "param": 1, "move": 1, "integer 64": 2, "global": 2, "integer": 2, "shared": 2, "branch": 1
    }  # fmt: skip
    emulator.counts.clear()
