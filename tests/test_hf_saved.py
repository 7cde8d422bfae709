"""Caches on disk: they go on as they were, and a file that is not whole or of another model is named and refused."""

import copy
import json
import os

import pytest
import torch
from conftest import DEVICE

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from safetensors import safe_open
from safetensors.torch import save_file
from test_hf import generate, learned, lengths, ours, padded, plain, prompt, reference_backend, tiny  # noqa: F401

from kvevict.hf import EvictingCache
from kvevict.policies import LRU, TOVA, AttentionMass, Hybrid, KeyDiff, Pyramid, SnapKV

FILE = "cache.safetensors"
POLICIES = [KeyDiff(recent=8), Hybrid(recent=8), SnapKV(recent=8), AttentionMass(recent=8, grace=8), LRU(recent=8),
            learned(recent=8)]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_saved_caches_answer_as_before(ours, policy, tmp_path):  # noqa: F811
    context = prompt(120)
    for mode in (dict(keep=0.4), dict(budget=50, interval=4)):
        cache = EvictingCache(ours.config, policy, **mode)
        with torch.no_grad(), cache.noting_hidden(ours):
            ours(context, past_key_values=cache)
        cache.save_pretrained(tmp_path / "cache")
        for seed in (1, 2):  # many questions of one context
            text = torch.cat([context, prompt(6, seed=seed)], 1)
            copied = copy.deepcopy(cache)
            loaded = EvictingCache.from_pretrained(tmp_path / "cache", ours.config, policy, device=DEVICE, **mode)
            assert lengths(loaded) == lengths(cache)
            said = []
            for either in (copied, loaded):
                with either.noting_hidden(ours):
                    said.append(generate(ours, text, past_key_values=either))
            assert torch.equal(*said) and lengths(loaded) == lengths(copied)


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_a_saved_padded_batch_is_cropped_and_evicted_as_before(ours, policy, tmp_path):  # noqa: F811
    ids, mask = padded()
    evictions = []
    mode = dict(budget=200, on_evict=evictions.append)
    cache = EvictingCache(ours.config, policy, **mode)
    with cache.noting_hidden(ours):
        ours(ids, attention_mask=mask, past_key_values=cache)
    for step in range(3):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long, device=DEVICE)], 1)
        with cache.noting_hidden(ours):
            ours(prompt(1, batch=3, seed=step), attention_mask=mask, past_key_values=cache)
    cache.evict(0.9)
    cache.save_pretrained(tmp_path)
    loaded = EvictingCache.from_pretrained(tmp_path, ours.config, policy, device=DEVICE, **mode)
    more = torch.cat([mask, torch.ones(3, 4, dtype=torch.long, device=DEVICE)], 1)
    evictions.clear()
    for either in (cache, loaded):
        with either.noting_hidden(ours):
            ours(prompt(4, batch=3, seed=9), attention_mask=more, past_key_values=either)
        most = 4 + min(policy.protected[1], 30 - 4)  # the shortest request kept 30 of 33, 4 of them sinks
        with pytest.raises(ValueError, match=f"expected at least -{most},"):
            either.crop(-most - 1)
        either.crop(-6)
        either.evict(0.5)
    for one, other in zip(cache.layers, loaded.layers, strict=True):
        if one.notes.tracker is not None:
            assert one.notes.tracker.step == other.notes.tracker.step == 3
    for before, after in zip(evictions[:3], evictions[3:], strict=True):
        assert torch.equal(before.indices, after.indices)
        if before.retained_mass is not None:
            torch.testing.assert_close(before.retained_mass, after.retained_mass)


@torch.no_grad()
def test_layers_of_unlike_length_need_our_attention_after_a_load_too(ours, plain, tmp_path):  # noqa: F811
    cache = EvictingCache(ours.config, KeyDiff(recent=8), budget=200)
    ours(prompt(90), past_key_values=cache)
    cache.evict(Pyramid(0.5))
    cache.save_pretrained(tmp_path)
    loaded = EvictingCache.from_pretrained(tmp_path, plain.config, KeyDiff(recent=8), device=DEVICE, budget=200)
    with pytest.raises(ValueError, match="budgets that differ by layer"):
        plain(prompt(3), past_key_values=loaded)


@pytest.fixture
def folder(ours, tmp_path):  # noqa: F811
    cache = EvictingCache(ours.config, KeyDiff(recent=8), keep=0.5)
    ids, mask = padded()
    with torch.no_grad():
        ours(ids, attention_mask=mask, past_key_values=cache)
    cache.save_pretrained(tmp_path)
    return tmp_path


def load(folder, config, policy=None, **options):
    return EvictingCache.from_pretrained(folder, config, policy, device=DEVICE, **(options or dict(keep=0.5)))


def test_an_interrupted_save_leaves_the_cache_that_was_there(ours, folder, monkeypatch):  # noqa: F811
    before = (folder / FILE).read_bytes()
    cache = EvictingCache(ours.config, KeyDiff(recent=8), keep=0.25)
    with torch.no_grad():
        ours(prompt(50), past_key_values=cache)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.save_pretrained(folder)
    assert os.listdir(folder) == [FILE] and (folder / FILE).read_bytes() == before


def rewritten(folder, change):
    """The file with `change(state, tensors)` done to it."""
    with safe_open(str(folder / FILE), framework="pt") as file:
        state = json.loads(file.metadata()["kvevict"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(state, tensors)
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, str(folder / FILE), metadata={"kvevict": json.dumps(state)}
    )


DEFECTS = {
    "format": (lambda state, x: state.update(format=1), "has format 1: expected 5"),
    "no format": (lambda state, x: state.pop("format"), "has no 'format'"),
    "layers": (lambda state, x: state["layers"].pop(), "has 2 layers: expected 3"),
    "layers are a number": (lambda state, x: state.update(layers=7), "has no len"),
    "state": (lambda state, x: state["layers"][1].pop("evicted"), "has no 'evicted'"),
    "negative": (lambda state, x: state["layers"][1].update(evicted=-1), "has evicted -1"),
    "seen": (lambda state, x: state["layers"][1].update(tokens_seen=3), "has tokens_seen 3: expected at least the 40"),
    "bool": (lambda state, x: state["layers"][1].update(tokens_seen=True), "has tokens_seen True"),
    "compressed": (lambda state, x: state["layers"][1].update(compressed="yes"), "has compressed 'yes'"),
    "no keys": (lambda state, x: x.pop("2.keys"), r"has no '(2\.)?keys'"),
    "shapes": (lambda state, x: x.update({"2.values": x["2.values"][:, :, 1:]}), "has keys of shape"),
    "dimensions": (lambda state, x: x.update({"2.keys": x["2.keys"][0]}), "has keys of shape"),
    "batch": (lambda state, x: x.update({"1.keys": x["1.keys"][:2], "1.values": x["1.values"][:2]}), r"\[3, heads"),
    "heads": (lambda state, x: x.update({f"2.{n}": x[f"2.{n}"][:, :1] for n in ("keys", "values")}),
              "has heads 1 in layer 2: expected 2"),
    "heads of all": (lambda state, x: x.update({f"{i}.{n}": x[f"{i}.{n}"].repeat(1, 2, 1, 1)
                                                for i in range(3) for n in ("keys", "values")}),
                     "has heads 4 in layer 0: expected 2"),
    "head_dim": (lambda state, x: x.update({"1.keys": x["1.keys"][..., :8]}), "has head_dim 8 in layer 1: expected 16"),
    "value_dim": (lambda state, x: x.update({"1.values": x["1.values"][..., :8]}), "has value_dim 8 in layer 1"),
    "seen by one": (lambda state, x: state["layers"][1].update(tokens_seen=81), "has tokens_seen 81 in layer 1: .* 80"),
    "lengths": (lambda state, x: x.update({"0.lengths": x["0.lengths"] + 30}), "has lengths"),
    "length of lengths": (lambda state, x: x.update({"0.lengths": x["0.lengths"][:2]}), "has lengths of shape"),
    "no tail": (lambda state, x: x.pop("0.tail"), "has lengths without tail"),
    "queries": (lambda state, x: x.update({"0.queries": torch.zeros(3, 4, 1, 9)}), "has queries of shape"),
    "predicted": (lambda state, x: x.update({"0.predicted": torch.zeros(3, 2, 9)}), "has predicted of shape"),
    "packed": (lambda state, x: x.update({"0.packed": torch.zeros(3, 2, 1)}), "has packed without predicted"),
    "repeated": (lambda state, x: x.update({"0.repeated": torch.zeros(3, 9, 9)}), "has repeated of shape"),
    "step": (lambda state, x: state["layers"][0].update(step=3), "has mass without step or step without mass"),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_named(ours, folder, defect):  # noqa: F811
    change, match = DEFECTS[defect]
    rewritten(folder, change)
    with pytest.raises(ValueError, match=rf"{FILE} .*{match}"):
        load(folder, ours.config)


def test_files_that_cannot_be_read_are_named(ours, folder):  # noqa: F811
    path = folder / FILE
    whole = path.read_bytes()
    for broken in (whole[:-10], whole[:100], b"", b"no tensors at all"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=f"{FILE} cannot be read"):
            load(folder, ours.config)
    save_file({"x": torch.zeros(1)}, str(path))
    with pytest.raises(ValueError, match='no "kvevict" in its metadata'):
        load(folder, ours.config)
    for text, match in (("{", "no JSON"), ("[]", "expected a dict")):
        save_file({"x": torch.zeros(1)}, str(path), metadata={"kvevict": text})
        with pytest.raises(ValueError, match=match):
            load(folder, ours.config)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        load(folder, ours.config)
    path.mkdir()
    with pytest.raises(ValueError, match=f"{FILE} cannot be read"):
        load(folder, ours.config)


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(num_key_value_heads=4), "num_key_value_heads 2: expected 4"),
        (dict(head_dim=32), "head_dim 16: expected 32"),
        (dict(hidden_size=128), "hidden_size 64: expected 128|head_dim"),
        (dict(num_hidden_layers=2), "num_hidden_layers 3: expected 2"),
        (dict(rope_theta=77.0), "rope"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_another_model_is_refused(folder, options, match):
    from transformers import LlamaConfig

    sizes = dict(vocab_size=120, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(ValueError, match=rf"{FILE} is of a model with .*({match})"):
        load(folder, LlamaConfig(**(sizes | options)))
    from transformers import MistralConfig

    with pytest.raises(ValueError, match="of a model with"):
        load(folder, MistralConfig(**sizes, sliding_window=None))


def test_what_the_policy_reads_must_have_been_saved(ours, folder):  # noqa: F811
    for policy, what in ((AttentionMass(), "attention"), (TOVA(), "queries"), (learned(), "hidden")):
        with pytest.raises(ValueError, match=f"was saved without {what}, which {type(policy).__name__} reads"):
            load(folder, ours.config, policy, budget=100)
    load(folder, ours.config, TOVA(), keep=0.5)  # which cuts no more


def test_what_cannot_be_saved_is_said(ours, tmp_path):  # noqa: F811
    import transformers

    with pytest.raises(ValueError, match="empty"):
        EvictingCache(ours.config, KeyDiff(), keep=0.5).save_pretrained(tmp_path)
    windows = tiny(transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM, head_dim=16, sliding_window=24,
                   layer_types=["full_attention", "sliding_attention", "full_attention"])  # fmt: skip
    cache = EvictingCache(windows.config, KeyDiff(), keep=0.5)
    with pytest.raises(ValueError, match="layer 1 is DynamicSlidingWindowLayer"):
        cache.save_pretrained(tmp_path)
    assert not os.listdir(tmp_path)
