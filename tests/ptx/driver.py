"""Triton's launches, brought here: install() replaces the driver, and from then on every kernel[grid](...) on CPU
tensors compiles for the target and runs in the emulator that install returned."""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .counts import Counts
from .kernel import Kernel
from .memory import Memory
from .parse import parse
from .report import EmulationError, Problems
from .scheduler import Launch, Settings


class Emulator:
    def __init__(self, settings: Settings):
        self.settings = settings
        self.problems = Problems()  # of every launch so far
        self.counts: list[Counts] = []  # of the launches with settings.measure
        self.executed: collections.Counter[str] = collections.Counter()  # kernel's name -> launches
        self._kernels: dict[tuple[str, int], Kernel] = {}

    @contextlib.contextmanager
    def using(self, **changes) -> Iterator[Problems]:
        """Other settings, and problems of their own, inside the block."""
        before = self.settings, self.problems
        self.settings, self.problems = dataclasses.replace(self.settings, **changes), Problems()
        try:
            yield self.problems
        finally:
            self.settings, self.problems = before

    def run(self, ptx: str, arguments: list, grid: tuple[int, ...], shared: int = 0, names: list[str] | None = None):
        """Run the entry of a PTX module on tensors (of which it gets the addresses) and numbers.

        shared: bytes of shared memory; names: of the arguments, for messages.

        Raises:
            EmulationError: the launch cannot go on.
        """
        if self.settings.rewrite is not None:
            ptx = self.settings.rewrite(ptx)
        key = (ptx, shared)
        kernel = self._kernels.get(key)
        if kernel is None:
            kernel = self._kernels[key] = Kernel(parse(ptx), shared)
        scratch = len(kernel.parameters) - len(arguments)  # Triton's own pointers come last, and are not used
        if scratch not in (0, 1, 2):
            raise EmulationError(f"{kernel.name}: {len(arguments)} arguments for {len(kernel.parameters)} parameters")
        names = names or [str(k) for k in range(len(arguments))]
        raw = [_raw(x) for x in arguments] + [bytes(8)] * scratch
        memory = Memory(_storages(arguments, names))
        full_grid = (*grid, 1, 1)[:3]
        values = dict(zip(kernel.parameters, raw, strict=True))
        launch = Launch(kernel, values, memory, full_grid, self.settings, self.problems)
        if isinstance(launch.counts, Counts):
            self.counts.append(launch.counts)
        self.executed[kernel.name] += 1
        launch.run()

    def launch(self, function: JITFunction, kernel, arguments: dict, grid) -> None:
        """Run what Triton compiled for these arguments, by name."""
        if kernel.metadata.global_scratch_size or kernel.metadata.num_ctas != 1:
            raise EmulationError(f"{function.__name__}: scratch memory and clusters are not known")
        values, names = [], []
        for name, kind in kernel.src.signature.items():
            for value in flattened(kind, arguments[name]):
                values.append(value)
                names.append(name)
        grid = grid(arguments) if callable(grid) else grid
        self.run(kernel.asm["ptx"], values, tuple(grid), kernel.metadata.shared, names)


def flattened(kind, value) -> Iterator:
    """What the compiled kernel takes of an argument: a tuple's members one by one, and no constants."""
    if isinstance(kind, tuple):
        for member_kind, member in zip(kind, value, strict=True):
            yield from flattened(member_kind, member)
    elif kind != "constexpr":
        yield value


def _raw(value) -> bytes:
    if isinstance(value, torch.Tensor):
        return np.uint64(value.data_ptr()).tobytes()
    if isinstance(value, float):
        return np.float32(value).tobytes()
    if isinstance(value, int):
        return (int(value) & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little")
    raise EmulationError(f"an argument of type {type(value).__name__} is not known")


def _storages(arguments: list, names: list[str]) -> dict[int, tuple[int, str]]:
    """Address -> (bytes, the names of the arguments that lie in it)."""
    found: dict[int, tuple[int, str]] = {}
    for value, name in zip(arguments, names, strict=True):
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            before = found.get(storage.data_ptr())
            found[storage.data_ptr()] = (storage.nbytes(), f"{before[1]}/{name}" if before else name)
    return found


class EmulatedDriver(DriverBase):
    """One device of this target, which compiles and never launches."""

    def __init__(self, target: GPUTarget):
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

    def map_python_to_cpp_type(self, ty):
        return ""

    def get_benchmarker(self):
        raise RuntimeError("nothing is timed here")

    def get_empty_cache_for_benchmark(self):
        raise RuntimeError("nothing is timed here")

    def clear_cache(self, cache):
        pass


def install(target: str = "sm_80", **settings) -> Emulator:
    """Emulate every launch from now on, in this process, as compiled for `target`.

    Args:
        target: "sm_80", "sm_90" and the like.
        settings: see Settings.

    Raises:
        RuntimeError: TRITON_INTERPRET is set: nothing is compiled then; or an emulator is installed already.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("triton.knobs.runtime.interpret (TRITON_INTERPRET) is set: the interpreter compiles nothing")
    if hasattr(JITFunction.run, "emulator"):
        raise RuntimeError("there is an emulator in this process already")
    emulator = Emulator(Settings(**settings))
    compile_or_launch = JITFunction.run

    def run(self, *args, grid, warmup, **keywords):
        kernel = compile_or_launch(self, *args, grid=grid, warmup=True, **keywords)
        if not warmup:
            parameters = self.signature.parameters
            bound = self.signature.bind(*args, **{k: v for k, v in keywords.items() if k in parameters})
            bound.apply_defaults()
            emulator.launch(self, kernel, {**keywords, **bound.arguments}, grid)
        return kernel

    run.emulator = emulator
    JITFunction.run = run
    driver.set_active(EmulatedDriver(GPUTarget("cuda", int(target.removeprefix("sm_")), 32)))
    return emulator
