"""The command line: `kvevict demo`."""

from __future__ import annotations

import pathlib
import sys
from typing import Annotated

import typer

from kvevict import demo as demo_module
from kvevict import models

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def root() -> None:
    """Shrink an LLM's KV cache to the tokens worth keeping."""


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="Hugging Face causal LM: an id or a folder.")] = models.SMOLLM2,
    text: Annotated[pathlib.Path | None, typer.Option(help="Text file to read; default: a public-domain text.")] = None,
    tokens: Annotated[int, typer.Option(help="Length of the prompt in tokens.")] = 2000,
    keep: Annotated[list[float], typer.Option(help="Share of the cache to keep; may be repeated.")] = [  # noqa: B006
        1.0,
        0.5,
        0.25,
        0.1,
    ],
    device: Annotated[str, typer.Option(help="torch device.")] = "cpu",
    output: Annotated[pathlib.Path, typer.Option(help="Where the picture goes.")] = pathlib.Path("kvevict-demo.png"),
) -> None:
    """Hide a fact in a long text, shrink the model's KV cache with KeyDiff, and ask for the fact."""
    try:
        demo_module.run(model, text, tokens, keep, device, output)
    except models.Unavailable as error:
        print(f"kvevict demo: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
