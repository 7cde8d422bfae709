"""What went wrong: an error stops a launch; a problem (a race, a hazard) is noted, and the launch goes on."""

from typing import NamedTuple


class EmulationError(Exception):
    """The launch cannot go on: an unknown instruction, an address outside every tensor, a deadlock."""


class Problem(NamedTuple):
    kind: str  # what was seen, in words that are the same for every occurrence
    kernel: str
    line: str  # file:line:column of the Triton source
    instruction: str  # PTX


class Problems:
    """Problems by place: how often each was seen, and its first occurrence in detail."""

    def __init__(self):
        self.found: dict[Problem, tuple[int, str]] = {}

    def add(self, problem: Problem, detail: str) -> None:
        count, first = self.found.get(problem, (0, detail))
        self.found[problem] = (count + 1, first)

    def kinds(self) -> set[str]:
        return {problem.kind for problem in self.found}

    def clear(self) -> None:
        self.found.clear()

    def __len__(self) -> int:
        return len(self.found)

    def __str__(self) -> str:
        return "\n".join(
            f"{p.kind}\n  {p.kernel} at {p.line}\n  {p.instruction}\n  {count} times; first: {first}"
            for p, (count, first) in self.found.items()
        )
