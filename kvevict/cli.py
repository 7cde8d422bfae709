"""The command line: `kvevict demo`, `kvevict train`."""

from __future__ import annotations

import pathlib
import sys
from typing import Annotated

import typer

from kvevict import demo as demo_module
from kvevict import models
from kvevict import train as train_module

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def root() -> None:
    """Shrink an LLM's KV cache to the tokens worth keeping."""


Model = Annotated[str, typer.Option(help="Hugging Face causal LM: an id or a folder.")]
Text = Annotated[pathlib.Path | None, typer.Option(help="Text file to read; default: a public-domain text.")]
Device = Annotated[str, typer.Option(help="torch device.")]


@app.command()
def demo(
    model: Model = models.SMOLLM2,
    text: Text = None,
    tokens: Annotated[int, typer.Option(help="Length of the prompt in tokens.")] = 2000,
    keep: Annotated[list[float], typer.Option(help="Share of the cache to keep; may be repeated.")] = [  # noqa: B006
        1.0,
        0.5,
        0.25,
        0.1,
    ],
    policy: Annotated[str, typer.Option(help="keydiff, keynorm, attention, ... or all, side by side.")] = "keydiff",
    weights: Annotated[
        pathlib.Path | None, typer.Option(help="Of the learned scorer; default: what train wrote.")
    ] = None,
    device: Device = "cpu",
    output: Annotated[pathlib.Path, typer.Option(help="Where the picture goes.")] = pathlib.Path("kvevict-demo.png"),
) -> None:
    """Hide a fact in a long text, shrink the model's KV cache, and ask for the fact."""
    try:
        demo_module.run(model, text, tokens, keep, policy, weights, device, output)
    except models.Unavailable as error:
        print(f"kvevict demo: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command()
def train(
    model: Model = models.SMOLLM2,
    text: Text = None,
    texts: Annotated[int, typer.Option(help="Pieces of the text; a quarter of them is held out.")] = 16,
    tokens: Annotated[int, typer.Option(help="Length of a piece in tokens.")] = 1024,
    future: Annotated[int, typer.Option(help="Tokens behind a piece, whose attention is predicted.")] = 128,
    layers: Annotated[int | None, typer.Option(help="Train the first so many layers; default: all.")] = None,
    epochs: Annotated[int, typer.Option(help="At most so many; a layer stops when held-out loss does.")] = 12,
    device: Device = "cpu",
    output: Annotated[pathlib.Path | None, typer.Option(help="Weights (safetensors); default: in the cache.")] = None,
    report: Annotated[pathlib.Path, typer.Option(help="Name of the JSON and PNG report.")] = pathlib.Path(
        "kvevict-train"
    ),
) -> None:
    """Train the learned scorer to predict, from hidden states, the attention that later queries will give."""
    try:
        train_module.run(model, text, texts, tokens, future, layers, epochs, device, output, report)
    except models.Unavailable as error:
        print(f"kvevict train: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
