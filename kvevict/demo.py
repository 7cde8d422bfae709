"""The demo: a real model reads a text that hides a fact, its KV cache is shrunk, and it is asked for the fact."""

from __future__ import annotations

import math
import pathlib
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvevict import models, ops
from kvevict.backends import pick
from kvevict.policies import NAMED, Learned, Policy, Tracker

# Something the text cannot know, said twice; checked: the whole cache answers it.
FACT = "\n\nThe best pizza in Chicago is sold by Kowalski. Remember: the best pizza in Chicago is sold by Kowalski.\n\n"
QUESTION = "\n\nThe best pizza in Chicago is sold by"
ANSWER = " Kowalski"
LAST_STEPS = 64  # of the prompt, from which last use is noted
CHUNK = 256  # tokens of prefill per step of the progress bar

Layers = list[tuple[Tensor, Tensor]]  # K and V [1, H, S, D] of every layer


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


def prefill(model, ids: Tensor, advance) -> tuple[Layers, models.Captured]:
    """The cache after reading `ids`, and what entered each layer's attention; advance(n): n more tokens are read."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    with models.capture(model) as captured:
        for chunk in ids.split(CHUNK, dim=1):
            model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
            advance(chunk.shape[1])
    return [(layer.keys, layer.values) for layer in cache.layers], captured


def observe(layers: Layers, captured: models.Captured, needs: frozenset[str], advance) -> list[dict[str, Any]]:
    """The fields of Observed that policies with these needs read, for every layer; advance(1) after each."""
    observed = []
    for layer, (keys, values) in enumerate(layers):
        queries, hidden = captured.of(layer)
        B, H, S = keys.shape[:3]
        tracker = Tracker(B, H, S, keys.device)
        tracker.append(S)
        if "mass" in needs:
            tracker.observe(queries, keys)
        if "last_used" in needs:  # as if the prompt's last tokens had been decoded
            for step in range(max(S - LAST_STEPS, 0), S):
                ops.decode_attention(
                    queries[:, :, step : step + 1], keys[:, :, : step + 1], values[:, :, : step + 1],
                    last_used=tracker.last_used[:, :, : step + 1], step=step,
                )  # fmt: skip
        observed.append(
            dict(queries=queries, hidden=hidden, mass=tracker.mass, last_used=tracker.last_used, layer=layer)
        )
        advance(1)
    return observed


def evict(
    layers: Layers, observed: list[dict[str, Any]], policy: Policy, keep: float
) -> tuple[Layers, list[Tensor], float]:
    """The policy on every layer: the new cache, the kept indices, and the seconds it took."""
    device = layers[0][0].device
    start = time.perf_counter()
    done = [
        policy.compact(k, v, keep=keep, inplace=False, **seen) for (k, v), seen in zip(layers, observed, strict=True)
    ]
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    seconds = time.perf_counter() - start
    return [(c.keys, c.values) for c in done], [c.indices.cpu() for c in done], seconds


def ask(model, tokenizer, layers: Layers, seen: int) -> tuple[float, str]:
    """Mean negative log-likelihood of ANSWER, and what the model says. Positions go on from the tokens seen."""
    from transformers import DynamicCache

    device = layers[0][0].device

    def ids(text: str) -> Tensor:
        return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], device=device)

    def step(cache, new: Tensor, position: int) -> Tensor:
        positions = torch.arange(position, position + new.shape[1], device=device)[None]
        return model(new, past_key_values=cache, position_ids=positions, use_cache=True).logits[0].float()

    question, answer = ids(QUESTION), ids(ANSWER)
    logits = step(DynamicCache(layers), torch.cat([question, answer], 1), seen)
    predicted = logits[question.shape[1] - 1 : -1].log_softmax(-1)
    loss = -predicted.gather(-1, answer[0][:, None]).mean().item()

    cache, said, new, position = DynamicCache(layers), [], question, seen
    for _ in range(answer.shape[1] + 1):
        token = step(cache, new, position)[-1].argmax().item()
        position += new.shape[1]
        said.append(token)
        new = torch.tensor([[token]], device=device)
    return loss, tokenizer.decode(said).strip().partition("\n")[0]


def held_bytes(layers: Layers) -> int:
    """Bytes of memory that the cache keeps alive."""
    return sum(x.untyped_storage().nbytes() for pair in layers for x in pair)


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
        kvevict.models.Unavailable: unknown name, no weights.
    """
    if name == "all":
        return NAMED | ({"learned": Learned.load(weights)} if weights.exists() else {})
    if name == "learned":
        try:
            return {name: Learned.load(weights)}
        except (OSError, ValueError) as error:
            raise models.Unavailable(f"--policy is learned, without weights ({error}): run `kvevict train`") from error
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

    with Progress(console=console, transient=True) as progress:
        loading = progress.add_task(f"loading {model_name}", total=None)
        model, tokenizer = models.load(model_name, device)
        progress.remove_task(loading)
        ids = build_prompt(tokenizer, body, tokens).to(device)
        reading = progress.add_task(f"reading {tokens} tokens", total=tokens)
        layers, captured = prefill(model, ids, lambda n: progress.advance(reading, n))
        observing = progress.add_task("observing attention", total=len(layers))
        needs = frozenset[str]().union(*(policy.needs for policy in policies.values()))
        observed = observe(layers, captured, needs, lambda n: progress.advance(observing, n))
        asking = progress.add_task("evicting and asking", total=1 + len(keep) * len(policies))
        loss, answer = ask(model, tokenizer, layers, tokens)
        rows = [Row("whole cache", 1.0, tokens, held_bytes(layers), 0.0, loss, answer, [])]
        progress.advance(asking)
        for name, policy in policies.items():
            for share in keep:
                shrunk, indices, seconds = evict(layers, observed, policy, share)
                loss, answer = ask(model, tokenizer, shrunk, tokens)
                n = shrunk[0][0].shape[2]
                rows.append(Row(name, share, n, held_bytes(shrunk), seconds, loss, answer, indices))
                progress.advance(asking)

    where = pick(torch.device(device)).__name__.rpartition(".")[2]
    if device == "cpu" and where == "triton":
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
