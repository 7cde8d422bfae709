"""Compaction: move the kept rows of K and V to the front of each head, in place or into new tensors.

    from_end_kernel     [B, H, n] int64: the slots counted back from the end, and the tokens in them
    fill_holes_kernel   [B, H, n] int64: for the fewest moves, which token ends up in which slot
    move_rows_kernel    slot j of every head gets the row of token slots[j]

Shapes: keys [B, H, S, D], values [B, H, S, Dv], dense or paged (rows.py), also one where the rows come from and the
other where they go; slots [B, H, n] int64, -1 for padding. Rows move as they are, byte for byte; a row already in its
slot does not move. Paged rows may move to a request's end instead: slots are then counted back from it.
Bytes per row of n slots, m of them moved: (D + Dv)·e·2m, and 8·n to 24·n of indices.

In place, order kept. Slot j never lies after its source, but the slots that a program writes are the sources of
other programs. Every program loads its rows into registers, signals that it has read them, and stores only once the
programs whose sources it overwrites have signalled. Those are all earlier blocks of the same head, at most two, and
they signal before they wait, so nothing can wait in a circle. A block's number comes from an atomic ticket, so an
earlier block is one that has already started: no co-residency is needed, and it runs in the interpreter.

That all threads of a program have read when it signals: on NVIDIA the barrier orders their loads before thread 0's
release, and release is cumulative (PTX causality order). On AMD a wave may pass s_barrier with loads under way, and the
s_waitcnt of the release is that of one wave: there a program is one wave (launch_config.py).

In place, fewest moves. The kept tokens beyond the first n fill the holes among the first n: sources and slots are
disjoint, so nothing waits.

Launch: one program per block of slots and head, heads fastest, so that a block's predecessors are long under way.
fill_holes: one per run of blocks, no more than the device holds at once.
"""

import torch
import triton
import triton.language as tl

from .launch_config import cdiv, fill_config, move_config, multiprocessors
from .primitives import backend, count_below
from .rows import Rows, load_rows, per_row, row_length, rows_at, rows_of

_LENGTH_DEPENDENT = ["n", "H", "rows", "blocks", "chunk", "slots_stride_b", "slots_stride_h"]
_AFTER_ALL = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit(do_not_specialize=[*_LENGTH_DEPENDENT, "splits"])
def from_end_kernel(
    indices_ptr, lengths, slots_ptr, n, H, splits, slots_stride_b, slots_stride_h, BLOCK: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) // splits).to(tl.int64)
    b, h = row // H, row % H
    indices_ptr += b * slots_stride_b + h * slots_stride_h
    kept = n
    if tl.load(indices_ptr + n - 1) < 0:
        kept = count_below(indices_ptr, n, _AFTER_ALL)
    slots = tl.program_id(0) % splits * BLOCK + tl.arange(0, BLOCK)
    tokens = tl.load(indices_ptr + kept - 1 - slots, mask=slots < kept, other=0)
    last = row_length(lengths, b, h, 0).to(tl.int64) - 1
    tl.store(slots_ptr + row * n + slots, tl.where(slots < kept, last - tokens, -1), mask=slots < n)


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT)
def fill_holes_kernel(
    indices_ptr, slots_ptr, n, H, rows, chunk, slots_stride_b, slots_stride_h, BLOCK: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) % rows).to(tl.int64)
    begin = tl.program_id(0) // rows * chunk
    indices_ptr += row // H * slots_stride_b + row % H * slots_stride_h
    kept = n
    if tl.load(indices_ptr + n - 1) < 0:  # most rows have no padding, and their count needs no search
        kept = count_below(indices_ptr, n, _AFTER_ALL)
    in_front = count_below(indices_ptr, n, kept)  # tokens that are in one of the first `kept` slots already
    before = count_below(indices_ptr, n, begin)

    # A slot is a hole if its own token is not kept. Its rank among the holes names the token that fills it.
    for first_slot in range(begin, tl.minimum(begin + chunk, n), BLOCK):
        slots = first_slot + tl.arange(0, BLOCK)
        candidates = before + tl.arange(0, BLOCK)
        tokens = tl.load(indices_ptr + candidates, mask=candidates < in_front, other=-1)
        here = (tokens >= first_slot) & (tokens < first_slot + BLOCK)
        stays = tl.histogram((tokens - first_slot).to(tl.int32), BLOCK, mask=here)
        hole_rank = slots - (before + tl.cumsum(stays, 0) - stays)
        hole = (stays == 0) & (slots < kept)
        filler = tl.load(indices_ptr + in_front + hole_rank, mask=hole, other=-1)
        source = tl.where(stays == 1, slots.to(tl.int64), filler)
        tl.store(slots_ptr + row * n + slots, source, mask=slots < n)
        before += tl.sum(stays, 0)


@triton.jit
def _store_rows(rows, b, h, tokens, data, writes, columns):
    mask = writes[:, None] & (columns < rows.width)[None, :]
    tl.store(rows_at(rows, b, h, tokens, writes)[:, None] + columns[None, :], data, mask=mask)


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT)
def move_rows_kernel(
    keys, values, key_scales, value_scales, new_keys, new_values, slots_ptr, ends, flags_ptr,
    n, H, rows, blocks, slots_stride_b, slots_stride_h,
    IN_PLACE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # new_keys, new_values: None in place, which Triton 3.6 cannot ask of a tuple that has a None in it. flags: None
    # where no program waits for another.
    if flags_ptr is None:
        ticket = tl.program_id(0)
    else:
        ticket = tl.atomic_add(flags_ptr, 1, sem="relaxed")  # nothing is handed over with it
    row = (ticket % rows).to(tl.int64)
    block = ticket // rows
    b, h = row // H, row % H
    slots_ptr += b * slots_stride_b + h * slots_stride_h
    slots = block * BLOCK_R + tl.arange(0, BLOCK_R)
    sources = tl.load(slots_ptr + slots, mask=slots < n, other=-1)
    moves = sources >= 0
    if IN_PLACE:
        moves = moves & (sources != slots)
    columns, value_columns, one_column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, 1)

    if ends is None:
        tokens, new_tokens = sources, slots
    else:  # slots are counted from the request's end: the same order of moves, mirrored
        end = row_length(ends, b, h, 0) - 1
        tokens, new_tokens = end - sources, end - slots
    key = load_rows(keys, rows_at(keys, b, h, tokens, moves), moves, columns)
    value = load_rows(values, rows_at(values, b, h, tokens, moves), moves, value_columns)
    if key_scales is not None:
        key_scale = load_rows(key_scales, rows_at(key_scales, b, h, tokens, moves), moves, one_column)
        value_scale = load_rows(value_scales, rows_at(value_scales, b, h, tokens, moves), moves, one_column)

    if flags_ptr is not None:
        # Sources in [block·R, block·R + R) belong to slots from `reader` on: R of them at most, so two blocks. The
        # search does not need the rows, so it runs while they are loaded.
        reader = count_below(slots_ptr, n, block * BLOCK_R)
        row_flags_ptr = flags_ptr + 1 + row * blocks
        tl.debug_barrier()  # all threads have read: see above for what that takes
        tl.atomic_xchg(row_flags_ptr + block, 1, sem="release")
        for other in range(reader // BLOCK_R, tl.minimum((reader + BLOCK_R - 1) // BLOCK_R + 1, block)):
            has_read = tl.atomic_add(row_flags_ptr + other, 0, sem="acquire")
            while has_read == 0:
                has_read = tl.atomic_add(row_flags_ptr + other, 0, sem="acquire")

    if IN_PLACE:
        _store_rows(keys, b, h, new_tokens, key, moves, columns)
        _store_rows(values, b, h, new_tokens, value, moves, value_columns)
        if key_scales is not None:
            _store_rows(key_scales, b, h, new_tokens, key_scale, moves, one_column)
            _store_rows(value_scales, b, h, new_tokens, value_scale, moves, one_column)
    else:
        writes = moves
        if new_keys.table is None:
            writes = slots < n  # padding is written as zeros: new memory holds nothing worth keeping
        _store_rows(new_keys, b, h, new_tokens, key, writes, columns)
        _store_rows(new_values, b, h, new_tokens, value, writes, value_columns)


def _byte_rows(rows: torch.Tensor, table: torch.Tensor | None) -> Rows:
    """Rows of float8 as their bytes: moving needs no arithmetic, and not every device has the type."""
    return rows_of(rows.view(torch.uint8) if rows.element_size() == 1 else rows, table)


def _launch_move(keys, values, slots, new=(None, None), scales=(None, None), ends=None, flags=None) -> None:
    """keys, values, new and scales are Rows or None."""
    B, H, n = slots.shape
    size = keys.ptr.element_size()
    access = size * min(rows.align.value for rows in (keys, values, *new) if rows is not None)
    config = move_config(keys.width.value, values.width.value, size, access, flags is not None, backend())
    blocks = cdiv(n, config.block_rows)
    move_rows_kernel[(B * H * blocks,)](
        keys, values, *scales, *new, slots, per_row(ends), flags, n, H, B * H, blocks, *slots.stride()[:2],
        IN_PLACE=new[0] is None, BLOCK_D=config.block_dim, BLOCK_DV=config.block_value_dim, BLOCK_R=config.block_rows,
        num_warps=config.num_warps,
    )  # fmt: skip


def slots_from_end(indices: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor) -> None:
    """Fill out [B, H, n] with indices [B, H, n] counted back from the end of each row of `lengths` tokens, the last
    first, so that they ascend as well. Both int64, last dimension contiguous, -1 padding last."""
    B, H, n = indices.shape
    BLOCK = 512  # 4 indices a thread
    splits = cdiv(n, BLOCK)
    from_end_kernel[(B * H * splits,)](indices, per_row(lengths), out, n, H, splits, *indices.stride()[:2], BLOCK=BLOCK)


def fill_holes(indices: torch.Tensor, out: torch.Tensor) -> None:
    """Fill out [B, H, n] with the token of each slot when kept tokens among the first n slots stay there and the
    others, in order, fill the holes. indices [B, H, n] int64 ascending, last dimension contiguous, -1 padding last."""
    B, H, n = indices.shape
    config = fill_config(B * H, n, multiprocessors(indices.device))
    fill_holes_kernel[(B * H * cdiv(n, config.chunk),)](
        indices, out, n, H, B * H, config.chunk, *indices.stride()[:2], BLOCK=config.block
    )


def move_flags(slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> int:
    """How many flags an ordered `move_rows` of these takes at most: a function of shapes and dtype, on any device."""
    B, H, n = slots.shape
    sizes = (keys.shape[3], values.shape[3], keys.element_size())
    return 1 + B * H * cdiv(n, move_config(*sizes, ordered=True, backend="hip").block_rows)  # it moves the fewest rows


def move_rows(
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    ordered: bool,
    table: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    flags: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """In place: slot j of every head gets row slots[j]; -1 leaves the slot as it is.

    slots: [B, H, n] int64, last dimension contiguous.
    ordered: slots ascend. Otherwise no row that moves may come from a slot that is written (fill_holes's output).
    table: keys and values are paged. ends [B] or [B, H]: slots and the rows they name are counted back from these
        lengths.
    flags: `move_flags` zeros in int32, for ordered moves; they are used up. None makes them here, one launch more.
    key_scales, value_scales: both or neither; rows of one element, laid out as keys are, which move with the rows.
    """
    if not ordered:
        flags = None
    elif flags is None:
        flags = torch.zeros(move_flags(slots, keys, values), dtype=torch.int32, device=keys.device)
    elif flags.numel() < move_flags(slots, keys, values):
        raise ValueError(f"flags has {flags.numel()} elements: expected {move_flags(slots, keys, values)}")
    scales = tuple(None if x is None else rows_of(x, table) for x in (key_scales, value_scales))
    _launch_move(_byte_rows(keys, table), _byte_rows(values, table), slots, scales=scales, ends=ends, flags=flags)


def copy_rows(
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    out_keys: torch.Tensor,
    out_values: torch.Tensor,
    table: torch.Tensor | None = None,
    out_table: torch.Tensor | None = None,
) -> None:
    """Slot j of every head of the outputs gets row slots[j] of keys and values.

    slots: [B, H, n] int64, last dimension contiguous.
    table: keys and values are paged.
    out_keys, out_values: [B, H, n, D], [B, H, n, Dv], in which -1 gives zeros; or with out_table, paged: there a slot
        of -1 is not written, and needs no block.
    """
    new = (_byte_rows(out_keys, out_table), _byte_rows(out_values, out_table))
    _launch_move(_byte_rows(keys, table), _byte_rows(values, table), slots, new=new)
