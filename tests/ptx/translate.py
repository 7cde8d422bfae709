"""One instruction to one line of Python, over P (the program that runs, see program.py) and R (its registers, each an
array with an element per thread).

Each rule is headed by the opcodes that it knows, modifiers included. What no rule matches is an error.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy import uint32, uint64

from . import arithmetic, warps
from .arithmetic import TYPES, UNSIGNED, numpy_type, size_of
from .parse import members
from .report import EmulationError

if TYPE_CHECKING:
    from .kernel import Kernel

REGISTER = re.compile(r"^%(p|rs|rd|r|fd|f|h)(\d+)$")
BYTES = {"rs": 2, "h": 2, "r": 4, "f": 4, "rd": 8, "fd": 8}  # of a register, which holds them as unsigned numbers
SPECIAL = {"%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%laneid", "%warpid", "%ctaid.x", "%ctaid.y", "%ctaid.z",
           "%nctaid.x", "%nctaid.y", "%nctaid.z"}  # fmt: skip


# Rules

_INT = r"[su](16|32|64)"
_BITS = r"b(16|32|64)"
_FLOAT = r"(f16|f32|f64)"
_SIMPLE = {  # opcode: expression, type of the sources, of the result (None: the opcode's last part)
    rf"add\.{_INT}|add(\.rn)?(\.ftz)?\.{_FLOAT}": ("({a} + {b})", None, None),
    rf"sub\.{_INT}|sub(\.rn)?(\.ftz)?\.{_FLOAT}": ("({a} - {b})", None, None),
    rf"mul\.lo\.{_INT}|mul(\.rn)?(\.ftz)?\.{_FLOAT}": ("({a} * {b})", None, None),
    r"mul\.hi\.[su](32|64)": ("multiply_high({a}, {b})", None, None),
    rf"mad\.lo\.{_INT}": ("({a} * {b} + {c})", None, None),
    r"fma\.rn(\.ftz)?\.(f16|f32)": ("fused({a}, {b}, {c})", None, None),
    rf"div\.{_INT}": ("divide({a}, {b})", None, None),
    r"div\.(rn|full|approx)(\.ftz)?\.f32|div\.rn\.f64": ("({a} / {b})", None, None),
    rf"rem\.{_INT}": ("remainder({a}, {b})", None, None),
    rf"min\.{_INT}|min\.NaN(\.ftz)?\.{_FLOAT}": ("np.minimum({a}, {b})", None, None),
    rf"max\.{_INT}|max\.NaN(\.ftz)?\.{_FLOAT}": ("np.maximum({a}, {b})", None, None),
    rf"min(\.ftz)?\.{_FLOAT}": ("minimum({a}, {b})", None, None),
    rf"max(\.ftz)?\.{_FLOAT}": ("maximum({a}, {b})", None, None),
    rf"neg\.{_INT}|neg(\.ftz)?\.{_FLOAT}": ("(-{a})", None, None),
    rf"abs\.{_INT}|abs(\.ftz)?\.{_FLOAT}": ("np.abs({a})", None, None),
    rf"and\.(pred|{_BITS})": ("({a} & {b})", None, None),
    rf"or\.(pred|{_BITS})": ("({a} | {b})", None, None),
    rf"xor\.(pred|{_BITS})": ("({a} ^ {b})", None, None),
    rf"not\.(pred|{_BITS})": ("(~{a})", None, None),
    r"popc\.b(32|64)": ("count_ones({a})", None, "b32"),
    r"clz\.b(32|64)": ("leading_zeros({a})", None, "b32"),
    r"prmt\.b32": ("permute_bytes({a}, {b}, {c})", None, None),
    r"shf\.l\.wrap\.b32": ("funnel_shift('l', {a}, {b}, {c})", None, None),
    r"shf\.r\.wrap\.b32": ("funnel_shift('r', {a}, {b}, {c})", None, None),
    r"sqrt\.(rn|approx)(\.ftz)?\.f32": ("np.sqrt({a})", None, None),
    r"rsqrt\.approx(\.ftz)?\.f32": ("(1 / np.sqrt({a}.astype(float64))).astype(float32)", None, None),
    r"rcp\.(rn|approx)(\.ftz)?\.f32": ("(float32(1) / {a})", None, None),
    r"ex2\.approx(\.ftz)?\.f32": ("np.exp2({a}.astype(float64)).astype(float32)", None, None),
    r"lg2\.approx(\.ftz)?\.f32": ("np.log2({a}.astype(float64)).astype(float32)", None, None),
}
_RULES: list[tuple[re.Pattern, Callable]] = []


def rule(pattern: str):
    def register(method):
        _RULES.append((re.compile(pattern), method))
        return method

    return register


@functools.cache
def _find(opcode: str) -> Callable | None:
    return next((method for pattern, method in _RULES if pattern.fullmatch(opcode)), None)


class Translator:
    """outputs: takes the numbers of the registers that the instruction writes."""

    def __init__(self, kernel: Kernel, number: int, outputs: set[int]):
        self.kernel, self.number, self.outputs = kernel, number, outputs
        self.instruction = kernel.instructions[number]
        self.parts, self.operands = self.instruction.parts, self.instruction.operands
        self.predicate_used = False

    def translate(self) -> str:
        x = self.instruction
        method = _find(x.opcode)
        if method is None:
            raise EmulationError(f"{x.opcode} is not known: {x.text}")
        code = method(self)
        if x.predicate and not self.predicate_used:
            raise EmulationError(f"a predicate is not known here: {x.text}")
        return code

    # operands

    def constant(self, value) -> str:
        name = f"c{len(self.kernel.constants)}"
        self.kernel.constants[name] = value
        return f"K[{name!r}]"

    def immediate(self, text: str, kind: str):
        dtype = numpy_type(kind)
        if text[:2] in ("0f", "0d"):
            value = np.array(int(text[2:], 16), uint32 if text[1] == "f" else uint64)
            if value.itemsize != size_of(kind):
                raise EmulationError(f"{text} as {kind}: {self.instruction.text}")
            return value.view(dtype)[()]
        number = int(text.rstrip("U"), 0) & ((1 << 8 * size_of(kind)) - 1)
        return np.array(number, UNSIGNED[size_of(kind)]).view(dtype)[()]

    def source(self, operand: str, kind: str | None = None) -> str:
        """An operand read as `kind`."""
        kind = kind or self.parts[-1]
        match = REGISTER.match(operand.lstrip("!"))
        if kind == "pred":
            if not match:
                return self.constant(np.bool_(int(operand, 0) != 0))
            text = f"R[{self.kernel.register(operand.lstrip('!'))}]"
            return f"(~{text})" if operand.startswith("!") else text
        if match:
            text, dtype, stored = f"R[{self.kernel.register(operand)}]", numpy_type(kind), BYTES[match.group(1)]
            if size_of(kind) < stored:
                text = f"{text}.astype({UNSIGNED[size_of(kind)].__name__})"
            elif size_of(kind) > stored:
                raise EmulationError(f"{operand} as {kind}: {self.instruction.text}")
            return text if dtype is UNSIGNED[size_of(kind)] else f"{text}.view({dtype.__name__})"
        if operand in SPECIAL:
            return f"P.special[{operand!r}]"
        if operand == "global_smem":  # shared memory begins at address 0
            return self.constant(numpy_type(kind)(0))
        if not re.match(r"^-?\d|^0[fdx]", operand):
            raise EmulationError(f"{operand} is not known: {self.instruction.text}")
        return self.constant(self.immediate(operand, kind))

    def assign(self, operand: str, expression: str, kind: str) -> str:
        """A result of type `kind` into a register, which may be wider."""
        target, register = self.targets([operand]), REGISTER.match(operand)
        if register is None:
            return f"{target} = {expression}"
        if register.group(1) == "p":
            return f"{target} = P.wide({expression}, bool)"
        stored = BYTES[register.group(1)]
        function = "bits" if size_of(kind) == stored else "extended"
        return f"{target} = P.{function}({expression}, {UNSIGNED[stored].__name__})"

    def targets(self, registers: list[str]) -> str:
        """Left side of an assignment; "_" takes what nobody wants."""
        names = []
        for register in registers:
            if register == "_":
                names.append("_")
            else:
                index = self.kernel.register(register)
                self.outputs.add(index)
                names.append(f"R[{index}]")
        return ", ".join(names)

    def address(self, operand: str, kind: str) -> str:
        """The text "base, offset" of "[%rd1+16]"."""
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        return f"{self.source(base, kind)}, {int(offset or '0', 0)}"

    def sources(self, operand: str, kind: str = "b32") -> str:
        return "[" + ", ".join(self.source(x, kind) for x in members(operand)) + "]"

    def memory_call(self, call: str) -> str:
        """Memory accesses say which instruction they are."""
        return f"P.access.instruction = {self.number}; {call}"

    def predicate(self) -> str:
        self.predicate_used = True
        return "None" if self.instruction.predicate is None else self.source(self.instruction.predicate, "pred")

    # arithmetic

    def simple(self, expression: str, kind: str | None, result: str | None) -> str:
        kind = kind or self.parts[-1]
        result = result or kind
        values = {name: self.source(x, kind) for name, x in zip("abc", self.operands[1:], strict=False)}
        if "ftz" in self.parts:
            values = {name: f"flushed({x})" for name, x in values.items()}
            expression = f"flushed({expression})"
        return self.assign(self.operands[0], expression.format(**values), result)

    @rule(r"(mul|mad)\.wide\.[su](16|32)")
    def wide_product(self):
        kind = self.parts[-1]
        double = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}[kind]
        d, a, b, *c = self.operands
        a, b = (f"{self.source(x, kind)}.astype({TYPES[double].__name__})" for x in (a, b))
        return self.assign(d, " + ".join([f"{a} * {b}", *(self.source(x, double) for x in c)]), double)

    @rule(rf"shl\.{_BITS}|shr\.({_BITS}|{_INT})")
    def shift(self):
        kind, (d, a, count) = self.parts[-1], self.operands
        if REGISTER.match(count) or int(count, 0) >= 8 * size_of(kind):
            function = {"shl": "shift_left", "shr": "shift_right"}[self.parts[0]]
            return self.assign(d, f"{function}({self.source(a)}, {self.source(count, 'u32')})", kind)
        symbol = {"shl": "<<", "shr": ">>"}[self.parts[0]]
        return self.assign(d, f"{self.source(a)} {symbol} {self.source(count)}", kind)

    @rule(r"bfe\.[su](32|64)")
    def bit_field(self):
        d, a, start, length = self.operands
        return self.assign(d, f"bit_field({self.source(a)}, {int(start, 0)}, {int(length, 0)})", self.parts[-1])

    @rule(r"bfi\.b32")
    def insert_bit_field(self):
        d, a, b, start, length = self.operands
        call = f"insert_bit_field({self.source(a)}, {self.source(b)}, {int(start, 0)}, {int(length, 0)})"
        return self.assign(d, call, "b32")

    @rule(r"lop3\.b32")
    def logic(self):
        d, a, b, c, table = self.operands
        return self.assign(d, f"logic({self.source(a)}, {self.source(b)}, {self.source(c)}, {int(table, 0)})", "b32")

    @rule(rf"setp\.(eq|ne|lt|le|gt|ge)\.({_INT}|{_BITS})|setp\.(lo|ls|hi|hs)\.u(16|32|64)")
    def compare(self):
        symbol = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=",
                  "hi": ">", "hs": ">="}[self.parts[1]]  # fmt: skip
        d, a, b = self.operands
        return self.assign(d, f"{self.source(a)} {symbol} {self.source(b)}", "pred")

    @rule(r"setp\.(eq|ne|lt|le|gt|ge)u?(\.ftz)?\.(f32|f64)|setp\.(nan|num)(\.ftz)?\.(f32|f64)")
    def compare_floats(self):
        """With a NaN the comparisons that end in u are true, the others are not."""
        d, a, b = self.operands
        a, b = (f"flushed({self.source(x)})" if "ftz" in self.parts else self.source(x) for x in (a, b))
        unordered = f"(np.isnan({a}) | np.isnan({b}))"
        compare = self.parts[1]
        if compare in ("nan", "num"):
            return self.assign(d, unordered if compare == "nan" else f"~{unordered}", "pred")
        symbol = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}[compare[:2]]
        expression = f"({a} {symbol} {b})"
        if compare.endswith("u"):
            expression += f" | {unordered}"
        elif compare == "ne":
            expression += f" & ~{unordered}"
        return self.assign(d, expression, "pred")

    @rule(rf"selp\.({_BITS}|{_INT}|f32|f64)")
    def select(self):
        d, a, b, p = self.operands
        return self.assign(d, f"np.where({self.source(p, 'pred')}, {self.source(a)}, {self.source(b)})", self.parts[-1])

    @rule(rf"mov\.(pred|{_BITS}|{_INT}|f32|f64)")
    def move(self):
        kind, (d, a) = self.parts[-1], self.operands
        if d.startswith("{"):
            return f"{self.targets(members(d))} = unpack({self.source(a)}, {len(members(d))})"
        if a.startswith("{"):
            part = f"b{8 * size_of(kind) // len(members(a))}"
            values = ", ".join(f"P.wide({self.source(x, part)}, {numpy_type(part).__name__})" for x in members(a))
            return self.assign(d, f"pack({values})", kind)
        return self.assign(d, self.source(a), kind)

    # conversions

    @rule(rf"cvt\.[su](8|16|32|64)\.[su](8|16|32|64)|cvt(\.rn)?\.{_FLOAT}\.({_FLOAT}|[su](8|16|32|64))")
    def convert(self):
        to, kind = self.parts[-2:]
        return self.assign(self.operands[0], f"{self.source(self.operands[1])}.astype({TYPES[to].__name__})", to)

    @rule(r"cvt\.(rni|rzi|rmi|rpi)(\.ftz)?\.([su](8|16|32|64)|f32)\.f32|cvt\.(rni|rzi|rmi|rpi)\.[su](8|16|32|64)\.f64")
    def round(self):
        function = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}[self.parts[1]]
        to, value = self.parts[-2], f"{function}({self.source(self.operands[1])})"
        return self.assign(self.operands[0], value if to == "f32" else f"to_integer({value}, {TYPES[to].__name__})", to)

    @rule(r"cvt\.f32\.bf16")
    def from_bfloat16(self):
        return self.assign(self.operands[0], f"bfloat16_to_float32({self.source(self.operands[1], 'b16')})", "b32")

    @rule(r"cvt\.rn\.bf16\.f32")
    def to_bfloat16(self):
        return self.assign(self.operands[0], f"float32_to_bfloat16({self.source(self.operands[1], 'f32')})", "b16")

    @rule(r"cvt\.rn\.(bf16x2|f16x2)\.f32")
    def to_pair(self):
        narrow = "float32_to_bfloat16({})" if self.parts[2] == "bf16x2" else "{}.astype(float16).view(uint16)"
        d, upper, lower = self.operands
        upper, lower = (narrow.format(f"P.wide({self.source(x)}, float32)") for x in (upper, lower))
        return self.assign(d, f"pack({lower}, {upper})", "b32")

    @rule(r"cvt\.rn\.f16x2\.(e4m3x2|e5m2x2)")
    def from_float8_pair(self):
        d, a = self.operands
        call = f"float8_pair_to_float16_pair({self.source(a, 'b16')}, {self.parts[-1] == 'e4m3x2'})"
        return self.assign(d, call, "b32")

    # warps

    @rule(r"shfl\.sync\.(up|down|bfly|idx)\.b32")
    def shuffle(self):
        d, a, b, c, _ = self.operands
        d, _, p = d.partition("|")
        call = f"shuffle({self.parts[2]!r}, {self.source(a)}, {self.source(b)}, {self.source(c)}, P.threads)"
        return f"{self.targets([d, p])} = {call}" if p else self.assign(d, call + "[0]", "b32")

    @rule(r"vote\.sync\.ballot\.b32")
    def ballot(self):
        d, p, _ = self.operands
        return self.assign(d, f"ballot({self.source(p, 'pred')}, P.threads, P.mask)", "b32")

    @rule(r"vote\.sync\.(all|any)\.pred")
    def vote(self):
        d, p, _ = self.operands
        return self.assign(d, f"vote({self.parts[2]!r}, {self.source(p)}, P.threads, P.mask)", "pred")

    @rule(r"redux\.sync\.((add|min|max)\.[su]32|(and|or|xor)\.b32)")
    def reduce(self):
        d, a, mask = self.operands
        call = f"reduce({self.parts[2]!r}, {self.source(a)}, {self.source(mask, 'b32')}, P.threads)"
        return self.assign(d, call, self.parts[-1])

    @rule(r"activemask\.b32")
    def active_mask(self):
        return self.assign(self.operands[0], "ballot(np.True_, P.threads, P.mask)", "b32")

    @rule(
        r"mma\.sync\.aligned\.(m16n8k(8|16)\.row\.col\.f32\.(bf16\.bf16|f16\.f16)|m16n8k[48]\.row\.col\.f32\.tf32\.tf32)\.f32"
    )
    def matrix_product(self):
        d, a, b, c = self.operands
        return (
            f"{self.targets(members(d))} = matrix_product({self.parts[-2]!r}, {self.sources(a)}, {self.sources(b)}, "
            f"{self.sources(c)})"
        )

    @rule(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(bf16\.bf16|f16\.f16)")
    def wide_matrix_product(self):
        d, a, b, p, scale_a, scale_b, *transposed = self.operands
        if (scale_a, scale_b) != ("1", "1") or set(transposed) - {"0"}:
            raise EmulationError(f"a sign or a transposition is not known: {self.instruction.text}")
        left = self.sources(a) if a.startswith("{") else self.source(a, "b64")
        sums = ", ".join("None" if x == "_" else f"R[{self.kernel.register(x)}]" for x in members(d))
        return self.memory_call(
            f"{self.targets(members(d))} = P.access.wide_matrix_product({self.parts[-1]!r}, [{sums}], {left}, "
            f"{self.source(b, 'b64')}, {self.source(p, 'pred')})"
        )

    @rule(r"wgmma\.(fence|commit_group|wait_group)\.sync\.aligned|fence\.proxy\.async(\.shared::cta)?|bar\.warp\.sync|"
          r"griddepcontrol\.(wait|launch_dependents)")  # fmt: skip
    def nothing(self):
        """Nothing to wait for: a product is there at once, the threads of a warp are in step, a launch begins when
        the one before it has ended."""
        return "pass"

    # memory

    @rule(r"ld\.param\.([bsu](8|16|32|64)|f32|f64)")
    def load_parameter(self):
        d, address = self.operands
        name = address.strip("[] ")
        return self.assign(d, f"P.launch.parameter({name!r}, {TYPES[self.parts[-1]].__name__})", self.parts[-1])

    @rule(r"createpolicy\.fractional\.L2::evict_(first|last|normal|unchanged)\.b64")
    def cache_policy(self):
        return self.assign(self.operands[0], "uint64(0)", "b64")

    _CACHE = r"(\.L1::(evict_(first|last|normal|unchanged)|no_allocate))?(\.L2::cache_hint)?"

    @rule(rf"ld\.global(\.nc)?((\.cta|\.gpu|\.sys)?\.(acquire|relaxed)|\.(acquire|relaxed)\.(cta|gpu|sys))?"
          rf"(\.ca|\.cg|\.cs)?{_CACHE}(\.v[248])?\.([bsu](8|16|32|64)|f32|f64)")  # fmt: skip
    def load_global(self):
        strength = next((x for x in self.parts if x in ("acquire", "relaxed")), "weak")
        return self._load(f"{self.address(self.operands[1], 'u64')}", f", {strength!r}")

    @rule(r"ld\.shared(\.v[24])?\.([bsu](8|16|32|64)|f32|f64)")
    def load_shared(self):
        return self._load(f"{self.address(self.operands[1], 'u32')}", "")

    def _load(self, address: str, extra: str) -> str:
        registers, dtype = members(self.operands[0]), TYPES[self.parts[-1]]
        stored = UNSIGNED[BYTES[REGISTER.match(next(r for r in registers if r != "_")).group(1)]]
        old = ", ".join("None" if r == "_" else f"R[{self.kernel.register(r)}]" for r in registers)
        return self.memory_call(
            f"{self.targets(registers)}, = P.access.load_{self.instruction.space}({self.predicate()}, {address}, "
            f"{dtype.__name__}, {stored.__name__}, [{old}]{extra})"
        )

    @rule(rf"st\.global((\.cta|\.gpu|\.sys)?\.(release|relaxed)|\.(release|relaxed)\.(cta|gpu|sys))?"
          rf"(\.wb|\.cg|\.cs|\.wt)?{_CACHE}(\.v[248])?\.([bsu](8|16|32|64)|f32|f64)")  # fmt: skip
    def store_global(self):
        strength = next((x for x in self.parts if x in ("release", "relaxed")), "weak")
        return self._store(self.address(self.operands[0], "u64"), f", {strength!r}")

    @rule(r"st\.shared(\.v[24])?\.([bsu](8|16|32|64)|f32|f64)")
    def store_shared(self):
        return self._store(self.address(self.operands[0], "u32"), "")

    def _store(self, address: str, extra: str) -> str:
        kind = "b" + self.parts[-1][1:]
        return self.memory_call(
            f"P.access.store_{self.instruction.space}({self.predicate()}, {address}, {TYPES[kind].__name__}, "
            f"{self.sources(self.operands[1], kind)}{extra})"
        )

    @rule(r"(atom|red)\.(global|shared)(\.(cta|gpu|sys))?(\.(relaxed|acquire|release|acq_rel))?(\.(cta|gpu|sys))?"
          r"\.(add|exch|cas|min|max|and|or|xor)\.([bsu](32|64)|f32|f64)")  # fmt: skip
    def atomic(self):
        kind = self.parts[-1]
        d, address, *values = self.operands if self.parts[0] == "atom" else ("_", *self.operands)
        strength = next((x for x in self.parts if x in ("acquire", "release", "acq_rel")), "relaxed")
        used = d in self.kernel.read_registers
        old = "None" if d == "_" else f"R[{self.kernel.register(d)}]"
        return self.memory_call(
            f"{self.targets([d])} = P.access.atomic_{self.parts[1]}({self.predicate()}, "
            f"{self.address(address, 'u64' if self.parts[1] == 'global' else 'u32')}, {TYPES[kind].__name__}, "
            f"{self.parts[-2]!r}, [{', '.join(self.source(x, kind) for x in values)}], {old}, {used}, {strength!r})"
        )

    @rule(r"ldmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16")
    def load_matrices(self):
        registers = members(self.operands[0])
        return self.memory_call(
            f"{self.targets(registers)}, = P.access.load_matrices({self.address(self.operands[1], 'u32')}, "
            f"{len(registers)}, {'trans' in self.parts})"
        )

    @rule(r"stmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16")
    def store_matrices(self):
        address, values = self.operands
        return self.memory_call(
            f"P.access.store_matrices({self.address(address, 'u32')}, {self.sources(values)}, {'trans' in self.parts})"
        )

    @rule(r"cp\.async\.c[ag]\.shared\.global(\.L2::cache_hint)?(\.L2::(64|128|256)B)?")
    def copy_async(self):
        to, source, size, *used = self.operands
        if "L2::cache_hint" in self.parts:
            used = used[:-1]
        count = self.source(used[0], "u32") if used else "None"
        return self.memory_call(
            f"P.access.copy_async({self.predicate()}, {self.address(to, 'u32')}, {self.address(source, 'u64')}, "
            f"{int(size, 0)}, {count})"
        )

    @rule(r"cp\.async\.commit_group")
    def commit_copies(self):
        return "P.access.shared.commit()"

    @rule(r"cp\.async\.wait_(group|all)")
    def wait_copies(self):
        """wait_all is a commit and a wait for everything."""
        if self.parts[2] == "wait_all":
            return self.memory_call("P.access.shared.commit(); P.access.wait_copies(0)")
        return self.memory_call(f"P.access.wait_copies({int(self.operands[0], 0)})")


for _pattern, _template in _SIMPLE.items():
    _RULES.append((re.compile(_pattern), functools.partial(lambda t, self: self.simple(*t), _template)))

SCOPE = {"np": np, **{name: value for module in (arithmetic, warps) for name, value in vars(module).items()}}
