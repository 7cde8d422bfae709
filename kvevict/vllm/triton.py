"""vLLM's Triton backend, evicting. Written against vLLM 0.32; its kernels have not run with it (no GPU)."""

from __future__ import annotations

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from kvevict.vllm.worker import EvictingBackend, EvictingBuilder, EvictingImpl


class EvictingTritonBuilder(EvictingBuilder, TritonAttentionMetadataBuilder):
    pass


class EvictingTritonImpl(EvictingImpl, TritonAttentionImpl):
    kv_cache_dtypes = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")


class EvictingTritonBackend(EvictingBackend, TritonAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        return EvictingTritonBuilder

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        return EvictingTritonImpl
