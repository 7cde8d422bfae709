"""A layer of an EvictingCache with `static=True`: buffers that are allocated once and never move.

A decode step writes one slot, whose number is on the device, and attends over the whole buffer under a mask: the same
shapes and addresses every time, and nothing is read back to the host, so it can be compiled whole and captured in a
CUDA graph. Eviction compacts in place, outside of such a step, in the cache's `settle`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvevict import ops
from kvevict.hf import masks
from kvevict.hf.attention import sdpa
from kvevict.hf.choice import Choice
from kvevict.hf.layer import EvictingLayer, Eviction, new_tokens
from kvevict.hf.shares import Keep
from kvevict.policies import Policy
from kvevict.policies.observed import Observed


class StaticEvictingLayer(EvictingLayer):
    is_compileable = True
    is_croppable = False  # `crop` does not bring back what was evicted

    def _clear(self) -> None:
        super()._clear()
        self._overflow: tuple[Tensor, Tensor] | None = None  # a prompt that is longer than the buffer, until settle
        self._firm = 0  # slots in front that `crop` cannot give up: tokens around them have been evicted

    @property
    def capacity(self) -> int:
        assert isinstance(self.budget, int)
        return self.budget + self.interval

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        B, H, _, D = key_states.shape
        with torch.inference_mode(False):  # what is made in inference mode cannot be written outside of it
            self.keys = torch.zeros((B, H, self.capacity, D), dtype=self.dtype, device=self.device)
            value_shape = (B, H, self.capacity, value_states.shape[3])
            self.values = torch.zeros(value_shape, dtype=value_states.dtype, device=self.device)
            self.length = torch.zeros((), dtype=torch.int64, device=self.device)  # filled slots
            self.seen = torch.zeros((), dtype=torch.int64, device=self.device)
        if not torch.compiler.is_compiling():
            for tensor in (self.keys, self.values, self.length, self.seen):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """A prompt attends over itself and what is kept, and gradients flow through it; a decode step over the buffers,
        which hold no gradient.

        Raises:
            ValueError: keys of another shape than the buffers were made for.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        B, H, new, D = key_states.shape
        if (B, H, D) != (self.keys.shape[0], self.keys.shape[1], self.keys.shape[3]):
            raise ValueError(
                f"keys have shape {tuple(key_states.shape)}: expected {tuple(self.keys.shape)} but for the tokens, as "
                "the static buffers were made; they never move, so another batch needs a new cache"
            )
        self.settle_overflow()
        if new > 1:
            return self._update_prompt(key_states, value_states, new)
        slot = self.length[None]
        self.keys.index_copy_(2, slot, key_states.detach())
        self.values.index_copy_(2, slot, value_states.detach())
        self.length.add_(1)
        self.seen.add_(1)
        return self.keys, self.values

    def _update_prompt(self, key_states: Tensor, value_states: Tensor, new: int) -> tuple[Tensor, Tensor]:
        """A prompt or a chunk: not compiled, so its length may be looked at."""
        filled = int(self.length)
        keys, values = key_states, value_states
        if filled:
            keys = torch.cat([self.keys[:, :, :filled], key_states], dim=2)
            values = torch.cat([self.values[:, :, :filled], value_states], dim=2)
        if filled + new <= self.capacity:
            self.keys[:, :, filled : filled + new] = key_states.detach()
            self.values[:, :, filled : filled + new] = value_states.detach()
        else:
            self._overflow = keys.detach(), values.detach()
        self.length.add_(new)
        self.seen.add_(new)
        self._returned(keys)
        return keys, values

    def attend(self, module, query, key, value, attention_mask, scaling=None, **options) -> tuple[Tensor, None]:
        """SDPA over a prompt or a chunk of one, whose mask shows whether there is padding.

        Raises:
            ValueError: there is, or cached tokens are hidden; the layer is then as it was before.
        """
        new = query.shape[2]
        self._unread = False
        try:
            shown = masks.read(attention_mask, new)
            if shown.is_token is not None:
                raise ValueError(
                    "the prompts have padding: expected requests of equal length in a cache with static=True"
                )
            if not shown.past_whole:
                raise ValueError(
                    "attention_mask hides cached tokens: expected that of a causal model, because what is cached is no "
                    "longer where the mask expects it"
                )
        except ValueError:
            self.length.sub_(new)
            self.seen.sub_(new)
            self._overflow = None
            raise
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **options)

    def get_seq_length(self) -> Tensor | int:  # type: ignore[override]
        return self.seen if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """One query: the whole buffer, whose empty slots stand behind the query and so are never seen. How many tokens
        are gone stays on the device then: a recorded step must not hold the number that it was recorded with."""
        query_length = new_tokens(query_length)
        slots = self.capacity if query_length == 1 else query_length
        if not self.is_initialized:
            return slots, 0
        if query_length == 1:
            return slots, self.seen - self.length  # type: ignore[return-value]
        return int(self.length) + slots, self.evicted

    def get_max_length(self) -> int:
        return -1  # tokens without end pass through

    def settle(self) -> None:
        """Evict down to the budget if another `interval` of tokens would not fit."""
        if not self.is_initialized:
            return
        if self._unread and self._attention_is_ours():
            self._was_not_asked()
        self._unread = False
        assert isinstance(self.budget, int)
        if int(self.length) > self.budget:
            self.evict(self.budget)

    def settle_overflow(self) -> None:
        """Evict if a prompt was longer than the buffer; else the layers go on with as many tokens as they have, so that
        one mask serves them all."""
        if self._overflow is not None:
            self.settle()

    def _filled(self) -> tuple[Tensor, Tensor]:
        filled = int(self.length)
        return self._overflow or (self.keys[:, :, :filled], self.values[:, :, :filled])

    def choose(self, keep: Keep, policy: Policy | None = None) -> Choice:
        assert isinstance(keep, (int, float)) and policy is None  # requests are of equal length, and so are heads
        keys, values = self._filled()
        if isinstance(keep, int):
            keep = min(keep, keys.shape[2])
        return Choice(self.policy.select(Observed(keys=keys, values=values, layer=self.index), keep), None)

    def apply(self, choice: Choice) -> None:
        keys, values = self._filled()
        result = ops.compact(keys, values, choice.indices, inplace=self._overflow is None)
        filled, kept = keys.shape[2], result.keys.shape[2]
        if self._overflow is not None:
            self.keys[:, :, :kept] = result.keys
            self.values[:, :, :kept] = result.values
            self._overflow = None
        self.length.fill_(kept)
        sink, recent = self.policy.protected
        self._firm = kept - min(recent, max(kept - sink, 0)) if kept < filled else self._firm
        self.evicted += filled - kept
        self._on_evict(Eviction(self.index, filled, kept, result.indices, None))

    def cached(self) -> int:
        return int(self.length)

    def reset(self) -> None:
        """Forget all tokens. The buffers stay, for the graphs that were recorded over them."""
        if self.is_initialized:
            self.length.zero_()
            self.seen.zero_()
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """As `EvictingLayer.crop`; not for what a graph is recorded of, as it looks at the length."""
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        self.settle_overflow()
        count = self.cropped(tokens_to_remove)
        if count > 0:
            self.length.sub_(count)
            self.seen.sub_(count)

    def croppable(self) -> int:
        return int(self.length) - self._firm

    def _select_requests(self, requests: Tensor) -> None:
        if not self.is_initialized:
            return
        if requests.shape != self.keys.shape[:1]:
            raise ValueError(
                f"{len(requests)} requests are to be selected: expected {self.keys.shape[0]}, because the buffers of a "
                "cache with static=True never change; use static=False"
            )
        self.settle_overflow()
        requests = requests.to(self.keys.device)
        self.keys.copy_(self.keys.index_select(0, requests))
        self.values.copy_(self.values.index_select(0, requests))
