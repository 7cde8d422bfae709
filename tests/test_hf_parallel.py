"""Pipeline parallelism: layers that other ranks run hold no token here. Tensor parallelism: test_distributed.py."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from kvevict.hf import EvictingCache, parallel
from kvevict.policies import KeyDiff, KVzip, ModelWide, Pyramid

CONFIG = LlamaConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, max_position_embeddings=256,
)  # fmt: skip
POLICY = KeyDiff(sink=2, recent=4)


@pytest.fixture
def read():
    """Caches after a prompt: of one process, and of the rank that runs the last two layers."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    caches = []
    for mine in (range(3), (1, 2)):
        cache = EvictingCache(model, POLICY, budget=60)
        with torch.no_grad():
            model(torch.randint(64, (1, 50), generator=torch.Generator().manual_seed(1)), past_key_values=cache)
        for i in set(range(3)) - set(mine):
            cache.layers[i].reset()
        caches.append(cache)
    return model, *caches


def test_layers_of_other_ranks_are_skipped(read, tmp_path):
    model, whole, part = read
    for cache in (whole, part):
        cache.evict(0.4)
    part.save_pretrained(tmp_path)
    again = EvictingCache.from_pretrained(tmp_path, model, POLICY, budget=60)
    assert [int(layer.get_seq_length()) for layer in again.layers] == [0, 50, 50]
    for layer in (1, 2):
        for cache in (part, again):
            assert torch.equal(cache.layers[layer].keys, whole.layers[layer].keys)
            assert cache.layers[layer].keys.shape[2] == 20


@pytest.mark.parametrize("budget", [Pyramid(0.4), ModelWide(0.4)], ids=["by-layer", "together"])
def test_shares_of_layers_need_all_of_them(read, budget):
    _, _, part = read
    before = part.layers[1].keys.clone()
    with pytest.raises(ValueError, match="some layers hold no token|scores of KeyDiff compare"):
        part.evict(budget)
    assert torch.equal(part.layers[1].keys, before)


def test_nothing_at_all_is_still_an_error(tmp_path):
    cache = EvictingCache(CONFIG, POLICY, budget=60)
    for call in (lambda: cache.evict(0.5), lambda: cache.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="the cache is empty"):
            call()


def part_of_a_model(layers):
    """A rank's module: layers that call themselves by their numbers in the whole model."""
    torch.manual_seed(0)
    options = CONFIG.to_dict() | dict(num_hidden_layers=len(layers), num_key_value_heads=1)
    model = LlamaForCausalLM(LlamaConfig(**options)).eval()
    for i, layer in zip(layers, model.model.layers, strict=True):
        layer.self_attn.layer_idx = i
    return model


@torch.no_grad()
def test_a_rank_without_the_first_layer_looks_for_the_other_heads(monkeypatch):
    """It has one of two KV heads, whose other one is nowhere."""
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 4)
    ids = torch.randint(64, (1, 50), generator=torch.Generator().manual_seed(1))
    model, cache = part_of_a_model((1, 2)), EvictingCache(CONFIG, KeyDiff(heads="shared"), keep=0.4)
    for _ in range(2):  # again, as it was not refused by chance
        with pytest.raises(ValueError, match="this rank sees 1 of the model's 2 KV heads"):
            model(ids, past_key_values=cache)


@torch.no_grad()
def test_a_choice_over_all_layers_does_not_wait_for_ever():
    ids = torch.randint(64, (1, 50), generator=torch.Generator().manual_seed(1))
    options = CONFIG.to_dict() | dict(num_hidden_layers=3)
    model = part_of_a_model((1, 2))
    cache = EvictingCache(LlamaConfig(**options | dict(num_key_value_heads=1)), KVzip(), keep=ModelWide(0.4))
    cache._config._attn_implementation = "kvevict"
    model.set_attn_implementation("kvevict")
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"only the layers \[1, 2\] have run here"):
        model(ids[:, :1], past_key_values=cache)


def test_a_group_that_is_none_is_named():
    with pytest.raises(TypeError, match="group is str: expected a process group"):
        EvictingCache(CONFIG, POLICY, keep=0.5, group="tp")
