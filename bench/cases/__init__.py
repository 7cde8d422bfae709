"""One file per op. A new op joins by a file that makes a Case, and its name here."""

from bench.cases import (
    attention_mass,
    attention_peaks,
    compact,
    decode_attention,
    key_norm_scores,
    keydiff_compact,
    keydiff_scores,
    kv_scores,
    mlp_scores,
    paged_decode_attention,
    paged_keydiff_compact,
    projected_norms,
    quadratic_scores,
    topk_indices,
)

ALL = [
    keydiff_compact.CASE,
    keydiff_compact.FEWEST_MOVES,
    paged_keydiff_compact.CASE,
    keydiff_scores.CASE,
    kv_scores.BEFORE_ROPE,
    kv_scores.CASE,
    key_norm_scores.CASE,
    attention_mass.CASE,
    attention_mass.FAR_CASE,
    attention_peaks.CASE,
    quadratic_scores.CASE,
    projected_norms.CASE,
    decode_attention.CASE,
    paged_decode_attention.CASE,
    mlp_scores.CASE,
    topk_indices.CASE,
    compact.CASE,
]
