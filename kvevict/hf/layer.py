"""One layer of an EvictingCache: keys and values that are cut back to the tokens worth keeping.

Tokens of a request lie in front, in order; behind them, in a batch of unequal requests, padding. Eviction follows the
attention of the step that filled the layer: at once where our attention function runs (`attend`), else before the next
use of the cache, because the tensors that `update` returned are still to be read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvevict import ops
from kvevict.hf.attention import SET_UP, hand_over, sdpa
from kvevict.policies import Policy, Tracker

TRACKED = {"mass", "last_used"}


def new_tokens(query_length: int | Tensor) -> int:
    """How many queries a mask is asked for. transformers 5.0 gives their positions [T] instead."""
    return query_length.shape[0] if isinstance(query_length, Tensor) else query_length


def tokens_first(is_token: Tensor) -> Tensor:
    """[B, S] bool -> [B, S] int64: the slots that hold a token, in order, and behind them the others."""
    return (~is_token).long().argsort(dim=-1, stable=True)


class Eviction(NamedTuple):
    """One eviction in one layer."""

    layer: int
    before: int  # tokens (of the longest request)
    kept: int
    indices: Tensor  # [B, H, kept] int64: the slots that stayed, -1 for padding
    retained_mass: Tensor | None  # scalar: share of the attention mass that the kept tokens had drawn, where known


class EvictingLayer(DynamicLayer):
    keys: Tensor  # type: ignore[assignment]  # [B, H, n, D] once there is a token
    values: Tensor  # type: ignore[assignment]

    def __init__(
        self,
        index: int,
        policy: Policy,
        interval: int,
        *,
        keep: int | float | None = None,
        budget: int | None = None,
        attention_is_ours: Callable[[], bool],
        on_evict: Callable[[Eviction], None],
    ) -> None:
        super().__init__()
        self.index, self.policy = index, policy
        self.keep, self.budget, self.interval = keep, budget, interval
        self._attention_is_ours, self._on_evict = attention_is_ours, on_evict
        self._clear()

    def _clear(self) -> None:
        self.tokens_seen = 0  # by the longest request, left padding included: the next token's index
        self.evicted = 0  # slots given up, of the longest request
        self.lengths: Tensor | None = None  # [B]: valid tokens in front of each row; None: all
        self.tracker: Tracker | None = None
        self.queries: Tensor | None = None  # [B, Hq, ≤ window, D]: each request's last ones
        self.query_count: Tensor | None = None  # [B]: how many they are, in a batch of unequal requests
        self.hidden: Tensor | None = None  # [B, 1, n, M]: what entered this layer's attention, kept as keys are
        self._entering: Tensor | None = None  # [B, T, M]: what enters it now
        self._compressed = False  # keep=: the prompt has been cut
        self._unread = False  # update has returned keys that attention may still read
        self._since_eviction = 0

    # What transformers asks of a layer.

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.settle()
        if not self._attention_is_ours():
            self._refuse_if_watching()
        new = key_states.shape[2]
        if "hidden" in self.policy.needs and self._watching:
            self._hidden_enters(new)
        self.tokens_seen += new
        self._since_eviction += new
        self.keys = self._append(self.keys, key_states)
        self.values = self._append(self.values, value_states)
        if self.lengths is not None:
            self.lengths = self.lengths + new
        self._unread = True
        if self._attention_is_ours():
            hand_over(self, self.keys)
        return self.keys, self.values

    def note_hidden(self, hidden: Tensor) -> None:
        """[B, T, M]: the hidden states of the tokens of the coming `update`."""
        self._entering = hidden.detach()

    def _hidden_enters(self, new: int) -> None:
        entering, self._entering = self._entering, None
        if entering is None or entering.shape[1] != new:
            name = type(self.policy).__name__
            raise ValueError(f"{name} needs hidden: run the model inside `with cache.noting_hidden(model):`")
        self.hidden = entering[:, None] if self.hidden is None else self._append(self.hidden, entering[:, None])

    def _append(self, cached: Tensor, new: Tensor) -> Tensor:
        if self.lengths is None:
            return torch.cat([cached, new], dim=2)
        B, H, count, width = new.shape
        slots = self.lengths[:, None] + torch.arange(count, device=new.device)
        grown = torch.cat([cached, torch.zeros_like(new)], dim=2)
        return grown.scatter_(2, slots[:, None, :, None].expand(B, H, count, width), new)

    def get_seq_length(self) -> int:
        return self.tokens_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The cached tokens stand right before the new ones: every new query sees them all, and earlier new ones."""
        self.settle()
        cached = self.keys.shape[2] if self.is_initialized else 0
        return cached + new_tokens(query_length), self.tokens_seen - cached

    def cached(self) -> int:
        """Tokens in the cache, of the longest request."""
        return self.keys.shape[2]

    def reset(self) -> None:
        del self.keys, self.values
        self.is_initialized = False
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, given as a negative number; a positive one is the length to go back to, as older
        versions of transformers mean it.

        Raises:
            ValueError: tokens from before the last eviction, which it did not protect.
        """
        count = self.tokens_seen - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if count <= 0 or not self.is_initialized:
            return
        self.settle()  # so that all layers evict the same tokens, whether or not they did before this call
        still_there = self._since_eviction + (self.policy.protected[1] if self.evicted else 0)
        if count > min(still_there, self.keys.shape[2]):
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove}: expected at least -{still_there}, because tokens before "
                "these have been evicted; a larger recent window protects more"
            )
        self.tokens_seen -= count
        self._since_eviction = max(self._since_eviction - count, 0)
        if self.lengths is not None:
            self.lengths = self.lengths - count
        self.keys, self.values = self.keys[:, :, :-count], self.values[:, :, :-count]
        if self.tracker is not None:
            self.tracker.drop_last(count)
        self.queries = None if self.queries is None else self.queries[:, :, :-count]
        self.hidden = None if self.hidden is None else self.hidden[:, :, :-count]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select_requests(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select_requests(torch.arange(self.keys.shape[0], device=self.keys.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            indices = torch.as_tensor(indices, device=self.keys.device)
            self._select_requests(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def _select_requests(self, requests: Tensor) -> None:
        self.settle()
        if not self.is_initialized:
            return
        requests = requests.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, requests), self.values.index_select(0, requests)
        self.lengths = None if self.lengths is None else self.lengths[requests]
        self.queries = None if self.queries is None else self.queries.index_select(0, requests)
        self.hidden = None if self.hidden is None else self.hidden.index_select(0, requests)
        self.query_count = None if self.query_count is None else self.query_count[requests]
        if self.tracker is not None:
            self.tracker.select_requests(requests)

    # Attention, when the model's attention function is ours.

    def attend(self, module, query, key, value, attention_mask, scaling=None, **options) -> tuple[Tensor, None]:
        """SDPA over this layer's tokens; then what the policy reads is noted, and tokens are evicted if it is time."""
        new = query.shape[2]
        first = self.tokens_seen == new
        tracked = self._watching and self.policy.needs & TRACKED
        is_token = self._new_tokens(attention_mask, new, first)
        if tracked and not first and new == 1:
            assert self.tracker is not None
            self.tracker.reserve(key.shape[2])
            self.tracker.append(1)
            decay = getattr(self.policy, "decay", 1.0)
            output = self.tracker.attend(*(x.detach() for x in (query, key, value)), scale=scaling, decay=decay)
            output = output.transpose(1, 2)
        else:
            mask = attention_mask if first else self._mask(attention_mask, is_token, query, key)
            output, _ = sdpa(module, query, key, value, mask, scaling=scaling, **options)
            query = query.detach()  # what follows is bookkeeping, where gradients are on too
            if is_token is not None:
                query = self._close_gaps(query, is_token)
            if tracked:
                self._track_prompt(query, is_token, scaling)
        if self._watching and self.policy.window:
            self._note_queries(query.detach(), is_token)
        self._unread = False
        self.settle()
        return output, None

    def _note_queries(self, query: Tensor, is_token: Tensor | None) -> None:
        """Keep each request's last queries, as many as the policy reads: in front, padding behind them."""
        B, _, new, _ = query.shape
        window = self.policy.window
        count = torch.full((B,), new, device=query.device) if is_token is None else is_token.sum(-1)
        if self.queries is not None:
            query = torch.cat([self.queries, query], dim=2)
        if self.lengths is None:
            self.queries = query[:, :, -window:].contiguous()
            return
        old = query.shape[2] - new
        slots = torch.arange(query.shape[2], device=query.device)
        old_count = 0 if self.query_count is None else self.query_count[:, None]
        is_query = torch.where(slots < old, slots < old_count, slots - old < count[:, None])
        total = is_query.sum(-1)
        order = tokens_first(is_query)
        first = (total - window).clamp(min=0)[:, None]
        order = order.gather(1, (first + torch.arange(min(window, len(slots)), device=query.device)))
        self.queries = query.gather(2, order[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        self.query_count = total.clamp(max=window)

    def _new_tokens(self, mask: Tensor | None, new: int, first: bool) -> Tensor | None:
        """[B, new] bool: which of the new slots hold a token, as the last query's row of transformers' mask shows; None
        means all. Only a prompt can bring padding; there it costs one look at the mask from the host."""
        if new == 1 or mask is None or mask.dtype != torch.bool or not (first or self.lengths is not None):
            return None
        is_token = mask[:, 0, -1, -new:]
        return None if bool(is_token.all()) else is_token

    def _holds_token(self, is_token: Tensor) -> Tensor:
        """[B, S] bool: the slots of cached tokens, and of those of the new ones that are tokens."""
        B, new = is_token.shape
        slots = torch.arange(self.keys.shape[2], device=is_token.device)
        before = torch.zeros(B, 1, dtype=torch.int64, device=is_token.device)
        if self.lengths is not None:
            before = (self.lengths - new)[:, None]
        ago = slots - before
        return (ago < 0) | ((ago < new) & is_token.gather(1, ago.clamp(0, new - 1)))

    def _close_gaps(self, query: Tensor, is_token: Tensor) -> Tensor:
        """Padding goes behind the tokens, in the cache and in the queries, which are returned."""
        B, H, S = self.keys.shape[:3]
        holds_token = self._holds_token(is_token)
        self.lengths = holds_token.sum(-1)
        order = tokens_first(holds_token)
        order = order.masked_fill(torch.arange(S, device=order.device) >= self.lengths[:, None], -1)
        indices = order[:, None].expand(B, H, S)
        self.keys, self.values = ops.compact(self.keys.detach(), self.values.detach(), indices, inplace=False)[:2]
        self._hidden_follows(indices)
        order = tokens_first(is_token)
        return query.gather(2, order[:, None, :, None].expand_as(query))

    def _mask(self, mask: Tensor | None, is_token: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
        """transformers' mask, made for another length or without our padding, put right for this layer's slots."""
        new, slots = query.shape[2], key.shape[2]
        if self.lengths is None:
            if mask is None and new == 1:
                return None
            if mask is not None and mask.shape[-1] == slots:
                return mask
        ends = torch.full((query.shape[0],), slots, device=query.device) if self.lengths is None else self.lengths
        own = (ends - new)[:, None] + torch.arange(new, device=query.device)  # each query's slot
        slot = torch.arange(slots, device=query.device)
        visible = slot <= own[:, :, None]
        if is_token is not None:  # a query that is padding sees itself, so that no row is empty
            visible &= self._holds_token(is_token)[:, None] | (slot == own[:, :, None])
        return visible[:, None]

    def _track_prompt(self, query: Tensor, is_token: Tensor | None, scaling: float | None) -> None:
        B, H, S = self.keys.shape[:3]
        if self.tracker is None:
            self.tracker = Tracker(B, H, S, self.keys.device)
        self.tracker.reserve(S)
        self.tracker.append(query.shape[2] if is_token is None else is_token.sum(-1))
        self.tracker.observe(query, self.keys.detach(), scale=scaling)

    # Eviction.

    @property
    def _watching(self) -> bool:
        """Whether there will be another eviction, for which queries and attention are noted."""
        return self.keep is None or not self._compressed

    def _refuse_if_watching(self) -> None:
        needs = self.policy.needs - {"hidden"}
        if needs and self._watching:
            raise ValueError(f"{type(self.policy).__name__} needs {', '.join(sorted(needs))}: call {SET_UP}")

    def _target(self) -> int | float | None:
        """What to cut down to now; None: nothing is due."""
        if self.keep is not None:
            if self._compressed:
                return None
            return self.keep
        assert self.budget is not None
        return self.budget if self.keys.shape[2] > self.budget + self.interval else None

    def settle(self) -> None:
        """Evict if it is due. The attention that followed the last update has been computed (or queued) by now."""
        if not self.is_initialized or self.keys.numel() == 0:
            return
        if self._unread:  # our attention function did not get these keys
            self._refuse_if_watching()
        self._unread = False
        target = self._target()
        if target is not None:
            self.evict(target)

    def evict(self, keep: int | float) -> None:
        """Keep so many of the cached tokens (int), or that share of them."""
        if not self._watching and self.policy.needs:
            raise ValueError(f"the prompt has been cut, and nothing was noted for {type(self.policy).__name__} since")
        if isinstance(keep, int):
            keep = min(keep, self.keys.shape[2])
        before = self.keys.shape[2]
        mass = None if self.tracker is None else self.tracker.mass.sum()
        observed: dict[str, Any] = {} if self.queries is None else {"queries": self.queries}
        if self.hidden is not None:
            observed["hidden"] = self.hidden[:, 0]
        if self.tracker is None and self.lengths is not None:
            observed["lengths"] = self.lengths.clamp(min=1)  # a chunk may have been all padding
        # Out of place: the memory of what is evicted goes back to the allocator.
        result = self.policy.compact(
            self.keys.detach(),
            self.values.detach(),
            keep=keep,
            tracker=self.tracker,
            inplace=False,
            layer=self.index,
            **observed,
        )
        self.keys, self.values = result.keys, result.values
        if self.lengths is not None:
            assert result.lengths is not None
            self.lengths = torch.minimum(self.lengths, result.lengths)
        self._compressed = True
        self._since_eviction = 0
        self.evicted += before - self.keys.shape[2]
        retained = None
        if mass is not None and self.tracker is not None:
            retained = self.tracker.mass.sum() / mass
        if not self._watching:
            self.tracker = self.queries = self.hidden = None
        self._hidden_follows(result.indices)
        self._on_evict(Eviction(self.index, before, self.keys.shape[2], result.indices, retained))

    def _hidden_follows(self, indices: Tensor) -> None:
        """A policy that reads hidden states chooses the same tokens for every head, so one row of them will do."""
        if self.hidden is not None:
            slots = indices[:, :1, :, None].clamp(min=0)
            self.hidden = self.hidden.gather(2, slots.expand(-1, -1, -1, self.hidden.shape[3]))
