"""Shares of a model's cache, measured once: how much of the budget each of its layers and heads is worth."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvevict import validate

_FORMAT = "kvevict shares"
_ENDING = ".shares.safetensors"


@dataclass(frozen=True, eq=False)
class Shares:
    """What each KV head kept of its tokens when a model's best tokens were chosen over all layers and heads.

    Attributes:
        keeps: the shares of the whole cache that were kept, ascending.
        table: [K, L, H] float32 on the CPU: what head h of layer l kept of its tokens at each. [K, L, 1]: of layers.
        metadata: of the measurement: model, config, texts, tokens, date, version.
    """

    keeps: tuple[float, ...]
    table: Tensor = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for keep in self.keeps:
            if not 0.0 < validate.number("keeps", keep) <= 1.0:
                raise ValueError(f"keeps is {self.keeps}: expected shares in (0, 1]")
        if list(self.keeps) != sorted(set(self.keeps)):
            raise ValueError(f"keeps is {self.keeps}: expected each share once, in ascending order")
        validate.tensor("table", self.table, 3, (torch.float32,))
        if self.table.device.type != "cpu" or len(self.table) != len(self.keeps):
            raise ValueError(
                f"table has shape {tuple(self.table.shape)} on {self.table.device}: expected (keeps, layers, heads) on "
                f"the CPU, with {len(self.keeps)} keeps"
            )
        positive = (self.table > 0).all() and self.table.isfinite().all()
        validate.require(positive, "table", self.table, "positive, finite shares")

    @property
    def layers(self) -> int:
        return self.table.shape[1]

    @property
    def heads(self) -> int:
        return self.table.shape[2]

    def at(self, keep: float) -> Tensor:
        """[L, H] float32: linear between the two nearest of `keeps`; outside of them, the nearest one's."""
        keep = min(max(validate.number("keep", keep), self.keeps[0]), self.keeps[-1])
        above = next(i for i, measured in enumerate(self.keeps) if measured >= keep)
        if self.keeps[above] == keep:
            return self.table[above]
        low, high = self.keeps[above - 1], self.keeps[above]
        return torch.lerp(self.table[above - 1], self.table[above], (keep - low) / (high - low))

    def save(self, path: str | pathlib.Path) -> None:
        """Write a safetensors file, the metadata in its header."""
        from safetensors.torch import save_file

        keeps = torch.tensor(self.keeps, dtype=torch.float64)
        save_file(
            {"keeps": keeps, "table": self.table.contiguous()}, str(path), metadata={**self.metadata, "format": _FORMAT}
        )

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Shares:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file. ValueError: no shares, or not whole ones.
        """
        metadata, tensors = read_file(path, "holds no shares")
        found = metadata.pop("format", None)
        if found != _FORMAT or tensors.keys() != {"keeps", "table"}:
            raise ValueError(
                f"{path} is of the format {found!r} with {sorted(tensors)}: expected {_FORMAT!r}, keeps and table"
            )
        try:
            return cls(tuple(tensors["keeps"].tolist()), tensors["table"], metadata)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def named(cls, name: str) -> Shares:
        """Those of a model that the package carries, such as "smollm2-135m".

        Raises:
            ValueError: it carries none of that name.
        """
        validate.one_of("name", name, tuple(_packaged()))
        return _packaged()[name]


def read_file(path: str | pathlib.Path, wrong: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file.

    Raises:
        FileNotFoundError: no such file. ValueError: none of that kind: the path, and what is `wrong` with it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dict
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} {wrong}: {error}") from error


@functools.cache
def _packaged() -> dict[str, Shares]:
    """Read once, so that budgets of the same name are equal."""
    found = {}
    for file in sorted(importlib.resources.files("kvevict").joinpath("data").iterdir(), key=lambda file: file.name):
        if file.name.endswith(_ENDING):
            with importlib.resources.as_file(file) as path:
                found[file.name.removesuffix(_ENDING)] = Shares.load(path)
    return found


def said(config: Any, name: str) -> Any:
    """What a config says of its model; a list with a value for each layer where transformers has one for each."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers: which layer's?
        return [getattr(of_layer, name, None) for of_layer in config.per_layer_config]


def config_hash(config: Any) -> str:
    """16 hexadecimal digits of what makes a transformers config's architecture; those of models with the same layers,
    heads, sizes and RoPE are equal, whatever their weights."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    names = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    facts = {name: said(config, name) for name in names}
    query_heads = facts["num_attention_heads"]
    facts["num_key_value_heads"] = said(config, "num_key_value_heads") or query_heads
    facts["head_dim"] = said(config, "head_dim") or (facts["hidden_size"] or 0) // (query_heads or 1)
    rope = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    facts["rope_theta"] = _numbers(rope.pop("rope_theta", getattr(config, "rope_theta", None)))
    kinds = [dict(of) for of in rope.values() if isinstance(of, dict)] or [rope]  # of each kind of layer, or of all
    for kind in kinds:
        kind.setdefault("rope_type", kind.pop("type", "default"))  # as older ones call it
        kind.pop("type", None)
    if any(kind["rope_type"] != "default" for kind in kinds):
        facts["rope"] = _numbers(kinds)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _numbers(x: Any) -> Any:
    """With every number a float: a config.json has 100000 where another has 100000.0."""
    if isinstance(x, dict):
        return {name: _numbers(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_numbers(value) for value in x]
    return float(x) if isinstance(x, int) and not isinstance(x, bool) else x


def find(config: Any) -> Shares | None:
    """The packaged shares that were measured on a model of this architecture (`config_hash`), if there are any."""
    wanted = config_hash(config)
    return next((shares for shares in _packaged().values() if shares.metadata.get("config") == wanted), None)
