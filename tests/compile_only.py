"""Compile exactly what the launchers would launch, for a GPU that is not there, and look at the machine code.

    python tests/compile_only.py sm_90 [--cross | --one]    # one JSON line per compiled kernel
    python tests/compile_only.py sm_90 --lengths [--paged]  # variants compiled for lengths 1 to 4096

Runs in a process of its own: it replaces Triton's driver, and TRITON_INTERPRET must not be set.
"""

import json
import re
import sys

import torch

from bench.machine_code import TARGETS, compile_only, summary


def waits_for_reads(assembly: str, waves: int) -> bool:
    """Whether in AMD's code all waves of a program have read their rows when it releases its flag.

    A barrier makes waves meet, but does not wait for their loads: each has to do so itself before it, and the wave that
    releases waits only for its own.
    """
    lines = [line.split("//")[0].strip() for line in assembly.splitlines()]
    release = max(i for i, line in enumerate(lines) if line.startswith("buffer_wbl2"))
    last_read = max(i for i, line in enumerate(lines[:release]) if re.match(r"(global|buffer|flat)_load", line))
    if waves == 1:
        met = next(i for i in range(release, len(lines)) if re.match(r"(global|flat)_(atomic|store)", lines[i]))
    else:
        met = max((i for i, line in enumerate(lines[:release]) if line == "s_barrier"), default=last_read)
    return any(re.match(r"s_waitcnt.*vmcnt\(0\)", line) for line in lines[last_read:met])


def cache(S: int, D: int, dtype: torch.dtype, offset: int = 0, B: int = 2, H: int = 4):
    """K and V; their rows begin `offset` elements into wider ones."""
    return tuple(torch.empty(B, H, S, D + offset, dtype=dtype)[..., offset:] for _ in range(2))


def launch_scores(S, D, dtype, offset=0):
    from kvevict.backends import triton as backend

    keys, _ = cache(S, D, dtype, offset)
    out = torch.empty(keys.shape[:3])
    lengths = torch.full((2,), S, dtype=torch.int32)
    backend.keydiff_scores(keys, None, True, None, out)
    backend.keydiff_scores(keys, None, False, lengths, out)
    backend.keydiff_scores(keys[:, :, :500], None, True, None, out[:, :, :500].contiguous())
    backend.keydiff_scores(keys, torch.empty(2, 4, D), False, None, out)
    backend.key_norm_scores(keys, None, out)


def launch_fitted(S, D, dtype, offset=0):
    from kvevict.backends import triton as backend

    keys, values = cache(S, D, dtype, offset)
    inv_freq, fitted, keydiff = torch.empty(D // 2), torch.empty(2, 4, S), torch.empty(2, 4, S)
    backend.kv_scores(keys, values, torch.empty(4, 2 * D + 4), inv_freq, None, None, fitted, keydiff)
    places, lengths = torch.empty(2, 4, S, dtype=torch.int64), torch.full((2,), S, dtype=torch.int32)
    backend.kv_scores(keys, None, None, inv_freq[: D // 4], places, lengths, None, keydiff)


def launch_select(S):
    from kvevict.backends import triton as backend

    lengths = torch.full((2,), S, dtype=torch.int64)
    n = max(S // 2, 1)
    for shared, ragged in ((False, False), (True, True)):
        out = torch.empty(2, 1 if shared else 4, n, dtype=torch.int64)
        extra = lengths if ragged else None
        backend.topk_indices(torch.empty(2, 4, S), extra, 1, 1, shared, extra, out)
    backend.evict_slots(torch.empty(2, 4, S), 0, 0, None, torch.empty(2, 4, 1, dtype=torch.int64))
    backend.pool_scores(torch.empty(2, 4, S), 5, True, 64, lengths, torch.empty(2, 4, S))
    if S <= 8192:
        backend.combine_ranks([torch.empty(2, 4, S)] * 2, [0.5, 0.5], lengths.int(), torch.empty(2, 4, S))


def launch_select_many(S):
    """Rows for every multiprocessor; and slots counted from the end."""
    from kvevict.backends import triton as backend

    lengths, slots = torch.full((2,), S, dtype=torch.int64), torch.empty(2, 4, S // 2, dtype=torch.int64)
    backend.topk_indices(torch.empty(2, 4, S), lengths, 1, 1, False, lengths, slots, None, True)
    backend.topk_indices(torch.empty(64, 4, S), None, 1, 1, False, None, torch.empty(64, 4, 1, dtype=torch.int64))


def launch_ranks(S):
    """The first digit, one more of the score, and one of the position."""
    from kvevict.backends import triton as backend

    scores, places = torch.empty(2, 4, S), torch.arange(S).expand(2, 4, S)
    limits, state = torch.empty(2, 4, dtype=torch.int64), torch.empty(2, 4, 5, dtype=torch.int64)
    bits = max(S - 1, 1).bit_length()
    counts, last = (torch.empty(2, 4, 2**width, dtype=torch.int32) for width in (8, (bits - 1) % 8 + 1))
    backend.count_digits(scores, places, limits, None, None, bits, 24 + bits, state, counts)
    backend.count_digits(scores, places, limits, state, counts, bits, 16 + bits, state, counts)
    backend.count_digits(scores, places, limits, state, counts, bits, 0, state, last)
    out, held = torch.empty(2, 4, max(S // 2, 1), dtype=torch.int64), torch.empty(2, 4, dtype=torch.int64)
    backend.kept_slots(scores, places, state, last, bits, out, held)


def launch_adaptive(S):
    from kvevict.backends import triton as backend

    backend.topk_adaptive(
        torch.empty(2, 4, S), S // 2, None, (1, 5), 1, 1, None, torch.empty(2, 4, S, dtype=torch.int64)
    )


def launch_moves(S, D, dtype, offset=0):
    from kvevict.backends import triton as backend

    keys, values = cache(S, D, dtype, offset)
    n = max(S // 2, 1)
    slots = torch.empty(2, 4, n, dtype=torch.int64)
    backend.fill_holes(slots, torch.empty_like(slots))
    backend.move_rows(keys, values, slots, True)
    backend.move_rows(keys, values, slots, False)
    backend.copy_rows(keys, values, slots, *cache(n, D, dtype, offset))


def launch_attention(S, D, dtype, offset=0):
    """The whole prompt, windows and a decode step, with a group of 4."""
    from kvevict.backends import triton as backend

    keys, values = cache(S, D, dtype, offset)
    out = torch.empty(2, 4, S)
    for W in sorted({S, min(S, 32), 1}):  # windows of one tile of 128 and 16 query rows; below, of 256
        queries, lse = torch.empty(2, 16, W, D, dtype=dtype), torch.empty(2, 16, W)
        backend.attention_lse(queries, keys, 0.1, True, None, lse)
        backend.attention_mass(queries, keys, None, 0.1, True, "mean", True, None, out)
    query = torch.empty(2, 16, 1, D, dtype=dtype)
    used = torch.empty(2, 4, S, dtype=torch.int32)
    result = torch.empty(2, 16, 1, D, dtype=torch.bfloat16 if dtype.itemsize == 1 else dtype)
    backend.decode_attention(query, keys, values, 0.1, None, out, 0.5, used, 7, 1e-3, result)


def launch_far(S, D, dtype, offset=0):
    """Far attention, of a window in one tile and of one in several."""
    from kvevict.backends import triton as backend

    keys, _ = cache(S, D, dtype, offset)
    for W in (32, 100):
        queries, lse = torch.empty(2, 16, W, D, dtype=dtype), torch.empty(2, 16, W)
        backend.attention_mass(queries, keys, lse, 0.1, True, "mean", True, None, torch.empty(2, 4, S), None, 32)


def launch_products(S, D, dtype, offset=0):
    from kvevict.backends import triton as backend

    keys, values = cache(S, D, dtype, offset)
    backend.quadratic_scores(keys, torch.empty(2, 16, D), torch.empty(2, 16, D, D), None, torch.empty(2, 16, S))
    weight = torch.empty(1000, 16 * D, dtype=torch.bfloat16 if dtype.itemsize == 1 else dtype)
    lengths = torch.full((2,), S, dtype=torch.int32)
    backend.projected_norms(values, weight, lengths, torch.empty(2, 4, S))
    queries, lse = torch.empty(2, 16, 32, D, dtype=dtype), torch.empty(2, 16, 32)
    backend.attention_peaks(queries, keys, lse, 0.1, 5, lengths, torch.empty(2, 4, S))


def launch_paged(S, D, dtype):
    """Every kernel that finds its rows through a block table: blocks of 16 tokens, [2, blocks, 16, heads, D]."""
    from kvevict.backends import triton as backend

    columns = -(-S // 16)
    keys, values = (x.transpose(1, 2) for x in torch.empty(2, 2 * columns, 16, 4, D, dtype=dtype))
    table, lengths = torch.empty(2, columns, dtype=torch.int32), torch.full((2,), S, dtype=torch.int32)
    for rows in (None, table):
        backend.check_rows(lengths, S, rows, keys.shape[0], 16, torch.empty(1, dtype=torch.bool))
    out = torch.empty(2, 4, columns * 16)
    backend.keydiff_scores(keys, None, True, lengths, out, table)
    backend.key_norm_scores(keys, lengths, out, table)
    inv_freq, places = torch.empty(D // 2), torch.empty(2, 4, columns * 16, dtype=torch.int64)
    weights = torch.empty(2, 4, 2 * D + 4)
    backend.kv_scores(keys, keys, weights, inv_freq, places, lengths, out, None, table)
    queries, lse = torch.empty(2, 16, 1, D, dtype=dtype), torch.empty(2, 16, 1)
    backend.attention_lse(queries, keys, 0.1, True, lengths, lse, table)
    mass = (0.1, True, "mean", True, lengths, out, table)
    backend.attention_mass(queries, keys, lse, *mass)
    rows, of_queries = torch.empty(40, 16, 1, D, dtype=dtype), torch.empty(2, 1, dtype=torch.int32)
    backend.attention_mass(rows, keys, None, *mass, 0, of_queries)
    result = torch.empty(2, 16, 1, D, dtype=torch.bfloat16 if dtype.itemsize == 1 else dtype)
    backend.decode_attention(queries, keys, values, 0.1, lengths, None, 1.0, None, 0, 0.0, result, table)
    kept, ok = torch.empty(2, dtype=torch.int64), torch.empty(1, dtype=torch.bool)
    for keep in (None, kept):
        backend.keep_counts(lengths, S, keep, 5 * 10**11, S, kept, ok)
    for from_end in (False, True):
        backend.left_blocks(table, lengths, kept, 16, from_end, lengths, table)
    slots = torch.empty(2, 4, max(S // 2, 1), dtype=torch.int64)
    backend.slots_from_end(slots, lengths, slots)
    backend.move_rows(keys, values, slots, True, table)
    backend.move_rows(keys, values, slots, True, table, lengths)


def launch_mlp(S, M, dtype):
    from kvevict.backends import triton as backend

    hidden, w1, b1 = (torch.empty(*shape, dtype=dtype) for shape in ((2, S, M), (M // 2, M), (M // 2,)))
    backend.mlp_scores(hidden, w1, b1, b1, b1[:1], torch.empty(2, S))


def at(*dims, dtype=torch.bfloat16, offset=0):
    """Cases of one dtype: what a launch_ function takes after S."""
    return [(D, dtype, offset) for D in dims]


# Every head_dim with every dtype of rows; a cross of what differs in code, the plainest first.
ROWS = [
    *(case for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
      for case in at(64, 80, 128, 256, dtype=dtype)),
    *at(72, 120), *at(128, offset=8), *at(128, dtype=torch.float8_e4m3fn, offset=16),
]  # fmt: skip
ROWS_CROSS = [*at(128, 120), *at(80, dtype=torch.float8_e4m3fn)]
TILES = [
    *at(64, 80, 128, 256, 576), *at(128, dtype=torch.float8_e4m3fn), *at(128, dtype=torch.float32), *at(72, 120),
    *at(128, offset=8),
]  # fmt: skip
TILES_CROSS = at(128, 120, 576)
LENGTHS, MANY = (4096, 8192, 16384, 131072, 1 << 20), (4096, 8192, 32768, 131072)  # of rows that are selected


def matrix(target: str, rows, tiles, paged, lengths=LENGTHS, many=MANY) -> None:
    case: dict = {}

    def report(launch):
        found = summary(launch.compiled)
        ordered = launch.kernel == "move_rows_kernel" and launch.arguments["flags_ptr"] is not None
        if ordered and "amdgcn" in launch.compiled.asm:
            found["waits_for_reads"] = waits_for_reads(launch.compiled.asm["amdgcn"], launch.warps)
        print(json.dumps({"kernel": launch.kernel, **case, **found}), flush=True)

    compile_only(TARGETS[target], report)
    for launch_one, cases in (
        (launch_scores, rows), (launch_fitted, rows), (launch_moves, rows), (launch_attention, tiles),
        (launch_far, tiles), (launch_products, tiles),
    ):  # fmt: skip
        for D, dtype, offset in cases:
            case.update(D=D, dtype=str(dtype).removeprefix("torch."), offset=offset)
            launch_one(4096, D, dtype, offset)
    for D in paged:
        case.update(D=D, dtype="bfloat16", offset=0, paged=True)
        launch_paged(4096, D, torch.bfloat16)
    case.clear()
    launch_mlp(4096, 576, torch.bfloat16)
    for S in lengths:
        launch_select(S)
    for S in many:
        launch_select_many(S)
    launch_adaptive(4096)
    launch_adaptive(16384)
    launch_ranks(131072)


def variants(target: str) -> None:
    compiled: dict[str, set] = {}
    compile_only(TARGETS[target], lambda launch: compiled.setdefault(launch.kernel, set()).add(launch.compiled.hash))
    paged = "--paged" in sys.argv
    every = [*range(1, 70), *range(70, 4097, 61), 96, 128, 256, 512, 1000, 1024, 2048, 4000, 4096]
    for S in every:
        if paged:
            launch_paged(S, 128, torch.bfloat16)
            continue
        launch_scores(S, 128, torch.bfloat16)
        launch_fitted(S, 128, torch.bfloat16)
        launch_select(S)
        launch_ranks(S)
        launch_moves(S, 128, torch.bfloat16)
        launch_attention(S, 128, torch.bfloat16)
        launch_products(S, 128, torch.bfloat16)
        launch_mlp(S, 576, torch.bfloat16)
    print(json.dumps({name: len(hashes) for name, hashes in compiled.items()}))


if __name__ == "__main__":
    if "--lengths" in sys.argv:
        variants(sys.argv[1])
    elif "--cross" in sys.argv:
        matrix(sys.argv[1], ROWS_CROSS, TILES_CROSS, [128])
    elif "--one" in sys.argv:
        matrix(sys.argv[1], ROWS_CROSS[:1], TILES_CROSS[:1], [128], (4096, 131072), (4096, 32768))
    else:
        matrix(sys.argv[1], ROWS, TILES, [128, 576])
