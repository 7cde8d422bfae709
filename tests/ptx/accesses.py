"""A program's accesses of memory, each by those of its threads that run and that the predicate lets through."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy import int64, uint8, uint32, uint64

from . import warps
from .arithmetic import UNSIGNED, widened
from .report import EmulationError, Problem
from .shared import Copy, SharedMemory

if TYPE_CHECKING:
    from .program import Program

_ATOMICS = {
    "add": lambda old, new: old + new,
    "exch": lambda old, new: new,
    "cas": lambda old, compare, new: new if old == compare else old,
    "min": lambda old, new: min(old, new),
    "max": lambda old, new: max(old, new),
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
}


class Accesses:
    """The arguments are those of the instruction: base and offset of an address per thread; dtype, the type in memory;
    stored, that of the registers; old, what the registers to load into hold (None: nothing yet)."""

    def __init__(self, program: Program):
        self.program = program
        self.instruction = 0  # the number of the one that is executed
        self.waits = False  # whether the last access could be one step of a loop that waits
        launch = program.launch
        self.races = launch.settings.races
        report = self.report if self.races else None
        self.shared = SharedMemory(program.kernel.shared, program.clock, launch.random, report)

    def report(self, kind: str, detail: str) -> None:
        x = self.program.kernel.instructions[self.instruction]
        problem = Problem(kind, self.program.kernel.name, x.line, x.text)
        self.program.launch.problems.add(problem, f"program {self.program.number}: {detail}")

    def _running(self, predicate) -> np.ndarray:
        """The threads that take part, ascending."""
        if predicate is None:
            return self.program.lanes if self.program.mask is None else np.nonzero(self.program.mask)[0]
        return np.nonzero(predicate if self.program.mask is None else predicate & self.program.mask)[0]

    def _loaded(self, old: list, dtype) -> list[np.ndarray]:
        """Registers to load into: as they are, or garbage where they were never set."""
        garbage = np.frombuffer(b"\xfe" * np.dtype(dtype).itemsize, dtype)[0]
        return [np.full(self.program.threads, garbage) if x is None else x.copy() for x in old]

    @staticmethod
    def _offset(base, offset: int, threads) -> np.ndarray:
        address = base if offset == 0 else base + uint64(offset & 0xFFFFFFFFFFFFFFFF)
        return address[threads]

    def _shared_address(self, base, offset: int, threads) -> np.ndarray:
        return self.program.wide(base, uint32)[threads].astype(int64) + offset

    def _check_global(self, how: str, part, width: int, threads, *contents) -> None:
        """Races. contents: for a write, what it will write and what is there, as bytes."""
        if self.races:
            shadow = part.region.shadow(self.program.kernel.grain)
            where = shadow.granules(part.offsets, width)
            contents = [x.reshape(-1).view(UNSIGNED[shadow.grain]) for x in contents]

            def report(kind: str, granule: int) -> None:
                self.report(kind, f"{part.region.name} byte {granule * shadow.grain}")

            threads = np.repeat(threads, width // shadow.grain)
            getattr(shadow, how)(where, threads, self.program.clock, report, *contents)

    def load_global(self, predicate, base, offset, dtype, stored, old, strength) -> list[np.ndarray]:
        threads, results = self._running(predicate), self._loaded(old, stored)
        if not len(threads):
            return results
        address, size = self._offset(base, offset, threads), np.dtype(dtype).itemsize
        self.program.launch.counts.access_global(self.instruction, address, size * len(old), threads)
        for part in self.program.launch.memory.locate(address, size * len(old)):
            to = threads[part.which]
            if strength == "weak":
                self._check_global("read", part, size * len(old), to)
            view, index = part.region.view(size).view(dtype), part.offsets // size
            for k, result in enumerate(results):
                value = view[index + k]
                result[to] = value if dtype is stored else widened(value, stored)
        if strength == "acquire":
            self.program.clock.acquire(self.program.launch.released, np.unique(address).tolist())
        self.waits = strength != "weak"
        return results

    def store_global(self, predicate, base, offset, dtype, values, strength) -> None:
        threads = self._running(predicate)
        if not len(threads):
            return
        address, size = self._offset(base, offset, threads), np.dtype(dtype).itemsize
        data = np.stack([self.program.wide(x, dtype)[threads] for x in values], 1)
        width = size * len(values)
        self.program.launch.counts.access_global(self.instruction, address, width, threads)
        if strength == "release":
            self.program.clock.release(self.program.launch.released, np.unique(address).tolist())
        for part in self.program.launch.memory.locate(address, width):
            view, where = part.region.view(size), (part.offsets // size)[:, None] + np.arange(len(values))
            new, who = np.ascontiguousarray(data[part.which]), threads[part.which]
            if strength == "weak":
                self._check_global("write", part, width, who, new, np.ascontiguousarray(view[where]))
            else:
                self._check_global("atomic", part, width, who)
            view[where] = new
        self.waits = False

    def atomic_global(self, predicate, base, offset, dtype, operation, values, old, used, strength):
        threads, (result,) = self._running(predicate), self._loaded([old], UNSIGNED[np.dtype(dtype).itemsize])
        if not len(threads):
            return result
        address, size = self._offset(base, offset, threads), np.dtype(dtype).itemsize
        self.program.launch.counts.access_global(self.instruction, address, size, threads)
        addresses = np.unique(address).tolist()
        if strength in ("release", "acq_rel"):
            self.program.clock.release(self.program.launch.released, addresses)
        if strength in ("acquire", "acq_rel"):
            self.program.clock.acquire(self.program.launch.released, addresses)
        changed = False
        for part in self.program.launch.memory.locate(address, size):
            to = threads[part.which]
            self._check_global("atomic", part, size, to)
            view = part.region.view(size).view(dtype)
            changed |= self._apply(operation, view, part.offsets // size, values, to, result, used)
        self.waits = not changed
        return result

    def atomic_shared(self, predicate, base, offset, dtype, operation, values, old, used, strength):
        threads, (result,) = self._running(predicate), self._loaded([old], UNSIGNED[np.dtype(dtype).itemsize])
        if not len(threads):
            return result
        address, size = self._shared_address(base, offset, threads), np.dtype(dtype).itemsize
        self._touch(address, size, threads, "atomic")
        self._apply(operation, self.shared.view(size).view(dtype), address // size, values, threads, result, used)
        return result

    def _apply(self, operation, view, index, values, threads, result, used: bool) -> bool:
        """An atomic operation by each thread, in random order. Whether it changed anything."""
        values = [self.program.wide(x, view.dtype)[threads] for x in values]
        if operation == "add" and not used:  # the order shows in nothing but the rounding of floats
            np.add.at(view, index, values[0])
            return bool(values[0].any())
        changed = False
        for k in self.program.launch.random.permutation(len(index)):
            old = view[index[k]]
            result[threads[k]] = old.view(result.dtype)
            view[index[k]] = _ATOMICS[operation](old, *(x[k] for x in values))
            changed |= old != view[index[k]]
        return bool(changed)

    def _touch(self, address, width: int, threads, how: str) -> None:
        self.shared.touch(address, width, threads, how)
        self.program.launch.counts.access_shared(self.instruction, address, width, threads)

    def load_shared(self, predicate, base, offset, dtype, stored, old) -> list[np.ndarray]:
        threads, results = self._running(predicate), self._loaded(old, stored)
        if not len(threads):
            return results
        address, size = self._shared_address(base, offset, threads), np.dtype(dtype).itemsize
        self._touch(address, size * len(old), threads, "read")
        view, index = self.shared.view(size).view(dtype), address // size
        for k, result in enumerate(results):
            value = view[index + k]
            result[threads] = value if dtype is stored else widened(value, stored)
        return results

    def store_shared(self, predicate, base, offset, dtype, values) -> None:
        threads = self._running(predicate)
        if not len(threads):
            return
        address, size = self._shared_address(base, offset, threads), np.dtype(dtype).itemsize
        self._touch(address, size * len(values), threads, "write")
        for k, value in enumerate(values):
            self.shared.view(size)[address // size + k] = self.program.wide(value, dtype)[threads]

    def _matrix_rows(self, base, offset, count: int, how: str) -> np.ndarray:
        """[count, warps, 8] addresses of the rows, of 16 bytes, of 8×8 matrices; lanes 8m to 8m + 7 give matrix m."""
        address = self._shared_address(base, offset, self.program.lanes).reshape(-1, 32)[:, : 8 * count]
        self._touch(address.ravel(), 16, self.program.lanes.reshape(-1, 32)[:, : 8 * count].ravel(), how)
        return address.reshape(-1, count, 8).swapaxes(0, 1)

    def load_matrices(self, base, offset, count: int, transposed: bool) -> list[np.ndarray]:
        return self.shared.load_matrices(self._matrix_rows(base, offset, count, "read"), transposed)

    def store_matrices(self, base, offset, values, transposed: bool) -> None:
        rows = self._matrix_rows(base, offset, len(values), "write")
        self.shared.store_matrices(rows, [self.program.wide(x, uint32) for x in values], transposed)

    def copy_async(self, predicate, to, to_offset, base, offset, size: int, used) -> None:
        """used: how many of the `size` bytes each thread reads, all or none; the others become zeros."""
        threads = self._running(predicate)
        if not len(threads):
            return
        target, data = self._shared_address(to, to_offset, threads), np.zeros((len(threads), size), uint8)
        used = np.full(len(threads), size) if used is None else self.program.wide(used, uint32)[threads]
        if not np.isin(used, (0, size)).all():
            raise EmulationError("cp.async of some of the bytes")
        reading, source = np.nonzero(used)[0], []
        if len(reading):
            address = self._offset(base, offset, threads[reading])
            self.program.launch.counts.access_global(self.instruction, address, size, threads[reading])
            for part in self.program.launch.memory.locate(address, size):
                data[reading[part.which]] = part.region.bytes[part.offsets[:, None] + np.arange(size)]
                source.append((self.instruction, part, threads[reading[part.which]]))
        self.shared.copy_later(Copy(target, size, threads, data, source))
        self.program.launch.counts.access_shared(self.instruction, target, size, threads)

    def wait_copies(self, leave: int) -> None:
        """Until now a copy may have been reading, so now is when its reads are checked."""
        for copy in self.shared.wait(leave):
            for self.instruction, part, threads in copy.source:
                self._check_global("read", part, copy.size, threads)

    def wide_matrix_product(self, kind: str, sums, left, right, accumulate) -> list[np.ndarray]:
        """left: fragments (4 registers) or, as right, the descriptor of a matrix in shared memory."""
        n = 2 * len(sums)
        first = range(0, self.program.threads, 128)
        rights = np.stack([self._described(int(right[k]), n, k, kind) for k in first])
        if isinstance(left, list):
            lefts = warps.fragment_of_a(left, kind).reshape(-1, 64, 16)
        else:
            lefts = np.stack([self._described(int(left[k]), 64, k, kind) for k in first])
        zeros = np.zeros(self.program.threads, uint32)
        sums = [zeros if x is None else x for x in sums]  # never set where nothing is added to them
        return warps.wide_matrix_product(kind, lefts, rights, sums, np.broadcast_to(accumulate, self.program.threads))

    def _described(self, descriptor: int, rows: int, thread: int, kind: str) -> np.ndarray:
        """[rows, 16] float32: a matrix of 16-bit floats, k contiguous, in one of the three swizzled layouts."""
        start, stride, swizzle = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4, descriptor >> 62
        if swizzle == 0 or descriptor >> 49 & 7:
            raise EmulationError(f"matrix descriptor {descriptor:#x} is not known")
        width, row = {1: 128, 2: 64, 3: 32}[swizzle], np.arange(rows)[:, None]
        address = start + row // 8 * stride + row % 8 * width + np.arange(2) * 16
        address ^= (address >> 7 & (width // 16 - 1)) << 4
        self.shared.touch(address.ravel(), 16, np.full(address.size, thread), "read")
        return warps.widen(self.shared.view(2)[(address // 2)[..., None] + np.arange(8)].reshape(rows, 16), kind)
