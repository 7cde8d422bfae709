"""A program's shared memory: bounds, and the hazards between its warps.

Two warps that touch one byte between two barriers, one of them writing, are reported. What cp.async copies lands as
late as it may, when its group is waited for; touching the bytes before that is reported. Memory starts as garbage.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy import int32, uint8, uint16, uint32

from .arithmetic import UNSIGNED
from .races import Clock
from .report import EmulationError


class Copy(NamedTuple):
    """One cp.async: `size` bytes per thread."""

    target: np.ndarray  # addresses in shared memory
    size: int
    threads: np.ndarray
    data: np.ndarray  # [threads, size] uint8
    source: list  # what it reads, for the check of races (see program.py)


class _Marks:
    """Which warp touched each byte in which epoch."""

    SEVERAL = -2  # warps

    def __init__(self, size: int):
        self.warp, self.epoch = np.full(size, -1, int32), np.full(size, -1, int32)

    def clash(self, where, warps, epoch: int):
        return (self.epoch[where] == epoch) & (self.warp[where] != warps)

    def set(self, where, warps, epoch: int) -> None:
        self.warp[where] = np.where(self.clash(where, warps, epoch), self.SEVERAL, warps)
        self.epoch[where] = epoch


class SharedMemory:
    def __init__(
        self, size: int, clock: Clock, garbage: np.random.Generator, report: Callable[[str, str], None] | None
    ):
        """report(kind, detail) is told of hazards; None: they are not looked for."""
        self.size, self._clock, self._report = size, clock, report
        self._bytes = garbage.integers(0, 256, size // 16 * 16 + 16, dtype=uint8)
        self._views = {width: self._bytes.view(dtype) for width, dtype in UNSIGNED.items()}
        if report is not None:
            self._marks = {how: _Marks(size) for how in ("read", "write", "atomic")}
            after_write = (self._marks["write"], "after another warp's write")
            after_read = (self._marks["read"], "of what another warp reads")
            after_atomic = (self._marks["atomic"], "after another warp's atomic")
            self._rivals = {
                "read": (after_write, after_atomic),
                "write": (after_write, after_atomic, after_read),
                "atomic": (after_write, after_read),
            }
            self._arriving = np.zeros(size, bool)
        self._copies: list[Copy] = []  # of the group that is open
        self._groups: list[list[Copy]] = []

    def view(self, size: int) -> np.ndarray:
        """All of it, as unsigned numbers of `size` bytes."""
        return self._views[size]

    def touch(self, address: np.ndarray, width: int, threads: np.ndarray, how: str) -> None:
        """Check an access (how: read, write or atomic) of `width` bytes by each thread."""
        low, high = int(address.min()), int(address.max()) + width
        if low < 0 or high > self.size:
            raise EmulationError(f"shared addresses {low} to {high} outside {self.size} bytes")
        if (address & (width - 1)).any():
            raise EmulationError(f"a shared address is not a multiple of {width}")
        if self._report is None:
            return
        where, warps = (address[:, None] + np.arange(width)).ravel(), np.repeat(threads >> 5, width)
        if self._arriving[where].any():
            self._report("shared: access of bytes that cp.async is still writing", how)
        for marks, text in self._rivals[how]:
            bad = marks.clash(where, warps, self._clock.epoch)
            if bad.any():
                self._report(f"shared: {how} {text}, no barrier between", f"byte {where[bad][0]}")
        self._marks[how].set(where, warps, self._clock.epoch)

    # matrices of 8×8 elements of 16 bits

    def load_matrices(self, rows: np.ndarray, transposed: bool) -> list[np.ndarray]:
        """rows [count, warps, 8]: addresses. One register of two elements per matrix and thread."""
        elements = self.view(2)[(rows[..., None] // 2) + np.arange(8)]
        if transposed:
            elements = elements.swapaxes(2, 3)
        pairs = np.ascontiguousarray(elements).reshape(len(rows), -1, 2).view(uint32)[..., 0]
        return [np.ascontiguousarray(x) for x in pairs]

    def store_matrices(self, rows: np.ndarray, values: list[np.ndarray], transposed: bool) -> None:
        for row, value in zip(rows, values, strict=True):
            elements = value.view(uint16).reshape(-1, 8, 8)
            self.view(2)[(row[..., None] // 2) + np.arange(8)] = elements.swapaxes(1, 2) if transposed else elements

    # copies from global memory in the background

    def copy_later(self, copy: Copy) -> None:
        self.touch(copy.target, copy.size, copy.threads, "write")  # from now on, at any time
        if self._report is not None:
            self._arriving[(copy.target[:, None] + np.arange(copy.size)).ravel()] = True
        self._copies.append(copy)

    def commit(self) -> None:
        self._groups.append(self._copies)
        self._copies = []

    def wait(self, leave: int) -> list[Copy]:
        """All groups but the last `leave` are there. Returns their copies."""
        done = max(len(self._groups) - leave, 0)
        copies = [copy for group in self._groups[:done] for copy in group]
        del self._groups[:done]
        for target, size, threads, data, _ in copies:
            where = (target[:, None] + np.arange(size)).ravel()
            self._bytes[where] = data.ravel()
            if self._report is not None:
                self._arriving[where] = False
                self._marks["write"].set(where, np.repeat(threads >> 5, size), self._clock.epoch)
        return copies
