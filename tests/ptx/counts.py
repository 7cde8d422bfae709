"""What a launch executed: warp instructions, sectors of global memory, passes over the banks of shared memory."""

import collections

import numpy as np
from numpy import int64, uint64

from .kernel import Kernel
from .parse import Instruction


class NotCounted:
    """Stands where nobody counts."""

    def enter(self, block, mask) -> None:
        pass

    def access_global(self, instruction, address, width, threads) -> None:
        pass

    def access_shared(self, instruction, address, width, threads) -> None:
        pass


class Counts:
    """Per kernel launch. Every number is summed over its warps.

    block_counts: how often each of kernel.blocks was entered
    global_accesses: instruction's number -> requests, threads, sectors (32 bytes), bytes asked for, the same without
        repeats within a warp, lines (128 bytes)
    shared_accesses: instruction's number -> requests, passes over the banks, the fewest possible
    """

    def __init__(self, kernel: Kernel, grid: tuple[int, int, int]):
        self.kernel, self.grid = kernel, grid
        self.block_counts = np.zeros(len(kernel.blocks), int64)
        self.global_accesses = collections.defaultdict(lambda: np.zeros(6, int64))
        self.shared_accesses = collections.defaultdict(lambda: np.zeros(3, int64))
        self._seen: dict[tuple, tuple[int, int, int]] = {}

    def enter(self, block: int, mask) -> None:
        warps = self.kernel.threads // 32
        self.block_counts[block] += warps if mask is None else int(mask.reshape(-1, 32).any(1).sum())

    def access_global(self, instruction: int, address, width: int, threads) -> None:
        warp = (threads >> 5).astype(uint64) << uint64(52)  # above every address

        def distinct(shift: int) -> int:
            return len(np.unique(warp | (address >> uint64(shift))))

        warps = len(np.unique(warp))
        self.global_accesses[instruction] += (
            warps, len(address), distinct(5), len(address) * width, distinct(0) * width, distinct(7)
        )  # fmt: skip

    def access_shared(self, instruction: int, address, width: int, threads) -> None:
        key = (instruction, address.tobytes(), threads.tobytes())
        if key not in self._seen:
            self._seen[key] = (len(np.unique(threads >> 5)), *bank_passes(address, width, threads))
        self.shared_accesses[instruction] += self._seen[key]

    def instructions(self) -> np.ndarray:
        """Warp instructions per PTX instruction."""
        counts = np.zeros(len(self.kernel.instructions), int64)
        for block, numbers in enumerate(self.kernel.block_instructions):
            counts[numbers] += self.block_counts[block]
        return counts

    def by_class(self) -> collections.Counter:
        total: collections.Counter = collections.Counter()
        for instruction, count in zip(self.kernel.instructions, self.instructions(), strict=True):
            total[class_of(instruction)] += int(count)
        return +total

    def traffic(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """global_accesses of loads, of stores and atomics, and shared_accesses, each summed."""
        loads, stores = np.zeros(6, int64), np.zeros(6, int64)
        for number, entry in self.global_accesses.items():
            target = loads if self.kernel.instructions[number].name in ("ld", "cp") else stores
            target += entry
        return loads, stores, sum(self.shared_accesses.values(), np.zeros(3, int64))

    def __str__(self) -> str:
        loads, stores, shared = self.traffic()
        lines = [f"{self.kernel.name} grid {self.grid} threads {self.kernel.threads} shared {self.kernel.shared}"]
        lines.append("  warp instructions: " + ", ".join(f"{k} {v}" for k, v in self.by_class().most_common()))
        for name, (requests, _, sectors, asked, distinct, _) in (("loads", loads), ("stores", stores)):
            if requests:
                share = distinct / (32 * sectors)
                lines.append(
                    f"  global {name}: {requests} requests, {sectors} sectors, {share:.2f} used, {asked} bytes"
                )
        if shared[0]:
            lines.append(f"  shared: {shared[0]} requests, {shared[1]} passes, {shared[2]} without conflicts")
        return "\n".join(lines)


def bank_passes(address, width: int, threads) -> tuple[int, int]:
    """(passes over the 32 banks of 4 bytes, the fewest possible) of one access of `width` bytes by each thread."""
    together = 32 if width <= 4 else 128 // width  # threads whose accesses make one pass at best
    words = (address.astype(int64) >> 2)[:, None] + np.arange(max(width // 4, 1))
    distinct = np.unique((threads // together)[:, None] << 32 | words)  # one word is read once for all
    bank = (distinct >> 32) * 32 + (distinct & 31)
    passes = np.bincount(bank, minlength=(int(bank.max()) // 32 + 1) * 32).reshape(-1, 32).max(1)
    return int(passes.sum()), int((passes > 0).sum())


_CLASSES = {
    name: kind
    for kind, names in {
        "matrix": "mma wgmma", "branch": "bra ret exit", "barrier": "bar barrier", "move": "mov",
        "shuffle": "shfl vote redux activemask", "convert": "cvt", "special": "sqrt rsqrt rcp ex2 lg2",
        "integer division": "rem", "compare": "setp selp", "shared": "ldmatrix stmatrix", "async copy": "cp",
    }.items()
    for name in names.split()
}  # fmt: skip


def class_of(x: Instruction) -> str:
    """A coarse kind of instruction, by the unit that executes it."""
    last = x.parts[-1]
    if x.name in _CLASSES:
        return _CLASSES[x.name]
    if x.name in ("ld", "st", "atom", "red"):
        return x.space or "generic"
    if x.name == "div":
        return "special" if last in ("f32", "f64") else "integer division"
    if last == "pred":
        return "compare"
    if last in ("f16", "f32", "f64"):
        return "float"
    return "integer 64" if "wide" in x.parts or last in ("s64", "u64", "b64") else "integer"
