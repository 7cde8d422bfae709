"""Compaction: move the kept rows of K and V to the front of each head, in place or into new tensors.

    fill_holes_kernel   [B, H, n] int64: for the fewest moves, which token ends up in which slot
    move_rows_kernel    slot j of every head gets the row of token slots[j]

Shapes: keys [B, H, S, D], values [B, H, S, Dv], dense or paged (rows.py); slots [B, H, n] int64, -1 for padding. Rows
move as they are, byte for byte; a row already in its slot does not move. Paged rows may move to a request's end
instead: slots are then counted back from it.
Bytes per row of n slots, m of them moved: (D + Dv)·e·2m, and 8·n to 24·n of indices.

In place, order kept. Slot j never lies after its source, but the slots that a program writes are the sources of
other programs. Every program loads its rows into registers, signals that it has read them, and stores only once the
programs whose sources it overwrites have signalled. Those are all earlier blocks of the same head, at most two, and
they signal before they wait, so nothing can wait in a circle. A block's number comes from an atomic ticket, so an
earlier block is one that has already started: no co-residency is needed, and it runs in the interpreter.

In place, fewest moves. The kept tokens beyond the first n fill the holes among the first n: sources and slots are
disjoint, so nothing waits.

Launch: one program per block of slots and head, heads fastest, so that a block's predecessors are long under way.
"""

import torch
import triton
import triton.language as tl

from .launch_config import cdiv, move_config
from .primitives import count_below
from .rows import load_rows, per_row, row_length, rows_at, rows_of

_LENGTH_DEPENDENT = ["n", "H", "rows", "blocks", "slots_stride_b", "slots_stride_h"]
_AFTER_ALL = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT)
def fill_holes_kernel(
    indices_ptr, slots_ptr, n, H, rows, slots_stride_b, slots_stride_h, BLOCK: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) % rows).to(tl.int64)
    block = tl.program_id(0) // rows
    indices_ptr += row // H * slots_stride_b + row % H * slots_stride_h
    kept = count_below(indices_ptr, n, _AFTER_ALL)
    in_front = count_below(indices_ptr, n, kept)  # tokens that are in one of the first `kept` slots already

    # A slot is a hole if its own token is not kept. Its rank among the holes names the token that fills it.
    first_slot = block * BLOCK
    slots = first_slot + tl.arange(0, BLOCK)
    before = count_below(indices_ptr, n, first_slot)
    candidates = before + tl.arange(0, BLOCK)
    tokens = tl.load(indices_ptr + candidates, mask=candidates < in_front, other=-1)
    here = (tokens >= first_slot) & (tokens < first_slot + BLOCK)
    stays = tl.histogram((tokens - first_slot).to(tl.int32), BLOCK, mask=here)
    hole_rank = slots - (before + tl.cumsum(stays, 0) - stays)
    hole = (stays == 0) & (slots < kept)
    filler = tl.load(indices_ptr + in_front + hole_rank, mask=hole, other=-1)
    source = tl.where(stays == 1, slots.to(tl.int64), filler)
    tl.store(slots_ptr + row * n + slots, source, mask=slots < n)


@triton.jit
def _store_rows(rows, b, h, tokens, data, writes, columns):
    mask = writes[:, None] & (columns < rows.width)[None, :]
    tl.store(rows_at(rows, b, h, tokens, writes)[:, None] + columns[None, :], data, mask=mask)


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT)
def move_rows_kernel(
    keys, values, new_keys, new_values, slots_ptr, ends, flags_ptr, n, H, rows, blocks, slots_stride_b, slots_stride_h,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
    IN_PLACE: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    if IN_PLACE and ORDERED:
        ticket = tl.atomic_add(flags_ptr, 1)
    else:
        ticket = tl.program_id(0)
    row = (ticket % rows).to(tl.int64)
    block = ticket // rows
    b, h = row // H, row % H
    slots_ptr += b * slots_stride_b + h * slots_stride_h
    slots = block * BLOCK_R + tl.arange(0, BLOCK_R)
    sources = tl.load(slots_ptr + slots, mask=slots < n, other=-1)
    moves = sources >= 0
    if IN_PLACE:
        moves = moves & (sources != slots)
        writes = moves
    else:
        writes = slots < n  # padding is written as zeros: new memory holds nothing worth keeping
    columns, value_columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)

    if ends is None:
        tokens, new_tokens = sources, slots
    else:  # slots are counted from the request's end: the same order of moves, mirrored
        end = row_length(ends, b, h, 0) - 1
        tokens, new_tokens = end - sources, end - slots
    key = load_rows(keys, rows_at(keys, b, h, tokens, moves), moves, columns)
    value = load_rows(values, rows_at(values, b, h, tokens, moves), moves, value_columns)

    if IN_PLACE and ORDERED:
        row_flags_ptr = flags_ptr + 1 + row * blocks
        tl.debug_barrier()  # all threads have read
        tl.atomic_xchg(row_flags_ptr + block, 1, sem="release")
        # Sources in [block·R, block·R + R) belong to slots from `reader` on: R of them at most, so two blocks.
        reader = count_below(slots_ptr, n, block * BLOCK_R)
        for other in range(reader // BLOCK_R, tl.minimum((reader + BLOCK_R - 1) // BLOCK_R + 1, block)):
            has_read = tl.atomic_add(row_flags_ptr + other, 0, sem="acquire")
            while has_read == 0:
                has_read = tl.atomic_add(row_flags_ptr + other, 0, sem="acquire")

    _store_rows(new_keys, b, h, new_tokens, key, writes, columns)
    _store_rows(new_values, b, h, new_tokens, value, writes, value_columns)


def _as_bytes(rows: torch.Tensor) -> torch.Tensor:
    """Rows of float8 as their bytes: moving needs no arithmetic, and not every device has the type."""
    return rows.view(torch.uint8) if rows.element_size() == 1 else rows


def _launch_move(keys, values, slots, new_keys, new_values, in_place: bool, ordered: bool, table=None, ends=None):
    (B, H, n), D, DV = slots.shape, keys.shape[3], values.shape[3]
    config = move_config(D, DV, keys.element_size())
    blocks = cdiv(n, config.block_rows)
    flags = None
    if in_place and ordered:  # the ticket, then one flag per block
        flags = torch.zeros(1 + B * H * blocks, dtype=torch.int32, device=keys.device)
    old = (rows_of(_as_bytes(keys), table), rows_of(_as_bytes(values), table))
    new = old if in_place else (rows_of(_as_bytes(new_keys)), rows_of(_as_bytes(new_values)))
    move_rows_kernel[(B * H * blocks,)](
        *old, *new, slots, per_row(ends), flags, n, H, B * H, blocks, *slots.stride()[:2],
        BLOCK_D=config.block_dim, BLOCK_DV=config.block_value_dim, BLOCK_R=config.block_rows,
        IN_PLACE=in_place, ORDERED=ordered, num_warps=config.num_warps,
    )  # fmt: skip


def fill_holes(indices: torch.Tensor, out: torch.Tensor) -> None:
    """Fill out [B, H, n] with the token of each slot when kept tokens among the first n slots stay there and the
    others, in order, fill the holes. indices [B, H, n] int64 ascending, -1 padding last."""
    B, H, n = indices.shape
    BLOCK = 256  # one histogram bin per slot, and its cost grows with the bins
    fill_holes_kernel[(B * H * cdiv(n, BLOCK),)](indices, out, n, H, B * H, *indices.stride()[:2], BLOCK=BLOCK)


def move_rows(
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    ordered: bool,
    table: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
) -> None:
    """In place: slot j of every head gets row slots[j]; -1 leaves the slot as it is.

    ordered: slots ascend. Otherwise no row that moves may come from a slot that is written (fill_holes's output).
    table: keys and values are paged. ends [B]: slots and the rows they name are counted back from these lengths.
    """
    _launch_move(keys, values, slots, keys, values, in_place=True, ordered=ordered, table=table, ends=ends)


def copy_rows(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, out_keys: torch.Tensor, out_values: torch.Tensor
) -> None:
    """Slot j of every head of out_keys [B, H, n, D] and out_values [B, H, n, Dv] gets row slots[j]; -1 gets zeros."""
    _launch_move(keys, values, slots, out_keys, out_values, in_place=False, ordered=True)
