"""vLLM's GPU backends in an engine on the CPU: the real classes, with only their device functions replaced by torch."""

import importlib.machinery
import sys
import types

import torch

WRONG = []  # what a kernel would have been told wrongly


def attend(q, k, v, out, starts, lengths, scale, table, window=-1, softcap=0.0):
    """Causal attention of each request's last queries: q [tokens, Hq, D]; k, v [blocks, size, H, D]."""
    size = k.shape[1]
    for i, length in enumerate(lengths.tolist()):
        begin, end = int(starts[i]), int(starts[i + 1])
        if end == begin:
            continue
        slots = torch.arange(length)
        places = table[i, slots // size].long(), slots % size
        group = q.shape[1] // k.shape[2]
        keys, values = (x[places].float().repeat_interleave(group, 1) for x in (k, v))
        logits = torch.einsum("qhd,khd->hqk", q[begin:end].float(), keys) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        query = torch.arange(length - (end - begin), length)[:, None]
        visible = (slots <= query) & ((window < 0) | (slots >= query - window))
        weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype).view_as(out[begin:end])
    return out


def write(key, value, key_cache, value_cache, slots, *_):
    size, kept = key_cache.shape[1], slots >= 0
    places = slots[kept].long() // size, slots[kept].long() % size
    for new, cache in ((key, key_cache), (value, value_cache)):
        cache[places] = new[: len(slots)][kept].to(cache.dtype)


def check(queries, most_queries, length, most_length):
    if queries > most_queries or length > most_length:
        WRONG.append((queries, most_queries, length, most_length))


def varlen(q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, block_table,
           window_size=None, softcap=0.0, **_):  # fmt: skip
    starts = cu_seqlens_q.tolist()
    check(
        max(b - a for a, b in zip(starts, starts[1:], strict=False)), max_seqlen_q, int(seqused_k.max()), max_seqlen_k
    )
    window = -1 if window_size is None else window_size[0]
    return attend(q, k, v, out, cu_seqlens_q, seqused_k, softmax_scale, block_table, window, softcap)


def scheduler_metadata(batch_size, cache_seqlens, max_seqlen_k, **_):
    check(0, 0, int(cache_seqlens.max()), max_seqlen_k)
    return torch.zeros(1 + 4 * batch_size, dtype=torch.int32)


def flash():
    import vllm.v1.attention.backends.fa_utils as utils
    import vllm.v1.attention.backends.flash_attn as module

    for where in (module, utils):
        where.flash_attn_varlen_func, where.reshape_and_cache_flash = varlen, write
        where.get_scheduler_metadata = scheduler_metadata
        where.get_flash_attn_version = lambda *args, **options: 3
    module.is_flash_attn_varlen_func_available = module.flash_attn_supports_sinks = lambda: True
    from kvevict.vllm.flash import EvictingFlashBackend

    return EvictingFlashBackend


def triton():
    import vllm.v1.attention.backends.triton_attn as module

    module.unified_attention, module.triton_reshape_and_cache_flash = varlen, write
    from kvevict.vllm.triton import EvictingTritonBackend

    return EvictingTritonBackend


class Wrapper:
    """FlashInfer's, of prefills and decodes: plans on the host, then runs."""

    def __init__(self, workspace, layout, **_):
        self.layout = layout

    def plan(self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size, causal=True,
             sm_scale=None, window_left=-1, logits_soft_cap=None, **_):  # fmt: skip
        self._window_left, self._logits_soft_cap = window_left, logits_soft_cap or 0.0
        self._sm_scale, self._causal = sm_scale, causal
        pages = [paged_kv_indices[a:b] for a, b in zip(paged_kv_indptr, paged_kv_indptr[1:], strict=False)]
        self.table = torch.nn.utils.rnn.pad_sequence(pages, batch_first=True)
        held = torch.tensor([len(page) for page in pages])
        self.starts, self.lengths = qo_indptr, (held - 1) * page_size + paged_kv_last_page_len

    def run(self, query, caches, out, **_):
        if self.layout == "HND":
            caches = [cache.transpose(1, 2) for cache in caches]
        attend(query, *caches, out, self.starts, self.lengths, self._sm_scale, self.table, self._window_left)


class Decode(Wrapper):
    pass


class CopyPages:
    def __getitem__(self, grid):
        def copy(indices, table, stride, indptr, **_):
            for i in range(grid[0]):
                begin, end = int(indptr[i]), int(indptr[i + 1])
                indices[begin:end] = table[i, : end - begin]

        return copy


def plan_decode(self, indptr_cpu, indices, last_page_len_cpu, **options):
    starts = torch.arange(len(indptr_cpu))
    self.plan(starts, indptr_cpu, indices, last_page_len_cpu, **options)


def flashinfer():
    """FlashInfer itself is not there: stand-ins for what vLLM imports of it."""
    names = dict(BatchDecodeWithPagedKVCacheWrapper=Decode, BatchPrefillWithPagedKVCacheWrapper=Wrapper)
    for path in ("flashinfer", "flashinfer.decode", "flashinfer.prefill", "flashinfer.utils"):
        module = sys.modules[path] = types.ModuleType(path)
        module.__spec__ = importlib.machinery.ModuleSpec(path, None)
        for name in ("BatchAttentionWithAttentionSinkWrapper", "BatchPrefillWithRaggedKVCacheWrapper", "FP4Tensor",
                     "nvfp4_quantize_append_paged_kv_cache_with_slot_mapping", "fast_decode_plan",
                     "trtllm_batch_decode_with_kv_cache", "trtllm_batch_context_with_kv_cache", *names):  # fmt: skip
            setattr(module, name, names.get(name, type(name, (), {})))
        module.get_seq_lens = lambda *_: None
    import vllm.v1.attention.backends.flashinfer as module

    module._copy_page_indices_kernel, module.fast_plan_decode = CopyPages(), plan_decode
    module.FlashInferMetadataBuilder._get_workspace_buffer = lambda self: None

    def update(self, layer, key, value, kv_cache, slot_mapping):
        write(key, value, *kv_cache.transpose(1, 2).split(self.head_size, dim=-1), slot_mapping)

    module.FlashInferImpl.do_kv_cache_update = update
    from kvevict.vllm.flashinfer import EvictingFlashInferBackend

    return EvictingFlashInferBackend


Fake = None  # the backend in use


def use(backend, layout):
    """Let engines of this process have `backend` under the name of the CPU's, with keys in a KVCacheLayout."""
    global Fake
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.kv_cache_layout import KVCacheLayout

    load_general_plugins()
    of = dict(FLASH_ATTN=flash, TRITON_ATTN=triton, FLASHINFER=flashinfer)[backend]()

    class Fake(of):
        supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]

        @staticmethod
        def get_name():
            return "CPU_ATTN"

        @classmethod
        def supports_compute_capability(cls, capability):
            return True

        @classmethod
        def supported_kv_cache_layouts(cls):
            return (KVCacheLayout[layout],)

    Fake.__qualname__ = "Fake"
    register_backend(AttentionBackendEnum.CPU_ATTN, "vllm_fake.Fake")
