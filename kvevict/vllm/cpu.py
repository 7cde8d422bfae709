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

    Such keys are no rows that the paged ops could find: the keys of all requests are read at once, and then what comes
    to the blocks that change.

    Its operations are many and small, so where torch runs them on several threads it matters how these wait for each
    other. GNU's OpenMP lets them spin, and on cores that other processes use as well a cut of 5 ms then takes 100 and
    more: start the engine with OMP_WAIT_POLICY=passive there, which its model gains from too.
    """

    def cut(self, step: Step, requests: Requests, seen: dict[str, Any], kv_cache: Tensor) -> None:
        heads, size = kv_cache.shape[1], kv_cache.shape[2]
        table = requests.table.long()
        J, columns = table.shape
        halves = kv_cache.view(len(kv_cache), heads, 2, -1).unbind(2)  # [num_blocks, H, size·D]
        transposed, rows = halves[0].unflatten(2, (-1, size)), halves[1].unflatten(2, (size, -1))
        keys = transposed[table].permute(0, 2, 1, 4, 3).flatten(2, 3)  # [J, H, S, D]
        values = rows[table].transpose(1, 2).flatten(2, 3) if "values" in step.policy.needs else None
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

        # Of the blocks that are written: what comes there [written blocks, H, size], all of it read before any is.
        i, column = requests.blocks
        source = source.unflatten(2, (columns, size))[i, :, column]
        ids, i, h = table[i, column], i[:, None, None], torch.arange(heads)[:, None]
        where = table[i, source // size], source % size
        new_keys, new_values = keys[i, h, source], rows[where[0], h, where[1]]
        if self._positions is not None:
            self._positions[ids] = self._positions[(*where, h)].mT
        transposed[ids], rows[ids] = new_keys.mT, new_values


class EvictingCPUBackend(EvictingBackend, CPUAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return EvictingCPUBuilder

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return EvictingCPUImpl
