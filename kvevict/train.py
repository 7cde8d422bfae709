"""`kvevict train --features mlp`: fit a network on hidden states to a model; how well it ranks, what it is worth."""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import torch

from kvevict import demo, models
from kvevict.policies import KeyDiff, Policy, Recency
from kvevict.policies.training import Fitted, fit

SHARES = (0.5, 0.25)
FACT_TOKENS = 2000  # the demo's prompt: read from the start of the text, which is not trained on


def slices(ids: torch.Tensor, count: int, length: int) -> list[torch.Tensor]:
    """`count` pieces of `length` ids, evenly spread over the text behind the demo's part.

    Raises:
        kvevict.models.Unavailable: the text is too short for pieces that do not overlap.
    """
    rest = ids[FACT_TOKENS:]
    if len(rest) < count * length:
        raise models.Unavailable(f"the text has {len(ids)} tokens: expected at least {FACT_TOKENS + count * length}")
    spacing = len(rest) // count
    return [rest[i * spacing : i * spacing + length] for i in range(count)]


@torch.no_grad()
def fact_losses(model, tokenizer, text: str, policies: dict[str, Policy]) -> dict[str, list[float]]:
    """Loss of the demo's hidden fact: with the whole cache, and per policy for every share in SHARES."""
    ids = demo.build_prompt(tokenizer, text, FACT_TOKENS).to(model.device)
    losses: dict[str, list[float]] = {}
    for name, policy in policies.items():
        cache = demo.read(model, ids, policy, lambda n: None)
        if not losses:
            losses["whole cache"] = [demo.ask(model, tokenizer, cache, ids)[0]]
        losses[name] = [demo.ask(model, tokenizer, demo.evicted(cache, share)[0], ids)[0] for share in SHARES]
    return losses


def draw(fitted: Fitted, output: pathlib.Path) -> None:
    """Loss against epoch, mean over layers still training; rank correlation per layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.style.context("tableau-colorblind10"):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        longest = max(len(curve) for curve in fitted.losses)
        for side, label in enumerate(("training", "held out")):
            # A layer that stopped early stays at its last value, so that every mean is over all layers.
            means = [
                sum(curve[min(epoch, len(curve) - 1)][side] for curve in fitted.losses) / len(fitted.losses)
                for epoch in range(longest)
            ]
            left.plot(range(1, longest + 1), means, marker="os"[side], label=label)
        left.set(xlabel="epoch", ylabel="cross-entropy (nats), mean over layers", title="learned scorer")
        left.legend()
        for (name, values), marker in zip(fitted.spearman.items(), "osv", strict=True):
            right.plot(values, marker=marker, markersize=4, label=name)
        right.set(xlabel="layer", ylabel="Spearman correlation", title="with the future mass, held out")
        right.legend()
        figure.savefig(output, dpi=130)
        plt.close(figure)


def run(
    model_name: str,
    text: pathlib.Path | None,
    texts: int,
    tokens: int,
    future: int,
    layers: int | None,
    epochs: int,
    device: str,
    output: pathlib.Path | None,
    report: pathlib.Path,
) -> dict:
    """Train, print the figures, write the weights to `output`, and report.json and report.png.

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
    output = demo.weights_path(model_name) if output is None else output
    for name, value, least in (("--tokens", texts, "two pieces"), ("--length", tokens + 1, "1"),
                               ("--future", future + 1, "1"), ("--epochs", epochs + 1, "1")):  # fmt: skip
        if value < 2:
            raise models.Unavailable(f"{name} is too small: expected at least {least}")
    for path in (output, report):
        try:
            path.resolve().parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise models.Unavailable(f"cannot write {path}: {error}") from error
    body = models.read_text(text)
    models.known_device(device)
    start = time.perf_counter()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"loading {model_name}", total=None)
        model, tokenizer = models.load(model_name, device)
        ids = torch.tensor(tokenizer(body, add_special_tokens=False)["input_ids"])
        pieces = slices(ids, texts, tokens + future)

        def show(stage: str, done: int, total: int) -> None:
            progress.update(task, description=stage, completed=done, total=total)

        try:
            fitted = fit(model, pieces, tokens=tokens, future=future, layers=layers, epochs=epochs, progress=show)
        except ValueError as error:
            raise models.Unavailable(str(error)) from error
        seconds = time.perf_counter() - start
        fitted.policy.save(output)
        losses = {}
        if len(fitted.policy.layers) == model.config.num_hidden_layers:
            show("asking for the hidden fact", 0, 1)
            policies = {"learned": fitted.policy, "keydiff": KeyDiff(), "recency": Recency()}
            losses = fact_losses(model, tokenizer, body, policies)

    result: dict[str, Any] = {
        "model": model_name, "texts": texts, "tokens": tokens, "future": future, "seconds": seconds,
        "spearman": {name: sum(values) / len(values) for name, values in fitted.spearman.items()},
        "spearman_per_layer": fitted.spearman, "fact_loss": losses, "fact_shares": SHARES, "losses": fitted.losses,
    }  # fmt: skip
    report.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    draw(fitted, report.with_suffix(".png"))
    table = Table(title=f"{model_name}: {texts} texts of {tokens} tokens, {seconds:.0f} s")
    for column in ("scorer", "Spearman, held out", *(f"fact loss, keep {share:g}" for share in SHARES)):
        table.add_column(column, justify="left" if column == "scorer" else "right")
    for name in dict.fromkeys((*result["spearman"], *losses)):
        shown = [f"{loss:.3f}" for loss in losses.get(name, [])]
        rank = f"{result['spearman'][name]:.3f}" if name in result["spearman"] else "-"
        table.add_row(name, rank, *(shown + ["-"] * len(SHARES))[: len(SHARES)])
    console.print(table)
    console.print(f"weights: {output}   report: {report.with_suffix('.json')}, {report.with_suffix('.png')}")
    return result
