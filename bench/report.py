"""From results (JSON) to a Markdown table and four plots: roofline, speed-up, time against S, stages."""

import json

SCHEMA = 2
COUNTED = "counted, not timed"
# Okabe and Ito's colours, apart for colour-blind eyes, for the first six; the rest is grey. Markers differ as well.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9") + 4 * ("#999999",)
OUTSIDE = dict(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
MARKERS = "osv^D<>PX*"
STAGES = {
    "anchor": ("partial_anchor_kernel",),
    "score": ("keydiff_scores_kernel", "keydiff_row_kernel"),
    "select": ("select_row_kernel", "count_digits_kernel", "write_kept_kernel"),
    "compact": ("move_rows_kernel",),
}


def write(result, out):
    """The result as JSON first; everything else is made from that file."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "bench.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    result = json.loads(path.read_text())
    (out / "bench.md").write_text(table(result))
    for name, draw in (("roofline", roofline), ("speedup", speedup), ("time", time), ("stages", stages)):
        _save(draw, result, out / f"{name}.png")


def _save(draw, result, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
    draw(axis, result)
    kind = "timed" if draw is speedup else result["kind"]  # times of torch, on either device
    figure.supxlabel(f"{kind} · {result['caption']}", fontsize=6)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def timed(result):
    return result["kind"] == "timed"


def seconds(row):
    return row.get("seconds", row.get("predicted_seconds"))


def by_case(result, sweep=False):
    """{case: rows}; sweep: the rows that differ in S alone, in order."""
    cases = {}
    for row in result["rows"]:
        cases.setdefault(row["case"], []).append(row)
    if sweep:
        for name, rows in cases.items():
            # W follows S where the whole prompt is measured, which is another line.
            usual = [tuple(v for k, v in row["point"].items() if k != "S") for row in rows]
            most = max(usual, key=usual.count)
            cases[name] = sorted(
                (row for row, key in zip(rows, usual, strict=True) if key == most), key=lambda row: row["point"]["S"]
            )
    return cases


def roofline(axis, result):
    roofs = result["ceilings"]
    rows = [row for row in result["rows"] if row["operations"]]
    intensity = [row["operations"] / row["floor_bytes"] for row in rows]
    low, high = min(intensity) / 2, max(2 * max(intensity), 2 * roofs["operations"] / roofs["bandwidth"])
    ridge = roofs["operations"] / roofs["bandwidth"]
    axis.plot(
        [low, ridge, high],
        [low * roofs["bandwidth"] / 1e12, roofs["operations"] / 1e12, roofs["operations"] / 1e12],
        color="black",
        label=f"{roofs['bandwidth'] / 1e12:.2f} TB/s, {roofs['operations'] / 1e12:.0f} T operations/s: "
        f"{roofs['source']}",
    )
    unit = "of the roof" if timed(result) else "of the bytes are floor"
    for i, (name, found) in enumerate(by_case(dict(rows=rows)).items()):
        points = [(row["operations"] / row["floor_bytes"], row["operations"] / seconds(row) / 1e12) for row in found]
        best, worst = max(row["share"] for row in found), min(row["share"] for row in found)
        axis.plot(*zip(*points, strict=True), MARKERS[i % 10], color=COLORS[i % 10], markersize=5, alpha=0.8,
                  label=f"{name}: {worst:.0%} to {best:.0%} {unit}")  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="operations per byte of the floor", ylabel="10¹² operations per second")
    axis.set_title("how far from the roof" if timed(result) else "where the counted bytes allow each op to be")
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)


SLOWER = {False: "the reference is written to be read", True: "slower, see bench/NOTES.md"}  # by `timed`


def speedup(axis, result):
    """Bars: how many times faster than each peer at the longest S of the sweep."""
    bars = []
    for name, rows in by_case(result, sweep=True).items():
        row = rows[-1]
        ours = row["seconds"] if timed(result) else row["cpu_reference"]["seconds"]
        for peer, figures in row["peers"].items():
            if "seconds" in figures and row["agrees"]:
                bars.append((f"{name}, S={row['point']['S']}\nagainst {peer}", figures["seconds"] / ours))
    heights = [ratio for _, ratio in bars]
    axis.barh(range(len(bars)), heights, color=COLORS[0])
    axis.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=6)
    for i, ratio in enumerate(heights):
        why = f": {SLOWER[timed(result)]}" if ratio < 1 else ""
        axis.annotate(f" {ratio:.2g}×{why}", (ratio, i), va="center", fontsize=7)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.margins(x=0.15)
    axis.invert_yaxis()
    axis.set(xlabel="times as fast as the peer", title="against what people use")
    if not timed(result):
        axis.set_title("our CPU reference (no kernel) against torch, both timed on this CPU", fontsize=9)


def time(axis, result):
    for i, (name, rows) in enumerate(by_case(result, sweep=True).items()):
        axis.plot([row["point"]["S"] for row in rows], [seconds(row) * 1e6 for row in rows], marker=MARKERS[i % 10],
                  color=COLORS[i % 10], markersize=4, label=name)  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="S, cached tokens", ylabel="microseconds")
    axis.set_title("time" if timed(result) else "time that the counted bytes take at the stated bandwidth")
    axis.legend(**OUTSIDE)


def stages(axis, result):
    rows = by_case(result, sweep=True).get("keydiff_compact", [])
    left = [0.0] * len(rows)
    for i, (stage, kernels) in enumerate(STAGES.items()):
        parts = [sum(t for k, t in row["kernels"].items() if k.startswith(kernels)) * 1e6 for row in rows]
        whole = [sum(row["kernels"].values()) * 1e6 for row in rows]
        share = [part / total for part, total in zip(parts, whole, strict=True)]
        axis.barh(range(len(rows)), share, left=left, color=COLORS[i], label=stage)
        left = [a + b for a, b in zip(left, share, strict=True)]
    axis.set_yticks(range(len(rows)), [f"S={row['point']['S']}" for row in rows])
    axis.set(xlabel=f"share of the {'time' if timed(result) else 'bytes'}", title="keydiff_compact, by stage")
    axis.legend(**OUTSIDE)


def table(result):
    lines = [f"{result['kind']}. {result['caption']}", ""]
    for name, rows in by_case(result).items():
        peers = list(rows[0]["peers"])
        if timed(result):
            columns = ["shape", "floor MiB", "µs", "20 to 80 %", "in a graph µs", "of the roof", "extra MiB", *peers]
        else:
            columns = ["shape", "floor MiB", "asked for MiB", "launches + fills", "of it floor",
                       "predicted µs", "CPU reference ms", *[f"{peer} ms" for peer in peers]]  # fmt: skip
        lines += [f"## {name}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        missing = {}
        for row in rows:
            cells = [row["label"], f"{row['floor_bytes'] / 2**20:.2f}"]
            if timed(result):
                cells += [f"{row['seconds'] * 1e6:.1f}", f"{row['low'] * 1e6:.1f} to {row['high'] * 1e6:.1f}",
                          f"{row['graph_seconds'] * 1e6:.1f}", f"{row['share']:.0%}",
                          f"{row['extra_bytes'] / 2**20:.2f}"]  # fmt: skip
            else:
                cells += [f"{row['bytes'] / 2**20:.2f}", f"{row['launches']} + {row['fills']}", f"{row['share']:.0%}",
                          f"{row['predicted_seconds'] * 1e6:.2f}",
                          f"{row['cpu_reference']['seconds'] * 1e3:.2f}"]  # fmt: skip
            for peer in peers:
                figures = row["peers"][peer]
                if "missing" in figures:
                    missing[peer] = figures["missing"]
                    cells.append("-")
                elif timed(result):
                    ratio = f" ({figures['seconds'] / row['seconds']:.1f}×)" if row["agrees"] else ""
                    cells.append(f"{figures['seconds'] * 1e6:.1f}{ratio}")
                else:
                    cells.append(f"{figures['seconds'] * 1e3:.2f}")
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", *[f"- {peer}: missing, {reason}" for peer, reason in missing.items()], ""]
    return "\n".join(lines)
