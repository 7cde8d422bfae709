"""A cache on disk: one safetensors file, with the state beside the tensors in its metadata, so that both are of one
moment; written under another name and then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvevict.hf import pages
from kvevict.hf.layer import EvictingLayer
from kvevict.hf.places import Places
from kvevict.policies import Learned
from kvevict.policies.shares import said

FILE = "cache.safetensors"
FORMAT = 5
PLACES = ("kept", "counts", "seen")
NOTED = ("queries", "predicted", "packed", "repeated")
TRACKED = ("mass", "last_used", "positions")  # of a Tracker, [B, H, n]
# What makes a cache fit a model.
FACTS = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
         "kv_lora_rank", "vocab_size", "rope_theta", "rope_parameters", "rope_scaling")  # fmt: skip


def _facts(config: Any) -> dict[str, Any]:
    known = {name: said(config, name) for name in FACTS}
    return json.loads(json.dumps({name: value for name, value in known.items() if value is not None}, default=str))


def save(layers: Sequence[EvictingLayer], config: Any, folder: pathlib.Path) -> None:
    """Raises:
    ValueError: nothing is cached.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    if all(layer.get_seq_length() == 0 for layer in layers):
        raise ValueError("the cache is empty: expected a cache after a forward")
    states: list[dict[str, Any] | None] = []
    for i, layer in enumerate(layers):
        if layer.get_seq_length() == 0:  # another rank's, under pipeline parallelism
            states.append(None)
            continue
        notes, tracker = layer.notes, layer.notes.tracker
        held = dict(keys=layer.keys, values=layer.values, lengths=layer.lengths, row=layer.row,
                    **{name: getattr(notes, name) for name in NOTED},
                    tail=layer.tail if isinstance(layer.tail, Tensor) else None)  # fmt: skip
        if tracker is not None:
            held |= {name: getattr(tracker, name)[:, :, : layer.cached()] for name in TRACKED}
            held |= {"tracker.lengths": tracker.lengths, "tracker.tokens_seen": tracker.tokens_seen}
        if layer.pages is not None:
            held |= _packed(layer.pages)
        if notes.places is not None:
            held |= {f"places.{name}": getattr(notes.places, name) for name in PLACES}
        # Copies: safetensors takes no two tensors of one memory.
        tensors |= {f"{i}.{name}": x.detach().clone().contiguous() for name, x in held.items() if x is not None}
        states.append(
            dict(
                tokens_seen=layer.tokens_seen,
                evicted=layer.evicted,
                compressed=layer.compressed,
                tail=None if isinstance(layer.tail, Tensor) else layer.tail,
                step=None if tracker is None else tracker.step,
                scorer=None if notes.predicted is None or notes.scorer is None else _digest(notes.scorer),
            )
        )
    state = json.dumps({"format": FORMAT, "model": _facts(config), "layers": states})
    folder.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(prefix=".cache-", dir=folder)
    os.close(handle)
    try:
        save_file(tensors, unfinished, metadata={"kvevict": state})
        os.replace(unfinished, folder / FILE)
    except BaseException:
        os.unlink(unfinished)
        raise


def _digest(scorer: Learned) -> str:
    """Of its weights: what it said of the tokens is another's no more than they are."""
    whole = hashlib.sha256()
    for weights in scorer.weights:
        whole.update(weights.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()[:16]


def _packed(kept: pages.Pages) -> dict[str, Tensor]:
    """Pages as rows without gaps: of all requests and heads, one behind the other, [tokens, D]."""
    keys, values, lengths = kept.dense()
    inside = pages.inside(lengths, kept.longest)
    return {"pages.keys": keys[inside], "pages.values": values[inside], "pages.lengths": lengths}


def _unpacked(own: dict[str, Tensor]) -> pages.Pages | None:
    if "pages.lengths" not in own:
        return None
    lengths = own["pages.lengths"]
    longest = max(int(lengths.max()), 1)  # all heads may have kept nothing
    inside = pages.inside(lengths, longest)
    keys, values = (
        rows.new_zeros((*inside.shape, rows.shape[1])).masked_scatter_(inside[..., None], rows)
        for rows in (own["pages.keys"], own["pages.values"])
    )
    slots = torch.arange(longest, device=lengths.device).expand(inside.shape)
    return pages.pack(keys, values, slots.masked_fill(~inside, -1))


def load(layers: Sequence[EvictingLayer], config: Any, folder: pathlib.Path, devices: Sequence[torch.device]) -> None:
    """Fill new layers, each on its device.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not whole, not consistent, of another model or without what the policy reads; names the file.
    """
    path = folder / FILE
    state, tensors = _read(path)
    try:
        if state["format"] != FORMAT:
            raise ValueError(f"has format {state['format']}: expected {FORMAT}")
        facts = _facts(config)
        for name in sorted(facts.keys() | state["model"].keys()):
            theirs, ours = state["model"].get(name), facts.get(name)
            if theirs != ours:
                raise ValueError(f"is of a model with {name} {theirs}: expected {ours}, as the config has")
        if len(state["layers"]) != len(layers):
            raise ValueError(f"has {len(state['layers'])} layers: expected {len(layers)}, as the config has")
        there = [i for i, of_layer in enumerate(state["layers"]) if of_layer is not None] or [0]
        batch = tensors[f"{there[0]}.keys"].shape[0]
        first: dict[str, int] = {}
        for i, (layer, of_layer, device) in enumerate(zip(layers, state["layers"], devices, strict=True)):
            if i not in there:
                continue
            prefix = f"{i}."
            own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            _check(own, of_layer, batch)
            alike = _alike(own, of_layer)
            first = first or alike | _sizes(config)
            for name, expected in first.items():
                if alike[name] != expected:
                    raise ValueError(f"has {name} {alike[name]} in layer {i}: expected {expected}, as the model has")
            _fill(layer, {name: x.to(device) for name, x in own.items()}, of_layer)
    except KeyError as error:
        raise ValueError(f"{path} has no {error}: expected what save_pretrained writes") from error
    except (AttributeError, TypeError, ValueError) as error:
        for layer in layers:
            layer.reset()
        raise ValueError(f"{path} {error}") from error


def _read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = (file.metadata() or {}).get("kvevict")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: expected a whole safetensors file ({error})") from error
    if metadata is None:
        raise ValueError(f'{path} has no "kvevict" in its metadata: expected what save_pretrained writes')
    try:
        state = json.loads(metadata)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has metadata that is no JSON ({error})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} has metadata {state!r}: expected a dict")
    return state, tensors


def _alike(own: dict[str, Tensor], state: dict[str, Any]) -> dict[str, int]:
    """What all layers of a cache have in common."""
    (_, heads, _, head_dim), value_dim = own["keys"].shape, own["values"].shape[3]
    return dict(heads=heads, head_dim=head_dim, value_dim=value_dim, tokens_seen=state["tokens_seen"])


def _sizes(config: Any) -> dict[str, int]:
    """Heads and head_dim of the keys that a model caches, as far as its config says."""
    if getattr(config, "kv_lora_rank", None) or getattr(config, "global_head_dim", None):  # latents, other layers' size
        return {}
    sizes = dict(heads=said(config, "num_key_value_heads"), head_dim=said(config, "head_dim"))
    return {name: size for name, size in sizes.items() if isinstance(size, int)}


def _check(own: dict[str, Tensor], state: dict[str, Any], batch: int) -> None:
    keys, values = own["keys"], own["values"]
    B, H, n = keys.shape[:3] if keys.ndim == 4 else (0, 0, 0)
    if B != batch or (n == 0 and "pages.lengths" not in own) or values.ndim != 4 or values.shape[:3] != (B, H, n):
        raise ValueError(
            f"has keys of shape {tuple(keys.shape)} beside values of {tuple(values.shape)}: expected [{batch}, heads, "
            "tokens, ...] of both"
        )
    for name in ("tokens_seen", "evicted", "tail", "step"):
        value = state[name]
        if name in ("tail", "step") and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"has {name} {value!r}: expected a number of at least 0")
    if not isinstance(state["compressed"], bool):
        raise ValueError(f"has compressed {state['compressed']!r}: expected true or false")
    if state["tokens_seen"] < n:
        raise ValueError(f"has tokens_seen {state['tokens_seen']}: expected at least the {n} cached tokens")
    shapes = dict(lengths=(B,), tail=(B,), mass=(B, H, n), last_used=(B, H, n), positions=(B, H, n))
    shapes |= {"tracker.lengths": (B,), "tracker.tokens_seen": (B,)}
    for name, shape in shapes.items():
        if name in own and own[name].shape != shape:
            raise ValueError(f"has {name} of shape {tuple(own[name].shape)}: expected {shape}")
    for name in ("lengths", "tail", "tracker.lengths"):
        if name in own and not bool(((own[name] >= 0) & (own[name] <= n)).all()):
            raise ValueError(f"has {name} {own[name].tolist()}: expected from 0 to {n}, the cached tokens")
    if ("lengths" in own) != ("tail" in own) or ("tail" in own) != (state["tail"] is None):
        raise ValueError("has lengths without tail or tail without lengths: expected both in a padded batch")
    if ("mass" in own) != (state["step"] is not None):
        raise ValueError("has mass without step or step without mass: expected both of a policy that tracks attention")
    _check_packed(own, B, H)
    _check_places(own, B, H)
    row = own.get("row")
    if row is not None and (row.ndim != 2 or row.shape[0] not in (1, B) or row.dtype != torch.bool):
        raise ValueError(f"has row of shape {tuple(row.shape)} and {row.dtype}: expected [{B}, slots] and torch.bool")
    longest = int(own["pages.lengths"].max()) if "pages.lengths" in own else 0
    for name, most in (("predicted", n), ("packed", max(longest, 1)), ("repeated", n + max(longest, 1))):
        scores = own.get(name)
        if scores is None:
            continue
        wrong = scores.shape[2] > most if name == "repeated" and scores.ndim == 3 else scores.shape[2:] != (most,)
        if scores.shape[:2] != (B, H) or wrong or scores.dtype != torch.float32:
            raise ValueError(f"has {name} of shape {tuple(scores.shape)}: expected {(B, H, most)}, float32")
    if "packed" in own and not ("predicted" in own and "pages.lengths" in own):
        raise ValueError("has packed without predicted or pages: expected all of a cut cache's")
    queries = own.get("queries")
    if queries is not None and (queries.ndim != 4 or queries.shape[0] != B or queries.shape[3] != keys.shape[3]):
        raise ValueError(f"has queries of shape {tuple(queries.shape)}: expected [{B}, heads, ..., {keys.shape[3]}]")


def _check_places(own: dict[str, Tensor], B: int, H: int) -> None:
    there = {name: own.get(f"places.{name}") for name in PLACES}
    kept, counts, seen = there.values()
    if kept is None and counts is None and seen is None:
        return
    if kept is None or counts is None or seen is None or any(x.dtype != torch.int64 for x in (kept, counts, seen)):
        raise ValueError(f"has places {[name for name, x in there.items() if x is not None]}: expected {PLACES}, int64")
    n = kept.shape[-1]
    if kept.shape != (B, H, n) or counts.shape != (B, H) or seen.shape != (B,) or int(counts.max()) > n:
        raise ValueError(
            f"has places of shapes {[tuple(x.shape) for x in (kept, counts, seen)]}: expected "
            f"{[(B, H, n), (B, H), (B,)]}, and counts up to {n}"
        )


def _check_packed(own: dict[str, Tensor], B: int, H: int) -> None:
    there = [name for name in own if name.startswith("pages.")]
    if not there:
        return
    keys, values, lengths = (own[f"pages.{name}"] for name in ("keys", "values", "lengths"))
    if lengths.shape != (B, H) or lengths.dtype != torch.int64 or int(lengths.min()) < 0:
        raise ValueError(f"has pages.lengths {lengths.tolist()}: expected counts of shape {(B, H)}, none below 0")
    total = int(lengths.sum())
    for name, rows, like in (("keys", keys, own["keys"]), ("values", values, own["values"])):
        if rows.shape != (total, like.shape[3]) or rows.dtype != like.dtype:
            raise ValueError(
                f"has pages.{name} of shape {tuple(rows.shape)} and {rows.dtype}: expected {(total, like.shape[3])}, "
                f"as pages.lengths and {name} say, and {like.dtype}"
            )


def _fill(layer: EvictingLayer, own: dict[str, Tensor], state: dict[str, Any]) -> None:
    keys, values = own["keys"], own["values"]
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values, layer.lengths = keys, values, own.get("lengths")
    layer.pages, layer.row = _unpacked(own), own.get("row")
    layer.tokens_seen, layer.evicted, layer.compressed = state["tokens_seen"], state["evicted"], state["compressed"]
    layer.tail = own["tail"] if state["tail"] is None else state["tail"]
    notes = layer.notes
    for name in NOTED:
        setattr(notes, name, own.get(name))
    if "places.kept" in own and notes.wants_positions:
        notes.places = Places(*(own[f"places.{name}"] for name in PLACES))
    if "mass" in own:
        B, H, n = keys.shape[:3]
        tracker = notes.tracker = notes.new_tracker(B, H, n, keys.device)
        tracker.append(n)  # so many at most
        for name in TRACKED:
            getattr(tracker, name).copy_(own[name])
        tracker.lengths, tracker.tokens_seen = own["tracker.lengths"], own["tracker.tokens_seen"]
        tracker.step = state["step"]
    if layer.watching and layer.pages is not None and layer.policy.heads == "shared":
        raise ValueError(
            "has heads of unequal length, and policy has heads 'shared': expected 'each' or 'adaptive', for budget= is "
            "to cut them again"
        )
    if notes.predicted is not None and notes.scorer is not None and state["scorer"] != _digest(notes.scorer):
        raise ValueError("holds what another scorer said of its tokens: expected a cache of policy's weights")
    missed = [name for name in notes.missing() if name != "repetition"]  # which can still be noted
    if layer.watching and missed:
        missing, name = missed[0], type(layer.policy).__name__
        raise ValueError(f"was saved without {missing}, which {name} reads: expected a cache of that policy")
