"""`python -m bench`: keydiff_compact against the machine's copy bandwidth, and against the same formula in torch.

On a GPU: times. On a CPU: the bytes that the kernels ask for, counted in Triton's interpreter, the time these would
take at a stated bandwidth, and the time of the CPU reference against eager torch. Results go to
bench/results/<device>/ as JSON first; the table and the plot are made from it.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import time

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch.nn.functional as F

import kvevict
from bench.traffic import KeydiffCompact, counted

H, D, DTYPE = 8, 128, torch.bfloat16
STATED_BANDWIDTH = 3.35e12  # bytes a second: an H100 SXM's data sheet, for predictions only
COUNTED = "counted, not timed"


def eager(keys, values, keep):
    """KeyDiff as it is commonly written in torch: normalize, mean, cosine similarity, topk, gather."""
    anchor = F.normalize(keys, dim=-1).mean(2, keepdim=True)
    scores = -F.cosine_similarity(keys, anchor, dim=-1)
    index = scores.topk(int(keep * keys.shape[2]), dim=-1).indices[..., None].expand(-1, -1, -1, keys.shape[3])
    return keys.gather(2, index), values.gather(2, index)


def inputs(S, device):
    return [torch.randn(1, H, S, D, device=device).to(DTYPE) for _ in range(2)]


def on_cpu(S, keep, ordered):
    keys, values = inputs(S, "cpu")
    with kvevict.backend("triton"), counted() as traffic:
        result = kvevict.keydiff_compact(keys.clone(), values.clone(), keep=keep, preserve_order=ordered)
    moved = int((result.indices != torch.arange(result.indices.shape[2])).sum()) / H
    floor = KeydiffCompact(H, S, D, keys.element_size(), moved)

    def seconds(function):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    with kvevict.backend("reference"):
        reference = seconds(lambda: kvevict.keydiff_compact(keys, values, keep=keep, inplace=False))
    return {
        "floor_bytes": floor.bytes,
        "operations": floor.operations,
        "bytes": traffic["bytes"],
        "share": floor.bytes / traffic["bytes"],
        "predicted_seconds": traffic["bytes"] / STATED_BANDWIDTH,
        "cpu_reference_seconds": reference,
        "cpu_eager_seconds": seconds(lambda: eager(keys, values, keep)),
    }


def copy_bandwidth():
    """Bytes read and written per second by a device-to-device copy of 1 GiB."""
    from triton.testing import do_bench

    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    milliseconds = do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * source.nbytes / (milliseconds / 1e3)


def on_gpu(S, keep, ordered, bandwidth):
    from triton.testing import do_bench

    sets = [inputs(S, "cuda") for _ in range(max(2, int(2**28 // (2 * H * S * D * 2))))]  # beyond L2
    turn = iter(range(10**9))

    def rotated(function):
        return do_bench(lambda: function(*sets[next(turn) % len(sets)]), return_mode="median") / 1e3

    def ours(keys, values):
        return kvevict.keydiff_compact(keys, values, keep=keep, preserve_order=ordered)

    n = max(1, round(keep * S))
    slots = ours(*(x.clone() for x in sets[0])).indices
    moved = int((slots != torch.arange(n, device="cuda")).sum()) / H
    floor = KeydiffCompact(H, S, D, 2, moved)
    compiled = torch.compile(eager)
    seconds = rotated(ours)
    return {
        "floor_bytes": floor.bytes,
        "operations": floor.operations,
        "seconds": seconds,
        "share": floor.bytes / seconds / bandwidth,
        "eager_seconds": rotated(lambda k, v: eager(k, v, keep)),
        "compiled_seconds": rotated(lambda k, v: compiled(k, v, keep)),
    }


def draw(result, path):
    """A roofline: arithmetic intensity against operations per second, under the bandwidth roof."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bandwidth, rows = result["bandwidth"], result["rows"]
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    intensities = [row["operations"] / row["floor_bytes"] for row in rows]
    roof = [min(intensities) / 2, max(intensities) * 2]
    axis.plot(
        roof,
        [x * bandwidth / 1e12 for x in roof],
        color="black",
        label=f"{bandwidth / 1e12:.2f} TB/s ({'measured' if HAS_GPU else 'stated'})",
    )
    for ordered, color, marker in ((True, "#0072b2", "o"), (False, "#d55e00", "s")):
        chosen = [(x, row) for x, row in zip(intensities, rows, strict=True) if row["ordered"] == ordered]
        heights = [x * bandwidth * row["share"] / 1e12 for x, row in chosen]
        label = "order kept" if ordered else "fewest moves"
        axis.plot([x for x, _ in chosen], heights, marker, color=color, label=label, alpha=0.8)
        for (x, row), height in zip(chosen, heights, strict=True):
            if row["S"] == max(r["S"] for r in rows):  # the others lie beneath
                text = f"{row['share']:.0%} at S={row['S']}, keep {row['keep']}"
                axis.annotate(text, (x, height), fontsize=6, xytext=(8, -8), textcoords="offset points")
    axis.set(xscale="log", yscale="log", xlabel="operations per byte of floor", ylabel="tera-operations per second")
    axis.set_title(f"keydiff_compact ({result['kind']})")
    axis.legend(title=result["caption"], title_fontsize=6, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def table(result):
    columns = [name for name in result["rows"][0] if name not in ("operations",)]
    lines = [f"keydiff_compact, {result['kind']}. {result['caption']}", "", "| " + " | ".join(columns) + " |"]
    lines.append("|" + " --- |" * len(columns))
    for row in result["rows"]:
        cells = [f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two lengths only")
    parser.add_argument("--out", type=pathlib.Path, help="folder; default: bench/results/<device>")
    options = parser.parse_args()
    torch.manual_seed(0)

    device = torch.cuda.get_device_name().replace(" ", "-") if HAS_GPU else "cpu"
    lengths = [2**k for k in range(12, 20)] if HAS_GPU else [1024, 2048, 4096, 8192]
    bandwidth = copy_bandwidth() if HAS_GPU else STATED_BANDWIDTH
    rows = []
    for S in lengths[:2] if options.quick else lengths:
        for keep in (0.1, 0.5):
            for ordered in (True, False):
                measured = on_gpu(S, keep, ordered, bandwidth) if HAS_GPU else on_cpu(S, keep, ordered)
                rows.append({"S": S, "keep": keep, "ordered": ordered, **measured})
                print(rows[-1], flush=True)
    result = {
        "schema": 1,
        "kind": "timed" if HAS_GPU else COUNTED,  # at a stated bandwidth, each point is a prediction
        "device": device,
        "bandwidth": bandwidth,
        "caption": f"{device}, torch {torch.__version__}, B=1 H={H} D={D} {DTYPE}, python {platform.python_version()}, "
        + time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    out = options.out or pathlib.Path(__file__).parent / "results" / device
    out.mkdir(parents=True, exist_ok=True)
    (out / "keydiff_compact.json").write_text(json.dumps(result, indent=1) + "\n")
    result = json.loads((out / "keydiff_compact.json").read_text())
    (out / "keydiff_compact.md").write_text(table(result))
    draw(result, out / "roofline.png")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
