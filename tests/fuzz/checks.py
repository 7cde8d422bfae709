"""What the cases of all ops share: a case, comparisons, and which contracts the ops already have."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import kvevict
from fuzz.memory import Buffer, decode, elements
from kvevict.paged import paged_scores


@dataclass
class Case:
    """The arguments of a call; `check(result, before)` raises where the result is wrong and notes what memory must
    hold; `before` is called first, on the same backend."""

    arguments: dict
    check: Callable
    before: Callable | None = None
    sizes: dict = field(default_factory=dict)  # S, n, ...: for whoever spoils an argument


def same(got, expected, what: str) -> None:
    assert got == expected, f"{what} is {got}: expected {expected}"


def near(got: float, expected: float, tolerance: float, what: str) -> None:
    if math.isnan(expected) or math.isinf(expected):
        assert got == expected or (math.isnan(got) and math.isnan(expected)), f"{what} is {got}: expected {expected}"
    else:
        assert abs(got - expected) <= tolerance, f"{what} is {got}: expected {expected} within {tolerance}"


def near_row(got, expected, tolerance, what: str) -> None:
    same(len(got), len(expected), f"length of {what}")
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        near(a, b, tolerance[i] if isinstance(tolerance, list) else tolerance, f"{what}[{i}]")


def shaped(result: torch.Tensor, shape, dtype: torch.dtype) -> list:
    same((tuple(result.shape), result.dtype), (tuple(shape), dtype), "shape and dtype")
    return elements(result)


def numbers(data: bytes, dtype: torch.dtype) -> list:
    """Elements to compare: out of place a NaN stays one, but which is not promised."""
    return [str(x) for x in decode(data, dtype)]


def opened(value):
    """Arguments with tensors for buffers."""
    if isinstance(value, Buffer):
        return value.tensor
    if isinstance(value, dict):
        return {name: opened(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(opened(x) for x in value)
    return value


@functools.cache
def lengths_per_row() -> bool:
    """Whether the ops take lengths [B, H]."""
    try:
        kvevict.keydiff_scores(torch.ones(1, 2, 2, 2), lengths=torch.tensor([[0, 1]]))
    except ValueError:
        return False
    return True


@functools.cache
def tables_per_head() -> bool:
    """Whether the paged ops take block_tables [B, H, columns]."""
    try:
        paged_scores(torch.ones(2, 2, 1, 2), torch.zeros(1, 2, 1, dtype=torch.int32), torch.tensor([[0, 1]]))
    except ValueError:
        return False
    return True


def takes(function: Callable, argument: str) -> bool:
    return argument in inspect.signature(function).parameters
