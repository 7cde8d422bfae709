"""Each operation against Python's integers, the C library, torch, or the PTX manual's own formulas."""

import ctypes
import math

import numpy as np
import pytest
import torch
from numpy import float32, int32, int64, uint16, uint32, uint64

import ptx
from ptx import arithmetic, warps
from ptx.assemble import module, word_of_thread, words

RANDOM = np.random.default_rng(0)
WORDS = np.concatenate([[0, 1, 2, 31, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], RANDOM.integers(0, 2**32, 200)]).astype(
    uint32
)
SIGNED = WORDS.view(int32)
LONG = np.array([0, 1, 2**32, 2**53 + 1, 2**63, 2**64 - 1, *RANDOM.integers(0, 2**64, 200, uint64)], uint64)


def test_fused_multiply_add_is_the_c_librarys():
    libm = ctypes.CDLL("libm.so.6")
    libm.fmaf.restype, libm.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    a, b = (RANDOM.standard_normal(2000).astype(float32) for _ in range(2))
    c = (-a.astype(float) * b * (1 + RANDOM.standard_normal(2000) * 1e-7)).astype(float32)  # cancels but for rounding
    expected = [libm.fmaf(*map(float, abc)) for abc in zip(a, b, c, strict=True)]
    assert np.array_equal(arithmetic.fused(a, b, c), np.array(expected, float32))
    assert not np.array_equal(a * b + c, np.array(expected, float32))


def test_division_is_towards_zero():
    for values, divisors in ((SIGNED, [1, -1, 7, -7, 2**31 - 1]), (WORDS, [1, 7, 2**32 - 1])):
        for divisor in divisors:
            b = np.full_like(values, divisor)
            with np.errstate(over="ignore"):
                quotient, rest = arithmetic.divide(values, b), arithmetic.remainder(values, b)
            for a, q, r in zip(values.tolist(), quotient.tolist(), rest.tolist(), strict=True):
                if (a, divisor) != (-(2**31), -1):  # overflows
                    assert q == abs(a) // abs(divisor) * (1 if (a < 0) == (divisor < 0) else -1)
                    assert r == a - q * divisor
    assert arithmetic.divide(WORDS, np.zeros_like(WORDS)).tolist() == [2**32 - 1] * len(WORDS)


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 200])
def test_shifts_stop_at_the_width(count):
    counts = np.full(len(WORDS), count, uint32)
    assert arithmetic.shift_left(WORDS, counts).tolist() == [(a << count) & 0xFFFFFFFF for a in WORDS.tolist()]
    assert arithmetic.shift_right(WORDS, counts).tolist() == [a >> count for a in WORDS.tolist()]
    assert arithmetic.shift_right(SIGNED, counts).tolist() == [a >> count for a in SIGNED.tolist()]
    both = [(high << 32 | low) for low, high in zip(WORDS.tolist(), WORDS[::-1].tolist(), strict=True)]
    left, right = (arithmetic.funnel_shift(mode, WORDS, WORDS[::-1], counts).tolist() for mode in "lr")
    assert left == [x << count % 32 >> 32 & 0xFFFFFFFF for x in both]
    assert right == [x >> count % 32 & 0xFFFFFFFF for x in both]


def test_bits():
    for values in (WORDS, LONG):
        numbers, width = values.tolist(), values.itemsize * 8
        assert arithmetic.count_ones(values).tolist() == [bin(x).count("1") for x in numbers]
        assert arithmetic.leading_zeros(values).tolist() == [width - x.bit_length() for x in numbers]
    numbers = WORDS.tolist()
    assert arithmetic.bit_field(WORDS, 5, 7).tolist() == [x >> 5 & 127 for x in numbers]
    fields = [x >> 5 & 127 for x in numbers]
    assert arithmetic.bit_field(SIGNED, 5, 7).tolist() == [x - 128 if x & 64 else x for x in fields]
    assert arithmetic.bit_field(WORDS, 30, 9).tolist() == [x >> 30 for x in numbers]
    inserted = arithmetic.insert_bit_field(WORDS, WORDS[::-1], 4, 8).tolist()
    assert inserted == [b & ~0xFF0 | (a & 0xFF) << 4 for a, b in zip(numbers, numbers[::-1], strict=True)]
    high = arithmetic.multiply_high(WORDS, WORDS[::-1]).tolist()
    assert high == [a * b >> 32 for a, b in zip(numbers, numbers[::-1], strict=True)]
    high = arithmetic.multiply_high(SIGNED, SIGNED[::-1]).tolist()
    assert high == [a * b >> 32 for a, b in zip(SIGNED.tolist(), SIGNED[::-1].tolist(), strict=True)]
    long = (SIGNED.astype(np.int64) << 31) + 12345
    high = arithmetic.multiply_high(long, long[::-1]).tolist()
    assert high == [a * b >> 64 for a, b in zip(long.tolist(), long[::-1].tolist(), strict=True)]


def test_bytes_are_permuted():
    a, b = np.array([0x33221100], uint32), np.array([0x77665584], uint32)
    for selector, expected in ((0x3210, 0x33221100), (0x7654, 0x77665584), (0x0426, 0x00842266), (0x000C, 0x000000FF)):
        assert arithmetic.permute_bytes(a, b, uint32(selector)).tolist() == [expected]


@pytest.mark.parametrize("table", [0x80, 0xFE, 0x96, 0xCA, 0x00, 0xFF])
def test_logic_is_its_truth_table(table):
    a, b, c = WORDS, WORDS[::-1], np.roll(WORDS, 5)
    result = arithmetic.logic(a, b, c, table)
    for bit in (0, 13, 31):
        x, y, z = ((v >> uint32(bit) & uint32(1)).tolist() for v in (a, b, c))
        expected = [table >> (i << 2 | j << 1 | k) & 1 for i, j, k in zip(x, y, z, strict=True)]
        assert (result >> uint32(bit) & uint32(1)).tolist() == expected


def test_minimum_and_maximum_drop_nan_and_order_zeros():
    nan, values = math.nan, [1.0, -2.0, 0.0, -0.0, math.inf, math.nan]
    a, b = (np.array(x, float32) for x in zip(*((x, y) for x in values for y in values), strict=True))
    lower, upper = arithmetic.minimum(a, b), arithmetic.maximum(a, b)
    for x, y, low, high in zip(a, b, lower, upper, strict=True):
        real = [v for v in (x, y) if not math.isnan(v)] or [nan]
        key = [(v, math.copysign(1, v)) for v in real]
        for got, expected in ((low, min(key)[0]), (high, max(key)[0])):
            assert float32(got).tobytes() == float32(expected).tobytes() or math.isnan(got) and math.isnan(expected)


def test_floats_become_integers():
    x = np.array([math.nan, math.inf, -math.inf, 2.0**31, -(2.0**31), -(2.0**40), 5, -5, 2.0**63, 1e30], float32)
    low, high = -(2**31), 2**31 - 1
    assert arithmetic.to_integer(x, int32).tolist() == [0, high, low, high, low, low, 5, -5, high, high]
    low, high = -(2**63), 2**63 - 1
    assert arithmetic.to_integer(x, int64).tolist() == [0, high, low, 2**31, -(2**31), -(2**40), 5, -5, high, high]
    assert arithmetic.to_integer(x, uint32).tolist() == [0, 2**32 - 1, 0, 2**31, 0, 0, 5, 0, 2**32 - 1, 2**32 - 1]


def test_narrow_floats_are_torchs():
    x = np.concatenate([WORDS, np.arange(0x3F7F0000, 0x3F820000, 0x1000, uint32) + uint32(0x8000)])  # and ties
    expected = torch.from_numpy(x.view(float32).copy()).bfloat16()
    got = arithmetic.float32_to_bfloat16(x.view(float32))
    there = ~expected.isnan().numpy()
    assert np.array_equal(got[there], expected.view(torch.int16).numpy().view(uint16)[there])
    assert np.isnan(arithmetic.bfloat16_to_float32(got[~there]).view(float32)).all()
    pairs = np.arange(256, dtype=np.uint8).view(uint16)
    for e4m3, dtype in ((True, torch.float8_e4m3fn), (False, torch.float8_e5m2)):
        got = arithmetic.float8_pair_to_float16_pair(pairs, e4m3).view(np.float16)
        expected = torch.arange(256).to(torch.uint8).view(dtype).half().numpy()
        assert np.array_equal(got, expected, equal_nan=True)
        assert np.array_equal(np.signbit(got), np.signbit(expected))


def test_subnormals_are_flushed():
    x = np.array([1e-40, -1e-40, 2.0**-126, 0.0, math.nan], float32)
    assert np.array_equal(arithmetic.flushed(x), np.array([0, -0.0, 2.0**-126, 0, math.nan], float32), equal_nan=True)
    assert np.signbit(arithmetic.flushed(x))[1]


# Warps


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffle_is_the_manuals(mode):
    values = np.arange(64).astype(uint32) * 10
    for b in (0, 1, 5, 16, 31):
        for c in (0x1F, 0x0, 0x1C1F, 0x1000, 0x0F):
            got, inside = warps.shuffle(mode, values, uint32(b), uint32(c), 64)
            for thread in range(64):
                lane, segment, clamp = thread % 32, c >> 8 & 31, c & 31
                most = (lane & segment) | (clamp & ~segment)
                least = lane & segment
                source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": least | (b & ~segment)}[mode]
                valid = source >= most if mode == "up" else source <= most
                assert inside[thread] == valid
                assert got[thread] == 10 * (thread - lane + (source if valid else lane))


def test_votes_and_reductions():
    predicate, active = RANDOM.random(64) < 0.5, RANDOM.random(64) < 0.7
    words = warps.ballot(predicate, 64, active)
    for warp in (0, 1):
        part = slice(32 * warp, 32 * warp + 32)
        expected = sum(1 << lane for lane in range(32) if predicate[part][lane] and active[part][lane])
        assert set(words[part].tolist()) == {expected}
        assert set(warps.vote("any", predicate, 64, active)[part]) == {bool((predicate & active)[part].any())}
        assert set(warps.vote("all", predicate, 64, active)[part]) == {bool((predicate | ~active)[part].all())}
    values, mask = SIGNED[7:71], 0x0F0F00FF
    lanes = [lane for lane in range(32) if mask >> lane & 1]
    for mode, function in (("min", min), ("max", max), ("add", lambda x: (sum(x) + 2**31) % 2**32 - 2**31)):
        got = warps.reduce(mode, values, np.full(64, mask, uint32), 64)
        for warp in (0, 1):
            assert set(got[32 * warp : 32 * warp + 32].tolist()) == {
                function([int(values[32 * warp + x]) for x in lanes])
            }


@pytest.mark.parametrize("kind, k", [("bf16", 8), ("bf16", 16), ("f16", 8), ("f16", 16), ("tf32", 4), ("tf32", 8)])
def test_matrix_product_is_the_manuals(kind, k):
    """Fragments by the formulas of the PTX manual, element by element."""
    elements = 1 if kind == "tf32" else 2
    count_a, count_b = 16 * k // 32 // elements, 8 * k // 32 // elements
    narrow = (lambda x: x.bfloat16().view(torch.int16)) if kind == "bf16" else (lambda x: x.half().view(torch.int16))

    def registers(count):
        x = torch.randint(-8, 8, (count, 64, elements)).float()
        packed = x.view(torch.int32)[..., 0] if kind == "tf32" else narrow(x).contiguous().view(torch.int32)[..., 0]
        return x.numpy(), list(packed.numpy().view(uint32))

    (a, a_words), (b, b_words) = registers(count_a), registers(count_b)
    c = RANDOM.standard_normal((4, 64)).astype(float32)
    d = warps.matrix_product(kind, a_words, b_words, list(c.view(uint32)))
    for warp in (0, 1):
        left, right, sums = np.zeros((16, k)), np.zeros((k, 8)), np.zeros((16, 8))
        step = 4 * elements  # columns of a register's row of threads
        for lane in range(32):
            group, thread = lane >> 2, lane & 3
            for i in range(count_a):
                for e in range(elements):
                    row, column = group + 8 * (i & 1), thread * elements + e + step * (i >> 1)
                    left[row, column] = a[i, 32 * warp + lane, e]
            for i in range(count_b):
                for e in range(elements):
                    right[thread * elements + e + step * i, group] = b[i, 32 * warp + lane, e]
            for i in range(4):
                sums[group + 8 * (i >> 1), thread * 2 + (i & 1)] = c[i, 32 * warp + lane]
        product = left @ right + sums
        for lane in range(32):
            for i in range(4):
                got = d[i].view(float32)[32 * warp + lane]
                assert got == pytest.approx(product[(lane >> 2) + 8 * (i >> 1), (lane & 3) * 2 + (i & 1)], rel=1e-6)


# What is not known is an error


@pytest.mark.parametrize(
    "line",
    [
        "add.sat.s32 %r2, %r1, 1;", "mul.rz.f32 %r2, %r1, %r1;", "cvt.rna.tf32.f32 %r2, %r1;",
        "fence.acq_rel.gpu;", "mov.u32 %r2, %clock;", "bar.sync 1;", "bar.sync 0, 64;", "bar.arrive 0, 64;",
        "@%p1 add.s32 %r2, %r1, 1;", "@%p1 bar.sync 0;", "ld.b32 %r2, [%rd1];", "ld.volatile.global.b32 %r2, [%rd1];",
        "ld.local.b32 %r2, [%rd1];", "call f, ();", "mbarrier.init.shared::cta.b64 [%r1], 1;",
        "mov.u32 %r2, other_smem;",
        "atom.global.add.noftz.f16 %rs1, [%rd1], %rs2;", "trap;",
    ],
)  # fmt: skip
def test_an_unknown_instruction_is_an_error(emulator, line):
    with pytest.raises(ptx.EmulationError):
        emulator.run(module("setp.eq.s32 %p1, %r1, 0;\n" + line, 1), [words(32)], (1,))


def test_a_register_that_was_never_set_is_an_error(emulator):
    with pytest.raises(ptx.EmulationError, match="add.s32 %r2, %r1, %r3"):
        emulator.run(module("add.s32 %r2, %r1, %r3;", 1), [words(32)], (1,))


def test_arguments_and_parameters_must_agree(emulator):
    with pytest.raises(ptx.EmulationError, match="3 arguments for 1 parameters"):
        emulator.run(module("", 1), [1, 2, 3], (1,))
    with pytest.raises(ptx.EmulationError, match="not plain numbers"):
        emulator.run(
            module("", 1).replace(".u64 .ptr .global .align 1 f_param_0", ".align 64 .b8 f_param_0[128]"), [1], (1,)
        )


def test_threads_take_their_own_ways(emulator):
    """Thread t loops t times; odd threads leave by another branch; all meet again."""
    body = f"""
        {word_of_thread("%rd9", "%rd1")}
        mov.b32 %r2, 0;
        mov.b32 %r3, 0;
        $L__again:
        setp.ge.s32 %p1, %r2, %r1;
        @%p1 bra $L__done;
        add.s32 %r2, %r2, 1;
        add.s32 %r3, %r3, 10;
        bra.uni $L__again;
        $L__done:
        and.b32 %r4, %r1, 1;
        setp.eq.b32 %p2, %r4, 0;
        @%p2 bra $L__even;
        add.s32 %r3, %r3, 1;
        $L__even:
        bar.sync 0;
        activemask.b32 %r5;
        setp.ne.b32 %p3, %r5, -1;
        @%p3 bra $L__end;
        st.global.b32 [%rd9], %r3;
        $L__end:
    """
    out = words(64)
    emulator.run(module(body, 1, threads=64), [out], (1,))
    assert out.tolist() == [10 * t + t % 2 for t in range(64)]
