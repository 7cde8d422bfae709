"""One layer of an EvictingCache: keys and values that are cut back to the tokens worth keeping.

Tokens of a request lie in front, in order; behind them, in a batch of unequal requests, padding. Eviction follows the
attention of the step that filled the layer: at once where our attention function runs (`attend`), else before the next
use of the cache, because the tensors that `update` returned are still to be read.

Once heads keep unequal numbers, what they kept lies in `pages`, and the keys and values here are the tokens since.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvevict import ops
from kvevict.hf import masks, pages
from kvevict.hf.attention import NAME, hand_over, sdpa
from kvevict.hf.choice import Choice, choose
from kvevict.hf.notes import Notes, gathered, thawed
from kvevict.hf.pages import Pages
from kvevict.hf.places import Places
from kvevict.hf.shares import Keep
from kvevict.policies import Policy


def new_tokens(query_length: int | Tensor) -> int:
    """How many queries a mask is asked for. transformers 5.0 gives their positions [T] instead."""
    return query_length.shape[0] if isinstance(query_length, Tensor) else query_length


class Eviction(NamedTuple):
    """One eviction in one layer. Tokens are those of a head, the mean where heads hold unequal numbers, in the request
    that holds most."""

    layer: int
    before: int
    kept: int
    indices: Tensor  # [B, H, n] int64: the slots that stayed, -1 behind what a row keeps
    retained_mass: Tensor | None  # scalar: share of the attention mass that the kept tokens had drawn, where known


class Step(NamedTuple):
    """The slots that the last `update` filled, as its attention finds them."""

    new: int
    first: bool  # there was nothing before them
    before: Tensor | None  # [B]: tokens that each request had, None where all had the same number
    is_token: Tensor | None  # [B, new] bool: which of them hold a token, None for all
    paged: bool  # tokens before the slots lie in pages


class EvictingLayer(DynamicLayer):
    """Arguments as EvictingCache has them.

    keep: a share or number of the prompt's tokens, or a function that gives it for what `tokens` gives.
    budget: tokens of a head, or [H] of them: of each.
    attention_is_ours: whether the model's attention is set to be `kvevict.hf.attention`.
    of_heads: heads may come to keep unequal numbers.
    together: called instead of an eviction, where all layers evict at once.
    """

    keys: Tensor  # type: ignore[assignment]  # [B, H, n, D] once there is a token; n may be 0 behind pages
    values: Tensor  # type: ignore[assignment]

    def __init__(
        self,
        index: int,
        policy: Policy,
        interval: int,
        *,
        keep: int | float | Callable[[int | list[int]], Keep] | None = None,
        budget: int | Tensor | None = None,
        attention_is_ours: Callable[[], bool],
        on_evict: Callable[[Eviction], None],
        of_heads: bool = False,
        together: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self.index, self.policy = index, policy
        self.keep, self.budget, self.interval = keep, budget, interval
        self._attention_is_ours, self._on_evict = attention_is_ours, on_evict
        self._of_heads, self._together = of_heads, together
        self.group: Any = None  # whose ranks hold the other heads, where all choose together
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.tokens_seen = 0  # by the longest request, left padding included: the next token's index
        self.evicted = 0  # slots given up, of the longest request
        self.lengths: Tensor | None = None  # [B]: valid tokens in front of each row; None: all
        self.pages: Pages | None = None  # what lies before the keys and values
        self.notes = Notes(self.policy)
        self.refused = False  # an attention, whose tokens layers before this one may have taken
        self.compressed = False  # keep=: the prompt has been cut
        self.tail: int | Tensor = 0  # so many last tokens ([B] of them: of each request) have none missing among them
        self.row: Tensor | None = None  # [B, slots] bool: what the last query was shown of them, None: all
        self._entering: Tensor | None = None  # [B, T, M]: the hidden states that enter the layer's attention next
        self._unread = False  # update has returned keys that attention may still read,
        self._shape = (0, 0)  # for so many requests, of so many slots
        self._step = Step(0, True, None, None, False)

    # What transformers asks of a layer.

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._thaw()
        self.settle()
        new = key_states.shape[2]
        if new == 1 and self.waits_for("repetition"):
            raise ValueError(f"{type(self.policy).__name__} needs cache.reconstruct(model, input_ids) before decoding")
        if self.notes.scorer is not None:
            self._hidden_enters(new, key_states.shape[1])
        self.tokens_seen += new
        self.tail = self.tail + new
        self.notes.advance(new)
        self.keys = self._append(self.keys, key_states)
        self.values = self._append(self.values, value_states)
        if self.lengths is not None:
            self.lengths = self.lengths + new
        self._returned(self.keys)
        return self.keys, self.values

    def _returned(self, keys: Tensor) -> None:
        """`update` returns these keys: attention is to read them next."""
        self._unread, self._shape = True, (keys.shape[0], keys.shape[2])
        if self._attention_is_ours():
            hand_over(self, keys)

    def note_hidden(self, hidden: Tensor) -> None:
        """[B, T, M]: the hidden states of the tokens of the coming `update`."""
        self._entering = hidden.detach()

    def _hidden_enters(self, new: int, heads: int) -> None:
        """Scored now, and not held. Once a prompt has been cut, tokens may come untold: a later `evict` has no scores
        then."""
        entering, self._entering = self._entering, None
        notes = self.notes
        if entering is None or entering.shape[1] != new:
            if self.watching:
                raise ValueError(
                    f"{type(self.policy).__name__} needs hidden: make the cache with the model, or run it inside "
                    "`with cache.noting_hidden(model):`"
                )
            notes.predicted = notes.packed = None
            return
        if notes.predicted is None and self.get_seq_length() > 0:
            return  # some came untold
        assert notes.scorer is not None
        found = notes.scorer.of_hidden(entering, self.index).expand(-1, heads, -1)
        held = found[:, :, :0] if notes.predicted is None else notes.predicted
        notes.predicted = self._append(held[..., None], found[..., None])[..., 0]

    def _append(self, cached: Tensor, new: Tensor) -> Tensor:
        if self.lengths is None:
            return torch.cat([cached, new], dim=2)
        B, H, count, width = new.shape
        slots = self.lengths[:, None] + torch.arange(count, device=new.device)
        grown = torch.cat([cached, torch.zeros_like(new)], dim=2)
        return grown.scatter_(2, slots[:, None, :, None].expand(B, H, count, width), new)

    def _thaw(self) -> None:
        self.keys, self.values, self.lengths = thawed(self.keys), thawed(self.values), thawed(self.lengths)
        self.notes.thaw()

    def get_seq_length(self) -> int:
        return self.tokens_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The cached tokens stand right before the new ones: every new query sees them all, and earlier new ones."""
        self.settle()
        cached = self.cached()
        return cached + new_tokens(query_length), self.tokens_seen - cached

    def cached(self) -> int:
        """Slots of keys and values: tokens of the longest request, behind pages the tokens since the cut."""
        return self.keys.shape[2] if self.is_initialized and self.keys.ndim == 4 else 0

    def held(self) -> int:
        """Tokens of all heads, of the request that holds most."""
        if not self.is_initialized:
            return 0
        return (0 if self.pages is None else self.pages.most) + self.keys.shape[1] * self.cached()

    def kept(self) -> int:
        """Tokens of a head, in the mean (rounded half up) where they hold unequal numbers; as `held`."""
        heads = self.keys.shape[1] if self.is_initialized else 1
        return (2 * self.held() + heads) // (2 * heads)

    def tokens(self) -> int | list[int]:
        """Tokens in the cache; of each request, where they differ, which is read on the host."""
        return self.cached() if self.lengths is None else self.lengths.tolist()

    def tokens_of_heads(self) -> Tensor:
        """[B, H] int64: tokens in the cache."""
        B, H = self.keys.shape[:2]
        since = torch.full((B, 1), self.cached()) if self.lengths is None else self.lengths[:, None]
        since = since.to(self.keys.device)
        return since.expand(B, H) if self.pages is None else self.pages.lengths + since

    def whole(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of all cached tokens, and how many each request [B] has, or each head [B, H]; None: all.
        Where there are pages, keys and values are copies."""
        if self.pages is None:
            return self.keys.detach(), self.values.detach(), self.lengths
        return self.pages.followed_by(self.keys.detach(), self.values.detach(), self.lengths)

    @property
    def nbytes(self) -> int:
        """Of memory that the keys and values keep alive."""
        held = [self.keys, self.values]
        if self.pages is not None:
            held += [self.pages.keys, self.pages.values]
        return sum(x.untyped_storage().nbytes() for x in held if x is not None)

    def reset(self) -> None:
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized = False
        self._clear()

    def activate_past_recording(self) -> None:
        """From now on a forward is followed by a `crop`, of what turned out wrong in it: eviction waits for that."""
        self.record_past = True

    def croppable(self) -> int:
        """How many tokens `crop` can take back. Reads a batch's numbers on the host."""
        cached = self.cached()
        if isinstance(self.tail, Tensor):
            return min(int(self.tail.min()), cached)
        return min(self.tail, cached)

    def cropped(self, tokens_to_remove: int) -> int:
        """How many tokens `crop(tokens_to_remove)` takes back.

        Raises:
            TypeError, ValueError: no int; more than it can.
        """
        if not isinstance(tokens_to_remove, int) or isinstance(tokens_to_remove, bool):
            raise TypeError(f"tokens_to_remove is {tokens_to_remove!r}: expected an int")
        if not self.is_initialized:
            return 0
        count = int(self.get_seq_length()) - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if count <= 0:
            return 0
        most = self.croppable()
        if count > most:
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove}: expected at least -{most}, because tokens before these have "
                "been evicted; a larger recent window protects more"
            )
        return count

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, given as a negative number; a positive one is the length to go back to, as older
        versions of transformers mean it.

        Raises:
            ValueError: tokens from before the last eviction, which it did not protect.
        """
        count = self.cropped(tokens_to_remove)
        if count > 0:
            self._shorten(count)
            self.row = None if self.row is None else self.row[:, :-count]
            self.notes.crop(count)

    def _shorten(self, count: int) -> None:
        self._thaw()
        self.tokens_seen -= count
        self.tail = self.tail - count
        if self.lengths is not None:
            self.lengths = self.lengths - count
        self.keys, self.values = self.keys[:, :, :-count], self.values[:, :, :-count]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select_requests(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select_requests(torch.arange(self.keys.shape[0], device=self.keys.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            indices = torch.as_tensor(indices, device=self.keys.device)
            if indices.dtype == torch.bool:
                if indices.shape != self.keys.shape[:1]:
                    raise ValueError(
                        f"indices has shape {tuple(indices.shape)}: expected ({self.keys.shape[0]},), one per request"
                    )
                indices = indices.nonzero()[:, 0]
            self._select_requests(indices)

    def _select_requests(self, requests: Tensor) -> None:
        self.settle()
        if not self.is_initialized:
            return
        requests = requests.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, requests), self.values.index_select(0, requests)
        self.lengths = None if self.lengths is None else self.lengths[requests]
        self.pages = None if self.pages is None else self.pages.select_requests(requests)
        self.row = self.row if self.row is None or self.row.shape[0] == 1 else self.row[requests]
        self.tail = self.tail[requests] if isinstance(self.tail, Tensor) else self.tail
        self.notes.select_requests(requests)

    # Attention, when the model's attention function is ours.

    @property
    def at_work(self) -> bool:
        """Whether the attention that follows the last update is still to come."""
        return self._unread

    def awaits(self, module: Any, key: Tensor) -> bool:
        """Whether attention over `key` in this module is the one that follows the last update. Its keys may be made of
        the cached ones: models with latent attention (MLA) cache what their keys are computed from."""
        follows = self._unread and getattr(module, "layer_idx", None) == self.index
        return follows and (key.shape[0], key.shape[2]) == self._shape

    def attend(self, module, query, key, value, attention_mask, scaling=None, **options) -> tuple[Tensor, None]:
        """SDPA over this layer's tokens; then what the policy reads is noted, and tokens are evicted if it is time.

        Raises:
            ValueError: the mask hides more than padding on the left, see `kvevict.hf.masks.read`; the policy reads what
                this attention does not show; heads hold unequal numbers of tokens, and the keys and values are others
                than the cached ones, or gradients or dropout are wanted.
        """
        if not self._unread:  # the same step's attention once more, over other values or for another layer
            self._check_unequal(module, as_cached=not self._step.paged)
            mask = self._mask(self._step, attention_mask, query, key)
            return sdpa(module, query, key, value, mask, scaling=scaling, **options)
        new = query.shape[2]
        try:
            self._check_seen(module, key is self.keys, options.get("s_aux") is not None)
            self._check_unequal(module, as_cached=key is self.keys and value is self.values)
            wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
            if self.pages is not None and (wants_grad or options.get("dropout")):
                what = "gradients are" if wants_grad else "dropout is"
                raise ValueError(
                    f"{what} wanted where heads keep unequal numbers of tokens: expected neither, as in "
                    "model.eval() and torch.no_grad()"
                )
            step = self._step = self._this_step(attention_mask, query)
        except ValueError:
            self._take_back(new)
            self.refused = True
            raise
        tracked = self.watching and self.notes.tracked
        tracker = self.notes.tracker
        if self.pages is not None:
            if step.is_token is not None:
                self._close_gaps(query, step.is_token)
            tail = self.keys.detach(), self.values.detach(), self.lengths
            sinks = options.get("s_aux")
            output = pages.attention(self.pages, query.detach(), *tail, scale=scaling, sinks=sinks).transpose(1, 2)
        elif tracked and new == 1 and tracker is not None and step.is_token is None:
            tracker.reserve(key.shape[2])
            tracker.append(1)
            decay = getattr(self.policy, "decay", 1.0)
            output = tracker.attend(*(x.detach() for x in (query, key, value)), scale=scaling, decay=decay)
            output = output.transpose(1, 2)
        else:
            mask = self._mask(step, attention_mask, query, key)
            output, _ = sdpa(module, query, key, value, mask, scaling=scaling, **options)
        query = query.detach()  # what follows is bookkeeping, where gradients are on too
        if self.watching and self.notes.window:
            usual = query.shape[3] ** -0.5  # policies know no other scale
            scaled = query if scaling is None or scaling == usual else query * (scaling / usual)
            self.notes.note_queries(scaled, step.is_token)
        if step.is_token is not None and not step.paged:
            query = self._close_gaps(query, step.is_token)
        if tracked and not (new == 1 and tracker is not None and step.is_token is None):
            count = new if step.is_token is None else step.is_token.sum(-1)
            self.notes.note_prompt(query, self.keys.detach(), count, scaling)
        self._unread = False
        if not self.record_past:
            self.settle()
        return output, None

    def _take_back(self, new: int) -> None:
        """As if the last update had never been. Of its attention nothing is noted yet."""
        self._unread = False
        if self.tokens_seen == new:
            self.reset()
        else:
            self._shorten(new)
            self.notes.crop_predicted(new)
            self.notes.advance(-new)

    def _check_seen(self, module: Any, as_cached: bool, sinks: bool) -> None:
        """What the policy reads of attention must be there to be noted."""
        name, needs = type(self.policy).__name__, self.notes.tracked or self.notes.window > 0
        if self.watching and needs and not as_cached:
            raise ValueError(
                f"{name} reads attention, and {type(module).__name__} does not attend over what it caches but over "
                "keys that it makes of that (MLA caches latents): use a policy that reads keys alone, such as KeyDiff"
            )
        if self.watching and self.notes.tracked and sinks:
            raise ValueError(
                f"{name} reads mass or last use, which are not noted beside the attention sinks of "
                f"{type(module).__name__}: use a policy that reads keys or queries"
            )

    def _check_unequal(self, module: Any, as_cached: bool) -> None:
        """Over pages it is the layer that computes attention, once, from its own keys and values."""
        if (self._of_heads or self.pages is not None) and not as_cached:
            raise ValueError(
                f"{type(module).__name__} attends more than once over what it caches, or over what it makes of that, "
                "which is not served where heads keep unequal numbers of tokens: use a budget over layers"
            )

    def _this_step(self, attention_mask: Tensor | None, query: Tensor) -> Step:
        B, new = query.shape[0], query.shape[2]
        first = self.tokens_seen == new
        before = None if self.lengths is None else self.lengths - new
        shown = masks.read(attention_mask, new)
        if not first and (shown.ahead or not masks.continues(shown, new, self.row)):
            raise ValueError(
                "attention_mask hides cached tokens or shows later ones: expected that of a causal model, because what "
                "is cached is no longer where the mask expects it"
            )
        if shown.row is None and self.row is not None:  # all of what is new is shown, and of the past what was
            self.row = torch.cat([self.row, self.row.new_ones(len(self.row), new)], dim=1)
        else:
            self.row = shown.row
        return Step(
            new,
            first,
            before,
            None if shown.is_token is None else shown.is_token.expand(B, new),
            self.pages is not None,
        )

    def _mask(self, step: Step, mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
        """transformers' mask, made for another length or without our padding, put right for this layer's slots."""
        B, T, slots = (
            query.shape[0],
            query.shape[2],
            key.shape[2],
        )  # T < new: layers that share this one's keys may skip
        if step.first and (mask is not None or T in (1, slots)):
            return mask
        before = step.before
        if before is None:
            if (mask is None and T == 1) or (mask is not None and mask.shape[-1] == slots):
                return mask
            before = torch.full((B,), slots - step.new, device=query.device)
        return masks.visible(slots, before, step.new, step.is_token)[:, :, -T:]

    def _close_gaps(self, query: Tensor, is_token: Tensor) -> Tensor:
        """Padding goes behind the tokens, in the cache and in the queries, which are returned."""
        B, H, S = self.keys.shape[:3]
        before = self._step.before
        if before is None:
            before = torch.full((B,), S - is_token.shape[1], device=is_token.device)
        holds_token = masks.held(S, before, is_token)
        self.lengths = holds_token.sum(-1)
        order = masks.tokens_first(holds_token)
        order = order.masked_fill(torch.arange(S, device=order.device) >= self.lengths[:, None], -1)
        indices = order[:, None].expand(B, H, S)
        self.keys, self.values = ops.compact(self.keys.detach(), self.values.detach(), indices, inplace=False)[:2]
        self.notes.predicted, self.notes.repeated = gathered(self.notes.predicted, indices), None  # new ones have none
        new_count = is_token.sum(-1)
        self.notes.advance(new_count - is_token.shape[1])
        self.tail = torch.as_tensor(self.tail, device=new_count.device) - is_token.shape[1] + new_count
        order = masks.tokens_first(is_token)
        return query.gather(2, order[:, None, :, None].expand_as(query))

    # Eviction.

    @property
    def watching(self) -> bool:
        """Whether there will be another eviction, for which queries and attention are noted."""
        return self.keep is None or not self.compressed

    def waits_for(self, *noted: str) -> bool:
        """Whether there are tokens, and what the next eviction reads is still to come: queries, where all were cropped;
        the repetition of the text."""
        return self.cached() > 0 and self.watching and any(name in noted for name in self.notes.missing())

    def excess(self) -> int:
        """With a budget: tokens of all heads beyond it and the interval."""
        assert self.budget is not None
        heads = self.keys.shape[1]
        total = int(self.budget.sum()) if isinstance(self.budget, Tensor) else heads * self.budget
        return self.held() - total - heads * self.interval

    def _due(self) -> bool:
        return self.excess() > 0 if self.keep is None else not self.compressed

    def _target(self) -> Keep:
        if self.keep is None:
            assert self.budget is not None
            return self.budget
        return self.keep(self.tokens()) if callable(self.keep) else self.keep

    def settle(self) -> None:
        """Evict if it is due. The attention that followed the last update has been computed (or queued) by now."""
        if self.cached() == 0:
            return
        if self._unread and self._attention_is_ours():
            self._was_not_asked()
        self._unread = False
        if self._together is not None:
            self._together()
        elif self._due() and not self.waits_for("queries", "repetition"):
            self.evict(self._target())

    def _was_not_asked(self) -> None:
        """The model is set to "kvevict", and no attention over the last keys has come to it."""
        if self.notes.tracked or self.notes.window or self.keys.shape[0] > 1:
            what = f"{type(self.policy).__name__} cannot read it" if self.keys.shape[0] == 1 else "padding is not seen"
            raise ValueError(
                f'no attention over the keys of layer {self.index} has reached "{NAME}", to which the model is set: it '
                f"computes attention in a way of its own, and {what}"
            )

    def evict(self, keep: Keep) -> None:
        """Keep so many of the cached tokens (int; a list: of each request's), or that share of them."""
        self.apply(self.choose(keep))

    def choose(self, keep: Keep, policy: Policy | None = None) -> Choice:
        """What `evict(keep)` will keep, by another policy where one is given; changes nothing.

        Raises:
            ValueError: as `kvevict.hf.choice.choose`.
        """
        return choose(self, policy or self.policy, keep)

    def apply(self, choice: Choice) -> None:
        """Evict all but what was chosen. Out of place: the memory of what goes returns to the allocator."""
        before, tracker = self.kept(), self.notes.tracker
        retained = None
        if tracker is not None:
            drawn = tracker.mass.gather(2, choice.indices.clamp(min=0)).masked_fill(choice.indices < 0, 0.0)
            retained = drawn.sum() / tracker.mass.sum()
        places, held = self._places(), (self.tokens_of_heads(), self.slots())
        indices = self._into_pages(choice) if choice.of_heads else self._compact(choice)
        if places is not None:
            self.notes.places = places.after(indices, *held)
        self.evicted += before - self.kept()
        self.compressed = True
        if not self.watching:
            before_it, self.notes = self.notes, Notes(self.policy)
            for name in ("repeated", "places", "predicted", "packed"):  # for a later `evict`
                setattr(self.notes, name, getattr(before_it, name))
        self._on_evict(Eviction(self.index, before, self.kept(), indices, retained))

    def slots(self) -> int:
        """Of `whole`."""
        return self.cached() + (0 if self.pages is None else self.pages.longest)

    def _places(self) -> Places | None:
        """Where the tokens were, for a policy that reads it. None: they are not known, or not read.

        They are known as long as nothing was evicted while they were not read.
        """
        if not self.notes.wants_positions:
            return None
        if self.notes.places is None and not self.evicted and self.pages is None:
            return Places.whole(self.tokens_of_heads())
        return self.notes.places

    def positions(self) -> tuple[Tensor, Tensor] | None:
        """[B, H, slots] int64, of what `whole` gives, and [B], the tokens seen, for a policy that reads positions;
        None: they are the slots.

        Raises:
            ValueError: tokens were evicted, and where the others had been was not noted.
        """
        if self.notes.places is not None:
            return self.notes.places.of(self.tokens_of_heads(), self.slots()), self.notes.places.seen
        if self.evicted or self.pages is not None:
            raise ValueError(
                f"{type(self.policy).__name__} reads positions, and tokens were evicted before these were noted: "
                "expected a cache that was made with this policy"
            )
        return None

    def _compact(self, choice: Choice) -> Tensor:
        before, tracker = self.cached(), self.notes.tracker
        result = ops.compact(self.keys.detach(), self.values.detach(), choice.indices, inplace=False)
        self.keys, self.values = result.keys, result.values
        self.tail = self._tail_after(choice, before)
        if self.lengths is not None:
            assert choice.lengths is not None
            self.lengths = torch.minimum(self.lengths, choice.lengths)
        if tracker is not None:
            tracker.compacted(result._replace(lengths=choice.lengths))
        self.notes.follow(result.indices)
        return result.indices

    def _into_pages(self, choice: Choice) -> Tensor:
        """What tokens come from now on are the keys and values."""
        keys, values, _ = self.whole()
        packed = None if self.pages is None else self.pages.lengths
        self.pages = pages.pack(keys, values, choice.indices)
        self.keys, self.values = (x.new_empty((*x.shape[:2], 0, x.shape[3])) for x in (keys, values))
        self.lengths, self.tail = None, 0
        indices = choice.indices[:, :, : self.pages.longest]
        self.notes.into_pages(indices, packed)
        return indices

    def _tail_after(self, choice: Choice, before: int) -> int | Tensor:
        """Where tokens were given up, no more than the protected recent ones are known to have stayed."""
        sink, recent = self.policy.protected
        if choice.lengths is None or self.lengths is None:
            kept = choice.indices.shape[2]
            return self.tail if kept == before else min(self.tail, recent, max(kept - sink, 0))
        most = (choice.lengths - sink).clamp(0, recent)
        tail = torch.as_tensor(self.tail, device=most.device).expand_as(most)
        return torch.where(choice.lengths < self.lengths, torch.minimum(tail, most), tail)
