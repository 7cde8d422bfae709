"""EvictingCache on SmolLM2: a long chat in constant memory that stays coherent, and a fact that survives."""

import copy
import math

import pytest
import torch
from conftest import DEVICE

pytest.importorskip("transformers")

from transformers import DynamicCache

import kvevict
from kvevict import models
from kvevict.hf import EvictingCache
from kvevict.policies import KeyDiff


@pytest.fixture(scope="module")
def smollm2():
    try:
        return models.load(device=DEVICE)
    except models.Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("tokens", "budget", "turn"), [(1200, 512, 100), pytest.param(6000, 1024, 250, marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_a_long_chat_runs_in_constant_memory_and_stays_coherent(smollm2, tokens, budget, turn):
    model, tokenizer = smollm2
    text = torch.tensor([tokenizer(models.sample_text()[:40_000])["input_ids"][:tokens]], device=DEVICE)
    cache = EvictingCache(model.config, KeyDiff(recent=256), budget=budget)
    whole = DynamicCache()
    losses, whole_losses, held = [], [], []
    with kvevict.backend("auto" if DEVICE == "cuda" else "reference"):
        seen = 0
        for chunk in text.split(turn, dim=1):  # turns: read some, then say a few words, which are forgotten again
            for used, where in ((cache, losses), (whole, whole_losses)):
                logits = model(chunk, past_key_values=used).logits[0, :-1].float()
                where.append(torch.nn.functional.cross_entropy(logits, chunk[0, 1:]).item())
            seen += chunk.shape[1]
            if seen % (4 * turn) == 0 and seen < tokens:
                said = model.generate(
                    text[:, : seen + 1], past_key_values=cache, max_new_tokens=4, do_sample=False, pad_token_id=0
                )
                assert said.shape[1] == seen + 5
                cache.crop(-4)  # the word that was added, and what was said but for the last, which is not cached
            reports = cache.report()
            assert {r.seen for r in reports} == {seen} and max(r.kept for r in reports) <= budget + 64
            held.append(sum(r.bytes for r in reports))
    assert max(held) <= 30 * 2 * 3 * (budget + 64) * 64 * model.dtype.itemsize
    assert held[-1] <= max(held[5:9])  # constant
    late, whole_late = (sum(x[-8:]) / 8 for x in (losses, whole_losses))
    assert math.isfinite(late) and late < whole_late + 0.15, (late, whole_late)


@torch.no_grad()
def test_a_hidden_fact_survives_half_the_cache(smollm2):
    from kvevict import demo

    model, tokenizer = smollm2
    prompt = demo.build_prompt(tokenizer, models.sample_text(), 800).to(DEVICE)
    question = torch.tensor([tokenizer(demo.QUESTION)["input_ids"]], device=DEVICE)
    cache = EvictingCache(model.config, KeyDiff(), keep=0.5)
    with kvevict.backend("auto" if DEVICE == "cuda" else "reference"):
        model(prompt, past_key_values=cache)  # the question is not seen
        text = model.generate(
            torch.cat([prompt, question], 1), past_key_values=cache, max_new_tokens=8, do_sample=False
        )
    assert "Kowalski" in tokenizer.decode(text[0, -8:])
    assert {(r.kept, r.evicted) for r in cache.report()} == {(400 + question.shape[1] + 7, 400)}


# What transformers' own tests of its caches (tests/utils/test_cache_utils.py) ask of a Cache, asked of ours with
# everything kept: batches, beams, extra left padding, continuing and copying a cache. Not asked: conversion from the
# legacy tuples (removed), quantized, offloaded and sliding-window caches and export, which are other classes' promises.


def padded(tokenizer, texts, to=None):
    ids = [tokenizer(text)["input_ids"] for text in texts]
    width = to or max(map(len, ids))
    rows = [[0] * (width - len(row)) + row for row in ids]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in ids]
    return {"input_ids": torch.tensor(rows, device=DEVICE), "attention_mask": torch.tensor(mask, device=DEVICE)}


@pytest.fixture(params=["sdpa", "kvevict"])
def model_and_caches(request, smollm2):
    """The model with either attention, and what makes the caches that must agree."""
    model, tokenizer = smollm2
    model.set_attn_implementation(request.param)
    with kvevict.backend("auto" if DEVICE == "cuda" else "reference"):
        yield model, tokenizer, (DynamicCache, lambda: EvictingCache(model.config, keep=1.0),
                                 lambda: EvictingCache(model.config, budget=500))  # fmt: skip
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize(
    "options",
    [dict(do_sample=False), dict(do_sample=False, num_beams=2, num_return_sequences=2)],
    ids=["greedy", "beams"],
)
def test_as_transformers_tests_its_caches(model_and_caches, options):
    model, tokenizer, caches = model_and_caches
    if model.config._attn_implementation == "sdpa":  # in which padding is not seen
        inputs = padded(tokenizer, ["The cat", "Blue is"])
        with pytest.raises(ValueError, match="padding is taken for tokens"):
            model.generate(**inputs, past_key_values=caches[1](), pad_token_id=0)
        return
    options = dict(max_new_tokens=6, pad_token_id=0, **options)
    for inputs in (
        padded(tokenizer, ["A sequence: 1, 2, 3, 4, 5", "A sequence: A, B, C"], to=32),  # extra left padding
        padded(tokenizer, ["Blue is"]),
    ):
        expected, *others = (model.generate(**inputs, past_key_values=cache(), **options) for cache in caches)
        assert all(torch.equal(expected, other) for other in others)


def test_a_cache_is_copied_and_continued(model_and_caches):
    model, tokenizer, caches = model_and_caches
    prefix = torch.tensor([tokenizer("You are a helpful assistant.")["input_ids"]], device=DEVICE)
    options, made = dict(max_new_tokens=6, do_sample=False, pad_token_id=0), [make() for make in caches[1:]]
    for cache in made:
        with torch.no_grad():
            model(prefix, past_key_values=cache)
    for text in (" Help me to write a blogpost about travelling.", " What is the capital of France?"):
        whole = torch.cat([prefix, torch.tensor([tokenizer(text)["input_ids"]], device=DEVICE)], 1)
        expected = model.generate(whole, **options)
        for cache in made:
            assert torch.equal(model.generate(whole, past_key_values=copy.deepcopy(cache), **options), expected)
