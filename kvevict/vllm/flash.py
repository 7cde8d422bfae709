"""vLLM's FlashAttention backend, evicting. Written against vLLM 0.32; its kernels have not run with it (no GPU)."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from kvevict.vllm.worker import EvictingBackend, EvictingBuilder, EvictingImpl


class EvictingFlashBuilder(EvictingBuilder, FlashAttentionMetadataBuilder):
    pass


class EvictingFlashImpl(EvictingImpl, FlashAttentionImpl):
    kv_cache_dtypes = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3")


class EvictingFlashBackend(EvictingBackend, FlashAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return EvictingFlashBuilder

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        return EvictingFlashImpl
