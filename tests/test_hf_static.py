"""EvictingCache(static=True): the same tokens from buffers that never move, and a decode step that compiles whole."""

import pathlib
import shutil
import sysconfig

import pytest
import torch
from conftest import DEVICE

pytest.importorskip("transformers")

from test_hf import generate, ours, plain, prompt, reference_backend, tiny  # noqa: F401

from kvevict.hf import EvictingCache
from kvevict.policies import Hybrid, KeyDiff, KeyNorm, Recency

OPTIONS = dict(budget=48, interval=16)


def buffers(cache):
    return [(layer.keys.data_ptr(), layer.values.data_ptr(), layer.keys.shape) for layer in cache.layers]


@pytest.mark.parametrize(
    "policy", [KeyDiff(recent=8), KeyNorm(recent=8), Recency(recent=8)], ids=lambda p: type(p).__name__
)
def test_evicts_the_same_tokens_as_a_cache_that_grows(plain, policy):  # noqa: F811
    kept = [[], []]
    results = []
    for static in (False, True):
        cache = EvictingCache(
            plain.config, policy, static=static, on_evict=lambda e, k=kept[static]: k.append(e.indices), **OPTIONS
        )
        with torch.no_grad():
            logits = plain(prompt(150), past_key_values=cache).logits
            cache.settle()
            for _ in range(10):
                logits = plain(logits[:, -1:].argmax(-1), past_key_values=cache).logits
        results.append(logits)
    assert len(kept[0]) == len(kept[1]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_without_eviction_it_is_a_dynamic_cache(plain):  # noqa: F811
    expected = generate(plain, prompt(60), new=20)
    cache = EvictingCache(plain.config, KeyDiff(), budget=100, interval=16, static=True)
    assert torch.equal(generate(plain, prompt(60), new=20, past_key_values=cache), expected)
    assert {(r.seen, r.kept) for r in cache.report()} == {(79, 79)}


@pytest.mark.parametrize("chunk", [None, 24])
def test_buffers_never_move_or_grow(plain, chunk):  # noqa: F811
    evictions = []
    cache = EvictingCache(plain.config, KeyDiff(recent=8), static=True, on_evict=evictions.append, **OPTIONS)
    text = generate(plain, prompt(150), new=5, past_key_values=cache, prefill_chunk_size=chunk)
    before = buffers(cache)
    assert before[0][2][2] == 64
    out = generate(plain, torch.cat([text, prompt(30, seed=1)], 1), new=70, past_key_values=cache)
    assert out.shape == (1, 255) and buffers(cache) == before
    assert {r.seen for r in cache.report()} == {254} and len(evictions) >= 3 * 5
    assert all(48 < e.before and e.kept == 48 for e in evictions)


def test_compiled_decode_steps_equal_eager_ones(plain):  # noqa: F811
    torch._dynamo.reset()
    said = {}
    graphs = []

    def counting(module, inputs):
        graphs.append(module)
        return module.forward

    step = torch.compile(plain.forward, fullgraph=True, backend=counting)
    for name, forward in (("eager", plain.forward), ("compiled", step)):
        cache = EvictingCache(plain.config, KeyDiff(recent=8), static=True, **OPTIONS)
        with torch.no_grad():
            token = plain(prompt(100), past_key_values=cache).logits[:, -1:].argmax(-1)
            cache.settle()
            before, words = buffers(cache), []
            for i in range(50):
                if i and i % 16 == 0:
                    cache.settle()
                words.append(token)
                token = forward(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            assert buffers(cache) == before
        said[name] = torch.cat(words, 1)
        assert {r.seen for r in cache.report()} == {150}
    assert torch.equal(said["eager"], said["compiled"])
    assert len(graphs) == 1  # one graph for every step and after every eviction


COMPILES = shutil.which("g++") and (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists()


@pytest.mark.skipif(DEVICE == "cpu" and not COMPILES, reason="inductor wants a C++ compiler and Python's headers")
@torch.no_grad()
def test_inductor_decodes_as_eager_does(plain):  # noqa: F811
    torch._dynamo.reset()
    said = []
    for forward in (plain.forward, torch.compile(plain.forward, fullgraph=True)):
        cache = EvictingCache(plain.config, KeyDiff(recent=8), static=True, **OPTIONS)
        token, words = plain(prompt(100), past_key_values=cache).logits[:, -1:].argmax(-1), []
        cache.settle()
        for _ in range(12):
            words.append(token)
            token = forward(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        said.append(torch.cat(words, 1))
    assert torch.equal(*said)


def test_what_it_cannot_do_is_said(plain):  # noqa: F811
    for options in (dict(keep=0.5), dict(budget=9, interval=0), dict(budget=9, policy=Hybrid())):
        with pytest.raises(ValueError, match="static is True"):
            EvictingCache(plain.config, static=True, **options)
    cache = EvictingCache(plain.config, static=True, **OPTIONS)
    with pytest.raises(ValueError, match="static"):
        cache.crop(-1)


@pytest.mark.gpu
def test_cuda_graph():
    model = tiny()
    said = []
    for captured in (False, True):
        cache = EvictingCache(model.config, KeyDiff(recent=8), static=True, **OPTIONS)
        with torch.no_grad():
            token = model(prompt(100), past_key_values=cache).logits[:, -1:].argmax(-1)
            cache.settle()
            words = [token.clone()]

            def step(token=token, cache=cache):
                token.copy_(model(token, past_key_values=cache).logits[:, -1:].argmax(-1))

            if captured:
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                state = [(x.length.clone(), x.seen.clone(), x.keys.clone(), x.values.clone()) for x in cache.layers]
                with torch.cuda.stream(stream):
                    step()
                torch.cuda.current_stream().wait_stream(stream)
                for layer, saved in zip(cache.layers, state, strict=True):
                    for now, then in zip((layer.length, layer.seen, layer.keys, layer.values), saved, strict=True):
                        now.copy_(then)
                token.copy_(words[0])
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step()
            for i in range(40):
                if i and i % 16 == 0:
                    cache.settle()
                graph.replay() if captured else step()
                words.append(token.clone())
        said.append(torch.cat(words, 1))
    assert torch.equal(*said)
