"""The demo: a real model reads a text that hides a fact, its KV cache is shrunk, and it is asked for the fact."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import math
import os
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvevict import demo_page, models
from kvevict.backends import backend, pick
from kvevict.colors import line_of
from kvevict.policies import NAMED, RECOMMENDED, Budget, Fixed, Hybrid, LearnedKV, Policy, Scorer
from kvevict.policies.shares import find

if TYPE_CHECKING:  # the command line answers --help without transformers
    from kvevict.hf import EvictingCache

# Something the text cannot know, said twice; checked: the whole cache answers it.
FACT = "\n\nThe best pizza in Chicago is sold by Kowalski. Remember: the best pizza in Chicago is sold by Kowalski.\n\n"
QUESTION = "\n\nThe best pizza in Chicago is sold by"
ANSWER = " Kowalski"
SHARES = ("none", "layers", "heads")  # what has measured shares of the budget, instead of equal ones
LEARNED = "learned"
SIDE_BY_SIDE = ["recommended", "keydiff", "recency"]  # and learned, where the package has it for the model
MOST_MAPS = 4  # panels beside the losses
CHUNK = 1000  # tokens of prefill per step of the progress bar: on a CPU, chunks of 256 take twice as long in all


@dataclass
class Row:
    """One line of the table."""

    policy: str
    keep: float
    tokens: int
    bytes: int
    seconds: float
    loss: float
    answer: str
    indices: list[Tensor]  # per layer [1, H, n], -1 behind what a head keeps; empty for the whole cache


def place_of_fact(tokenizer, tokens: int) -> tuple[int, int]:
    """Where FACT begins and ends in the prompt."""
    length = len(tokenizer(FACT, add_special_tokens=False)["input_ids"])
    begin = (tokens - length) // 2
    return begin, begin + length


def build_prompt(tokenizer, text: str, tokens: int) -> Tensor:
    """[1, tokens] ids of the text with FACT hidden half-way."""
    fact = tokenizer(FACT, add_special_tokens=False)["input_ids"]
    if tokens < 2 * len(fact):
        raise models.Unavailable(f"--tokens is {tokens}: expected at least {2 * len(fact)}, to hide the fact in")
    body = tokenizer(text[: 16 * tokens], add_special_tokens=False)["input_ids"]
    if len(body) < tokens - len(fact):
        raise models.Unavailable(f"the text has {len(body)} tokens: expected at least {tokens - len(fact)}")
    body = body[: tokens - len(fact)]
    half, _ = place_of_fact(tokenizer, tokens)
    return torch.tensor([body[:half] + fact + body[half:]])


def read(model, ids: Tensor, policy: Policy, advance: Callable[[int], object]) -> EvictingCache:
    """The whole cache after reading `ids`, with what the policy reads noted; advance(n): n more tokens are read."""
    from kvevict.hf import EvictingCache

    cache = EvictingCache(model.config, policy, budget=ids.shape[1])  # notes what the policy reads until it is asked
    with cache.noting_hidden(model):
        for chunk in ids.split(CHUNK, dim=1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
            advance(chunk.shape[1])
    return cache


def evicted(
    cache: EvictingCache, keep: float | Budget, policy: Policy | None = None
) -> tuple[EvictingCache, list[Tensor], float]:
    """A copy of the cache cut down to that share by the policy, None: its own; the kept indices of its layers, and the
    seconds it took."""
    cache = copy.deepcopy(cache)
    indices: list[Tensor] = []
    cache.on_evict = lambda eviction: indices.append(eviction.indices)
    layers: list[Any] = cache.layers
    device = layers[0].keys.device
    start = time.perf_counter()
    cache.evict(keep, policy)
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    seconds = time.perf_counter() - start
    return cache, [x.cpu() for x in indices], seconds


def kept_by_kernels(cache: EvictingCache, keep: float, policy: Policy) -> tuple[Tensor, Tensor, Tensor]:
    """What the first layer keeps of the cache, indices [1, H, n], K and V, when the kernels choose and move."""
    cache = copy.deepcopy(cache)
    indices: list[Tensor] = []
    cache.on_evict = lambda eviction: indices.append(eviction.indices)
    layers: list[Any] = cache.layers
    with backend("triton"):
        layers[0].apply(layers[0].choose(keep, policy))
    return indices[0], layers[0].keys, layers[0].values


def ask(model, tokenizer, cache: EvictingCache, ids: Tensor) -> tuple[float, str]:
    """Mean negative log-likelihood of ANSWER after `ids`, which the cache has read, and what the model says."""
    question, answer = (
        torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], device=ids.device)
        for text in (QUESTION, ANSWER)
    )
    new = torch.cat([question, answer], 1)
    forced, free = copy.deepcopy(cache), copy.deepcopy(cache)
    with forced.noting_hidden(model):
        logits = model(new, past_key_values=forced, logits_to_keep=answer.shape[1] + 1).logits[0, :-1]
    loss = -logits.float().log_softmax(-1).gather(-1, answer[0][:, None]).mean().item()

    text = torch.cat([ids, question], 1)
    options = dict(do_sample=False, max_new_tokens=answer.shape[1] + 1)
    with free.noting_hidden(model):
        said = model.generate(text, attention_mask=torch.ones_like(text), past_key_values=free, **options)
    return loss, tokenizer.decode(said[0, text.shape[1] :].tolist()).strip().partition("\n")[0]


def held_bytes(cache: EvictingCache) -> int:
    """Bytes of memory that the keys and values keep alive."""
    return sum(layer.bytes for layer in cache.report())


def draw(rows: list[Row], seen: int, fact: tuple[int, int], title: str, output: pathlib.Path) -> None:
    """What is kept, heads × position: of one policy for every share, of a few at the share next to a quarter; and loss
    against memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shrunk = [row for row in rows if row.indices]
    policies = list(dict.fromkeys(row.policy for row in shrunk))
    maps = [row for row in shrunk if row.keep < 1]  # the whole cache would be one colour
    if len(policies) > 1 and maps:
        shown = min((row.keep for row in maps), key=lambda keep: abs(keep - 0.25))
        maps = [row for row in maps if row.keep == shown] if len(policies) <= MOST_MAPS else []
    panels = len(maps) + 1
    figure, axes = plt.subplots(1, panels, figsize=(2.6 * len(maps) + 5, 3.8), layout="constrained", squeeze=False)
    for axis, row in zip(axes[0], maps, strict=False):
        kept = torch.cat([torch.zeros(x.shape[1], seen + 1).scatter_(1, x[0] % (seen + 1), 1) for x in row.indices])
        kept = kept[:, :seen]  # behind it is what -1 names
        columns = kept[:, : seen // 20 * 20].unflatten(1, (-1, 20)).mean(-1) if seen >= 400 else kept
        image = axis.imshow(
            columns.numpy(), aspect="auto", cmap="cividis", vmin=0, vmax=1, extent=(0, seen, len(row.indices), 0)
        )
        for place in fact:
            axis.axvline(place, color="white", linestyle=":", linewidth=1)
        axis.set(title=f"{row.policy}, keep {row.keep:g}", xlabel="position (tokens)")
        axis.annotate("fact ", (fact[0], 0.02 * len(row.indices)), color="white", fontsize=7, ha="right", va="top")
    if maps:
        axes[0][0].set_ylabel("layer (a row for each head)")
        figure.colorbar(image, ax=axes[0][len(maps) - 1], label="share kept")
    axis = axes[0][-1]
    for policy, marker in zip(policies, "osv^D<>PXp*dh", strict=False):
        line = [row for row in shrunk if row.policy == policy]
        axis.plot(
            [r.bytes / 2**20 for r in line], [r.loss for r in line],
            marker=marker, markersize=4, label=policy, **line_of(policy),
        )  # fmt: skip
    axis.axhline(rows[0].loss, color="black", linestyle="--", label="whole cache")
    axis.set(title="loss against memory", xlabel="cache (MiB)", ylabel="loss of the answer (nats/token)")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(title, fontsize=9)
    figure.savefig(output, dpi=130)
    plt.close(figure)


def chosen_policies(names: list[str], weights: pathlib.Path | None) -> dict[str, Policy]:
    """The policies called so, or all; "learned" from its weights. Where none are given they are the package's, and then
    the model says which (`add_learned`).

    Raises:
        kvevict.models.Unavailable: unknown name, no weights or damaged ones.
    """
    known: dict[str, Policy] = {"recommended": RECOMMENDED, **NAMED}
    if "all" in names:
        names = [*known, LEARNED]
    policies: dict[str, Policy] = {}
    for name in names:
        if name == LEARNED:
            if weights is not None:
                try:
                    policies[name] = Scorer.load(weights)
                except (OSError, ValueError) as error:
                    raise models.Unavailable(f"--policy is {name}, without weights: {error}") from error
        elif name in known:
            policies[name] = known[name]
        else:
            raise models.Unavailable(f"--policy is {name}: expected one of {', '.join(known)}, {LEARNED}, all")
    return policies


def add_learned(policies: dict[str, Policy], config: Any, required: bool) -> None:
    """The scorer that the package has for the model.

    Raises:
        kvevict.models.Unavailable: it is `required`, and there is none.
    """
    try:
        policies[LEARNED] = LearnedKV.of_model(config)
    except ValueError as error:
        if required:
            raise models.Unavailable(f"--policy is {LEARNED}: {error}") from error


def shared_out(shares: str, model: Any, keep: float) -> float | Budget:
    """`keep` for layers or heads by the shares that were measured on such a model, or the same for all.

    Raises:
        kvevict.models.Unavailable: none were.
    """
    if shares == "none":
        return keep
    found = find(model.config)
    if found is None:
        raise models.Unavailable(
            f"--shares is {shares}: expected none, as the package has no shares of such a model; `kvevict budgets` "
            "measures them"
        )
    return Fixed(found, keep, per=shares.removesuffix("s"))


@torch.no_grad()
def run(
    model_name: str,
    text: pathlib.Path | None,
    tokens: int,
    keep: list[float],
    names: list[str],
    shares: str,
    weights: pathlib.Path | None,
    device: str | None,
    output: pathlib.Path,
    html: pathlib.Path | None = None,
    interpret: bool = False,
) -> list[Row]:
    """Run the demo, print its table, save its picture, and its page (kvevict/demo_page.py). interpret: the kernels, in
    Triton's interpreter, cut every layer.

    Raises:
        kvevict.models.Unavailable: a model, text, policy or device cannot be had, or an option makes no sense.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if interpret and device != "cpu":
        raise models.Unavailable(f"--interpret is given, and --device is {device}: expected cpu")
    by_itself = os.environ.get("KVEVICT_BACKEND", "auto") in ("", "auto")
    if device == "cpu" and (interpret or by_itself) and importlib.util.find_spec("triton") is not None:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported, by transformers too
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from transformers.utils import logging

    from kvevict.hf.attention import NAME
    from kvevict.hf.notes import TRACKED

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    for share in keep:
        if math.isnan(share) or not 0 < share <= 1 or share * tokens < 1:
            raise models.Unavailable(f"--keep is {share}: expected a share in (0, 1] of at least one token")
    for option, path in (("output", output), ("html", html)):
        if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
            raise models.Unavailable(f"--{option} is {path}: expected a file in an existing folder")
    if shares not in SHARES:
        raise models.Unavailable(f"--shares is {shares}: expected one of {', '.join(SHARES)}")
    policies = chosen_policies(names or SIDE_BY_SIDE, weights)
    body = models.read_text(text)
    models.known_device(device)
    where = pick(torch.device(device)).__name__.rpartition(".")[2]
    # The interpreter takes a second or two for each cut of a layer: in the first one it does, beside the reference.
    beside = device == "cpu" and where == "triton" and by_itself and not interpret
    same, compared, identical = 0, 0, True

    chosen = backend("reference") if beside else contextlib.nullcontext()
    with chosen, Progress(console=console, transient=True) as progress:
        loading = progress.add_task(f"loading {model_name}{models.to_download(model_name)}", total=None)
        model, tokenizer = models.load(model_name, device)
        progress.remove_task(loading)
        if weights is None and (not names or {LEARNED, "all"} & set(names)):
            add_learned(policies, model.config, required=LEARNED in names)
        if shares == "heads":
            policies = {name: replace(policy, heads="each") for name, policy in policies.items()}
        budgets = [shared_out(shares, model, share) for share in keep]
        if shares != "none" or any(policy.needs - {"hidden"} for policy in policies.values()):
            model.set_attn_implementation(NAME)
        ids = build_prompt(tokenizer, body, tokens).to(device)

        def cut_and_ask(cache: EvictingCache, name: str, policy: Policy, share: float, budget: float | Budget) -> Row:
            nonlocal same, compared, identical
            try:
                shrunk, indices, seconds = evicted(cache, budget, policy)
            except ValueError as error:
                raise models.Unavailable(f"--policy is {name} with --shares {shares}: {error}") from error
            if beside and shares == "none" and policy.spread == "layers" and share == min(keep):
                chosen, *held = kept_by_kernels(cache, share, policy)
                theirs: Any = shrunk.layers[0]
                identical &= torch.equal(held[0], theirs.keys) and torch.equal(held[1], theirs.values)
                heads = zip(chosen[0], indices[0][0], strict=True)
                same += sum(int(torch.isin(*both).sum()) for both in heads)
                compared += indices[0].numel()
            loss, answer = ask(model, tokenizer, shrunk, ids)
            n = round(sum(layer.kept for layer in shrunk.report()) / len(indices))
            progress.advance(working, CHUNK)
            return Row(name, share, n, held_bytes(shrunk), seconds, loss, answer, indices)

        # The text is read once for all that read keys, values and queries, and for those that follow attention.
        groups = [
            {name: policy for name, policy in policies.items() if bool(policy.needs & TRACKED) == tracked}
            for tracked in (False, True)
        ]
        groups = [group for group in groups if group]
        total = len(groups) * tokens + len(policies) * len(keep) * CHUNK
        working = progress.add_task("reading, evicting, asking", total=total)
        rows: list[Row] = []
        for group in groups:
            together = Hybrid(parts=tuple((1.0, policy) for policy in group.values()), heads="shared")
            cache = read(model, ids, together, lambda n: progress.advance(working, n))
            if not rows:
                whole = ask(model, tokenizer, cache, ids)
                rows.append(Row("whole cache", 1.0, tokens, held_bytes(cache), 0.0, *whole, []))
            for name, policy in group.items():
                for share, budget in zip(keep, budgets, strict=True):
                    rows.append(cut_and_ask(cache, name, policy, share, budget))

    if beside and shares != "none":
        where = "reference"
    elif beside:
        bits = ", K and V bit for bit" if identical else ""
        where = f"reference; the triton kernels, interpreted, keep {same} of its {compared} tokens in layer 0{bits}"
    elif device == "cpu" and where == "triton":
        where = "triton kernels, interpreted on the CPU: the time says nothing about a GPU"
    of = "" if shares == "none" else f", measured shares of {shares}"
    title = f"{model_name}, {tokens} tokens{of}"
    table = Table(title=title)
    for column in ("policy", "keep", "tokens", "MiB", "evict ms", "loss", "answer"):
        table.add_column(column, justify="left" if column in ("policy", "answer") else "right")
    for row in rows:
        kept, time_ms = (f"{row.keep:g}", f"{row.seconds * 1e3:.1f}") if row.indices else ("-", "-")
        table.add_row(
            row.policy, kept, str(row.tokens), f"{row.bytes / 2**20:.1f}", time_ms, f"{row.loss:.2f}", row.answer
        )
    console.print(table)
    if "all" in names and LEARNED not in policies:
        console.print("without learned, which the package has not for this model: `kvevict train` makes it")
    console.print(f"backend: {where}")
    console.print(f"the right answer: {ANSWER.strip()}   loss: nats per token of it   picture: {output}")
    fact = place_of_fact(tokenizer, tokens)
    draw(rows, tokens, fact, title, output)
    if html is not None:
        about = dict(about=f"{title}, {device}, torch {torch.__version__}", question=QUESTION, right=ANSWER)
        demo_page.write(demo_page.page_data(rows, demo_page.pieces(tokenizer, ids[0].tolist()), fact, about), html)
        console.print(f"page: {html}")
    return rows
