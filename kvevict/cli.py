"""The command line: `kvevict demo`, `kvevict plan`, `kvevict train`, `kvevict budgets`, `kvevict eval`."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys
from typing import Annotated

import typer

from kvevict import __version__, evaluate, measure_shares, models, planner
from kvevict import demo as demo_module
from kvevict import train as train_module

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _version(asked: bool) -> None:
    if asked:
        print(f"kvevict {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Shrink an LLM's KV cache to the tokens worth keeping."""


def _require(*names: str) -> None:
    """Said before anything is done, as the modules that need them are imported late."""
    for name in names:
        if name in sys.modules:
            found = sys.modules[name] is not None
        else:
            found = importlib.util.find_spec(name) is not None
        if not found:
            print(f"kvevict needs {name} for that: pip install 'kvevict[hf]'", file=sys.stderr)
            raise typer.Exit(2)


RUNS_A_MODEL = ("transformers", "safetensors", "accelerate", "matplotlib")

Model = Annotated[str, typer.Option(help="Hugging Face causal LM: an id or a folder.")]
Text = Annotated[pathlib.Path | None, typer.Option(help="Text file to read; default: a public-domain text.")]
Texts = Annotated[
    list[pathlib.Path] | None,
    typer.Option(help="Text file to read; may be repeated. Default: half of a public-domain text."),
]
Device = Annotated[str, typer.Option(help="torch device.")]


@app.command()
def demo(
    model: Model = models.SMOLLM2,
    text: Text = None,
    tokens: Annotated[int, typer.Option(help="Length of the prompt in tokens.")] = 2000,
    keep: Annotated[list[float], typer.Option(help="Share of the cache to keep; may be repeated.")] = [  # noqa: B006
        0.5,
        0.25,
        0.1,
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="keydiff, keynorm, attention, ...; may be repeated, or all. Default: recommended, keydiff, "
            "recency, and learned where the package has it for the model."
        ),
    ] = None,
    shares: Annotated[
        str, typer.Option(help="none: equal; or measured ones of the model: layers, or heads of each layer.")
    ] = "none",
    weights: Annotated[
        pathlib.Path | None, typer.Option(help="Of the learned scorer; default: what the package has for the model.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="torch device; default: cuda, if there is one.")] = None,
    output: Annotated[pathlib.Path, typer.Option(help="Where the picture goes.")] = pathlib.Path("kvevict-demo.png"),
    html: Annotated[
        pathlib.Path | None, typer.Option(help="Also write a page that shows the text and what of it is kept.")
    ] = None,
    interpret: Annotated[
        bool, typer.Option("--interpret", help="On a CPU: cut every layer by the kernels, interpreted. Minutes.")
    ] = False,
) -> None:
    """Hide a fact in a long text, shrink the model's KV cache, and ask for the fact."""
    _require(*RUNS_A_MODEL)
    try:
        demo_module.run(model, text, tokens, keep, policy or [], shares, weights, device, output, html, interpret)
    except models.Unavailable as error:
        print(f"kvevict demo: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command(epilog=f"Presets: {', '.join(planner.presets())}.")
def plan(
    model: Annotated[str, typer.Option(help="Preset (below), config.json or its folder, or a Hugging Face id.")],
    context: Annotated[str, typer.Option(help="Tokens per request, such as 131072 or 128K.")] = "128K",
    batch: Annotated[int, typer.Option(help="Requests.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of weights and cache: fp32, bf16, fp16, fp8.")] = "bf16",
    cache_dtype: Annotated[str | None, typer.Option(help="Of the cache, where it differs.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Such as 80GiB: says what fits.")] = None,
    keep: Annotated[float, typer.Option(help="Share of the tokens that stay.")] = 0.5,
    bandwidth: Annotated[float, typer.Option(help="Bytes a second; default: an H100's data sheet.")] = planner.H100,
    use: Annotated[str, typer.Option(help=f"For the recommendation: {', '.join(planner.USES)}.")] = "general",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[pathlib.Path | None, typer.Option(help="Draw memory against context into this file.")] = None,
) -> None:
    """What a model's KV cache weighs before and after eviction, what then fits, and when evicting has paid."""
    _require(*["matplotlib"] * (plot is not None))
    try:
        result = planner.plan(
            model, context=context, batch=batch, dtype=dtype, cache_dtype=cache_dtype, gpu_memory=gpu_memory, keep=keep,
            bandwidth=bandwidth, use=use,
        )  # fmt: skip
        if plot is not None:
            if not plot.resolve().parent.is_dir():
                raise models.Unavailable(f"--plot is {plot}: expected a file in an existing folder")
            planner.draw(model, result, plot)
    except (models.Unavailable, ValueError, TypeError, OSError) as error:
        print(f"kvevict plan: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if as_json:
        print(json.dumps(result.to_dict(), indent=1))
    else:
        planner.show(result)


@app.command()
def train(
    model: Model = models.SMOLLM2,
    text: Texts = None,
    features: Annotated[
        str,
        typer.Option(help="kv: keys and values; h: hidden states, both in closed form. mlp: a network on the latter."),
    ] = "kv",
    tokens: Annotated[int, typer.Option(help="Tokens to read in all; some of them are held out.")] = 5760,
    length: Annotated[int, typer.Option(help="Length of a piece in tokens.")] = 640,
    epochs: Annotated[int, typer.Option(help="mlp: at most so many; a layer stops when held-out loss does.")] = 12,
    facts: Annotated[
        int | None, typer.Option(help="Also ask for facts hidden in so many tokens, more than --length, say.")
    ] = None,
    device: Device = "cpu",
    output: Annotated[str, typer.Option("--out", help="Where the scorer goes: a file, or a folder (or DIR/).")] = (
        "kvevict-scorer.safetensors"
    ),
    report: Annotated[
        pathlib.Path | None,
        typer.Option(
            help="Name of the JSON and PNG report; default: kvevict-train, in the folder of --out if it is one."
        ),
    ] = None,
) -> None:
    """Fit a learned scorer to a model, which tokens it needs to repeat its text, and measure the model's shares."""
    _require(*RUNS_A_MODEL)
    try:
        train_module.run(model, text or [], features, tokens, length, epochs, facts, device, output, report)
    except models.Unavailable as error:
        print(f"kvevict train: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command()
def budgets(
    model: Model = models.SMOLLM2,
    text: Texts = None,
    texts: Annotated[int, typer.Option(help="Pieces of each text.")] = 5,
    tokens: Annotated[int, typer.Option(help="Length of a piece in tokens; best the length of use.")] = 1024,
    keep: Annotated[list[float], typer.Option(help="Share of the cache to measure at; may be repeated.")] = [  # noqa: B006
        0.5,
        0.25,
        0.1,
    ],
    device: Device = "cpu",
    output: Annotated[str, typer.Option("--out", help="Where the shares go: a file, or a folder (or DIR/).")] = (
        "kvevict-shares.safetensors"
    ),
    report: Annotated[
        pathlib.Path | None,
        typer.Option(help="Name of the JSON and PNG report; default: kvevict-budgets, or in the folder of --out."),
    ] = None,
) -> None:
    """Measure how much of the cache each layer and head is worth, for kvevict.policies.Fixed."""
    _require(*RUNS_A_MODEL)
    try:
        measure_shares.run(model, text or [], texts, tokens, keep, device, output, report)
    except models.Unavailable as error:
        print(f"kvevict budgets: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command("eval")
def evaluate_policies(
    model: Model = models.SMOLLM2,
    policies: Annotated[
        list[str],
        typer.Option(
            help="Names, separated by commas; may be repeated. Differences are to the first. Also learned and kvzip."
        ),
    ] = list(evaluate.POLICIES),  # noqa: B006, B008
    keep: Annotated[
        list[str], typer.Option(help="Shares of the cache to keep, separated by commas; may be repeated.")
    ] = ["0.5", "0.25", "0.1"],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="Length of a context in tokens.")] = 1000,
    contexts: Annotated[int, typer.Option(help="Contexts, of three questions of each task.")] = 16,
    text: Annotated[
        pathlib.Path | None, typer.Option(help="Text file to hide things in; default: half of a public-domain text.")
    ] = None,
    budgets: Annotated[
        list[str],
        typer.Option(
            help=f"How a budget falls: {', '.join(evaluate.COLUMNS)}; separated by commas. Default: all there are."
        ),
    ] = [],  # noqa: B006
    scorer: Annotated[
        pathlib.Path | None, typer.Option(help="learned: a file of `kvevict train`; default: what the package has.")
    ] = None,
    shares: Annotated[
        pathlib.Path | None, typer.Option(help="Of `kvevict budgets`; default: the scorer's, or what the package has.")
    ] = None,
    seen: Annotated[bool, typer.Option(help="Cut when the question has been read.")] = False,
    device: Device = "cpu",
    out: Annotated[pathlib.Path, typer.Option(help="Folder for eval.json, .md, .png; goes on where it was.")] = (
        pathlib.Path("kvevict-eval")
    ),
) -> None:
    """Hide words, numbers, a list and code in a text, cut the model's KV cache in every way, and ask for them."""
    _require(*RUNS_A_MODEL)
    try:
        names = [name for part in policies for name in part.split(",")]
        keeps = [_share(share) for part in keep for share in part.split(",")]
        columns = [column for part in budgets for column in part.split(",")]
        evaluate.run(model, text, tokens, contexts, names, keeps, columns, scorer, shares, seen, device, out)
    except models.Unavailable as error:
        print(f"kvevict eval: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise models.Unavailable(f"--keep is {text}: expected a share between 0 and 1") from None
