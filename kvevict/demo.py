"""The demo: a real model reads a text that hides a fact, its KV cache is shrunk, and it is asked for the fact."""

from __future__ import annotations

import math
import pathlib
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvevict import models
from kvevict.backends import pick
from kvevict.ops import keydiff_compact

# Something the text cannot know, said twice; checked: the whole cache answers it.
FACT = "\n\nThe best pizza in Chicago is sold by Kowalski. Remember: the best pizza in Chicago is sold by Kowalski.\n\n"
QUESTION = "\n\nThe best pizza in Chicago is sold by"
ANSWER = " Kowalski"
SINK = 4
CHUNK = 256  # tokens of prefill per step of the progress bar

Layers = list[tuple[Tensor, Tensor]]  # K and V [1, H, S, D] of every layer


@dataclass
class Row:
    """One line of the table."""

    name: str
    tokens: int
    bytes: int
    seconds: float
    loss: float
    answer: str
    indices: list[Tensor]  # per layer [1, H, n], empty for the whole cache


def build_prompt(tokenizer, text: str, tokens: int) -> Tensor:
    """[1, tokens] ids of the text with FACT hidden half-way."""
    fact = tokenizer(FACT, add_special_tokens=False)["input_ids"]
    if tokens < len(fact) + 2 * SINK:
        raise models.Unavailable(f"--tokens is {tokens}: expected at least {len(fact) + 2 * SINK}, to hold the fact")
    body = tokenizer(text[: 16 * tokens], add_special_tokens=False)["input_ids"]
    if len(body) < tokens - len(fact):
        raise models.Unavailable(f"the text has {len(body)} tokens: expected at least {tokens - len(fact)}")
    body = body[: tokens - len(fact)]
    half = len(body) // 2
    return torch.tensor([body[:half] + fact + body[half:]])


def prefill(model, ids: Tensor, advance) -> Layers:
    """The cache after reading `ids`; advance(n) is called after every n tokens."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    for chunk in ids.split(CHUNK, dim=1):
        model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
        advance(chunk.shape[1])
    return [(layer.keys, layer.values) for layer in cache.layers]


def evict(layers: Layers, keep: float) -> tuple[Layers, list[Tensor], float]:
    """KeyDiff on every layer: the new cache, the kept indices, and the seconds it took."""
    device = layers[0][0].device
    start = time.perf_counter()
    done = [keydiff_compact(k, v, keep=keep, sink=SINK, inplace=False) for k, v in layers]
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
    """Kept tokens as layers × position for every share, and loss against memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shrunk = [row for row in rows if row.indices]
    figure, axes = plt.subplots(1, len(shrunk) + 1, figsize=(3.2 * (len(shrunk) + 1), 3.4), layout="constrained")
    for axis, row in zip(axes, shrunk, strict=False):
        kept = torch.zeros(len(row.indices), seen)
        for layer, indices in enumerate(row.indices):
            kept[layer] = torch.bincount(indices.flatten(), minlength=seen) / indices.shape[1]
        columns = kept[:, : seen // 20 * 20].unflatten(1, (-1, 20)).mean(-1) if seen >= 400 else kept
        image = axis.imshow(columns, aspect="auto", cmap="cividis", vmin=0, vmax=1, extent=(0, seen, len(kept), 0))
        axis.set(title=row.name, xlabel="position (tokens)", ylabel="layer")
    figure.colorbar(image, ax=axes[len(shrunk) - 1], label="share kept")
    axes[-1].plot([row.bytes / 2**20 for row in shrunk], [row.loss for row in shrunk], "o-", color="#0072b2")
    axes[-1].axhline(rows[0].loss, color="#d55e00", linestyle="--", label="whole cache")
    axes[-1].set(title="loss against memory", xlabel="cache (MiB)", ylabel="loss of the answer (nats/token)")
    axes[-1].legend()
    figure.savefig(output, dpi=130)
    plt.close(figure)


@torch.no_grad()
def run(
    model_name: str, text: pathlib.Path | None, tokens: int, keep: list[float], device: str, output: pathlib.Path
) -> list[Row]:
    """Run the demo, print its table, save its picture.

    Raises:
        kvevict.models.Unavailable: a model, text or device cannot be had, or an option makes no sense.
    """
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    for share in keep:
        if math.isnan(share) or not 0 < share <= 1 or share * tokens < SINK + 1:
            raise models.Unavailable(f"--keep is {share}: expected a share in (0, 1] of more than {SINK} tokens")
    if not output.resolve().parent.is_dir():
        raise models.Unavailable(f"--output is {output}: expected a file in an existing folder")
    try:
        body = models.sample_text() if text is None else text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise models.Unavailable(f"cannot read the text {text}: {error}") from error
    models.known_device(device)

    with Progress(console=console, transient=True) as progress:
        loading = progress.add_task(f"loading {model_name}", total=None)
        model, tokenizer = models.load(model_name, device)
        progress.remove_task(loading)
        ids = build_prompt(tokenizer, body, tokens).to(device)
        reading = progress.add_task(f"reading {tokens} tokens", total=tokens)
        layers = prefill(model, ids, lambda n: progress.advance(reading, n))
        asking = progress.add_task("evicting and asking", total=1 + len(keep))
        loss, answer = ask(model, tokenizer, layers, tokens)
        rows = [Row("whole cache", tokens, held_bytes(layers), 0.0, loss, answer, [])]
        progress.advance(asking)
        for share in keep:
            shrunk, indices, seconds = evict(layers, share)
            loss, answer = ask(model, tokenizer, shrunk, tokens)
            n = shrunk[0][0].shape[2]
            rows.append(Row(f"keep {share:g}", n, held_bytes(shrunk), seconds, loss, answer, indices))
            progress.advance(asking)

    where = pick(torch.device(device)).__name__.rpartition(".")[2]
    if device == "cpu" and where == "triton":
        where = "triton kernels, interpreted on the CPU: the time says nothing about a GPU"
    table = Table(title=f"{model_name}, {tokens} tokens, KeyDiff with {SINK} sinks")
    for column in ("cache", "tokens", "before MiB", "after MiB", "evict ms", "loss", "answer"):
        table.add_column(column, justify="left" if column in ("cache", "answer") else "right")
    for row in rows:
        mib = [f"{size / 2**20:.1f}" for size in (rows[0].bytes, row.bytes)]
        time_ms = f"{row.seconds * 1e3:.1f}" if row.indices else "-"
        table.add_row(row.name, str(row.tokens), *mib, time_ms, f"{row.loss:.4f}", row.answer)
    console.print(table)
    console.print(f"backend: {where}")
    console.print(f"the right answer: {ANSWER.strip()}   loss: nats per token of it   picture: {output}")
    draw(rows, tokens, output)
    return rows
