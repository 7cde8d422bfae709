"""`kvevict train --features kv`: fit the scorer of keys and values to a model, and show how well it ranks."""

from __future__ import annotations

import datetime
import json
import pathlib
import time
from typing import Any

import torch
from torch import Tensor

from kvevict import __version__, models, train


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


def run(
    model_name: str,
    text: list[pathlib.Path],
    tokens: int,
    length: int,
    device: str,
    output: pathlib.Path,
    report: pathlib.Path,
) -> Any:
    """Fit, print the figures, write the scorer to `output`, and report.json and report.png. Returns the Fit.

    Raises:
        kvevict.models.Unavailable: a model, text or device cannot be had, or an option makes no sense.
    """
    if length < 1 or tokens < 2 * length:
        raise models.Unavailable(f"--tokens is {tokens} and --length {length}: expected at least two texts of 1 token")
    for path in (output, report):
        if not path.resolve().parent.is_dir():
            raise models.Unavailable(f"cannot write {path}: expected a file in an existing folder")
    bodies = {str(path): models.read_text(path) for path in text} or {"the Pentateuch": models.sample_text()}
    models.known_device(device)

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
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"loading {model_name}", total=None)
        model, tokenizer = models.load(model_name, device)

        def ids(words: str) -> Tensor:
            return torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"])

        of_texts = []
        for name, body in bodies.items():
            try:
                of_texts.append(train.slices(ids(body), count, length))
            except models.Unavailable as error:
                raise models.Unavailable(f"{name}: {error}") from error
        pieces = [piece for same_place in zip(*of_texts, strict=True) for piece in same_place]
        held_out = max(len(pieces) // 8, 1)
        metadata = {
            "model": model_name, "texts": f"{len(pieces) - held_out} pieces of {', '.join(bodies)}",
            "tokens": str(length), "version": __version__,
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }  # fmt: skip

        def show(done: int, total: int) -> None:
            progress.update(task, description="reading, and repeating", completed=done, total=total)

        try:
            found = fit(model, pieces, ids(PROMPT), held_out=held_out, metadata=metadata, progress=show)
        except ValueError as error:
            raise models.Unavailable(str(error)) from error
    seconds = time.perf_counter() - start
    found.policy.save(output)
    means = {name: sum(values) / len(values) for name, values in found.correlation.items()}
    result = {**found.policy.metadata, "seconds": seconds, "spearman": means, "spearman_per_layer": found.correlation}
    report.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    title = f"{model_name}: {len(pieces)} texts of {length} tokens, {held_out} held out, {seconds:.0f} s"
    draw(found.correlation, title, report.with_suffix(".png"))
    table = Table(title=title)
    table.add_column("scorer")
    table.add_column("Spearman with KVzip's score, held out", justify="right")
    for name, mean in means.items():
        table.add_row(name, f"{mean:.3f}")
    console.print(table)
    console.print(f"scorer: {output}   report: {report.with_suffix('.json')}, {report.with_suffix('.png')}")
    return found
