"""Compile exactly what the launchers would launch, for a GPU that is not there, and read the machine code.

    python tests/compile_only.py sm_90            # one JSON line per compiled kernel
    python tests/compile_only.py sm_90 --lengths [--paged]  # variants compiled for lengths 1 to 4096

Runs in a process of its own: it replaces Triton's driver, and TRITON_INTERPRET must not be set.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


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


def compile_only(target: GPUTarget, on_compiled) -> None:
    """From now on every launch compiles and calls on_compiled(kernel name, compiled kernel) instead of running."""
    run = JITFunction.run

    def warm_up(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        on_compiled(self.__name__, kernel)
        return kernel

    JITFunction.run = warm_up
    driver.set_active(CompileOnlyDriver(target))


def machine_code(kernel) -> dict:
    """Registers, spills and the widths of global accesses (NVIDIA); AMD's assembly only says that it compiled."""
    if "cubin" not in kernel.asm:
        return {"compiled": "amdgcn" in kernel.asm}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def dump(what):
            return subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout

        usage, sass = dump("--dump-resource-usage"), dump("-sass")
    return {
        "compiled": True,
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "shared": kernel.metadata.shared,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "loads_128": len(re.findall(r"\bLDG\.E[A-Z0-9.]*\.128", sass)),
        "copies_128": len(re.findall(r"\bLDGSTS\.E[A-Z0-9.]*\.128", sass)),
        "loads": len(re.findall(r"\bLDG\b", sass)),
        "stores_128": len(re.findall(r"\bSTG\.E[A-Z0-9.]*\.128", sass)),
        "stores": len(re.findall(r"\bSTG\b", sass)),
    }


def cache(S: int, D: int, dtype: torch.dtype, B: int = 2, H: int = 4):
    return torch.empty(B, H, S, D, dtype=dtype), torch.empty(B, H, S, D, dtype=dtype)


def launch_scores(S, D, dtype):
    from kvevict.backends import triton as backend

    keys, _ = cache(S, D, dtype)
    out = torch.empty(keys.shape[:3])
    lengths = torch.full((2,), S, dtype=torch.int32)
    backend.keydiff_scores(keys, None, True, None, out)
    backend.keydiff_scores(keys, None, False, lengths, out)
    backend.keydiff_scores(keys[:, :, :500], None, True, None, out[:, :, :500].contiguous())
    backend.keydiff_scores(keys, torch.empty(2, 4, D), False, None, out)
    backend.key_norm_scores(keys, None, out)


def launch_select(S):
    from kvevict.backends import triton as backend

    lengths = torch.full((2,), S, dtype=torch.int64)
    n = max(S // 2, 1)
    for shared, ragged in ((False, False), (True, True)):
        out = torch.empty(2, 1 if shared else 4, n, dtype=torch.int64)
        extra = lengths if ragged else None
        backend.topk_indices(torch.empty(2, 4, S), extra, 1, 1, shared, extra, out)
    backend.evict_slots(torch.empty(2, 4, S), 0, 0, None, torch.empty(2, 4, 1, dtype=torch.int64))
    backend.pool_scores(torch.empty(2, 4, S), 5, True, torch.empty(2, 4, S))


def launch_adaptive(S):
    from kvevict.backends import triton as backend

    backend.topk_adaptive(
        torch.empty(2, 4, S), S // 2, None, (1, 5), 1, 1, None, torch.empty(2, 4, S, dtype=torch.int64)
    )


def launch_moves(S, D, dtype):
    from kvevict.backends import triton as backend

    keys, values = cache(S, D, dtype)
    n = max(S // 2, 1)
    slots = torch.empty(2, 4, n, dtype=torch.int64)
    backend.fill_holes(slots, torch.empty_like(slots))
    backend.move_rows(keys, values, slots, True)
    backend.move_rows(keys, values, slots, False)
    backend.copy_rows(keys, values, slots, *cache(n, D, dtype))


def launch_attention(S, D, dtype):
    """The whole prompt, a short window and a decode step, with a group of 4."""
    from kvevict.backends import triton as backend

    keys, values = cache(S, D, dtype)
    out = torch.empty(2, 4, S)
    for W in {S, 1}:
        queries, lse = torch.empty(2, 16, W, D, dtype=dtype), torch.empty(2, 16, W)
        backend.attention_lse(queries, keys, 0.1, True, None, lse)
        backend.attention_mass(queries, keys, lse, 0.1, True, "mean", True, None, out)
    query = torch.empty(2, 16, 1, D, dtype=dtype)
    used = torch.empty(2, 4, S, dtype=torch.int32)
    result = torch.empty(2, 16, 1, D, dtype=torch.bfloat16 if dtype.itemsize == 1 else dtype)
    backend.decode_attention(query, keys, values, 0.1, None, out, 0.5, used, 7, 1e-3, result)


def launch_paged(S, D, dtype):
    """Every kernel that finds its rows through a block table: blocks of 16 tokens, [2, blocks, 16, heads, D]."""
    from kvevict.backends import triton as backend

    columns = -(-S // 16)
    keys, values = (x.transpose(1, 2) for x in torch.empty(2, 2 * columns, 16, 4, D, dtype=dtype))
    table, lengths = torch.empty(2, columns, dtype=torch.int32), torch.full((2,), S, dtype=torch.int32)
    out = torch.empty(2, 4, columns * 16)
    backend.keydiff_scores(keys, None, True, lengths, out, table)
    backend.key_norm_scores(keys, lengths, out, table)
    queries, lse = torch.empty(2, 16, 1, D, dtype=dtype), torch.empty(2, 16, 1)
    backend.attention_lse(queries, keys, 0.1, True, lengths, lse, table)
    backend.attention_mass(queries, keys, lse, 0.1, True, "mean", True, lengths, out, table)
    result = torch.empty(2, 16, 1, D, dtype=torch.bfloat16 if dtype.itemsize == 1 else dtype)
    backend.decode_attention(queries, keys, values, 0.1, lengths, None, 1.0, None, 0, 0.0, result, table)
    slots = torch.empty(2, 4, max(S // 2, 1), dtype=torch.int64)
    backend.move_rows(keys, values, slots, True, table)
    backend.move_rows(keys, values, slots, True, table, lengths)


def launch_mlp(S, M, dtype):
    from kvevict.backends import triton as backend

    hidden, w1, b1 = (torch.empty(*shape, dtype=dtype) for shape in ((2, S, M), (M // 2, M), (M // 2,)))
    backend.mlp_scores(hidden, w1, b1, b1, b1[:1], torch.empty(2, S))


def matrix(target: str) -> None:
    case: dict = {}

    def report(name, kernel):
        print(json.dumps({"kernel": name, **case, **machine_code(kernel)}), flush=True)

    compile_only(TARGETS[target], report)
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        for D in (64, 80, 128, 256):
            case.update(D=D, dtype=str(dtype).removeprefix("torch."))
            launch_scores(4096, D, dtype)
            launch_moves(4096, D, dtype)
    for D, dtype in (
        (64, torch.bfloat16), (80, torch.bfloat16), (128, torch.bfloat16), (256, torch.bfloat16),
        (576, torch.bfloat16), (128, torch.float8_e4m3fn), (128, torch.float32),
    ):  # fmt: skip
        case.update(D=D, dtype=str(dtype).removeprefix("torch."))
        launch_attention(4096, D, dtype)
    for D, dtype in ((128, torch.bfloat16), (576, torch.bfloat16)):
        case.update(D=D, dtype=str(dtype).removeprefix("torch."), paged=True)
        launch_paged(4096, D, dtype)
    case.clear()
    launch_mlp(4096, 576, torch.bfloat16)
    launch_select(4096)
    launch_select(131072)
    launch_adaptive(4096)


def variants(target: str) -> None:
    compiled: dict[str, set] = {}
    compile_only(TARGETS[target], lambda name, kernel: compiled.setdefault(name, set()).add(kernel.hash))
    paged = "--paged" in sys.argv
    every = [*range(1, 70), *range(70, 4097, 61), 96, 128, 256, 512, 1000, 1024, 2048, 4000, 4096]
    for S in every:
        if paged:
            launch_paged(S, 128, torch.bfloat16)
            continue
        launch_scores(S, 128, torch.bfloat16)
        launch_select(S)
        launch_moves(S, 128, torch.bfloat16)
        launch_attention(S, 128, torch.bfloat16)
        launch_mlp(S, 576, torch.bfloat16)
    print(json.dumps({name: len(hashes) for name, hashes in compiled.items()}))


if __name__ == "__main__":
    (variants if "--lengths" in sys.argv else matrix)(sys.argv[1])
