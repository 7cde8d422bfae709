"""Questions about a text that can be checked: four tasks, all hidden in one run of it.

    word   three sentences in three places: "The best pizza in Chicago is sold by Kowalski."
    fact   four numbers under keys, in four places: "The magic number of Paris is 12345."
    list   eight pairs in one place: "river: Oslo"
    code   six Python functions in one place, of which each returns a number

Three of each are asked for. All is drawn from the context's number and length alone.
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
GOODS = "pizza bread cheese coffee honey leather silver cloth".split()
NAMES = "Kowalski Bernstein Ferrari Johansson Murphy Tanaka Novak Fischer".split()
TASKS = ("word", "fact", "list", "code")
ASKED = 3  # questions of each task about a context
LEAST = 500  # tokens of a context: what is hidden takes about 350


class Question(NamedTuple):
    """One of a context's questions, in tokens."""

    task: str  # of TASKS
    question: list[int]
    answer: list[int]


def build(sample: int, tokenizer: Any, text: list[int], tokens: int) -> tuple[list[int], list[Question]]:
    """A context of so many tokens, and the questions about it, task by task; the same for the same arguments.

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
    rng = random.Random(f"tasks {sample} {tokens}")

    def ids(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False)["input_ids"]

    hidden, found = [], []
    for task in TASKS:
        pieces, asked = _DRAWN[task](rng)
        hidden += [ids(piece) for piece in pieces]
        found += [Question(task, ids(question), ids(answer)) for question, answer in rng.sample(asked, ASKED)]
    rng.shuffle(hidden)
    room = tokens - sum(map(len, hidden))
    if room < 0:
        raise ValueError(f"tokens is {tokens}: expected at least {tokens - room}, which is what is hidden")
    start = rng.randrange(max(len(text) - room, 1))
    body, context, done = text[start : start + room], [], 0
    for place, piece in zip(sorted(rng.uniform(0.1, 0.9) for _ in hidden), hidden, strict=True):
        context += body[done : int(place * room)] + piece
        done = int(place * room)
    return context + body[done:], found


# Of each task: the pieces to hide, and all (question, answer) about them.
Drawn = tuple[list[str], list[tuple[str, str]]]


def _words(rng: random.Random) -> Drawn:
    said = [
        (f"The best {good} in {city} is sold by", f" {name}")
        for good, city, name in zip(
            rng.sample(GOODS, ASKED), rng.sample(CITIES, ASKED), rng.sample(NAMES, ASKED), strict=True
        )
    ]
    return [f" {begin}{end}. " for begin, end in said], [(f"\n\n{begin}", end) for begin, end in said]


def _facts(rng: random.Random) -> Drawn:
    cities = rng.sample(CITIES, 4)
    numbers = [str(rng.randrange(10000, 100000)) for _ in cities]
    asked = [
        (f"\n\nQuestion: what is the magic number of {city}?\nAnswer: the magic number of {city} is", f" {number}")
        for city, number in zip(cities, numbers, strict=True)
    ]
    return [f" The magic number of {c} is {n}. " for c, n in zip(cities, numbers, strict=True)], asked


def _list(rng: random.Random) -> Drawn:
    pairs = list(zip(rng.sample(WORDS, 8), rng.sample(CITIES, 8), strict=True))
    lines = "".join(f"{key}: {value}\n" for key, value in pairs)
    return [f"\n\n{lines}\n"], [(f"\n\nFrom the list above:\n{key}:", f" {value}") for key, value in pairs]


def _code(rng: random.Random) -> Drawn:
    names = rng.sample(WORDS, 6)
    numbers = rng.sample(range(100, 1000), 6)
    lines = [f"def {name}():\n    return {number}\n" for name, number in zip(names, numbers, strict=True)]
    asked = [line.rpartition(" ") for line in lines]
    return ["\n\n" + "\n".join(lines) + "\n"], [
        (f"\n\nOnce more, from the code above:\n{begin}", f" {number.strip()}") for begin, _, number in asked
    ]


_DRAWN = {"word": _words, "fact": _facts, "list": _list, "code": _code}
