"""The demo: a real model reads a text that hides a fact, its KV cache is shrunk, and it is asked for the fact."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvevict import models
from kvevict.backends import backend, pick
from kvevict.policies import NAMED, Learned, Policy

if TYPE_CHECKING:  # the command line answers --help without transformers
    from kvevict.hf import EvictingCache

# Something the text cannot know, said twice; checked: the whole cache answers it.
FACT = "\n\nThe best pizza in Chicago is sold by Kowalski. Remember: the best pizza in Chicago is sold by Kowalski.\n\n"
QUESTION = "\n\nThe best pizza in Chicago is sold by"
ANSWER = " Kowalski"
CHUNK = 256  # tokens of prefill per step of the progress bar


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
    indices: list[Tensor]  # per layer [1, H, n], empty for the whole cache


def build_prompt(tokenizer, text: str, tokens: int) -> Tensor:
    """[1, tokens] ids of the text with FACT hidden half-way."""
    fact = tokenizer(FACT, add_special_tokens=False)["input_ids"]
    if tokens < 2 * len(fact):
        raise models.Unavailable(f"--tokens is {tokens}: expected at least {2 * len(fact)}, to hide the fact in")
    body = tokenizer(text[: 16 * tokens], add_special_tokens=False)["input_ids"]
    if len(body) < tokens - len(fact):
        raise models.Unavailable(f"the text has {len(body)} tokens: expected at least {tokens - len(fact)}")
    body = body[: tokens - len(fact)]
    half = len(body) // 2
    return torch.tensor([body[:half] + fact + body[half:]])


def read(model, ids: Tensor, policy: Policy, advance: Callable[[int], object]) -> EvictingCache:
    """The whole cache after reading `ids`, with what the policy reads noted; advance(n): n more tokens are read."""
    from kvevict.hf import EvictingCache

    cache = EvictingCache(model.config, policy, budget=ids.shape[1])
    with cache.noting_hidden(model):
        for chunk in ids.split(CHUNK, dim=1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
            advance(chunk.shape[1])
    return cache


def evicted(cache: EvictingCache, keep: float) -> tuple[EvictingCache, list[Tensor], float]:
    """A copy of the cache cut down to that share, the kept indices of its layers, and the seconds it took."""
    cache = copy.deepcopy(cache)
    indices: list[Tensor] = []
    cache.on_evict = lambda eviction: indices.append(eviction.indices)
    layers: list[Any] = cache.layers
    device = layers[0].keys.device
    start = time.perf_counter()
    cache.evict(keep)
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    seconds = time.perf_counter() - start
    return cache, [x.cpu() for x in indices], seconds


def kept_by_kernels(cache: EvictingCache, keep: float) -> Tensor:
    """What the first layer keeps of the cache, indices [1, H, n], when the kernels choose and move."""
    cache = copy.deepcopy(cache)
    indices: list[Tensor] = []
    cache.on_evict = lambda eviction: indices.append(eviction.indices)
    layers: list[Any] = cache.layers
    with backend("triton"):
        layers[0].apply(layers[0].choose(keep))
    return indices[0]


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
    layers: list[Any] = cache.layers
    return sum(x.untyped_storage().nbytes() for layer in layers for x in (layer.keys, layer.values))


def draw(rows: list[Row], seen: int, output: pathlib.Path) -> None:
    """Loss against memory; for one policy, also its kept tokens as layers × position for every share."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shrunk = [row for row in rows if row.indices]
    policies = list(dict.fromkeys(row.policy for row in shrunk))
    maps = shrunk if len(policies) == 1 else []
    with plt.style.context("tableau-colorblind10"):
        width = 3.2 * (len(maps) + 1) if maps else 6.4
        figure, axes = plt.subplots(1, len(maps) + 1, figsize=(width, 3.8), layout="constrained", squeeze=False)
        for axis, row in zip(axes[0], maps, strict=False):
            kept = torch.zeros(len(row.indices), seen)
            for layer, indices in enumerate(row.indices):
                kept[layer] = torch.bincount(indices.flatten(), minlength=seen) / indices.shape[1]
            columns = kept[:, : seen // 20 * 20].unflatten(1, (-1, 20)).mean(-1) if seen >= 400 else kept
            image = axis.imshow(
                columns.numpy(), aspect="auto", cmap="cividis", vmin=0, vmax=1, extent=(0, seen, len(kept), 0)
            )
            axis.set(title=f"keep {row.keep:g}", xlabel="position (tokens)", ylabel="layer")
        if maps:
            figure.colorbar(image, ax=axes[0][len(maps) - 1], label="share kept")
        axis = axes[0][-1]
        for policy, marker in zip(policies, "osv^D<>PXp*", strict=False):
            line = [row for row in shrunk if row.policy == policy]
            axis.plot(
                [r.bytes / 2**20 for r in line], [r.loss for r in line], marker=marker, markersize=4, label=policy
            )
        axis.axhline(rows[0].loss, color="black", linestyle="--", label="whole cache")
        axis.set(title="loss against memory", xlabel="cache (MiB)", ylabel="loss of the answer (nats/token)")
        axis.legend(fontsize=7)
        figure.savefig(output, dpi=130)
        plt.close(figure)


def chosen_policies(name: str, weights: pathlib.Path) -> dict[str, Policy]:
    """The policy called `name`, or all; "learned" from its weights, left out of all where there are none.

    Raises:
        kvevict.models.Unavailable: unknown name, no weights or damaged ones.
    """
    trained: dict[str, Policy] = {}
    if name == "learned" or (name == "all" and weights.exists()):
        try:
            trained = {"learned": Learned.load(weights)}
        except (OSError, ValueError) as error:
            raise models.Unavailable(f"--policy is {name}, without weights ({error}): run `kvevict train`") from error
    if name == "all":
        return NAMED | trained
    if name == "learned":
        return trained
    if name not in NAMED:
        raise models.Unavailable(f"--policy is {name}: expected one of {', '.join(NAMED)}, learned, all")
    return {name: NAMED[name]}


def weights_path(model_name: str) -> pathlib.Path:
    """Where `kvevict train` puts a model's learned scorer, and the demo looks for it."""
    return models.cache_dir() / f"learned-{model_name.replace('/', '--')}.safetensors"


@torch.no_grad()
def run(
    model_name: str,
    text: pathlib.Path | None,
    tokens: int,
    keep: list[float],
    policy_name: str,
    weights: pathlib.Path | None,
    device: str,
    output: pathlib.Path,
) -> list[Row]:
    """Run the demo, print its table, save its picture.

    Raises:
        kvevict.models.Unavailable: a model, text, policy or device cannot be had, or an option makes no sense.
    """
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from transformers.utils import logging

    from kvevict.hf.attention import NAME

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    for share in keep:
        if math.isnan(share) or not 0 < share <= 1 or share * tokens < 1:
            raise models.Unavailable(f"--keep is {share}: expected a share in (0, 1] of at least one token")
    if not output.resolve().parent.is_dir():
        raise models.Unavailable(f"--output is {output}: expected a file in an existing folder")
    policies = chosen_policies(policy_name, weights or weights_path(model_name))
    body = models.read_text(text)
    models.known_device(device)
    where = pick(torch.device(device)).__name__.rpartition(".")[2]
    # The interpreter takes a second or two for each cut of a layer: in the first one it does, beside the reference.
    beside = device == "cpu" and where == "triton" and os.environ.get("KVEVICT_BACKEND", "auto") in ("", "auto")
    same, compared = 0, 0

    chosen = backend("reference") if beside else contextlib.nullcontext()
    with chosen, Progress(console=console, transient=True) as progress:
        loading = progress.add_task(f"loading {model_name}", total=None)
        model, tokenizer = models.load(model_name, device)
        progress.remove_task(loading)
        if any(policy.needs - {"hidden"} for policy in policies.values()):
            model.set_attn_implementation(NAME)
        ids = build_prompt(tokenizer, body, tokens).to(device)
        working = progress.add_task("reading, evicting, asking", total=len(policies) * (tokens + len(keep) * CHUNK))
        rows: list[Row] = []
        for name, policy in policies.items():
            cache = read(model, ids, policy, lambda n: progress.advance(working, n))
            if not rows:
                rows.append(
                    Row("whole cache", 1.0, tokens, held_bytes(cache), 0.0, *ask(model, tokenizer, cache, ids), [])
                )
            for share in keep:
                shrunk, indices, seconds = evicted(cache, share)
                if beside:
                    heads = zip(kept_by_kernels(cache, share)[0], indices[0][0], strict=True)
                    same += sum(int(torch.isin(*both).sum()) for both in heads)
                    compared += indices[0].numel()
                loss, answer = ask(model, tokenizer, shrunk, ids)
                n = indices[0].shape[2]
                rows.append(Row(name, share, n, held_bytes(shrunk), seconds, loss, answer, indices))
                progress.advance(working, CHUNK)

    if beside:
        where = f"reference; the triton kernels, interpreted, keep {same} of its {compared} tokens in layer 0"
    elif device == "cpu" and where == "triton":
        where = "triton kernels, interpreted on the CPU: the time says nothing about a GPU"
    table = Table(title=f"{model_name}, {tokens} tokens")
    for column in ("policy", "keep", "tokens", "before MiB", "after MiB", "evict ms", "loss", "answer"):
        table.add_column(column, justify="left" if column in ("policy", "answer") else "right")
    for row in rows:
        mib = [f"{size / 2**20:.1f}" for size in (rows[0].bytes, row.bytes)]
        kept, time_ms = (f"{row.keep:g}", f"{row.seconds * 1e3:.1f}") if row.indices else ("-", "-")
        table.add_row(row.policy, kept, str(row.tokens), *mib, time_ms, f"{row.loss:.4f}", row.answer)
    console.print(table)
    if policy_name == "all" and "learned" not in policies:
        console.print("without learned, which has no weights here: `kvevict train` makes them")
    console.print(f"backend: {where}")
    console.print(f"the right answer: {ANSWER.strip()}   loss: nats per token of it   picture: {output}")
    draw(rows, tokens, output)
    return rows
