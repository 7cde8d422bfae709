"""vLLM's CPU backend, evicting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from kvevict.policies import Observed
from kvevict.vllm.manager import EvictingSpec
from kvevict.vllm.settings import refuse
from kvevict.vllm.worker import EvictingBackend, EvictingBuilder, EvictingImpl, Requests, Step, shared_scores


class EvictingCPUBuilder(EvictingBuilder, CPUAttentionMetadataBuilder):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.kv_cache_spec, EvictingSpec) and self.isa != "vec":
            refuse(
                f"the CPU backend stores keys for {self.isa!r}: expected 'vec', which needs dtype='float32', a head "
                "size that is a multiple of 32 and a block_size that is one of 32"
            )


class EvictingCPUImpl(EvictingImpl, CPUAttentionBackendImpl):
    """kv_cache [num_blocks, H, block_size, 2·D]: of every block and head first K, transposed [D, block_size], then V,
    as rows. That is "vec"; the other layouts (tiles of AMX, vectors of 16) are refused by the builder, at start.

    Such keys are no rows that the paged ops could find: the blocks of all requests are read at once, and those that
    change are written back.
    """

    def cut(self, step: Step, requests: Requests, seen: dict[str, Any], layer: Any, kv_cache: Tensor) -> None:
        heads, size = kv_cache.shape[1], kv_cache.shape[2]
        J, columns = requests.table.shape
        halves = kv_cache.view(len(kv_cache), heads, 2, -1)[requests.table.long()].unbind(3)  # [J, columns, H, size·D]
        transposed, rows = halves[0].unflatten(3, (-1, size)), halves[1].unflatten(3, (size, -1))
        keys = transposed.permute(0, 2, 1, 4, 3).flatten(2, 3)  # [J, H, S, D]
        values = rows.permute(0, 2, 1, 3, 4).flatten(2, 3)
        scores = shared_scores(step, step.policy.scores(Observed(keys=keys, values=values, **seen)))

        # Which slot each slot's token comes from: the kept ones fill the last slots of their request.
        kept = step.prefix + requests.cut.select(scores).expand(J, heads, -1)
        slots = torch.arange(columns * size)
        order = torch.arange(kept.shape[2])
        targets = requests.lengths.long()[:, None] - requests.cut.kept[:, None] + order
        absent = order >= requests.cut.kept[:, None]
        source = torch.cat([slots, slots[:1]]).expand(J, heads, -1).clone()  # the last one takes what is absent
        targets = targets.masked_fill(absent, len(slots))[:, None].expand(J, heads, -1)
        source = source.scatter_(2, targets, kept)[..., :-1]

        i, column = requests.blocks
        ids = requests.table[i, column].long()

        def moved(x: Tensor) -> Tensor:
            """[written blocks, H, size, D]"""
            x = x.gather(2, source[..., None].expand(-1, -1, -1, x.shape[3]))
            return x.unflatten(2, (columns, size)).transpose(1, 2)[i, column]

        changed = torch.stack([moved(keys).mT.flatten(2), moved(values).flatten(2)], 2)
        kv_cache.view(len(kv_cache), heads, 2, -1)[ids] = changed
        if self._positions is not None:
            self._positions[ids] = moved(seen["positions"][..., None])[..., 0].mT


class EvictingCPUBackend(EvictingBackend, CPUAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return EvictingCPUBuilder

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return EvictingCPUImpl
