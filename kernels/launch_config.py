"""Launch configurations: frozen dataclasses from pure functions of shape and device.

Every number carries its reason. Nothing here depends on the sequence length in a way that reaches a
`tl.constexpr`: tile sizes follow head_dim and element size alone, so a new length never compiles.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

# An H100 has 132. CPU tensors (Triton's interpreter, the compile-only tests) launch what an H100 would.
_CPU_STANDS_FOR = 132


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors (CUDA), compute units (ROCm) or subslices (XPU) of `device`."""
    if device.type == "cpu":
        return _CPU_STANDS_FOR
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count


def cdiv(a: int, b: int) -> int:
    """Division rounded up. (triton.cdiv does the same but traces through a constexpr wrapper.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class ScoreConfig:
    """Tiles of `block_tokens`; each row is split into `splits` runs of `chunk` tokens, one program each."""

    block_dim: int
    block_tokens: int
    splits: int
    chunk: int
    num_warps: int
    stages: int  # tiles on their way, and the one that is computed


SHORT_ROW = 512  # tokens


def score_config(
    rows: int, tokens: int, head_dim: int, element_size: int, multiprocessors: int, two_passes: bool
) -> ScoreConfig:
    """two_passes: the second pass needs a whole row's first; where `splits` is 1, both can be one launch."""
    block_dim = next_power_of_2(head_dim)
    # 4,096 float32 elements over 128 threads: 32 accumulator registers each, 8 KiB of bf16.
    block_tokens = max(4096 // block_dim, 4)
    # Three tiles of bf16 on their way are 24 KiB a program, four of float8 16.
    stages = 5 if element_size == 1 else 4
    # One launch with 16 warps on a row, two such programs to a multiprocessor, beats two launches up to 512 tokens:
    # 5.0 against 7.6 µs at 256, 7.5 at 512, 13.5 at 1,024. Tiles twice as high, because three as high as the threads
    # would be 96 KiB of bf16 and not fit in float32.
    if two_passes and tokens <= SHORT_ROW and rows <= 2 * multiprocessors:
        return ScoreConfig(block_dim, 2 * block_tokens, 1, tokens, 16, stages)
    # Four programs on every multiprocessor have 96 KiB under way, where an H100 asks for 14 (latency times bandwidth,
    # idle) to 64 (under load), and fit beside each other with up to 128 registers a thread: one wave. Rounded down,
    # because a few programs left over cost a wave of their own. With eight, the programs of 8 rows of 32K would read
    # as much of partial sums (of raw keys: from L2, splits² · 4D bytes a row) as of K: 28.6 µs instead of 22.4.
    # In a shorter row these are at most half of K, and a run is at least 128 tokens: with three of its four tiles under
    # way from the start, a shorter one would gain nothing.
    splits = max(1, min(4 * multiprocessors // rows, tokens // 128, math.isqrt(tokens * element_size // 8)))
    chunk = cdiv(cdiv(tokens, splits), block_tokens) * block_tokens
    return ScoreConfig(block_dim, block_tokens, cdiv(tokens, chunk), chunk, 4, stages)


@dataclass(frozen=True)
class SelectConfig:
    """`held` > 0: one program holds all keys of a row. Otherwise `splits` runs of `chunk` tokens, a program each."""

    held: int
    splits: int
    chunk: int
    # 8 scores a thread of 256: a step of 4,096 would need more than 128 registers, and two rows not fit on a
    # multiprocessor.
    block: int = 2048
    num_warps: int = 8


MAX_SELECT_SPLITS = 32  # every program adds up the 256 counts of all runs, 16 loads at a time


def select_config(rows: int, tokens: int, multiprocessors: int) -> SelectConfig:
    if tokens <= 8192:
        held = 4096 if tokens <= 4096 else 8192
        # A multiprocessor to itself, a row has 512 threads, and up to 4,096 tokens are written from registers too: 4.5
        # instead of 6.5 µs for 8 rows. Otherwise two rows of 256 threads, 32 keys each at most, run beside each other.
        if rows <= multiprocessors:
            return SelectConfig(held, 1, tokens, block=4096, num_warps=16)
        return SelectConfig(held, 1, tokens)
    # 64 keys for each of 512 threads fill a multiprocessor's registers: a row on each of them takes 37 µs, whatever its
    # length. In runs a row of 32,768 takes all of them 0.75 µs, a shorter one less, so this pays for many long rows.
    much = rows * tokens >= 12288 * multiprocessors
    if tokens <= 32768 and much:
        return SelectConfig(32768, 1, tokens, num_warps=16)
    # All programs of a launch that waits at barriers must run at once: one of 512 threads on each multiprocessor, or
    # two of 256, with 128 of its 65,536 registers a thread at most, which select_topk.py asks of the compiler. Two wait
    # less for each tile, and have twice the runs, whose counts every program adds up: 23.1 instead of 21.3 µs for 8
    # rows of 131,072, but 139 instead of 182 for 1,048,576. Of more rows than half the multiprocessors one would leave
    # some without work: 37 instead of 25 µs for 72 rows of 16,384.
    fit, num_warps = (2, 8) if much or 2 * rows > multiprocessors else (1, 16)
    wanted = max(1, min(fit * multiprocessors // rows, MAX_SELECT_SPLITS))
    chunk = cdiv(cdiv(tokens, wanted), SelectConfig.block) * SelectConfig.block
    return SelectConfig(0, cdiv(tokens, chunk), chunk, num_warps=num_warps)


MAX_RANK_SPLITS = 32  # every program adds up what all runs of its row keep, in one load


@dataclass(frozen=True)
class RanksConfig:
    """Each row is cut into `splits` runs of `chunk` tokens, one program each, `block` tokens at a time."""

    splits: int
    chunk: int
    block: int = 2048  # 8 scores a thread, and as many numbers of 8 bytes
    num_warps: int = 8


def ranks_config(rows: int, tokens: int, multiprocessors: int) -> RanksConfig:
    # Nobody waits for others: as many programs as are on the device at once, four of 256 threads on a multiprocessor. A
    # program ends with 256 additions to the row's counts, so a run is a block at least.
    wanted = max(1, min(4 * multiprocessors // rows, MAX_RANK_SPLITS))
    chunk = cdiv(cdiv(tokens, wanted), RanksConfig.block) * RanksConfig.block
    return RanksConfig(cdiv(tokens, chunk), chunk)


@dataclass(frozen=True)
class FillConfig:
    """`block` slots at a time; each row is cut into runs of `chunk` slots, one program each."""

    chunk: int
    block: int = 256  # one histogram bin per slot, and its cost grows with the bins


def fill_config(rows: int, slots: int, multiprocessors: int) -> FillConfig:
    block = FillConfig.block
    # A program starts with searches in its row, chains of loads that its blocks share: as many programs as are on the
    # device at once, 8 of 128 threads on a multiprocessor, and no more.
    programs = max(1, min(cdiv(slots, block), 8 * multiprocessors // rows))
    return FillConfig(cdiv(cdiv(slots, block), programs) * block)


@dataclass(frozen=True)
class MoveConfig:
    """`block_rows` rows of K and of V per program, all of them in registers between load and store."""

    block_rows: int
    block_dim: int
    block_value_dim: int
    num_warps: int


@functools.cache
def move_config(
    head_dim: int, value_dim: int, element_size: int, access: int = 16, ordered: bool = False, backend: str = "cuda"
) -> MoveConfig:
    """access: bytes that one load may have. ordered: in place, with a barrier between a program's loads and stores."""
    block_dim, block_value_dim = next_power_of_2(head_dim), next_power_of_2(value_dim)
    # 32 KiB over 128 threads: 64 registers of data each, 16 loads of 16 bytes in flight per thread.
    rows = (32 * 1024) // ((block_dim + block_value_dim) * element_size)
    # At least 8, whatever head_dim; at most 128, an index a thread. tl.arange wants a power of two.
    block_rows = next_power_of_2(max(8, min(rows, 128)) // 2 + 1)
    if ordered and backend == "hip":
        # The barrier does not wait there for the loads of the waves that meet at it (compact_kv.py): one wave, 64
        # threads, and as much data for each of them.
        return MoveConfig(block_rows // 4, block_dim, block_value_dim, num_warps=1)
    # A load of fewer than 4 bytes takes a register of its own all the same: fewer rows.
    block_rows //= max(4 // access, 1)
    # Where 8 rows fill it, a paged row's address (two of them) no longer fits beside: half the data a thread.
    return MoveConfig(block_rows, block_dim, block_value_dim, num_warps=4 if rows > 8 else 8)


def head_chunk(head_dim: int, element_size: int) -> int:
    """Columns per tl.dot: a power of two of at least 16, which tl.dot asks for."""
    if element_size == 4:
        return 32  # no tensor cores: both operands of a chunk sit in registers
    if head_dim <= 256:
        return max(next_power_of_2(head_dim), 16)  # the whole head: one operand is loaded once and stays
    return 64  # divides 320, 512 and 576, the head_dims in use beyond 256


def pipeline_stages(head_dim: int, chunk: int) -> int:
    """Three tiles in flight hide the latency of a load; a head in chunks has as many loads in one step already, and
    three stages of all of them would not fit shared memory."""
    return 3 if head_dim <= chunk else 1


@dataclass(frozen=True)
class AttentionConfig:
    """Tiles of `block_rows` query rows (a row is one query of one head of the group) by `block_tokens` keys."""

    block_dim: int
    block_rows: int
    block_tokens: int
    num_warps: int
    num_stages: int
    splits: int = 1
    chunk: int = 0

    @property
    def tiles(self) -> dict[str, int]:
        """What a launch is given by name."""
        blocks = dict(BLOCK_D=self.block_dim, BLOCK_R=self.block_rows, BLOCK_S=self.block_tokens)
        return dict(**blocks, num_warps=self.num_warps, num_stages=self.num_stages)


def lse_config(
    rows: int, query_rows: int, tokens: int, head_dim: int, element_size: int, multiprocessors: int
) -> AttentionConfig:
    block_dim = head_chunk(head_dim, element_size)
    # 128 rows and two warp groups, 32 logits a thread; half of that each way for a head_dim twice as wide. float32
    # keeps its operands in registers: 16 logits a thread at most.
    wide = element_size < 4 and block_dim <= 128
    most_rows = 128 if wide else 64 if element_size < 4 else 32
    block_rows = 16 if query_rows <= 16 else most_rows  # one size for a decode step, one for everything else
    block_tokens = 64 if wide else 32 if element_size < 4 else 2 * block_rows
    # A short window alone cannot fill the device: its keys are split, at least 512 to a program, and merged.
    programs = rows * cdiv(query_rows, block_rows)
    splits = max(1, min(cdiv(2 * multiprocessors, programs), tokens // 512, 128))
    chunk = cdiv(cdiv(tokens, splits), block_tokens) * block_tokens
    num_warps = 8 if block_rows == 128 else 4
    num_stages = pipeline_stages(head_dim, block_dim)
    return AttentionConfig(block_dim, block_rows, block_tokens, num_warps, num_stages, cdiv(tokens, chunk), chunk)


def mass_config(query_rows: int, head_dim: int, element_size: int) -> AttentionConfig:
    block_dim = head_chunk(head_dim, element_size)
    # The keys stay in shared memory (32 KiB at head_dim 128 and at 256 in 16 bits) while the queries stream past.
    # 128 × 64 float32 over two warp groups: 32 registers of logits and 32 of sums a thread. Less as above.
    wide = element_size < 4 and block_dim <= 128
    block_tokens, most_rows = (128, 64) if wide else (64, 32) if element_size < 4 else (32, 32)
    block_rows = 16 if query_rows <= 16 else most_rows
    num_stages = pipeline_stages(head_dim, block_dim)
    return AttentionConfig(block_dim, block_rows, block_tokens, 8 if wide else 4, num_stages)


def peaks_config(query_rows: int, head_dim: int, element_size: int) -> AttentionConfig:
    block_dim = head_chunk(head_dim, element_size)
    # 64 × 32 float32 over 4 warps: 16 registers each of logits, of their average and of its maximum.
    block_tokens = 64 if element_size < 4 else 32
    return AttentionConfig(block_dim, 16 if query_rows <= 16 else 32, block_tokens, 4, 1)


def product_config(head_dim: int, element_size: int, matrices: int) -> AttentionConfig:
    """Of a block of tokens' rows and `block_rows` rows of one or two matrices at a time."""
    block_dim = head_chunk(head_dim, element_size)
    # 64 × 64 float32 products over 4 warps: 32 registers a thread. float32 runs without tensor cores, its operands in
    # registers: half the tile each way.
    block = 64 if element_size < 4 else 32
    # The tokens' rows and two tiles under way are 48 KiB at head_dim 128 in 16 bits, 64 with half the rows of two
    # matrices: what the smallest multiprocessors have.
    num_stages = 2 if head_dim <= min(block_dim, 128) else 1
    return AttentionConfig(block_dim, block // matrices, block, 4, num_stages)


def window_mass_config(
    rows: int, query_rows: int, tokens: int, head_dim: int, element_size: int, multiprocessors: int
) -> AttentionConfig | None:
    """None: the queries are more than one tile, or a tile cannot be held: a head in chunks, and so float32."""
    block_dim = head_chunk(head_dim, element_size)
    sizes = (16, 128, 256) if block_dim <= 128 else (16, 64)  # at most 64 KiB
    block_rows = next((size for size in sizes if query_rows <= size), None)
    if head_dim > block_dim or block_rows is None:
        return None
    # Keys of 16 KiB a tile, three of them under way; 64 registers of weights a thread at most.
    block_tokens = 64 if block_dim <= 128 else 32
    # Two programs fit a multiprocessor; under 256 tokens a program's queries cost more than its keys.
    splits = max(1, min(cdiv(2 * multiprocessors, rows), tokens // 256))
    chunk = cdiv(cdiv(tokens, splits), block_tokens) * block_tokens
    num_warps = 8 if block_rows >= 128 else 4
    return AttentionConfig(block_dim, block_rows, block_tokens, num_warps, 3, cdiv(tokens, chunk), chunk)


@dataclass(frozen=True)
class DecodeConfig:
    """One program per run of `chunk` tokens, per `block_rows` query rows and `block_value_dim` columns of V."""

    block_dim: int
    block_value_dim: int
    block_rows: int
    block_tokens: int
    num_stages: int
    splits: int
    chunk: int
    num_warps: int = 4


MAX_DECODE_SPLITS = 128  # the partial results of a row are merged by one program, 32 at a time


def decode_config(
    rows: int,
    query_rows: int,
    tokens: int,
    head_dim: int,
    value_dim: int,
    element_size: int,
    multiprocessors: int,
    ragged: bool = False,
) -> DecodeConfig:
    """query_rows: W queries of G heads, for each (batch, KV head). ragged: `tokens` is the most that a row may have."""
    block_dim = head_chunk(head_dim, element_size)
    # A wider V is cut into columns for several programs, which share K through L2: no accumulator spills.
    block_value_dim = min(max(next_power_of_2(value_dim), 16), 256)
    # 32 rows of 128 sums over 128 threads: 32 registers of them each, beside as many of logits and weights (64 rows
    # spill); float32 operands want registers as well. At least 16, tl.dot's least; one size for a decode step, one for
    # everything longer.
    most_rows = 32 if element_size < 4 else 16
    block_rows = 16 if query_rows <= 16 else most_rows
    # K and V tiles of 16 KiB each in 16 bits: three stages of both fit beside each other.
    block_tokens = max(16, min(64, 16 * 1024 // (max(block_dim, block_value_dim) * max(element_size, 2))))
    # Two programs on every multiprocessor; under 256 tokens a program's start costs more than its loads. Only runs that
    # hold tokens count: of rows whose longest has three times the mean a third.
    programs = (6 if ragged else 2) * multiprocessors
    wanted = cdiv(programs, rows * cdiv(query_rows, block_rows) * cdiv(value_dim, block_value_dim))
    splits = max(1, min(wanted, tokens // 256, MAX_DECODE_SPLITS))
    chunk = cdiv(cdiv(tokens, splits), block_tokens) * block_tokens
    num_stages = pipeline_stages(head_dim, block_dim)
    return DecodeConfig(block_dim, block_value_dim, block_rows, block_tokens, num_stages, cdiv(tokens, chunk), chunk)
