"""transformers' continuous batching under a budget: tokens, blocks that go back to the pool, what is refused."""

import pytest
import torch
from conftest import DEVICE

pytest.importorskip("transformers", "5.23")

from test_hf import plain, prompt  # noqa: F401
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import cache as transformers_cache

from kvevict.hf.continuous import EvictingAllocator, generate_batch
from kvevict.paged.tail import skip
from kvevict.policies import KeyDiff, Recency, SnapKV

PROMPTS = [prompt(n, seed=n)[0].tolist() for n in (30, 100, 57, 140)]


@pytest.fixture(autouse=True)
def reference_backend(monkeypatch):
    """By environment: transformers runs the model in a thread of its own."""
    if DEVICE == "cpu":
        monkeypatch.setenv("KVEVICT_BACKEND", "reference")


def run(model, inputs=PROMPTS, new=24, *, ours=True, blocks=80, chunk=512, returned=1, **options):
    config = ContinuousBatchingConfig(page_size=8, num_blocks=blocks, max_batch_tokens=chunk, use_async_batching=False,
                                      use_cuda_graph=False, allow_block_sharing=False)  # fmt: skip
    greedy = (
        dict(do_sample=False)
        if returned == 1
        else dict(do_sample=True, temperature=1e-4, num_return_sequences=returned)
    )
    generation = GenerationConfig(max_new_tokens=new, eos_token_id=-1, pad_token_id=0, **greedy)
    call = (lambda *a, **k: generate_batch(model, *a, **k, **options)) if ours else model.generate_batch
    out = call(inputs, generation_config=generation, continuous_batching_config=config)
    assert all(answer.error is None for answer in out.values())
    return [out[name].generated_tokens for name in sorted(out)]


@torch.no_grad()
def by_hand(model, ids, policy, budget, interval, new, chunk, page=8):
    """One request with a DynamicCache, cut where `skip` says."""
    from transformers import DynamicCache

    cache, computed, gone, said = DynamicCache(), 0, 0, []
    pieces = list(torch.tensor([ids], device=DEVICE).split(chunk, 1))
    while len(said) < new:
        now = skip(computed, budget, interval, page)
        if now > gone:
            kept = [policy.compact(x.keys, x.values, keep=computed - now, inplace=False, layer=i)
                    for i, x in enumerate(cache.layers)]  # fmt: skip
            cache, gone = DynamicCache([(k.keys, k.values) for k in kept]), now
        piece = pieces.pop(0) if pieces else torch.tensor([[said[-1]]], device=DEVICE)
        positions = torch.arange(computed, computed + piece.shape[1], device=DEVICE)[None]
        logits = model(piece, past_key_values=cache, position_ids=positions).logits
        computed += piece.shape[1]
        if not pieces:
            said.append(int(logits[0, -1].argmax()))
    return said


def test_with_room_it_is_what_transformers_does(plain):  # noqa: F811
    assert run(plain, budget=500) == run(plain, ours=False)


@pytest.mark.parametrize("policy", [KeyDiff(recent=8), Recency(recent=8), KeyDiff(recent=8, heads="shared")])
def test_every_request_is_cut_as_if_alone(plain, policy):  # noqa: F811
    said = run(plain, policy=policy, budget=24, interval=16)
    assert said == [by_hand(plain, ids, policy, 24, 16, 24, 1000) for ids in PROMPTS]
    assert said != run(plain, ours=False)


def test_a_prompt_in_chunks(plain):  # noqa: F811
    """Alone, so that its chunks are whole steps."""
    said = run(plain, PROMPTS[3:], policy=KeyDiff(recent=8), budget=24, interval=16, chunk=32)
    assert said == [by_hand(plain, PROMPTS[3], KeyDiff(recent=8), 24, 16, 24, 32)]


def test_several_answers_to_one_prompt(plain):  # noqa: F811
    said = run(plain, PROMPTS[1:2], policy=KeyDiff(recent=8), budget=24, interval=16, returned=3)
    # transformers reads the prompt but for its last token, and then forks the request.
    assert said == [by_hand(plain, PROMPTS[1], KeyDiff(recent=8), 24, 16, 24, len(PROMPTS[1]) - 1)] * 3


def test_blocks_go_back_to_the_pool(plain, monkeypatch):  # noqa: F811
    """A pool of 24 blocks of 8 holds requests that would want 4 times 15 in the end."""
    most, made = [], []
    compact = EvictingAllocator._compact

    def noted(self, request_id, length, keep):
        compact(self, request_id, length, keep)
        made.append(self)
        held = [block for blocks in self.block_table.values() for block in blocks]
        assert len(set(held)) == len(held)
        most.append(len(self.block_table[request_id]))

    monkeypatch.setattr(EvictingAllocator, "_compact", noted)
    said = run(plain, [ids[:40] for ids in PROMPTS], new=80, policy=KeyDiff(recent=8), budget=24, interval=0, blocks=20)
    assert [len(answer) for answer in said] == [80] * 4
    assert len(most) > 4 * 8 and max(most) <= 4  # 24 to 31 tokens
    assert not made[-1].block_table and not made[-1]._skipped


def test_what_is_not_served_is_refused_and_nothing_is_left_behind(plain):  # noqa: F811
    for options, match in (
        (dict(policy=SnapKV(), budget=100), "policy needs queries"), (dict(budget=35), "budget is 35"),
        (dict(policy=KeyDiff(rotary=[0.5] * 8), budget=40), "KeyDiff that reads positions"),
        (dict(policy=KeyDiff(heads="adaptive"), budget=40), "policy has heads 'adaptive'"),
        (dict(budget=40, interval=-1), "interval is -1"), (dict(budget=40, policy="keydiff"), "policy is 'keydiff'"),
        (dict(budget=40, continuous_batching_config=ContinuousBatchingConfig(use_async_batching=True)), "use_async"),
        (dict(budget=40, continuous_batching_config=ContinuousBatchingConfig(use_cuda_graph=True)), "use_cuda_graph"),
        (dict(budget=40, continuous_batching_config=ContinuousBatchingConfig(cpu_offload_space=1.0)), "cpu_offload"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=match):
            generate_batch(plain, PROMPTS, **options)
    table = dict(transformers_cache.ATTN_TYPE_TO_ALLOCATOR)
    with pytest.raises(TypeError):
        generate_batch(plain, PROMPTS, budget=40, record_timestamps=False, warmup=False, inputs=3)
    run(plain, new=2, budget=40)
    assert transformers_cache.ATTN_TYPE_TO_ALLOCATOR == table
