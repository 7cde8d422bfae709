"""A model that is spread over devices: each layer's part of a cache lies, and is cut, where the layer computes."""

import pytest
import torch

pytest.importorskip("transformers")

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from transformers import LlamaConfig, LlamaForCausalLM

import kvevict
from kvevict.hf import EvictingCache
from kvevict.hf.devices import of_layers
from kvevict.policies import LRU, AttentionMass, KeyDiff, Pyramid, SnapKV

CONFIG = LlamaConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, max_position_embeddings=256,
)  # fmt: skip
POLICY = KeyDiff(sink=2, recent=4)
ENDS = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "meta", "lm_head": "meta"}


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def layers_on(*devices):
    return {f"model.layers.{i}": device for i, device in enumerate(devices)}


# "cpu" beside another device is where weights wait, not where they are used: "cpu:0" here is one that computes.
@pytest.mark.parametrize("device_map, expected", [
    ({"": "cpu"}, ["cpu"] * 3),
    (layers_on("cpu:0", "cpu:0", "meta"), ["cpu:0", "cpu:0", "meta"]),
    ({"": "cpu:0"} | layers_on("meta"), ["meta", "cpu:0", "cpu:0"]),
    (layers_on("cpu", "disk", "cpu"), ["cpu"] * 3),
    (layers_on("meta", "cpu", "disk"), ["meta"] * 3),
    ({"model.layers.1.mlp.experts.2": "meta:1"} | layers_on("meta", "meta:1", "meta"), ["meta", "meta:1", "meta"]),
])  # fmt: skip
def test_a_map_says_where_each_layer_is(device_map, expected):
    model = llama()
    for source in (model, CONFIG):
        assert of_layers(source, range(3), None, device_map) == [torch.device(x) for x in expected]
    model.hf_device_map = device_map
    assert of_layers(model, range(3), None, None) == [torch.device(x) for x in expected]


def test_the_attention_decides_where_a_layer_is_split():
    split = layers_on("meta", "meta", "meta") | {"model.layers.1.mlp": "meta:1", "model.layers.2.self_attn": "meta:2"}
    assert [str(x) for x in of_layers(llama(), range(3), None, split)] == ["meta", "meta", "meta:2"]
    assert [str(x) for x in of_layers(llama(), range(3), None, {"model": "meta", "lm_head": "cpu"})] == ["meta"] * 3
    with pytest.raises(ValueError, match="device_map has layer 1 on meta and meta:1: expected one device"):
        of_layers(CONFIG, range(3), None, split)


def test_without_a_map_a_layer_is_where_its_weights_are():
    model = llama()
    model.model.layers[1].to("meta")
    assert [x.type for x in of_layers(model, range(3), None, None)] == ["cpu", "meta", "cpu"]
    assert [x.type for x in of_layers(CONFIG, range(3), None, None)] == ["cpu"] * 3
    assert [x.type for x in of_layers(model, range(3), "meta", None)] == ["meta"] * 3


@pytest.mark.parametrize("wrong, message", [
    (dict(device_map="auto"), "device_map is 'auto': expected {module's name: device}, as model.hf_device_map is"),
    (dict(device_map={}), "device_map is {}: expected"), (dict(device_map={0: "cpu"}), "device_map is {0: 'cpu'}: exp"),
    (dict(device_map=layers_on("cpu", "cpu")), "expected the name of a module with layer 2 in it, or ''"),
    (dict(device_map={"": "gpu"}), "device_map has '': 'gpu': expected a device of torch"),
    (dict(device_map={"": 99}), "device_map has '': 99: expected a device of torch"),
    (dict(device_map={"": None}), "device_map has '': None: expected a device of torch"),
    (dict(device="gpu"), "device is 'gpu': expected a device of torch"),
    (dict(device="cpu", device_map={"": "cpu"}), "device is 'cpu' and device_map {'': 'cpu'}: expected one of them"),
])  # fmt: skip
def test_wrong_devices_are_refused(wrong, message, tmp_path):
    for source in (llama(), CONFIG):
        with pytest.raises((TypeError, ValueError)) as error:
            EvictingCache.from_pretrained(tmp_path, source, POLICY, budget=60, **wrong)
        assert message in str(error.value) and "\n" not in str(error.value)


@torch.no_grad()
def read(model, device="cpu"):
    cache = EvictingCache(model, POLICY, keep=0.4)
    model(torch.randint(64, (1, 50), generator=torch.Generator().manual_seed(1)).to(device), past_key_values=cache)
    return cache


def test_a_saved_cache_is_read_to_where_the_layers_are(tmp_path):
    with kvevict.backend("reference"):
        model = llama()
        cache = read(model)
        cache.save_pretrained(tmp_path)
        model.model.layers[2].to("meta")
        spread = EvictingCache.from_pretrained(tmp_path, model, POLICY, keep=0.4)
        mapped = EvictingCache.from_pretrained(
            tmp_path, CONFIG, POLICY, keep=0.4, device_map=layers_on("cpu:0", "cpu:0", "meta")
        )
        for again in (spread, mapped):
            assert [layer.keys.device.type for layer in again.layers] == ["cpu", "cpu", "meta"]
            assert [layer.values.device.type for layer in again.layers] == ["cpu", "cpu", "meta"]
            for old, new in zip(cache.layers, again.layers, strict=True):
                assert old.keys.shape == new.keys.shape and new.tokens_seen == 50
            assert torch.equal(cache.layers[1].keys, again.layers[1].keys)


def spread_over(model, device_map):
    """What accelerate's dispatch_model does: weights on their devices, and what a module is given follows them."""
    for name, device in device_map.items():
        top = model.get_submodule(name)
        for module in top.modules():
            for own in (module._parameters, module._buffers):
                for key in [key for key, x in own.items() if x is not None]:
                    new = torch.empty_like(own[key], device=device)
                    own[key] = torch.nn.Parameter(new) if own is module._parameters else new

        def move(module, arguments, options, device=device):
            held = options.pop("past_key_values", None)
            arguments, options = tree_map_only(torch.Tensor, lambda given: given.to(device), (arguments, options))
            return arguments, options if held is None else options | {"past_key_values": held}

        top.register_forward_pre_hook(move, with_kwargs=True)


@torch.no_grad()
@pytest.mark.parametrize("policy, target", [
    (POLICY, dict(keep=0.4)), (POLICY, dict(budget=20, interval=4)), (KeyDiff(), dict(keep=Pyramid(0.4))),
    (KeyDiff(heads="shared"), dict(keep=20)), (SnapKV(recent=4), dict(budget=20, interval=4)),
    (AttentionMass(recent=4), dict(keep=0.4)), (LRU(recent=4), dict(budget=20, interval=4)),
], ids=lambda x: type(x).__name__)  # fmt: skip
def test_every_layer_is_cut_on_its_own_device(policy, target, monkeypatch):
    """Tensors without values, which know their device and meet no other one's."""
    monkeypatch.undo()  # torch.empty is torch's again, which makes such tensors
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = llama()
        spread_over(model, ENDS | layers_on("cpu", "meta", "cpu"))
        ids = torch.ones(2, 50, dtype=torch.int64)
        cache = EvictingCache(model, policy, **target)
        model(ids, past_key_values=cache)
        held = [layer.cached() for layer in cache.layers]
        assert all(0 < n < 50 for n in held) and (len(set(held)) == 1) != isinstance(target.get("keep"), Pyramid)
        for _ in range(3):
            model(ids[:, :1], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        if cache.layers[0].watching or not policy.needs:  # else nothing is noted for another eviction
            held = [layer.cached() for layer in cache.layers]
            cache.evict(12)
            assert [layer.cached() for layer in cache.layers] == [min(n, 12) for n in held]
        model(ids[:, :1], past_key_values=cache)
        for layer, device in zip(cache.layers, ("cpu", "meta", "cpu"), strict=True):
            assert layer.keys.device.type == layer.values.device.type == device
            tracker = layer.notes.tracker
            assert tracker is None or tracker.mass.device.type == tracker.lengths.device.type == device


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@torch.no_grad()
def test_two_gpus_keep_what_one_keeps(tmp_path):
    """Padding too: a mask comes to each device as a tensor of its own."""
    accelerate = pytest.importorskip("accelerate")
    ids = torch.randint(64, (2, 50), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    said = []
    ends = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), 0)
    for device_map in ({"": 0}, ends | layers_on(0, 1, 0)):
        model = accelerate.dispatch_model(llama(), device_map=device_map, force_hooks=True)
        for options in (dict(keep=0.4), dict(budget=20, interval=4)):
            cache = EvictingCache(model, POLICY, **options)
            inputs = dict(attention_mask=mask.to(0), max_new_tokens=12, do_sample=False)
            said.append(model.generate(ids.to(0), past_key_values=cache, **inputs).cpu())
            cache.evict(10)
            cache.save_pretrained(tmp_path)
            again = EvictingCache.from_pretrained(tmp_path, model, POLICY, **options)
            for old, new in zip(cache.layers, again.layers, strict=True):
                assert old.keys.device == new.keys.device and torch.equal(old.keys, new.keys)
    assert torch.equal(said[0], said[2]) and torch.equal(said[1], said[3])
