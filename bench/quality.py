"""`python -m bench.quality`: what a model still knows after its cache was shrunk, for every policy and share.

Tasks: those of `kvevict eval` (kvevict/tasks.py), one question of a context; the loss of a text's next 64 tokens. The
cache is shrunk before the question is seen (unseen), or with the question in it (seen). Every sample is read once; its
cache is copied, evicted and asked for every policy and share, all policies of a share in one batch. Positions go on
from the tokens seen; the answer is teacher-forced, so a loss is that of every answer token given the right ones before
it, and a hit means that each of them was the likeliest.

Samples are appended to bench/results/<device>/quality-<tokens>.jsonl as they are done, and not done again; the table
(.md), the summary (.json) and the plot (.png) are made from that file.
"""

import argparse
import json
import math
import pathlib
import random
import statistics
from dataclasses import dataclass

import torch

import kvevict
import kvevict.hf  # its attention
from bench import RESULTS, device_name
from kvevict import models, ops, tasks
from kvevict.colors import line_of
from kvevict.evaluate import observe, read
from kvevict.policies import (
    NAMED,
    RECOMMENDED,
    TOVA,
    AttentionMass,
    Hybrid,
    KeyDiff,
    Observed,
    Policy,
    Pyramid,
)


@dataclass(frozen=True, kw_only=True)
class ValueNorm(Policy):
    """Tried, not offered: keep the values of largest norm."""

    def scores(self, seen):
        return seen.values.float().norm(dim=-1)


@dataclass(frozen=True, kw_only=True)
class ValuedTOVA(TOVA):
    """Tried, not offered: attention times the value's norm (VATP, arXiv 2406.12335), of the last query."""

    def scores(self, seen):
        return super().scores(seen) * seen.values.float().norm(p=1, dim=-1)


KEEPS = (0.8, 0.5, 0.25, 0.1)
POLICIES = {
    **NAMED,
    "keydiff, unprotected": KeyDiff(sink=0, recent=0),
    "keydiff, sinks only": KeyDiff(recent=0),
    "attention + keydiff": Hybrid(parts=((0.5, AttentionMass()), (0.5, KeyDiff()))),
    "tova + keydiff": RECOMMENDED,
    "value norm": ValueNorm(),
    "tova · ‖v‖ + keydiff": Hybrid(parts=((0.5, ValuedTOVA()), (0.5, KeyDiff())), heads="shared"),
}
PYRAMID = "tova + keydiff, pyramid"  # RECOMMENDED, with a budget that falls from layer to layer
CONTINUATION = "continuation"
TASKS = (*tasks.TASKS, CONTINUATION)


def build(task, sample, tokenizer, text, tokens):
    """(context, question, answer) ids of one sample: the first of `kvevict.tasks` for the task; the same for the same
    arguments."""
    if task == CONTINUATION:
        start = random.Random(f"{task} {sample} {tokens}").randrange(len(text) - tokens - 64)
        body = text[start : start + tokens + 64]
        return body[:tokens], body[tokens : tokens + 1], body[tokens + 1 :]
    context, asked = tasks.build(sample, tokenizer, text, tokens)
    _, question, answer = next(one for one in asked if one.task == task)
    return context, question, answer


@torch.no_grad()
def ask(model, caches, seen, new, answer):
    """(loss, hit) of each of several equally long caches, stacked: [(keys [P, H, n, D], values)] per layer. Layers may
    differ in length: the model attends by "kvevict" from here on."""
    from kvevict.hf import EvictingCache

    count = caches[0][0].shape[0]
    ids = torch.tensor([new + answer], device=model.device).expand(count, -1)
    positions = torch.arange(seen, seen + ids.shape[1], device=model.device)[None]
    cache = EvictingCache(model, budget=2**40)  # evicts no more
    for layer, (keys, values) in enumerate(caches):
        cache.update(keys, values, layer)
        cache.layers[layer]._unread = False  # filled by hand: no attention is due over what update has returned
    logits = model(ids, past_key_values=cache, position_ids=positions, logits_to_keep=len(answer) + 1).logits[:, :-1]
    target = ids[:, -len(answer) :, None]
    losses = -logits.float().log_softmax(-1).gather(-1, target)[..., 0]
    hits = (logits.argmax(-1) == target[..., 0]).all(-1)
    return list(zip(losses.mean(-1).tolist(), hits.tolist(), strict=True))


def evaluate(model, layers, captured, policies, seen, new, answer):
    """{policy: {keep: (loss, hit)}} after evicting these layers; "whole" for the whole cache."""
    observed = observe(layers, captured)
    results = {"whole": {"1.0": ask(model, layers, seen, new, answer)[0]}}
    scores = {}  # of every policy and layer: the same for every share
    for name, policy in policies.items():
        scores[name] = [policy.scores(Observed(keys=k, **o)) for (k, _), o in zip(layers, observed, strict=True)]
    for keep in KEEPS:
        kept = [[] for _ in layers]
        for name, policy in policies.items():
            for layer, (k, v) in enumerate(layers):
                indices = policy.choose(scores[name][layer], keep)
                kept[layer].append(ops.compact(k, v, indices, inplace=False)[:2])
        stacked = [tuple(torch.cat(side) for side in zip(*pairs, strict=True)) for pairs in kept]
        for name, result in zip(policies, ask(model, stacked, seen, new, answer), strict=True):
            results.setdefault(name, {})[str(keep)] = result
        shares = Pyramid(keep).per_layer(len(layers), layers[0][0].shape[2])
        unequal = []
        for (k, v), scored, share in zip(layers, scores["tova + keydiff"], shares, strict=True):
            unequal.append(ops.compact(k, v, RECOMMENDED.choose(scored, share), inplace=False)[:2])
        results.setdefault(PYRAMID, {})[str(keep)] = ask(model, unequal, seen, new, answer)[0]
    return results


@torch.no_grad()
def run_sample(model, context, question, answer, both):
    """Results without, and with (`both`), the question in the cache that is evicted."""
    from transformers import DynamicCache

    layers, captured = read(model, context)
    results = {"unseen": evaluate(model, layers, captured, POLICIES, len(context), question, answer)}
    if both:
        cache = DynamicCache(layers)
        with models.capture(model) as more:
            model(torch.tensor([question[:-1]], device=model.device), past_key_values=cache, logits_to_keep=1)
        for layer, queries in more.queries.items():
            captured.queries[layer] += queries
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        seen = len(context) + len(question) - 1
        results["seen"] = evaluate(model, layers, captured, POLICIES, seen, question[-1:], answer)
    return results


def summary(lines):
    """[{task, mode, policy, keep, loss, loss_error, hits, samples, difference, difference_error}] from the samples'
    lines; difference: of the loss to KeyDiff's of the same sample, where both keep that share."""
    cells = {}
    for line in lines:
        for mode, policies in line["results"].items():
            for policy, keeps in policies.items():
                for keep, (loss, hit) in keeps.items():
                    cells.setdefault((line["task"], mode, policy, float(keep)), []).append((loss, hit))
    rows = []
    for (task, mode, policy, keep), found in cells.items():
        losses, hits = [loss for loss, _ in found], [hit for _, hit in found]
        rows.append(dict(task=task, mode=mode, policy=policy, keep=keep, loss=statistics.mean(losses),
                         loss_error=_error(losses), hits=statistics.mean(hits), samples=len(found)))  # fmt: skip
        base = cells.get((task, mode, "keydiff", keep))
        if base is not None:  # each line has every cell, so samples are in one order
            pairs = [loss - other for loss, (other, _) in zip(losses, base, strict=True)]
            rows[-1] |= dict(difference=statistics.mean(pairs), difference_error=_error(pairs))
    return rows


def _error(values):
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")


def table(rows, caption):
    lines = [
        caption,
        "",
        "Mean loss in nats per answer token ± standard error, and the share of answers that are right.",
        "",
    ]
    for task, mode in dict.fromkeys((row["task"], row["mode"]) for row in rows):
        cells = {(r["policy"], r["keep"]): r for r in rows if (r["task"], r["mode"]) == (task, mode)}
        whole = cells["whole", 1.0]
        lines += [f"## {task}, question {mode}", "",
                  f"{whole['samples']} samples; whole cache: {whole['loss']:.2f} ± {whole['loss_error']:.2f}, "
                  f"{whole['hits']:.0%}", "",
                  "| policy | " + " | ".join(f"keep {keep:g}" for keep in KEEPS) + " |",
                  "|" + " --- |" * (len(KEEPS) + 1)]  # fmt: skip
        for policy in dict.fromkeys(p for p, _ in cells if p != "whole"):
            shown = [cells[policy, keep] for keep in KEEPS]
            texts = [f"{c['loss']:.2f} ± {c['loss_error']:.2f}, {c['hits']:.0%}" for c in shown]
            lines.append(f"| {policy} | " + " | ".join(texts) + " |")
        lines.append("")
    return "\n".join(lines)


def draw(rows, caption, path):
    """A row for each task and mode: the loss against the share kept, and its paired difference to KeyDiff's, with
    intervals of 95 %, where the summary has it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row["task"], row["mode"]) for row in rows))
    columns = 2 if any("difference" in row for row in rows) else 1
    figure, axes = plt.subplots(
        len(panels), columns, figsize=(5.6 * columns, 3.2 * len(panels)), layout="constrained", squeeze=False
    )
    for of_panel, (task, mode) in zip(axes, panels, strict=True):
        cells = [row for row in rows if (row["task"], row["mode"]) == (task, mode)]
        whole = next(row for row in cells if row["policy"] == "whole")
        for policy, marker in zip([*POLICIES, PYRAMID], "osv^D<>PXp*h8odsv^", strict=False):
            line = sorted((r for r in cells if r["policy"] == policy), key=lambda r: r["keep"])
            style = dict(marker=marker, markersize=4, label=policy, **line_of(policy))
            of_panel[0].errorbar([r["keep"] for r in line] + [1.0], [r["loss"] for r in line] + [whole["loss"]],
                                 [r["loss_error"] for r in line] + [0], **style)  # fmt: skip
            if columns == 2 and policy != "keydiff":
                of_panel[1].errorbar([r["keep"] for r in line], [r["difference"] for r in line],
                                     [1.96 * r["difference_error"] for r in line], **style)  # fmt: skip
        of_panel[0].axhline(whole["loss"], color="black", linestyle="--", linewidth=0.8)
        of_panel[0].set(title=f"{task}, question {mode}", ylabel="loss (nats/token)")
        if columns == 2:
            of_panel[1].axhline(0, color="black", linestyle="--", linewidth=0.8)
            of_panel[1].set(title="paired difference to keydiff", ylabel="nats/token, 95 %")
    for axis in axes[-1]:
        axis.set_xlabel("share of the cache kept")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.suptitle(caption, fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def report(out, name, caption):
    lines = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
    rows = summary(lines)
    (out / f"{name}.json").write_text(json.dumps({"schema": 1, "caption": caption, "rows": rows}, indent=1) + "\n")
    (out / f"{name}.md").write_text(table(rows, caption))
    draw(rows, caption, out / f"{name}.png")
    return rows


def main():
    from rich.progress import Progress
    from transformers.utils import logging

    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--model", default=models.SMOLLM2)
    parser.add_argument("--tokens", type=int, default=1000, help="length of a context")
    parser.add_argument("--samples", type=int, default=24, help="of each task")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="2 samples of two tasks: does it run?")
    parser.add_argument("--out", type=pathlib.Path, help="folder; default: bench/results/<device>")
    options = parser.parse_args()
    if options.quick:
        options.samples, options.tasks = 2, ["fact", CONTINUATION]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = device_name(options.device)
    out = options.out or RESULTS / device
    out.mkdir(parents=True, exist_ok=True)
    name = f"quality-{options.tokens}"
    path = out / f"{name}.jsonl"
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(line["task"], line["sample"]) for line in known if line["model"] == options.model}

    model, tokenizer = models.load(options.model, options.device)
    model.set_attn_implementation("kvevict")
    text = tokenizer(models.sample_text(), add_special_tokens=False)["input_ids"]
    wanted = [(task, i) for i in range(options.samples) for task in options.tasks if (task, i) not in done]
    with Progress() as progress, path.open("a") as file:
        for task, i in progress.track(wanted, description=f"{len(done)} done before"):
            context, question, answer = build(task, i, tokenizer, text, options.tokens)
            results = run_sample(model, context, question, answer, both=task != CONTINUATION)
            line = dict(model=options.model, task=task, sample=i, tokens=options.tokens, results=results)
            file.write(json.dumps(line) + "\n")
            file.flush()
    caption = (
        f"{options.model}, {options.tokens} tokens, {device}, torch {torch.__version__}, kvevict {kvevict.__version__}"
    )
    report(out, name, caption)
    print(f"wrote {out / name}.json, .md, .png")


if __name__ == "__main__":
    main()
