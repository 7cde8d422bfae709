"""One cut of several requests, in the caches of all layers of an engine."""

from __future__ import annotations

from torch import Tensor

from kvevict import ops, validate
from kvevict.paged.ops import _check_scales, _paged


class Cut:
    """Requests of a paged cache, each cut to a number of tokens of its own, towards its end: `kvevict.paged.tail`.

    Tables, lengths and counts are the same for all layers: they are checked once, and a layer then costs two launches,
    three where its heads share a selection, however many requests there are.
    """

    def __init__(
        self,
        block_tables: Tensor,
        lengths: Tensor,
        keep: Tensor,
        most: int,
        block_size: int,
        *,
        sink: int = 0,
        recent: int = 0,
        heads: str = "each",
    ) -> None:
        """
        Args:
            block_tables, lengths: as in kvevict.paged.ops, a table for each request. Their values are checked at the
                first `move`, and again if they are written to; those that torch made in inference mode, which counts no
                writes, at each.
            keep: [B] int32 or int64, tokens that each request keeps in every head, at least 1.
            most: the greatest of these.
            block_size: of the caches.
            sink, recent, heads: as in `kvevict.ops.topk_indices`; "each" or "shared".

        Raises:
            TypeError, ValueError: wrong types or shapes; values of `keep` on a GPU are asserted on the device.
        """
        validate.one_of("heads", heads, ("each", "shared"))
        for name, value, least in (("most", most, 1), ("sink", sink, 0), ("recent", recent, 0)):
            validate.integer(name, value, least)
        validate.tensor("block_tables", block_tables, 2, (block_tables.dtype,))
        B, S = block_tables.shape[0], block_tables.shape[1] * block_size
        self.block_tables, self.lengths = block_tables, validate.lengths(lengths, B, 1, block_tables)
        self.kept = ops._keep_counts(validate.counts("keep", keep, B, 1, lengths), (B, 1, S), lengths, lengths)
        self._most = min(most, S)
        self._protection = sink, recent, heads

    def select(self, scores: Tensor) -> Tensor:
        """The tokens to keep: `kvevict.ops.topk_indices` of scores [B, H, S] float32, [B, H, most] int64; of heads that
        share a selection [B, 1, most]."""
        scores = validate.scores(scores)
        indices = ops._topk(scores, self._most, self.kept, *self._protection, self.lengths, trusted=False, floor=0.0)
        return indices[:, :1] if self._protection[2] == "shared" else indices

    def move(
        self,
        scores: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        key_scales: Tensor | None = None,
        value_scales: Tensor | None = None,
    ) -> None:
        """`select`, and move the rows of these tokens to the last slots of their requests, in order, in place.

        Args:
            scores: [B, H, S] float32; where heads share a selection, of any heads.
            key_cache, value_cache, key_scales, value_scales: as in `kvevict.paged.paged_compact`, of one layer.

        Raises:
            TypeError, ValueError: as there.
        """
        cache = _paged(key_cache, self.block_tables, self.lengths, value_cache, validate.ROW_DTYPES)
        scales = _check_scales(key_scales, value_scales, cache.keys)
        scores = validate.scores(scores)
        B, H, S, _ = cache.shape
        if scores.shape != (B, scores.shape[1] if self._protection[2] == "shared" else H, S):
            raise ValueError(f"scores has shape {tuple(scores.shape)}: expected {(B, H, S)}")
        ops._topk_move(cache, scores, self._most, self.kept, *self._protection, True, *scales)
