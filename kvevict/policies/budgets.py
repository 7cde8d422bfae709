"""How a model's budget is shared out over its layers, and over their heads."""

from __future__ import annotations

import abc
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from kvevict import ops, validate
from kvevict.policies.base import within
from kvevict.policies.shares import Shares


@dataclass(frozen=True)
class Budget(abc.ABC):
    """Tokens that each layer, or each head of each layer, keeps. The total is always layers × heads × the tokens that
    `keep` gives one head.

    Attributes:
        keep: tokens (int) or share (float in (0, 1]) as in `kvevict.ops.topk_indices`: the mean over layers and heads.
    """

    keep: int | float

    def __post_init__(self) -> None:
        # A share is judged now; whether an int fits is known once there are tokens.
        if isinstance(self.keep, int) and not isinstance(self.keep, bool):
            validate.integer("keep", self.keep, 1)
        else:
            validate.kept_tokens(self.keep, 1, 0, 0)

    @property
    def spread(self) -> str:
        """What has unequal shares: "layers", whose heads are alike; "heads"; or, once there are scores, the heads of
        each layer ("layer-wide") or of all layers ("model-wide")."""
        return "layers"

    @abc.abstractmethod
    def per_layer(self, layers: int, tokens: int) -> tuple[int, ...]:
        """The `keep` of every layer, first to last, each from 1 to `tokens`; the mean of its heads where they differ.

        Raises:
            ValueError: `keep` tokens are more than there are; counts follow from scores alone (`spread` "model-wide").
        """

    def per_head(self, layers: int, heads: int, tokens: int, protected: int = 0) -> tuple[tuple[int, ...], ...]:
        """The `keep` of every head of every layer. Where heads differ, each keeps as many as are `protected`, or the
        mean if that is less.

        Raises:
            ValueError: as `per_layer`; counts follow from scores alone (`spread` "layer-wide" and "model-wide").
        """
        return tuple((n,) * heads for n in self.per_layer(layers, tokens))

    def _total(self, layers: int, tokens: int) -> int:
        validate.integer("layers", layers, 1)
        validate.integer("tokens", tokens, 1)
        return layers * validate.kept_tokens(self.keep, tokens, 0, 0)


@dataclass(frozen=True)
class Uniform(Budget):
    """The same for every layer."""

    def per_layer(self, layers: int, tokens: int) -> tuple[int, ...]:
        return (self._total(layers, tokens) // layers,) * layers


@dataclass(frozen=True)
class Pyramid(Budget):
    """More for lower layers: linear from the most to the least. Cai et al., "PyramidKV" (arXiv 2406.02069, eq. 6 to 8).

    Attributes:
        steepness: the last layer keeps 1/steepness of the mean (β in the paper), more where the first would otherwise
            keep more than there is.
    """

    steepness: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if validate.number("steepness", self.steepness) < 1.0:
            raise ValueError(f"steepness is {self.steepness}: expected at least 1")

    def per_layer(self, layers: int, tokens: int) -> tuple[int, ...]:
        total = self._total(layers, tokens)
        mean = Fraction(total, layers)
        least = max(mean / Fraction(self.steepness), Fraction(1))
        most = min(2 * mean - least, Fraction(tokens))
        step = 2 * (most - mean) / max(layers - 1, 1)
        kept = [int(most - step * layer) if layers > 1 else total for layer in range(layers)]
        # Rounding down leaves fewer tokens than there are layers: one each, lower layers first.
        left = total - sum(kept)
        for layer in range(layers):
            if left and kept[layer] < tokens:
                kept[layer] += 1
                left -= 1
        return tuple(kept)


@dataclass(frozen=True, init=False)
class Fixed(Budget):
    """Shares that were measured once: of each layer, or of each head of each layer. They serve any scores.

    Only their ratios count: a head keeps ⌊c · share⌋ tokens, but no fewer than are protected and no more than there
    are, with the largest c whose total is no more than the budget's; what is missing goes one by one to the largest
    shares, ties to the lower layer and head.

    Attributes:
        shares: what was measured.
        per: "head", or "layer": the heads of a layer keep the same number.
    """

    shares: Shares
    per: str

    def __init__(self, shares: Tensor | Shares | str | pathlib.Path, keep: int | float, per: str = "head") -> None:
        """
        Args:
            shares: a tensor of positive numbers, [L] (of layers) or [L, H]; `Shares`, which are interpolated for
                `keep`; the name of shares that the package carries, such as "smollm2-135m"; or a safetensors file of
                `Shares.save` or `kvevict budgets`.
            keep: as in Budget.
            per: "layer" takes the mean over a layer's heads, and may leave a layer fewer tokens than are protected, but
                at least 1. Shares [L] are of layers in any case.

        Raises:
            TypeError, ValueError: no such shares; keep as in Budget.
            FileNotFoundError: no such file.
        """
        validate.one_of("per", per, ("head", "layer"))
        object.__setattr__(self, "keep", keep)
        object.__setattr__(self, "shares", _as_shares(shares))
        object.__setattr__(self, "per", "layer" if self.shares.heads == 1 else per)
        self.__post_init__()

    @property
    def spread(self) -> str:
        return "layers" if self.per == "layer" else "heads"

    def per_layer(self, layers: int, tokens: int) -> tuple[int, ...]:
        total = self._total(layers, tokens)
        weights = self._table(layers, tokens, total // layers).mean(1).tolist()
        return tuple(_shared_out(weights, total, 1, tokens))

    def per_head(self, layers: int, heads: int, tokens: int, protected: int = 0) -> tuple[tuple[int, ...], ...]:
        if self.per == "layer":
            return super().per_head(layers, heads, tokens, protected)
        validate.integer("protected", protected, 0)
        n = self._total(layers, tokens) // layers
        table = self._table(layers, tokens, n)
        if table.shape[1] != heads:
            raise ValueError(f"shares are of {table.shape[1]} heads a layer: expected {heads}, as the model has")
        counts = _shared_out(table.flatten().tolist(), layers * heads * n, max(min(protected, n), 1), tokens)
        return tuple(tuple(counts[i : i + heads]) for i in range(0, len(counts), heads))

    def _table(self, layers: int, tokens: int, n: int) -> Tensor:
        if self.shares.layers != layers:
            raise ValueError(f"shares are of {self.shares.layers} layers: expected {layers}, as the model has")
        return self.shares.at(self.keep if isinstance(self.keep, float) else n / tokens)


def _as_shares(shares: Tensor | Shares | str | pathlib.Path) -> Shares:
    if isinstance(shares, Shares):
        return shares
    if isinstance(shares, Tensor):
        if shares.ndim not in (1, 2) or 0 in shares.shape:
            raise ValueError(f"shares has shape {tuple(shares.shape)}: expected [layers] or [layers, heads]")
        return Shares((1.0,), shares.detach().float().cpu().view(1, len(shares), -1))
    if isinstance(shares, pathlib.Path) or (isinstance(shares, str) and shares.endswith(".safetensors")):
        return Shares.load(shares)
    if isinstance(shares, str):
        return Shares.named(shares)
    raise TypeError(f"shares is {type(shares).__name__}: expected a tensor, Shares, the name of some, or their file")


def _shared_out(weights: Sequence[float], total: int, least: int, most: int) -> list[int]:
    """Counts as Fixed promises them. In integers: the same on every machine, and exact for any number of tokens."""
    largest = max(weights)
    parts = [max(round(weight / largest * 2**40), 1) for weight in weights]  # c is in 2⁻¹²⁸: unequal ones grow apart

    def counts(c: int) -> list[int]:
        return [min(max((c * part) >> 128, least), most) for part in parts]

    low, high = 0, ((most + 1) << 128) // min(parts) + 1  # with these, all keep the least, or the most
    while high - low > 1:
        middle = (low + high) // 2
        if sum(counts(middle)) <= total:
            low = middle
        else:
            high = middle
    kept = counts(low)
    # One step more of c is more than the total: fewer are missing than can grow by one.
    can_grow = [i for i in range(len(kept)) if kept[i] < most]
    for i in sorted(can_grow, key=lambda i: -parts[i])[: total - sum(kept)]:
        kept[i] += 1
    return kept


@dataclass(frozen=True)
class LayerWide(Uniform):
    """The same for every layer; in each, the best tokens of all its heads. Feng et al., "Ada-KV" (arXiv 2407.11550).

    For scores that compare over the heads of a layer (`Policy.comparable`).

    Attributes:
        floor: the share of the mean that every head keeps at least.
    """

    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= validate.number("floor", self.floor) <= 1.0:
            raise ValueError(f"floor is {self.floor}: expected a number from 0 to 1")

    @property
    def spread(self) -> str:
        return "layer-wide"

    def per_head(self, layers: int, heads: int, tokens: int, protected: int = 0) -> tuple[tuple[int, ...], ...]:
        raise ValueError("LayerWide has no counts of heads: they follow from the scores, by heads='adaptive'")


@dataclass(frozen=True)
class ModelWide(Budget):
    """The best tokens of all layers and heads (`model_wide`). For scores that compare over the whole model."""

    @property
    def spread(self) -> str:
        return "model-wide"

    def per_layer(self, layers: int, tokens: int) -> tuple[int, ...]:
        raise ValueError("ModelWide has no counts of layers: they follow from the scores of all layers, by model_wide")


def model_wide(
    scores: Sequence[Tensor], keep: int | float, *, sink: int, recent: int, lengths: Tensor | None = None
) -> list[Tensor]:
    """The tokens that each layer keeps when the best of all layers and heads stay: on average `keep` of a head.

    Every head keeps its protected tokens, as many as `keep` of them allows; then the best scores of all stay, ties to
    the lower layer, then the lower head and token.

    Args:
        scores: [B, H, S] float32 of each layer, as `kvevict.ops.topk_indices` takes them. They are copied into one
            tensor [B, L·H, S].
        keep: tokens (int) or share (float in (0, 1]) of a head.
        sink, recent: so many first and last tokens are kept whatever their score; a smaller `keep` keeps the first
            ones, then the most recent.
        lengths: [B], or [B, L·H] where heads hold unequal numbers of tokens.

    Returns:
        [B, H, m] int64 of each layer, ascending, -1 behind a head's last. m ≤ S is the same for all layers.

    Raises:
        TypeError, ValueError: no layers, or layers of unlike batch or length; else as `kvevict.ops.topk_indices`.
    """
    if not scores:
        raise ValueError("scores is empty: expected those of every layer")
    for i, of_layer in enumerate(scores):
        validate.scores(of_layer, f"scores[{i}]")
        if (of_layer.shape[0], of_layer.shape[2]) != (scores[0].shape[0], scores[0].shape[2]):
            raise ValueError(
                f"scores[{i}] has shape {tuple(of_layer.shape)}: expected requests and tokens as scores[0] has, "
                f"{tuple(scores[0].shape)}"
            )
    stacked = torch.cat(list(scores), dim=1)
    sink, recent = within(validate.kept_tokens(keep, stacked.shape[2], 0, 0), sink, recent)
    indices = ops.topk_indices(stacked, keep, sink=sink, recent=recent, heads="adaptive", floor=0.0, lengths=lengths)
    return list(indices.split([of_layer.shape[1] for of_layer in scores], dim=1))


def kept_shares(scores: Sequence[Tensor], keeps: Sequence[float], *, sink: int, recent: int) -> Tensor:
    """[K, L, H] float32 on the CPU: what each head keeps of its tokens by `model_wide`, at each of `keeps`.

    Args:
        scores: [1, H, S] float32 of each layer.

    Raises:
        ValueError: layers differ in heads; as `model_wide`.
    """
    heads = {of_layer.shape[1] for of_layer in scores}
    if len(heads) > 1:
        raise ValueError(f"scores has layers of {sorted(heads)} KV heads: expected as many in each")
    kept = [model_wide(scores, keep, sink=sink, recent=recent) for keep in keeps]
    counts = torch.stack([torch.stack([(x[0] >= 0).sum(-1) for x in layers]) for layers in kept])
    return (counts / scores[0].shape[2]).cpu()
