"""The scheduler's side: layers whose leading blocks are free once their tokens have moved to the tail."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvevict.paged.tail import skip
from kvevict.vllm.settings import Settings

logger = init_logger("vllm.kvevict")  # vLLM prints only what is logged under its own name


@dataclass(frozen=True, kw_only=True)
class EvictingSpec(FullAttentionSpec):
    """A full-attention layer that holds a budget of tokens."""

    budget: int
    interval: int
    granule: int = 0  # tokens given up at once: interval, rounded up to whole blocks of the scheduler's
    most_in_flight: int  # tokens that are scheduled but not yet computed

    def __post_init__(self) -> None:
        super().__post_init__()
        # vLLM replaces block_size after `of`: by more in hybrid models, whose pages must be equal, and by less for a
        # worker whose kernels want smaller blocks. Both sides go by the largest.
        blocks = max(1, cdiv(self.interval, self.block_size))
        object.__setattr__(self, "granule", max(self.granule, blocks * self.block_size))

    @classmethod
    def of(cls, spec: FullAttentionSpec, settings: Settings, vllm_config: Any) -> EvictingSpec:
        given = {field.name: getattr(spec, field.name) for field in fields(spec)}
        return cls(
            **given,
            budget=settings.budget,
            interval=settings.interval,
            most_in_flight=vllm_config.max_in_flight_tokens,
        )

    @classmethod
    def merge(cls, specs: list[EvictingSpec]) -> EvictingSpec:
        names = {field.name for field in fields(cls)} - {field.name for field in fields(FullAttentionSpec)}
        own = {name: getattr(specs[0], name) for name in names}
        if any({name: getattr(spec, name) for name in names} != own for spec in specs):
            raise ValueError(f"specs are {specs}: expected one budget and interval in all layers of a group")
        plain = [FullAttentionSpec(**{f.name: getattr(s, f.name) for f in fields(FullAttentionSpec)}) for s in specs]
        merged = FullAttentionSpec.merge(plain)
        return cls(**{field.name: getattr(merged, field.name) for field in fields(merged)}, **own)

    def skip(self, computed: Any) -> Any:
        """`kvevict.paged.tail.skip` with this layer's numbers."""
        return skip(computed, self.budget, self.interval, self.granule)

    @property
    def never_written(self) -> int:
        """The leading slots that no compaction writes: skip is 0 or at least this. Their blocks keep what their hash
        says until they are freed, so they may be cached and shared."""
        return self.granule

    @property
    def most_at_rest(self) -> int:
        """The most tokens that a request holds between steps."""
        return self.budget + max(self.interval, self.granule)

    def most_blocks(self, max_model_len: int) -> int:
        """The most blocks that a request can hold: budget, interval and what is in flight, and two partial blocks."""
        tokens = self.most_at_rest + self.most_in_flight
        return min(cdiv(tokens, self.block_size) + 1, cdiv(max_model_len, self.block_size))

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return self.most_blocks(vllm_config.model_config.max_model_len) * self.page_size_bytes


class EvictingManager(FullAttentionManager):
    """Frees the blocks before skip(computed tokens), as a sliding window's are freed."""

    def __init__(self, kv_cache_spec: EvictingSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        # A request is admitted when what it can hold at most fits, not its whole prompt.
        self.max_admission_blocks_per_request = kv_cache_spec.most_blocks(2**31)
        logger.info(
            "kvevict evicts: budget %d tokens, cut every %d; a request holds at most %d blocks of %d tokens and is "
            "admitted when they fit; its first %d tokens may come from the prefix cache",
            kv_cache_spec.budget, kv_cache_spec.granule, self.max_admission_blocks_per_request,
            kv_cache_spec.block_size, kv_cache_spec.never_written,
        )  # fmt: skip

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

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return self.kv_cache_spec.skip(num_computed_tokens)
