"""EvictingCache: transformers' Cache, with every full-attention layer cut back to its budget."""

from __future__ import annotations

import contextlib
import functools
import logging
import pathlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from kvevict import validate
from kvevict.hf import devices, hidden, masks, parallel, reconstruct, rotary, saved, shares
from kvevict.hf.attention import NAME, SET_UP, set_up
from kvevict.hf.choice import Choice, choose_together
from kvevict.hf.layer import EvictingLayer, Eviction, new_tokens
from kvevict.hf.static import StaticEvictingLayer
from kvevict.hf.weights import bound
from kvevict.policies import (
    FAR,
    NAMED,
    OF_MODEL,
    RECOMMENDED,
    RECOMMENDED_FOR_SHARES,
    Budget,
    Fixed,
    KeyDiff,
    KVzip,
    LearnedKV,
    ModelWide,
    Policy,
    Scorer,
    Uniform,
)
from kvevict.policies.base import ALL_QUERIES
from kvevict.policies.learned import parts_of, scorer_of_hidden
from kvevict.policies.shares import said

logger = logging.getLogger("kvevict")
POLICIES: dict[str, Policy] = {"recommended": RECOMMENDED} | NAMED | OF_MODEL | {"kvzip": KVzip(), "far": FAR}
LEARNED = "learned"  # the scorer that the package carries for the model


@dataclass(frozen=True)
class LayerReport:
    """One layer of `EvictingCache.report`. Tokens are those of a head, in the request that holds most."""

    layer: int
    seen: int
    kept: int  # in the mean, where heads hold unequal numbers
    fewest: int  # of the head that holds fewest, and of the one that holds most, of any request
    most: int
    evicted: int
    bytes: int  # of all requests' keys and values
    retained_mass: float | None  # share of attention mass that the last eviction kept, where the policy tracks it


class EvictingCache(Cache):
    """A drop-in cache for `generate` that keeps the tokens worth keeping.

        cache = EvictingCache(model, KeyDiff(), keep=0.5)
        model.generate(**inputs, past_key_values=cache)

    Two modes. `keep` cuts the prompt, the first forward, once, after its attention. `budget` holds every layer at that
    many tokens plus `interval` for ever: through a prompt in chunks (`prefill_chunk_size`), decoding, and later turns.

    Positions go on from the tokens seen. Layers that do not grow (sliding window, linear attention) are left alone.

    `evict(keep)` cuts it at any time. For policies that read hidden states (Learned) the model tells the cache what
    passes; given a config alone, the forwards are to run inside `with cache.noting_hidden(model):`.

    Policies that read queries or attention, batches with padding, and budgets that differ by layer need the model's
    attention to be ours, which computes what SDPA computes: given the model, the cache calls
    `model.set_attn_implementation("kvevict")`. Padding must be on the left. Where a model's attention cannot be ours,
    this is said once, and what needs it is refused; padding too.

    Heads may keep unequal numbers of tokens: by shares measured for the model, `Fixed("smollm2-135m", 0.25)`, or by
    their scores, with `LayerWide` or `ModelWide` and a policy whose scores compare over heads. What they keep then lies
    in pages, a block table for each head, which hold no more than the tokens and what is empty in each head's last
    block. `ModelWide` cuts when the last layer is done, so that the whole prompt is held until then; the others cut
    layer by layer.

    Given a config alone, nothing is set and no padding is seen until that call is made: then one request is taken to
    have none, and a batch is refused.

    Models with latent attention (MLA) cache latents from transformers 5.17 on. Policies that read keys alone score the
    latent that keys and values are computed from, one vector per token for all heads, without the rotary part.

    Args:
        model: the model, or its config.
        policy: what is worth keeping, or its name: "recommended", "keydiff", ...: a key of `kvevict.hf.cache.POLICIES`;
            or "learned", the scorer that the package carries for the model.
        keep: a share (float in (0, 1]) or number (int) of the prompt's tokens, or a Budget, which shares it out over
            layers and heads.
        budget: tokens per layer, or a Budget with an int keep.
        interval: with `budget`, how many tokens a layer may hold beyond it: eviction runs once in so many steps.
        pin: the first so many tokens, such as a system prompt, are always kept; but for a layer whose share is smaller
            (Pyramid, Fixed with per="layer").
        on_evict: called with an `Eviction` after each eviction in each layer.
        group: under tensor parallelism, the process group (or DeviceMesh of one dimension) whose ranks hold the model's
            KV heads, in the order of ranks; only policies whose heads share their tokens ask for it. None: that of the
            model, where transformers has spread it (`distributed_config=`).
        static: buffers of budget + interval tokens per layer that are allocated once and never move, and decode steps
            of fixed shape, for torch.compile(fullgraph=True) and CUDA graphs. Needs `budget`, a policy that reads keys
            alone, and requests of equal length. Between compiled or replayed steps call `settle` at least once in
            `interval` steps; `generate` and plain forwards do it themselves.

    Raises:
        ValueError: not exactly one of keep and budget, or values out of range; a model whose layers cannot be evicted
            from (ALiBi, layers of other kinds); shares of another model; unequal heads where they are not served.
        ValueError, from the model's forward: the attention is not ours and has to be; a mask that hides more than
            padding on the left.
    """

    def __init__(
        self,
        model: Any,
        policy: Policy | str | None = None,
        *,
        keep: int | float | Budget | None = None,
        budget: int | Budget | None = None,
        interval: int = 64,
        pin: int = 0,
        on_evict: Callable[[Eviction], None] | None = None,
        group: Any = None,
        static: bool = False,
    ) -> None:
        whole_config = getattr(model, "config", model)
        if not hasattr(whole_config, "get_text_config"):
            raise TypeError(f"model is a {type(model).__name__}: expected a transformers model or its config")
        self._config = whole_config.get_text_config(decoder=True)
        if isinstance(policy, str):
            validate.one_of("policy", policy, (*POLICIES, LEARNED))
            policy = LearnedKV.of_model(self._config) if policy == LEARNED else POLICIES[policy]
            given = budget if keep is None else keep
            if policy is RECOMMENDED and isinstance(given, Budget) and given.spread == "heads":
                policy = RECOMMENDED_FOR_SHARES
        policy = KeyDiff() if policy is None else policy
        if not isinstance(policy, Policy):
            raise TypeError(f"policy is {policy!r}: expected a kvevict.policies.Policy or its name")
        policy = bound(policy, model)
        if (keep is None) == (budget is None):
            raise ValueError(f"keep is {keep} and budget is {budget}: expected exactly one of them")
        validate.integer("interval", interval, 0)
        validate.integer("pin", pin, 0)
        if pin > policy.protected[0]:
            policy = replace(policy, sink=pin)
        if budget is not None and not isinstance(budget, Budget):
            validate.integer("budget", budget, 1)
        share = _as_budget(keep if budget is None else budget, policy)
        if budget is not None and policy.window >= ALL_QUERIES:
            raise ValueError(
                f"budget is {budget}, with {type(policy).__name__}, which reads all queries of a prompt: expected "
                "keep=, because they would be held for ever"
            )
        if budget is not None and "repeated" in policy.needs:
            raise ValueError(
                f"budget is {budget}, with {type(policy).__name__}, which reads the text again for each eviction: "
                "expected keep="
            )
        if budget is not None and (not isinstance(share.keep, int) or share.keep <= pin):
            raise ValueError(f"budget is {share.keep}: expected an int number of tokens, more than pin, {pin}")
        if static and (budget is None or policy.needs or policy.reads_positions or interval < 1):
            raise ValueError(
                f"static is True with budget {budget}, interval {interval} and {type(policy).__name__}: expected a "
                "budget, an interval of at least 1, and a policy that reads keys alone, without their positions"
            )
        self._static, self._unsettled, self._interval = static, 0, interval
        self.on_evict = on_evict
        self._retained: dict[int, Tensor] = {}
        self._held: list[Eviction] | None = None  # while `evict` is at work: what is to be told when it is done
        self._after_cut: int | None = 0  # tokens of the forwards right after a prompt was cut, None once it is over

        layers = DynamicCache(config=whole_config).layers
        full = _full_layers(self._config, layers)
        self._model = weakref.ref(model) if hasattr(model, "modules") else None
        self._budget, self._policy = share, shares.policy_for(share, policy)
        heads = (_of_full(self._config, name, full) for name in ("num_key_value_heads", "num_attention_heads"))
        self._heads = next(filter(None, heads), 1)
        of_heads = shares.unequal_heads(share, self._policy)
        self._guarded = False
        self._group, self._of_heads = parallel.group_of(model, group), of_heads
        if of_heads:
            shares.check_served(self._config, self._policy, for_ever=budget is not None, static=static)
        shares.check_model(share, self._config)
        self._check_fitted(policy, len(layers), full)
        protected = sum(self._policy.protected)
        parts = shares.beforehand(share, len(full), self._heads, protected)
        self._unequal = of_heads or len(set(parts)) > 1
        make = StaticEvictingLayer if static else EvictingLayer
        for n, i in enumerate(full):
            target: dict[str, Any] = {"budget": parts[n]}
            if budget is None:
                of_layer = functools.partial(shares.of_layer, share, n, len(full), self._heads, protected)
                target = {"keep": of_layer}
            layers[i] = make(
                i, self._policy, interval, attention_is_ours=self._attention_is_ours, on_evict=self._noted,
                of_heads=of_heads, together=self._evict_together if share.spread == "model-wide" else None, **target
            )  # fmt: skip
        super().__init__(layers=layers)
        self._full = full
        self._last_updated = len(layers)  # the layer that took tokens last
        self._first_full: int | None = None  # the first that evicts of those that this forward has come to
        if self._model is not None and "hidden" in policy.needs:
            hidden.tell_caches(model, full)
        if hasattr(model, "set_attn_implementation"):
            self._guarded = not set_up(model)
            if self._guarded and of_heads:
                raise ValueError(
                    f'heads that keep unequal numbers need "{NAME}" attention, which {type(model).__name__} cannot '
                    "use: expected a budget over layers"
                )

    def _check_fitted(self, policy: Policy, layers: int, full: list[int]) -> None:
        """Raises:
        ValueError: a scorer was fitted to another model, or the policy reads hidden states by several of them.
        """
        scorer_of_hidden(policy)
        head_dim = _of_full(self._config, "head_dim", full)
        head_dim = head_dim or self._config.hidden_size // self._config.num_attention_heads
        model = None if self._model is None else self._model()
        for part in parts_of(policy):
            if isinstance(part, Scorer):
                part.check(self._config, layers, self._heads, head_dim)
                if isinstance(part, LearnedKV) and model is not None:
                    part.check_angles(rotary.inv_freq(model))

    def _attention_is_ours(self) -> bool:
        return self._config._attn_implementation == NAME

    def _noted(self, eviction: Eviction) -> None:
        if self._held is not None:
            self._held.append(eviction)
            return
        if eviction.retained_mass is not None:
            self._retained[eviction.layer] = eviction.retained_mass
        if eviction.layer == self._full[-1]:
            logger.info("kvevict: kept %d of %d tokens in layer %d", eviction.kept, eviction.before, eviction.layer)
        if self.on_evict is not None:
            self.on_evict(eviction)

    def _evicting(self) -> list[EvictingLayer]:
        return [layer for layer in self.layers if isinstance(layer, EvictingLayer)]

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """(keys, values, sliding window) of each layer, as a DynamicCache gives them.

        Raises:
            ValueError: heads hold unequal numbers of tokens; `layers[i].whole()` gives padded copies and lengths.
        """
        for layer in self.layers:
            if isinstance(layer, EvictingLayer) and layer.pages is not None:
                raise ValueError(
                    f"the heads of layer {layer.index} hold unequal numbers of tokens, which no tensor of keys shows: "
                    "layers[i].whole() gives padded copies and the heads' lengths"
                )
            keys: Tensor | None = getattr(layer, "keys", None)
            values: Tensor | None = getattr(layer, "values", None)
            if isinstance(layer, EvictingLayer) and keys is not None and values is not None:
                keys, values = keys[:, :, : layer.cached()], values[:, :, : layer.cached()]
            yield keys, values, getattr(layer, "_sliding_window_tensor", None)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        if layer_idx >= len(self.layers):
            raise ValueError(f"layer_idx is {layer_idx}: expected less than {len(self.layers)}, the config's layers")
        begins = layer_idx <= self._last_updated  # a rank may run other layers than the first
        self._last_updated = layer_idx
        self._first_full = None if begins else self._first_full
        if self._first_full is None and not self._attention_is_ours():  # layers before it do not evict, but they grow
            self._refuse_what_is_not_seen(key_states.shape[0])
        if begins and not self._static:  # whose numbers stay on the device
            self._refuse_unlike_layers()
            self._refuse_layers_that_stay_empty()
        first = self._first_full is None and layer_idx in self._full
        if begins or first:
            self._refuse_after_refusal()
        if first:
            self._first_full = layer_idx
            self._look_for_other_heads(key_states.shape[1], self._policy, self._of_heads)
            masks.forget()
            self._watch_for_chunks(key_states.shape[2])
        before = self.layers[layer_idx - 1] if layer_idx > 0 else None
        # Its attention is done: its memory is free before this layer grows.
        if isinstance(before, StaticEvictingLayer):
            before.settle_overflow()
        elif isinstance(before, EvictingLayer) and not before.record_past:
            before.settle()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _refuse_layers_that_stay_empty(self) -> None:
        """A choice over all layers would wait for those that another rank runs."""
        if self._budget.spread == "model-wide":
            held = [layer.index for layer in self._evicting() if layer.tokens_seen]
            if held and len(held) < len(self._full):
                raise ValueError(
                    f"budget is {self._budget!r}, a choice over all layers, and only the layers {held} have run here: "
                    "expected a budget that takes each layer by itself"
                )

    def _refuse_what_is_not_seen(self, batch: int) -> None:
        """Before anything is cached: what the policy, the budget or the batch asks of an attention that is not ours."""
        remedy = "which this model cannot use" if self._guarded else f"call {SET_UP}"
        needs = sorted(self._policy.needs - {"hidden"})
        if needs and any(layer.watching for layer in self._evicting()):
            raise ValueError(
                f'{type(self._policy).__name__} needs {", ".join(needs)} from "{NAME}" attention: {remedy}'
            )
        if self._unequal:
            raise ValueError(
                f'budgets that differ by layer or head need "{NAME}" attention, as one mask fits one: {remedy}'
            )
        if batch > 1 and not self._guarded:
            raise ValueError(
                f'a batch of {batch} requests needs "{NAME}" attention, without which padding is taken for tokens: '
                f"{remedy}, or make the cache with the model, not its config"
            )

    def _look_for_other_heads(self, seen: int, policy: Policy, of_heads: bool) -> None:
        """Before anything changes: whether heads that choose together are all here, or on the ranks of a group."""
        if getattr(self._config, "kv_lora_rank", None):
            return  # one latent for all heads, on every rank
        if seen < self._heads and any(isinstance(x, Scorer) and x.fitted_heads > 1 for x in parts_of(policy)):
            raise ValueError(
                f"policy is a learned scorer, with weights of each of the model's {self._heads} KV heads, and this "
                f"rank sees {seen}: expected another policy under tensor parallelism"
            )
        if parallel.check(policy, seen, self._heads, self._group, of_heads=of_heads, static=self._static):
            for layer in self._evicting():
                layer.group = self._group

    def _refuse_after_refusal(self) -> None:
        """Layers of any kind before one that refused a forward have taken its tokens."""
        refused = next((layer.index for layer in self._evicting() if layer.refused and layer.index > 0), None)
        if refused is not None:
            raise ValueError(
                f"a forward was refused in layer {refused}, after those before it had taken its tokens: call reset() "
                "and begin anew"
            )

    def _refuse_unlike_layers(self) -> None:
        """Layers with a window grow before the first one that evicts sees a mask, and may refuse it."""
        seen = self._evicting()[0].tokens_seen
        for layer in self.layers[: self._full[0]]:
            grown = getattr(layer, "cumulative_length", seen)
            if grown != seen:
                raise ValueError(
                    f"a forward was refused after layers with a window had taken its tokens, {grown} where the others "
                    f"have {seen}: call reset() and begin anew"
                )

    def _watch_for_chunks(self, new: int) -> None:
        layer = self._evicting()[0]
        if self._after_cut is None or layer.keep is None or not layer.evicted:
            return
        self._after_cut = None if new == 1 or layer.record_past else self._after_cut + new
        if self._after_cut is not None and 2 * self._after_cut > layer.kept() + new:
            logger.warning(
                "kvevict: keep= cut the first forward, of %d tokens, and keeps all of the %d tokens that came in the "
                "forwards after it; for a prompt in chunks use budget=, or evict() once it is read",
                layer.tokens_seen + new - self._after_cut, self._after_cut,
            )  # fmt: skip
            self._after_cut = None

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

    def evict(self, keep: int | float | Budget, policy: Policy | None = None) -> None:
        """Evict now, in every evicting layer: a document that was read in chunks, say, before it is asked about. Layers
        that hold no token are those of other ranks, under pipeline parallelism, and are left alone.
        In all layers or, where an error is raised before, in none; then `on_evict` is called for each.

        Args:
            keep: share or number of the cached tokens, or a Budget that shares them out over the layers (with
                `model.set_attn_implementation("kvevict")`).
            policy: what to choose by, of what the cache has noted for its own; None: its own.

        Raises:
            ValueError: keep is out of range; the budgets of a static cache's layers differ; the cache is empty; what
                the policy reads was not noted, as of keep= after the prompt.
        """
        self.settle()
        layers = [layer for layer in self._evicting() if int(layer.get_seq_length()) > 0]
        if not layers:
            raise ValueError("the cache is empty: expected a cache after a forward")
        given = self._policy if policy is None else policy
        if policy is not None:
            self._check_fitted(policy, len(self.layers), self._full)
        budget = _as_budget(keep, given)
        policy = shares.policy_for(budget, given)
        of_heads = shares.unequal_heads(budget, policy)
        self._look_for_other_heads(layers[0].keys.shape[1], policy, of_heads)
        if len(layers) < len(self._evicting()) and not isinstance(budget, Uniform):
            raise ValueError(
                f"keep is {keep}, and some layers hold no token, those of other ranks (pipeline parallelism): expected "
                "the same share or number for every layer"
            )
        if of_heads:
            for each in (policy, self._policy):  # what its own reads is noted on
                shares.check_served(self._config, each, for_ever=layers[0].keep is None, static=self._static)
        shares.check_model(budget, self._config)
        told = shares.told(budget, layers, self._heads, policy)
        unequal = of_heads or (told is not None and any(share != told[0] for share in told))
        if unequal and self._static:
            raise ValueError(f"keep is {keep}: expected the same for all layers of a static cache")
        if unequal and not self._attention_is_ours():
            raise ValueError(
                f'keep is {keep}, and budgets that differ by layer or head need "{NAME}" attention: call {SET_UP}'
            )
        if told is None:
            choices = choose_together(layers, policy, budget.keep)
        else:
            other = None if policy is self._policy else policy
            choices = [layer.choose(share, other) for layer, share in zip(layers, told, strict=True)]
        self._unequal |= unequal
        self._apply(layers, choices)
        if given is not self._policy:
            for layer in layers:
                layer.tail = layer.tail if not layer.evicted else _at_most(layer.tail, policy.protected[1])

    def reconstruct(
        self, model: Any, input_ids: Tensor, *, prompt_ids: Tensor | None = None, chunk: int = 2048
    ) -> None:
        """Let the model repeat its text, and note how much attention each cached token draws, for `KVzip`
        (arXiv 2505.23416). What is read for that does not stay in the cache. With keep=, the cache is then cut.

        Args:
            model: the model that has read the text with this cache; its attention is "kvevict" meanwhile.
            input_ids: [B, S] int64: the text that the cache holds, all of it.
            prompt_ids: [P] int64, what asks for the repetition: the tokens of `kvevict.hf.reconstruct.PROMPT`, in the
                words that the model knows. None: the text follows on itself.
            chunk: the text is repeated in pieces of so many tokens, each with some before it, and after the prompt.

        Raises:
            TypeError, ValueError: the policy reads no repetition; the cache does not hold these tokens, or no more; as
                `kvevict.hf.reconstruct.repeat_scores`. The cache is as it was.
        """
        reconstruct.note(self._evicting(), self, self._policy, model, input_ids, prompt_ids, chunk)
        self.settle()

    def _evict_together(self) -> None:
        """A choice over all layers is made when the last of them has done its attention."""
        layers = self._evicting()
        if any(layer.at_work or layer.tokens_seen != layers[0].tokens_seen for layer in layers):
            return
        if layers[0].keep is None:
            due = sum(layer.excess() for layer in layers) > 0
        else:
            due = not layers[0].compressed
        if due and not any(layer.waits_for("queries", "repetition") for layer in layers):
            self._apply(layers, choose_together(layers, self._policy, self._budget.keep))

    def _apply(self, layers: list[EvictingLayer], choices: list[Choice]) -> None:
        """One layer after the other, each of which frees what it gives up; then `on_evict` is called for all."""
        self._held = []
        try:
            for layer, choice in zip(layers, choices, strict=True):
                layer.apply(choice)
        finally:
            held, self._held = self._held, None
        for eviction in held:
            self._noted(eviction)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, as in `EvictingLayer.crop`: in all layers, or in none where one refuses."""
        layers = self._evicting()
        recording = any(layer.record_past for layer in layers)
        if not recording and not self._static:
            self.settle()  # so that all layers evict the same tokens, whether or not they did before this call
        for layer in layers:
            layer.cropped(tokens_to_remove)
        others: list[Any] = [layer for layer in self.layers if not isinstance(layer, EvictingLayer)]
        for any_layer in (*others, *layers):  # others may refuse too
            any_layer.crop(tokens_to_remove)
        if recording and not self._static:
            self.settle()

    def reset(self) -> None:
        super().reset()
        self._retained, self._unsettled, self._after_cut = {}, 0, 0

    @contextlib.contextmanager
    def noting_hidden(self, model: Any) -> Iterator[None]:
        """Inside the block the model's forwards tell this cache what enters each layer's attention, for policies that
        read hidden states. By forward hooks, which are gone after it.

        Raises:
            ValueError: the model's attention modules are not found by their names.
        """
        reads = "hidden" in self._policy.needs
        with hidden.noting(model, self._full if reads else (), self._hear):
            yield

    def _hear(self, layer: int, entering: Tensor, cache: Any) -> None:
        if cache is self:
            self.note_hidden(layer, entering)

    def note_hidden(self, layer: int, entering: Tensor) -> None:
        """Told by the model: the hidden states [B, T, M] that enter this layer's attention next."""
        of_layer = self.layers[layer]
        if isinstance(of_layer, EvictingLayer) and of_layer.notes.scorer is not None:
            of_layer.note_hidden(entering)

    def report(self) -> list[LayerReport]:
        """What each evicting layer has seen, kept and given up."""
        self.settle()
        reports = []
        for layer in self._evicting():
            retained = self._retained.get(layer.index)
            held = layer.tokens_of_heads() if layer.is_initialized else torch.zeros(1, 1, dtype=torch.int64)
            reports.append(
                LayerReport(
                    layer.index,
                    int(layer.get_seq_length()),
                    int(held.double().mean(1).max() + 0.5),
                    int(held.min()),
                    int(held.max()),
                    layer.evicted,
                    layer.nbytes,
                    None if retained is None else float(retained),
                )
            )
        return reports

    def save_pretrained(self, folder: str | pathlib.Path) -> None:
        """Write the compressed cache to a folder (safetensors), to answer later questions from. A file that is there
        is replaced at once, when the new one is whole.

        Raises:
            ValueError: nothing is cached; a layer that does not evict holds tokens (its window is not saved).
        """
        self.settle()
        saved.save(self._saveable(), self._config, pathlib.Path(folder))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | pathlib.Path,
        model: Any,
        policy: Policy | str | None = None,
        *,
        device: Any = None,
        device_map: Any = None,
        **options,
    ) -> EvictingCache:
        """Read what `save_pretrained` wrote; the other arguments as for a new cache.

        Args:
            device: of all layers. None: each layer lies where the model computes it, as `model.hf_device_map` or, where
                there is none, its weights say; given a config, on the CPU.
            device_map: {module's name: device}, as `model.hf_device_map` is, instead of what the model says.

        Raises:
            FileNotFoundError: no such cache.
            TypeError, ValueError: not a whole and consistent one; of another model; without what the policy reads; no
                such device, or none for a layer.
        """
        cache = cls(model, policy, **options)
        layers = cache._saveable()
        where = devices.of_layers(model, [layer.index for layer in layers], device, device_map)
        saved.load(layers, cache._config, pathlib.Path(folder), where)
        cache._unequal |= len({layer.cached() for layer in layers if layer.is_initialized}) > 1
        cache._unequal |= any(layer.pages is not None for layer in layers)
        return cache

    def _saveable(self) -> list[EvictingLayer]:
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, EvictingLayer) or isinstance(layer, StaticEvictingLayer):
                raise ValueError(f"layer {i} is {layer!r}: expected layers that evict and are not static")
        return self._evicting()


def _as_budget(value: int | float | Budget | None, policy: Policy) -> Budget:
    if isinstance(value, Budget):
        return value
    assert value is not None
    everything = isinstance(value, float) and value == 1.0  # of which there is nothing to share out
    measured = policy.shares if isinstance(policy, Scorer) else None
    if policy.heads == "shared" and measured is not None and not everything:
        return Fixed(measured, value, per="layer")
    return ModelWide(value) if policy.spread == "model-wide" and not everything else Uniform(value)


def _full_layers(config: Any, layers: list[Any]) -> list[int]:
    """The layers that grow without end, all of which must be of the kind that can be evicted from."""
    if config.model_type == "bloom" or getattr(config, "alibi", False) or _mpt_alibi(config):
        raise ValueError(
            f"config is of {config.model_type}, whose attention is biased by distance (ALiBi): expected positions in "
            "the keys (RoPE) or in the embeddings, because distances are not those of a cache that has evicted"
        )
    full = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
    others = {type(x).__name__ for x in layers if isinstance(x, DynamicLayer) and not x.is_sliding} - {"DynamicLayer"}
    if others or not full:
        what = f"layers of the kind {', '.join(sorted(others))}" if others else "no layer that grows with the text"
        raise ValueError(
            f"config is of {config.model_type}, which has {what}: expected DynamicLayer, as models with full attention "
            "have, which alone can be evicted from"
        )
    return full


def _of_full(config: Any, name: str, full: list[int]) -> Any:
    """What a config says of the layers that grow without end, where transformers has a value for each layer too."""
    value = said(config, name)
    if not isinstance(value, list):
        return value
    values = {value[i] for i in full}
    if len(values) > 1:
        raise ValueError(f"config has {name} {value}: expected one value for all layers that grow, {full}")
    return values.pop()


def _mpt_alibi(config: Any) -> bool:
    return bool(getattr(getattr(config, "attn_config", None), "alibi", False))


def _at_most(tail: int | Tensor, most: int) -> int | Tensor:
    return tail.clamp(max=most) if isinstance(tail, Tensor) else min(tail, most)
