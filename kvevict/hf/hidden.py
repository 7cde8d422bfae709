"""The hidden states that enter each layer's attention, told by forward hooks as they pass."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import Tensor


def attentions(model: Any, layers: Collection[int]) -> list[Any]:
    """The model's attention modules of these layers.

    Raises:
        ValueError: they are not found by their names.
    """
    found = [
        module for module in model.modules()
        if getattr(module, "layer_idx", None) in layers and "Attention" in type(module).__name__
    ]  # fmt: skip
    if {module.layer_idx for module in found} != set(layers):
        raise ValueError(f"{type(model).__name__} has no module named ...Attention for each layer of the cache")
    return found


@contextlib.contextmanager
def noting(model: Any, layers: Collection[int], note: Callable[[int, Tensor, Any], object]) -> Iterator[None]:
    """Inside the block, note(layer, hidden states [B, T, M], cache) is called before each of these attentions."""

    def hook(module, arguments, options):
        note(module.layer_idx, *_told(arguments, options))

    hooks = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in attentions(model, layers)]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def tell_caches(model: Any, layers: Collection[int]) -> None:
    """From now on the model's forwards tell an EvictingCache that reads hidden states what enters these attentions."""
    for module in attentions(model, layers):
        if module not in _telling:
            _telling.add(module)
            module.register_forward_pre_hook(_tell, with_kwargs=True)


_telling: Any = weakref.WeakSet()  # modules that have the hook


def _tell(module: Any, arguments: tuple, options: dict) -> None:
    hidden, cache = _told(arguments, options)
    note = getattr(cache, "note_hidden", None)
    if note is not None:
        note(module.layer_idx, hidden)


def _told(arguments: tuple, options: dict) -> tuple[Tensor, Any]:
    hidden = options["hidden_states"] if "hidden_states" in options else arguments[0]
    return hidden, options.get("past_key_values")
