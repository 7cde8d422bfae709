"""Every kernel that the ops launch compiles for four GPUs without one, and its machine code is looked at."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("compile_only.py")
READS_ROWS = {
    "partial_anchor_kernel", "keydiff_scores_kernel", "keydiff_row_kernel", "key_norm_kernel", "move_rows_kernel",
}  # fmt: skip
TILES = {"attention_lse_kernel", "attention_mass_kernel", "decode_run_kernel", "mlp_scores_kernel"}
KERNELS = READS_ROWS | TILES | {
    "fill_holes_kernel", "select_row_kernel", "select_runs_kernel", "split_heads_kernel", "mean_heads_kernel",
    "pool_scores_kernel", "merge_lse_kernel", "merge_decode_kernel", "track_kernel",
}  # fmt: skip
SHARED_MEMORY = 99 * 1024  # what a program may have on the smallest of the GPUs in use (sm_86, sm_89, sm_120)


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
        assert kernel["shared"] <= SHARED_MEMORY, kernel
        if kernel["kernel"] in READS_ROWS:
            assert kernel["loads_128"] > 0, kernel
        if kernel["kernel"] in TILES:  # in a pipelined loop, loads go to shared memory
            assert kernel["loads_128"] + kernel["copies_128"] > 0, kernel
        if kernel["kernel"] == "move_rows_kernel":
            assert kernel["stores_128"] == kernel["stores"], kernel


def test_a_new_length_compiles_nothing_new():
    (variants,) = compile_for("sm_90", "--lengths")
    assert set(variants) >= READS_ROWS | TILES and max(variants.values()) <= 3, variants


def test_a_new_length_compiles_nothing_new_in_pages():
    (variants,) = compile_for("sm_90", "--lengths", "--paged")
    assert set(variants) >= READS_ROWS and max(variants.values()) <= 3, variants
