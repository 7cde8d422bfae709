"""`python -m bench.quality_shares`: what a model still knows when layers and heads keep unequal numbers of tokens.

For some scorers (`learned` is the package's own for the model), the same number of tokens shared out in five ways:
`each` head the same, its own choice; `shared`, the same with one choice for all heads of a layer; `layer shares`,
measured shares of the layers (`Fixed(per="layer")`) with one choice for a layer's heads; `head shares`, measured shares
of every head (`Fixed`); `model-wide`, the best scores of all layers and heads (`model_wide`), which says something of
scores that compare over a model: kvevict.policies serves it for those alone.

A context hides four facts and a list of eight pairs, and is read once. Its cache is evicted before a question is seen,
by hand: indices from the policy's scores go to the layers of an EvictingCache as its own choices do. Four questions are
asked of each cut cache. Differences are paired, question by question, to RECOMMENDED with equal heads; their standard
errors are those of the contexts' means, because questions about one context are not independent.

Contexts are appended to bench/results/<device>/quality-shares-<tokens>.jsonl as they are done, and not done again. Give
a --text that the shares were not measured on.
"""

import argparse
import json
import math
import pathlib
import random
import statistics

import torch

import kvevict
from bench import RESULTS, device_name
from bench.quality import CITIES, WORDS, observe, read
from kvevict import models, ops, validate
from kvevict.hf import EvictingCache
from kvevict.hf.choice import Choice
from kvevict.hf.reconstruct import PROMPT, repeat_scores
from kvevict.policies import NAMED, RECOMMENDED, Fixed, LearnedKV, Observed, Shares, model_wide
from kvevict.policies.base import within
from kvevict.policies.shares import find

KEEPS = (0.5, 0.25, 0.1)
POLICIES = {"keydiff": NAMED["keydiff"], "recommended": RECOMMENDED, "snapkv": NAMED["snapkv"]}
KVZIP = "kvzip"  # no policy, because it reads the context twice; protected as the others are
LEARNED = "learned"  # LearnedKV, where the package has it for the model
SCORES = (*POLICIES, KVZIP, LEARNED)
COLUMNS = ("each", "shared", "layer shares", "head shares", "model-wide")
BASE = ("recommended", "shared")
SINK, RECENT = RECOMMENDED.protected


def build(sample, tokenizer, text, tokens):
    """(context, [(question, answer)] of two facts and two pairs), ids; the same for the same arguments."""
    rng = random.Random(f"shares {sample} {tokens}")

    def ids(words):
        return tokenizer(words, add_special_tokens=False)["input_ids"]

    cities, keys, values = rng.sample(CITIES, 4), rng.sample(WORDS, 8), rng.sample(CITIES, 8)
    numbers = [str(rng.randrange(10000, 100000)) for _ in cities]
    pieces = [ids(f" The magic number of {c} is {n}. ") for c, n in zip(cities, numbers, strict=True)]
    pieces.append(ids("\n\n" + "".join(f"{k}: {v}\n" for k, v in zip(keys, values, strict=True)) + "\n"))
    rng.shuffle(pieces)
    room = tokens - sum(map(len, pieces))
    start = rng.randrange(len(text) - room)
    body, context, done = text[start : start + room], [], 0
    for place, piece in zip(sorted(rng.uniform(0.1, 0.9) for _ in pieces), pieces, strict=True):
        context += body[done : int(place * room)] + piece
        done = int(place * room)
    asked = [
        (f"\n\nQuestion: what is the magic number of {cities[i]}?\nAnswer: the magic number of {cities[i]} is",
         f" {numbers[i]}") for i in rng.sample(range(4), 2)
    ]  # fmt: skip
    asked += [(f"\n\nFrom the list above:\n{keys[i]}:", f" {values[i]}") for i in rng.sample(range(8), 2)]
    return context + body[done:], [(ids(question), ids(answer)) for question, answer in asked]


def choices(scores, column, keep, shares):
    """[B, H, m] of each layer: what stays of the scores [B, H, S] of all layers."""
    (_, H, S), L = scores[0].shape, len(scores)
    if column == "model-wide":
        return model_wide(scores, keep, sink=SINK, recent=RECENT)
    if column == "head shares":
        counts = Fixed(shares, keep).per_head(L, H, S, protected=SINK + RECENT)
        counts = [torch.tensor([of_layer], device=scores[0].device) for of_layer in counts]
        return [ops.topk_indices(x, count, sink=SINK, recent=RECENT) for x, count in zip(scores, counts, strict=True)]
    counts = (validate.kept_tokens(keep, S, SINK, RECENT),) * L
    if column == "layer shares":
        counts = Fixed(shares, keep, per="layer").per_layer(L, S)
    found = []
    for scored, count in zip(scores, counts, strict=True):
        sink, recent = within(count, SINK, RECENT)
        heads = "each" if column == "each" else "shared"
        found.append(ops.topk_indices(scored, count, sink=sink, recent=recent, heads=heads))
    return found


def cut(model, layers, chosen):
    """A cache of these layers [(K, V)] that holds what was chosen."""
    cache = EvictingCache(model, budget=2**40)  # evicts no more
    for layer, (keys, values) in enumerate(layers):
        cache.update(keys, values, layer)
        cache.layers[layer]._unread = False  # filled by hand: no attention is due over what update has returned
        cache.layers[layer].apply(Choice(chosen[layer], (chosen[layer] >= 0).sum(-1)))
    return cache


def ask(model, cache, seen, question, answer):
    """(loss, hit) of the teacher-forced answer; the cache is as it was."""
    ids = torch.tensor([question + answer], device=model.device)
    positions = torch.arange(seen, seen + ids.shape[1], device=model.device)[None]
    logits = model(ids, past_key_values=cache, position_ids=positions, logits_to_keep=len(answer) + 1).logits[0, :-1]
    cache.crop(-ids.shape[1])
    target = ids[0, -len(answer) :, None]
    losses = -logits.float().log_softmax(-1).gather(-1, target)
    return losses.mean().item(), bool((logits.argmax(-1) == target[:, 0]).all())


@torch.no_grad()
def run_context(model, tokenizer, context, asked, keeps, shares, names):
    """{scores: {column: {keep: [(loss, hit) of each question]}}}; "whole": of the whole cache."""
    layers, captured = read(model, context)
    seen = [
        Observed(**dict(o, keys=k, values=v, layer=i))
        for i, ((k, v), o) in enumerate(zip(layers, observe(layers, captured), strict=True))
    ]
    policies = dict(POLICIES)
    if LEARNED in names:
        policies[LEARNED] = LearnedKV.of_model(model.config)
    scores = {name: [policies[name].scores(layer) for layer in seen] for name in names if name != KVZIP}
    if KVZIP in names:
        prompt = torch.tensor(tokenizer(PROMPT, add_special_tokens=False)["input_ids"], device=model.device)
        scores[KVZIP] = repeat_scores(model, torch.tensor([context], device=model.device), prompt)

    def answers(chosen):
        cache = cut(model, layers, chosen)
        return [ask(model, cache, len(context), *one) for one in asked]

    everything = [torch.arange(len(context), device=k.device).expand(*k.shape[:2], -1) for k, _ in layers]
    results = {"whole": {"whole": {"1.0": answers(everything)}}}
    for name, scored in scores.items():
        results[name] = {
            column: {str(keep): answers(choices(scored, column, keep, shares)) for keep in keeps} for column in COLUMNS
        }
    return results


def summary(lines):
    """[{policy, column, keep, loss, hits, difference, error, contexts, questions}] from the contexts' lines.

    difference: mean over the questions of the loss less that of BASE; error: its standard error over contexts, which
    have as many questions each.
    """
    rows = []
    for policy, columns in lines[0]["results"].items():
        for column, keeps in columns.items():
            for keep in keeps:
                found = [line["results"][policy][column][keep] for line in lines]
                of_base = [line["results"][BASE[0]][BASE[1]].get(keep) for line in lines]
                row = dict(policy=policy, column=column, keep=float(keep), contexts=len(lines),
                           questions=sum(map(len, found)), loss=mean(loss for x in found for loss, _ in x),
                           hits=mean(hit for x in found for _, hit in x))  # fmt: skip
                if None not in of_base:
                    paired = [
                        mean(a - b for (a, _), (b, _) in zip(x, y, strict=True))
                        for x, y in zip(found, of_base, strict=True)
                    ]
                    row["difference"] = mean(paired)
                    row["error"] = statistics.stdev(paired) / math.sqrt(len(paired)) if len(paired) > 1 else math.nan
                rows.append(row)
    return rows


def mean(values):
    return statistics.fmean(values)


def table(rows, caption):
    whole = next(row for row in rows if row["policy"] == "whole")
    lines = [
        caption, "",
        "Question unseen. Mean loss in nats per answer token, the share of answers that are right, and the paired "
        f"difference to {BASE[0]}, {BASE[1]}, ± its standard error over contexts.", "",
        f"{whole['contexts']} contexts, {whole['questions']} questions; whole cache: {whole['loss']:.2f}, "
        f"{whole['hits']:.0%}",
    ]  # fmt: skip
    for keep in sorted({row["keep"] for row in rows if row is not whole}, reverse=True):
        lines += ["", f"## keep {keep:g}", "", "| scores | " + " | ".join(COLUMNS) + " |", "|" + " --- |" * 6]
        cells = {(row["policy"], row["column"]): row for row in rows if row["keep"] == keep}
        for policy in dict.fromkeys(policy for policy, _ in cells):
            texts = []
            for column in COLUMNS:
                row = cells[policy, column]
                text = f"{row['loss']:.2f}, {row['hits']:.0%}"
                texts.append(
                    text if (policy, column) == BASE else f"{text} ({row['difference']:+.2f} ± {row['error']:.2f})"
                )
            lines.append(f"| {policy} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def main():
    from rich.progress import track
    from transformers.utils import logging

    parser = argparse.ArgumentParser(prog="python -m bench.quality_shares", description=__doc__)
    parser.add_argument("--model", default=models.SMOLLM2)
    parser.add_argument("--shares", type=pathlib.Path, help="of `kvevict budgets`; default: the packaged ones")
    parser.add_argument("--text", type=pathlib.Path, help="of the contexts; default: a public-domain text")
    parser.add_argument("--tokens", type=int, default=1000, help="length of a context")
    parser.add_argument("--contexts", type=int, default=16)
    parser.add_argument("--keeps", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--scores", nargs="+", default=list(SCORES), choices=SCORES, help="beside recommended")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=pathlib.Path, help="folder; default: bench/results/<device>")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, tokenizer = models.load(options.model, options.device)
    model.set_attn_implementation("kvevict")
    shares = Shares.load(options.shares) if options.shares else find(model.config)
    if shares is None:
        parser.error(f"--shares: none are packaged for {options.model}: measure some with `kvevict budgets`")
    device = device_name(options.device)
    out = options.out or RESULTS / device
    out.mkdir(parents=True, exist_ok=True)
    name = f"quality-shares-{options.tokens}"
    path = out / f"{name}.jsonl"
    path.touch()
    done = {json.loads(line)["sample"] for line in path.read_text().splitlines()}
    names = dict.fromkeys((BASE[0], *options.scores))
    text = tokenizer(models.read_text(options.text), add_special_tokens=False)["input_ids"]
    for sample in track([i for i in range(options.contexts) if i not in done], description="contexts"):
        context, asked = build(sample, tokenizer, text, options.tokens)
        results = run_context(model, tokenizer, context, asked, options.keeps, shares, names)
        with path.open("a") as file:
            file.write(json.dumps(dict(sample=sample, results=results)) + "\n")
    source = options.text.name if options.text else "the Pentateuch"
    caption = (
        f"{options.model}, {options.tokens} tokens of {source}, {device}, torch {torch.__version__}, kvevict "
        f"{kvevict.__version__}. Shares: {shares.metadata}."
    )
    rows = summary([json.loads(line) for line in path.read_text().splitlines()])
    (out / f"{name}.json").write_text(json.dumps({"schema": 1, "caption": caption, "rows": rows}, indent=1) + "\n")
    (out / f"{name}.md").write_text(table(rows, caption))
    print(table(rows, caption))


if __name__ == "__main__":
    main()
