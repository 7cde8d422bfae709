"""Questions about a text that can be checked: facts that are hidden in it, and a list of pairs.

A context hides four facts ("The magic number of Paris is 12345.") and a list of eight pairs ("river: Oslo") in a text.
Two facts and two pairs are asked for. All is drawn from the context's number and length alone.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

CITIES = (
    "Paris London Berlin Madrid Rome Vienna Prague Dublin Oslo Athens Lisbon Warsaw Chicago Boston Denver Seattle"
).split()
WORDS = (
    "apple river stone cloud tiger maple ocean candle violin ladder copper garden window falcon pepper anchor".split()
)
LEAST = 400  # tokens of a context: what is hidden takes about 150


class Question(NamedTuple):
    """One of a context's questions, in tokens."""

    task: str  # "fact" or "list"
    question: list[int]
    answer: list[int]


def build(sample: int, tokenizer: Any, text: list[int], tokens: int) -> tuple[list[int], list[Question]]:
    """A context of so many tokens, and four questions about it; the same for the same arguments.

    Args:
        sample: which one.
        tokenizer: of transformers.
        text: tokens to hide things in; a run of it is taken.
        tokens: length of the context.

    Raises:
        ValueError: the text is shorter than the context; the context is too short to hide things in.
    """
    if not LEAST <= tokens <= len(text):
        raise ValueError(f"tokens is {tokens}: expected {LEAST} to {len(text)}, which the text has")
    rng = random.Random(f"shares {sample} {tokens}")

    def ids(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False)["input_ids"]

    cities, keys, values = rng.sample(CITIES, 4), rng.sample(WORDS, 8), rng.sample(CITIES, 8)
    numbers = [str(rng.randrange(10000, 100000)) for _ in cities]
    pieces = [ids(f" The magic number of {c} is {n}. ") for c, n in zip(cities, numbers, strict=True)]
    pieces.append(ids("\n\n" + "".join(f"{k}: {v}\n" for k, v in zip(keys, values, strict=True)) + "\n"))
    rng.shuffle(pieces)
    room = tokens - sum(map(len, pieces))
    start = rng.randrange(max(len(text) - room, 1))
    body, context, done = text[start : start + room], [], 0
    for place, piece in zip(sorted(rng.uniform(0.1, 0.9) for _ in pieces), pieces, strict=True):
        context += body[done : int(place * room)] + piece
        done = int(place * room)
    asked = []
    for i in rng.sample(range(4), 2):
        question = f"\n\nQuestion: what is the magic number of {cities[i]}?\nAnswer: the magic number of {cities[i]} is"
        asked.append(Question("fact", ids(question), ids(f" {numbers[i]}")))
    for i in rng.sample(range(8), 2):
        asked.append(Question("list", ids(f"\n\nFrom the list above:\n{keys[i]}:"), ids(f" {values[i]}")))
    return context + body[done:], asked
