"""EvictingCache: transformers' Cache, with every full-attention layer cut back to its budget."""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from kvevict import validate
from kvevict.hf.attention import NAME, SET_UP
from kvevict.hf.layer import EvictingLayer, Eviction, new_tokens
from kvevict.hf.static import StaticEvictingLayer
from kvevict.policies import Budget, KeyDiff, Learned, Policy, Uniform

logger = logging.getLogger("kvevict")
OPTIONAL = ("lengths", "queries", "query_count", "hidden")  # what a layer holds beside keys and values, or None


@dataclass(frozen=True)
class LayerReport:
    """One layer of `EvictingCache.report`. Tokens are those of the longest request."""

    layer: int
    seen: int
    kept: int
    evicted: int
    bytes: int
    retained_mass: float | None  # share of attention mass that the last eviction kept, where the policy tracks it


class EvictingCache(Cache):
    """A drop-in cache for `generate` that keeps the tokens worth keeping.

        cache = EvictingCache(model.config, KeyDiff(), keep=0.5)
        model.generate(**inputs, past_key_values=cache)

    Two modes. `keep` cuts the prompt, the first forward, once, after its attention. `budget` holds every layer at that
    many tokens plus `interval` for ever: through a prompt in chunks (`prefill_chunk_size`), decoding, and later turns.

    Positions go on from the tokens seen. Layers that do not grow (sliding window, linear attention) are left alone.

    `evict(keep)` cuts it at any time. Policies that read hidden states (Learned) need the forwards to run inside
    `with cache.noting_hidden(model):`.

    Policies that read queries or attention, batches with padding, and budgets that differ by layer need the model's
    attention to be ours: `model.set_attn_implementation("kvevict")`; it computes what SDPA computes. Padding must be on
    the left. Without it padding cannot be seen, and is taken for tokens.

    Args:
        config: the model's.
        policy: what is worth keeping.
        keep: a share (float in (0, 1]) or number (int) of the prompt's tokens, or a Budget, which shares it out.
        budget: tokens per layer, or a Budget with an int keep.
        interval: with `budget`, how many tokens a layer may hold beyond it: eviction runs once in so many steps.
        pin: the first so many tokens, such as a system prompt, are always kept.
        on_evict: called with an `Eviction` after each eviction in each layer.
        static: buffers of budget + interval tokens per layer that are allocated once and never move, and decode steps
            of fixed shape, for torch.compile(fullgraph=True) and CUDA graphs. Needs `budget`, a policy that reads keys
            alone, and requests of equal length. Between compiled or replayed steps call `settle` at least once in
            `interval` steps; `generate` and plain forwards do it themselves.

    Raises:
        ValueError: not exactly one of keep and budget, or values out of range.
        ValueError, from the model's forward: the attention is not ours and has to be.
    """

    def __init__(
        self,
        config: Any,
        policy: Policy | None = None,
        *,
        keep: int | float | Budget | None = None,
        budget: int | Budget | None = None,
        interval: int = 64,
        pin: int = 0,
        on_evict: Callable[[Eviction], None] | None = None,
        static: bool = False,
    ) -> None:
        policy = KeyDiff() if policy is None else policy
        if not isinstance(policy, Policy):
            raise TypeError(f"policy is {policy!r}: expected a kvevict.policies.Policy")
        if (keep is None) == (budget is None):
            raise ValueError(f"keep is {keep} and budget is {budget}: expected exactly one of them")
        validate.integer("interval", interval, 0)
        validate.integer("pin", pin, 0)
        if pin > policy.protected[0]:
            policy = replace(policy, sink=pin)
        self._config = config.get_text_config(decoder=True)
        self._budget = self._as_budget(keep if budget is None else budget)
        if budget is not None and (not isinstance(self._budget.keep, int) or self._budget.keep <= pin):
            raise ValueError(f"budget is {self._budget.keep}: expected an int number of tokens, more than pin, {pin}")
        if (
            budget is not None
            and "hidden" in policy.needs
            and policy.heads == "each"
            and not isinstance(policy, Learned)
        ):
            raise ValueError("heads is 'each': expected 'shared', for one hidden state is held of a token that is kept")
        if static and (budget is None or policy.needs or interval < 1):
            raise ValueError(
                f"static is True with budget {budget}, interval {interval} and {type(policy).__name__}: expected a "
                "budget, an interval of at least 1, and a policy that reads keys alone"
            )
        self._static, self._unsettled, self._interval = static, 0, interval
        self.on_evict = on_evict
        self._warned = False
        self._retained: dict[int, Tensor] = {}

        layers = DynamicCache(config=config).layers
        full = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if not full:
            raise ValueError(f"config is of {self._config.model_type}, which has no full-attention layer to evict from")
        shares = self._per_layer(len(full))
        self._unequal = len(set(shares)) > 1
        for i, share in zip(full, shares, strict=True):
            target: dict[str, Any] = {"keep": share} if budget is None else {"budget": share}
            layers[i] = (StaticEvictingLayer if static else EvictingLayer)(
                i, policy, interval, attention_is_ours=self._attention_is_ours, on_evict=self._noted, **target
            )
        super().__init__(layers=layers)
        self._last_full = full[-1]

    @staticmethod
    def _as_budget(value: int | float | Budget | None) -> Budget:
        if isinstance(value, Budget):
            return value
        assert value is not None
        return Uniform(value)

    def _per_layer(self, layers: int) -> list[int | float]:
        if isinstance(self._budget, Uniform):
            return [self._budget.keep] * layers
        if isinstance(self._budget.keep, int):  # nothing says yet how many tokens there will be
            return list(self._budget.per_layer(layers, 2**62))
        whole = 1_000_000  # a share of every layer, to six digits
        return [n / whole for n in self._budget.per_layer(layers, whole)]

    def _attention_is_ours(self) -> bool:
        return self._config._attn_implementation == NAME

    def _noted(self, eviction: Eviction) -> None:
        if eviction.retained_mass is not None:
            self._retained[eviction.layer] = eviction.retained_mass
        if eviction.layer == self._last_full:
            logger.info("kept %d of %d tokens in layer %d", eviction.kept, eviction.before, eviction.layer)
        if self.on_evict is not None:
            self.on_evict(eviction)

    def _evicting(self) -> list[EvictingLayer]:
        return [layer for layer in self.layers if isinstance(layer, EvictingLayer)]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        if self._unequal and not self._attention_is_ours():
            raise ValueError(f"the layers' budgets differ, and one mask has to serve them all: call {SET_UP}")
        if key_states.shape[0] > 1 and not self._warned and not self._attention_is_ours():
            logger.warning("a batch of %d: padding is not seen unless you call %s", key_states.shape[0], SET_UP)
            self._warned = True
        before = self.layers[layer_idx - 1] if layer_idx > 0 else None
        # Its attention is done: its memory is free before this layer grows.
        if isinstance(before, StaticEvictingLayer):
            before.settle_overflow()
        elif isinstance(before, EvictingLayer):
            before.settle()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if self._static and not torch.compiler.is_compiling():
            # Each forward asks once (per kind of layer) before it writes: the last moment to make room.
            query_length = new_tokens(query_length)
            self._unsettled += query_length
            if self._unsettled > self._interval:
                self.settle()
                self._unsettled = query_length
        return super().get_mask_sizes(query_length, layer_idx)

    def settle(self) -> None:
        """Evict in every layer where it is due, as the next use of the cache would."""
        self._unsettled = 0
        for layer in self._evicting():
            layer.settle()

    def evict(self, keep: int | float | Budget) -> None:
        """Evict now, in every evicting layer: a document that was read in chunks, say, before it is asked about.

        Args:
            keep: share or number of the cached tokens, or a Budget that shares them out over the layers (with
                `model.set_attn_implementation("kvevict")`).

        Raises:
            ValueError: keep is out of range; the budgets of a static cache's layers differ; the cache is empty; what
                the policy reads was not noted, as of keep= after the prompt.
        """
        self.settle()
        layers = self._evicting()
        if not all(layer.is_initialized for layer in layers):
            raise ValueError("the cache is empty: expected a cache after a forward")
        budget = self._as_budget(keep)
        longest = max(layer.cached() for layer in layers)
        if isinstance(budget, Uniform):
            shares = [budget.keep] * len(layers)
        else:
            shares = list(budget.per_layer(len(layers), longest))
        if len(set(shares)) > 1:
            if self._static:
                raise ValueError(f"keep is {keep}: expected the same for all layers of a static cache")
            self._unequal = True
        for layer, share in zip(layers, shares, strict=True):
            layer.evict(share)

    @contextlib.contextmanager
    def noting_hidden(self, model: Any) -> Iterator[None]:
        """Inside the block the model's forwards tell this cache what enters each layer's attention, for policies that
        read hidden states. By forward hooks, which are gone after it."""
        layers = {layer.index: layer for layer in self._evicting() if "hidden" in layer.policy.needs}

        def note(module, arguments, options):
            if options.get("past_key_values") is self:
                layers[module.layer_idx].note_hidden(options.get("hidden_states", *arguments[:1]))

        attentions = [m for m in model.modules() if getattr(m, "layer_idx", None) in layers and hasattr(m, "k_proj")]
        hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in attentions]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def report(self) -> list[LayerReport]:
        """What each evicting layer has seen, kept and given up."""
        self.settle()
        reports = []
        for layer in self._evicting():
            kept = layer.cached() if layer.is_initialized else 0
            size = layer.keys.nbytes + layer.values.nbytes if layer.is_initialized else 0
            retained = self._retained.get(layer.index)
            reports.append(
                LayerReport(
                    layer.index,
                    int(layer.get_seq_length()),
                    kept,
                    layer.evicted,
                    size,
                    None if retained is None else float(retained),
                )  # fmt: skip
            )
        return reports

    def save_pretrained(self, folder: str | pathlib.Path) -> None:
        """Write the compressed cache to a folder (safetensors), to answer later questions from.

        Raises:
            ValueError: nothing is cached; a layer that does not evict holds tokens (its window is not saved).
        """
        from safetensors.torch import save_file

        self.settle()
        folder = pathlib.Path(folder)
        tensors, state = {}, {}
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, EvictingLayer) or isinstance(layer, StaticEvictingLayer):
                raise ValueError(f"layer {i} is {layer!r}: expected layers that evict and are not static")
            if not layer.is_initialized:
                raise ValueError("the cache is empty: expected a cache after a forward")
            tensors[f"{i}.keys"], tensors[f"{i}.values"] = layer.keys.contiguous(), layer.values.contiguous()
            for name in OPTIONAL:
                if getattr(layer, name) is not None:
                    tensors[f"{i}.{name}"] = getattr(layer, name).contiguous()
            if layer.tracker is not None:
                n = layer.keys.shape[2]
                for name in ("mass", "last_used", "positions"):
                    tensors[f"{i}.{name}"] = getattr(layer.tracker, name)[:, :, :n].contiguous()
                tensors[f"{i}.tokens_seen"] = layer.tracker.tokens_seen
                tensors[f"{i}.valid"] = layer.tracker.lengths
            step = 0 if layer.tracker is None else layer.tracker.step
            state[i] = dict(
                tokens_seen=layer.tokens_seen, evicted=layer.evicted, compressed=layer._compressed, step=step
            )
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(folder / "cache.safetensors"))
        (folder / "cache.json").write_text(json.dumps({"format": 1, "layers": state}) + "\n")

    @classmethod
    def from_pretrained(
        cls, folder: str | pathlib.Path, config: Any, policy: Policy | None = None, *, device: Any = "cpu", **options
    ) -> EvictingCache:
        """Read what `save_pretrained` wrote; the other arguments as for a new cache.

        Raises:
            FileNotFoundError: no such cache. ValueError: of a model with other layers.
        """
        from safetensors.torch import load_file

        from kvevict.policies import Tracker

        cache = cls(config, policy, **options)
        folder = pathlib.Path(folder)
        state = json.loads((folder / "cache.json").read_text())["layers"]
        tensors = load_file(str(folder / "cache.safetensors"), device=str(device))
        if len(state) != len(cache.layers) or not all(isinstance(layer, EvictingLayer) for layer in cache.layers):
            raise ValueError(f"{folder} has {len(state)} layers: expected {len(cache.layers)}, as the config has")
        for i, layer in enumerate(cache._evicting()):
            keys, values = tensors[f"{i}.keys"], tensors[f"{i}.values"]
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            for name in OPTIONAL:
                setattr(layer, name, tensors.get(f"{i}.{name}"))
            layer.tokens_seen, layer.evicted = state[str(i)]["tokens_seen"], state[str(i)]["evicted"]
            layer._compressed = state[str(i)]["compressed"]
            if f"{i}.mass" in tensors:
                B, H, n = tensors[f"{i}.mass"].shape
                tracker = Tracker(B, H, n, keys.device)
                tracker.append(n)
                tracker.lengths, tracker.tokens_seen = tensors[f"{i}.valid"], tensors[f"{i}.tokens_seen"]
                for name in ("mass", "last_used", "positions"):
                    getattr(tracker, name).copy_(tensors[f"{i}.{name}"])
                tracker.step = state[str(i)]["step"]
                layer.tracker = tracker
        return cache
