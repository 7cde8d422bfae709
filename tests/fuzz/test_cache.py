"""EvictingCache under random sequences of calls, against plain lists of the tokens that each layer, request and head
must hold. After every step the cache holds exactly those, in order, bit for bit."""

import os
import tempfile
from typing import NamedTuple

import pytest
import torch
from conftest import DEVICE

pytest.importorskip("transformers")

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from transformers import LlamaConfig, LlamaForCausalLM

import kvevict
from fuzz import oracle
from kvevict.hf import EvictingCache
from kvevict.policies import TOVA, AttentionMass, Fixed, KeyNorm

LAYERS, HEADS = 2, 2
SHARES = torch.tensor([[1.0, 3.0], [5.0, 0.5]])  # of the heads, where they are unequal
MOST = 40  # tokens of a request, so that a step stays short


class Token(NamedTuple):
    position: int  # in the sequence, left padding counted
    norm: float
    key: bytes
    value: bytes


def model_of(seed: int):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=4,
                 num_key_value_heads=HEADS, head_dim=8)  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval().to(DEVICE)


MODEL = model_of(0)


def rows(x: torch.Tensor) -> list[bytes]:
    """[n, D] float32 as bytes."""
    return [row.numpy().tobytes() for row in x.detach().cpu()]


class CacheMachine(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from([KeyNorm, KeyNorm, TOVA, AttentionMass]),
        sink=st.integers(0, 2),
        recent=st.integers(1, 3),
        heads=st.sampled_from(["each", "shared"]),
        limit=st.one_of(st.fixed_dictionaries(dict(keep=st.sampled_from([0.5, 0.3, 1.0, 4]))),
                        st.fixed_dictionaries(dict(budget=st.integers(4, 9), interval=st.integers(1, 4)))),
        unequal=st.booleans(),
        static=st.booleans(),
        padding=st.lists(st.integers(0, 5), min_size=1, max_size=3),
        length=st.integers(6, 14),
    )  # fmt: skip
    def start(self, policy, sink, recent, heads, limit, unequal, static, padding, length):
        self.unequal = unequal and not ("budget" in limit and policy is AttentionMass)
        if self.unequal:
            heads, share = "each", "keep" if "keep" in limit else "budget"
            limit = limit | {share: Fixed(SHARES, limit[share])}
        elif policy is TOVA:
            heads = "shared"
        self.static = static and "budget" in limit and policy is KeyNorm and not self.unequal
        padding = [0] * len(padding) if self.static else [p - min(padding) for p in padding]
        self.policy = policy(sink=sink, recent=recent, heads=heads)
        self.limit = limit
        self.make()
        self.mask = [[0] * p + [1] * (length - p) for p in padding]
        self.forget()
        self.forward(length)

    def make(self, folder: str | None = None) -> None:
        options = dict(self.limit, on_evict=self.evicted, **(dict(static=True) if self.static else {}))
        with kvevict.backend("reference"):
            if folder is None:
                self.cache = EvictingCache(MODEL, self.policy, **options)
            else:
                self.cache = EvictingCache.from_pretrained(folder, MODEL, self.policy, device=DEVICE, **options)
        for layer in self.cache.layers:
            layer.update = self.noting(layer.index, layer.update)
        self.asked: int | float | None = None  # what the eviction that is to come must keep

    def noting(self, index: int, update):
        def note(keys, values, *args, **kwargs):
            result = update(keys, values, *args, **kwargs)
            new = keys.shape[2]
            for b, mask in enumerate(self.mask):
                for h, held in enumerate(self.held[index][b]):
                    for i, (key, value) in enumerate(zip(rows(keys[b, h]), rows(values[b, h]), strict=True)):
                        position = len(mask) - new + i
                        if mask[position]:
                            held.append(Token(position, float(keys[b, h, i].double().norm()), key, value))
            self.since[index] += new
            return result

        return note

    def forget(self) -> None:
        self.held = [[[[] for _ in range(HEADS)] for _ in self.mask] for _ in range(LAYERS)]
        self.since = [0] * LAYERS  # tokens since the last that were given up, in each layer
        self.cuts = [0] * LAYERS  # evictions of the prompt
        self.paged = [False] * LAYERS  # what heads of unequal length have kept lies in pages

    def evicted(self, eviction) -> None:
        """The model follows an eviction, if it was a right one."""
        layer, given_up = eviction.layer, False
        for b, heads in enumerate(self.held[layer]):
            norms = [[token.norm for token in held] for held in heads]
            if self.policy.heads == "shared":
                norms = [[sum(column) / HEADS for column in zip(*norms, strict=True)]] * HEADS
            for h, held in enumerate(heads):
                length = len(held)
                count = self.count(layer, h, length)
                protected = oracle.protected(length, count, *self.policy.protected)
                chosen = [i for i in eviction.indices[b, h].tolist() if i >= 0]
                assert chosen == sorted(set(chosen)) and len(chosen) == count, (chosen, count, length)
                assert protected <= set(chosen), (protected, chosen)
                if isinstance(self.policy, KeyNorm):
                    gone = [norms[h][i] for i in range(length) if i not in chosen]
                    stayed = [norms[h][i] for i in chosen if i not in protected]
                    assert not gone or not stayed or max(stayed) <= min(gone) + 1e-5
                given_up |= len(chosen) < length
                heads[h] = [held[i] for i in chosen]
        self.paged[layer] |= self.unequal and self.asked is None
        if given_up or self.paged[layer]:
            self.since[layer] = 0
        self.cuts[layer] += 1

    def count(self, layer: int, head: int, length: int) -> int:
        """What a head keeps of its tokens."""
        keep = self.asked or self.limit.get("keep") or self.limit["budget"]
        if not isinstance(keep, Fixed):
            return oracle.kept_count(keep, length)
        tokens = length if "keep" in self.limit else 10**6  # a budget is the same for any number of them
        if isinstance(keep.keep, int) and keep.keep > tokens:
            return length
        return min(keep.per_head(LAYERS, HEADS, tokens, sum(self.policy.protected))[layer][head], length)

    @precondition(lambda self: len(self.mask[0]) < MOST)
    @rule(new=st.sampled_from([1, 1, 1, 2, 5]))
    def more(self, new):
        for mask in self.mask:
            mask += [1] * new
        self.forward(new)

    def forward(self, new: int) -> None:
        self.asked = None
        mask = torch.tensor(self.mask, device=DEVICE)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]
        ids = torch.randint(1, 50, positions.shape, generator=torch.Generator().manual_seed(mask.numel())).to(DEVICE)
        with torch.no_grad(), kvevict.backend("reference"):
            logits = MODEL(ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache).logits
        assert logits.isfinite().all()
        self.settle()

    def settle(self) -> None:
        with kvevict.backend("reference"):
            self.cache.settle()

    def refused(self, call) -> bool:
        """Whether the call raised a ValueError."""
        try:
            with kvevict.backend("reference"):
                call()
        except ValueError:
            return True
        return False

    @rule(keep=st.sampled_from([0.5, 0.7, 1.0, 3, 6, 100]))
    def evict(self, keep):
        self.settle()
        self.asked = keep
        refused = self.refused(lambda: self.cache.evict(keep))
        assert not refused or self.policy.needs  # of which nothing may be noted by now
        self.asked = None

    @rule(count=st.integers(1, 6))
    def crop(self, count):
        self.asked = None
        shortest = min(len(heads[0]) for layer in self.held for heads in layer)
        count = min(count, shortest - 1)  # a forward needs a token
        if count <= 0:
            return
        if self.refused(lambda: self.cache.crop(-count)):
            assert count > min(self.since), "refused, though nothing was given up since"
            return
        end = len(self.mask[0])
        for layer in range(LAYERS):
            self.since[layer] = max(self.since[layer] - count, 0)
            for heads in self.held[layer]:
                for h, held in enumerate(heads):
                    assert [token.position for token in held[-count:]] == list(range(end - count, end))
                    heads[h] = held[:-count]
        for mask in self.mask:
            del mask[-count:]

    def select(self, requests: list[int]) -> None:
        self.settle()
        self.mask = [list(self.mask[b]) for b in requests]
        self.held = [[[list(head) for head in layer[b]] for b in requests] for layer in self.held]

    @rule(data=st.data())
    def reorder(self, data):
        B = len(self.mask)
        requests = data.draw(st.lists(st.integers(0, B - 1), min_size=B, max_size=B))
        self.settle()
        self.cache.reorder_cache(torch.tensor(requests, device=DEVICE))
        self.select(requests)

    @precondition(lambda self: not self.static)
    @rule(data=st.data(), as_mask=st.booleans())
    def select_some(self, data, as_mask):
        B = len(self.mask)
        requests = data.draw(st.lists(st.integers(0, B - 1), min_size=1, max_size=B, unique=True))
        requests = sorted(requests) if as_mask else requests
        given = [b in requests for b in range(B)] if as_mask else requests
        self.settle()
        self.cache.batch_select_indices(torch.tensor(given, device=DEVICE))
        self.select(requests)

    @precondition(lambda self: not self.static and len(self.mask) == 1)
    @rule(times=st.integers(1, 3))
    def repeat(self, times):
        self.settle()
        self.cache.batch_repeat_interleave(times)
        self.select([0] * times)

    @precondition(lambda self: self.static)
    @rule()
    def another_batch_is_refused(self):
        before = len(self.mask)
        assert self.refused(lambda: self.cache.batch_select_indices(torch.zeros(before + 1, dtype=torch.int64)))
        assert self.refused(lambda: self.cache.batch_repeat_interleave(2))

    @precondition(lambda self: not self.static)
    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save_pretrained(folder)
            self.make(folder)

    @rule()
    def reset(self):
        self.cache.reset()
        self.cache.reset()
        self.mask = [[1] * 8 for _ in self.mask]
        self.forget()
        self.forward(8)

    @invariant()
    def holds_what_it_must(self):
        if not hasattr(self, "held"):
            return
        seen = len(self.mask[0])
        for layer, report, held in zip(self.cache.layers, self.cache.report(), self.held, strict=True):
            longest = max(len(head) for heads in held for head in heads)
            assert (report.seen, int(layer.get_seq_length())) == (seen, seen)
            assert (report.fewest, report.most) == (min(len(x) for y in held for x in y), longest)
            keys, values, lengths = layer.whole()
            assert (lengths is not None and lengths.ndim == 2) == self.paged[layer.index]
            for b, heads in enumerate(held):
                for h, tokens in enumerate(heads):
                    assert rows(keys[b, h, : len(tokens)]) == [token.key for token in tokens]
                    assert rows(values[b, h, : len(tokens)]) == [token.value for token in tokens]
                    own = longest if lengths is None else lengths[b] if lengths.ndim == 1 else lengths[b, h]
                    assert len(tokens) == int(own)
                if "budget" in self.limit:
                    budget = self.limit["budget"]
                    of_heads = [budget] * HEADS
                    if self.unequal:
                        of_heads = budget.per_head(LAYERS, HEADS, 10**6, sum(self.policy.protected))[layer.index]
                    assert sum(map(len, heads)) <= sum(of_heads) + HEADS * self.limit["interval"]
            if "keep" in self.limit:
                assert self.cuts[layer.index] >= 1


def test_a_cache_holds_what_it_must():
    seconds = int(os.environ.get("FUZZ_SECONDS", 0))
    run_state_machine_as_test(
        CacheMachine,
        settings=settings(
            max_examples=seconds // 2 or 12,  # about half a second each
            stateful_step_count=12,
            deadline=None,
            derandomize=not seconds,
            suppress_health_check=list(HealthCheck),
        ),
    )
