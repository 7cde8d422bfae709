"""`kvevict train`: fit a scorer to a model, measure shares with it, and show how well it ranks and what it is worth."""

from __future__ import annotations

import datetime
import json
import pathlib
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvevict import __version__, models

SKIPPED = 2000  # tokens at the start of a text, which are not trained on: facts are hidden there
FACT_CONTEXTS = 4  # of twelve questions each


def slices(ids: torch.Tensor, count: int, length: int, skipped: int = SKIPPED) -> list[torch.Tensor]:
    """`count` pieces of `length` ids, evenly spread over the text behind the part that is skipped.

    Raises:
        kvevict.models.Unavailable: the text is too short for pieces that do not overlap.
    """
    rest = ids[skipped:]
    if len(rest) < count * length:
        raise models.Unavailable(f"the text has {len(ids)} tokens: expected at least {skipped + count * length}")
    spacing = len(rest) // count
    return [rest[i * spacing : i * spacing + length] for i in range(count)]


def facts_of(model: Any, tokenizer: Any, policy: Any, ids: list[int], tokens: int) -> dict[str, Any]:
    """What the scorer is worth: mean loss, in nats per answer token, of the questions of `kvevict.tasks` about contexts
    of so many tokens, with the whole cache and with shares of it, chosen over the whole model before they are asked."""
    from kvevict import evaluate, tasks

    losses: dict[str, list[float]] = {}
    before = model.config.get_text_config(decoder=True)._attn_implementation
    model.set_attn_implementation("kvevict")
    try:
        for sample in range(FACT_CONTEXTS):
            context, asked = tasks.build(sample, tokenizer, ids, tokens)
            found = evaluate.run_context(
                model, tokenizer, context, asked, (0.25, 0.1), ("model-wide",), None, {"learned": policy}
            )
            cells = found["whole"]["whole"] | found["learned"]["model-wide"]
            for keep, answers in cells.items():
                losses.setdefault(keep, []).extend(loss for loss, _ in answers)
    finally:
        model.set_attn_implementation(before)
    means = {keep: round(sum(values) / len(values), 4) for keep, values in losses.items()}
    return {"tokens": tokens, "questions": len(losses["1.0"]), "loss": means}


def draw(correlation: dict[str, list[float]], title: str, output: pathlib.Path) -> None:
    """Rank correlation with the target, per layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.style.context("tableau-colorblind10"):
        figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
        for (name, values), marker in zip(correlation.items(), "os", strict=True):
            axis.plot(values, marker=marker, markersize=4, label=name)
        axis.set(xlabel="layer", ylabel="Spearman correlation", title="with KVzip's score, held out")
        axis.legend()
        figure.suptitle(title, fontsize=9)
        figure.savefig(output, dpi=130)
        plt.close(figure)


def check_model(model: Any, *, rope: bool) -> None:
    """Raises:
    kvevict.models.Unavailable: no layer evicts; it has no RoPE, and features "kv" are made of that.
    """
    from kvevict import evaluate

    try:
        evaluate.growing(model)
    except ValueError as error:
        raise models.Unavailable(str(error)) from error
    if rope and not any(type(module).__name__.endswith("RotaryEmbedding") for module in model.modules()):
        raise models.Unavailable(
            f"--features is kv, keys before RoPE, and {type(model).__name__} has no RoPE: expected h or mlp"
        )


def run(
    model_name: str,
    text: list[pathlib.Path],
    features: str,
    tokens: int,
    length: int,
    epochs: int,
    facts: int | None,
    device: str,
    output: str | pathlib.Path,
    report: pathlib.Path | None,
) -> Any:
    """Fit, print the figures, write the scorer to `output`, and report.json and report.png (`kvevict.models.places`).
    Returns the Fit. facts: length of the contexts in which some are hidden; None: none are.

    Raises:
        kvevict.models.Unavailable: a model, text or device cannot be had, or an option makes no sense.
    """
    from kvevict.tasks import LEAST

    if features not in ("kv", "h", "mlp"):
        raise models.Unavailable(f"--features is {features!r}: expected kv, h or mlp")
    if length < 1 or tokens < 2 * length:
        raise models.Unavailable(f"--tokens is {tokens} and --length {length}: expected at least two texts of 1 token")
    if epochs < 1:
        raise models.Unavailable(f"--epochs is {epochs}: expected at least 1")
    if facts is not None and facts < LEAST:
        raise models.Unavailable(f"--facts is {facts}: expected at least {LEAST} tokens, to hide them in")
    bodies = models.read_texts(text)
    models.known_device(device)
    output, report = models.places(output, report, "scorer.safetensors", "kvevict-train")
    called = models.called(model_name)

    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from transformers.utils import logging

    from kvevict.hf.fit import fit
    from kvevict.hf.reconstruct import PROMPT

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    start = time.perf_counter()
    count = -(-tokens // length // len(bodies))  # of each text
    skipped = max(SKIPPED, facts or 0)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"loading {model_name}", total=None)
        model, tokenizer = models.load(model_name, device)
        check_model(model, rope=features == "kv")

        def ids(words: str) -> Tensor:
            return torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"])

        encoded = {name: ids(body) for name, body in bodies.items()}
        of_texts = []
        for name, of_text in encoded.items():
            try:
                of_texts.append(slices(of_text, count, length, skipped))
            except models.Unavailable as error:
                raise models.Unavailable(f"{name}: {error}") from error
        pieces = [piece for same_place in zip(*of_texts, strict=True) for piece in same_place]
        held_out = max(len(pieces) // 8, 1)
        metadata = {
            "model": called, "texts": f"{len(pieces) - held_out} pieces of {', '.join(bodies)}",
            "tokens": str(length), "version": __version__,
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }  # fmt: skip

        def show(done: int, total: int) -> None:
            progress.update(task, description="reading, and repeating", completed=done, total=total)

        try:
            found = fit(
                model, pieces, ids(PROMPT), features=features, held_out=held_out, epochs=epochs, metadata=metadata,
                progress=show,
            )  # fmt: skip
        except ValueError as error:
            raise models.Unavailable(str(error)) from error
        found.policy.save(output)  # whatever becomes of the questions
        told = None
        if facts is not None:
            progress.update(task, description="asking for hidden facts", completed=0, total=None)
            hidden_in = next(iter(encoded.values()))[:skipped].tolist()
            try:
                told = facts_of(model, tokenizer, found.policy, hidden_in, facts)
            except ValueError as error:
                raise models.Unavailable(f"--facts: {error}; the scorer is written, without them: {output}") from error
            policy = replace(found.policy, metadata={**found.policy.metadata, "facts": json.dumps(told)})
            found = replace(found, policy=policy)
            policy.save(output)
    seconds = time.perf_counter() - start
    means = {name: sum(values) / len(values) for name, values in found.correlation.items()}
    shares = found.policy.shares
    measured = None if shares is None else {"keeps": shares.keeps, "table": shares.table.tolist()}
    result = {**found.policy.metadata, "seconds": seconds, "spearman": means, "spearman_per_layer": found.correlation,
              "shares": measured, "facts": told}  # fmt: skip
    report.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    title = f"{called}, {features}: {len(pieces)} texts of {length} tokens, {held_out} held out, {seconds:.0f} s"
    draw(found.correlation, title, report.with_suffix(".png"))
    table = Table(title=title)
    table.add_column("scorer")
    table.add_column("Spearman with KVzip's score, held out", justify="right")
    for name, mean in means.items():
        table.add_row(name, f"{mean:.3f}")
    console.print(table)
    if told is not None:
        losses = ", ".join(f"{loss:.2f} with {float(keep):.0%}" for keep, loss in told["loss"].items())
        console.print(f"{told['questions']} questions about {facts} tokens, nats per token of cache: {losses}")
    console.print(f"scorer: {output}   report: {report.with_suffix('.json')}, {report.with_suffix('.png')}")
    return found
