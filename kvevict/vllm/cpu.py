"""vLLM's CPU backend, evicting."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from kvevict.vllm.worker import EvictingBackend, EvictingBuilder, EvictingImpl


class EvictingCPUBuilder(EvictingBuilder, CPUAttentionMetadataBuilder):
    pass


class EvictingCPUImpl(EvictingImpl, CPUAttentionBackendImpl):
    def cache_views(self, kv_cache: Tensor, layer: Any) -> tuple[Tensor, Tensor]:
        """kv_cache [num_blocks, H, block_size, 2·D]: of every block and head first K, then V.

        "vec" stores a block of keys transposed, [D, block_size], and values as rows. The other layouts (tiles of AMX,
        vectors of 16) are not read.
        """
        if layer.isa != "vec" or kv_cache.element_size() == 1:
            raise ValueError(f"the CPU backend stores keys for {layer.isa!r}: expected 'vec'; use dtype='float32'")
        blocks, heads, size, width = kv_cache.shape
        keys, values = kv_cache.view(blocks, heads, 2 * size, width // 2).chunk(2, dim=2)
        keys = keys.as_strided((blocks, size, heads, width // 2), (keys.stride(0), 1, keys.stride(1), size))
        return keys, values.transpose(1, 2)


class EvictingCPUBackend(EvictingBackend, CPUAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return EvictingCPUBuilder

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return EvictingCPUImpl
