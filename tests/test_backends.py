"""Which backend runs: by block, by environment, in threads, tasks and generators."""

import asyncio
import contextvars
import threading

import pytest
import torch
from conftest import DEVICE

import kvevict
from kvevict.backends import pick


def chosen():
    return pick(torch.device(DEVICE)).__name__.rpartition(".")[2]


def in_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_blocks_nest_and_end():
    assert chosen() == "triton"  # on a GPU, and on the CPU in the interpreter
    with kvevict.backend("reference"):
        assert chosen() == "reference"
        with pytest.raises(RuntimeError), kvevict.backend("auto"):
            assert chosen() == "triton"
            raise RuntimeError
        assert chosen() == "reference"
    assert chosen() == "triton"
    with pytest.raises(ValueError, match="backend name is 'cuda': expected one of"), kvevict.backend("cuda"):
        pass


def test_the_environment_decides_outside_of_blocks(monkeypatch):
    monkeypatch.setenv("KVEVICT_BACKEND", "reference")
    assert chosen() == in_thread(chosen) == "reference"
    with kvevict.backend("auto"):
        assert chosen() == "triton"
    monkeypatch.setenv("KVEVICT_BACKEND", "fast")
    with pytest.raises(ValueError, match="KVEVICT_BACKEND is 'fast'"):
        chosen()


def test_a_thread_begins_without_the_block_unless_it_is_given_the_context():
    with kvevict.backend("reference"):
        assert in_thread(chosen) == "triton"
        context = contextvars.copy_context()
        assert in_thread(lambda: context.run(chosen)) == "reference"

        def enters():
            with kvevict.backend("auto"):
                return chosen()

        assert in_thread(enters) == "triton" and chosen() == "reference"


def test_a_task_has_its_own():
    async def other(entered, seen):
        with kvevict.backend("reference"):
            entered.set()
            await seen.wait()
            return chosen()

    async def main():
        entered, seen = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(other(entered, seen))
        await entered.wait()
        here = chosen()
        seen.set()
        return here, await task

    assert asyncio.run(main()) == ("triton", "reference")


def test_a_suspended_generator_leaves_its_block_in_force_until_it_ends():
    def suspended():
        with kvevict.backend("reference"):
            yield chosen()

    generator = suspended()
    assert chosen() == "triton"
    assert next(generator) == chosen() == "reference"
    generator.close()
    assert chosen() == "triton"
