"""kvevict: decide which tokens of an LLM's KV cache are worth keeping, and shrink the cache to them on the GPU."""

from kvevict.backends import backend
from kvevict.ops import Compacted, compact, keydiff_compact, keydiff_scores, topk_indices

__version__ = "0.1.0"

__all__ = ["Compacted", "backend", "compact", "keydiff_compact", "keydiff_scores", "topk_indices"]
