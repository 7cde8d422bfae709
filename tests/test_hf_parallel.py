"""Pipeline parallelism: layers that other ranks run hold no token here. Tensor parallelism: test_distributed.py."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from kvevict.hf import EvictingCache
from kvevict.policies import KeyDiff, ModelWide, Pyramid

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
