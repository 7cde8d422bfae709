"""EvictingCache on SmolLM2: a long chat in constant memory that stays coherent, and a fact that survives."""

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


@torch.no_grad()
def test_a_chat_of_6000_tokens_runs_in_constant_memory_and_stays_coherent(smollm2):
    model, tokenizer = smollm2
    text = torch.tensor([tokenizer(models.sample_text()[:40_000])["input_ids"][:6000]], device=DEVICE)
    cache = EvictingCache(model.config, KeyDiff(recent=256), budget=1024)
    whole = DynamicCache()
    losses, whole_losses, held = [], [], []
    with kvevict.backend("auto" if DEVICE == "cuda" else "reference"):
        seen = 0
        for chunk in text.split(250, dim=1):  # turns: read some, then say a few words, which are forgotten again
            for used, where in ((cache, losses), (whole, whole_losses)):
                logits = model(chunk, past_key_values=used).logits[0, :-1].float()
                where.append(torch.nn.functional.cross_entropy(logits, chunk[0, 1:]).item())
            seen += chunk.shape[1]
            if seen % 1000 == 0 and seen < 6000:
                said = model.generate(
                    text[:, : seen + 1], past_key_values=cache, max_new_tokens=4, do_sample=False, pad_token_id=0
                )
                assert said.shape[1] == seen + 5
                cache.crop(-4)  # the word that was added, and what was said but for the last, which is not cached
            reports = cache.report()
            assert {r.seen for r in reports} == {seen} and max(r.kept for r in reports) <= 1024 + 64
            held.append(sum(r.bytes for r in reports))
    assert max(held) <= 30 * 2 * 3 * (1024 + 64) * 64 * model.dtype.itemsize
    assert held[-1] <= max(held[5:10])  # constant
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
            torch.cat([prompt, question], 1), past_key_values=cache, max_new_tokens=3, do_sample=False
        )
    assert "Kowalski" in tokenizer.decode(text[0, -8:])
    assert {(r.kept, r.evicted) for r in cache.report()} == {(400 + question.shape[1] + 7, 400)}
