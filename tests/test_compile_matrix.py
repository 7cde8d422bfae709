"""Every kernel that the ops launch compiles for four GPUs without one, and its machine code is looked at."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("compile_only.py")
MOVES_ROWS = {"partial_anchor_kernel", "keydiff_scores_kernel", "move_rows_kernel"}
KERNELS = MOVES_ROWS | {"fill_holes_kernel", "select_row_kernel", "count_digits_kernel", "write_kept_kernel",
                        "mean_heads_kernel"}  # fmt: skip


def compile_for(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(SCRIPT.parent.parent)
    done = subprocess.run([sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("target", ["sm_90", "sm_80", "sm_100", "gfx942"])
def test_compiles(target):
    compiled = compile_for(target)
    assert {kernel["kernel"] for kernel in compiled} == KERNELS
    assert all(kernel["compiled"] for kernel in compiled)
    if target == "gfx942":
        return
    for kernel in compiled:
        assert kernel["spills"] == 0, kernel
        if kernel["kernel"] in MOVES_ROWS:
            assert kernel["loads_128"] > 0, kernel
        if kernel["kernel"] == "move_rows_kernel":
            assert kernel["stores_128"] == kernel["stores"], kernel


def test_a_new_length_compiles_nothing_new():
    (variants,) = compile_for("sm_90", "--lengths")
    assert set(variants) >= MOVES_ROWS and max(variants.values()) <= 3, variants
