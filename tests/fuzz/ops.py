"""Every op with its cases."""

import kvevict
from fuzz import attention, moving, pages, scores, selection
from kvevict import paged

DENSE = (
    scores.keydiff_scores,
    scores.key_norm_scores,
    scores.kv_scores,
    scores.quadratic_scores,
    scores.projected_norms,
    scores.mlp_scores,
    scores.pool_scores,
    scores.combine_scores,
    attention.attention_lse,
    attention.attention_mass,
    attention.attention_peaks,
    attention.decode_attention,
    selection.topk_indices,
    selection.evict_slots,
    moving.compact,
    moving.keydiff_compact,
    moving.attention_compact,
)
PAGED = (
    pages.paged_scores,
    pages.paged_kv_scores,
    pages.paged_attention_mass,
    pages.paged_decode_attention,
    pages.paged_compact,
    pages.paged_keydiff_compact,
    pages.compact_to_pages,
)
OPS = {case.__name__: (case, getattr(kvevict, case.__name__)) for case in DENSE}
OPS |= {case.__name__: (case, getattr(paged, case.__name__)) for case in PAGED}
