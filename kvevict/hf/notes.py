"""What a layer notes about its cached tokens for policies that read more than keys: last queries, attention drawn so
far, hidden states. All of it follows the tokens through eviction, reordering, cropping and saving."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvevict.hf.places import Places
from kvevict.policies import Policy, Tracker

TRACKED = {"mass", "last_used"}
SPARE = 64  # queries that are noted beyond the policy's window: so many tokens may be cropped before it is short of any


class Notes:
    """Attributes:
    tracker: where the policy reads mass or last use.
    queries: [B, Hq, W, D]: each request's last ones, at the end; before them, in a request that has fewer, padding.
    hidden: [B, 1, n, M]: what entered the layer's attention, a row for each cached token.
    repeated: [B, H, n] float32: the most attention that the text's repetition gave each cached token.
    places: positions of the cached tokens, where the policy reads them; None: their slots, nothing has been evicted.
    """

    def __init__(self, policy: Policy) -> None:
        self.tracked = bool(policy.needs & TRACKED)
        self.reduce, self.min_distance = policy.noted
        self.window = policy.window
        self.wants_hidden = "hidden" in policy.needs
        self.tracker: Tracker | None = None
        self.queries: Tensor | None = None
        self.hidden: Tensor | None = None
        self.wants_repeated = "repeated" in policy.needs
        self.repeated: Tensor | None = None
        self.wants_positions = policy.reads_positions
        self.places: Places | None = None

    def new_tracker(self, B: int, H: int, capacity: int, device: torch.device) -> Tracker:
        return Tracker(B, H, capacity, device, reduce=self.reduce, min_distance=self.min_distance)

    def missing(self) -> list[str]:
        """What the policy reads and has not been noted."""
        queries = self.queries is not None and self.queries.shape[2] > 0  # all may have been cropped
        there = dict(attention=self.tracker is not None, queries=queries, hidden=self.hidden is not None)
        wanted = dict(attention=self.tracked, queries=self.window > 0, hidden=self.wants_hidden)
        missing = [name for name, is_wanted in wanted.items() if is_wanted and not there[name]]
        return missing + ["repetition"] * (self.wants_repeated and self.repeated is None)

    def note_queries(self, query: Tensor, is_token: Tensor | None) -> None:
        """The queries [B, Hq, T, D] of new slots, of which is_token [B, T] hold a token (None: all)."""
        if self.queries is not None:
            query = torch.cat([self.queries, query], dim=2)
        if is_token is not None:  # new padding goes before the queries that are noted already
            B, Hq, W, D = query.shape
            tokens = torch.ones(B, W, dtype=torch.bool, device=query.device)
            tokens[:, W - is_token.shape[1] :] = is_token
            order = tokens.long().argsort(dim=-1, stable=True)
            query = query.gather(2, order[:, None, :, None].expand(B, Hq, W, D))
        self.queries = query[:, :, -(self.window + SPARE) :].contiguous()

    def note_prompt(self, query: Tensor, keys: Tensor, count: int | Tensor, scale: float | None) -> None:
        """The attention that a prompt's queries, or a chunk's, give the cached keys. count: new tokens, or [B] of them,
        which lie before the padding in query."""
        B, H, S = keys.shape[:3]
        if self.tracker is None:
            self.tracker = self.new_tracker(B, H, S, keys.device)
        self.tracker.reserve(S)
        self.tracker.append(count)
        self.tracker.observe(query, keys, scale=scale)

    def observed(self, lengths: Tensor | None, heads: int | None = None) -> dict[str, Any]:
        """The fields of Observed that are noted, but for the tracker's. A request that is shorter than the queries has
        its own in front of them, as kvevict.ops wants it. heads: each of so many KV heads is a request, with lengths
        [B · heads]."""
        seen: dict[str, Any] = {}
        if self.hidden is not None:
            seen["hidden"] = self.hidden[:, 0]
        if self.repeated is not None:
            seen["repeated"] = self.repeated if heads is None else self.repeated.flatten(0, 1)[:, None]
        if self.queries is not None and self.queries.shape[2]:
            queries = self.queries[:, :, -self.window :]
            if heads is not None:
                queries = queries.unflatten(1, (heads, -1)).flatten(0, 1)
            if lengths is not None:
                B, Hq, W, D = queries.shape
                first = W - lengths.clamp(max=W)
                order = (first[:, None] + torch.arange(W, device=queries.device)).clamp(max=W - 1)
                queries = queries.gather(2, order[:, None, :, None].expand(B, Hq, W, D))
            seen["queries"] = queries
        return seen

    def follow(self, indices: Tensor) -> None:
        """Hidden states, and what the repetition drew, go where keys have gone. A policy that reads hidden states
        chooses the same tokens for every head, so one row of them will do."""
        if self.repeated is not None:
            self.repeated = self.repeated.gather(2, indices.clamp(min=0)).masked_fill(indices < 0, float("-inf"))
        if self.hidden is not None:
            slots = indices[:, :1, :, None].clamp(min=0)
            self.hidden = self.hidden.gather(2, slots.expand(-1, -1, -1, self.hidden.shape[3]))

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens of every request."""
        if self.tracker is not None:
            self.tracker.drop_last(count)
        self.queries = None if self.queries is None else self.queries[:, :, : max(self.queries.shape[2] - count, 0)]
        self.repeated = None if self.repeated is None else self.repeated[:, :, :-count]
        self.advance(-count)
        self.crop_hidden(count)

    def advance(self, count: int | Tensor) -> None:
        """So many more tokens of each request."""
        self.places = None if self.places is None else self.places.advanced(count)

    def crop_hidden(self, count: int) -> None:
        self.hidden = None if self.hidden is None else self.hidden[:, :, :-count]

    def select_requests(self, requests: Tensor) -> None:
        """Request i becomes what requests[i] was."""
        if self.tracker is not None:
            self.tracker.select_requests(requests)
        self.queries = None if self.queries is None else self.queries.index_select(0, requests)
        self.hidden = None if self.hidden is None else self.hidden.index_select(0, requests)
        self.repeated = None if self.repeated is None else self.repeated.index_select(0, requests)
        self.places = None if self.places is None else self.places.select_requests(requests)

    def thaw(self) -> None:
        """Tensors that were made in inference mode cannot be written outside of it: become copies that can."""
        self.queries, self.hidden, self.repeated = (thawed(x) for x in (self.queries, self.hidden, self.repeated))
        if self.places is not None:
            self.places = Places(*(thawed(x) for x in (self.places.kept, self.places.counts, self.places.seen)))
        if self.tracker is not None:
            for name, value in vars(self.tracker).items():
                if isinstance(value, Tensor):
                    setattr(self.tracker, name, thawed(value))


def thawed(tensor: Tensor | None) -> Any:
    """The tensor, or a copy of one that was made in an inference mode which has ended."""
    if tensor is None or not tensor.is_inference() or torch.is_inference_mode_enabled():
        return tensor
    return tensor.clone()
