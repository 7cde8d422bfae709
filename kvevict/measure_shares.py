"""`kvevict budgets`: measure what each layer and head of a model is worth, and show it."""

from __future__ import annotations

import datetime
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvevict import __version__, models, train
from kvevict.policies import KeyDiff, Shares, kept_shares
from kvevict.policies.shares import config_hash

SINK, RECENT = KeyDiff().protected  # as every policy protects unless told otherwise


def measure(
    model: Any,
    pieces: Sequence[Tensor],
    prompt: Tensor,
    keeps: Sequence[float],
    advance: Callable[[], object] = lambda: None,
) -> Tensor:
    """[K, L, H] float32: what each head keeps of its tokens when the best of all layers and heads stay, by KVzip's
    scores, at each of `keeps`; mean over the texts, ids [T]. advance: called after each of them.

    Raises:
        ValueError: a model that is not served (`kvevict.hf.reconstruct`), or whose layers differ in heads.
    """
    from kvevict.hf.reconstruct import repeat_scores

    total: Tensor | None = None
    for piece in pieces:
        scores = repeat_scores(model, piece[None].to(model.device), prompt.to(model.device))
        found = kept_shares(scores, keeps, sink=SINK, recent=RECENT)
        total = found if total is None else total + found
        advance()
    assert total is not None
    return total / len(pieces)


def favoured(table: Tensor) -> tuple[int, float]:
    """How many heads a tenth of all are, and the part of the budget that so many of the largest shares [L, H] take."""
    count = max(round(table.numel() / 10), 1)
    return count, float(table.flatten().topk(count).values.sum() / table.sum())


def draw(shares: Shares, title: str, output: pathlib.Path) -> None:
    """Layers × heads, a panel for each share of the whole cache: how much of its tokens a head keeps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count, heads = len(shares.keeps), shares.heads
    with plt.style.context("tableau-colorblind10"):
        width = min(max(0.35 * heads, 1.6), 8.0)
        figure, axes = plt.subplots(
            1, count, figsize=(count * width + 1.6, 0.16 * shares.layers + 1.6), layout="constrained", squeeze=False
        )
        for axis, keep, table in zip(axes[0], reversed(shares.keeps), shares.table.flip(0), strict=True):
            image = axis.imshow(table.numpy(), aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
            axis.set(title=f"keep {keep:g}", xlabel="KV head", ylabel="layer", xticks=range(0, heads, -(-heads // 8)))
        figure.colorbar(image, ax=list(axes[0]), label="share of its tokens that a head keeps")
        figure.suptitle(title, fontsize=9)
        figure.savefig(output, dpi=130)
        plt.close(figure)


def run(
    model_name: str,
    text: list[pathlib.Path],
    texts: int,
    tokens: int,
    keep: list[float],
    device: str,
    output: str | pathlib.Path,
    report: pathlib.Path | None,
) -> Shares:
    """Measure, print the table, write the shares to `output`, and report.json and report.png (`kvevict.models.places`).

    Raises:
        kvevict.models.Unavailable: a model, text or device cannot be had, or an option makes no sense.
    """
    for name, value in (("--texts", texts), ("--tokens", tokens)):
        if value < 1:
            raise models.Unavailable(f"{name} is {value}: expected at least 1")
    keeps = sorted(set(keep))
    for share in keeps:
        if not 0 < share <= 1 or share * tokens <= SINK + RECENT:  # NaN is not, either
            raise models.Unavailable(
                f"--keep is {share}: expected a share in (0, 1] of more than the {SINK + RECENT} protected of "
                f"{tokens} tokens"
            )
    bodies = models.read_texts(text)
    models.known_device(device)
    output, report = models.places(output, report, "shares.safetensors", "kvevict-budgets")
    called = models.called(model_name)

    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from transformers.utils import logging

    from kvevict.hf.reconstruct import PROMPT

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"loading {model_name}", total=None)
        model, tokenizer = models.load(model_name, device)
        train.check_model(model, rope=False)

        def ids(words: str) -> Tensor:
            return torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"])

        pieces: list[Tensor] = []
        for name, body in bodies.items():
            try:
                pieces += train.slices(ids(body), texts, tokens)
            except models.Unavailable as error:
                raise models.Unavailable(f"{name}: {error}") from error
        progress.update(task, description="reading, and repeating", completed=0, total=len(pieces))
        try:
            table = measure(model, pieces, ids(PROMPT), keeps, lambda: progress.advance(task))
        except ValueError as error:
            raise models.Unavailable(str(error)) from error

    metadata = {
        "model": called, "config": config_hash(model.config),
        "texts": f"{texts} pieces each of {', '.join(bodies)}", "tokens": str(tokens),
        "protected": f"{SINK} + {RECENT}", "version": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }  # fmt: skip
    shares = Shares(tuple(keeps), table, metadata)
    shares.save(output)
    result = {
        **metadata,
        "keeps": keeps,
        "table": [[[round(x, 5) for x in row] for row in rows] for rows in table.tolist()],
    }
    report.with_suffix(".json").write_text(json.dumps(result) + "\n")
    title = f"{called}: {len(pieces)} texts of {tokens} tokens"
    draw(shares, title, report.with_suffix(".png"))
    shown = Table(title=f"{title}; share of its tokens that a head keeps: mean, least - most of the layer")
    shown.add_column("layer", justify="right")
    for share in reversed(keeps):
        shown.add_column(f"keep {share:g}", justify="right")
    for layer in range(shares.layers):
        rows = [of_keep[layer] for of_keep in table.flip(0)]
        shown.add_row(str(layer), *(f"{row.mean():.2f}  {row.min():.2f} - {row.max():.2f}" for row in rows))
    console.print(shown)
    tenth = [favoured(of_keep) for of_keep in table.flip(0)]
    parts = ", ".join(f"{part:.0%} at {share:g}" for (_, part), share in zip(tenth, reversed(keeps), strict=True))
    console.print(f"the {tenth[0][0]} most favoured of {table[0].numel()} heads hold {parts} of the kept tokens")
    console.print(f"shares: {output}   report: {report.with_suffix('.json')}, {report.with_suffix('.png')}")
    return shares
