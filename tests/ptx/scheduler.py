"""A launch: programs side by side, interleaved at their accesses of global memory.

Without a seed they run one after another, in order; where all that have started wait, the next one starts. With a seed
they start in random order and are preempted at random, some of them for long. Memory is sequentially consistent; what
a weaker one would break is found by the order of accesses instead (races.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy import uint8

from .counts import Counts, NotCounted
from .kernel import Kernel
from .memory import Memory
from .program import Program
from .report import EmulationError, Problems


@dataclass(frozen=True)
class Settings:
    seed: int | None = None  # of the order of programs; None: in order
    resident: int | None = None  # how many programs are on the device at once; None: all
    races: bool = True  # look for races and hazards
    measure: bool = False  # keep Counts of every launch
    rewrite: Callable[[str], str] | None = None  # of the PTX, to plant errors


STEPS_UNTIL_DEADLOCK = 500  # per program, in each of which every program only waited


class Launch:
    def __init__(
        self, kernel: Kernel, values: dict[str, bytes], memory: Memory, grid: tuple[int, int, int], settings: Settings,
        problems: Problems,
    ):  # fmt: skip
        """values: parameter -> its bytes"""
        self.kernel, self.memory, self.grid, self.settings, self.problems = kernel, memory, grid, settings, problems
        self.programs = grid[0] * grid[1] * grid[2]
        self.random = np.random.default_rng(settings.seed or 0)
        self.counts = Counts(kernel, grid) if settings.measure else NotCounted()
        self.released: dict[int, np.ndarray] = {}  # address -> what acquiring it makes known, see races.py
        self._values = values

    def parameter(self, name: str, dtype):
        return np.frombuffer(self._values[name], uint8)[: np.dtype(dtype).itemsize].view(dtype)[0]

    def run(self) -> None:
        shuffled, resident = self.settings.seed is not None, self.settings.resident or self.programs
        order = self.random.permutation(self.programs).tolist() if shuffled else list(range(self.programs))
        live: list[tuple[Program, object]] = []
        waited = 0  # steps since a program did anything but wait
        choice = _Choice(self.random, shuffled)
        with np.errstate(all="ignore"):
            while order or live:
                while order and len(live) < resident and (shuffled or all(p.access.waits for p, _ in live)):
                    program = Program(self, order.pop(0))
                    live.append((program, program.run()))
                    choice.forget()
                k = choice.of([program for program, _ in live])
                program, steps = live[k]
                program.access.waits = False
                if next(steps, self) is self:  # it has ended
                    live.pop(k)
                    choice.forget()
                waited = waited + 1 if program.access.waits else 0
                if waited > STEPS_UNTIL_DEADLOCK * max(len(live), 1):
                    raise EmulationError(
                        f"{self.kernel.name}: deadlock, {len(live)} programs wait, {len(order)} have not started"
                    )


class _Choice:
    """Which program goes on."""

    STEPS = 50  # until the weights change

    def __init__(self, random: np.random.Generator, shuffled: bool):
        self._random, self._shuffled = random, shuffled
        self.forget()

    def forget(self) -> None:
        """The programs are others now."""
        self._steps_left = 0

    def of(self, live: list[Program]) -> int:
        if not self._shuffled:
            return int(self._random.integers(len(live))) if live[0].access.waits else 0
        if self._steps_left == 0:
            weights = self._random.exponential(1.0, len(live)) ** 3  # some programs starve for a while
            self._sums, self._steps_left = np.cumsum(weights / weights.sum()), self.STEPS
        self._steps_left -= 1
        return min(int(np.searchsorted(self._sums, self._random.random())), len(live) - 1)
