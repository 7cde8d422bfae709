"""The definition of every op in plain torch, written to be read. It shares no code with the kernels.

Shapes: keys [B, H, S, D], values [B, H, S, Dv], scores [B, H, S] float32, indices and slots [B, H, n] int64 with
-1 as padding, lengths [B] (tokens of each request) and keep_lengths [B] (how many of them it keeps), or None.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["copy_rows", "fill_holes", "keydiff_scores", "move_rows", "topk_indices"]


def _inside(S: int, lengths: Tensor | None, device: torch.device) -> Tensor:
    """[B, 1, S] (or [1, 1, S]) bool: which positions hold a token."""
    positions = torch.arange(S, device=device)
    ends = torch.tensor([S], device=device) if lengths is None else lengths
    return positions < ends[:, None, None]


def keydiff_scores(keys: Tensor, anchor: Tensor | None, unit: bool, lengths: Tensor | None, out: Tensor) -> None:
    """-cos(k_i, a) with a = mean_i k_i/‖k_i‖ (unit), mean_i k_i, or the caller's [B, H, D]; -inf beyond a row."""
    inside = _inside(keys.shape[2], lengths, keys.device)
    keys = keys.float().masked_fill(~inside[..., None], 0.0)
    if anchor is None:
        total = (F.normalize(keys, dim=-1, eps=1e-12) if unit else keys).sum(2)
        anchor = total / inside.sum(2, keepdim=True)
    scores = -F.cosine_similarity(keys, anchor.float()[:, :, None], dim=-1, eps=1e-8)
    out.copy_(scores.masked_fill(~inside, float("-inf")))


def topk_indices(
    scores: Tensor,
    keep_lengths: Tensor | None,
    sink: int,
    recent: int,
    shared: bool,
    lengths: Tensor | None,
    out: Tensor,
) -> None:
    """Per row: the protected tokens, then the best scores, ties to the lower index; written in ascending order."""
    if shared:  # added in head order: float32 sums depend on it
        total = scores[:, :1].clone()
        for h in range(1, scores.shape[1]):
            total += scores[:, h : h + 1]
        scores = total / scores.shape[1]
    B, H, S = scores.shape
    n = out.shape[2]
    positions = torch.arange(S, device=scores.device)
    whole = torch.full((B,), S, device=scores.device)
    lengths = (whole if lengths is None else lengths.long())[:, None, None]
    kept = (whole.clamp(max=n) if keep_lengths is None else keep_lengths.long())[:, None, None]
    sinks = kept.clamp(max=sink)  # a row that cannot keep sink + recent tokens keeps its sinks first
    recents = torch.minimum(kept - sinks, torch.tensor(recent, device=scores.device))

    # 0: protected, 1: a score, 2: NaN, 3: no token. Inside a class the better score first, then the lower index.
    rank = torch.where(scores.isnan(), 2, 1)
    rank = torch.where((positions < sinks) | (positions >= lengths - recents), 0, rank)
    rank = torch.where(positions >= lengths, 3, rank)
    order = scores.masked_fill(scores.isnan(), 0.0).sort(dim=-1, descending=True, stable=True)[1]
    order = order.gather(-1, rank.gather(-1, order).sort(dim=-1, stable=True)[1])

    chosen = order[..., :n].masked_fill(torch.arange(n, device=scores.device) >= kept, S).sort(-1)[0]
    out.copy_(chosen.masked_fill(chosen == S, -1))


def fill_holes(indices: Tensor, out: Tensor) -> None:
    """The token of each slot when as few rows as possible move: kept tokens among the first (kept) slots stay, and
    those beyond fill the holes, both in ascending order."""
    B, H, n = indices.shape
    for b in range(B):
        for h in range(H):
            kept = indices[b, h][indices[b, h] >= 0]
            stay = kept[kept < len(kept)]
            is_hole = torch.ones(len(kept), dtype=torch.bool, device=indices.device)
            is_hole[stay] = False
            out[b, h] = -1
            out[b, h, stay] = stay
            out[b, h, : len(kept)][is_hole] = kept[len(stay) :]


def _gather_rows(rows: Tensor, slots: Tensor) -> Tensor:
    """[B, H, n, D]: row slots[j] of every head (row 0 for padding)."""
    return rows.gather(2, slots.clamp(min=0)[..., None].expand(-1, -1, -1, rows.shape[3]))


def _as_bytes(rows: Tensor) -> Tensor:
    """torch has no gather for float8; its rows move as bytes."""
    return rows.view(torch.uint8) if rows.element_size() == 1 else rows


def move_rows(keys: Tensor, values: Tensor, slots: Tensor, ordered: bool) -> None:
    """In place: slot j of every head gets row slots[j]; -1 leaves the slot as it is. `ordered` changes nothing here."""
    for rows in (_as_bytes(keys), _as_bytes(values)):
        front = rows[:, :, : slots.shape[2]]
        front.copy_(torch.where(slots[..., None] >= 0, _gather_rows(rows, slots), front))


def copy_rows(keys: Tensor, values: Tensor, slots: Tensor, out_keys: Tensor, out_values: Tensor) -> None:
    """Slot j of every head of the outputs gets row slots[j]; -1 gets zeros."""
    for rows, out in ((keys, out_keys), (values, out_values)):
        rows, out = _as_bytes(rows), _as_bytes(out)
        out.copy_(_gather_rows(rows, slots).masked_fill(slots[..., None] < 0, 0))
