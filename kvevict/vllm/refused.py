"""vLLM's other backends of full attention: as they are, but they do not start where eviction is configured.

`kvevict.vllm.refused.NAME` is the class of AttentionBackendEnum.NAME, imported when vLLM asks for it.
"""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from kvevict.vllm.settings import Settings

NAMES = (
    "TRITON_ATTN", "FLASHINFER", "FLEX_ATTENTION", "ROCM_ATTN", "FLASH_ATTN_DIFFKV", "TRITON_ATTN_DIFFKV",
    "TRITON_FLASH_ATTN", "TRITON_FLASHINFER", "ROCM_SEGMENTED_ATTN", "ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN", "B12X",
    "HPC_ATTN", "TURBOQUANT", "ULTRAQUANT",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(name)
    backend = resolve_obj_by_qualname(AttentionBackendEnum[name].value)
    impl = backend.get_impl_cls()

    class Impl(impl):  # type: ignore[valid-type, misc]
        def __init__(self, *args, **kwargs) -> None:
            if Settings.read(get_current_vllm_config()) is not None:
                raise ValueError(f"kvevict cannot evict with attention_backend={name}: expected FLASH_ATTN or CPU_ATTN")
            super().__init__(*args, **kwargs)

    class Backend(backend):  # type: ignore[valid-type, misc]
        @staticmethod
        def get_impl_cls() -> type:
            return Impl

    globals()[name] = Backend  # one class however often it is asked for
    return Backend
