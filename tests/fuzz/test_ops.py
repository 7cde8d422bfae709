"""Random calls of every op on both backends: the result is what the oracle says, nothing else is written, and a call
that is refused names the argument and leaves everything as it was.

A failure names its seed. `FUZZ_SEED=... pytest tests/fuzz -k "op and backend"` runs that case alone; FUZZ_SECONDS runs
new cases for so long (`make fuzz`)."""

import contextlib
import os
import time
from random import Random

import pytest
import torch
from conftest import DEVICE

import kvevict
from fuzz.checks import Case, opened
from fuzz.drawing import Draw
from fuzz.memory import Buffer
from fuzz.ops import OPS
from fuzz.spoils import spoil

CASES = dict(reference=6, triton=3)  # of each op, where no seconds are given

# Documented to need a contiguous last dimension: refused by name, or served.
ROWS = ("scores", "lse", "mass", "last_used", "block_tables", "parts")


def seeds(backend: str):
    if "FUZZ_SEED" in os.environ:
        yield int(os.environ["FUZZ_SEED"])
    elif "FUZZ_SECONDS" in os.environ:
        started, first = time.monotonic(), time.time_ns() // 1000 % 10**9 * 1000
        count = 0
        while time.monotonic() - started < float(os.environ["FUZZ_SECONDS"]) / (2 * len(OPS)):
            yield first + count
            count += 1
    else:
        yield from range(CASES[backend])


def buffers(value):
    if isinstance(value, Buffer):
        yield value
    elif isinstance(value, (list, tuple)):
        for x in value:
            yield from buffers(x)


def refusable(case: Case) -> list[str]:
    """Arguments whose layout an op need not take."""
    return [name for name in ROWS if any(not buffer.rows_contiguous() for buffer in buffers(case.arguments.get(name)))]


def run(op: str, backend: str, seed: int) -> None:
    draw_case, function = OPS[op]
    random = Random(f"{op} {seed}")
    draw = Draw(random, interpreted=backend == "triton" and DEVICE == "cpu")
    case = draw_case(draw)
    autocast, illegal = draw.chance(0.1), spoil(draw, op, case) if draw.chance(0.3) else None
    names = [*([illegal] if illegal else []), *refusable(case)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(kvevict.backend(backend))
        if autocast:
            stack.enter_context(torch.autocast(DEVICE, torch.bfloat16))
        try:
            try:
                before = case.before() if case.before and not illegal else None
                result = function(**opened(case.arguments))
            except (TypeError, ValueError) as error:
                assert any(name in str(error) for name in names), f"refused, {names or 'nothing'} is illegal: {error}"
            else:
                assert not illegal, f"taken, but {illegal} is illegal"
                case.check(result, before)
            assert not draw.memory.wrong(), f"memory is not as it must be: (allocation, elements) {draw.memory.wrong()}"
        except Exception as error:
            arguments = "\n".join(f"  {name} = {value}" for name, value in case.arguments.items())
            raise AssertionError(
                f"FUZZ_SEED={seed} {op} on {backend}{' under autocast' if autocast else ''}: {error}\n{arguments}"
            ) from error


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_contract(op, backend):
    for seed in seeds(backend):
        run(op, backend, seed)
