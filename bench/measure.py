"""One row of results: a case at a point, timed on a GPU; on a CPU counted in the interpreter, and timed in torch.

On a GPU: the median between CUDA events over inputs that rotate through more than L2 holds, workspace and launches
included, with the 20th and 80th percentile as the spread; and once more replayed from a CUDA graph, without the cost of
launches on the host. Before every round the inputs are what they were: of a cache that was compacted in place once,
fewer rows move.
On a CPU: the bytes that the kernels ask for, the time they would take at a stated bandwidth, and the times of the
reference and of the eager peers in torch on this CPU.
"""

import functools
import statistics
import time

import torch

import kvevict
from bench.case import Point
from bench.traffic import counted

STATED = dict(bandwidth=3.35e12, operations=989e12, source="data sheet of an H100 SXM")  # for predictions only
L2 = 2**28  # bytes of inputs to rotate through: five times an H100's L2


def ceilings():
    """Bytes read and written per second by a copy of 1 GiB; operations per second of a large bf16 product."""
    from triton.testing import do_bench

    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    copy = do_bench(lambda: target.copy_(source), return_mode="median") / 1e3
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = do_bench(lambda: a @ b, return_mode="median") / 1e3
    return dict(bandwidth=2 * source.nbytes / copy, operations=2 * 8192**3 / product, source="measured in this run")


def roof_seconds(floor, roofs):
    """The least time at these ceilings."""
    return max(floor.bytes / roofs["bandwidth"], floor.operations / roofs["operations"])


def agrees(case, point, device):
    """Whether the op gives what the reference gives, at a small S: no speed is worth reporting otherwise."""
    small = point.__class__(**(vars(point) | dict(S=512, W=min(point.W, 512), B=1)))
    inputs = case.inputs(small, device)
    results = []
    for backend in ("triton", "reference"):
        with kvevict.backend(backend):
            result = case.run(small, *[x.clone() for x in inputs])
        results.append(result if isinstance(result, torch.Tensor) else result.indices.sort(-1).values)
    ours, reference = results
    if ours.dtype == torch.int64:  # a score that differs in its last bit may swap two tokens
        return (ours == reference).float().mean().item() > 0.98 and ours.shape == reference.shape
    return torch.allclose(ours.float(), reference.float(), rtol=2e-2, atol=2e-3)


class Inputs:
    """Sets of inputs that together are more than L2 holds, and what they were before a call wrote to them."""

    def __init__(self, case, point, device):
        size = sum(x.nbytes for x in case.inputs(point, device))
        self.sets = [case.inputs(point, device) for _ in range(max(2, -(-L2 // size)))]
        self._fresh = [x.clone() for x in self.sets[0]]
        for inputs in self.sets[1:]:  # one copy serves all: their values may be the same
            self._restore(inputs)

    def _restore(self, inputs):
        for x, fresh in zip(inputs, self._fresh, strict=True):
            x.copy_(fresh)

    def restore(self):
        for inputs in self.sets:
            self._restore(inputs)


def _between_events(calls, restore, seconds=0.1):
    """Median, 20th and 80th percentile of the seconds that one of `calls` takes; `restore` goes before every round."""
    times, spent = [], 0.0
    while len(times) < 3 * len(calls) or spent < seconds:
        restore()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
        for call, (start, end) in zip(calls, events, strict=True):
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        times += [start.elapsed_time(end) / 1e3 for start, end in events]
        spent = sum(times)
    low, median, high = (statistics.quantiles(times, n=10)[i] for i in (1, 4, 7))
    return dict(seconds=median, low=low, high=high)


def _graph_of(call):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def on_gpu(case, point, roofs):
    inputs = Inputs(case, point, "cuda")
    restore = inputs.restore

    def calls(function):
        return [functools.partial(function, point, *each) for each in inputs.sets]

    def timed(function):
        function(point, *inputs.sets[0])  # compiles
        return _between_events(calls(function), restore)

    row = timed(case.run)
    restore()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = case.run(point, *inputs.sets[0])
    extra = torch.cuda.max_memory_allocated() - before
    floor = case.floor(point, result)
    row |= dict(
        floor_bytes=floor.bytes,
        operations=floor.operations,
        share=roof_seconds(floor, roofs) / row["seconds"],
        graph_seconds=_between_events([_graph_of(call) for call in calls(case.run)], restore)["seconds"],
        extra_bytes=extra,
        kernels=kernel_seconds(calls(case.run), restore),
        peers={name: _peer(peer, timed) for name, peer in case.peers.items()},
    )
    return row


def _peer(peer, timed):
    if isinstance(peer, str):
        return dict(missing=peer)
    try:
        return timed(peer)
    except (RuntimeError, torch.OutOfMemoryError) as error:  # eager attention weights at length, or float8
        torch.cuda.empty_cache()
        return dict(missing=str(error).splitlines()[0][:120])


def kernel_seconds(calls, restore):
    """Seconds per call of each kernel, from torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    restore()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for call in calls:
            call()
        torch.cuda.synchronize()
    return {event.key: event.device_time_total / 1e6 / len(calls) for event in profiler.key_averages()}


def on_cpu(case, point, roofs):
    inputs = case.inputs(point, "cpu")
    with kvevict.backend("triton"), counted() as traffic:
        result = case.run(point, *[x.clone() for x in inputs])
    floor = case.floor(point, result)

    def timed(function):
        times = []
        for _ in range(5):
            fresh = [x.clone() for x in inputs]  # a call may write to them
            start = time.perf_counter()
            function(point, *fresh)
            times.append(time.perf_counter() - start)
        return dict(seconds=statistics.median(times), low=min(times), high=max(times))

    with kvevict.backend("reference"):
        reference = timed(case.run)
        peers = {
            name: dict(missing=peer) if isinstance(peer, str) else timed(peer) for name, peer in case.peers.items()
        }
    return dict(
        floor_bytes=floor.bytes,
        operations=floor.operations,
        bytes=traffic.bytes,
        launches=traffic.launches,
        fills=traffic.fills,
        share=floor.bytes / traffic.bytes,
        predicted_seconds=max(traffic.bytes / roofs["bandwidth"], floor.operations / roofs["operations"]),
        kernels={name: size / roofs["bandwidth"] for name, size in traffic.by_kernel.items()},
        cpu_reference=reference,
        peers=peers,
    )


def gate(rows, cases):
    """What is wrong with counted rows: more bytes than the case allows, or values that are not the reference's."""
    gates = {case.name: case.gate for case in cases}
    wrong = []
    for row in rows:
        where = f"{row['case']} at {row['label']}"
        if not row["agrees"]:
            wrong.append(f"{where}: differs from the reference")
        allowed = gates[row["case"]](Point(**row["point"]))
        if "bytes" in row and row["bytes"] > allowed * row["floor_bytes"]:
            wrong.append(f"{where}: asks for {row['bytes'] / row['floor_bytes']:.2f} floors, allowed are {allowed}")
    return wrong
