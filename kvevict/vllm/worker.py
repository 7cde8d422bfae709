"""The worker's side, for any backend: metadata that sees only the slots in use, and compaction after attention."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvevict.paged import paged_compact, paged_keydiff_compact
from kvevict.policies import KeyDiff, Observed, Policy
from kvevict.vllm.manager import EvictingSpec
from kvevict.vllm.settings import Settings


class Eviction(NamedTuple):
    """The requests of a step whose tokens move when its attention is done."""

    block_tables: Tensor  # [J, columns] int32, from the first block in use
    lengths: Tensor  # [J] int32: tokens held, those of this step among them
    keep: Tensor  # [J] int32
    on_host: list[tuple[int, int, int]]  # of each request: tokens held, tokens to keep, index of its last query


# vLLM asks a backend class for its layers' specs without saying for which engine: it is the one whose layers were made
# last, because an engine loads its model and asks in one go.
_loading: Any = None


class EvictingBackend:
    """Mixed into an attention backend."""

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        spec = super().customize_spec(spec)  # type: ignore[misc]
        if type(spec) is not FullAttentionSpec:  # sliding windows and MLA are left alone
            return spec
        settings = None if _loading is None else Settings.read(_loading)
        return spec if settings is None else EvictingSpec.of(spec, settings, _loading)


class EvictingBuilder:
    """Mixed into a metadata builder. `build` hides the blocks without tokens from the backend."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.kv_cache_spec, EvictingSpec):  # type: ignore[attr-defined]
            self.supports_update_block_table = False  # it would bring the hidden blocks back

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        spec = self.kv_cache_spec  # type: ignore[attr-defined]
        if not isinstance(spec, EvictingSpec):
            return super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        common = common_attn_metadata
        size = spec.block_size
        new = common.query_start_loc[1:] - common.query_start_loc[:-1]
        hidden = spec.skip((common.seq_lens - new).clamp(min=0)).to(common.seq_lens.dtype)
        columns = torch.arange(common.block_table_tensor.shape[1], device=hidden.device)
        first = (hidden // size)[:, None]
        table = common.block_table_tensor.gather(1, (columns + first).clamp(max=len(columns) - 1))
        held = common.seq_lens - hidden
        most = spec.most_at_rest + common.max_query_len
        seen = dataclasses.replace(
            common, seq_lens=held, block_table_tensor=table, max_seq_len=min(common.max_seq_len, most)
        )
        metadata = super().build(0, seen, fast_build)  # type: ignore[misc]
        metadata.kvevict = self._eviction(common, spec, table, held)
        return metadata

    @staticmethod
    def _eviction(common: Any, spec: EvictingSpec, table: Tensor, held: Tensor) -> Eviction | None:
        """Known on the host without asking the device: lengths there are exact, as nothing is speculative."""
        lengths = common.seq_lens_cpu_upper_bound
        lengths = (common.seq_lens if lengths is None else lengths)[: len(held)].tolist()
        starts = common.query_start_loc_cpu.tolist()
        rows, on_host = [], []
        for i, length in enumerate(lengths):
            new = starts[i + 1] - starts[i]
            if not new:
                continue
            before, now = spec.skip(length - new), spec.skip(length)
            if now > before:
                rows.append(i)
                on_host.append((length - before, length - now, starts[i + 1] - 1))
        if not rows:
            return None
        requests = torch.tensor(rows, device=table.device)
        columns = -(-max(length for length, _, _ in on_host) // spec.block_size)
        held, after = held[requests], common.seq_lens[requests]
        keep = after - spec.skip(after)
        return Eviction(table[requests, :columns].contiguous(), held, keep.int(), on_host)


class EvictingImpl(abc.ABC):
    """Mixed into an attention implementation. `forward` evicts when the step's attention is computed."""

    # The implementation's own.
    alibi_slopes: Tensor | None
    attn_type: str
    head_size: int
    kv_cache_dtype: str
    kv_sharing_target_layer_name: str | None
    logits_soft_cap: float
    scale: float
    sliding_window: Any

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        global _loading
        _loading = get_current_vllm_config()
        settings = Settings.read(_loading)  # refuses, while the model is loaded, what cannot work
        self._policy: Policy | None = None if settings is None else settings.build()
        if self._policy is not None and self.attn_type == "decoder" and self.sliding_window in (-1, (-1, -1)):
            self._refuse("queries" in self._policy.needs)

    def _refuse(self, reads_queries: bool) -> None:
        """What this layer has that eviction from its cache cannot be right with."""
        reasons = {
            f"a layer with a cache of its own, not {self.kv_sharing_target_layer_name}'s": (
                self.kv_sharing_target_layer_name is not None
            ),
            "no ALiBi (its biases go by slots, and kept tokens change theirs)": self.alibi_slopes is not None,
            f"kv_cache_dtype='auto', not {self.kv_cache_dtype!r}": self.kv_cache_dtype.startswith(("fp8", "int")),
            "a policy that reads keys alone, as the layer caps its logits": reads_queries
            and bool(self.logits_soft_cap),
        }
        wrong = [expected for expected, found in reasons.items() if found]
        if wrong:
            raise ValueError(f"kvevict cannot evict in this model yet: expected {'; '.join(wrong)}")

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs) -> Tensor:
        result = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)  # type: ignore[misc]
        eviction = getattr(attn_metadata, "kvevict", None)
        if eviction is not None:
            assert self._policy is not None
            # Policies scale logits by 1/√D; the layer's own scale may be another.
            ratio = self.scale * self.head_size**0.5
            query = query if abs(ratio - 1) < 1e-6 else query * ratio
            evict(self._policy, eviction, query, *self.cache_views(kv_cache, layer))
        return result

    @abc.abstractmethod
    def cache_views(self, kv_cache: Tensor, layer: Any) -> tuple[Tensor, Tensor]:
        """K and V as views [num_blocks, block_size, kv_heads, head_dim] of the engine's memory."""


@torch.no_grad()
def evict(policy: Policy, eviction: Eviction, query: Tensor, keys: Tensor, values: Tensor) -> None:
    """Move the tokens that the policy keeps to the tail of each request, in the engine's memory.

    query: [tokens, Hq, D], this step's; keys, values: [num_blocks, block_size, H, D], any strides.
    """
    sink, recent = policy.protected
    table, lengths, keep = eviction.block_tables, eviction.lengths, eviction.keep
    rows = keys.stride(3) == values.stride(3) == 1
    if rows and type(policy) is KeyDiff:
        paged_keydiff_compact(keys, values, table, lengths, keep=keep, sink=sink, recent=recent, heads=policy.heads,
                              anchor=policy.anchor, to="tail")  # fmt: skip
        return
    size = keys.shape[1]
    for j, (length, kept, last_query) in enumerate(eviction.on_host):
        slots = torch.arange(length, device=keys.device)
        blocks, offsets = table[j, slots // size].long(), slots % size
        dense = keys[blocks, offsets].transpose(0, 1)[None], values[blocks, offsets].transpose(0, 1)[None]
        last = query.view(query.shape[0], -1, keys.shape[3])[last_query]
        seen = Observed(keys=dense[0], values=dense[1], queries=last[None, :, None])
        indices = policy.select(seen, kept)
        if rows:
            one = slice(j, j + 1)
            paged_compact(keys, values, table[one], lengths[one], indices.contiguous(), to="tail")
            continue
        # Keys that the engine stores otherwise than as rows: read above, and written, through the view.
        blocks, offsets = blocks[length - kept :], offsets[length - kept :]
        for cache, old in zip((keys, values), dense, strict=True):
            moved = old.gather(2, indices[..., None].expand(-1, -1, -1, old.shape[3]))
            cache[blocks, offsets] = moved[0].transpose(0, 1)
