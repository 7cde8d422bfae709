"""PagedPool against a model in plain Python: a request is a list of rows; blocks are counted, never numbered."""

import math

import pytest
import torch
from conftest import DEVICE
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import kvevict
from kvevict.paged import PagedPool, PoolExhausted

LAYERS, H, G, D, DV = 2, 2, 2, 8, 4
NAMES = st.sampled_from("abc")


class Request:
    def __init__(self, now):
        self.rows = [[[] for _ in range(H)] for _ in range(LAYERS)]  # (key, value) of each token, in order
        self.seen, self.idle, self.used = 0, False, now

    @property
    def length(self):
        return len(self.rows[0][0])


class Machine(RuleBasedStateMachine):
    @initialize(blocks=st.integers(2, 6), size=st.sampled_from([1, 3, 4]))
    def start(self, blocks, size):
        sizes = dict(layers=LAYERS, kv_heads=H, head_dim=D, value_dim=DV)
        self.pool = PagedPool(blocks, size, device=DEVICE, **sizes)
        self.blocks, self.size = blocks, size
        self.requests, self.now = {}, 0
        self.evicted = self.forgotten = 0

    def tick(self):
        self.now += 1
        return self.now

    def held(self, request):
        return math.ceil(request.length / self.size)

    def free(self):
        return self.blocks - sum(self.held(request) for request in self.requests.values())

    def makes_room(self, blocks, besides=None):
        """The idle requests that go so that `blocks` are free, the least recently used first; None: not enough."""
        gone, free = [], self.free()
        idle = [name for name, request in self.requests.items() if request.idle and name != besides]
        for name in sorted(idle, key=lambda name: self.requests[name].used):
            if free < blocks:
                gone.append(name)
                free += self.held(self.requests[name])
        return gone if free >= blocks else None

    def forget(self, names):
        for name in names:
            del self.requests[name]
        self.forgotten += len(names)

    def refused(self, call, *arguments):
        with pytest.raises(ValueError, match="request"):
            call(*arguments)

    @rule(name=NAMES)
    def allocate(self, name):
        if name in self.requests:
            return self.refused(self.pool.allocate, name)
        self.pool.allocate(name)
        self.requests[name] = Request(self.tick())

    @rule(name=NAMES, count=st.integers(1, 8), seed=st.integers(0, 2**16))
    def append(self, name, count, seed):
        generator = torch.Generator().manual_seed(seed)
        keys, values = (torch.randn(LAYERS, H, count, width, generator=generator) for width in (D, DV))
        given = keys.to(DEVICE), values.to(DEVICE)
        if name not in self.requests:
            return self.refused(self.pool.append, name, *given)
        request = self.requests[name]
        gone = self.makes_room(math.ceil((request.length + count) / self.size) - self.held(request), besides=name)
        if gone is None:
            with pytest.raises(PoolExhausted):
                self.pool.append(name, *given)
            return
        self.pool.append(name, *given)
        self.forget(gone)
        for layer in range(LAYERS):
            for h in range(H):
                request.rows[layer][h] += list(zip(keys[layer, h].tolist(), values[layer, h].tolist(), strict=True))
        request.seen += count
        request.idle, request.used = False, self.tick()

    @rule(name=NAMES, keep=st.integers(1, 10))
    def evict(self, name, keep):
        """By the second number of a key: rows that are told apart in every layer and head."""
        if name not in self.requests or not self.requests[name].length:
            return self.refused(self.pool.evict, name, lambda keys: keys[..., 1], keep)
        request = self.requests[name]
        before, length = self.held(request), request.length
        freed = self.pool.evict(name, lambda keys: keys[..., 1], keep)
        for heads in request.rows:
            for h, rows in enumerate(heads):
                best = sorted(range(length), key=lambda slot: -rows[slot][0][1])[:keep]
                heads[h] = [rows[slot] for slot in sorted(best)]
        self.evicted += length - request.length
        assert freed == before - self.held(request)

    @rule(names=st.lists(NAMES, min_size=1, max_size=3, unique=True), layer=st.integers(0, LAYERS - 1))
    def attend(self, names, layer):
        queries = torch.randn(len(names), H * G, 1, D, generator=torch.Generator().manual_seed(self.now)).to(DEVICE)
        if any(name not in self.requests or not self.requests[name].length for name in names):
            return self.refused(self.pool.attend, names, layer, queries)
        output = self.pool.attend(names, layer, queries)
        for i, name in enumerate(names):
            rows = self.requests[name].rows[layer]
            keys, values = (torch.tensor([[row[part] for row in head] for head in rows]) for part in (0, 1))
            own = queries[i].cpu().view(H, G, D)
            expected = torch.softmax(own @ keys.transpose(1, 2) / math.sqrt(D), dim=-1) @ values
            torch.testing.assert_close(output[i].cpu().view(H, G, DV), expected, rtol=1e-4, atol=1e-5)
            self.requests[name].idle, self.requests[name].used = False, self.tick()

    @rule(name=NAMES)
    def idle(self, name):
        if name not in self.requests:
            return self.refused(self.pool.idle, name)
        self.pool.idle(name)
        self.requests[name].idle = True

    @rule(name=NAMES)
    def give_back(self, name):
        if name not in self.requests:
            return self.refused(self.pool.free, name)
        self.pool.free(name)
        del self.requests[name]

    @rule(blocks=st.integers(0, 9))
    def require(self, blocks):
        gone = self.makes_room(blocks)
        if gone is None:
            with pytest.raises(PoolExhausted):
                self.pool.require(blocks)
        else:
            assert self.pool.require(blocks) == gone
            self.forget(gone)

    @invariant()
    def is_what_the_lists_say(self):
        pool, requests = self.pool, self.requests
        said = pool.statistics()
        assert (said.blocks, said.free_blocks) == (self.blocks, self.free())
        assert (said.requests, said.idle_requests) == (len(requests), sum(r.idle for r in requests.values()))
        assert (said.tokens, said.tokens_seen) == tuple(
            sum(getattr(r, n) for r in requests.values()) for n in ("length", "seen")
        )
        assert (said.tokens_evicted, said.requests_evicted) == (self.evicted, self.forgotten)
        with_tokens = [name for name, request in requests.items() if request.length]
        for name, request in requests.items():
            assert (pool.length(name), pool.tokens_seen(name)) == (request.length, request.seen)
        if not with_tokens:
            return
        table, lengths = pool.block_table(with_tokens)
        assert lengths.tolist() == [requests[name].length for name in with_tokens]
        used = [
            b for row, name in zip(table.tolist(), with_tokens, strict=True) for b in row[: self.held(requests[name])]
        ]
        assert len(set(used)) == len(used) and set(used) <= set(range(self.blocks))  # no block is held twice
        for name in with_tokens:
            for layer in range(LAYERS):
                for part, cached in enumerate(pool.gather(name, layer)):
                    assert cached[0].tolist() == [[row[part] for row in head] for head in requests[name].rows[layer]]


def test_pool_machine():
    with kvevict.backend("reference") if DEVICE == "cpu" else kvevict.backend("auto"):
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )
