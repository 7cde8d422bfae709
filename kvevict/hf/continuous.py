"""transformers' continuous batching (`model.generate_batch`) with every request held at a budget of tokens.

transformers keeps the K and V of all requests in blocks of one tensor, which an allocator for each kind of attention
hands out. Ours, for full attention, compacts towards the tail as our vLLM plugin does: once N tokens of a request are
computed, its first `skip(N)` slots hold nothing, the kept tokens lie in the slots behind, and the blocks in front are
free again. So positions go on, and all that transformers asks of an allocator follows from N alone.

transformers has no way to register an allocator. For the time of a call ours stands in its table of them,
`ATTN_TYPE_TO_ALLOCATOR`; docs/transformers.md says what a way would have to offer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

try:
    from transformers import ContinuousBatchingConfig
    from transformers.generation.continuous_batching import cache as transformers_cache
    from transformers.generation.continuous_batching.cache_allocators import FULL_ATTENTION, FullAttentionCacheAllocator
except ImportError as error:
    raise ImportError("kvevict.hf.continuous is written for the continuous batching of transformers 5.23") from error

from kvevict import validate
from kvevict.paged import paged_compact
from kvevict.paged.tail import skip
from kvevict.policies import KeyDiff, Observed, Policy


class EvictingAllocator(FullAttentionCacheAllocator):
    """The blocks of the full-attention layers; `block_table` names a request's blocks that are in use."""

    supports_block_sharing = False  # a compacted block holds other tokens than its hash says
    supports_block_table = False  # its bounds on lengths are made for caches that only grow
    policy: Policy
    budget: int
    interval: int

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._skipped: dict[str, int] = {}  # slots in front of each request that hold nothing, and have no block

    def _skip(self, computed: int) -> int:
        return skip(computed, self.budget, self.interval, self.tokens_per_page)

    def needs_new_blocks(self, request_id: str, past_length: int, query_length: int) -> int:
        gone = self._skip(past_length)
        freed = (gone - self._skipped.get(request_id, 0)) // self.tokens_per_page
        held = len(self.block_table.get(request_id, ())) - freed
        return self._compute_blocks_needed(held, past_length - gone, query_length)

    def allocate_cache_to_request(self, request_id: str, past_length: int, query_length: int) -> None:
        """Before the step in which `query_length` tokens enter: the attention of the `past_length` before is done."""
        gone, before = self._skip(past_length), self._skipped.get(request_id, 0)
        if gone > before:
            self._compact(request_id, past_length - before, past_length - gone)
            self._skipped[request_id] = gone
        super().allocate_cache_to_request(request_id, past_length - gone, query_length)

    @torch.no_grad()
    def _compact(self, request_id: str, length: int, keep: int) -> None:
        """In every layer the kept tokens move into the last of `length` slots, and the blocks in front are free."""
        heads, width = self.num_key_value_heads, self.head_dim
        blocks = self.cache_tensor.view(-1, self.pages_per_block, 2, self.tokens_per_page, heads, width)
        table = torch.tensor([self.block_table[request_id]], dtype=torch.int32, device=blocks.device)
        lengths = torch.tensor([length], dtype=torch.int32, device=blocks.device)
        chosen = []
        for page, layer in enumerate(self.layer_indices):  # all layers are chosen before one is written
            rows = blocks[:, page].index_select(0, table[0])  # [blocks of the request, 2, tokens, H, D]
            keys, values = rows.permute(1, 3, 0, 2, 4).flatten(2, 3)[:, None, :, :length]
            chosen.append(self.policy.select(Observed(keys=keys, values=values, layer=layer), keep).contiguous())
        for page, indices in enumerate(chosen):
            paged_compact(blocks[:, page, 0], blocks[:, page, 1], table, lengths, indices, to="tail")
        if blocks.device.type == "cuda":
            torch.cuda.current_stream(blocks.device).synchronize()  # the step may run on another stream
        free = (length - keep) // self.tokens_per_page
        self.pool.free_blocks(self.index, self.block_table[request_id][:free])
        del self.block_table[request_id][:free]

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        self._skipped.pop(request_id, None)
        super().free_blocks(request_id, no_cache)

    def fork_blocks(
        self, source_request_id: str, dest_request_id: str, past_length: int
    ) -> tuple[list[int], list[int]]:
        self._skipped[dest_request_id] = self._skipped.get(source_request_id, 0)
        return super().fork_blocks(source_request_id, dest_request_id, past_length)

    def get_seqlen_k(self, past_length: int, query_length: int) -> int:
        return past_length - self._skip(past_length) + query_length

    def get_read_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        return super().get_read_indices(request_id, past_length - self._skip(past_length), query_length)

    def get_write_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        return super().get_write_indices(request_id, past_length - self._skip(past_length), query_length)


def generate_batch(
    model: Any,
    inputs: list[list[int]],
    policy: Policy | None = None,
    *,
    budget: int,
    interval: int = 64,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    **options,
) -> dict[str, Any]:
    """`model.generate_batch(inputs, ...)` with every full-attention layer of a request held at a budget.

    A request holds at least `budget` tokens per layer and KV head, and at most so many more as its step brings, plus a
    page, or `interval` before it is cut for the first time. Eviction comes before a request's next step. While it runs,
    continuous batching of other threads is under the same budget; a thread of transformers' own runs the model, so that
    `kvevict.backend` does not reach it: set KVEVICT_BACKEND.

    Args:
        model, inputs, options: as `model.generate_batch`.
        policy: what is worth keeping, from keys (and values) alone, as many tokens for each head; default KeyDiff.
        budget, interval: tokens.
        continuous_batching_config: as there, without asynchronous batching, CUDA graphs and CPU offloading.

    Raises:
        TypeError, ValueError: a policy that reads more, a budget smaller than what it protects, values out of range, a
            configuration of what is not served.
    """
    policy = KeyDiff() if policy is None else policy
    if not isinstance(policy, Policy):
        raise TypeError(f"policy is {policy!r}: expected a kvevict.policies.Policy")
    if policy.needs:
        raise ValueError(f"policy needs {', '.join(sorted(policy.needs))}: expected one that reads keys alone")
    if policy.reads_positions:
        raise ValueError(
            f"policy is a {type(policy).__name__} that reads positions, which nothing follows: expected none"
        )
    if policy.heads == "adaptive":
        raise ValueError("policy has heads 'adaptive': expected 'each' or 'shared', for all heads have one block table")
    validate.integer("budget", budget, max(sum(policy.protected), 1))
    validate.integer("interval", interval, 0)
    config = continuous_batching_config or ContinuousBatchingConfig()
    for name in ("use_async_batching", "use_cuda_graph", "cpu_offload_space"):
        if getattr(config, name) not in (None, False, (False, False), 0.0):
            raise ValueError(f"{name} is {getattr(config, name)}: expected it off, because requests are cut in between")
    config = replace(config, use_async_batching=False, use_cuda_graph=False)
    ours = type("ConfiguredAllocator", (EvictingAllocator,), dict(policy=policy, budget=budget, interval=interval))
    allocators: dict[str, Any] = transformers_cache.ATTN_TYPE_TO_ALLOCATOR
    before = allocators[FULL_ATTENTION]
    allocators[FULL_ATTENTION] = ours
    try:
        return model.generate_batch(inputs, continuous_batching_config=config, **options)
    finally:
        allocators[FULL_ATTENTION] = before
