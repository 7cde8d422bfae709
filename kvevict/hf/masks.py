"""What transformers' attention masks say of a batch: which of the new slots hold a token, and which padding.

Nothing else can be read from them. A mask that hides other tokens would have them taken for padding and lost, so it is
refused.
"""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor


class Shown(NamedTuple):
    """What a mask shows."""

    is_token: Tensor | None  # [B, new] bool: the new slots that hold a token; None: all
    past_whole: bool  # every query sees all slots before the new ones
    ahead: bool  # some tokens see tokens behind them, as those of an image do
    row: Tensor | None  # [B, slots] bool: what the last query sees; None: all there is


ALL = Shown(None, True, False, None)

# A forward passes one mask through all its layers: it is looked at once.
_last = threading.local()


def read(mask: Tensor | None, new: int) -> Shown:
    """Of a mask [B, 1, new, slots] for `new` queries, the last ones. Reads its values on the host.

    Raises:
        ValueError: it hides more than padding on the left, or is a bias.
    """
    if mask is None:
        return ALL
    if getattr(_last, "mask", None) is None or _last.mask() is not mask:
        _last.shown, _last.mask, _last.before = _read(mask, new), weakref.ref(mask), None
    return _last.shown


def continues(shown: Shown, new: int, before: Tensor | None) -> bool:
    """Whether a mask shows of the slots before its new ones what `before`, the row of the last one, has shown."""
    if before is None or shown.row is None:
        return shown.past_whole
    if getattr(_last, "before", None) is not before:  # layers share a row as they share a mask: compared once
        past = shown.row[:, :-new]
        both = min(past.shape[1], before.shape[1])
        older = past.shape[1] - both  # of which nothing was shown
        same = past[:, :older].all() & (past[:, older:] == before[:, before.shape[1] - both :]).all()
        _last.before, _last.continues = before, bool(same)
    return _last.continues


def forget() -> None:
    """A forward begins: its mask may be the last one's tensor with other values."""
    _last.mask = _last.before = None


def _read(mask: Tensor, new: int) -> Shown:
    if mask.ndim != 4 or mask.shape[2] != new or mask.shape[3] < new:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}: expected [batch, 1, {new}, slots]")
    # A float mask is 0 where a token is seen, and at least so low that nothing of it is left elsewhere.
    sees = mask if mask.dtype == torch.bool else mask == 0
    hidden = ~sees if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
    is_token = sees[:, 0, -1, -new:]
    causal = torch.ones(new, new, dtype=torch.bool, device=mask.device).tril()
    query, key = is_token[:, None, :, None], is_token[:, None, None, :]
    past, block = sees[..., :-new], sees[..., -new:]
    blind = ~block.any(-1, keepdim=True) | sees.all(-1, keepdim=True)  # as padding is; an old mask shows it everything
    as_padding = (
        (sees | hidden).all()
        & (is_token[:, 1:] | ~is_token[:, :-1]).all()  # on the left
        & ~(query & causal & (block != key)).any()
        & ~(query & ~causal & block & ~key).any()
        & ~(query & (past != past[:, :1, -1:])).any()
        & (query | blind).all()
    )
    facts = torch.stack([as_padding, is_token.all(), past.all(), (query & ~causal & block).any()])
    as_padding, whole, past_whole, ahead = facts.tolist()
    if not as_padding:
        raise ValueError(
            "attention_mask hides or weighs tokens: expected padding on the left and nothing else, because what is "
            "hidden is taken for padding and evicted"
        )
    return Shown(None if whole else is_token, past_whole, ahead, sees[:, 0, -1].clone())


def tokens_first(is_token: Tensor) -> Tensor:
    """[B, S] bool -> [B, S] int64: the slots that hold a token, in order, and behind them the others."""
    return (~is_token).long().argsort(dim=-1, stable=True)


def held(slots: int, before: Tensor, is_token: Tensor) -> Tensor:
    """[B, slots] bool: which slots hold a token, where `before` [B] tokens lie in front, the new slots follow, of which
    is_token [B, new] hold one, and the rest is padding."""
    new = is_token.shape[1]
    ago = torch.arange(slots, device=is_token.device) - before[:, None]
    return (ago < 0) | ((ago < new) & is_token.gather(1, ago.clamp(0, new - 1)))


def visible(slots: int, before: Tensor, new: int, is_token: Tensor | None) -> Tensor:
    """[B, 1, new, slots] bool: each new query sees the tokens up to its own. One that is padding sees itself, so that
    no row is empty."""
    slot = torch.arange(slots, device=before.device)
    own = (before[:, None] + torch.arange(new, device=before.device))[:, :, None]
    sees = slot <= own
    if is_token is not None:
        sees &= held(slots, before, is_token)[:, None] | (slot == own)
    return sees[:, None]
