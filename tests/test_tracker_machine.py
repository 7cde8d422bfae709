"""The Tracker against a model in plain Python: lists of tokens, and softmax written out."""

import math
import random

import pytest
import torch
from conftest import DEVICE
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

import kvevict
from kvevict.ops import Compacted
from kvevict.policies import Tracker

B, H, G, D = 2, 2, 2, 4
SEEDS = st.integers(0, 2**16)


class Token:
    def __init__(self, position, numbers):
        self.position, self.mass, self.used = position, 0.0, -1
        self.key = [numbers.gauss(0, 1) for _ in range(D)]


def weights(query, keys):
    """softmax(q · k / √D)"""
    logits = [sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(D) for key in keys]
    top = max(logits)
    parts = [math.exp(x - top) for x in logits]
    return [x / sum(parts) for x in parts]


class Machine(RuleBasedStateMachine):
    """rows[b][h]: the cached tokens of a request and head, in the order of their slots."""

    @initialize(capacity=st.integers(1, 12))
    def start(self, capacity):
        self.tracker = Tracker(B, H, capacity, DEVICE)
        self.capacity, self.step, self.most = capacity, 0, 0
        self.rows = [[[] for _ in range(H)] for _ in range(B)]
        self.seen = [0] * B

    def lengths(self):
        return [len(heads[0]) for heads in self.rows]

    def keys(self):
        keys = torch.full((B, H, max(self.lengths()), D), 99.0)  # 99: padding, which is not to be read
        for b, heads in enumerate(self.rows):
            for h, row in enumerate(heads):
                for slot, token in enumerate(row):
                    keys[b, h, slot] = torch.tensor(token.key)
        return keys.to(DEVICE)

    def queries(self, seed, count):
        return torch.randn(B, H * G, count, D, generator=torch.Generator().manual_seed(seed))

    def enter(self, counts, numbers):
        for b, count in enumerate(counts):
            for row in self.rows[b]:
                row += [Token(self.seen[b] + i, numbers) for i in range(count)]
            self.seen[b] += count

    @rule(counts=st.lists(st.integers(0, 5), min_size=B, max_size=B), alike=st.booleans(), seed=SEEDS)
    def append(self, counts, alike, seed):
        counts = counts[:1] * B if alike else counts
        given = counts[0] if alike else torch.tensor(counts, device=DEVICE)
        free = self.capacity - self.most
        if max(counts) > free:
            with pytest.raises(ValueError, match=f"expected at most {free}, the free capacity"):
                self.tracker.append(given)
        else:
            self.tracker.append(given)
            self.enter(counts, random.Random(seed))
            self.most += max(counts)

    @rule(more=st.integers(-2, 6))
    def reserve(self, more):
        self.tracker.reserve(self.capacity + more)
        self.capacity += max(more, 0)

    @precondition(lambda self: max(self.lengths()) > 0)
    @rule(seed=SEEDS, window=st.integers(1, 4))
    def observe(self, seed, window):
        window = min(window, max(self.lengths()))
        queries = self.queries(seed, window)
        self.tracker.observe(queries.to(DEVICE), self.keys())
        for b, heads in enumerate(self.rows):
            for h, row in enumerate(heads):
                first = max(len(row) - window, 0)  # a request shorter than the window has its queries in front
                for i in range(len(row) - first):
                    for g in range(G):
                        visible = row[: first + i + 1]
                        drawn = weights(queries[b, h * G + g, i].tolist(), [token.key for token in visible])
                        for token, weight in zip(visible, drawn, strict=True):
                            token.mass += weight / G

    @precondition(lambda self: min(self.lengths()) > 0)
    @rule(seed=SEEDS, decay=st.sampled_from([1.0, 0.5, 0.0]), threshold=st.sampled_from([1e-3, 0.2]))
    def attend(self, seed, decay, threshold):
        keys, queries = self.keys(), self.queries(seed, 1)
        output = self.tracker.attend(queries.to(DEVICE), keys, keys, decay=decay, threshold=threshold)
        assert output.shape == (B, H * G, 1, D) and output.isfinite().all()
        self.step += 1
        for b, heads in enumerate(self.rows):
            for h, row in enumerate(heads):
                drawn = [weights(queries[b, h * G + g, 0].tolist(), [token.key for token in row]) for g in range(G)]
                for slot, token in enumerate(row):
                    weight = sum(one[slot] for one in drawn) / G
                    token.mass = decay * token.mass + weight
                    if abs(weight - threshold) < 1e-6:  # rounding decides
                        token.used = int(self.tracker.last_used[b, h, slot])
                    elif weight > threshold:
                        token.used = self.step

    @precondition(lambda self: max(self.lengths()) > 0)
    @rule(seed=SEEDS, ordered=st.booleans())
    def compact(self, seed, ordered):
        numbers = random.Random(seed)
        kept = [numbers.randint(1, max(length, 1)) for length in self.lengths()]  # of an empty request, a slot too
        indices = torch.full((B, H, max(kept)), -1)
        for b, heads in enumerate(self.rows):
            for h, row in enumerate(heads):
                slots = numbers.sample(range(max(len(row), 1)), kept[b])
                slots = sorted(slots) if ordered else slots
                indices[b, h, : kept[b]] = torch.tensor(slots)
                heads[h] = [row[slot] for slot in slots] if row else []
        self.most = max(kept)
        lengths = torch.tensor(kept, device=DEVICE) if len(set(kept)) > 1 else None
        keys = self.keys()
        self.tracker.compacted(Compacted(keys, keys, indices.to(DEVICE), lengths))

    @rule(seed=SEEDS, wrong=st.sampled_from([None, None, -1, "length"]))
    def overwrite(self, seed, wrong):
        numbers = random.Random(seed)
        lengths = self.lengths()
        slots = torch.tensor([[[numbers.randrange(max(length, 1))] for _ in range(H)] for length in lengths])
        if wrong is not None:
            slots[B - 1, H - 1] = lengths[B - 1] if wrong == "length" else wrong
        if wrong is not None or min(lengths) == 0:
            if DEVICE == "cpu":  # on a GPU it is asserted on the device
                with pytest.raises(ValueError, match="slots is .*expected a cached token's in every head"):
                    self.tracker.overwrite(slots)
            return
        self.tracker.overwrite(slots.to(DEVICE))
        for b, heads in enumerate(self.rows):
            for h, row in enumerate(heads):
                row[int(slots[b, h, 0])] = Token(self.seen[b], numbers)
            self.seen[b] += 1

    @rule(requests=st.lists(st.integers(0, B - 1), min_size=B, max_size=B))
    def select_requests(self, requests):
        self.tracker.select_requests(torch.tensor(requests, device=DEVICE))
        self.rows = [[[self.copy(token) for token in row] for row in self.rows[b]] for b in requests]
        self.seen = [self.seen[b] for b in requests]

    @staticmethod
    def copy(token):
        twin = Token.__new__(Token)
        twin.__dict__.update(token.__dict__)
        return twin

    @rule(count=st.integers(0, 3))
    def drop_last(self, count):
        if count > min(self.lengths()):
            if DEVICE == "cpu":
                with pytest.raises(ValueError, match=f"at least count, {count}"):
                    self.tracker.drop_last(count)
            return
        last = [range(seen - count, seen) for seen in self.seen]
        if any(
            [token.position for token in row[len(row) - count :]] != list(last[b])
            for b, heads in enumerate(self.rows)
            for row in heads
        ):
            return  # an unordered compaction or an overwritten slot: the last slots are not the last tokens
        self.tracker.drop_last(count)
        for b, heads in enumerate(self.rows):
            for row in heads:
                del row[len(row) - count :]
            self.seen[b] -= count
        self.most -= count

    @invariant()
    def is_what_the_lists_say(self):
        tracker = self.tracker
        shape = (B, H, self.capacity)
        assert tracker.mass.shape == tracker.last_used.shape == tracker.positions.shape == shape
        assert tracker.lengths.tolist() == self.lengths() and tracker.tokens_seen.tolist() == self.seen
        assert tracker.step == self.step and max(self.lengths()) <= self.most <= self.capacity
        for b, heads in enumerate(self.rows):
            for h, row in enumerate(heads):
                padding = self.capacity - len(row)
                assert tracker.positions[b, h].tolist() == [token.position for token in row] + [-1] * padding
                assert tracker.last_used[b, h].tolist() == [token.used for token in row] + [-1] * padding
                masses = [token.mass for token in row] + [0.0] * padding
                assert tracker.mass[b, h].tolist() == pytest.approx(masses, rel=1e-4, abs=1e-6)


def test_tracker_machine():
    with kvevict.backend("reference") if DEVICE == "cpu" else kvevict.backend("auto"):
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )


@pytest.mark.parametrize("count", [-2, True, 1.0, [1, -1], [1, 2, 3], [0.5, 1.0]], ids=str)
def test_counts_that_are_none_are_named(count):
    tracker = Tracker(2, 1, 8, DEVICE)
    tracker.append(3)
    with pytest.raises((TypeError, ValueError), match="count "):
        tracker.append(torch.tensor(count, device=DEVICE) if isinstance(count, list) else count)
    assert tracker.lengths.tolist() == [3, 3] and tracker.positions[:, 0].max() == 2


def test_dropped_tokens_leave_room():
    tracker = Tracker(1, 1, 4, DEVICE)
    tracker.append(4)
    tracker.drop_last(2)
    tracker.append(2)
    assert tracker.positions.tolist() == [[[0, 1, 2, 3]]] and tracker.tokens_seen.tolist() == [4]
