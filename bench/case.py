"""What a case is: an op, the shapes it is measured at, what it must move, and what people use instead."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

ELEMENT = {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn, "float32": torch.float32}


@dataclass(frozen=True)
class Point:
    """One shape. A case reads what it needs of it."""

    S: int
    keep: float = 0.5
    B: int = 1
    H: int = 8  # KV heads
    group: int = 4  # query heads per KV head
    D: int = 128
    W: int = 32  # queries
    dtype: str = "bfloat16"

    def __str__(self):
        return f"B{self.B}-H{self.H}-S{self.S}-D{self.D}-{self.dtype}-keep{self.keep:g}"

    @property
    def n(self) -> int:
        return max(1, int(self.keep * self.S + 0.5))

    @property
    def element_size(self) -> int:
        return ELEMENT[self.dtype].itemsize

    def random(self, *shape, device):
        """Random values of the point's dtype."""
        return torch.randn(*shape, device=device).to(ELEMENT[self.dtype])

    def cache(self, device):
        """Random K and V, [B, H, S, D] each."""
        return tuple(self.random(self.B, self.H, self.S, self.D, device=device) for _ in range(2))


@dataclass(frozen=True)
class Case:
    """One op. `run` and the peers take what `inputs` gives, after the point; a peer is a function, or a str that says
    why it is missing here.

    gate: the most that the counted bytes of a point may be, in floors; the number's reason stands beside it.
    """

    name: str
    inputs: Callable[..., tuple]  # (point, device)
    run: Callable[..., Any]  # (point, *inputs)
    floor: Callable[..., Any]  # (point, result) -> a floor of kvevict.traffic
    gate: Callable[[Point], float]
    peers: dict[str, Callable | str] = field(default_factory=dict)
    varies: tuple[str, ...] = ("D", "B")  # what matters to it beside S
    more: Callable[..., list[Point]] | None = None  # (on_gpu, quick): further points

    def points(self, on_gpu, quick):
        found = grid(on_gpu, quick, self.varies)
        return found + (self.more(on_gpu, quick) if self.more else [])


def grid(on_gpu, quick, varies):
    """A sweep of S, and around one S a sweep of everything else that matters."""
    if quick:
        base = Point(16384) if on_gpu else Point(1024, H=2)
        return [base, replace(base, S=4 * base.S)] if on_gpu else [base]
    if on_gpu:
        base = Point(32768)
        points = [replace(base, S=2**k) for k in range(10, 20)]
        others = [dict(D=64), dict(B=16), dict(B=16, S=4096)]
    else:  # counted in the interpreter: bytes grow with S as they will, so small is enough
        base = Point(4096, H=2)
        points = [replace(base, S=2**k) for k in range(9, 15)]
        others = [dict(D=64)]
    others += [dict(keep=keep) for keep in (0.1, 0.25, 0.8)] + [dict(dtype="float8")]
    return points + [replace(base, **other) for other in others if set(other) - {"S"} <= set(varies)]


def optional(module, function):
    """A peer from a package that may not be there: function(module), or why it is missing."""
    try:
        return function(importlib.import_module(module))
    except ImportError as error:
        return f"{module} is not importable here ({type(error).__name__})"


def compiled(function):
    """torch.compile of a peer, compiled on its first call; missing on a CPU, where compiling takes longer than all
    the rest."""
    if not torch.cuda.is_available():
        return "torch.compile is compared on a GPU only"
    return torch.compile(function, dynamic=False)
