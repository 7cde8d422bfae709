"""The benchmark of unequal shares: its cells are what they say, and its errors are those of contexts."""

import math

import pytest
import torch

pytest.importorskip("transformers")

from test_quality import TEXT, Characters, tiny
from transformers import DynamicCache

import kvevict
from bench import quality_shares as bench
from kvevict.policies import KeyDiff, Shares

SHARES = Shares((0.5,), torch.tensor([[[0.9, 0.5], [0.4, 0.2]]]))  # two layers of two heads


def test_questions_ask_for_what_a_context_hides():
    context, asked = bench.build(3, Characters(), TEXT, 1000)
    assert (context, asked) == bench.build(3, Characters(), TEXT, 1000) and len(context) == 1000 and len(asked) == 4
    words = Characters().decode(context)
    for question, answer in asked[:2]:
        city = Characters().decode(question).split("number of ")[-1].removesuffix(" is")
        assert f"The magic number of {city} is{Characters().decode(answer)}." in words
    for question, answer in asked[2:]:
        assert Characters().decode(question + answer).split("\n")[-1] in words


def test_columns_keep_the_same_in_all():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(1, 2, 200, generator=generator) for _ in range(2)]
    counts = {
        column: [(x[0] >= 0).sum(-1).tolist() for x in bench.choices(scores, column, 0.5, SHARES)]
        for column in bench.COLUMNS
    }
    assert counts["each"] == counts["shared"] == [[100, 100], [100, 100]]
    assert counts["layer shares"] == [[140, 140], [60, 60]]  # as 0.7 to 0.3
    assert counts["head shares"] == [[180, 100], [80, 40]]
    assert sum(map(sum, counts["model-wide"])) == 400
    for column in ("shared", "layer shares"):
        assert all((x[:, 0] == x[:, 1]).all() for x in bench.choices(scores, column, 0.5, SHARES))


@torch.no_grad()
def test_losses_are_those_of_plain_forwards():
    model = tiny()
    model.set_attn_implementation("kvevict")
    context, asked = bench.build(0, Characters(), TEXT, 400)
    with kvevict.backend("reference"):
        results = bench.run_context(model, Characters(), context, asked, [0.5], SHARES, (*bench.POLICIES, bench.KVZIP))
    assert {policy: set(columns) for policy, columns in results.items()} == {
        "whole": {"whole"}, **dict.fromkeys((*bench.POLICIES, bench.KVZIP), set(bench.COLUMNS))
    }  # fmt: skip
    cache = DynamicCache()
    model(torch.tensor([context]), past_key_values=cache)
    kept = [KeyDiff().compact(x.keys, x.values, keep=0.5, inplace=False)[:2] for x in cache.layers]
    for i, (question, answer) in enumerate(asked):
        target, positions = torch.tensor(answer)[:, None], torch.arange(400, 400 + len(question + answer))[None]
        for found, past in (
            (results["whole"]["whole"]["1.0"], [(x.keys[:, :, :400], x.values[:, :, :400]) for x in cache.layers]),
            (results["keydiff"]["each"]["0.5"], kept),
        ):
            ids = torch.tensor([question + answer])
            logits = model(ids, past_key_values=DynamicCache(past), position_ids=positions).logits[0].log_softmax(-1)
            loss = -logits[-len(answer) - 1 : -1].gather(-1, target).mean().item()
            assert found[i][0] == pytest.approx(loss, abs=1e-4)


def test_errors_are_of_contexts():
    """Two contexts of two questions: the paired differences are 1 and 3, and 0 and 0; by context 2 and 0."""

    def line(base, other):
        cells = {policy: {c: {"0.5": base} for c in bench.COLUMNS} for policy in (*bench.POLICIES, bench.KVZIP)}
        cells["keydiff"] = cells["keydiff"] | {"each": {"0.5": other}}
        return dict(results={"whole": {"whole": {"1.0": base}}, **cells})

    lines = [
        line([(1.0, True), (2.0, False)], [(2.0, False), (5.0, False)]),
        line([(4.0, True)] * 2, [(4.0, True)] * 2),
    ]
    rows = bench.summary(lines)
    row = next(row for row in rows if (row["policy"], row["column"]) == ("keydiff", "each"))
    assert (row["loss"], row["hits"], row["difference"], row["questions"]) == (3.75, 0.5, 1.0, 4)
    assert row["error"] == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert "| keydiff | 3.75, 50% (+1.00 ± 1.00) |" in bench.table(rows, "caption")
