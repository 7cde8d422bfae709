"""The Triton backend: the launchers of kvevict.kernels under the interface's names."""

from kvevict.kernels.check_rows import check_rows
from kvevict.kernels.combine_ranks import combine_ranks
from kvevict.kernels.compact_kv import copy_rows, fill_holes, move_flags, move_rows, slots_from_end
from kvevict.kernels.count_rows import keep_counts, left_blocks
from kvevict.kernels.decode_attention import decode_attention
from kvevict.kernels.pool_scores import pool_scores
from kvevict.kernels.score_attention import attention_lse, attention_mass
from kvevict.kernels.score_keydiff import anchor_sums, keydiff_scores
from kvevict.kernels.score_kv import kv_scores
from kvevict.kernels.score_mlp import mlp_scores
from kvevict.kernels.score_norm import key_norm_scores
from kvevict.kernels.score_peaks import attention_peaks
from kvevict.kernels.score_products import projected_norms, quadratic_scores
from kvevict.kernels.select_ranks import count_digits, kept_slots
from kvevict.kernels.select_topk import evict_slots, topk_adaptive, topk_indices

__all__ = [
    "anchor_sums",
    "attention_lse",
    "attention_mass",
    "attention_peaks",
    "check_rows",
    "combine_ranks",
    "copy_rows",
    "count_digits",
    "decode_attention",
    "evict_slots",
    "fill_holes",
    "keep_counts",
    "kept_slots",
    "key_norm_scores",
    "keydiff_scores",
    "kv_scores",
    "left_blocks",
    "mlp_scores",
    "move_flags",
    "move_rows",
    "pool_scores",
    "projected_norms",
    "quadratic_scores",
    "slots_from_end",
    "topk_adaptive",
    "topk_indices",
]
