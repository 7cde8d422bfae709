"""A vLLM plugin: requests are held at a budget of tokens per layer and KV head, and their blocks go back to the pool.

Off unless configured: `LLM(..., additional_config={"kvevict": {"policy": "keydiff", "budget": 1024}})`, or the same as
JSON in the environment variable KVEVICT_VLLM. docs/vllm.md has the design, the limits and what was tested.
"""


def register() -> None:
    """vLLM calls this in each of its processes (entry point vllm.general_plugins): where to find our attention
    backends, which do nothing of their own where nothing is configured, and who manages the blocks of our layers."""
    try:
        import vllm  # noqa: F401
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(f"kvevict.vllm needs {missing.name}, the engine whose plugin it is") from None
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, MambaAttentionBackendEnum, register_backend
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from kvevict.vllm import refused
    from kvevict.vllm.manager import EvictingManager, EvictingSpec

    register_backend(AttentionBackendEnum.CPU_ATTN, "kvevict.vllm.cpu.EvictingCPUBackend")
    register_backend(AttentionBackendEnum.FLASH_ATTN, "kvevict.vllm.flash.EvictingFlashBackend")
    register_backend(AttentionBackendEnum.TRITON_ATTN, "kvevict.vllm.triton.EvictingTritonBackend")
    register_backend(AttentionBackendEnum.FLASHINFER, "kvevict.vllm.flashinfer.EvictingFlashInferBackend")
    for name in refused.REFUSED + refused.LEFT_ALONE:
        register_backend(AttentionBackendEnum[name], f"kvevict.vllm.refused.{name}")
    for name in refused.MAMBA:
        register_backend(MambaAttentionBackendEnum[name], f"kvevict.vllm.refused.{name}", is_mamba=True)
    KVCacheSpecRegistry._ensure_registered()  # a first registration would keep vLLM from making its own
    KVCacheSpecRegistry.register(EvictingSpec, EvictingManager, uniform_type_base_spec=FullAttentionSpec)
