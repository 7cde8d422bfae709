"""What a layer notes about its cached tokens for policies that read more than keys: last queries, attention drawn so
far, what a scorer says of hidden states. All of it follows the tokens through eviction, reordering, cropping and
saving."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvevict.hf.places import Places
from kvevict.policies import Policy, Tracker
from kvevict.policies.learned import scorer_of_hidden

TRACKED = {"mass", "last_used"}
ROWS = ("queries", "predicted", "packed", "repeated")  # tensors with a row for each request
SPARE = 64  # queries that are noted beyond the policy's window: so many tokens may be cropped before it is short of any


class Notes:
    """Attributes:
    tracker: where the policy reads mass or last use.
    queries: [B, Hq, W, D]: each request's last ones, at the end; before them, in a request that has fewer, padding.
    scorer: what of the policy reads hidden states.
    predicted: [B, H, t] float32: what it has said of the cached tokens; behind pages, of the tail.
    packed: [B, H, longest] float32: of what lies in pages.
    repeated: [B, H, n] float32: the most attention that the text's repetition gave each cached token.
    places: positions of the cached tokens, where the policy reads them; None: their slots, nothing has been evicted.
    """

    def __init__(self, policy: Policy) -> None:
        self.tracked = bool(policy.needs & TRACKED)
        self.reduce, self.min_distance = policy.noted
        self.window = policy.window
        self.scorer = scorer_of_hidden(policy)
        self.tracker: Tracker | None = None
        self.queries: Tensor | None = None
        self.predicted: Tensor | None = None
        self.packed: Tensor | None = None
        self.wants_repeated = "repeated" in policy.needs
        self.repeated: Tensor | None = None
        self.wants_positions = policy.reads_positions
        self.places: Places | None = None

    def new_tracker(self, B: int, H: int, capacity: int, device: torch.device) -> Tracker:
        return Tracker(B, H, capacity, device, reduce=self.reduce, min_distance=self.min_distance)

    def missing(self) -> list[str]:
        """What the policy reads and has not been noted."""
        queries = self.queries is not None and self.queries.shape[2] > 0  # all may have been cropped
        there = dict(attention=self.tracker is not None, queries=queries, hidden=self.predicted is not None)
        wanted = dict(attention=self.tracked, queries=self.window > 0, hidden=self.scorer is not None)
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

    def observed(
        self, lengths: Tensor | None, heads: int | None = None, packed: Tensor | None = None
    ) -> dict[str, Any]:
        """The fields of Observed that are noted, but for the tracker's. A request that is shorter than the queries has
        its own in front of them, as kvevict.ops wants it. heads: each of so many KV heads is a request, with lengths
        [B · heads]. packed: as `all_predicted` takes it."""
        seen: dict[str, Any] = {}
        for name, scores in (("predicted", self.all_predicted(packed)), ("repeated", self.repeated)):
            if scores is not None:
                seen[name] = scores if heads is None else scores.flatten(0, 1)[:, None]
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

    def all_predicted(self, packed: Tensor | None) -> Tensor | None:
        """[B, H, slots] float32, as `EvictingLayer.whole` has the tokens: of `packed` [B, H] tokens in pages, and
        behind each head's own of the tail."""
        if self.predicted is None or self.packed is None:
            return self.predicted
        assert packed is not None
        tail = self.predicted.shape[2]
        slots = packed.long()[..., None] + torch.arange(tail, device=packed.device)
        grown = torch.nn.functional.pad(self.packed, (0, tail), value=float("-inf"))
        return grown.scatter_(2, slots, self.predicted)

    def follow(self, indices: Tensor) -> None:
        """What the repetition drew, and what was predicted, go where keys have gone."""
        self.repeated, self.predicted = gathered(self.repeated, indices), gathered(self.predicted, indices)

    def into_pages(self, indices: Tensor, packed: Tensor | None) -> None:
        """`follow`, of all tokens, of which `packed` [B, H] lay in pages: these do now. The tail is empty."""
        self.repeated, self.packed = gathered(self.repeated, indices), gathered(self.all_predicted(packed), indices)
        self.predicted = None if self.packed is None else self.packed[:, :, :0]

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens of every request."""
        if self.tracker is not None:
            self.tracker.drop_last(count)
        self.queries = None if self.queries is None else self.queries[:, :, : max(self.queries.shape[2] - count, 0)]
        self.repeated = None if self.repeated is None else self.repeated[:, :, :-count]
        self.advance(-count)
        self.crop_predicted(count)

    def advance(self, count: int | Tensor) -> None:
        """So many more tokens of each request."""
        self.places = None if self.places is None else self.places.advanced(count)

    def crop_predicted(self, count: int) -> None:
        self.predicted = None if self.predicted is None else self.predicted[:, :, :-count]

    def select_requests(self, requests: Tensor) -> None:
        """Request i becomes what requests[i] was."""
        if self.tracker is not None:
            self.tracker.select_requests(requests)
        for name in ROWS:
            held = getattr(self, name)
            setattr(self, name, None if held is None else held.index_select(0, requests))
        self.places = None if self.places is None else self.places.select_requests(requests)

    def thaw(self) -> None:
        """Tensors that were made in inference mode cannot be written outside of it: become copies that can."""
        for name in ROWS:
            setattr(self, name, thawed(getattr(self, name)))
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


def gathered(scores: Tensor | None, indices: Tensor) -> Tensor | None:
    """scores [B, H, S] of the tokens `indices` [B, H, n], -inf where that is -1."""
    if scores is None:
        return None
    return scores.gather(2, indices.clamp(min=0)).masked_fill(indices < 0, float("-inf"))
