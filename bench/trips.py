"""How often each machine instruction of a launch runs: branches followed, nothing computed.

Loops depend on a few integers: sizes, strides, the program's number. So of the PTX only what decides a branch is
evaluated, for one thread of a sample of the programs, which gives how often each of its blocks runs. Every SASS
instruction names the line of PTX that it was made from, so the counts carry over: ptxas keeps loops, and where it
unrolled one, the number of copies tells by how much.

A loop that depends on data (a search, a wait) has no count of its own: DATA_LOOPS says how many trips are expected of
it, by the line of Python that it comes from. Such a loop that is not there is an error.
"""

from __future__ import annotations

import ctypes
import functools
import linecache
import math
import pathlib
import re
import statistics
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from bench.machine_code import Instruction, Launch

# Trips of loops whose end depends on data, by their line of source.
DATA_LOOPS = {
    "while remaining > 0:": lambda sizes: max(1, math.ceil(math.log(max(sizes["n"], 2), 32))),  # a 32-way search
    "while has_read == 0:": lambda sizes: 0,  # the flag is set before it is looked at
    "while seen != _OPEN:": lambda sizes: 0,
    "while arrived < ROUND * splits:": lambda sizes: 0,
    # Scores like random ones are parted by as many bits as their number has (simulated: 12.2 for 4,096).
    "while (bit >= 0) & (better < need):": lambda sizes: round(math.log2(sizes["S"])),
    "for other in range(reader // BLOCK_R": lambda sizes: 2,  # the programs whose sources are overwritten
}
_SAMPLES = 32  # programs of a launch that are looked at
# Conditions on data that hardly ever hold, by the beginning of their line: what they guard is passed by.
RARE = ('if not (square < float("inf")):', 'if not (squares < float("inf")):')
# One of these is made from one line of PTX.
_ONE_TO_ONE = {"LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "SHFL", "BAR", "HMMA", "HGMMA", "ATOMS", "ATOMG"}


class UnknownLoop(ValueError):
    """How often a loop runs depends on data, and nobody said how often that is."""


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _quotient(a: int, b: int) -> int | None:
    return None if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _remainder(a: int, b: int) -> int | None:
    return None if b == 0 else a - _quotient(a, b) * b


_ARITHMETIC = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "div": _quotient,
    "rem": _remainder,
    "min": min,
    "max": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "neg": lambda a: -a,
    "abs": abs,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "selp": lambda a, b, p: a if p else b,
    "mov": lambda a: a,
    "cvt": lambda a: a,
    "cvta": lambda a: a,
    "setp": None,  # its comparison decides
    "bfe": lambda a, start, length: a >> start & (1 << length) - 1,
}
_COMPARE = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b, "lo": lambda a, b: a < b, "ls": lambda a, b: a <= b,
    "hi": lambda a, b: a > b, "hs": lambda a, b: a >= b,
}  # fmt: skip
_BOOLEAN = {"and": lambda a, b: a and b, "or": lambda a, b: a or b, "xor": lambda a, b: a != b}


def _number(operand: str) -> int | str | None:
    if operand[0] in "%!" or operand[:2] == "-%":
        return operand
    try:
        return int(operand, 0)
    except ValueError:
        return None


@dataclass
class _Statement:
    line: int
    guard: str | None  # predicate, "!%p1" or "%p1"
    opcode: str
    operands: list[str]

    @functools.cached_property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    @functools.cached_property
    def bits(self) -> int:
        """Of the operands; of the result of a conversion."""
        return int(re.sub(r"\D", "", self.parts[-2 if self.parts[0] == "cvt" else -1]) or 32)

    @functools.cached_property
    def sources(self) -> list[int | str | None]:
        """The operands that are read: numbers, and names."""
        return [_number(operand) for operand in self.operands[1:]]

    @functools.cached_property
    def writes(self) -> list[str]:
        if not self.operands or self.opcode.startswith(("st.", "bra", "bar.", "red.")):
            return []
        return re.findall(r"%\w+", self.operands[0])

    @property
    def reads(self) -> list[str]:
        named = re.findall(r"%[\w.]+", " ".join(self.operands[1:]))
        return named + ([self.guard.lstrip("!")] if self.guard else [])


@dataclass
class _Loop:
    head: int  # its first and last block
    last: int
    source: str  # the line of Python of its branch


@dataclass
class Program:
    """PTX, cut into blocks."""

    statements: list[list[_Statement]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)
    block_of_line: dict[int, int] = field(default_factory=dict)
    loops: list[_Loop] = field(default_factory=list)
    sources: dict[int, str] = field(default_factory=dict)  # the line of Python of each statement, by its line

    def loop_of(self, block: int) -> _Loop | None:
        """The innermost loop around a block."""
        around = [loop for loop in self.loops if loop.head <= block <= loop.last]
        return min(around, key=lambda loop: loop.last - loop.head, default=None)


_STATEMENT = re.compile(r"^\s*(?:@(!?%p\w*)\s+)?([a-z][\w.:]*)\s*(.*?);\s*(?://.*)?$")


def _source_line(path: str, number: int, folder: pathlib.Path) -> str:
    """A line of Python. Triton's cache may hold a kernel that was compiled in another checkout: the file is looked for
    beside the kernel's own first."""
    here = folder / pathlib.Path(path).name
    return linecache.getline(str(here) if here.exists() else path, number).strip()


@functools.cache
def parse(ptx: str, folder: pathlib.Path) -> Program:
    """The blocks and loops of a kernel whose Python is in `folder`."""
    program, files, here = Program(), {}, ""
    for text in ptx.splitlines():
        if named := re.match(r'\s*\.file\s+(\d+)\s+"(.*)"', text):
            files[named.group(1)] = named.group(2)
    for number, text in enumerate(ptx.splitlines(), 1):
        if where := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", text):
            if where.group(2) != "0":
                here = _source_line(files[where.group(1)], int(where.group(2)), folder)
        elif label := re.match(r"^(\$L__BB\w+):", text):
            if program.statements[-1]:
                program.statements.append([])
            program.labels[label.group(1)] = len(program.statements) - 1
        elif (found := _STATEMENT.match(text)) and not found.group(2).startswith("."):
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", found.group(3))
            program.statements[-1].append(_Statement(number, found.group(1), found.group(2), operands))
            program.sources[number] = here
            if found.group(2).startswith(("bra", "ret", "exit")):
                program.block_of_line[number] = len(program.statements) - 1
                program.statements.append([])
        program.block_of_line[number] = program.block_of_line.get(number, len(program.statements) - 1)
    for block, statements in enumerate(program.statements):
        if statements and statements[-1].opcode.startswith("bra"):
            head = program.labels[statements[-1].operands[0]]
            if head <= block:
                program.loops = [loop for loop in program.loops if loop.head != head]  # two ways back: one loop
                program.loops.append(_Loop(head, block, program.sources[statements[-1].line]))
    return program


def _deciding(program: Program) -> list[list[_Statement]]:
    """Of every block, the statements that branches depend on."""
    every = [statement for block in program.statements for statement in block]
    wanted = {statement.guard.lstrip("!") for statement in every if statement.guard and statement.opcode[:3] == "bra"}
    while True:
        more = {name for statement in every if wanted & set(statement.writes) for name in statement.reads}
        if more <= wanted:
            break
        wanted |= more
    return [
        [s for s in block if wanted & set(s.writes) or s.opcode.startswith(("bra", "ret", "exit"))]
        for block in program.statements
    ]  # fmt: skip


def _parameters(launch: Launch) -> dict:
    """Arguments by their names in the PTX. The last two, Triton's own scratch, are not among them."""
    names = re.findall(r"\.param\s+\.[^,)]*?(\w+_param_\d+)", launch.compiled.asm["ptx"])
    return dict(zip(names, launch.parameters(), strict=False))


class _Thread:
    """The first thread of one program, as far as its branches need it. Unknown values are None."""

    def __init__(self, launch: Launch, program_id: int, known):
        self.values: dict[str, int | float | bool | None] = {
            name: value.data_ptr() if isinstance(value, torch.Tensor) else value
            for name, value in _parameters(launch).items()
        }
        x, y, _ = launch.grid
        threads = 32 * launch.warps
        self.values |= {"%tid.x": 0, "%laneid": 0, "%ntid.x": threads, "%ctaid.x": program_id % x}
        self.values |= {"%ctaid.y": program_id // x % y, "%ctaid.z": program_id // x // y}
        self.values |= {f"%nctaid.{axis}": size for axis, size in zip("xyz", launch.grid, strict=True)}
        self.known = known

    def get(self, operand: int | str | None) -> int | float | bool | None:
        if not isinstance(operand, str):
            return operand
        if operand[0] == "%":
            return self.values.get(operand)
        value = self.values.get(operand[1:])
        return None if value is None else not value if operand[0] == "!" else -value

    def run(self, statement: _Statement) -> None:
        guard = True if statement.guard is None else self.get(statement.guard)
        if guard is False:
            return
        result = self.evaluate(statement) if guard else None
        for name in statement.writes:
            self.values[name] = result

    def evaluate(self, statement: _Statement) -> int | bool | None:
        parts = statement.parts
        if parts[0] == "ld":
            return self.load(parts, statement.operands[1])
        values = [self.get(source) for source in statement.sources]
        if None in values:
            return None
        kind = parts[-1]
        if kind == "pred":
            return not values[0] if parts[0] == "not" else bool(_ARITHMETIC[parts[0]](*values))
        if kind[0] == "f" or parts[0] not in _ARITHMETIC or parts[1] == "hi":
            return None
        if kind[0] == "u":
            values = [v if isinstance(v, bool) else v & (1 << int(kind[1:])) - 1 for v in values]
        if parts[0] == "setp":
            result = _COMPARE[parts[1]](*values[:2])
            return _BOOLEAN[parts[2]](result, values[2]) if len(values) > 2 else result
        result = _ARITHMETIC[parts[0]](*values)
        return None if result is None else _signed(result, 2 * statement.bits if parts[1] == "wide" else statement.bits)

    def load(self, parts: list[str], operand: str) -> int | None:
        """A parameter, or an integer in memory that the caller said is known."""
        inside = operand.strip("[] ")
        if parts[1] == "param":
            value = self.values.get(inside)
            return value if isinstance(value, int) else None
        base, _, offset = inside.partition("+")
        address = self.get(_number(base.strip()))
        if parts[1] != "global" or address is None:
            return None
        address += int(offset or 0)
        for tensor in self.known:
            if tensor.data_ptr() <= address < tensor.data_ptr() + tensor.numel() * tensor.element_size():
                read = {32: ctypes.c_int32, 64: ctypes.c_int64}[int(re.sub(r"\D", "", parts[-1]))]
                return read.from_address(address).value
        return None


def _blocks_run(launch: Launch, program: Program, deciding, program_id: int, known, sizes) -> tuple[Counter, Counter]:
    """How often each block runs, and how often each loop is entered (by its head), in one program."""
    thread = _Thread(launch, program_id, known)
    runs, entries, trips = Counter(), Counter(), Counter()
    block, before = 0, -1
    while block < len(deciding):
        runs[block] += 1
        for loop in program.loops:
            if loop.head <= block <= loop.last and not loop.head <= before <= loop.last:  # not always by its head
                entries[loop.head] += 1
                trips[loop.head] = 0
        trips[block] += 1
        following = block + 1
        for statement in deciding[block]:
            if statement.opcode.startswith("bra"):
                taken = True if statement.guard is None else thread.get(statement.guard)
                target = program.labels[statement.operands[0]]
                if taken is None:
                    taken = _expected(launch, program, block, statement.line, target, trips, sizes)
                if taken:
                    following = target
            elif statement.opcode.startswith(("ret", "exit")):
                return runs, entries
            else:
                thread.run(statement)
        before, block = block, following
    return runs, entries


def _expected(launch, program: Program, block: int, line: int, target: int, trips: Counter, sizes) -> bool:
    """Whether a branch that depends on data is taken: loops go round as often as DATA_LOOPS says; else the code runs
    on into what a condition guards, but for RARE ones."""
    if program.sources[line].startswith(RARE):
        return target > block
    loop = program.loop_of(block)
    if loop is None or (loop.head <= target <= loop.last and loop.head <= block + 1 <= loop.last):
        return False
    for source, expected in DATA_LOOPS.items():
        if loop.source.startswith(source):
            again = trips[loop.head] < expected(sizes)
            return again == (loop.head <= target <= loop.last)
    raise UnknownLoop(
        f"{launch.kernel}: how often this loop runs depends on data: {loop.source!r}. "
        "Enter how often that is in DATA_LOOPS (bench/trips.py)"
    )


def _sass_loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """First and last address of every loop."""
    ends: dict[int, int] = {}
    for one in code:
        if one.target is not None and one.target < one.address:
            ends[one.target] = max(one.address, ends.get(one.target, 0))
    return sorted(ends.items())


@dataclass(frozen=True)
class Access:
    """A global load or store."""

    ptx_line: int
    tensor: torch.Tensor
    kind: str  # "read" or "write"
    lane_bytes: int
    bytes: float  # of the whole launch; lanes that a mask switches off count as well


def _accesses(launch: Launch, program: Program, runs: Counter) -> list[Access]:
    """Every global access in the code; its tensor is the argument that the address was made from."""
    made_from: dict[str, set[str]] = {}
    every = [statement for block in program.statements for statement in block]
    # Addresses may change hands through shared memory: what is loaded from there may be anything that was stored.
    shared = {name for one in every if one.opcode.startswith("st.shared") for name in one.reads}
    for one in every:
        if one.opcode.startswith("ld.shared"):
            names = shared
        elif one.opcode.startswith("ld.") and not one.opcode.startswith("ld.param"):
            names = set()
        else:
            names = {*one.reads, *(operand.strip("[] ") for operand in one.operands[1:] if "_param_" in operand)}
        for name in one.writes:
            made_from.setdefault(name, set()).update(names)
    arguments = _parameters(launch)

    def tensor(address: str) -> torch.Tensor:
        seen, left = set(), set(re.findall(r"%\w+|\w+_param_\d+", address))
        while left:
            name = left.pop()
            if isinstance(arguments.get(name), torch.Tensor):
                return arguments[name]
            seen.add(name)
            left |= made_from.get(name, set()) - seen
        raise ValueError(f"{launch.kernel}: no tensor found behind the address {address}")

    found = []
    for block, statements in enumerate(program.statements):
        for statement in statements:
            parts = statement.opcode.split(".")
            if statement.opcode.startswith("cp.async.bulk"):
                raise ValueError(f"{launch.kernel}: the bytes of {statement.opcode} are not counted here")
            if statement.opcode.startswith("cp.async.c") and "global" in parts:
                size, kind, address = int(statement.operands[2], 0), "read", statement.operands[1]
            elif parts[0] in ("ld", "st") and "global" in parts:
                vector = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
                size = vector * int(re.sub(r"\D", "", parts[-1])) // 8
                kind, address = (
                    ("read", statement.operands[1]) if parts[0] == "ld" else ("write", statement.operands[0])
                )
            else:
                continue
            lanes = 32 * launch.warps * launch.programs
            found.append(Access(statement.line, tensor(address), kind, size, size * lanes * runs[block]))
    return found


@dataclass(frozen=True)
class Executed:
    """The machine code of a launch, and how often one warp of an average program runs each part of it."""

    code: list[Instruction]
    counts: list[float]  # of each instruction
    loops: list[tuple[int | None, float]]  # of each instruction: address of its innermost loop, trips through it
    accesses: list[Access]
    work: dict[int, int]  # of each program that was looked at: blocks run


def sampled(launch: Launch) -> set[int]:
    """Programs of a launch whose mean is taken for that of all: spread by the golden ratio, so that no pattern of rows
    and splits is in step with it."""
    return {int(i * 0.6180339887498949 % 1 * launch.programs) for i in range(_SAMPLES)}


def executed(launch: Launch, code: list[Instruction], known=(), chosen: Collection[int] = ()) -> Executed:
    """How often each instruction of a launch's machine code runs.

    `known`: integer tensors whose values decide how far loops go (lengths). `chosen`: the programs that are looked at.
    """
    program = parse(launch.compiled.asm["ptx"], launch.folder)
    deciding = _deciding(program)
    sizes = {name: value for name, value in launch.arguments.items() if isinstance(value, int)}
    chosen = chosen or sampled(launch)
    runs, entries, work = Counter(), Counter(), {}
    for program_id in chosen:
        of_one = _blocks_run(launch, program, deciding, program_id, known, sizes)
        for total, found in zip((runs, entries), of_one, strict=True):
            for block, count in found.items():
                total[block] += count / len(chosen)
        work[program_id] = of_one[0].total()

    loops = _sass_loops(code)
    inner = [
        min((loop for loop in loops if loop[0] <= one.address <= loop[1]), key=lambda r: r[1] - r[0], default=None)
        for one in code
    ]  # fmt: skip
    blocks = [program.block_of_line.get(one.ptx_line, 0) for one in code]
    sources = [program.loop_of(block) for block in blocks]
    comes_from = {}  # the PTX loop of each SASS loop: that of most of its instructions
    for loop in loops:
        votes = Counter(s.head for s, its in zip(sources, inner, strict=True) if its == loop and s is not None)
        comes_from[loop] = votes.most_common(1)[0][0] if votes else None

    def copies(loop, head) -> int:
        """How often a SASS loop holds the body of the PTX loop that begins with block `head`."""
        held = Counter(
            one.ptx_line
            for one, its, source in zip(code, inner, sources, strict=True)
            if one.name in _ONE_TO_ONE and its == loop and source is not None and source.head == head
        )  # fmt: skip
        return round(statistics.median(held.values())) if held else 0

    trips, outside = {}, {}
    for head in set(comes_from.values()) - {None}:
        by_copies = [(copies(loop, head) or 1, loop) for loop in loops if comes_from[loop] == head]
        left = runs[head] / entries[head] if entries[head] else 0.0
        behind = copies(None, head)
        for number, (held, loop) in enumerate(sorted(by_copies, reverse=True), 1):
            # What is left when the wider copies are done goes to the next; at last to those without a loop.
            done = left // held if behind or number < len(by_copies) else left / held
            trips[loop] = entries[head] * done
            left -= done * held
        outside[head] = entries[head] * left / behind if behind else min(entries[head], 1.0)

    counts = []
    for block, loop, source in zip(blocks, inner, sources, strict=True):
        if loop is not None and loop in trips:
            head = comes_from[loop]
            partly = runs[block] / runs[head] if source and source.head == head and runs[head] else 1.0
            counts.append(trips[loop] * min(partly, 1.0))
        elif source is None:
            counts.append(min(runs[block], 1.0))
        elif source.head in outside:  # left over, or moved out of its loop
            counts.append(outside[source.head])
        else:  # all trips are written out
            counts.append(runs[block] / (copies(None, source.head) or 1))
    where = [(loop and loop[0], trips.get(loop, 1.0)) for loop in inner]
    return Executed(code, counts, where, _accesses(launch, program, runs), work)
