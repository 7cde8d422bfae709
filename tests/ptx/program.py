"""One program (CTA) that runs: its registers, and its threads' way through the blocks.

The threads run in lock step, as one vector. Where a branch divides them the vector splits into fragments; the one that
is furthest behind goes first, and fragments that meet become one again.
"""

from collections.abc import Iterator

import numpy as np
from numpy import uint32

from .accesses import Accesses
from .arithmetic import widened
from .kernel import Barrier, Branch, Code
from .races import Clock
from .report import EmulationError


class Program:
    """launch: see scheduler.py. number: of this program in the grid, the first dimension fastest."""

    def __init__(self, launch, number: int):
        self.launch, self.number, self.kernel = launch, number, launch.kernel
        self.threads = self.kernel.threads
        self.lanes = np.arange(self.threads)
        self.registers: list[np.ndarray | None] = [None] * len(self.kernel.registers)
        self.special = self._special(number, launch.grid)
        self.mask: np.ndarray | None = None  # which threads run, None: all
        self.clock = Clock(number, launch.programs)
        self.access = Accesses(self)

    def _special(self, number: int, grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
        thread, zero = np.arange(self.threads, dtype=uint32), np.zeros(self.threads, uint32)
        place = (number % grid[0], number // grid[0] % grid[1], number // (grid[0] * grid[1]))
        result = {"%tid.x": thread, "%tid.y": zero, "%tid.z": zero, "%laneid": thread & 31, "%warpid": thread >> 5}
        result["%ntid.x"] = np.full(self.threads, self.threads, uint32)
        for axis, here, count in zip("xyz", place, grid, strict=True):
            result[f"%ctaid.{axis}"] = np.full(self.threads, here, uint32)
            result[f"%nctaid.{axis}"] = np.full(self.threads, count, uint32)
        return result

    # registers: arrays of unsigned numbers (of bool for predicates); an expression may be one number for all threads

    def wide(self, x, dtype) -> np.ndarray:
        """x for every thread. dtype counts for a single number alone."""
        return x if isinstance(x, np.ndarray) and x.ndim else np.full(self.threads, x, dtype)

    def bits(self, x, dtype) -> np.ndarray:
        """The bits of x, of dtype's size."""
        return self.wide(x, x.dtype).view(dtype)

    def extended(self, x, dtype) -> np.ndarray:
        """x in a wider register, with the sign if it has one."""
        return widened(self.wide(x, x.dtype), dtype)

    # control

    def run(self) -> Iterator[None]:
        """Yields after every access of global memory."""
        blocks = self.kernel.blocks
        fragments: list[tuple[int, np.ndarray | None]] = [(0, None)]  # the next block, which threads (None: all)
        waiting: list[tuple[int, np.ndarray | None]] = []  # at a barrier
        while fragments or waiting:
            if not fragments:
                fragments, waiting = self._pass_barrier(waiting), []
            if len(fragments) > 1:
                fragments = self._merged(fragments)
            at, mask = fragments[0]
            block = blocks[at]
            self.launch.counts.enter(at, mask)
            if isinstance(block, Code):
                self._execute(block, mask)
                fragments[0] = (at + 1, mask)
                if block.touches_global:
                    yield
            elif isinstance(block, Branch):
                fragments[:1] = self._branch(block, at, mask)
            else:
                fragments.pop(0)
                if isinstance(block, Barrier):
                    waiting.append((at, mask))

    def _pass_barrier(self, waiting):
        if len({at for at, _ in waiting}) > 1:
            raise EmulationError(f"{self.kernel.name}: warps wait at different barriers")
        self.clock.barrier()
        return [(at + 1, mask) for at, mask in waiting]

    @staticmethod
    def _merged(fragments):
        """In ascending order, those at one place as one."""
        fragments = sorted(fragments, key=lambda fragment: fragment[0])
        while len(fragments) > 1 and fragments[0][0] == fragments[1][0]:
            both = fragments[0][1] | fragments[1][1]
            fragments[:2] = [(fragments[0][0], None if both.all() else both)]
        return fragments

    def _branch(self, block: Branch, at: int, mask):
        if block.register is None:
            return [(block.target, mask)]
        taken = self.registers[block.register] ^ block.negate
        everyone = np.ones(self.threads, bool) if mask is None else mask
        taken = taken & everyone
        if not taken.any():
            return [(at + 1, mask)]
        if (taken == everyone).all():
            return [(block.target, mask)]
        return [(at + 1, everyone & ~taken), (block.target, taken)]

    def _execute(self, block: Code, mask) -> None:
        self.mask = mask
        try:
            if mask is None:
                block.function(self, self.registers)
                return
            trial = list(self.registers)
            block.function(self, trial)
        except Exception as error:
            raise self._located(error) from error
        for k in block.outputs:
            old = self.registers[k]
            self.registers[k] = trial[k] if old is None else np.where(mask, trial[k], old)

    def _located(self, error: Exception) -> Exception:
        """The error with the instruction and the line of the Triton source where it happened."""
        trace, number = error.__traceback__, None
        while trace:
            if trace.tb_frame.f_code.co_filename == self.kernel.file:
                number = self.kernel.line_to_instruction.get(trace.tb_lineno)
            trace = trace.tb_next
        if number is None:
            return error
        x = self.kernel.instructions[number]
        what = str(error) if isinstance(error, EmulationError) else f"{type(error).__name__}: {error}"
        place = f"{self.kernel.name} program {self.number}"
        return EmulationError(f"{place}: {what}\n  {x.text}\n  at {x.line}")
