"""L2 as the model sees it: which tiles of K the second pass of KeyDiff still finds there.

Assumed: L2 holds the tiles of K that were read last, up to half of its size (each half of an H100's L2 may keep a copy
of what the other half's memory holds); of a launch as many programs run as fit the device, in the order of their
numbers; they take turns, a tile each, and where one ends the next begins. What scores, partial sums and indices take of
L2 (2 % of what K does) is left out, and so is that programs drift apart.

The same calls give the same figures: nothing is random.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # compiling and interpreting exclude each other, and neither is needed here
    from bench.machine_code import Launch

Tile = tuple[int, int]  # row and first token
_STEPS = 256  # of a program at most: longer runs are simulated in larger tiles


class L2:
    """Least recently used tiles go first. `seen`: addresses of the tensors that earlier launches have touched."""

    def __init__(self, size: int) -> None:
        self.seen: set[int] = set()
        self._left = size
        self._tiles: OrderedDict[tuple, int] = OrderedDict()

    def read(self, tile: tuple, size: int) -> bool:
        """Whether the tile was there. It is now."""
        if tile in self._tiles:
            self._tiles.move_to_end(tile)
            return True
        self._tiles[tile] = size
        self._left -= size
        while self._left < 0:
            self._left += self._tiles.popitem(last=False)[1]
        return False


def interleaved(programs: Iterable[Iterable[Tile]], resident: int) -> Iterator[Tile]:
    """The tiles of all programs as `resident` of them at a time read one each in turn."""
    waiting = iter(programs)
    running = deque(map(iter, itertools.islice(waiting, resident)))
    while running:
        program = running.popleft()
        tile = next(program, None)
        if tile is not None:
            yield tile
            running.append(program)
        else:
            running.extend(map(iter, itertools.islice(waiting, 1)))


def _run(launch: Launch, program: int) -> tuple[int, range]:
    """A program's row, and the first tokens of its tiles."""
    of = launch.arguments
    row, begin = program // of["splits"], program % of["splits"] * of["chunk"]
    tiles = -(-of["chunk"] // of["BLOCK_S"])
    return row, range(begin, min(begin + of["chunk"], of["S"]), -(-tiles // _STEPS) * of["BLOCK_S"])


def _first_pass(launch: Launch) -> Iterator[Iterable[Tile]]:
    for program in range(launch.programs):
        row, tokens = _run(launch, program)
        yield zip(itertools.repeat(row), tokens)


def _second_pass(launch: Launch) -> Iterator[Iterable[Tile]]:
    """From the end: rows, runs, and the tiles of a run."""
    for program in reversed(range(launch.programs)):
        row, tokens = _run(launch, program)
        yield zip(itertools.repeat(row), reversed(tokens))


_ORDERS: dict[str, Callable[[Launch], Iterator[Iterable[Tile]]]] = {
    "partial_anchor_kernel": _first_pass,
    "keydiff_scores_kernel": _second_pass,
}


def share_missed(launch: Launch, l2: L2, resident: int) -> float | None:
    """The share of the tiles of K that come from HBM; None where their order is not known here."""
    if launch.kernel not in _ORDERS:
        return None
    keys = launch.arguments["keys"]
    address, row_bytes = keys.ptr.data_ptr(), keys.width.value * keys.ptr.element_size()
    _, tokens = _run(launch, 0)
    tiles = interleaved(_ORDERS[launch.kernel](launch), resident)
    found = Counter(l2.read((address, *tile), tokens.step * row_bytes) for tile in tiles)
    return found[False] / found.total()
