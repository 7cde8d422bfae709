"""A layer of an EvictingCache with `static=True`: buffers that are allocated once and never move.

A decode step writes one slot, whose number is on the device, and attends over the whole buffer under a mask: the same
shapes and addresses every time, so it can be compiled whole and captured in a CUDA graph. Eviction compacts in place,
outside of such a step, in the cache's `settle`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvevict.hf.layer import EvictingLayer, Eviction, new_tokens


class StaticEvictingLayer(EvictingLayer):
    is_compileable = True

    def _clear(self) -> None:
        super()._clear()
        self._overflow: tuple[Tensor, Tensor] | None = None  # a prompt that is longer than the buffer, until settle

    @property
    def capacity(self) -> int:
        assert self.budget is not None
        return self.budget + self.interval

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        B, H, _, D = key_states.shape
        self.keys = key_states.new_zeros((B, H, self.capacity, D))
        self.values = value_states.new_zeros((B, H, self.capacity, value_states.shape[3]))
        self.length = torch.zeros((), dtype=torch.int64, device=self.device)  # filled slots
        self.seen = torch.zeros((), dtype=torch.int64, device=self.device)
        if not torch.compiler.is_compiling():
            for tensor in (self.keys, self.values, self.length, self.seen):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        if new > 1:
            return self._update_prompt(key_states, value_states, new)
        slot = self.length[None]
        self.keys.index_copy_(2, slot, key_states)
        self.values.index_copy_(2, slot, value_states)
        self.length.add_(1)
        self.seen.add_(1)
        return self.keys, self.values

    def _update_prompt(self, key_states: Tensor, value_states: Tensor, new: int) -> tuple[Tensor, Tensor]:
        """A prompt or a chunk: not compiled, so its length may be looked at. It attends over itself and what is kept,
        without the buffer's empty slots."""
        filled = int(self.length)
        self.seen.add_(new)
        self.length.add_(new)
        if filled + new <= self.capacity:
            self.keys[:, :, filled : filled + new] = key_states
            self.values[:, :, filled : filled + new] = value_states
            return self.keys[:, :, : filled + new], self.values[:, :, : filled + new]
        keys = torch.cat([self.keys[:, :, :filled], key_states], dim=2)
        values = torch.cat([self.values[:, :, :filled], value_states], dim=2)
        self._overflow = keys.detach(), values.detach()
        return keys, values

    def get_seq_length(self) -> Tensor | int:  # type: ignore[override]
        return self.seen if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """One query: the whole buffer, whose empty slots stand behind the query and so are never seen."""
        query_length = new_tokens(query_length)
        if not self.is_initialized:
            return query_length, 0
        slots = self.capacity if query_length == 1 else int(self.length) + query_length
        evicted = self.seen - self.length
        return slots, evicted if torch.compiler.is_compiling() else int(evicted)  # type: ignore[return-value]

    def get_max_length(self) -> int:
        return -1  # tokens without end pass through

    def settle(self) -> None:
        """Evict down to the budget if another `interval` of tokens would not fit."""
        if not self.is_initialized:
            return
        assert self.budget is not None
        if int(self.length) > self.budget:
            self.evict(self.budget)

    def evict(self, keep: int | float) -> None:
        filled = int(self.length)
        if isinstance(keep, int):
            keep = min(keep, filled)
        keys, values = self._overflow or (self.keys[:, :, :filled], self.values[:, :, :filled])
        result = self.policy.compact(keys, values, keep=keep, layer=self.index)
        kept = result.keys.shape[2]
        if self._overflow is not None:
            self.keys[:, :, :kept] = result.keys
            self.values[:, :, :kept] = result.values
            self._overflow = None
        self.length.fill_(kept)
        self.evicted += filled - kept
        self._on_evict(Eviction(self.index, filled, kept, result.indices, None))

    def cached(self) -> int:
        return int(self.length)

    def reset(self) -> None:
        if self.is_initialized:
            self.length.zero_()
            self.seen.zero_()
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(f"tokens_to_remove is {tokens_to_remove}: a static cache cannot be cropped; use static=False")

    def _select_requests(self, requests: Tensor) -> None:
        if self.is_initialized:
            self.keys.copy_(self.keys.index_select(0, requests))
            self.values.copy_(self.values.index_select(0, requests))
