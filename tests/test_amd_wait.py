"""On AMD a barrier does not wait for loads under way. A program of the ordered move may say that it has read its rows
only when all of its waves have: this reads the assembly for gfx942."""

import os
import pathlib
import re
import subprocess
import sys

SCRIPT = """
import torch
from compile_only import TARGETS, cache, compile_only
from kvevict.backends import triton as backend

compile_only(TARGETS["gfx942"], lambda name, kernel: print(kernel.asm["amdgcn"]))
backend.move_rows(*cache(4096, 128, torch.bfloat16), torch.empty(2, 4, 2048, dtype=torch.int64), True)
"""


def all_waves_have_read(assembly: str) -> bool:
    """Whether every wave waits for all its loads right before the signal, a swap. With several waves that must be
    before the barrier at which they meet: what follows it is one wave's."""
    code = assembly[: assembly.index("global_atomic_swap")]
    threads = int(re.search(r"\.max_flat_workgroup_size: *(\d+)", assembly)[1])
    if threads > 64:
        code = code[: code.rindex("s_barrier")]
    straight_line = re.split(r"^\.LBB", code, flags=re.M)[-1]
    return re.search(r"s_waitcnt [^\n]*vmcnt\(0\)", straight_line) is not None


def test_rows_are_read_before_a_program_says_so():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    tests = pathlib.Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(tests.parent), str(tests)])
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all_waves_have_read(done.stdout)
    assert not all_waves_have_read(re.sub(r"s_waitcnt [^\n]*vmcnt\(0\)", "", done.stdout))


def test_a_wait_of_one_wave_is_not_enough():
    code = (
        "buffer_load_dwordx4 v[0:3]\ns_barrier\ns_waitcnt vmcnt(0)\nglobal_atomic_swap\n.max_flat_workgroup_size: {}\n"
    )
    assert all_waves_have_read(code.format(64))
    assert not all_waves_have_read(code.format(256))
