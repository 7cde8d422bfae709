"""The scheduler's side: layers whose leading blocks are free once their tokens have moved to the tail."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import Any

from vllm import envs
from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvevict.paged.tail import skip
from kvevict.vllm.settings import Settings

logger = init_logger("vllm.kvevict")  # vLLM prints only what is logged under its own name


def evicts(layer: Any) -> bool:
    """Whether a layer of vLLM's is one of ours, with something to evict."""
    return getattr(getattr(layer, "impl", None), "evicts", False)


@dataclass(frozen=True, kw_only=True)
class EvictingSpec(FullAttentionSpec):
    """A full-attention layer that holds a budget of tokens."""

    policy: str
    budget: int
    interval: int
    granule: int = 0  # tokens given up at once: interval, rounded up to whole blocks of the scheduler's
    prefix: int = 0  # tokens in front that stay, rounded up likewise
    most_in_flight: int  # tokens that are scheduled but not yet computed
    evicting: int = 0  # for the line at start: so many layers evict
    layers: int = 0  # of so many

    def __post_init__(self) -> None:
        super().__post_init__()
        # vLLM replaces block_size after `of`: by more in hybrid models, whose pages must be equal, and by less for a
        # worker whose kernels want smaller blocks. Both sides go by the largest: sizes that are rounded already are
        # whole blocks of any smaller size that vLLM picks.
        for name, tokens in (("granule", max(self.granule, self.interval, 1)), ("prefix", self.prefix)):
            object.__setattr__(self, name, cdiv(tokens, self.block_size) * self.block_size)

    @classmethod
    def of(cls, spec: FullAttentionSpec, settings: Settings, vllm_config: Any) -> EvictingSpec:
        given = {field.name: getattr(spec, field.name) for field in fields(spec)}
        layers = vllm_config.compilation_config.static_forward_context.values()
        return cls(
            **given,
            policy=settings.policy,
            budget=settings.budget,
            interval=settings.interval,
            prefix=settings.prefix,
            most_in_flight=vllm_config.max_in_flight_tokens,
            evicting=sum(evicts(layer) for layer in layers),
            layers=len(layers),
        )

    @classmethod
    def merge(cls, specs: list[EvictingSpec]) -> EvictingSpec:
        names = {field.name for field in fields(cls)} - {field.name for field in fields(FullAttentionSpec)}
        own = {name: getattr(specs[0], name) for name in names}
        if any({name: getattr(spec, name) for name in names} != own for spec in specs):
            raise ValueError(f"specs are {specs}: expected one budget, interval and prefix in all layers of a group")
        plain = [FullAttentionSpec(**{f.name: getattr(s, f.name) for f in fields(FullAttentionSpec)}) for s in specs]
        merged = FullAttentionSpec.merge(plain)
        return cls(**{field.name: getattr(merged, field.name) for field in fields(merged)}, **own)

    def skip(self, computed: Any) -> Any:
        """`kvevict.paged.tail.skip` with this layer's numbers: so many slots behind the prefix hold nothing."""
        return skip(computed - self.prefix, self.budget, self.interval, self.granule)

    @property
    def never_written(self) -> int:
        """The leading slots that no compaction writes: the prefix, and behind it skip is 0 or at least a granule. Their
        blocks keep what their hash says until they are freed, so they may be cached and shared."""
        return self.prefix + self.granule

    @property
    def most_at_rest(self) -> int:
        """The most tokens that a request holds between steps."""
        return self.prefix + self.budget + max(self.interval, self.granule)

    def most_blocks(self, max_model_len: int) -> int:
        """The most blocks that a request can hold: prefix, budget, interval and what is in flight, and two partial
        blocks."""
        tokens = self.most_at_rest + self.most_in_flight
        return min(cdiv(tokens, self.block_size) + 1, cdiv(max_model_len, self.block_size))

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return self.most_blocks(vllm_config.model_config.max_model_len) * self.page_size_bytes


class EvictingManager(FullAttentionManager):
    """Frees the blocks between the prefix and the tokens that are left, as a sliding window's are freed."""

    kv_cache_spec: EvictingSpec

    def __init__(self, kv_cache_spec: EvictingSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        # A request is admitted when what it can hold at most fits, not its whole prompt.
        self.max_admission_blocks_per_request = kv_cache_spec.most_blocks(2**31)
        logger.info_once(
            "kvevict evicts by %s in %d of %d layers: budget %d tokens, cut every %d; the first %d stay, the first "
            "%d may come from the prefix cache. A request holds at most %d blocks of %d tokens, and is admitted when "
            "these fit, or its prompt if that is shorter",
            kv_cache_spec.policy, kv_cache_spec.evicting, kv_cache_spec.layers, kv_cache_spec.budget,
            kv_cache_spec.granule, kv_cache_spec.prefix, kv_cache_spec.never_written,
            self.max_admission_blocks_per_request, kv_cache_spec.block_size,
        )  # fmt: skip
        self._evicted, self._freed, self._told, self._telling = 0, 0, 0, time.monotonic()

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: Any, block_pool: Any, kv_cache_spec: Any, **options
    ) -> Any:
        most = min(max_length, kv_cache_spec.never_written)
        return super().find_longest_cache_hit(
            block_hashes, most, kv_cache_group_ids, block_pool, kv_cache_spec, **options
        )

    def cache_blocks(self, request: Any, num_tokens: int, *args, **options) -> None:
        super().cache_blocks(request, min(num_tokens, self.kv_cache_spec.never_written), *args, **options)

    def remove_skipped_blocks(self, request_id: str, processed_computed_tokens: int, *args, **options) -> None:
        spec = self.kv_cache_spec
        gone, blocks = spec.skip(processed_computed_tokens), self.req_to_blocks.get(request_id)
        if not gone or not blocks:
            return
        first, last = spec.prefix // self.block_size, (spec.prefix + gone) // self.block_size
        before = blocks[first:last].count(self._null_block)
        self._remove_blocks_in_range(request_id, first, last)
        freed = last - first - before
        self._freed += freed
        self._evicted += freed * self.block_size
        self._tell()

    def _tell(self) -> None:
        """What was evicted, no more often than vLLM prints its own statistics."""
        now = time.monotonic()
        if self._evicted > self._told and now - self._telling >= envs.VLLM_LOG_STATS_INTERVAL:
            logger.info(
                "kvevict has evicted %d tokens of every layer's, and freed %d blocks, since the start",
                self._evicted, self._freed,
            )  # fmt: skip
            self._told, self._telling = self._evicted, now
