"""`python -m bench.distributed`: what eviction over several GPUs sends, how long that takes (computed), and how evenly
a real model's kept tokens lie on the ranks (counted, on SmolLM2 in one process).

Assumed: an all-reduce of n bytes over P ranks takes the faster of a ring, 2 (P - 1) steps and 2 (P - 1) / P · n bytes
from each rank, and of a tree, 2 log2 P steps and 2 n bytes; a step costs LATENCY_US; links as below. Memory moves at
3.0 TB/s. No GPU has run this.
"""

from __future__ import annotations

import argparse
import itertools
import math

import torch

LATENCY_US = {"within a node": 2.0, "between nodes": 8.0}
LINK_GBS = {"within a node": 450.0, "between nodes": 50.0}  # NVLink of an H100, each way; a 400 Gb/s port a GPU
MEMORY_GBS = 3000.0
NODE = 8  # GPUs


def payloads(rows: int, head_dim: int, tokens: int) -> list[int]:
    """Bytes of each all-reduce of `distributed.keydiff_compact` for so many rows (layers · batch · KV heads)."""
    bits = max(tokens - 1, 1).bit_length()
    digits = [8] * 4 + [min(8, bits - done) for done in range(0, bits, 8)]
    counts = [rows * 2**width * 4 for width in digits]
    counts[0] += rows * 4  # and how many protected tokens there are
    return [16, rows * (head_dim + 1) * 8, *counts]


def collective_us(payload: int, ranks: int) -> float:
    where = "within a node" if ranks <= NODE else "between nodes"
    ring, tree = 2 * (ranks - 1), 2 * math.ceil(math.log2(ranks))
    latency, us = LATENCY_US[where], payload / LINK_GBS[where] / 1e3
    return min(ring * latency + ring / ranks * us, tree * latency + 2 * us)


def memory_us(rows: int, head_dim: int, element_size: int, tokens: int, keep: float, ranks: int) -> tuple[float, float]:
    """(passes over K and the move; the selection) of one rank. Each digit reads the scores, 4 bytes a token, and so do
    the two launches that write what is kept; positions are read of ties alone, which are few."""
    own = tokens / ranks
    kernels = rows * own * head_dim * element_size * (2 + 4 * keep)
    digits = len(payloads(rows, head_dim, tokens)) - 2
    selection = rows * own * (4 * (digits + 2) + 8 * keep)
    return kernels / MEMORY_GBS / 1e3, selection / MEMORY_GBS / 1e3


def costs() -> str:
    layers, heads, head_dim, tokens, keep = 80, 8, 128, 2**20, 0.1
    lines = [
        f"{tokens:,} tokens, {layers} layers of {heads} KV heads, head_dim {head_dim}, bf16, keep {keep}, {NODE} GPUs "
        "a node",
        "",
        "| GPUs | layers a call | collectives | MB summed | collectives, ms | K and V, ms | selection, ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for ranks, together in itertools.product((8, 16, 32, 64), (1, layers)):
        calls = layers // together
        sent = payloads(together * heads, head_dim, tokens)
        ms = calls * sum(collective_us(payload, ranks) for payload in sent) / 1e3
        kernels, selection = memory_us(layers * heads, head_dim, 2, tokens, keep, ranks)
        counted = f"{calls * len(sent)} | {calls * sum(sent) / 1e6:.1f}"
        lines.append(f"| {ranks} | {together} | {counted} | {ms:.1f} | {kernels / 1e3:.1f} | {selection / 1e3:.1f} |")
    return "\n".join(lines)


@torch.no_grad()
def balance(tokens: int, ranks: int) -> str:
    from transformers import DynamicCache

    import kvevict
    from kvevict import models
    from kvevict.distributed import positions_of

    model, tokenizer = models.load()
    ids = torch.tensor([tokenizer(models.sample_text()[: 8 * tokens])["input_ids"][:tokens]])
    cache = DynamicCache()
    model(ids, past_key_values=cache, logits_to_keep=1)
    keys = torch.cat([layer.keys for layer in cache.layers])  # [layers, H, S, D]
    lines = [
        f"{models.SMOLLM2}, {tokens:,} tokens of its sample text, KeyDiff with sink 4 and recent 32, {ranks} ranks",
        "",
        "| keep | heads | contiguous | zigzag | striped | striped by 16 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    layouts = [("contiguous", 1), ("zigzag", 1), ("striped", 1), ("striped", 16)]
    for keep, heads in itertools.product((0.1, 0.25, 0.5), ("each", "shared")):
        scores = kvevict.keydiff_scores(keys)
        indices = kvevict.topk_indices(scores, keep, sink=4, recent=32, heads=heads)
        found = []
        for layout, block in layouts:
            owner = torch.empty(tokens, dtype=torch.int64)
            for rank in range(ranks):
                owner[positions_of(layout, tokens, ranks, rank, block)] = rank
            held = torch.nn.functional.one_hot(owner[indices], ranks).sum((0, 1, 2)).double()  # over layers and heads
            found.append(f"{held.max() / held.mean():.2f}")
        lines.append(f"| {keep} | {heads} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of the balance")
    parser.add_argument("--ranks", type=int, default=8, help="of the balance")
    options = parser.parse_args()
    print(costs(), balance(options.tokens, options.ranks), sep="\n\n")


if __name__ == "__main__":
    main()
