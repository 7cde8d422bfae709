"""`kvevict demo --html`: one page that shows the text, and what of it each policy keeps. No server, no network.

The page is `data/demo.html` with the run's JSON inside. A head's choice is a row of bits, one per token, the first in
the highest bit of the first byte, in base64. Rows that repeat (heads that share a choice, layers that keep the same)
are stored once, in `rows`; a cut names those of its layers and heads.
"""

from __future__ import annotations

import base64
import importlib.resources
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvevict.demo import Row

_PLACE = "{{ DATA }}"  # in the template


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined, the text of all. Of a character in several tokens, the last one has it."""
    found: list[str] = []
    context: list[int] = []
    pending: list[int] = []  # what decides on a space in front; tokens that end within a character
    for i, token in enumerate(ids):
        pending.append(token)
        before = tokenizer.decode(context) if context else ""
        text = tokenizer.decode(context + pending)[len(before) :]
        if text.endswith("\ufffd") and len(pending) < 4 and i + 1 < len(ids):  # UTF-8 has four bytes at most
            found.append("")
            continue
        found.append(text)
        context, pending = pending, []
    return found


def bit_rows(indices: Tensor, tokens: int) -> list[str]:
    """The rows of bits of one layer's kept indices [1, H, n], -1 behind what a head keeps."""
    kept = torch.zeros(indices.shape[1], tokens + 1, dtype=torch.bool)
    kept.scatter_(1, indices[0].long() % (tokens + 1), True)  # behind the tokens is what -1 names
    kept = torch.nn.functional.pad(kept[:, :tokens], (0, -tokens % 8)).unflatten(1, (-1, 8))
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1])
    packed = (kept * weights).sum(-1).tolist()
    return [base64.b64encode(bytes(row)).decode() for row in packed]


def page_data(rows: Sequence[Row], texts: list[str], fact: tuple[int, int], about: dict[str, Any]) -> dict[str, Any]:
    """What the page shows, as JSON. rows: of the demo's table, the whole cache first; texts: of each token; fact: where
    it begins and ends; about: "about" (the run, in words), "question", "right" (the answer)."""
    begin, end = fact
    while not texts[begin].strip():  # the empty lines around it are no part of what is outlined and counted
        begin += 1
    while not texts[end - 1].strip():
        end -= 1
    known: dict[str, int] = {}
    cuts = []
    for row in rows:
        heads = [[known.setdefault(bits, len(known)) for bits in bit_rows(layer, len(texts))] for layer in row.indices]
        cuts.append(
            dict(policy=row.policy, keep=row.keep, tokens=row.tokens, bytes=row.bytes, loss=row.loss,
                 answer=row.answer, heads=heads)
        )  # fmt: skip
    return dict(about, texts=texts, fact=[begin, end], whole=cuts[0], cuts=cuts[1:], rows=list(known))


def write(data: dict[str, Any], path: pathlib.Path) -> None:
    """The page with this data."""
    template = importlib.resources.files("kvevict").joinpath("data/demo.html").read_text(encoding="utf-8")
    inside = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no text of it ends the script
    before, after = template.split(_PLACE)
    path.write_text(before + inside + after, encoding="utf-8")
