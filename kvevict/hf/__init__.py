"""transformers: a cache that stays within its budget. `EvictingCache` goes where a DynamicCache goes."""

from kvevict.hf.attention import register
from kvevict.hf.cache import EvictingCache, Eviction, LayerReport

register()

__all__ = ["EvictingCache", "Eviction", "LayerReport"]
