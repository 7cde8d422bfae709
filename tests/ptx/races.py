"""Happens-before between accesses of global memory, within one launch.

A program's time is the number of barriers that it has passed. What it did before its last barrier is known to whoever
acquires a value that it released; and what it acquired holds for all its threads from its next barrier on. Accesses by
different programs that are not ordered so, and accesses by different warps of one program without a barrier between
them, are reported where one of them writes (and changes something: two programs may write what is there already).

Limits. Per address the last write, the last strong write (atomic, release, relaxed) and the last two unordered reads
are remembered. An acquiring or releasing thread without a barrier beside it is not seen as ordered, though it would be.
"""

import numpy as np
from numpy import int32


class Clock:
    """What one program knows of the others' progress."""

    def __init__(self, program: int, programs: int):
        self.program = program
        self.epoch = 0
        self.known = np.zeros(programs, int32)  # what program p did in its epochs below known[p] happened before
        self._acquired = np.zeros(programs, int32)

    def barrier(self) -> None:
        self.epoch += 1
        np.maximum(self.known, self._acquired, out=self.known)

    def release(self, released: dict[int, np.ndarray], addresses) -> None:
        now = self.known.copy()
        now[self.program] = self.epoch
        for address in addresses:
            released[address] = np.maximum(now, released.get(address, 0))

    def acquire(self, released: dict[int, np.ndarray], addresses) -> None:
        for address in addresses:
            if address in released:
                np.maximum(self._acquired, released[address], out=self._acquired)


class _Marks:
    """Who touched each granule last: (program or -1, its epoch then, the thread)."""

    def __init__(self, size: int):
        self.program = np.full(size, -1, int32)
        self.epoch = np.zeros(size, int32)
        self.thread = np.zeros(size, int32)

    def set(self, where, clock: Clock, threads) -> None:
        self.program[where], self.epoch[where], self.thread[where] = clock.program, clock.epoch, threads

    def copy(self, other: "_Marks", where) -> None:
        self.program[where], self.epoch[where] = other.program[where], other.epoch[where]
        self.thread[where] = other.thread[where]

    def unordered(self, where, clock: Clock):
        """Which were touched by another program, and not before now."""
        program = self.program[where]
        return (program >= 0) & (program != clock.program) & (self.epoch[where] >= clock.known[program])

    def same_epoch(self, where, clock: Clock, warps):
        """Which were touched by another warp of this program since its last barrier."""
        mine = (self.program[where] == clock.program) & (self.epoch[where] == clock.epoch)
        return mine & (self.thread[where] >> 5 != warps)


class Shadow:
    """The accesses of one region of memory, in granules of `grain` bytes.

    read, write and strong take the granules' numbers, the thread of each, and call report(kind, granule's number)."""

    def __init__(self, size: int, grain: int):
        self.grain = grain
        granules = size // grain + 1
        self.writes, self.strong, self.reads, self.earlier_reads = (_Marks(granules) for _ in range(4))

    def granules(self, offsets, width: int):
        """Of accesses of `width` bytes each at these offsets."""
        return (offsets[:, None] // self.grain + np.arange(width // self.grain)).ravel()

    def _check(self, marks: _Marks, where, threads, clock: Clock, report, text: str, only=True) -> None:
        for bad, kind in (
            (marks.unordered(where, clock), f"race: {text.format('program')}"),
            (marks.same_epoch(where, clock, threads >> 5), f"race: {text.format('warp')}, no barrier between"),
        ):
            bad = bad & only
            if bad.any():
                report(kind, int(where[bad][0]))

    def read(self, where, threads, clock: Clock, report) -> None:
        self._check(self.writes, where, threads, clock, report, "read of another {}'s write")
        self._check(self.strong, where, threads, clock, report, "plain read of another {}'s atomic")
        moved = where[(self.reads.program[where] != clock.program) & self.reads.unordered(where, clock)]
        self.earlier_reads.copy(self.reads, moved)
        self.reads.set(where, clock, threads)

    def write(self, where, threads, clock: Clock, report, new, old) -> None:
        """new and old: the granules' contents as unsigned numbers."""
        order = np.argsort(where, kind="stable")
        twice = (where[order][1:] == where[order][:-1]) & (new[order][1:] != new[order][:-1])
        if twice.any():
            report("race: two threads write one address, different values", int(where[order][1:][twice][0]))
        changed = new != old
        self._check(self.writes, where, threads, clock, report, "write over another {}'s write", changed)
        self._check(self.strong, where, threads, clock, report, "plain write over another {}'s atomic", changed)
        for marks in (self.reads, self.earlier_reads):
            self._check(marks, where, threads, clock, report, "write of what another {} reads", changed)
        self.writes.set(where, clock, threads)

    def atomic(self, where, threads, clock: Clock, report) -> None:
        """An atomic operation, or a strong store."""
        self._check(self.writes, where, threads, clock, report, "atomic on another {}'s plain write")
        for marks in (self.reads, self.earlier_reads):
            self._check(marks, where, threads, clock, report, "atomic on what another {} reads plainly")
        self.strong.set(where, clock, threads)
