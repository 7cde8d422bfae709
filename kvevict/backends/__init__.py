"""Which of the two backends runs: `triton` (the kernels) or `reference` (the definition, in plain torch)."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType

import torch

NAMES = ("auto", "triton", "reference")
_chosen: ContextVar[str | None] = ContextVar("kvevict_backend", default=None)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend of every kvevict op inside the block.

    It holds, as `torch.no_grad` does, for the thread (or asyncio task) that enters the block. A thread that starts
    inside begins without it: enter the block there, start it with `contextvars.copy_context().run`, or set
    KVEVICT_BACKEND for the whole process. A generator that is suspended inside the block leaves it in force for its
    caller until it is resumed and leaves the block, or is closed.

    Triton's interpreter serves one thread at a time: it patches `triton.language` while a kernel runs, and two threads
    at once can leave it so, after which every launch of the process fails. Give other threads the reference.

    Args:
        name: "auto" (Triton for GPU tensors, and for CPU tensors if TRITON_INTERPRET=1; the reference otherwise),
            "triton" or "reference". Outside any block the environment variable KVEVICT_BACKEND decides, "auto"
            if unset. A backend asked for by name never falls back to the other.

    Raises:
        ValueError: unknown name.
    """
    token = _chosen.set(_known(name, "backend name"))
    try:
        yield
    finally:
        _chosen.reset(token)


def pick(device: torch.device) -> ModuleType:
    """The backend module for tensors on `device`. Triton is imported here, on first use."""
    name = _chosen.get() or _known(os.environ.get("KVEVICT_BACKEND") or "auto", "KVEVICT_BACKEND")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if name == "auto":
        name = "triton" if device.type != "cpu" or interpreted else "reference"
    elif name == "triton" and device.type == "cpu" and not interpreted:
        raise ValueError("backend 'triton' got tensors on the CPU: expected GPU tensors, or TRITON_INTERPRET=1")
    return importlib.import_module(f"kvevict.backends.{name}")


def _known(name: str, what: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{what} is {name!r}: expected one of {NAMES}")
    return name
