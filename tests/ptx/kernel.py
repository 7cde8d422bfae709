"""A kernel as blocks: runs of instructions without a jump, a barrier or an access of global memory, each one Python
function (translate.py), and between them what directs the threads."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from .arithmetic import size_of
from .parse import Entry, Instruction
from .report import EmulationError
from .translate import SCOPE, Translator


@dataclass
class Code:
    function: Callable
    outputs: tuple[int, ...]  # registers that it writes
    touches_global: bool


@dataclass
class Branch:
    register: int | None  # the predicate's; None: always taken
    negate: bool
    target: int  # a block's number


class Barrier:
    """All threads of the program."""


class Return:
    pass


class Kernel:
    """blocks, and block_instructions: the numbers of the instructions in each."""

    def __init__(self, entry: Entry, shared: int):
        self.name, self.parameters, self.threads, self.shared = entry.name, entry.parameters, entry.threads, shared
        self.instructions = [x for x in entry.items if isinstance(x, Instruction)]
        self.registers: dict[str, int] = {}
        self.constants: dict[str, object] = {}
        self.file = f"<ptx {self.name} {id(self)}>"
        self.line_to_instruction: dict[int, int] = {}
        sizes = [size_of(x.parts[-1]) for x in self.instructions if x.touches_global]
        self.grain = 4 if min(sizes, default=4) >= 4 else 1  # bytes that races are told apart by
        sources = " ".join(text for x in self.instructions for text in _sources(x))
        self.read_registers = set(re.findall(r"%(?:p|rs|rd|r)\d+\b", sources))
        self.blocks: list[Code | Branch | Barrier | Return] = []
        self.block_instructions: list[list[int]] = []
        self._build(entry)

    def register(self, name: str) -> int:
        return self.registers.setdefault(name, len(self.registers))

    def _build(self, entry: Entry) -> None:
        runs, labels, run, number = [], {}, [], 0  # runs: lists of instruction numbers, or the one that ends a run

        def end_run():
            nonlocal run
            if run:
                runs.append(run)
            run = []

        for item in entry.items:
            if isinstance(item, str):
                end_run()
                labels[item] = len(runs)
                continue
            if self._ends_run(item):
                end_run()
                runs.append([number])
            else:
                run.append(number)
                if item.touches_global:
                    end_run()
            number += 1
        end_run()
        self.block_instructions = runs
        lines: list[str] = []
        outputs = [self._translate(k, run, lines) for k, run in enumerate(runs)]
        scope = {**SCOPE, "K": self.constants}
        exec(compile("\n".join(lines), self.file, "exec"), scope)
        for k, run in enumerate(runs):
            self.blocks.append(self._block(self.instructions[run[-1]], scope.get(f"block_{k}"), outputs[k], labels))

    def _ends_run(self, item: Instruction) -> bool:
        return item.name in ("bra", "ret", "exit") or self._is_barrier(item)

    def _is_barrier(self, item: Instruction) -> bool:
        """bar.warp.sync is one where a warp is all there is; elsewhere the threads of a warp are in step anyway."""
        return item.name in ("bar", "barrier") and (item.parts[1] != "warp" or self.threads == 32)

    def _translate(self, block: int, run: list[int], lines: list[str]) -> tuple[int, ...]:
        if self._ends_run(self.instructions[run[0]]):
            return ()
        outputs: set[int] = set()
        lines.append(f"def block_{block}(P, R):")
        for number in run:
            lines.append("    " + Translator(self, number, outputs).translate())
            self.line_to_instruction[len(lines)] = number
        return tuple(sorted(outputs))

    def _block(self, last: Instruction, function, outputs: tuple[int, ...], labels: dict[str, int]):
        if function is not None:
            return Code(function, outputs, last.touches_global)
        if last.opcode in ("bra", "bra.uni"):
            predicate = last.predicate
            register = None if predicate is None else self.register(predicate.lstrip("!"))
            return Branch(register, (predicate or "").startswith("!"), labels[last.operands[0]])
        if self._is_barrier(last):
            known = last.opcode in ("bar.sync", "barrier.sync", "barrier.cta.sync") and last.operands == ["0"]
            if last.predicate or not (known or last.opcode == "bar.warp.sync"):
                raise EmulationError(f"barrier is not known: {last.text}")
            return Barrier()
        if last.predicate or last.opcode not in ("ret", "exit"):
            raise EmulationError(f"{last.opcode} is not known: {last.text}")
        return Return()


def _sources(x: Instruction) -> list[str]:
    return x.operands[0 if x.name in ("st", "bra", "red", "cp") else 1 :] + [x.predicate or ""]
