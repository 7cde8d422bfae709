"""The Triton backend: the launchers of kvevict.kernels under the interface's names."""

from kvevict.kernels.compact_kv import copy_rows, fill_holes, move_rows
from kvevict.kernels.score_keydiff import keydiff_scores
from kvevict.kernels.select_topk import topk_indices

__all__ = ["copy_rows", "fill_holes", "keydiff_scores", "move_rows", "topk_indices"]
