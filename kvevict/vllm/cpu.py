"""vLLM's CPU backend, evicting."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from kvevict.vllm.manager import EvictingSpec
from kvevict.vllm.worker import EvictingBackend, EvictingBuilder, EvictingImpl


class EvictingCPUBuilder(EvictingBuilder, CPUAttentionMetadataBuilder):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.kv_cache_spec, EvictingSpec) and self.isa != "vec":
            raise ValueError(
                f"the CPU backend stores keys for {self.isa!r}: expected 'vec', which needs dtype='float32', a head "
                "size that is a multiple of 32 and blocks that are one of 32"
            )


class EvictingCPUImpl(EvictingImpl, CPUAttentionBackendImpl):
    def cache_views(self, kv_cache: Tensor, layer: Any) -> tuple[Tensor, Tensor]:
        """kv_cache [num_blocks, H, block_size, 2·D]: of every block and head first K, then V.

        "vec" stores a block of keys transposed, [D, block_size], and values as rows. The other layouts (tiles of AMX,
        vectors of 16) are refused by the builder, at start.
        """
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
