"""A pytest plugin: the kernels that tests launch are compiled for PTX_TARGET, and their PTX is emulated.

    PYTHONPATH=tests PTX_TARGET=sm_90 python -m pytest -p emulate tests/test_compact_kv.py

A race or hazard that a test leaves behind fails it. A plugin, because it must come before tests/conftest.py, which
turns the interpreter on: kvevict serves tensors on the CPU then, and Triton is told here to compile nevertheless.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)  # a worker of pytest-xdist inherits it from its parent's conftest

import ptx
import pytest
import torch
import triton

triton.knobs.runtime.interpret = False  # and goes before the one that tests/conftest.py sets
torch.set_num_threads(1)  # pytest-xdist runs a worker per core
EMULATOR = ptx.install(os.environ.get("PTX_TARGET", "sm_90"))


@pytest.fixture
def emulator() -> ptx.Emulator:
    return EMULATOR


@pytest.fixture(autouse=True)
def no_problems():
    EMULATOR.problems.clear()
    yield
    assert not EMULATOR.problems, f"\n{EMULATOR.problems}"
