"""kvevict: decide which tokens of an LLM's KV cache are worth keeping, and shrink the cache to them on the GPU."""

from kvevict.backends import backend
from kvevict.ops import (
    Compacted,
    attention_compact,
    attention_lse,
    attention_mass,
    attention_peaks,
    combine_scores,
    compact,
    decode_attention,
    evict_slots,
    key_norm_scores,
    keydiff_compact,
    keydiff_scores,
    kv_scores,
    mlp_scores,
    pool_scores,
    projected_norms,
    quadratic_scores,
    topk_indices,
)
from kvevict.planner import plan

__version__ = "0.1.0"

__all__ = [
    "Compacted",
    "attention_compact",
    "attention_lse",
    "attention_mass",
    "attention_peaks",
    "backend",
    "combine_scores",
    "compact",
    "decode_attention",
    "evict_slots",
    "key_norm_scores",
    "keydiff_compact",
    "keydiff_scores",
    "kv_scores",
    "mlp_scores",
    "plan",
    "pool_scores",
    "projected_norms",
    "quadratic_scores",
    "topk_indices",
]
