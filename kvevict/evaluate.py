"""`kvevict eval`: what a model still answers about a text after its cache was cut, for every policy, budget and share.

A context (kvevict/tasks.py) is read once, and cut before its questions are seen, or, with `seen`, with each question in
it. The same number of tokens falls on layers and heads in up to five ways:

    each          the same number for every head, its own choice
    shared        the same, with one choice for all heads of a layer
    layer shares  measured shares of the layers (`Fixed(per="layer")`), one choice for a layer's heads
    head shares   measured shares of every head (`Fixed`)
    model-wide    the best scores of all layers and heads (`model_wide`): sensible for scores that compare over a model

An answer is teacher-forced: its loss is that of every token given the right ones before it, and it is right if each of
them was the likeliest. Differences are paired, question by question, to the first policy named; their standard errors
are those of the contexts' means, because questions about one context are not independent.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import pathlib
import statistics
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvevict import __version__, models, ops, tasks, validate
from kvevict.colors import line_of
from kvevict.policies import Fixed, KeyDiff, LearnedKV, Observed, Policy, Scorer, Shares, Tracker, model_wide
from kvevict.policies.base import within
from kvevict.policies.shares import config_hash, find

LEARNED = "learned"
POLICIES = ("recommended", "keydiff", "snapkv", LEARNED)
ALL = "all"  # tasks together
COLUMNS = ("each", "shared", "layer shares", "head shares", "model-wide")
ATTENTION = frozenset({"mass", "last_used"})  # what is made of the queries
LAST_STEPS = 64  # of a context, from which last use is noted
TRIED = 48  # tokens that are read first, to see whether it can be done: more than policies protect

_MARKERS = "osv^D<>PXp*dh" * 3

Answer = tuple[float, bool]  # loss in nats per token, right
Layers = list[tuple[Tensor, Tensor]]


def read(model: Any, context: list[int]) -> tuple[Layers, models.Captured]:
    """(K, V) of each layer that grows, after reading these tokens, and what entered each layer's attention."""
    cache, captured = fill(model, context)
    return _grown(cache, growing(model)), captured


def growing(model: Any) -> list[int]:
    """The layers that grow with the text: those with full attention, which evict.

    Raises:
        ValueError: there are none; or others than these and layers with a window, which are carried along whole.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    kinds = [type(layer) for layer in DynamicCache(config=model.config).layers]
    found = [i for i, kind in enumerate(kinds) if kind is DynamicLayer]
    others = {kind.__name__ for kind in kinds} - {"DynamicLayer", DynamicSlidingWindowLayer.__name__}
    if others or not found:
        what = f"layers of the kind {', '.join(sorted(others))}" if others else "no layer that grows with the text"
        raise ValueError(f"{type(model).__name__} has {what}: expected full attention, or some of it beside a window")
    return found


def fill(model: Any, context: list[int], hidden: Collection[int] | None = None) -> tuple[Any, models.Captured]:
    """The model's cache after reading these tokens, and what entered attention; hidden: as `kvevict.models.capture`."""
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=model.config)
    with models.capture(model, hidden) as captured:
        model(torch.tensor([context], device=model.device), past_key_values=cache, logits_to_keep=1)
    return cache, captured


def _grown(cache: Any, which: Sequence[int]) -> Layers:
    return [(cache.layers[i].keys, cache.layers[i].values) for i in which]


def observe(
    layers: Layers,
    captured: models.Captured,
    reduce: str = "sum",
    min_distance: int = 0,
    *,
    which: Sequence[int] | None = None,
    needs: Collection[str] = ATTENTION,
) -> list[dict[str, Any]]:
    """The fields of Observed for every layer, but keys. Mass is the prompt's, as a Tracker notes it; last use is noted
    as if the last tokens had been decoded. Queries are scaled so that 1/√D is the scale of their logits, as an
    EvictingCache shows them.

    Args:
        which: the layers' indices in the model; None: they are all of them.
        needs: of mass and last_used, what is wanted.
    """
    observed = []
    for layer, (keys, values) in zip(which or range(len(layers)), layers, strict=True):
        queries, hidden = captured.of(layer)
        scaling = captured.scaling[layer]
        usual = queries.shape[3] ** -0.5
        known = dict(queries=queries if scaling == usual else queries * (scaling / usual), hidden=hidden, values=values,
                     layer=layer)  # fmt: skip
        if "mass" in needs:
            known["mass"] = _mass(queries, keys, scaling, reduce, min_distance)
        if "last_used" in needs:
            known["last_used"] = _last_used(queries, keys, scaling)
        observed.append(known)
    return observed


def _mass(queries: Tensor, keys: Tensor, scaling: float, reduce: str, min_distance: int) -> Tensor:
    B, H, S = keys.shape[:3]
    tracker = Tracker(B, H, S, keys.device, reduce=reduce, min_distance=min_distance)
    tracker.append(S)
    tracker.observe(queries, keys, scale=scaling)
    return tracker.mass


def _last_used(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    H, S = keys.shape[1:3]
    last = queries[:, :, -LAST_STEPS:].unflatten(1, (H, -1)).float()
    seen = torch.ones(last.shape[3], S, dtype=torch.bool, device=keys.device).tril(S - last.shape[3])
    logits = last @ keys[:, :, None].float().mT * scaling
    weights = logits.masked_fill(~seen, -math.inf).softmax(-1).mean(2)  # [B, H, steps, S]
    steps = torch.arange(S - last.shape[3], S, device=keys.device)[:, None]
    return torch.where(weights >= 1e-3, steps, -1).amax(2).int()


def choices(
    scores: list[Tensor], column: str, keep: float, shares: Shares | None, protected: tuple[int, int]
) -> list[Tensor]:
    """[B, H, m] of each layer: what stays of the scores [B, H, S] of all layers; `protected`: sink, recent."""
    (_, H, S), L, (sink, recent) = scores[0].shape, len(scores), protected
    if column == "model-wide":
        return model_wide(scores, keep, sink=sink, recent=recent)
    if column == "head shares":
        assert shares is not None
        counts = Fixed(shares, keep).per_head(L, H, S, protected=sink + recent)
        given = [torch.tensor([of_layer], device=scores[0].device) for of_layer in counts]
        return [ops.topk_indices(x, count, sink=sink, recent=recent) for x, count in zip(scores, given, strict=True)]
    numbers: Sequence[int] = (validate.kept_tokens(keep, S, sink, recent),) * L
    if column == "layer shares":
        assert shares is not None
        numbers = Fixed(shares, keep, per="layer").per_layer(L, S)
    found = []
    for scored, count in zip(scores, numbers, strict=True):
        first, last = within(count, sink, recent)
        heads = "each" if column == "each" else "shared"
        found.append(ops.topk_indices(scored, count, sink=first, recent=last, heads=heads))
    return found


def cut(model: Any, layers: Layers, chosen: list[Tensor], read: Any = None) -> Any:
    """An EvictingCache of these layers that holds what was chosen. read: the cache they are of, whose layers with a
    window it holds, too."""
    from kvevict.hf import EvictingCache
    from kvevict.hf.choice import Choice
    from kvevict.hf.layer import EvictingLayer

    cache: Any = EvictingCache(model, budget=2**40)  # evicts no more
    which = [i for i, layer in enumerate(cache.layers) if isinstance(layer, EvictingLayer)]
    for i, (keys, values), kept in zip(which, layers, chosen, strict=True):
        cache.update(keys, values, i)
        cache.layers[i]._unread = False  # filled by hand: no attention is due over what update has returned
        cache.layers[i].apply(Choice(kept, (kept >= 0).sum(-1)))
    for i in set(range(len(cache.layers))).difference(which):
        cache.layers[i] = read.layers[i]
    return cache


def ask(model: Any, cache: Any, seen: int, question: list[int], answer: list[int]) -> Answer:
    """The teacher-forced answer; the cache is as it was."""
    from kvevict.hf.layer import EvictingLayer

    ids = torch.tensor([question + answer], device=model.device)
    positions = torch.arange(seen, seen + ids.shape[1], device=model.device)[None]
    held = list(cache.layers)
    # A full window cannot be cropped: copies of such layers bind what is joined, and theirs keep their tensors.
    cache.layers[:] = [layer if isinstance(layer, EvictingLayer) else copy.copy(layer) for layer in held]
    logits = model(ids, past_key_values=cache, position_ids=positions, logits_to_keep=len(answer) + 1).logits[0, :-1]
    cache.layers[:] = held
    for layer in held:
        if isinstance(layer, EvictingLayer):
            layer.crop(-ids.shape[1])
    target = ids[0, -len(answer) :, None]
    losses = -logits.float().log_softmax(-1).gather(-1, target)
    return losses.mean().item(), bool((logits.argmax(-1) == target[:, 0]).all())


def named(names: Sequence[str], model: Any, scorer: pathlib.Path | None = None) -> dict[str, Policy]:
    """The policies of these names for the model; "learned": the scorer of that file, or of the package.

    Raises:
        kvevict.models.Unavailable: a name is not known; the package has no scorer for the model; it has not the weights
            that a policy reads, or no layer that evicts.
    """
    from kvevict.hf import EvictingCache
    from kvevict.hf.cache import POLICIES as KNOWN
    from kvevict.hf.weights import bound

    found: dict[str, Policy] = {}
    for name in names:
        try:
            if name == LEARNED and scorer is not None:
                found[name] = Scorer.load(scorer)
            elif name == LEARNED:
                found[name] = LearnedKV.of_model(model.config)
            elif name in KNOWN:
                found[name] = bound(KNOWN[name], model)
            else:
                raise ValueError(f"expected one of {', '.join([*KNOWN, LEARNED])}")
            EvictingCache(model, found[name], keep=0.5)  # which checks it against the model
        except (OSError, ValueError) as error:
            raise models.Unavailable(f"--policies has {name}: {error}") from error
    return found


@torch.no_grad()
def run_context(
    model: Any,
    tokenizer: Any,
    context: list[int],
    asked: list[tasks.Question],
    keeps: Sequence[float],
    columns: Sequence[str],
    shares: Shares | None,
    policies: dict[str, Policy],
    seen: bool = False,
) -> dict[str, dict[str, dict[str, list[Answer]]]]:
    """{policy: {column: {keep: [answer to each question]}}}; "whole": of the whole cache."""
    if not seen:
        return _answers(model, tokenizer, context, asked, keeps, columns, shares, policies)
    results: dict = {}
    for one in asked:  # a prompt that ends with it: its last token is read over the cut cache
        prompt, last = context + one.question[:-1], one._replace(question=one.question[-1:])
        for name, cells in _answers(model, tokenizer, prompt, [last], keeps, columns, shares, policies).items():
            for column, found in cells.items():
                for keep, answers in found.items():
                    results.setdefault(name, {}).setdefault(column, {}).setdefault(keep, []).extend(answers)
    return results


def _answers(model, tokenizer, prompt, asked, keeps, columns, shares, policies):
    from kvevict.hf.reconstruct import PROMPT, repeat_scores

    which = growing(model)
    needs = frozenset().union(*(policy.needs for policy in policies.values()))
    cache, captured = fill(model, prompt, which if "hidden" in needs else ())
    layers = _grown(cache, which)

    @functools.cache
    def observed(noted):
        of_layers = observe(layers, captured, *noted, which=which, needs=needs)
        return [Observed(keys=keys, **o) for (keys, _), o in zip(layers, of_layers, strict=True)]

    def answers(chosen):
        evicted = cut(model, layers, chosen, cache)
        return [ask(model, evicted, len(prompt), one.question, one.answer) for one in asked]

    everything = [torch.arange(len(prompt), device=k.device).expand(*k.shape[:2], -1) for k, _ in layers]
    results = {"whole": {"whole": {"1.0": answers(everything)}}}
    for name, policy in policies.items():
        shown = observed(policy.noted)
        if "repeated" in policy.needs:  # the context is read twice
            repeat = torch.tensor(tokenizer(PROMPT, add_special_tokens=False)["input_ids"], device=model.device)
            drawn = repeat_scores(model, torch.tensor([prompt], device=model.device), repeat)
            shown = [replace(layer, repeated=scores) for layer, scores in zip(shown, drawn, strict=True)]
        scores = [policy.scores(layer) for layer in shown]
        results[name] = {
            column: {str(keep): answers(choices(scores, column, keep, shares, policy.protected)) for keep in keeps}
            for column in columns
        }
    return results


@torch.no_grad()
def check_served(model: Any, policies: dict[str, Policy], ids: list[int]) -> None:
    """Read and cut a few tokens as contexts will be, before hours are spent on these.

    Raises:
        kvevict.models.Unavailable: the model's attention cannot be "kvevict", or is over other keys than those cached;
            it does not show what a policy reads.
    """
    from kvevict.hf import EvictingCache
    from kvevict.hf.attention import set_up

    if not set_up(model):
        raise models.Unavailable(
            f'{type(model).__name__} computes attention in a way of its own: expected one that can be "kvevict"'
        )
    prompt, last = ids[:TRIED], ids[TRIED : TRIED + 2]
    for name, policy in policies.items():
        try:
            cache: Any = EvictingCache(model, policy, keep=TRIED - 1)
            model(torch.tensor([prompt], device=model.device), past_key_values=cache)
        except ValueError as error:
            raise models.Unavailable(f"--policies has {name}: {error}") from error
    try:
        _answers(model, None, prompt, [tasks.Question("", last[:1], last[1:])], (), (), None, {})
    except ValueError as error:
        raise models.Unavailable(str(error)) from error


def _shares(policies: dict[str, Policy], config: Any) -> Shares | None:
    """Those of a scorer among the policies, or of the package."""
    own = (policy.shares for policy in policies.values() if isinstance(policy, Scorer))
    return next((shares for shares in own if shares is not None), find(config))


def columns_of(names: Sequence[str], shares: Shares | None) -> list[str]:
    """The ways of these names in which a budget can fall, in the order of COLUMNS; none: all that these shares allow.

    Raises:
        kvevict.models.Unavailable: a name is not known, or needs shares that are not.
    """
    known = [column for column in COLUMNS if shares is not None or not column.endswith("shares")]
    for name in names:
        if name not in known:
            hint = " (none are known of the model: see `kvevict budgets`)" if name in COLUMNS else ""
            raise models.Unavailable(f"--budgets has {name!r}{hint}: expected {', '.join(known)}")
    return [column for column in known if not names or column in names]


def _check_shares(model: Any, columns: Sequence[str], keeps: Sequence[float], shares: Shares | None) -> None:
    """Raises:
    kvevict.models.Unavailable: these are not of the model, or cannot give its layers or heads so much.
    """
    from kvevict.hf import EvictingCache

    for column, per in (("head shares", "head"), ("layer shares", "layer")):
        for keep in keeps if column in columns else ():
            assert shares is not None
            try:
                EvictingCache(model, KeyDiff(), keep=Fixed(shares, keep, per=per))
            except ValueError as error:
                raise models.Unavailable(f"shares for {column!r}: {error}") from error


def _check_positions(model, tokenizer, tokens, questions, policies) -> None:
    """Raises:
    kvevict.models.Unavailable: a question, or a repetition, goes beyond the positions that the model has.
    """
    from kvevict.hf.reconstruct import PROMPT

    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    after = max(len(one.question) + len(one.answer) for _, asked in questions for one in asked)
    if any("repeated" in policy.needs for policy in policies.values()):  # in chunks of 2,048, and what leads to them
        repeat = len(tokenizer(PROMPT, add_special_tokens=False)["input_ids"])
        after = max(after, after + repeat + min(tokens + after, 2056))
    if most is not None and tokens + after > most:
        raise models.Unavailable(
            f"--tokens is {tokens}, and {after} tokens follow a context: expected at most {most}, the model's positions"
        )


def base_of(policy: str, columns: Sequence[str]) -> tuple[str, str]:
    """What others are compared with: RECOMMENDED as it is, one choice for a layer; others head by head."""
    column = "shared" if policy == "recommended" else "each"
    return policy, column if column in columns else columns[0]


def summary(lines: Sequence[dict], base: tuple[str, str]) -> list[dict[str, Any]]:
    """A row for every task (and "all"), policy, column and keep, from the contexts' lines.

    loss in nats per token; hits, the share of answers that are right; of_whole, their number as a share of the whole
    cache's; over_whole, the mean over the questions of the loss less the whole cache's; difference, less that of
    `base`. The last three have an ..._error, the standard error over contexts, which have as many questions each.
    """
    rows = []
    asked = lines[0]["tasks"]
    for task in (ALL, *dict.fromkeys(asked)):
        picked = [i for i, of in enumerate(asked) if task in (ALL, of)]

        def answers(policy, column, keep, picked=picked):
            return [[line["results"][policy][column][keep][i] for i in picked] for line in lines]

        whole = answers("whole", "whole", "1.0")
        for policy, columns in lines[0]["results"].items():
            for column, keeps in columns.items():
                for keep in keeps:
                    found = answers(policy, column, keep)
                    row = dict(task=task, policy=policy, column=column, keep=float(keep), contexts=len(lines),
                               questions=sum(map(len, found)), loss=_mean(loss for x in found for loss, _ in x),
                               hits=_mean(hit for x in found for _, hit in x))  # fmt: skip
                    row["of_whole"], row["of_whole_error"] = share_of(found, whole)
                    row["over_whole"], row["over_whole_error"] = paired(found, whole)
                    if keep in lines[0]["results"][base[0]][base[1]]:
                        row["difference"], row["difference_error"] = paired(found, answers(*base, keep))
                    rows.append(row)
    return rows


def paired(found: list[list[Answer]], base: list[list[Answer]]) -> tuple[float, float]:
    """Mean difference of the losses, question by question, and its standard error over contexts."""
    of_contexts = [_mean(a - b for (a, _), (b, _) in zip(x, y, strict=True)) for x, y in zip(found, base, strict=True)]
    return _mean(of_contexts), _error(of_contexts)


def share_of(found: list[list[Answer]], whole: list[list[Answer]]) -> tuple[float, float]:
    """Right answers as a share of the whole cache's, and its standard error over contexts, as of a ratio of means."""
    ours, theirs = ([sum(hit for _, hit in context) for context in side] for side in (found, whole))
    if not sum(theirs):
        return math.nan, math.nan
    share = sum(ours) / sum(theirs)
    return share, _error([a - share * b for a, b in zip(ours, theirs, strict=True)]) / _mean(theirs)


def _error(of_contexts: list[float]) -> float:
    return statistics.stdev(of_contexts) / math.sqrt(len(of_contexts)) if len(of_contexts) > 1 else math.nan


def _mean(values) -> float:
    return statistics.fmean(values)


def markdown(rows: Sequence[dict], caption: str, base: tuple[str, str], seen: bool) -> str:
    """A table for every task and share."""
    columns = [c for c in COLUMNS if any(row["column"] == c for row in rows)]
    lines = [
        caption, "",
        f"Question {'seen' if seen else 'unseen'}. Mean loss in nats per answer token, right answers as a share of "
        f"the whole cache's, and the paired difference of the loss to {base[0]}, {base[1]}; ± their standard errors.",
    ]  # fmt: skip
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        whole = next(row for row in of_task if row["policy"] == "whole")
        lines += ["", f"## {task}: {whole['questions']} questions in {whole['contexts']} contexts", "",
                  f"Whole cache: {whole['loss']:.2f}, {whole['hits']:.0%} right."]  # fmt: skip
        for keep in sorted({row["keep"] for row in of_task if row is not whole}, reverse=True):
            cells = {(r["policy"], r["column"]): r for r in of_task if r["keep"] == keep and r is not whole}
            lines += ["", f"| keep {keep:g} | {' | '.join(columns)} |", "|" + " --- |" * (len(columns) + 1)]
            for policy in dict.fromkeys(policy for policy, _ in cells):
                texts = [cell_text(cells[policy, column], (policy, column) == base) for column in columns]
                lines.append(f"| {policy} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def cell_text(row: dict, is_base: bool) -> str:
    """loss, right answers of the whole cache's (difference)."""
    text = f"{row['loss']:.2f}, {row['of_whole']:.0%} ± {row['of_whole_error']:.0%}"
    return text if is_base else f"{text} ({row['difference']:+.2f} ± {row['difference_error']:.2f})"


def draw(rows: Sequence[dict], caption: str, base: tuple[str, str], output: pathlib.Path) -> None:
    """A column of panels for every way in which a budget falls, of all tasks together: the loss over the whole cache's
    against the share kept, and below it the paired difference to `base`, with intervals of 95 %."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["task"] == ALL]
    whole = next(row for row in rows if row["policy"] == "whole")
    columns = [c for c in COLUMNS if any(row["column"] == c for row in rows)]
    figure, axes = plt.subplots(
        2, len(columns), figsize=(2.7 * len(columns) + 1.6, 6.4), layout="constrained", squeeze=False, sharey="row"
    )
    for (axis, below), column in zip(axes.T, columns, strict=True):
        for policy, marker in zip(dict.fromkeys(r["policy"] for r in rows if r is not whole), _MARKERS, strict=False):
            line = sorted((r for r in rows if (r["policy"], r["column"]) == (policy, column)), key=lambda r: r["keep"])
            style: dict[str, Any] = dict(marker=marker, markersize=4, label=policy, **line_of(policy))
            axis.errorbar(
                [r["keep"] for r in line] + [1.0], [r["over_whole"] for r in line] + [0.0],
                [r["over_whole_error"] for r in line] + [0.0], **style,
            )  # fmt: skip
            if (policy, column) != base:
                below.errorbar(
                    [r["keep"] for r in line], [r["difference"] for r in line],
                    [1.96 * r["difference_error"] for r in line], **style,
                )  # fmt: skip
        for panel in (axis, below):
            panel.axhline(0.0, color="black", linestyle="--", linewidth=0.8)
        axis.set(title=column)
        below.set(xlabel="share of the cache kept")
    axes[0][0].set_ylabel("loss over the whole cache's\n(nats/token)")
    axes[1][0].set_ylabel(f"paired difference to {base[0]}, {base[1]}\n(nats/token, 95 %)")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(caption, fontsize=8)
    figure.savefig(output, dpi=130)
    plt.close(figure)


def run(
    model_name: str,
    text: pathlib.Path | None,
    tokens: int,
    contexts: int,
    names: Sequence[str],
    keeps: Sequence[float],
    columns: Sequence[str],
    scorer: pathlib.Path | None,
    shares_path: pathlib.Path | None,
    seen: bool,
    device: str,
    out: pathlib.Path,
) -> list[dict[str, Any]]:
    """Evaluate; print the table, write eval.json, .md and .png into `out`. Contexts are appended to eval.jsonl as they
    are done, and not done again.

    Raises:
        kvevict.models.Unavailable: a model, text or device cannot be had, an option makes no sense, or `out` holds
            another evaluation.
    """
    names, keeps = list(dict.fromkeys(names)), sorted(set(keeps), reverse=True)
    for keep in keeps:
        if not 0 < keep < 1:  # NaN is not, either
            raise models.Unavailable(f"--keep is {keep}: expected a share between 0 and 1")
    if contexts < 1:
        raise models.Unavailable(f"--contexts is {contexts}: expected at least 1")
    if not out.resolve().parent.is_dir() or (out.exists() and not out.is_dir()):
        raise models.Unavailable(f"--out is {out}: expected a folder in an existing one")
    path = out / "eval.jsonl"
    lines = _results(path)
    body = models.read_text(text) if text else second_half()
    models.known_device(device)

    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    source = text.name if text else "the Pentateuch's second half"
    with Progress(console=console, transient=True) as progress:
        loading = progress.add_task(f"loading {model_name}", total=None)
        model, tokenizer = models.load(model_name, device)
        progress.remove_task(loading)
        policies = named(names, model, scorer)
        try:
            shares = Shares.load(shares_path) if shares_path else _shares(policies, model.config)
            ids = tokenizer(body, add_special_tokens=False)["input_ids"]
            questions = [tasks.build(sample, tokenizer, ids, tokens) for sample in range(contexts)]
        except (OSError, ValueError) as error:
            raise models.Unavailable(str(error)) from error
        columns = columns_of(columns, shares)
        _check_shares(model, columns, keeps, shares)
        _check_positions(model, tokenizer, tokens, questions, policies)
        called = models.called(model_name)
        settings = dict(model=called, tokens=tokens, policies=names, keeps=keeps, columns=columns, seen=seen,
                        text=_told(text) if text else source, tasks=list(tasks.TASKS))  # fmt: skip
        settings |= {name: _told(path) for name, path in (("scorer", scorer), ("shares", shares_path)) if path}
        settings |= _unnamed(model, policies, shares, scorer, shares_path)
        if not all(_of_these(line["settings"], settings) for line in lines.values()):
            raise models.Unavailable(f"--out is {out}, which holds another evaluation: expected an empty folder")
        check_served(model, policies, ids)
        out.mkdir(exist_ok=True)
        kept = b"".join(map(_line, lines.values()))
        if path.exists() and path.read_bytes() != kept:
            path.with_suffix(".part").write_bytes(kept)
            path.with_suffix(".part").replace(path)
        left = [sample for sample in range(contexts) if sample not in lines]
        for sample in progress.track(left, description="contexts"):
            try:
                results = run_context(model, tokenizer, *questions[sample], keeps, columns, shares, policies, seen)
            except ValueError as error:
                raise models.Unavailable(f"context {sample}: {error}") from error
            asked = [one.task for one in questions[sample][1]]
            lines[sample] = dict(sample=sample, settings=settings, tasks=asked, results=results)
            with path.open("ab", buffering=0) as file:  # at once: a line that is cut off is dropped by the next run
                file.write(_line(lines[sample]))
    if len(lines) > contexts:
        console.print(f"{out} holds {len(lines)} contexts: of these, --contexts {contexts}")
    used = [lines[sample] for sample in range(contexts)]
    base = base_of(names[0], columns)
    rows = summary(used, base)
    caption = (
        f"{called}, {tokens} tokens of {source}, question {'seen' if seen else 'unseen'}, "
        f"{contexts} contexts, torch {torch.__version__}, kvevict {__version__}"
    )
    told = {"schema": 3, "caption": caption, "base": base, "rows": [_strict(row) for row in rows]}
    (out / "eval.json").write_text(json.dumps(told, indent=1, allow_nan=False))
    (out / "eval.md").write_text(markdown(rows, caption, base, seen))
    drawn = base_of("keydiff" if "keydiff" in names else names[0], columns)
    draw(summary(used, drawn), caption, drawn, out / "eval.png")
    together = [row for row in rows if row["task"] == ALL]
    whole = next(row for row in together if row["policy"] == "whole")
    shown = Table(title=f"{caption}\nwhole cache: {whole['loss']:.2f} nats, {whole['hits']:.0%} right")
    for heading in ("keep", "scores", "budget", "loss", "of the right answers", "difference"):
        shown.add_column(heading, justify="left" if heading in ("scores", "budget") else "right")
    for row in sorted((r for r in together if r is not whole), key=lambda r: (-r["keep"], r["loss"])):
        difference = f"{row['difference']:+.2f} ± {row['difference_error']:.2f}"
        shown.add_row(f"{row['keep']:g}", row["policy"], row["column"], f"{row['loss']:.2f}",
                      f"{row['of_whole']:.0%} ± {row['of_whole_error']:.0%}",
                      "" if (row["policy"], row["column"]) == base else difference)  # fmt: skip
    console.print(shown)
    console.print(f"wrote {out}/eval.json, eval.md, eval.png")
    return rows


def _results(path: pathlib.Path) -> dict[int, dict]:
    """The lines of an eval.jsonl by context, but for a last one that was cut off as it was written.

    Raises:
        kvevict.models.Unavailable: it cannot be read, or a line is no context's result.
    """
    found: dict[int, dict] = {}
    try:
        *whole, rest = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    except (OSError, UnicodeDecodeError) as error:
        raise models.Unavailable(f"cannot read {path}: {error}") from error
    for number, text in enumerate([*whole, rest], 1):
        try:
            line = json.loads(text)
            if not {"sample", "settings", "tasks", "results"} <= line.keys():
                raise ValueError("has not all that a result has")
            found[line["sample"]] = line
        except (AttributeError, TypeError, ValueError) as error:
            if number <= len(whole):
                raise models.Unavailable(
                    f"{path}, line {number}, is no result of `kvevict eval`: expected an empty folder as --out"
                ) from error
    return found


def _line(result: dict) -> bytes:
    return json.dumps(result).encode() + b"\n"


def _unnamed(model, policies, shares, scorer, shares_path) -> dict[str, Any]:
    """What decides the results beside the options: the model's architecture, and what the package carries for it."""
    packaged = {}
    if LEARNED in policies and not scorer:
        packaged["scorer"], packaged["kvevict"] = policies[LEARNED].metadata.get("date"), __version__
    if shares is not None and not scorer and not shares_path:
        packaged["shares"] = shares.metadata.get("date")
    return {"config": config_hash(model.config), "packaged": packaged}


def _of_these(found: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a line was made with these settings. Older ones do not say what `_unnamed` says."""
    return found == {name: x for name, x in settings.items() if name in found or name not in ("config", "packaged")}


def _strict(row: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN, which an error is that cannot be told."""
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}


def _told(path: pathlib.Path) -> str:
    """A file by name and content: where it lies is nobody's business, and the next one may have its name."""
    return f"{path.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def second_half() -> str:
    """Of the package's text: its scorers are fitted to the first."""
    text = models.sample_text()
    return text[len(text) // 2 :]
