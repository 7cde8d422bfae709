"""vLLM's Triton backend, evicting. Written against vLLM 0.32; its kernels have not run with it (no GPU)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from kvevict.vllm.worker import EvictingBackend, EvictingBuilder, EvictingImpl, side_by_side


class EvictingTritonBuilder(EvictingBuilder, TritonAttentionMetadataBuilder):
    pass


class EvictingTritonImpl(EvictingImpl, TritonAttentionImpl):
    kv_cache_dtypes = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")

    def cache_views(self, kv_cache: Tensor, layer: Any) -> tuple[Tensor, Tensor]:
        return side_by_side(self, kv_cache)


class EvictingTritonBackend(EvictingBackend, TritonAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        return EvictingTritonBuilder

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        return EvictingTritonImpl
