"""`python -m bench.overhead`: what a call costs on the host, in microseconds, beside the kernels themselves.

Anywhere: validation, allocation and dispatch, with a backend that launches nothing. On a GPU also the whole call as the
host sees it (kernels queued, not awaited), beside the same number of bare Triton launches: at most twice as much.
"""

import json
import pathlib
import statistics
import sys
import time
import types
from unittest import mock

import torch

import kvevict
from bench import RESULTS, device_name
from kvevict.backends import reference

HAS_GPU = torch.cuda.is_available()


def microseconds(function, calls=300, repeats=9):
    """Median over repeats of the mean time of a call, after as many calls to warm up."""
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        found.append((time.perf_counter() - start) / calls * 1e6)
        if HAS_GPU:
            torch.cuda.synchronize()  # a full queue would make the host wait
    return statistics.median(found[1:])


def calls(device):
    """name -> (call, launches it makes at this size on a GPU)."""
    S = 512
    keys, values = (torch.randn(1, 8, S, 128, device=device).bfloat16() for _ in range(2))
    queries, scores = torch.randn(1, 32, 1, 128, device=device).bfloat16(), torch.randn(1, 8, S, device=device)
    indices = kvevict.topk_indices(scores, 0.5)
    mass = torch.zeros_like(scores)
    return {
        "keydiff_compact": (lambda: kvevict.keydiff_compact(keys, values, keep=0.5, sink=4), 3),
        "keydiff_scores": (lambda: kvevict.keydiff_scores(keys), 1),
        "topk_indices": (lambda: kvevict.topk_indices(scores, 0.5), 1),
        "compact": (lambda: kvevict.compact(keys, values, indices), 2),
        "decode_attention": (lambda: kvevict.decode_attention(queries, keys, values, mass=mass), 3),
    }


def nothing():
    """A backend whose functions do nothing."""
    idle = {name: lambda *args: None for name in reference.__all__ if name != "move_flags"}  # that one is a size
    return types.SimpleNamespace(**idle, move_flags=reference.move_flags, __name__="nothing")


def bare_launches(count):
    """So many launches of a kernel with as many arguments as ours have, and nothing else."""
    import triton
    import triton.language as tl

    @triton.jit
    def bare_kernel(a, b, c, d, e, f, g, h, i, j, k, m, n: tl.constexpr):
        pass

    tensor = torch.empty(1, device="cuda")

    def run():
        for _ in range(count):
            bare_kernel[(1,)](tensor, tensor, tensor, 1, 2, 3, 4, 5, 6, 7, 8, 9, n=16)

    return run


def main():
    device = "cuda" if HAS_GPU else "cpu"
    with kvevict.backend("auto" if HAS_GPU else "reference"):
        found = calls(device)
    rows = []
    stub = nothing()
    for name, (call, launches) in found.items():
        with mock.patch("kvevict.custom_ops.pick", lambda device: stub):
            row = dict(op=name, launches=launches, host=microseconds(call))
        if HAS_GPU:
            row |= dict(whole=microseconds(call), bare=microseconds(bare_launches(launches)))
            row["ratio"] = row["whole"] / row["bare"]
        rows.append(row)
        print("  ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{v}" for k, v in row.items()), flush=True)
    name = device_name(device)
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / name
    out.mkdir(parents=True, exist_ok=True)
    caption = f"{name}, torch {torch.__version__}, S=512, {time.strftime('%Y-%m-%d')}"
    (out / "overhead.json").write_text(json.dumps(dict(caption=caption, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
