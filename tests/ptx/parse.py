"""PTX text to instructions: one entry, as Triton emits it, without the declarations."""

import re
from dataclasses import dataclass, field

from .report import EmulationError


@dataclass
class Instruction:
    text: str
    predicate: str | None  # "%p3" or "!%p3"
    opcode: str
    operands: list[str]
    line: str  # file:line:column of the Triton source
    parts: list[str] = field(init=False)

    def __post_init__(self):
        self.parts = self.opcode.split(".")

    @property
    def name(self) -> str:
        return self.parts[0]

    @property
    def space(self) -> str | None:
        """The state space of a memory access: global, shared or param."""
        spaces = [part.partition("::")[0] for part in self.parts]
        return next((x for x in spaces if x in ("global", "shared", "param")), None)

    @property
    def touches_global(self) -> bool:
        """Whether programs may be interleaved here. cp.async is not counted: its time is unknown anyway."""
        return self.name in ("ld", "st", "atom", "red") and self.space == "global"


@dataclass
class Entry:
    name: str
    parameters: list[str]
    threads: int
    items: list[Instruction | str]  # a string is a label


def parse(ptx: str) -> Entry:
    """The first entry of a PTX module."""
    header, body = ptx.split(".entry", 1)[1].split("{", 1)
    parameters = re.findall(r"\.param \.\w+ (?:\.ptr [^,)]*?)?(\w+_param_\d+)\s*[,)]", header + ")")
    if len(parameters) != header.count(".param "):
        raise EmulationError(f"parameters that are not plain numbers: {header}")
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", header)
    if threads is None:
        raise EmulationError("no .reqntid: how many threads?")
    return Entry(header.split("(")[0].strip(), parameters, int(threads.group(1)), _items(body))


def _items(body: str) -> list[Instruction | str]:
    items: list[Instruction | str] = []
    line, depth = "?", 0
    for text in body.split("\n"):
        text = text.strip()
        depth += {"{": 1, "}": -1}.get(text, 0)  # inline assembly has scopes of its own
        if depth < 0:
            break
        if text.startswith(".loc"):
            line = text.partition("//")[2].strip() or text
            continue
        text = text.split("//")[0].strip()
        if re.match(r"^\$\w+:$", text):
            if not text.startswith(("$L__tmp", "$L__func")):  # those are for debuggers
                items.append(text[:-1])
        elif text and text[0] not in ".{}":
            items.append(_instruction(text, line))
    return items


def _instruction(text: str, line: str) -> Instruction:
    match = re.match(r"^(?:@(!?%p\d+)\s+)?([a-z][\w.:]*)\s*(.*);$", text)
    if not match:
        raise EmulationError(f"cannot parse {text!r}")
    predicate, opcode, operands = match.groups()
    return Instruction(text, predicate, opcode, _split(operands), line)


def _split(operands: str) -> list[str]:
    """Split at the commas outside {} and []."""
    parts, depth = [""], 0
    for character in operands:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts] if operands else []


def members(operand: str) -> list[str]:
    """{a, b} -> [a, b]"""
    return [x.strip() for x in operand.strip("{} ").split(",")] if operand.startswith("{") else [operand]
