"""Every test runs on a GPU where there is one, and in Triton's interpreter where there is none."""

import os

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    torch.set_num_threads(1)  # pytest-xdist runs a worker per core
    from interpreter import speed_up

    speed_up()

import pytest

DEVICE = "cuda" if HAS_GPU else "cpu"
collect_ignore = ["ptx"]  # asks for a process of its own, which compiles: see emulate.py


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


_empty, _new_empty = torch.empty, torch.Tensor.new_empty


def _poisoned(x):
    if x.device.type == "meta" or type(x) is not torch.Tensor:
        return x
    if x.element_size() == 1 and x.dtype != torch.bool:
        x.view(torch.uint8).fill_(0x7F)
    elif x.is_floating_point():
        x.fill_(float("nan"))
    elif x.dtype in (torch.int32, torch.int64):
        x.fill_(-77)
    return x


# Functions of the module, the same in every test: torch.compile remembers what torch.empty was when it first looked.
def _poisoned_empty(*args, **options):
    return _poisoned(_empty(*args, **options))


def _poisoned_new_empty(*args, **options):
    return _poisoned(_new_empty(*args, **options))


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    """torch.empty gives NaN (-77 for integers), so that an element nobody wrote shows."""
    monkeypatch.setattr(torch, "empty", _poisoned_empty)
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned_new_empty)
