"""Compile exactly what the launchers would launch, for a GPU that is not there, and read the machine code.

`compile_only` replaces Triton's driver, so it belongs in a process of its own, where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import functools
import inspect
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (75, 80, 86, 89, 90, 100, 120)},
    **{arch: GPUTarget("hip", arch, 64) for arch in ("gfx942", "gfx950")},
}
_TOOLS = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Launch:
    """One launch that did not happen."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict  # by name, as the launcher gave them
    compiled: object  # triton's CompiledKernel

    @property
    def programs(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def folder(self) -> pathlib.Path:
        """Of the kernel's Python."""
        return pathlib.Path(self.compiled.src.fn.fn.__code__.co_filename).parent

    @property
    def warps(self) -> int:
        """Warps of one program."""
        return self.compiled.metadata.num_warps

    def parameters(self) -> list[torch.Tensor | int | float]:
        """What the compiled kernel is passed, in order. Constants are compiled in."""
        signature = self.compiled.src.signature
        return [value for name, kind in signature.items() for value in _flat(self.arguments[name], kind)]


def _flat(argument, kind):
    if isinstance(kind, tuple):  # a NamedTuple: its members are parameters of their own
        return [value for member, its in zip(argument, kind, strict=True) for value in _flat(member, its)]
    if kind == "constexpr":
        return []
    return [argument]


class CompileOnlyDriver(DriverBase):
    def __init__(self, target):
        self.target = target

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_benchmarker(self):
        raise RuntimeError("nothing runs here")

    def map_python_to_cpp_type(self, ty):
        return ""

    def get_empty_cache_for_benchmark(self):
        raise RuntimeError("nothing runs here")

    def clear_cache(self, cache):
        pass


def compile_only(target: GPUTarget, on_launch: Callable[[Launch], None]) -> None:
    """From now on every launch compiles and is handed to `on_launch` instead of running."""
    run = JITFunction.run

    def warm_up(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        bound = inspect.signature(self.fn).bind(*args, **{k: v for k, v in options.items() if k in self.arg_names})
        bound.apply_defaults()
        grid = grid(bound.arguments) if callable(grid) else grid
        on_launch(Launch(self.__name__, (*grid, 1, 1)[:3], dict(bound.arguments), compiled))
        return compiled

    JITFunction.run = warm_up
    driver.set_active(CompileOnlyDriver(target))


def _run_on_cubin(tool: str, compiled, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([_TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True)
    return done.stdout


@functools.cache
def _code(compiled) -> str:
    """Its SASS, without what else there is to say about it: a third faster."""
    return _run_on_cubin("nvdisasm", compiled, "-c", "-ndf")


@functools.cache
def registers(compiled) -> int:
    """Registers of a thread."""
    return int(re.search(r"REG:(\d+)", _run_on_cubin("cuobjdump", compiled, "--dump-resource-usage")).group(1))


def summary(compiled) -> dict:
    """Registers, spills and the widths of global accesses (NVIDIA); AMD's assembly only says that it compiled."""
    if "cubin" not in compiled.asm:
        return {"compiled": "amdgcn" in compiled.asm, "shared": compiled.metadata.shared}
    code = _code(compiled)
    return {
        "compiled": True,
        "registers": registers(compiled),
        "shared": compiled.metadata.shared,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "loads_128": len(re.findall(r"\bLDG\.E[A-Z0-9.]*\.128", code)),
        "copies_128": len(re.findall(r"\bLDGSTS\.E[A-Z0-9.]*\.128", code)),
        "copies": len(re.findall(r"\bLDGSTS\b", code)),
        "loads": len(re.findall(r"\bLDG\b", code)),
        "loads_narrow": len(re.findall(r"\bLDG\.E[A-Z0-9.]*\.[US](?:8|16)\b", code)),
        "stores_128": len(re.findall(r"\bSTG\.E[A-Z0-9.]*\.128", code)),
        "stores": len(re.findall(r"\bSTG\b", code)),
    }


@dataclass(frozen=True)
class Instruction:
    """One line of SASS, with what its control bits say (they are the same from Volta to Blackwell)."""

    address: int
    opcode: str  # with its modifiers: LDG.E.128
    operands: str
    ptx_line: int  # the line of PTX it was made from, counted from 1
    stall: int  # cycles until the warp may issue its next instruction
    sets: int | None  # the barrier that is released when the result is there
    waits: frozenset[int]  # the barriers that must be released before it issues
    target: int | None  # address that a branch goes to

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


_LINE = re.compile(r'File "\.nv_debug_ptx_txt", line (\d+)')
_FIRST = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);\s+/\* 0x([0-9a-f]{16}) \*/")
_SECOND = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^(\.L_x_\d+):")


@functools.cache
def sass(compiled) -> list[Instruction]:
    """The machine code of an NVIDIA kernel, in the order of addresses."""
    found, labels, waiting, line, pending = [], {}, [], 0, None
    for text in _run_on_cubin("nvdisasm", compiled, "-gp", "-hex", "-c").splitlines():
        if at := _LINE.search(text):
            line = int(at.group(1))
        elif label := _LABEL.match(text):
            waiting.append(label.group(1))
        elif first := _FIRST.search(text):
            pending = (int(first.group(1), 16), first.group(2), first.group(3).strip())
            labels.update(dict.fromkeys(waiting, pending[0]))
            waiting = []
        elif pending and (second := _SECOND.match(text)):
            control = int(second.group(1), 16) >> 41
            barrier = control >> 5 & 7
            waits = frozenset(b for b in range(6) if control >> 11 >> b & 1)
            found.append((*pending, line, control & 15, None if barrier == 7 else barrier, waits))
            pending = None

    def goes_to(opcode, operands):
        label = re.search(r"\.L_x_\d+", operands)
        return labels.get(label.group()) if label and opcode.startswith("BRA") else None

    return [Instruction(*one, goes_to(one[1], one[2])) for one in found]
