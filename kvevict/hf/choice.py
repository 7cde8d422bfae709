"""What an eviction keeps of a layer's cached tokens, or of all layers' together, by a policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kvevict.hf.notes import TRACKED
from kvevict.hf.parallel import mean_over_heads
from kvevict.hf.shares import Keep
from kvevict.policies import Policy, model_wide
from kvevict.policies.learned import Learned, scorer_of_hidden
from kvevict.policies.observed import Observed

if TYPE_CHECKING:
    from kvevict.hf.layer import EvictingLayer


class Choice(NamedTuple):
    """What an eviction will keep."""

    indices: Tensor  # [B, H, n] int64, -1 behind what a row keeps
    lengths: Tensor | None  # [B]: tokens of each request then, [B, H]: of each head; None where all have n

    @property
    def of_heads(self) -> bool:
        """Whether heads may keep unequal numbers."""
        return self.lengths is not None and self.lengths.ndim == 2


def choose(layer: EvictingLayer, policy: Policy, keep: Keep) -> Choice:
    """What `keep` keeps of the layer; changes nothing.

    Raises:
        ValueError: `keep` is out of range; what the policy reads was not noted.
    """
    scores, lengths = scored(layer, policy)
    B, H, S = scores.shape
    if layer.group is not None and policy.heads == "shared":
        scores = mean_over_heads(scores, layer.group)
    if isinstance(keep, Tensor):
        indices = policy.choose(scores, keep.to(scores.device).expand(B, H), lengths)
    elif isinstance(keep, list):
        indices = _of_requests(policy, scores, keep, lengths)
    else:
        indices = policy.choose(scores, min(keep, S) if isinstance(keep, int) else keep, lengths)
    indices, counts = _of_heads(layer, indices.expand(B, H, -1))
    if isinstance(keep, Tensor) or policy.heads == "adaptive" or layer.pages is not None:
        return Choice(indices, counts)
    return Choice(indices, None if layer.lengths is None else counts[:, 0])


def choose_together(layers: Sequence[EvictingLayer], policy: Policy, keep: int | float) -> list[Choice]:
    """What `keep` of a head in the mean keeps of all layers, whose best tokens stay (`kvevict.policies.model_wide`).

    Raises:
        ValueError: as `choose`.
    """
    given = [scored(layer, policy) for layer in layers]
    device = given[0][0].device  # layers may lie on several
    scores, lengths = [of_layer.to(device) for of_layer, _ in given], given[0][1]
    S = max(of_layer.shape[2] for of_layer in scores)
    if any(layer.pages is not None or layer.cached() != S for layer in layers):  # layers or heads are of unequal length
        lengths = torch.cat([layer.tokens_of_heads().to(device) for layer in layers], 1)
        scores = [
            torch.nn.functional.pad(of_layer, (0, S - of_layer.shape[2]), value=float("-inf")) for of_layer in scores
        ]
    keep = min(keep, S) if isinstance(keep, int) else keep
    sink, recent = policy.protected
    chosen = model_wide(scores, keep, sink=sink, recent=recent, lengths=lengths)
    own = (indices.to(layer.keys.device) for layer, indices in zip(layers, chosen, strict=True))
    return [Choice(*_of_heads(layer, indices)) for layer, indices in zip(layers, own, strict=True)]


def _of_heads(layer: EvictingLayer, indices: Tensor) -> tuple[Tensor, Tensor]:
    """What was chosen, of the tokens that are there; and how many each head [B, H] keeps."""
    if layer.lengths is not None:  # a request without a token was taken to have one
        indices = indices.masked_fill(indices >= layer.tokens_of_heads()[..., None], -1)
    return indices, (indices >= 0).sum(-1)


def _of_requests(policy: Policy, scores: Tensor, counts: list[int], lengths: Tensor | None) -> Tensor:
    """Each request's own number of tokens."""
    counts = [max(min(count, scores.shape[2]), 1) for count in counts]
    chosen = {count: policy.choose(scores, count, lengths) for count in set(counts)}
    rows = [chosen[count][b] for b, count in enumerate(counts)]
    most = max(row.shape[1] for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, most - row.shape[1]), value=-1) for row in rows])


def scored(layer: EvictingLayer, policy: Policy) -> tuple[Tensor, Tensor | None]:
    """The scores [B, H, S] of the layer's cached tokens, and how many of them each request [B] or head [B, H] has;
    None: S.

    Raises:
        ValueError: what the policy reads was not noted.
    """
    name = type(policy).__name__
    if not layer.watching and policy.needs - {"values", "repeated", "hidden"}:
        raise ValueError(f"the prompt has been cut, and nothing was noted for {name} since")
    if policy is not layer.policy:
        _check_noted(layer, policy)
    if "repeated" in policy.needs:
        _check_repeated(layer, name)
    for missing in layer.notes.missing():
        raise ValueError(f"{name} needs {missing}, which was not noted of all tokens since others were cut or cropped")
    if layer.pages is not None:
        return _scored_by_row(layer, policy)
    known: dict[str, Any] = layer.notes.observed(layer.lengths) | {
        "values": layer.values.detach(),
        "layer": layer.index,
    }
    if policy.reads_positions and layer.notes.tracker is None:  # which notes positions of its own
        placed = layer.positions()
        if placed is not None:
            known |= {"positions": placed[0], "tokens_seen": placed[1]}
    lengths = None if layer.lengths is None else layer.lengths.clamp(min=1)  # a chunk may have been all padding
    keys, tracker = layer.keys.detach(), layer.notes.tracker
    if tracker is None:
        seen = Observed(keys=keys, lengths=lengths, **known)
    else:
        seen = tracker.observed(keys, **known)
    return policy.scores(seen), seen.lengths


def _check_noted(layer: EvictingLayer, policy: Policy) -> None:
    """Of another policy than the layer's own: what it reads was noted for that."""
    notes = layer.notes
    missing = [
        name
        for name, reads, there in (
            ("attention", policy.needs & TRACKED, notes.tracked),
            ("queries", policy.window, policy.window <= notes.window),
            ("hidden states", "hidden" in policy.needs, _same(scorer_of_hidden(policy), notes.scorer)),
        )
        if reads and not there
    ]
    if policy.needs & TRACKED and notes.tracked and policy.noted != (notes.reduce, notes.min_distance):
        missing.append("attention of this kind")
    if missing:
        raise ValueError(
            f"{type(policy).__name__} reads {' and '.join(missing)}, which was not noted: expected one that reads no "
            f"more than {type(layer.policy).__name__}, with which the cache was made"
        )


def _same(a: Learned | None, b: Learned | None) -> bool:
    """Both say the same of hidden states; how heads choose by it is another matter."""
    return a is b or (a is not None and b is not None and a.weights is b.weights)


def _check_repeated(layer: EvictingLayer, name: str) -> None:
    repeated = layer.notes.repeated
    if repeated is None:
        raise ValueError(f"{name} needs cache.reconstruct(model, input_ids) of what the cache holds")
    if repeated.shape[2] != layer.slots():
        raise ValueError(
            f"{name} has no scores of the tokens that came after cache.reconstruct: expected an evict right after it"
        )


def _scored_by_row(layer: EvictingLayer, policy: Policy) -> tuple[Tensor, Tensor]:
    """`scored`, where heads hold unequal numbers: each is shown to the policy as a request of one KV head, whose last
    queries are as many as its tokens."""
    keys, values, lengths = layer.whole()
    assert lengths is not None
    B, H = lengths.shape
    of_rows = lengths.flatten().clamp(min=1)
    assert layer.pages is not None
    known = layer.notes.observed(of_rows, heads=H, packed=layer.pages.lengths)
    placed = layer.positions() if policy.reads_positions else None
    if placed is not None:
        known |= {"positions": placed[0].flatten(0, 1)[:, None], "tokens_seen": placed[1].repeat_interleave(H)}
    seen = Observed(
        keys=keys.flatten(0, 1)[:, None], values=values.flatten(0, 1)[:, None], lengths=of_rows, layer=layer.index,
        **known,
    )  # fmt: skip
    return policy.scores(seen).view(B, H, -1), lengths
