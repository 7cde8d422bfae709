"""PagedPool against a model in plain Python: a request is a list of rows; blocks are counted, never numbered."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from conftest import DEVICE
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import kvevict
from kvevict.paged import PagedPool, PoolExhausted
from kvevict.policies import Policy

LAYERS, H, G, D, DV = 2, 2, 2, 8, 4
NAMES = st.sampled_from("abc")


@dataclass(frozen=True, kw_only=True)
class SecondNumber(Policy):
    """By the second number of a key: rows that are told apart in every layer and head."""

    sink: int = 0
    recent: int = 0
    comparable: ClassVar[str] = "layer"

    def scores(self, seen):
        return seen.keys[..., 1].contiguous()


def best(rows, count):
    """The slots of the `count` best rows."""
    return sorted(range(len(rows)), key=lambda slot: -rows[slot][0][1])[:count]


def adaptive(heads, keep):
    """The slots of each head: a fifth of what it keeps on average, then the best of all heads."""
    n = min(keep, max(map(len, heads)))
    kept = [best(rows, (2 * n + 5) // 10) for rows in heads]
    others = [(-row[0][1], h, slot) for h, rows in enumerate(heads) for slot, row in enumerate(rows)]
    for _, h, slot in sorted(x for x in others if x[2] not in kept[x[1]]):
        if sum(map(len, kept)) < n * len(heads):
            kept[h].append(slot)
    return kept


class Request:
    def __init__(self, now):
        self.rows = [[[] for _ in range(H)] for _ in range(LAYERS)]  # (key, value) of each token, in order
        self.seen, self.idle, self.used = 0, False, now

    @property
    def lengths(self):
        return [[len(rows) for rows in heads] for heads in self.rows]

    @property
    def length(self):
        return max(map(max, self.lengths))


class Machine(RuleBasedStateMachine):
    per_head = False

    @initialize(blocks=st.integers(2, 6), size=st.sampled_from([1, 3, 4]))
    def start(self, blocks, size):
        sizes = dict(layers=LAYERS, kv_heads=H, head_dim=D, value_dim=DV)
        if self.per_head:
            blocks *= LAYERS * H
        self.pool = PagedPool(blocks, size, per_head=self.per_head, device=DEVICE, **sizes)
        self.blocks, self.size = blocks, size
        self.requests, self.now = {}, 0
        self.evicted = self.forgotten = 0

    def tick(self):
        self.now += 1
        return self.now

    def counted(self, request):
        """The lengths that the pool counts: per head all of them, else one for all."""
        return sum(request.lengths, []) if self.per_head else [request.length]

    def held(self, request, new=0):
        return sum(math.ceil((length + new) / self.size) for length in self.counted(request))

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
        gone = self.makes_room(self.held(request, count) - self.held(request), besides=name)
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

    @rule(name=NAMES, keep=st.integers(1, 10), adaptive_heads=st.booleans())
    def evict(self, name, keep, adaptive_heads):
        policy = SecondNumber(heads="adaptive" if adaptive_heads else "each")
        if name not in self.requests or not self.requests[name].length:
            return self.refused(self.pool.evict, name, policy, keep)
        if adaptive_heads and not self.per_head:
            with pytest.raises(ValueError, match="per_head=True"):
                self.pool.evict(name, policy, keep)
            return
        request = self.requests[name]
        own = [
            adaptive(heads, keep) if adaptive_heads else [best(rows, keep) for rows in heads] for heads in request.rows
        ]
        self.evicts(name, policy, keep, own)

    @rule(name=NAMES, counts=st.lists(st.integers(1, 10), min_size=LAYERS * H, max_size=LAYERS * H))
    def evict_to_counts(self, name, counts):
        if name not in self.requests or not self.requests[name].length:
            return
        counts = torch.tensor(counts, device=DEVICE).view(LAYERS, H)
        if not self.per_head:
            with pytest.raises(ValueError, match="per_head=True"):
                self.pool.evict(name, SecondNumber(), counts)
            return
        rows = zip(self.requests[name].rows, counts.tolist(), strict=True)
        own = [[best(*pair) for pair in zip(heads, layer, strict=True)] for heads, layer in rows]
        self.evicts(name, SecondNumber(), counts, own)

    @rule(name=NAMES, keep=st.integers(1, 10))
    def evict_by_a_function(self, name, keep):
        if name in self.requests and self.requests[name].length:
            own = [[best(rows, keep) for rows in heads] for heads in self.requests[name].rows]
            self.evicts(name, lambda keys: keys[..., 1], keep, own)

    def evicts(self, name, policy, keep, kept):
        """kept: the slots of each layer and head that stay."""
        request = self.requests[name]
        before, tokens = self.held(request), sum(self.counted(request))
        freed = self.pool.evict(name, policy, keep)
        for heads, own in zip(request.rows, kept, strict=True):
            for h, slots in enumerate(own):
                heads[h] = [heads[h][slot] for slot in sorted(slots)]
        self.evicted += tokens - sum(self.counted(request))
        assert freed == before - self.held(request)

    @rule(names=st.lists(NAMES, min_size=1, max_size=3, unique=True), layer=st.integers(0, LAYERS - 1))
    def attend(self, names, layer):
        queries = torch.randn(len(names), H * G, 1, D, generator=torch.Generator().manual_seed(self.now)).to(DEVICE)
        if any(name not in self.requests or not self.requests[name].length for name in names):
            return self.refused(self.pool.attend, names, layer, queries)
        output = self.pool.attend(names, layer, queries)
        for i, name in enumerate(names):
            rows = self.requests[name].rows[layer]
            for h, head in enumerate(rows):
                expected = torch.zeros(G, DV)
                if head:
                    keys, values = (torch.tensor([row[part] for row in head]) for part in (0, 1))
                    own = queries[i].cpu().view(H, G, D)[h]
                    expected = torch.softmax(own @ keys.T / math.sqrt(D), dim=-1) @ values
                found = output[i].cpu().view(H, G, DV)[h]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
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
        assert said.tokens == sum(sum(self.counted(r)) for r in requests.values())
        assert said.tokens_seen == sum(r.seen for r in requests.values())
        assert (said.tokens_evicted, said.requests_evicted) == (self.evicted, self.forgotten)
        for name, request in requests.items():
            assert (pool.length(name), pool.tokens_seen(name)) == (request.length, request.seen)
        with_tokens = [name for name, request in requests.items() if request.length]
        if not with_tokens:
            return
        used = []
        for layer in range(LAYERS if self.per_head else 1):
            table, lengths = pool.block_table(with_tokens, layer)
            expected = [requests[name].lengths[layer] for name in with_tokens]
            assert lengths.tolist() == (expected if self.per_head else [own[0] for own in expected])
            for row, length in zip(table.view(-1, table.shape[-1]).tolist(), lengths.flatten().tolist(), strict=True):
                used += row[: math.ceil(length / self.size)]
        assert len(set(used)) == len(used) and set(used) <= set(range(self.blocks))  # no block is held twice
        for name in with_tokens:
            for layer in range(LAYERS):
                for part, cached in enumerate(pool.gather(name, layer)):
                    for found, rows in zip(cached[0].tolist(), requests[name].rows[layer], strict=True):
                        assert found[: len(rows)] == [row[part] for row in rows]
                        assert not any(map(any, found[len(rows) :]))


class PerHead(Machine):
    per_head = True


@pytest.mark.parametrize("machine", [Machine, PerHead])
def test_pool_machine(machine):
    with kvevict.backend("reference") if DEVICE == "cpu" else kvevict.backend("auto"):
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )
