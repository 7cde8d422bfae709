"""vLLM's FlashAttention backend, evicting. Written against vLLM 0.32; not run yet (no GPU)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from kvevict.vllm.manager import EvictingSpec
from kvevict.vllm.worker import EvictingBackend, EvictingBuilder, EvictingImpl


class EvictingFlashBuilder(EvictingBuilder, FlashAttentionMetadataBuilder):
    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        # Tables that are shifted for each step have no fixed address: graphs end before and begin after attention.
        if isinstance(kv_cache_spec, EvictingSpec):
            return AttentionCGSupport.NEVER
        return super().get_cudagraph_support(vllm_config, kv_cache_spec)

    def use_cascade_attention(self, *args, **kwargs) -> bool:
        if isinstance(self.kv_cache_spec, EvictingSpec):
            return False  # requests do not share a prefix any more
        return super().use_cascade_attention(*args, **kwargs)


class EvictingFlashImpl(EvictingImpl, FlashAttentionImpl):
    def cache_views(self, kv_cache: Tensor, layer: Any) -> tuple[Tensor, Tensor]:
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return keys, values


class EvictingFlashBackend(EvictingBackend, FlashAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return EvictingFlashBuilder

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        return EvictingFlashImpl
