"""`python -m bench.quality_peers`: kvpress 0.5.5 beside our policies, on the contexts and questions of `kvevict eval`.

Runs in an environment of its own (`make quality-peers`): kvpress wants an older transformers. Every context is read
once. kvpress's presses score the cache in their own forward hook and choose tokens by their own rules; our policies,
with the protection that the presses have, choose of the same tensors. Whichever chose, an EvictingCache holds it and is
asked the same questions, which the compressor has not seen, so that what differs is the choice alone.
"""

import argparse
import contextlib
import importlib.metadata
import json
import pathlib
import unittest.mock

import torch
from kvpress import (
    AdaKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVzipPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from kvpress.presses.base_press import BasePress
from kvpress.presses.scorer_press import compute_n_kept
from transformers import DynamicCache

from bench import RESULTS
from kvevict import models, tasks
from kvevict.evaluate import ask, cut, paired, second_half, share_of
from kvevict.hf.reconstruct import PROMPT, repeat_scores
from kvevict.hf.weights import bound
from kvevict.policies import TOVA, ExpectedAttention, KeyDiff, KeyNorm, Observed, Recency, SnapKV, model_wide

KEEPS = (0.5, 0.25, 0.1)
SIDES = ("kvpress", "ours")
PAIRS = {
    "KeyDiff": (KeyDiffPress(), KeyDiff(sink=0, recent=0)),
    "KeyNorm": (KnormPress(), KeyNorm(sink=0, recent=0)),
    "SnapKV": (SnapKVPress(), SnapKV(sink=0, recent=0)),
    "SnapKV, AdaKV": (AdaKVPress(SnapKVPress()), SnapKV(sink=0, recent=0, heads="adaptive")),
    "TOVA": (TOVAPress(), TOVA(sink=0, recent=0)),
    "StreamingLLM": (StreamingLLMPress(n_sink=4), Recency(recent=0)),
    "Expected Attention": (ExpectedAttentionPress(), ExpectedAttention(recent=0)),
}
KVZIP = "KVzip"  # which reads the context twice, and chooses over the whole model


class Chosen(BasePress):
    """Not a method: notes what every press would keep in each layer, and leaves the cache whole."""

    def __init__(self):
        self.kept = {(name, keep): [] for name in PAIRS for keep in KEEPS}

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        for name, (press, _) in PAIRS.items():
            for keep in KEEPS:
                press.compression_ratio = 1 - keep
                if isinstance(press, AdaKVPress):
                    press.compress(module, hidden_states, keys, values, attentions, kwargs)
                    kept = all_but(module, keys.shape[:3])
                else:
                    scores = press.score(module, hidden_states, keys, values, attentions, kwargs)
                    kept = scores.topk(compute_n_kept(keys.shape[2], 1 - keep), dim=-1).indices.sort(-1)[0]
                self.kept[name, keep].append(kept)
        return keys, values


class ChosenByKVzip(KVzipPress):
    """Notes what is kept at each of KEEPS of the scores of one reading, and masks nothing."""

    def compress_post(self, model):
        self.kept = {}
        for keep in KEEPS:
            self.compression_ratio = 1 - keep
            super().compress_post(model)
            shape = (1, *self.score_val.shape[2:])
            self.kept[keep] = [all_but(layer.self_attn, shape) for layer in model.model.layers]


def all_but(module, shape):
    """[B, H, m]: the tokens of [B, H, S] that a press has not masked, ascending, -1 behind a head's; unmasks them."""
    kept = torch.ones(shape, dtype=torch.bool)
    kept[module.masked_key_indices] = False
    module.masked_key_indices = None
    counts = kept.sum(-1, keepdim=True)
    order = kept.int().argsort(dim=-1, descending=True, stable=True)[..., : int(counts.max())]
    return order.masked_fill(torch.arange(order.shape[-1]) >= counts, -1)


def chosen_by_kvpress(model, tokenizer, context):
    """(layers, captured, {(method, keep): indices [1, H, m] of each layer})."""
    noted, cache = Chosen(), DynamicCache()
    with contextlib.ExitStack() as stack:
        captured = stack.enter_context(models.capture(model))
        stack.enter_context(noted(model))
        model(torch.tensor([context]), past_key_values=cache, logits_to_keep=1)
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    kvzip = ChosenByKVzip(compression_ratio=0.5)
    with unittest.mock.patch("kvpress.presses.kvzip_press.AutoTokenizer") as loader:
        loader.from_pretrained.return_value = tokenizer  # without a chat template, as the context is without one
        with kvzip(model):
            model(torch.tensor([context]), past_key_values=DynamicCache())
    return layers, captured, noted.kept | {(KVZIP, keep): kept for keep, kept in kvzip.kept.items()}


def chosen_by_us(model, tokenizer, context, layers, captured):
    """As `chosen_by_kvpress`: {(method, keep): indices}."""
    seen = [
        Observed(keys=k, values=v, queries=captured.of(i)[0], hidden=captured.of(i)[1], layer=i)
        for i, (k, v) in enumerate(layers)
    ]
    kept = {}
    for name, (_, policy) in PAIRS.items():
        policy = bound(policy, model)
        for keep in KEEPS:
            n = compute_n_kept(len(context), 1 - keep)
            kept[name, keep] = [policy.select(layer, n) for layer in seen]
    prompt = torch.tensor(tokenizer(PROMPT, add_special_tokens=False)["input_ids"])
    scores = repeat_scores(model, torch.tensor([context]), prompt)
    return kept | {(KVZIP, keep): model_wide(scores, keep, sink=4, recent=0) for keep in KEEPS}


@torch.no_grad()
def run_context(model, tokenizer, context, asked, methods):
    """{"whole": answers, method: {keep: {"kvpress": answers, "ours": answers, "same": share of the kept tokens}}}."""
    layers, captured, theirs = chosen_by_kvpress(model, tokenizer, context)
    ours = chosen_by_us(model, tokenizer, context, layers, captured)

    def answers(chosen):
        cache = cut(model, layers, [kept.contiguous() for kept in chosen])
        return [ask(model, cache, len(context), one.question, one.answer) for one in asked]

    results = {"whole": answers([torch.arange(len(context)).expand(*k.shape[:2], -1) for k, _ in layers])}
    for name in methods:
        for keep in KEEPS:
            pair = theirs[name, keep], ours[name, keep]
            heads = [rows for a, b in zip(*pair, strict=True) for rows in zip(a[0], b[0], strict=True)]
            same = sum(len(set(a.tolist()) & set(b.tolist()) - {-1}) for a, b in heads)
            cell = dict(kvpress=answers(pair[0]), same=same / sum(int((a >= 0).sum()) for a, _ in heads))
            cell["ours"] = cell["kvpress"] if cell["same"] == 1 else answers(pair[1])
            results.setdefault(name, {})[str(keep)] = cell
    return results


def report(out, name, caption):
    lines = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
    whole = [line["results"]["whole"] for line in lines]
    rows = []
    for method in (name for name in lines[0]["results"] if name != "whole"):
        for keep in KEEPS:
            cells = [line["results"][method][str(keep)] for line in lines]
            found = {side: [cell[side] for cell in cells] for side in SIDES}
            row = dict(method=method, keep=keep, contexts=len(lines), questions=sum(map(len, whole)))
            row["same"] = sum(cell["same"] for cell in cells) / len(cells)
            for side in SIDES:
                row[side] = sum(loss for context in found[side] for loss, _ in context) / row["questions"]
                row[f"{side}_of_whole"], row[f"{side}_of_whole_error"] = share_of(found[side], whole)
            row["difference"], row["error"] = paired(found["ours"], found["kvpress"])
            rows.append(row)
    (out / f"{name}.json").write_text(json.dumps({"schema": 2, "caption": caption, "rows": rows}, indent=1) + "\n")
    flat = [answer for context in whole for answer in context]
    text = [
        caption,
        "",
        f"{len(flat)} questions in {len(lines)} contexts, unseen when the cache is cut. Mean loss in nats per answer "
        "token, right answers as a share of the whole cache's, the mean paired difference of the loss (± standard "
        "errors over contexts), and the share of kept tokens that are the same. Whole cache: "
        f"{sum(loss for loss, _ in flat) / len(flat):.2f}, {sum(hit for _, hit in flat)} right.",
        "",
        "| method | keep | kvpress | ours | ours - kvpress | same tokens |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        sides = [f"{r[s]:.2f}, {r[f'{s}_of_whole']:.0%} ± {r[f'{s}_of_whole_error']:.0%}" for s in SIDES]
        text.append(f"| {r['method']} | {r['keep']:g} | {' | '.join(sides)} | "
                    f"{r['difference']:+.3f} ± {r['error']:.3f} | {r['same']:.2%} |")  # fmt: skip
    (out / f"{name}.md").write_text("\n".join(text) + "\n")


def main():
    from rich.progress import Progress
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(prog="python -m bench.quality_peers", description=__doc__)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--contexts", type=int, default=16, help="of twelve questions each")
    parser.add_argument("--methods", nargs="+", default=[*PAIRS, KVZIP], choices=[*PAIRS, KVZIP])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "cpu")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"quality-peers-{options.tokens}"
    path = options.out / f"{name}.jsonl"
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if any(set(line["results"]) != {"whole", *options.methods} for line in known):
        parser.error(f"--methods: {path} has others")
    done = {line["sample"] for line in known}
    model, tokenizer = models.load()
    text = tokenizer(second_half(), add_special_tokens=False)["input_ids"]
    wanted = [i for i in range(options.contexts) if i not in done]
    with Progress() as progress, path.open("a") as file:
        for i in progress.track(wanted, description=f"{len(done)} done before"):
            context, asked = tasks.build(i, tokenizer, text, options.tokens)
            results = run_context(model, tokenizer, context, asked, options.methods)
            file.write(json.dumps(dict(sample=i, results=results)) + "\n")
            file.flush()
    version = importlib.metadata.version("kvpress")
    caption = f"{models.SMOLLM2}, {options.tokens} tokens, cpu, torch {torch.__version__}, kvpress {version}"
    report(options.out, name, caption)
    print(f"wrote {options.out / name}.json, .md")


if __name__ == "__main__":
    main()
