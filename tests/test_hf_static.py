"""EvictingCache(static=True): the same tokens from buffers that never move, and a decode step that compiles whole."""

import pathlib
import shutil
import sysconfig

import pytest
import torch
from conftest import DEVICE
from torch.fx.experimental.proxy_tensor import make_fx

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


@pytest.mark.parametrize("length", [60, 1])
def test_without_eviction_it_is_a_dynamic_cache(plain, length):  # noqa: F811
    expected = generate(plain, prompt(length), new=20)
    cache = EvictingCache(plain.config, KeyDiff(), budget=100, interval=16, static=True)
    assert torch.equal(generate(plain, prompt(length), new=20, past_key_values=cache), expected)
    assert {(r.seen, r.kept) for r in cache.report()} == {(length + 19, length + 19)}


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


@pytest.mark.slow  # as the test below, with code that takes half a minute to compile
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


@pytest.fixture
def no_host_reads(monkeypatch):
    """A function after whose call a tensor's value cannot be read by the host, as while a CUDA graph is captured."""

    def refuse(*_, **__):
        raise AssertionError("the host reads a tensor's value")

    def forbid():
        for name in ("__bool__", "__int__", "__float__", "__index__", "__len__", "item", "tolist", "numpy", "nonzero"):
            monkeypatch.setattr(torch.Tensor, name, refuse)

    yield forbid
    monkeypatch.undo()


@pytest.mark.parametrize("model", ["plain", "ours"])
@torch.no_grad()
def test_a_decode_step_reads_nothing_back(model, no_host_reads, request, monkeypatch):
    model = request.getfixturevalue(model)
    cache = EvictingCache(model.config, KeyDiff(recent=8), static=True, **OPTIONS)
    token = model(prompt(100), past_key_values=cache).logits[:, -1:].argmax(-1)
    cache.settle()
    no_host_reads()
    for _ in range(OPTIONS["interval"]):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
    monkeypatch.undo()
    assert {(r.seen, r.kept) for r in cache.report()} == {(116, 48)}


def stepping(model, cache):
    return lambda token: model(token, past_key_values=cache).logits[:, -1:].argmax(-1)


@torch.no_grad()
def test_a_recorded_step_replays_after_evictions(plain):  # noqa: F811
    """As a CUDA graph does: the operators of one step, with every number that the host gave them."""
    said = []
    for recorded in (False, True):
        cache = EvictingCache(plain.config, KeyDiff(recent=8), static=True, **OPTIONS)
        token = plain(prompt(100), past_key_values=cache).logits[:, -1:].argmax(-1)
        cache.settle()
        step, words = stepping(plain, cache), [token]
        if recorded:
            state = [tensor for x in cache.layers for tensor in (x.length, x.seen, x.keys, x.values)]
            before = [tensor.clone() for tensor in state]
            step = make_fx(step)(token)
            for now, then in zip(state, before, strict=True):
                now.copy_(then)
        for i in range(40):
            if i and i % 16 == 0:
                cache.settle()
            words.append(step(words[-1]))
        said.append(torch.cat(words, 1))
        assert {r.seen for r in cache.report()} == {140}
    assert torch.equal(*said)


@pytest.mark.parametrize("new", [1, 5])
def test_with_gradients_on_it_says_the_same(plain, new):  # noqa: F811
    """As fine-tuning code and forgotten no_grad()s run it; a prompt's gradient is that of a cache that grows."""
    logits, gradients = [], []
    for grad, static in ((False, True), (True, True), (True, False)):
        cache = EvictingCache(plain.config, KeyDiff(recent=8), static=static, **OPTIONS)
        embedded = plain.get_input_embeddings()(prompt(70)).detach().requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            first = plain(inputs_embeds=embedded, past_key_values=cache).logits
            if grad:
                first.sum().backward()
                gradients.append(embedded.grad)
            cache.settle()
            for i in range(4):
                out = plain(prompt(new, seed=i), past_key_values=cache).logits
        logits.append(out.detach())
    assert torch.equal(*logits[:2])
    torch.testing.assert_close(*gradients)


def test_a_cache_made_in_inference_mode_goes_on_outside(plain):  # noqa: F811
    said = []
    for mode in (torch.no_grad, torch.inference_mode):
        cache = EvictingCache(plain.config, KeyDiff(recent=8), static=True, **OPTIONS)
        with mode():
            plain(prompt(100), past_key_values=cache)
        said.append(generate(plain, prompt(110), new=30, past_key_values=cache))
    assert torch.equal(*said)


@torch.no_grad()
def test_what_is_cropped_was_never_there(plain):  # noqa: F811
    """Before an eviction, after one, and from a prompt that is still longer than the buffer."""
    for length, evicted in ((40, 0), (100, 52)):
        said = []
        for extra in (0, 5):
            cache = EvictingCache(plain.config, KeyDiff(recent=8), static=True, **OPTIONS)
            plain(prompt(length), past_key_values=cache)
            cache.settle()
            if extra:
                plain(prompt(extra, seed=9), past_key_values=cache)
                plain(prompt(1, seed=9), past_key_values=cache)
            for layer in cache.layers:
                layer.crop(0)
                layer.crop(-(extra + 1) if extra else 0)
            assert {(r.seen, r.kept, r.evicted) for r in cache.report()} == {(length, length - evicted, evicted)}
            said.append(plain(prompt(3, seed=1), past_key_values=cache).logits)
        assert torch.equal(*said)
    assert not cache.is_croppable
    cache.layers[0].crop(-11)  # 3 new ones, and the recent 8
    for too_many in (-1, int(cache.layers[0].seen) - 1):
        with pytest.raises(ValueError, match="expected at least -0"):
            cache.layers[0].crop(too_many)
    cache = EvictingCache(plain.config, KeyDiff(recent=8), static=True, **OPTIONS)
    plain(prompt(100), past_key_values=cache)
    cache.layers[0].crop(-8)
    assert (int(cache.layers[0].seen), int(cache.layers[0].length)) == (92, 40)


@torch.no_grad()
def test_requests_change_places_but_not_their_number(ours):  # noqa: F811
    ids = prompt(100, batch=3)
    expected = []
    for b in (2, 0, 0):
        cache = EvictingCache(ours.config, KeyDiff(recent=8), static=True, **OPTIONS)
        ours(ids[b : b + 1], past_key_values=cache)
        expected.append(ours(prompt(1, seed=1), past_key_values=cache).logits)
    for settled in (True, False):
        cache = EvictingCache(ours.config, KeyDiff(recent=8), static=True, **OPTIONS)
        ours(ids, past_key_values=cache)
        if settled:
            cache.settle()
        cache.reorder_cache(torch.tensor([2, 0, 0], device=DEVICE))
        logits = ours(prompt(1, seed=1).expand(3, 1), past_key_values=cache).logits
        torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-4)
    before = [(layer.keys.clone(), layer.keys.data_ptr()) for layer in cache.layers]
    for number, change in ((1, lambda: cache.batch_select_indices(torch.tensor([1]))),
                           (2, lambda: cache.batch_select_indices(torch.tensor([True, False, True]))),
                           (6, lambda: cache.batch_repeat_interleave(2))):  # fmt: skip
        with pytest.raises(ValueError, match=f"{number} requests are to be selected: expected 3"):
            change()
    assert all(
        torch.equal(x.keys, k) and x.keys.data_ptr() == p for x, (k, p) in zip(cache.layers, before, strict=True)
    )


def test_reset_is_for_another_text_of_the_same_batch(ours):  # noqa: F811
    cache = EvictingCache(ours.config, KeyDiff(recent=8), static=True, **OPTIONS)
    fresh = EvictingCache(ours.config, KeyDiff(recent=8), static=True, **OPTIONS)
    generate(ours, prompt(150), past_key_values=cache)
    before = buffers(cache)
    cache.reset()
    cache.reset()
    said = [generate(ours, prompt(90, seed=2), past_key_values=c) for c in (cache, fresh)]
    assert torch.equal(*said) and buffers(cache) == before and cache.report() == fresh.report()
    cache.reset()
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"keys have shape \(2, 2, 9, 16\): expected \(1, 2, 64, 16\)"),
    ):
        ours(prompt(9, batch=2), past_key_values=cache)
    assert {r.seen for r in cache.report()} == {0}


@torch.no_grad()
def test_padding_is_refused_before_anything_is_kept(ours):  # noqa: F811
    ids = prompt(40, batch=2)
    mask = torch.ones_like(ids)
    cache = EvictingCache(ours.config, KeyDiff(recent=8), static=True, **OPTIONS)
    expected = ours(ids, attention_mask=mask, past_key_values=cache).logits
    cache.reset()
    mask[1, :7] = 0
    with pytest.raises(ValueError, match="the prompts have padding"):
        ours(ids, attention_mask=mask, past_key_values=cache)
    assert torch.equal(ours(ids, past_key_values=cache).logits, expected)
    assert {r.seen for r in cache.report()} == {40}


@torch.no_grad()
def test_a_chunk_may_not_hide_what_is_cached(ours):  # noqa: F811
    """After an eviction another token stands where the mask expects the hidden one."""
    cache = EvictingCache(ours.config, KeyDiff(recent=8), static=True, **OPTIONS)
    ours(prompt(40), past_key_values=cache)
    mask = torch.ones(1, 43, dtype=torch.long, device=DEVICE)
    mask[0, 35] = 0
    with pytest.raises(ValueError, match="attention_mask hides cached tokens"):
        ours(prompt(3), attention_mask=mask, past_key_values=cache)
    assert {r.seen for r in cache.report()} == {40}


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
