"""vLLM's other backends: as they are, but they do not start where eviction is configured and they would go without.

`kvevict.vllm.refused.NAME` is the class of AttentionBackendEnum.NAME or MambaAttentionBackendEnum.NAME, imported when
vLLM asks for it.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.config import get_current_vllm_config
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum, MambaAttentionBackendEnum

from kvevict.vllm.settings import Settings, refuse

SERVED = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN", "FLASHINFER")
# Of full attention: their layers would evict nothing.
REFUSED = (
    "FLEX_ATTENTION", "ROCM_ATTN", "FLASH_ATTN_DIFFKV", "TRITON_ATTN_DIFFKV", "TRITON_FLASH_ATTN", "TRITON_FLASHINFER",
    "ROCM_SEGMENTED_ATTN", "ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN", "B12X", "HPC_ATTN", "TURBOQUANT", "ULTRAQUANT",
)  # fmt: skip
# Of layers that are left alone, which must not be all that a model has.
LEFT_ALONE = ("CPU_MLA", "TRITON_MLA", "CUTLASS_MLA", "FLASHMLA", "FLASH_ATTN_MLA", "FLASHINFER_MLA", "ROCM_AITER_MLA")
MAMBA = ("MAMBA1", "MAMBA2", "SHORT_CONV", "LINEAR", "GDN_ATTN")


@functools.cache
def _refusing(impl: type, name: str) -> type:
    class Impl(impl):  # type: ignore[valid-type, misc]
        def __init__(self, *args, **kwargs) -> None:
            if Settings.read(get_current_vllm_config()) is not None:
                refuse(f"cannot evict with attention_backend={name}: expected one of {', '.join(SERVED)}")
            super().__init__(*args, **kwargs)

    return Impl


@functools.cache
def _requiring(builder: type) -> type:
    class Builder(builder):  # type: ignore[valid-type, misc]
        def __init__(self, *args, **kwargs) -> None:
            from kvevict.vllm.worker import require_evicting_layers  # imports more than a plugin may that is just found

            super().__init__(*args, **kwargs)
            require_evicting_layers(self.vllm_config)

    return Builder


def __getattr__(name: str) -> Any:
    if name not in REFUSED + LEFT_ALONE + MAMBA:
        raise AttributeError(name)
    enum = MambaAttentionBackendEnum if name in MAMBA else AttentionBackendEnum
    backend = resolve_obj_by_qualname(enum[name].value)

    class Backend(backend):  # type: ignore[valid-type, misc]
        if name in REFUSED:

            @staticmethod
            def get_impl_cls() -> type:
                return _refusing(backend.get_impl_cls(), name)

        else:

            @staticmethod
            def get_builder_cls() -> type:
                return _requiring(backend.get_builder_cls())

    Backend.__name__ = Backend.__qualname__ = name  # vLLM tells classes apart by it
    globals()[name] = Backend  # one class however often it is asked for
    return Backend
