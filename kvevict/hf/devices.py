"""On which device each layer of a model computes: there its part of a cache belongs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

OFFLOADED = ("cpu", "disk")  # beside others in a map: there weights wait for the first of the others to compute with


def of_layers(model: Any, layers: Sequence[int], device: Any, device_map: Any) -> list[torch.device]:
    """The device of each of these layers.

    Args:
        model: the model, or its config.
        device: of all layers, or None.
        device_map: {name of a module: device}, as accelerate's dispatch_model takes it and leaves it in
            `model.hf_device_map`; None: that of the model. Where there is neither, a layer is where its weights are,
            and those of a config on the CPU.

    Raises:
        TypeError, ValueError: both are given; no such map or device; no device for a layer, or two of them.
    """
    if device is not None:
        if device_map is not None:
            raise ValueError(f"device is {device!r} and device_map {device_map!r}: expected one of them")
        return [_device("device is", device)] * len(layers)
    modules = _attention(model)
    given = getattr(model, "hf_device_map", None) if device_map is None else device_map
    if given is None:
        parameters = (_parameter(modules[i][1] if i in modules else model) for i in layers)
        return [torch.device("cpu") if x is None else x.device for x in parameters]
    if not isinstance(given, Mapping) or not given or not all(isinstance(name, str) for name in given):
        raise TypeError(f"device_map is {given!r}: expected {{module's name: device}}, as model.hf_device_map is")
    first = next((device for device in given.values() if device not in OFFLOADED), "cpu")
    computes = {
        name: _device(f"device_map has {name!r}:", first if device in OFFLOADED else device)
        for name, device in given.items()
    }
    return [_mapped(i, modules[i][0] if i in modules else None, computes) for i in layers]


def _mapped(layer: int, module: str | None, computes: dict[str, torch.device]) -> torch.device:
    """Where a map has a layer, whose attention is the module of this name. Of a config the name is not known: then an
    entry is of the layer that the first number in it says."""
    if module is None:
        named = [name for name in computes if re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)[:1] == [str(layer)]]
        if len({computes[name] for name in named}) > 1:
            raise ValueError(
                f"device_map has layer {layer} on {' and '.join(str(computes[name]) for name in named)}: expected one "
                "device, or the model instead of its config"
            )
    else:
        named = sorted((name for name in computes if f"{module}.".startswith(f"{name}.")), key=len, reverse=True)
    for name in (*named, ""):
        if name in computes:
            return computes[name]
    raise ValueError(f"device_map has {list(computes)}: expected the name of a module with layer {layer} in it, or ''")


def _attention(model: Any) -> dict[int, tuple[str, Any]]:
    """Name and module of each layer's attention, as the model has them; of a config none."""
    if not hasattr(model, "named_modules"):
        return {}
    text = model.get_decoder() if hasattr(model, "get_decoder") else model  # the towers of other senses have theirs
    own = {module for module in text.modules() if "Attention" in type(module).__name__}
    found: dict[int, tuple[str, Any]] = {}
    for name, module in model.named_modules():
        if module in own and isinstance(getattr(module, "layer_idx", None), int):
            found.setdefault(module.layer_idx, (name, module))
    return found


def _parameter(module: Any) -> torch.Tensor | None:
    return next(module.parameters(), None) if hasattr(module, "parameters") else None


def _device(what: str, device: Any) -> torch.device:
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"{what} {device!r}: expected a device of torch ({str(error).splitlines()[0]})") from error
