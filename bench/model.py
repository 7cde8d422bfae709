"""`python -m bench model`: what an H100 would need for each stage, computed from the machine code. Nothing is timed.

The real launchers run with a driver that only compiles (bench/machine_code.py). Of every launch that gives the machine
code and the arguments, from these how often each instruction runs (bench/trips.py), and from these a time: the longest
of what bounds it, over its waves.

    issue    warp instructions against four issue slots a cycle and multiprocessor, and against each pipe's width
    latency  one warp alone: its instructions in order, with the stalls and barriers of their control bits
    memory   bytes that must come from or go to HBM
    L2       bytes asked for by wide loads and stores

A wave is as many programs as fit the device by registers, shared memory and warps; the last one may be smaller. A gap
is added to every launch. What KeyDiff's first pass leaves in L2 for the second is simulated (bench/l2.py).

Where rows have unequal lengths, all programs are looked at, and latency is when the last of them ends. Not in it: bank
conflicts, programs of other launches that do more than their mean, and what another pass over more than half of L2
leaves there for the next.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import pathlib
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import triton

from bench import RESULTS, machine_code
from bench.l2 import L2, share_missed
from bench.report import COLORS, OUTSIDE
from bench.trips import Executed, executed
from kvevict import traffic
from kvevict.backends import triton as backend


@dataclass(frozen=True)
class Device:
    """What the model knows of a GPU."""

    name: str
    target: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes per second of HBM that a kernel can use
    l2_bandwidth: float
    l2_bytes: int
    memory_latency: float  # seconds from a load to its value, from HBM and from L2
    l2_latency: float
    shared_bytes: int  # of a multiprocessor
    warps: int = 64  # that a multiprocessor holds
    programs: int = 32
    registers: int = 65536
    gap: float = 1e-6  # seconds between two dependent launches of a stream

    @property
    def operations(self) -> float:
        """16-bit operations per second of the tensor cores."""
        return 2 * 4 * 512 * self.multiprocessors * self.clock

    @property
    def in_flight(self) -> float:
        """Bytes that a multiprocessor must have under way to fill its share of the bandwidth."""
        return self.memory_latency * self.bandwidth / self.multiprocessors

    def fit(self, warps: int, registers: int, shared: int) -> int:
        """Programs of one kernel that a multiprocessor holds."""
        per_warp = -(-registers // 8) * 8 * 32
        by_registers = self.registers // 4 // per_warp * 4 // warps
        by_shared = self.shared_bytes // (shared + 1024)  # 1 KiB of each program is the system's
        return min(self.programs, self.warps // warps, by_registers, by_shared)


H100 = Device(
    "H100", "sm_90", 132, 1.755e9, 3.0e12, 5.5e12, 50 << 20,
    memory_latency=600e-9, l2_latency=150e-9, shared_bytes=228 << 10,
)  # fmt: skip

# Cycles that a warp's instruction holds its pipe in one of the four sub-partitions: 32 lanes over the pipe's width.
_PIPES = {
    "fp32": (1, {"FFMA", "FADD", "FMUL", "FFMA32I", "HFMA2", "HADD2", "HMUL2", "HSETP2"}),
    "imad": (2, {"IMAD", "IDP"}),
    "special": (8, {"MUFU", "F2F", "F2I", "I2F", "POPC", "FLO", "BREV"}),
    "alu": (2, {
        "IADD3", "LOP3", "ISETP", "FSETP", "FMNMX", "IMNMX", "VIMNMX", "VIADD", "SEL", "FSEL", "SHF", "LEA", "PRMT",
        "IABS", "PLOP3", "F2FP", "I2FP", "MOV", "SGXT", "BMSK", "P2R", "R2P", "FCHK", "VABSDIFF",
    }),
}  # fmt: skip
# Of the one pipe of shuffles, votes and shared memory that the four share: in quarters, so that all count alike.
_SHARED_PIPE = {"SHFL": 4, "LDS": 4, "STS": 4, "LDSM": 4, "STSM": 4, "ATOMS": 8, "VOTE": 2, "REDUX": 8, "MATCH": 8}
# Cycles until the result of an instruction with a barrier is there, where it is not 30.
_LATENCY = {"SHFL": 24, "MUFU": 24, "LDC": 40, "S2R": 24, "ATOMS": 64, "LDSM": 33, "HGMMA": 64, "BAR": 30}
_BARRIER = 30  # cycles until all warps of a program have met


def _tensor_cycles(code: machine_code.Instruction) -> float:
    """Cycles of a sub-partition's tensor core in 16 bits: 512 multiply-adds a cycle for wgmma, five eighths for mma."""
    if code.name == "HGMMA":
        m, n, k = map(int, re.search(r"(\d+)x(\d+)x(\d+)", code.opcode).groups())
        return m * n * k / 4 / 512
    if code.name == "HMMA":
        k = 16 if "16816" in code.opcode else 8
        return 16 * 8 * k / 512 * 1.6
    return 0.0


def pipe_cycles(run: Executed) -> dict[str, float]:
    """Cycles of each pipe of a sub-partition for one warp; `issue`: of its issue slot."""
    cycles = Counter(issue=sum(run.counts))
    for one, count in zip(run.code, run.counts, strict=True):
        for pipe, (width, names) in _PIPES.items():
            if one.name in names:
                cycles[pipe] += width * count
        lanes = 4 if ".128" in one.opcode else 2 if ".64" in one.opcode else 1
        cycles["shared"] += _SHARED_PIPE.get(one.name, 0) * (lanes if one.name in ("LDS", "STS") else 1) * count
        cycles["tensor"] += _tensor_cycles(one) * count
    return dict(cycles)


def _access_bytes(one: machine_code.Instruction) -> int:
    """Bytes that a warp's global load asks for."""
    width = re.search(r"\.(U8|S8|U16|S16|64|128)\b", one.opcode)
    return 32 * {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}.get(width.group(1) if width else "", 4)


def _alone(body: list[machine_code.Instruction], latency: Callable, rounds: int) -> tuple[float, int]:
    """Cycles that one warp needs for `rounds` trips through `body`, and the most bytes its loads have under way."""
    now, free, under_way, copies, most = 0.0, [0.0] * 6, [], [], 0
    group: float = 0.0
    for one in body * rounds:
        now = max([now, *(free[barrier] for barrier in one.waits)])
        if one.name == "DEPBAR" and (allowed := re.search(r"SB\d, (0x\w+)", one.operands)):
            done = copies[: len(copies) - int(allowed.group(1), 16)]
            now = max([now, *done])
        takes = latency(one)
        if one.sets is not None:
            free[one.sets] = max(free[one.sets], now + takes)
        if one.name in ("LDG", "LDGSTS"):
            under_way = [(end, size) for end, size in under_way if end > now] + [(now + takes, _access_bytes(one))]
            most = max(most, sum(size for _, size in under_way))
        if one.name == "LDGSTS":
            group = now + takes
        if one.name == "LDGDEPBAR":
            copies.append(group)
        now += max(one.stall, 1) + (_BARRIER if one.name == "BAR" else 0)
    return now, most


def alone(run: Executed, device: Device, from_memory: set[int]) -> tuple[float, int]:
    """Cycles of one warp that has a multiprocessor for itself, and the most bytes that its loads have under way.
    `from_memory`: the lines of PTX whose loads come from HBM."""

    def latency(one: machine_code.Instruction) -> float:
        if one.name in ("LDG", "LDGSTS", "ATOMG", "LD"):
            far = one.ptx_line in from_memory
            return (device.memory_latency if far else device.l2_latency) * device.clock
        return _LATENCY.get(one.name, 30)

    bodies: dict = {}
    for one, count, (loop, trips) in zip(run.code, run.counts, run.loops, strict=True):
        if count > 0.5 * min(trips, 1):
            bodies.setdefault((loop, trips), []).append(one)
    total, most = 0.0, 0
    for (loop, trips), body in bodies.items():
        if loop is None:
            cycles, bytes_ = _alone(body, latency, 1)
        else:
            (twice, _), (thrice, bytes_) = _alone(body, latency, 2), _alone(body, latency, 3)
            cycles = trips * (thrice - twice)
        total, most = total + cycles, max(most, bytes_)
    return total, most


@dataclass(frozen=True)
class LaunchCost:
    """One launch, computed."""

    kernel: str
    programs: int
    programs_fit: int  # on one multiprocessor
    waves: int
    bytes: float  # of HBM
    asked_bytes: float  # by loads and stores of 8 bytes a lane and more
    in_flight_bytes: int  # of a multiprocessor: of the loads of the programs that it holds
    instructions: float  # of all warps
    seconds: float
    bound: str


def memory_accesses(
    run: Executed, launch: machine_code.Launch, device: Device, caches: list[torch.Tensor], l2: L2, resident: int
) -> tuple[float, float, set[int]]:
    """Bytes of a launch that come from or go to HBM, bytes that wide loads and stores ask of L2, and the lines of PTX
    of the loads that wait for HBM.

    What is small enough stays in L2: scores, indices and workspaces always, K and V (`caches`) if an earlier launch has
    read them; stores to K and V leave L2 in the end. Read again is read from L2. `resident`: programs that run at once.
    """
    theirs = {cache.data_ptr() for cache in caches}
    asked: Counter = Counter()
    from_l2: Counter = Counter()
    lines = set()
    simulated: dict[int, float | None] = {}  # by address of K: one pass over it, however many loads read it
    for access in run.accesses:
        address, size = access.tensor.data_ptr(), access.tensor.numel() * access.tensor.element_size()
        share = None
        if address in theirs and access.kind == "read":
            if address not in simulated:
                simulated[address] = share_missed(launch, l2, resident)
            share = simulated[address]
        if access.lane_bytes >= 8:  # narrow ones are mostly broadcasts
            from_l2[address, access.kind, size if share is not None else math.inf] += access.bytes
        kept = address not in theirs or (address in l2.seen and access.kind == "read")
        if share is None:
            share = float(size > device.l2_bytes / 2 or not kept)
        if share:
            asked[address, size * share, access.kind] += access.bytes
            if access.kind == "read":
                lines.add(access.ptx_line)
    l2.seen.update(access.tensor.data_ptr() for access in run.accesses)
    # A pass whose order is known reads each byte once; what a pipeline loads beyond its last tile is masked.
    wide = sum(min(count, most) for (_, _, most), count in from_l2.items())
    return sum(min(count, size) for (_, size, _), count in asked.items()), wide, lines


def launch_cost(
    launch: machine_code.Launch,
    device: Device,
    caches: list[torch.Tensor],
    known=(),
    l2: L2 | None = None,
    unequal: bool = False,
) -> LaunchCost:
    """`caches`, `l2`: see memory_accesses; `known`: see trips.executed; `unequal`: look at every program."""
    code = machine_code.sass(launch.compiled)
    run = executed(launch, code, known, range(launch.programs) if unequal else ())
    fit = device.fit(launch.warps, machine_code.registers(launch.compiled), launch.compiled.metadata.shared)
    l2 = L2(device.l2_bytes // 2) if l2 is None else l2
    hbm, asked, from_memory = memory_accesses(run, launch, device, caches, l2, fit * device.multiprocessors)
    cycles, under_way = alone(run, device, from_memory)
    pipes = pipe_cycles(run)

    def wave(programs: int) -> tuple[float, str]:
        held = -(-programs // device.multiprocessors)  # by the multiprocessor that has most
        share = programs / launch.programs
        bounds = {pipe: used * launch.warps * held / 4 / device.clock for pipe, used in pipes.items()}
        bounds["latency"] = cycles / device.clock
        bounds["memory"] = hbm * share / device.bandwidth
        bounds["L2"] = asked * share / device.l2_bandwidth
        return max((seconds, name) for name, seconds in bounds.items())

    slots = fit * device.multiprocessors
    full, rest = divmod(launch.programs, slots)
    bounds: Counter = Counter()
    if unequal:  # a slot takes the next program when it is done with one
        seconds, bound = wave(launch.programs)
        ones = {work: program for program, work in run.work.items()}  # one of each kind stands for all
        takes = {
            work: alone(executed(launch, code, known, [program]), device, from_memory)[0]
            for work, program in ones.items()
        }
        latency = last_end([takes[work] for work in run.work.values()], slots) / device.clock
        bounds[bound if seconds > latency else "latency"] = max(seconds, latency)
    else:
        for number, programs in ((full, slots), (1, rest)):
            if number and programs:
                seconds, bound = wave(programs)
                bounds[bound] += number * seconds
    return LaunchCost(
        launch.kernel, launch.programs, fit, full + bool(rest), hbm, asked,
        under_way * launch.warps * min(fit, -(-launch.programs // device.multiprocessors)),
        sum(run.counts) * launch.warps * launch.programs, sum(bounds.values()), max(bounds, key=bounds.get),
    )  # fmt: skip


def last_end(takes: list[float], slots: int) -> float:
    """When the last of these is done, if each in turn takes the slot that is free first."""
    ends = [0.0] * slots
    for time_ in takes:
        heapq.heappush(ends, heapq.heappop(ends) + time_)
    return max(ends)


class _TorchLaunches(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what torch itself would launch: everything but views and uncleared memory."""

    FREE = re.compile(r"aten::(empty|new_empty|view|_unsafe_view|as_strided|slice|select|expand|alias|t|transpose|"
                      r"permute|unsqueeze|squeeze|split|unbind|detach|_reshape_alias|reshape|lift_fresh)")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not self.FREE.match(func._schema.name)
        return func(*args, **kwargs or {})


@dataclass(frozen=True)
class Shape:
    """rows = KV heads of all requests; a group of `group` query heads each."""

    rows: int
    tokens: int
    D: int = 128
    group: int = 4
    keep: float = 0.5

    @property
    def kept(self) -> int:
        return int(self.keep * self.tokens)

    def cache(self) -> list[torch.Tensor]:
        """K and V, [1, rows, tokens, D] bfloat16: every row at one place, because nothing reads or writes them."""
        one = (torch.empty(1, 1, self.tokens, self.D, dtype=torch.bfloat16) for _ in range(2))
        return [x.expand(1, self.rows, -1, -1) for x in one]

    def pages(self) -> list[torch.Tensor]:
        """K and V [blocks, rows, 16, D], every block at one place; a block table [1, blocks]; lengths [1]."""
        blocks = self.tokens // 16
        one = (torch.empty(1, 16, 1, self.D, dtype=torch.bfloat16) for _ in range(2))
        cache = [x.expand(blocks, 16, self.rows, self.D).transpose(1, 2) for x in one]
        table = torch.empty(1, blocks, dtype=torch.int32)
        return [*cache, table, torch.full((1,), self.tokens, dtype=torch.int32)]

    def queries(self, W: int) -> torch.Tensor:
        return torch.empty(1, self.rows * self.group, W, self.D, dtype=torch.bfloat16)


@dataclass(frozen=True)
class Op:
    """What is called, stage by stage, and the floor of each stage in seconds."""

    calls: dict[str, Callable[[], None]]
    caches: list[torch.Tensor]
    floors: dict[str, float]
    known: tuple[torch.Tensor, ...] = ()  # integers whose values decide how far loops go
    unequal: bool = False  # programs do not all do much the same


def _keydiff_floors(shape: Shape, device: Device) -> dict[str, float]:
    """Two passes over K, and one move of the kept rows of K and V."""
    once = shape.rows * shape.tokens * shape.D * 2 / device.bandwidth
    return {"anchor": once, "score": once, "select": 0.0, "move": 4 * shape.keep * once}


def keydiff_compact(shape: Shape, device: Device) -> Op:
    keys, values = shape.cache()
    scores = torch.empty(1, shape.rows, shape.tokens)
    indices = torch.empty(1, shape.rows, shape.kept, dtype=torch.int64)
    flags = torch.empty(backend.move_flags(indices, keys, values), dtype=torch.int32)  # selection clears them
    calls = {
        "score": lambda: backend.keydiff_scores(keys, None, True, None, scores),
        "select": lambda: backend.topk_indices(scores, None, 4, 0, False, None, indices, flags),
        "move": lambda: backend.move_rows(keys, values, indices, True, flags=flags),
    }
    return Op(calls, [keys, values], _keydiff_floors(shape, device))


def paged_keydiff_compact(shape: Shape, device: Device) -> Op:
    """The same in blocks of 16 tokens."""
    keys, values, table, lengths = shape.pages()
    scores = torch.empty(1, shape.rows, shape.tokens)
    indices = torch.empty(1, shape.rows, shape.kept, dtype=torch.int64)
    flags = torch.empty(backend.move_flags(indices, keys, values), dtype=torch.int32)  # selection clears them
    calls = {
        "score": lambda: backend.keydiff_scores(keys, None, True, lengths, scores, table),
        "select": lambda: backend.topk_indices(scores, None, 4, 0, False, lengths, indices, flags),
        "move": lambda: backend.move_rows(keys, values, indices, True, table, flags=flags),
    }
    return Op(calls, [keys, values], _keydiff_floors(shape, device), (lengths,))


def _attention_mass(shape: Shape, device: Device, W: int) -> Op:
    """attention_mass of the last W queries, LSE and all."""
    keys, _ = shape.cache()
    queries, lse = shape.queries(W), torch.empty(1, shape.rows * shape.group, W)
    mass = torch.empty(1, shape.rows, shape.tokens)
    calls = {
        "lse": lambda: backend.attention_lse(queries, keys, 0.1, True, None, lse),
        "mass": lambda: backend.attention_mass(queries, keys, lse, 0.1, True, "mean", False, None, mass),
    }
    whole = traffic.WindowMass(shape.rows, shape.group, W, shape.tokens, shape.D, 2)
    once = max(whole.bytes / device.bandwidth, whole.operations / device.operations) / 2
    return Op(calls, [keys], {"lse": once, "mass": once})


def attention_mass_window(shape: Shape, device: Device) -> Op:
    return _attention_mass(shape, device, 32)


def attention_mass_prompt(shape: Shape, device: Device) -> Op:
    return _attention_mass(shape, device, shape.tokens)


def decode_attention(shape: Shape, device: Device) -> Op:
    """A decode step that tracks mass."""
    keys, values = shape.cache()
    query, out = shape.queries(1), shape.queries(1)
    mass = torch.empty(1, shape.rows, shape.tokens)

    def call():
        backend.decode_attention(query, keys, values, 0.1, None, mass, 1.0, None, 0, 0.0, out)

    once = traffic.DecodeAttention(shape.rows, shape.group, shape.tokens, shape.D, shape.D, 2, tracked=False)
    return Op({"decode": call}, [keys, values], {"decode": once.bytes / device.bandwidth})


def _paged_decode(shape: Shape, device: Device, longest: float) -> Op:
    """A decode step over pages with a table for each head; of eight heads one holds `longest` times the mean."""
    others = (8 - longest) / 7
    lengths = [16 * round(shape.tokens * share / 16) for share in (longest, *[others] * 7)] * (shape.rows // 8)
    columns = max(lengths) // 16
    one = (torch.empty(1, 16, 1, shape.D, dtype=torch.bfloat16) for _ in range(2))
    keys, values = (x.expand(sum(lengths) // 16, 16, 1, shape.D).transpose(1, 2) for x in one)
    table, query, out = torch.empty(1, shape.rows, columns, dtype=torch.int32), shape.queries(1), shape.queries(1)
    held = torch.tensor([lengths], dtype=torch.int32)

    def call():
        backend.decode_attention(query, keys, values, 0.1, held, None, 1.0, None, 0, 0.0, out, table)

    once = sum(lengths) * 2 * shape.D * 2 / device.bandwidth
    return Op({"decode": call}, [keys, values], {"decode": once}, (held,), unequal=True)


def paged_decode_equal_heads(shape: Shape, device: Device) -> Op:
    return _paged_decode(shape, device, 1.0)


def paged_decode_unequal_heads(shape: Shape, device: Device) -> Op:
    return _paged_decode(shape, device, 3.0)


ROWS, TOKENS = (8, 256), (4096, 32768, 131072, 1048576)
OPS = {
    keydiff_compact: TOKENS,
    paged_keydiff_compact: TOKENS[:3],
    decode_attention: TOKENS[:3],
    paged_decode_equal_heads: TOKENS[:3],
    paged_decode_unequal_heads: TOKENS[:3],
    attention_mass_window: TOKENS[:3],
    attention_mass_prompt: TOKENS[:1],
}


def stages(make: Callable, shape: Shape, device: Device, launches: list) -> list[dict]:
    """The stages of one op at one shape, and their sum. `launches` is the list that compile_only's callback fills."""
    op = make(shape, device)
    found: dict[str, list] = {}
    l2 = L2(device.l2_bytes // 2)
    for stage, call in op.calls.items():
        launches.clear()
        with _TorchLaunches() as torch_launches:
            call()
        for launch in launches:
            cost = launch_cost(launch, device, op.caches, op.known, l2, op.unequal)
            # KeyDiff's first pass is a stage of its own.
            found.setdefault("anchor" if "anchor" in launch.kernel else stage, []).append(cost)
        found.setdefault(stage, []).extend([None] * torch_launches.count)
    of = dict(op=make.__name__, rows=shape.rows, tokens=shape.tokens)
    rows = []
    for stage, costs in found.items():
        kernels = [cost for cost in costs if cost is not None]  # None: a launch of torch's own, which costs its gap
        rows.append({
            **of,
            "stage": stage,
            "bytes": sum(cost.bytes for cost in kernels),
            "instructions": sum(cost.instructions for cost in kernels),
            "launches": len(costs),
            "computed_us": 1e6 * (sum(cost.seconds for cost in kernels) + len(costs) * device.gap),
            "floor_us": 1e6 * op.floors.get(stage, 0.0),
            "kernels": [asdict(cost) for cost in kernels],
        })  # fmt: skip
    summed = ("bytes", "instructions", "launches", "computed_us", "floor_us")
    return [*rows, {**of, "stage": "all", **{key: sum(row[key] for row in rows) for key in summed}}]


def table(rows: list[dict], device: Device) -> str:
    """Markdown: an overview, then every launch."""
    lines = [
        f"Computed for an {device.name} ({device.multiprocessors} multiprocessors, {device.clock / 1e9:g} GHz, "
        f"{device.bandwidth / 1e12:g} TB/s) from the machine code that Triton {triton.__version__} makes of the "
        f"launches; not timed. {time.strftime('%Y-%m-%d')}. `python -m bench model`; what it counts: bench/model.py.",
        "", f"D = {Shape.D}, bfloat16, keep {Shape.keep:g}, {Shape.group} query heads a KV head. "
        "Floor: the bytes that the algorithm must move, all from HBM; L2 may hold some of them.",
    ]  # fmt: skip
    for op in dict.fromkeys(row["op"] for row in rows):
        shapes: dict = {}
        for row in rows:
            if row["op"] == op:
                shapes.setdefault((row["rows"], row["tokens"]), {})[row["stage"]] = row
        names = [stage for stage in next(iter(shapes.values())) if stage != "all"]
        columns = ["rows", "S", *[f"{name} µs" for name in names], "all µs", "floor µs", "floor / all", "launches"]
        lines += ["", f"## {op}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        for (count, tokens), found in shapes.items():
            whole = found["all"]
            cells = [f"{count}", f"{tokens:,}", *[f"{found[name]['computed_us']:,.1f}" for name in names]]
            cells += [f"{whole['computed_us']:,.1f}", f"{whole['floor_us']:,.1f}",
                      f"{whole['floor_us'] / whole['computed_us']:.0%}", f"{whole['launches']}"]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    columns = ["op", "rows", "S", "kernel", "programs", "fit", "waves", "HBM MB", "KB in flight", "warp instructions",
               "µs", "bound by"]  # fmt: skip
    lines += ["", "## Launches", "",
              "fit: programs that a multiprocessor holds. In flight: the most that the loads of the programs on one "
              f"multiprocessor have under way; to fill the bandwidth it takes {device.in_flight / 1e3:.0f} KB, and up "
              "to 64 under load. Bound: what takes longest.", "",
              "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]  # fmt: skip
    for row in rows:
        for k in row.get("kernels", []):
            cells = [row["op"], f"{row['rows']}", f"{row['tokens']:,}", k["kernel"], f"{k['programs']:,}",
                     f"{k['programs_fit']}", f"{k['waves']:,}", f"{k['bytes'] / 1e6:,.1f}",
                     f"{k['in_flight_bytes'] / 1e3:.0f}", f"{k['instructions']:,.0f}", f"{k['seconds'] * 1e6:,.1f}",
                     k["bound"]]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], device: Device, path: pathlib.Path) -> None:
    """keydiff_compact's stages in multiples of the floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [row for row in rows if row["op"] == "keydiff_compact"]
    shapes = list(dict.fromkeys((row["rows"], row["tokens"]) for row in found))
    floors = {(row["rows"], row["tokens"]): row["floor_us"] for row in found if row["stage"] == "all"}
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    left = [0.0] * len(shapes)
    for color, stage in zip(COLORS, ("anchor", "score", "select", "move"), strict=False):
        its = {(row["rows"], row["tokens"]): row["computed_us"] for row in found if row["stage"] == stage}
        width = [its.get(shape, 0.0) / floors[shape] for shape in shapes]
        axis.barh(range(len(shapes)), width, left=left, color=color, label=stage)
        left = [a + b for a, b in zip(left, width, strict=True)]
    for i, shape in enumerate(shapes):
        axis.annotate(f" {left[i] * floors[shape]:,.0f} µs", (left[i], i), va="center", fontsize=7)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(shapes)), [f"{r} rows, S={tokens:,}" for r, tokens in shapes], fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set(xlabel="times the floor of two passes over K and one move", title="keydiff_compact: computed, not timed")
    axis.legend(**OUTSIDE)
    figure.supxlabel(f"{device.name}, from machine code · triton {triton.__version__} · {time.strftime('%Y-%m-%d')}",
                     fontsize=6)  # fmt: skip
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [make.__name__ for make in OPS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="OP", help=", ".join(names))
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="the figures alone, to FILE or standard output"
    )
    parser.add_argument("--name", default="now", help="of the files in bench/results/model; default: now")
    options = parser.parse_args(arguments)
    device, launches = H100, []
    machine_code.compile_only(machine_code.TARGETS[device.target], launches.append)
    rows = [
        row
        for make, lengths in OPS.items()
        if make.__name__ in options.only
        for count in ROWS
        for tokens in lengths
        for row in stages(make, Shape(count, tokens), device, launches)
    ]
    text = json.dumps(rows, indent=1) + "\n"
    if options.json == "-":
        print(text, end="")
    elif options.json:
        pathlib.Path(options.json).write_text(text)
    else:
        folder = RESULTS / "model"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{options.name}.json").write_text(text)
        (folder / f"{options.name}.md").write_text(table(rows, device))
        if "keydiff_compact" in options.only:
            plot(rows, device, folder / f"{options.name}.png")
        print(table(rows, device).partition("## Launches")[0])
        print(f"wrote {folder}/{options.name}.json, .md, .png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
