"""Paged caches, as serving engines keep them: the ops on a block table, and a small pool where there is no engine."""

from kvevict.paged.blocks import PagedRows, compact_to_pages
from kvevict.paged.cut import Cut
from kvevict.paged.ops import (
    PagedCompacted,
    paged_attention_mass,
    paged_compact,
    paged_decode_attention,
    paged_keydiff_compact,
    paged_kv_scores,
    paged_scores,
    pages,
)
from kvevict.paged.pool import PagedPool, PoolExhausted, PoolStatistics

__all__ = [
    "Cut",
    "PagedCompacted",
    "PagedPool",
    "PagedRows",
    "PoolExhausted",
    "PoolStatistics",
    "compact_to_pages",
    "paged_attention_mass",
    "paged_compact",
    "paged_decode_attention",
    "paged_keydiff_compact",
    "paged_kv_scores",
    "paged_scores",
    "pages",
]
