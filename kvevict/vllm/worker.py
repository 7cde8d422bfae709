"""The worker's side, for any backend: metadata that sees only the slots in use, and compaction after attention."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvevict.paged import Cut, pages
from kvevict.policies import Observed, Policy
from kvevict.vllm.manager import EvictingSpec, evicts
from kvevict.vllm.settings import Settings, refuse


class Requests(NamedTuple):
    """Those of a step whose tokens move when its attention is done, as many queries of each."""

    table: Tensor  # [J, columns] int32: the blocks that hold tokens
    lengths: Tensor  # [J] int32: tokens held, those of this step among them
    queries: Tensor  # [J, W] int32: which of the step's queries are their last W
    cut: Cut  # of what lies behind the prefix
    blocks: tuple[Tensor, Tensor]  # int64: of each block that is written, its request in this list and its column


class Step(NamedTuple):
    """What a step's metadata carries for `EvictingImpl`, the same for all layers of a group."""

    policy: Policy
    prefix: int  # tokens in front that stay
    requests: list[Requests]
    last_readers: dict[str, int]  # the layers that read a cache last, and what number the policy knows them by
    slots: Tensor | None  # [tokens] int64: where this step's tokens lie, if the policy reads positions
    positions: Tensor | None  # [tokens] int32


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


def require_evicting_layers(vllm_config: Any) -> None:
    """Raises:
    ValueError, SystemExit: eviction is configured, and no layer of the model evicts.
    """
    layers = vllm_config.compilation_config.static_forward_context.values()
    if Settings.read(vllm_config) is not None and not any(map(evicts, layers)):
        refuse(
            "cannot evict in this model, none of whose layers has full attention with a cache of its own: expected no "
            "kvevict in additional_config"
        )


class EvictingBuilder:
    """Mixed into a metadata builder. `build` hides the blocks without tokens from the backend."""

    # The builder's own.
    kv_cache_spec: Any
    layer_names: list[str]
    vllm_config: Any

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        require_evicting_layers(self.vllm_config)
        if not isinstance(self.kv_cache_spec, EvictingSpec):
            return
        self.supports_update_block_table = False  # it would bring the hidden blocks back
        settings = Settings.read(self.vllm_config)
        assert settings is not None  # or there would be no EvictingSpec
        self._policy = settings.build(self.vllm_config.model_config)
        self._last_readers = self._readers()

    def _readers(self) -> dict[str, int]:
        """Of each cache, the layer that reads it last: layers are made in the order in which they run."""
        last = {}
        for name, layer in self.vllm_config.compilation_config.static_forward_context.items():
            owner = getattr(layer, "kv_sharing_target_layer_name", None) or name
            if owner in self.layer_names:
                last[owner] = name
        if not set(last.values()) <= set(self.layer_names):  # that layer's metadata is made by another builder
            refuse("cannot evict from a cache that layers of unlike heads share: expected a model without such layers")
        return {name: extract_layer_index(owner) for owner, name in last.items()}

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        # Tables that are shifted for each step have no fixed address: graphs end before and begin after attention.
        if isinstance(kv_cache_spec, EvictingSpec):
            return AttentionCGSupport.NEVER
        return super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]

    def use_cascade_attention(self, *args, **kwargs) -> bool:
        if isinstance(self.kv_cache_spec, EvictingSpec):
            return False  # requests share no prefix once they are cut
        return super().use_cascade_attention(*args, **kwargs)  # type: ignore[misc]

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        spec = self.kv_cache_spec
        if not isinstance(spec, EvictingSpec):
            return super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        common = common_attn_metadata
        size = spec.block_size
        new = common.query_start_loc[1:] - common.query_start_loc[:-1]
        before = (common.seq_lens - new).clamp(min=0)
        hidden = spec.skip(before).to(common.seq_lens.dtype)
        most = min(common.max_seq_len, spec.most_at_rest + common.max_query_len)
        blocks = common.block_table_tensor
        columns = torch.arange(min(cdiv(most, size), blocks.shape[1]), device=blocks.device)
        shifted = columns + (hidden // size)[:, None] * (columns >= spec.prefix // size)
        table = blocks.gather(1, shifted.clamp(max=blocks.shape[1] - 1))
        upper = common.seq_lens_cpu_upper_bound
        seen = dataclasses.replace(
            common,
            seq_lens=common.seq_lens - hidden,
            block_table_tensor=table,
            max_seq_len=most,
            seq_lens_cpu_upper_bound=None if upper is None else self._held_on_host(common, upper),
            _num_computed_tokens_cache=None,
        )
        metadata = super().build(0, seen, fast_build)  # type: ignore[misc]
        metadata.kvevict = self._step(common, table, before)
        return metadata

    def _held_on_host(self, common: Any, upper: Tensor) -> Tensor:
        new = common.query_start_loc_cpu[1:] - common.query_start_loc_cpu[:-1]
        return upper - self.kv_cache_spec.skip((upper - new).clamp(min=0)).to(upper.dtype)

    def _step(self, common: Any, table: Tensor, before: Tensor) -> Step | None:
        """What this step's layers do when their attention is done; None: nothing."""
        # torch counts writes to tensors, so that ops need not look at the same ones again, but not in inference mode.
        with torch.inference_mode(False):
            requests = self._requests(common, table)
        slots = positions = None
        if self._policy.reads_positions:
            starts = common.query_start_loc
            tokens = int(common.query_start_loc_cpu[-1])
            slots = common.slot_mapping[:tokens].long()
            offsets = torch.repeat_interleave(before - starts[:-1], starts[1:] - starts[:-1], output_size=tokens)
            positions = (offsets + torch.arange(tokens, device=offsets.device)).int()
        elif not requests:
            return None
        return Step(self._policy, self.kv_cache_spec.prefix, requests, self._last_readers, slots, positions)

    def _requests(self, common: Any, table: Tensor) -> list[Requests]:
        """Known on the host without asking the device: lengths there are exact, as nothing is speculative."""
        spec, policy = self.kv_cache_spec, self._policy
        lengths = common.seq_lens_cpu_upper_bound
        lengths = (common.seq_lens.cpu() if lengths is None else lengths)[: len(table)].long()
        starts = common.query_start_loc_cpu.long()
        new, ends = starts[1:] - starts[:-1], starts[1:]
        hidden, gone = spec.skip(lengths - new), spec.skip(lengths)
        rows = ((new > 0) & (gone > hidden)).nonzero()[:, 0]
        queries = new[rows].clamp(max=max(policy.window, 1))  # so many the step has of each request
        counts = torch.stack([rows, *((x[rows]) for x in (lengths - hidden, lengths - gone - spec.prefix, ends))])
        return [self._cut(counts[:, queries == same], table, same) for same in queries.unique().tolist()]

    def _cut(self, counts: Tensor, table: Tensor, queries: int) -> Requests:
        """counts, on the host: row of the table, tokens held, tokens to keep behind the prefix, end of the queries."""
        spec, policy, device = self.kv_cache_spec, self._policy, table.device
        size, prefix = spec.block_size, spec.prefix // spec.block_size
        _, held, kept, _ = counts
        first, behind = (held - kept) // size, (held + size - 1) // size
        written = behind - first
        request = torch.arange(len(held)).repeat_interleave(written)
        column = torch.arange(len(request)) - (written.cumsum(0) - written - first)[request]
        request, column = (x.to(device, non_blocking=True) for x in (request, column))

        most_blocks, most_kept = int(behind.max()), int(kept.max())
        rows, held, kept, ends = counts.to(device, non_blocking=True)
        blocks = table[rows, :most_blocks].contiguous()
        sink, recent = policy.protected
        cut = Cut(blocks[:, prefix:].contiguous(), held - spec.prefix, kept, most_kept, size, sink=sink, recent=recent,
                  heads=policy.heads)  # fmt: skip
        index = ends[:, None] - queries + torch.arange(queries, device=device)
        return Requests(blocks, held.int(), index.int(), cut, (request, column))


class EvictingImpl:
    """Mixed into an attention implementation. `forward` evicts when the step's attention is computed."""

    kv_cache_dtypes: tuple[str, ...] = ("auto", "float16", "bfloat16")  # that can be cut
    evicts = False

    # The implementation's own.
    alibi_slopes: Tensor | None
    attn_type: str
    head_size: int
    kv_cache_dtype: str
    kv_sharing_target_layer_name: str | None
    logits_soft_cap: float
    num_kv_heads: int
    scale: float
    sliding_window: Any

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        global _loading
        _loading = get_current_vllm_config()
        settings = Settings.read(_loading)  # refuses, while the model is loaded, what cannot work
        self._positions: Tensor | None = None
        if settings is not None and self.attn_type == "decoder" and self.sliding_window in (-1, (-1, -1), None):
            self._refuse(settings)
            self.evicts = self.kv_sharing_target_layer_name is None

    def _refuse(self, settings: Settings) -> None:
        """What this layer has that eviction from its cache cannot be right with."""
        policy = settings.policy
        reasons = {
            "a model without ALiBi (its biases go by slots, and kept tokens change theirs)": (
                self.alibi_slopes is not None
            ),
            f"kv_cache_dtype to be one of {self.kv_cache_dtypes}, not {self.kv_cache_dtype!r}": (
                self.kv_cache_dtype not in self.kv_cache_dtypes
            ),
            f"a policy that reads no queries, not {policy!r}, as the model caps its logits": (
                settings.reads_queries and bool(self.logits_soft_cap)
            ),
        }
        wrong = [expected for expected, found in reasons.items() if found]
        if wrong:
            refuse(f"cannot evict in this model: expected {'; '.join(wrong)}")

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs) -> Tensor:
        result = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)  # type: ignore[misc]
        step = getattr(attn_metadata, "kvevict", None)
        if step is not None and layer.layer_name in step.last_readers:
            self._evict(step, layer, query, kv_cache)
        return result

    @torch.no_grad()
    def _evict(self, step: Step, layer: Any, query: Tensor, kv_cache: Tensor) -> None:
        if step.positions is not None:
            self._note(step, kv_cache)
        scale = self.scale
        if query.dtype.itemsize == 1:  # float8 queries and keys times their scales are what the layer multiplied
            scale *= layer._q_scale_float
        if self.kv_cache_dtype.startswith("fp8"):
            scale *= layer._k_scale_float
        for requests in step.requests:
            queries = pages(query[:, None], requests.queries) if "queries" in step.policy.needs else None
            positions = None if self._positions is None else self._positions[requests.table].flatten(1, 2).mT
            seen = dict(queries=queries, positions=positions, lengths=requests.lengths, scale=scale,
                        layer=step.last_readers[layer.layer_name])  # fmt: skip
            self.cut(step, requests, seen, kv_cache)

    def _note(self, step: Step, kv_cache: Tensor) -> None:
        """Where this step's tokens are in their sequences. vLLM does not know of this memory: 4 bytes a token, head and
        layer."""
        if self._positions is None:
            blocks, size = kv_cache.shape[0], kv_cache.shape[2]
            self._positions = torch.zeros((blocks, size, self.num_kv_heads), dtype=torch.int32, device=kv_cache.device)
        assert step.positions is not None
        self._positions.view(-1, self.num_kv_heads)[step.slots] = step.positions[:, None]

    def cut(self, step: Step, requests: Requests, seen: dict[str, Any], kv_cache: Tensor) -> None:
        """Move the tokens that the policy keeps to the ends of their requests, in the engine's memory. seen: all that a
        policy observes, but for keys and values."""
        keys, values = self.cache_views(kv_cache)
        paged: Any = dict(keys=pages(keys, requests.table), values=pages(values, requests.table))
        scores = shared_scores(step, step.policy.scores(Observed(**paged, **seen)))
        halves: Any = (None, None)
        if self._positions is not None:  # they move as the scales of rows do: a half of their bits for either
            halves = self._positions[..., None].view(torch.float16).unbind(-1)
        requests.cut.move(scores, keys, values, *halves)

    def cache_views(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of a kv_cache [num_blocks, H, block_size, 2·D], in whose rows they lie side by side, whatever its
        memory order; bytes as the float8 that they are. Views [num_blocks, block_size, H, D], rows contiguous."""
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        if self.kv_cache_dtype.startswith("fp8"):
            dtype = torch.float8_e5m2 if self.kv_cache_dtype == "fp8_e5m2" else current_platform.fp8_dtype()
            keys, values = keys.view(dtype), values.view(dtype)
        return keys, values


def shared_scores(step: Step, scores: Tensor) -> Tensor:
    """Scores [J, H, S] of what lies behind the prefix; those of all ranks' heads where these share a selection: one
    message. Their mean would be shorter, but what it rounds to would depend on the number of ranks."""
    scores = scores[:, :, step.prefix :]
    if step.policy.heads == "shared" and get_tensor_model_parallel_world_size() > 1:
        scores = tensor_model_parallel_all_gather(scores.contiguous(), 1)
    return scores
