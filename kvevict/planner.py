"""`kvevict plan`: what a KV cache weighs, what fits before and after eviction, what evicting costs and when it pays."""

from __future__ import annotations

import difflib
import importlib.resources
import json
import pathlib
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvevict import validate
from kvevict.traffic import Compaction, KeydiffScores, Selection

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8"}
H100 = 3.35e12  # bytes a second: the data sheet of an H100 SXM

# How a budget falls on layers and heads, and how that is written.
BUDGETS = {
    "equal": "keep={keep:g}",
    "layer shares": "keep=Fixed(shares, {keep:g}, per='layer')",
    "head shares": "keep=Fixed(shares, {keep:g})",
    "model-wide": "keep=ModelWide({keep:g})",
}

# How much of the whole cache's right answers has to be left, and whether the cache is cut with the question in it.
USES = {
    "general": (0.8, "unseen"),
    "question answering": (0.95, "seen"),
    "chat": (0.7, "unseen"),
    "research": (0.95, "unseen"),
}


@dataclass(frozen=True)
class Layer:
    """What one layer caches per token: `rows` KV heads of `width` elements, `key_width` of them K, the others V."""

    kind: str  # "full", "sliding", "shared" (reads another layer's cache) or "none" (its state does not grow)
    rows: int
    width: int
    key_width: int
    window: int | None = None  # tokens that a sliding layer holds at most


@dataclass(frozen=True)
class Recommendation:
    """A policy, how its budget falls and a share for a use, and what was measured of them; keep, expected and measured
    are None where nothing was enough."""

    use: str
    policy: str
    budget: str  # of BUDGETS
    keep: float | None
    expected: float | None  # right answers, as a share of the whole cache's
    measured: str | None


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, times in seconds. before: the whole cache; after: full-attention layers cut to `kept` tokens."""

    model: str  # as it was asked for
    context: int
    limit: int | None  # tokens that the model was made for, where its configuration says so
    batch: int
    keep: float
    kept: int
    cache_dtype: str
    layers: dict[str, int]  # kind -> how many
    bytes_per_token: int  # of all full-attention layers together: what grows with the context, and can be evicted
    window_bytes: int  # of all sliding layers together, whose windows are full; at this batch
    layer_bytes: int  # of the largest layer, before
    cache_before: int
    cache_after: int
    weights: int
    gpu_memory: int | None
    largest_context_before: int | None  # at this batch; 0: not even one token fits
    largest_context_after: int | None
    largest_batch_before: int | None  # at this context
    largest_batch_after: int | None
    workspace: int  # transient, of evicting one layer in place
    bandwidth: float
    eviction_seconds: float  # computed at that bandwidth, not timed
    saved_seconds_per_step: float
    break_even_steps: float | None  # decode steps after which evicting has paid; None: nothing is evicted
    recommendation: Recommendation | None  # None: there is nothing to evict from
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, as `--json` prints them."""
        return asdict(self)


def presets() -> dict[str, dict[str, Any]]:
    """Configurations of common models, as in their config.json, and their number of parameters."""
    return json.loads(importlib.resources.files("kvevict").joinpath("data/presets.json").read_text())


def preset_name(model: str) -> str:
    """The preset that a model's usual names lead to: "meta-llama/Meta-Llama-3-8B" is shaped as "llama-3-8b"."""
    name = model.rpartition("/")[2].lower()
    name = re.sub(r"^(?:meta-)?llama-?([23])", r"llama-\1", name)
    name = name.replace("llama-3.3-70b", "llama-3.1-70b")
    return re.sub(r"(?:-hf|-chat|-instruct|-it|-pt|-base|-v0\.3)+$", "", name)


def quantity(name: str, value: int | str) -> int:
    """128K is 131,072 (tokens); 80GiB and 80GB are bytes, of 2^30 and 10^9.

    Raises:
        ValueError: not such a quantity, or below 1.
    """
    units = {"": 1, "K": 2**10, "M": 2**20, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
             "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value).strip())
    if not match or match[2].upper() not in units or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}: expected a number such as 4096, 128K or 80GiB")
    number = int(float(match[1]) * units[match[2].upper()])
    if number < 1:
        raise ValueError(f"{name} is {value!r}: expected at least 1")
    return number


def model_config(model: Any) -> tuple[str, dict[str, Any]]:
    """(name, config) of a preset, a config.json or its folder, a transformers config, or a Hugging Face id.

    Raises:
        kvevict.models.Unavailable: nothing of that name can be had.
    """
    from kvevict.models import Unavailable

    if hasattr(model, "to_dict"):
        return model.model_type, model.get_text_config(decoder=True).to_dict()
    path = pathlib.Path(model)
    path = path / "config.json" if path.is_dir() else path
    if path.suffix == ".json":
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise Unavailable(f"cannot read the configuration {path}: {error}") from error
        inner = config.get("text_config", config) if isinstance(config, dict) else config
        if not isinstance(inner, dict):
            raise Unavailable(f"the configuration {path} holds {type(inner).__name__}: expected a JSON object")
        return str(model), inner
    known = presets()
    name = preset_name(str(model))
    if name in known:
        return str(model), known[name]
    refusal = f"model is {str(model)!r}{_close(name, known)}: no preset"
    instead = f"`--model FOLDER/config.json` takes any model's configuration; presets are {', '.join(known)}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):  # nor a name on the hub
        raise Unavailable(f"{refusal}, no config.json and no Hugging Face id; {instead}")
    try:
        from huggingface_hub import constants, try_to_load_from_cache

        if not isinstance(try_to_load_from_cache(str(model), "config.json"), str):
            _require_answer(constants.ENDPOINT)
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        return str(model), config.get_text_config(decoder=True).to_dict()
    except ImportError as error:
        reason = f"to look an id up, pip install 'kvevict[hf]' ({error.name} is missing)"
        raise Unavailable(f"{refusal}; {reason}; {instead}") from error
    except Exception as error:  # a configuration that transformers cannot take fails in many ways
        raise Unavailable(f"{refusal}, and: {_first_line(error)}; {instead}") from error


def _close(name: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _require_answer(endpoint: str) -> None:
    """The hub's own client tries for minutes before it gives up.

    Raises:
        OSError: no answer within a second, a resolver's time included.
    """
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(endpoint, timeout=1).close()
            answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except OSError:
            pass

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(0.9)
    if not answered.is_set():
        raise OSError(f"{endpoint} does not answer")


def model_layers(config: dict[str, Any]) -> list[Layer]:
    """What each layer of a model caches, from its configuration.

    Raises:
        ValueError: it does not say, or something that no model has.
    """
    count, heads = _size(config, "num_hidden_layers", most=4096), _size(config, "num_attention_heads")
    if config.get("kv_lora_rank") is not None:  # MLA: one latent vector and one rotary key for all heads
        width = _size(config, "kv_lora_rank") + _size(config, "qk_rope_head_dim")  # the latent vector is K and V
        return [Layer("full", 1, width, width)] * count
    kv_heads = _size(config, "num_key_value_heads", heads)
    head_dim = _size(config, "head_dim", 0) or _size(config, "hidden_size") // heads
    window = _size(config, "sliding_window", 0) or None
    own = _of_full_layers(config)  # Gemma 4's are wider, and may have fewer heads
    full_heads, full_dim = _size(own, "num_key_value_heads", kv_heads), _size(own, "head_dim", head_dim)
    full = Layer("full", full_heads, 2 * full_dim, full_dim)
    sliding, chunked = (
        Layer("sliding", kv_heads, 2 * head_dim, head_dim, held)
        for held in (window, _size(config, "attention_chunk_size", 0) or None)
    )
    by_type = {
        "full_attention": full,
        "sliding_attention": sliding,
        "chunked_attention": chunked,
    }
    kinds = config.get("layer_types")
    if kinds:
        if not isinstance(kinds, list) or len(kinds) != count or not all(isinstance(kind, str) for kind in kinds):
            raise ValueError(f"the configuration's layer_types are {str(kinds)[:80]}: expected {count} strings")
        sharing = _size(config, "num_kv_shared_layers", 0) if config.get("num_kv_shared_layers") else 0
        found = [by_type.get(kind, Layer("none", 0, 0, 0)) for kind in kinds[: count - sharing]]
        return found + [Layer("shared", 0, 0, 0)] * (count - len(found))
    if not window or config.get("use_sliding_window") is False:
        return [full] * count
    pattern = _size(config, "sliding_window_pattern", 0)  # every so many layers one with full attention
    if pattern:
        return [full if (i + 1) % pattern == 0 else sliding for i in range(count)]
    return [sliding] * count


def _of_full_layers(config: dict[str, Any]) -> dict[str, Any]:
    """head_dim and num_key_value_heads of full-attention layers, where they are not the sliding ones': as Gemma 4's
    config.json says it, or as transformers' configuration object does."""
    for overrides in (config.get("per_layer_config") or {}).values():
        return overrides
    own = {"head_dim": config.get("global_head_dim")}
    if config.get("attention_k_eq_v"):
        own["num_key_value_heads"] = config.get("num_global_key_value_heads")
    return own


def _size(config: dict[str, Any], name: str, default: int | None = None, most: int = 2**40) -> int:
    """A number of the configuration; where it has none, `default`, unless that is None."""
    value = config.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"the configuration's {name} is {str(value)[:80]}: expected an int from 1 to {most}")
    return value


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _parameters(config: dict[str, Any]) -> int:
    """How many parameters the model has: the configuration says so, or transformers builds it without memory.

    Raises:
        kvevict.models.Unavailable: transformers is missing or cannot build it.
    """
    from kvevict.models import Unavailable

    if config.get("parameters") is not None:
        return _size(config, "parameters", most=2**60)
    import torch

    options = {key: value for key, value in config.items() if key not in ("model_type", "parameters")}
    try:
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(str(config.get("model_type")), **options), trust_remote_code=False
            )
    except Exception as error:  # a configuration that transformers cannot take fails in many ways
        raise Unavailable(f"cannot build the model to count its parameters: {_first_line(error)}") from error
    return sum(p.numel() for p in model.parameters())


def cache_bytes(
    layers: Sequence[Layer], tokens: int, element_size: int, batch: int = 1, kept: int | None = None
) -> int:
    """Bytes of the cache after `tokens` tokens; kept: full-attention layers hold so many of them."""
    total = 0
    for layer in layers:
        held = min(tokens, layer.window or tokens)
        if layer.kind == "full" and kept is not None:
            held = kept
        total += held * layer.rows * layer.width * element_size
    return batch * total


def _most(fits, limit: int) -> int:
    """The largest number from 0 to `limit` that fits; what fits does so for every smaller one."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def recommend(use: str, context: int) -> Recommendation:
    """The smallest share whose measured accuracy is enough for the use, at the measured length nearest to `context`.

    Raises:
        ValueError: unknown use.
    """
    validate.one_of("use", use, tuple(USES))
    enough, mode = USES[use]
    rows = json.loads(importlib.resources.files("kvevict").joinpath("data/quality.json").read_text())["rows"]
    rows = [row for row in rows if row["mode"] == mode]
    length = min({row["tokens"] for row in rows}, key=lambda tokens: abs(tokens - context))
    rows = [row for row in rows if row["tokens"] == length and row["kept"] >= enough]
    if not rows:
        return Recommendation(use, "RECOMMENDED", "equal", None, None, None)
    row = min(rows, key=lambda row: (row["keep"], -row["kept"]))
    measured = (
        f"{row['kept']:.0%} of the whole cache's right answers at {length:,} tokens, question {mode} "
        f"({row['model']}, {row['samples']} samples)"
    )
    return Recommendation(use, row["policy"], row["budget"], row["keep"], row["kept"], measured)


def plan(
    model: Any,
    *,
    context: int | str = 131072,
    batch: int = 1,
    dtype: str = "bfloat16",
    cache_dtype: str | None = None,
    gpu_memory: int | str | None = None,
    keep: float = 0.5,
    bandwidth: float = H100,
    use: str = "general",
) -> Plan:
    """What a model's KV cache weighs before and after eviction, what then fits, and what evicting costs.

    Everything is computed, nothing is timed. Sliding-window layers hold at most their window and are not evicted from.
    An MLA layer is counted as serving engines and transformers from 5.17 on store it, one latent vector per token.

    Args:
        model: a preset (`kvevict.planner.presets`), a config.json or its folder, a transformers config, or a Hugging
            Face id (which needs transformers and, unless cached, a network).
        context: tokens per request, such as 131072 or "128K".
        batch: requests.
        dtype: of the weights, and of the cache: float32, bfloat16, float16, float8 (or fp32, bf16, fp16, fp8).
        cache_dtype: of the cache, where it differs; None: float8 where the configuration says so, else dtype.
        gpu_memory: bytes, or such as "80GiB"; None: nothing is said of what fits.
        keep: share of the tokens that stay.
        bandwidth: bytes a second that eviction and decoding move; default: an H100 SXM's data sheet.
        use: "general", "question answering", "chat" or "research", for the recommendation.

    Raises:
        ValueError, TypeError: an argument is out of range. kvevict.models.Unavailable: the model cannot be had.
    """
    tokens = quantity("context", context)
    validate.integer("batch", batch, 1)
    memory = None if gpu_memory is None else quantity("gpu_memory", gpu_memory)
    if memory is not None and memory < 2**20:
        raise ValueError(f"gpu_memory is {gpu_memory!r}: expected bytes, or a number with a unit, such as 80GiB")
    if validate.number("bandwidth", bandwidth) <= 0:
        raise ValueError(f"bandwidth is {bandwidth}: expected bytes a second")
    if not isinstance(keep, float):
        raise TypeError(f"keep is {keep!r}: expected a float in (0, 1], a share")
    kept = validate.kept_tokens(keep, tokens, 0, 0)
    recommendation: Recommendation | None = recommend(use, tokens)
    name, config = model_config(model)
    layers = model_layers(config)
    notes = []
    if preset_name(name) != name and preset_name(name) in presets():
        notes.append(f"shaped as the preset {preset_name(name)}")
    limit = _size(config, "max_position_embeddings", 0) or None
    if limit is not None and tokens > limit:
        notes.append(f"{tokens:,} tokens are beyond the model's own limit, {limit:,}")
    if cache_dtype is None and _stores_fp8(config):
        cache_dtype = "float8"
        notes.append("the configuration stores K and V as float8")
    dtype, cache_dtype = _dtype("dtype", dtype), _dtype("cache_dtype", dtype if cache_dtype is None else cache_dtype)
    e = BYTES[cache_dtype]
    weights = _parameters(config) * BYTES[dtype]
    if config.get("kv_lora_rank"):
        notes.append("MLA: a latent vector per token, as engines and transformers >= 5.17 store it; older ones K and V")
    kinds = {kind: sum(layer.kind == kind for layer in layers) for kind in ("full", "sliding", "shared", "none")}
    if kinds["none"]:
        notes.append(f"{kinds['none']} layers keep a state that does not grow; it is not counted")
    if not kinds["full"]:
        notes.append("no layer has full attention: there is nothing to evict from")
        recommendation = None
    if memory is not None and weights > memory:
        notes.append(f"the weights alone, {_bytes(weights)} in {dtype}, do not fit {_bytes(memory)}")

    def fits(tokens: int, batch: int, evicted: bool) -> bool:
        left = validate.kept_tokens(keep, tokens, 0, 0) if evicted else None
        return memory is not None and weights + cache_bytes(layers, tokens, e, batch, left) <= memory

    largest: list[int | None] = [None] * 4
    if memory is not None:
        largest = [
            *(_most(lambda n, after=after: n == 0 or fits(n, batch, after), 2**31) for after in (False, True)),
            *(_most(lambda n, after=after: fits(tokens, n, after), 2**20) for after in (False, True)),
        ]
        if largest[0] == 2**31:
            notes.append("the cache does not grow with the context")

    full = [layer for layer in layers if layer.kind == "full"]
    moved = 0.0
    for layer in full:
        heads, values = batch * layer.rows, layer.width - layer.key_width
        moved += KeydiffScores(heads, tokens, layer.key_width, e).bytes + Selection(heads, tokens, kept).bytes
        moved += Compaction(heads, kept, kept, layer.key_width, values, e).bytes
    before, after = cache_bytes(layers, tokens, e, batch), cache_bytes(layers, tokens, e, batch, kept)
    eviction = moved / bandwidth if kept < tokens else 0.0
    saved = (before - after) / bandwidth
    most_rows = max((layer.rows for layer in full), default=0)
    return Plan(
        model=name,
        context=tokens,
        limit=limit,
        batch=batch,
        keep=keep,
        kept=kept,
        cache_dtype=cache_dtype,
        layers={kind: count for kind, count in kinds.items() if count},
        bytes_per_token=sum(layer.rows * layer.width * e for layer in full),
        window_bytes=cache_bytes([layer for layer in layers if layer.kind == "sliding"], tokens, e, batch),
        layer_bytes=max(cache_bytes([layer], tokens, e, batch) for layer in layers),
        cache_before=before,
        cache_after=after,
        weights=weights,
        gpu_memory=memory,
        largest_context_before=largest[0],
        largest_context_after=largest[1],
        largest_batch_before=largest[2],
        largest_batch_after=largest[3],
        # Scores (float32) of a layer's tokens and indices (int64) of those that stay.
        workspace=batch * most_rows * (4 * tokens + 8 * kept),
        bandwidth=bandwidth,
        eviction_seconds=eviction,
        saved_seconds_per_step=saved,
        break_even_steps=eviction / saved if saved else None,
        recommendation=recommendation,
        notes=tuple(notes),
    )


def _dtype(name: str, value: str) -> str:
    value = SHORT.get(value, value)
    validate.one_of(name, value, tuple(BYTES))
    return value


def _stores_fp8(config: dict[str, Any]) -> bool:
    """Quantized checkpoints say how K and V are stored: compressed-tensors' kv_cache_scheme, ModelOpt's algorithm."""

    def inside(outer: dict[str, Any], name: str) -> dict[str, Any]:
        return value if isinstance(value := outer.get(name), dict) else {}

    quantization = inside(config, "quantization_config")
    algorithm = str(quantization.get("kv_cache_quant_algo"))
    return inside(quantization, "kv_cache_scheme").get("num_bits") == 8 or algorithm.upper() == "FP8"


def _bytes(value: float) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"


def show(result: Plan) -> None:
    """Print a plan as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.model}, {result.context:,} tokens, batch {result.batch}, {result.cache_dtype} cache")
    evicts = result.recommendation is not None
    for column in ("", "before", f"keep {result.keep:g}")[: 3 if evicts else 2]:
        table.add_column(column, justify="right" if column else "left")

    def row(name: str, before: str, after: str = "") -> None:
        table.add_row(name, before, *[after] * evicts)

    row("layers", ", ".join(f"{count} {kind}" for kind, count in result.layers.items()))
    if evicts:
        row("cache per token", _bytes(result.bytes_per_token))
    if result.window_bytes:
        row("of sliding layers, in all", _bytes(result.window_bytes), _bytes(result.window_bytes))
    row("largest layer", _bytes(result.layer_bytes))
    row("cache", _bytes(result.cache_before), _bytes(result.cache_after))
    row("weights", _bytes(result.weights), _bytes(result.weights))
    if result.limit is not None:
        row("the model's own limit", f"{result.limit:,} tokens")
    if result.gpu_memory is not None:
        both = _bytes(result.weights + result.cache_before), _bytes(result.weights + result.cache_after)
        row(f"in all, of {_bytes(result.gpu_memory)}", *both)
        if result.weights > result.gpu_memory:
            row("what fits", "not the weights", "not the weights")
        else:
            contexts = (result.largest_context_before, result.largest_context_after)
            row("largest context", *(_most_said(n, 2**31) for n in contexts))
            row(
                "largest batch",
                *(_most_said(n, 2**20) for n in (result.largest_batch_before, result.largest_batch_after)),
            )
    if evicts:
        row("workspace of evicting", "", _bytes(result.workspace))
        row("evicting, computed", "", f"{result.eviction_seconds * 1e3:.2f} ms")
        row("saved per decode step", "", f"{result.saved_seconds_per_step * 1e3:.3f} ms")
        steps = "-" if result.break_even_steps is None else f"{result.break_even_steps:.1f} steps"
        row("evicting has paid after", "", steps)
    console = Console()
    console.print(table)
    if result.recommendation is not None:
        console.print(
            f"computed at {result.bandwidth / 1e12:.2f} TB/s, not timed; a prompt that is read whole needs its"
        )
        console.print(
            f"cache whole while it is read: EvictingCache(budget={result.kept}) and chunks need budget + chunk"
        )
        _show_advice(console, result.recommendation)
    for note in result.notes:
        console.print(f"note: {note}")


def _most_said(most: int | None, limit: int) -> str:
    return "any" if most == limit else f"{most:,}"


def _show_advice(console: Any, advice: Recommendation) -> None:
    if advice.keep is None:
        keep = "not measured to be enough at any share"
    else:
        keep = BUDGETS[advice.budget].format(keep=advice.keep)
    console.print(f"for {advice.use}: {advice.policy}, {keep}" + (f": {advice.measured}" if advice.measured else ""))
    if advice.policy == "learned":
        console.print("learned needs a scorer of the model: `kvevict train`; without one, policy RECOMMENDED")
    if advice.policy in ("RECOMMENDED", "learned"):
        console.print('RECOMMENDED, or "recommended": attention of the last query and KeyDiff, in equal parts')
    if advice.budget.endswith("shares"):
        console.print("shares of the model are measured by `kvevict budgets`")


def draw(model: Any, result: Plan, path: pathlib.Path) -> None:
    """Cache and weights against context, before and after, under the GPU's memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers, e = model_layers(model_config(model)[1]), BYTES[result.cache_dtype]
    contexts = [2**k for k in range(10, max(result.context.bit_length() + 2, 18))]
    with plt.style.context("tableau-colorblind10"):
        figure, axis = plt.subplots(figsize=(7.6, 4), layout="constrained")
        shares = [("whole cache", 1.0, "o")]
        if result.recommendation is not None:
            shares.append((f"keep {result.keep:g}", result.keep, "s"))
        for label, share, marker in shares:
            sizes = [
                cache_bytes(layers, n, e, result.batch, validate.kept_tokens(share, n, 0, 0)) + result.weights
                for n in contexts
            ]
            axis.plot(contexts, [size / 2**30 for size in sizes], marker=marker, markersize=4, label=label)
        axis.axhline(result.weights / 2**30, color="gray", linestyle=":", label="weights")
        if result.gpu_memory is not None:
            axis.axhline(result.gpu_memory / 2**30, color="black", linestyle="--", label="GPU memory")
        if result.limit is not None:
            axis.axvline(result.limit, color="black", linestyle=":", linewidth=0.8, label="the model's own limit")
        axis.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="weights and cache (GiB)")
        axis.set_title(f"{result.model}, batch {result.batch}, {result.cache_dtype} cache (computed)")
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(path, dpi=130)
        plt.close(figure)
