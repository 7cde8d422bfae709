"""`python -m bench.quality_peers`: kvpress 0.5.5 beside our policies, on the samples of bench/quality.py.

Runs in an environment of its own (`make quality-peers`): kvpress wants an older transformers. Every sample is read
once. kvpress's presses score the cache in their own forward hook and choose tokens by their own rule, topk of
int(n · (1 - ratio)); our policies, with the protection that the presses have, score the same tensors. Both caches are
asked the same question, unseen by the compressor, and compared sample by sample.
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import pathlib
import statistics

import torch
from kvpress import KeyDiffPress, KnormPress, SnapKVPress, StreamingLLMPress, TOVAPress
from kvpress.presses.base_press import BasePress
from transformers import DynamicCache

from bench import RESULTS
from bench.quality import KEEPS, TASKS, ask, build
from kvevict import models, ops
from kvevict.policies import TOVA, KeyDiff, KeyNorm, Observed, Recency, SnapKV

PAIRS = {
    "KeyDiff": (KeyDiffPress(), KeyDiff(sink=0, recent=0)),
    "KeyNorm": (KnormPress(), KeyNorm(sink=0, recent=0)),
    "SnapKV": (SnapKVPress(), SnapKV(sink=0, recent=0)),
    "TOVA": (TOVAPress(), TOVA(sink=0, recent=0)),
    "StreamingLLM": (StreamingLLMPress(n_sink=4), Recency(recent=0)),
}


class Scores(BasePress):
    """Not a method: notes what every press would keep in each layer, and leaves the cache whole."""

    def __init__(self):
        self.kept = {(name, keep): [] for name in PAIRS for keep in KEEPS}

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        for name, (press, _) in PAIRS.items():
            for keep in KEEPS:
                press.compression_ratio = 1 - keep
                scores = press.score(module, hidden_states, keys, values, attentions, kwargs)
                n = int(keys.shape[2] * (1 - press.compression_ratio))  # as ScorerPress.compress
                self.kept[name, keep].append(scores.topk(n, dim=-1).indices)
        return keys, values


@torch.no_grad()
def run_sample(model, context, question, answer):
    """{method: {keep: (kvpress's loss, ours, share of kept tokens that agree)}}."""
    noted, cache = Scores(), DynamicCache()
    with contextlib.ExitStack() as stack:
        captured = stack.enter_context(models.capture(model))
        stack.enter_context(noted(model))
        model(torch.tensor([context]), past_key_values=cache, logits_to_keep=1)
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    results = {}
    for keep in KEEPS:
        theirs, ours, agreement = [[] for _ in layers], [[] for _ in layers], {}
        for name, (_, policy) in PAIRS.items():
            same = total = 0
            for i, (k, v) in enumerate(layers):
                kept = noted.kept[name, keep][i].sort(-1)[0]
                n = kept.shape[-1]
                seen = Observed(keys=k, queries=captured.of(i)[0], layer=i)
                own = policy.select(seen, n)
                same += sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(kept[0], own[0], strict=True))
                total += kept.numel()
                for side, indices in ((theirs, kept), (ours, own)):
                    side[i].append(ops.compact(k, v, indices.contiguous(), inplace=False)[:2])
            agreement[name] = same / total
        losses = []
        for side in (theirs, ours):
            stacked = [tuple(torch.cat(rows) for rows in zip(*pairs, strict=True)) for pairs in side]
            losses.append(ask(model, stacked, len(context), question, answer))
        for name, (a, _), (b, _) in zip(PAIRS, *losses, strict=True):
            results.setdefault(name, {})[str(keep)] = (a, b, agreement[name])
    return results


def report(out, name, caption):
    lines = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
    rows = []
    for task in dict.fromkeys(line["task"] for line in lines):
        for method in PAIRS:
            for keep in KEEPS:
                found = [line["results"][method][str(keep)] for line in lines if line["task"] == task]
                differences = [ours - theirs for theirs, ours, _ in found]
                error = statistics.stdev(differences) / math.sqrt(len(found)) if len(found) > 1 else float("nan")
                rows.append(dict(
                    task=task, method=method, keep=keep, samples=len(found),
                    kvpress=statistics.mean(f[0] for f in found), ours=statistics.mean(f[1] for f in found),
                    difference=statistics.mean(differences), error=error,
                    agreement=statistics.mean(f[2] for f in found),
                ))  # fmt: skip
    (out / f"{name}.json").write_text(json.dumps({"schema": 1, "caption": caption, "rows": rows}, indent=1) + "\n")
    text = [
        caption,
        "",
        "Loss of the answer (nats/token) after eviction by kvpress and by us, the mean difference of a sample with its "
        "standard error, and the share of kept tokens that are the same.",
        "",
        "| task | method | keep | kvpress | ours | difference | same tokens |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        text.append(f"| {r['task']} | {r['method']} | {r['keep']:g} | {r['kvpress']:.3f} | {r['ours']:.3f} | "
                    f"{r['difference']:+.3f} ± {r['error']:.3f} | {r['agreement']:.2%} |")  # fmt: skip
    (out / f"{name}.md").write_text("\n".join(text) + "\n")


def main():
    from rich.progress import Progress

    parser = argparse.ArgumentParser(prog="python -m bench.quality_peers", description=__doc__)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--tasks", nargs="+", default=[t for t in TASKS if t != "continuation"], choices=TASKS)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "cpu")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"quality-peers-{options.tokens}"
    path = options.out / f"{name}.jsonl"
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(line["task"], line["sample"]) for line in known}
    model, tokenizer = models.load()
    text = tokenizer(models.sample_text(), add_special_tokens=False)["input_ids"]
    wanted = [(task, i) for i in range(options.samples) for task in options.tasks if (task, i) not in done]
    with Progress() as progress, path.open("a") as file:
        for task, i in progress.track(wanted, description=f"{len(done)} done before"):
            results = run_sample(model, *build(task, i, tokenizer, text, options.tokens))
            file.write(json.dumps(dict(task=task, sample=i, results=results)) + "\n")
            file.flush()
    version = importlib.metadata.version("kvpress")
    caption = f"{models.SMOLLM2}, {options.tokens} tokens, cpu, torch {torch.__version__}, kvpress {version}"
    report(options.out, name, caption)
    print(f"wrote {options.out / name}.json, .md")


if __name__ == "__main__":
    main()
