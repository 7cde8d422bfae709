"""The scheduler's side: layers whose leading blocks are free once their tokens have moved to the tail."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvevict.paged.tail import skip
from kvevict.vllm.settings import Settings


@dataclass(frozen=True, kw_only=True)
class EvictingSpec(FullAttentionSpec):
    """A full-attention layer that holds a budget of tokens."""

    budget: int
    interval: int
    granule: int  # tokens given up at once: a block of the scheduler's, which the worker may have cut into smaller ones
    most_in_flight: int  # tokens that are scheduled but not yet computed

    @classmethod
    def of(cls, spec: FullAttentionSpec, settings: Settings, vllm_config: Any) -> EvictingSpec:
        given = {field.name: getattr(spec, field.name) for field in fields(spec)}
        return cls(
            **given,
            budget=settings.budget,
            interval=settings.interval,
            granule=spec.block_size,
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
    def prefix_cacheable(self) -> bool:
        return False  # a compacted block holds other tokens than its hash says

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

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return self.kv_cache_spec.skip(num_computed_tokens)
