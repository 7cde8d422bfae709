"""vLLM's FlashInfer backend, evicting. Written against vLLM 0.32; its kernels have not run with it (no GPU)."""

from __future__ import annotations

from vllm.v1.attention.backends.flashinfer import FlashInferBackend, FlashInferImpl, FlashInferMetadataBuilder

from kvevict.vllm.worker import EvictingBackend, EvictingBuilder, EvictingImpl


class EvictingFlashInferBuilder(EvictingBuilder, FlashInferMetadataBuilder):
    """It plans on the host, from lengths that `build` has lowered there as well."""


class EvictingFlashInferImpl(EvictingImpl, FlashInferImpl):
    attn_type = "decoder"  # it serves no other, and does not say so
    kv_cache_dtypes = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")


class EvictingFlashInferBackend(EvictingBackend, FlashInferBackend):
    @staticmethod
    def get_builder_cls() -> type[FlashInferMetadataBuilder]:
        return EvictingFlashInferBuilder

    @staticmethod
    def get_impl_cls() -> type[FlashInferImpl]:
        return EvictingFlashInferImpl
