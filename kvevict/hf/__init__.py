"""transformers: a cache that stays within its budget. `EvictingCache` goes where a DynamicCache goes."""

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(f"kvevict.hf needs {missing.name}: pip install 'kvevict[hf]'") from None

from kvevict.hf.attention import register
from kvevict.hf.cache import EvictingCache, Eviction, LayerReport

register()

__all__ = ["EvictingCache", "Eviction", "LayerReport"]
