"""Random tiny models of the shapes that are easily served wrong in vLLM. They have no tokenizer."""

import pathlib

import torch
import transformers
from transformers import AutoModelForCausalLM

VOCABULARY, HALF = 49152, ["sliding_attention", "full_attention"]
COMMON = dict(vocab_size=VOCABULARY, intermediate_size=256, max_position_embeddings=8192, bos_token_id=1,
              eos_token_id=2, pad_token_id=0)  # fmt: skip
SHAPES = {
    "llama": ("LlamaConfig", dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
                                  head_dim=32)),
    # The CPU engine stores keys of this head size otherwise ("vec16").
    "llama80": ("LlamaConfig", dict(hidden_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                    head_dim=80)),
    # No layer has full attention.
    "sliding": ("MistralConfig", dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, head_dim=32, sliding_window=128)),
    # The last layers share the cache of an earlier one.
    "gemma3n": ("Gemma3nTextConfig", dict(hidden_size=128, num_hidden_layers=6, num_attention_heads=4,
                                          num_key_value_heads=2, head_dim=32, layer_types=HALF * 3,
                                          num_kv_shared_layers=2, sliding_window=128, laurel_rank=8, altup_num_inputs=2,
                                          activation_sparsity_pattern=[0.0] * 6, hidden_size_per_layer_input=16,
                                          vocab_size_per_layer_input=VOCABULARY)),
    # Full-attention layers with smaller pages than the sliding ones: vLLM enlarges their blocks.
    "gemma4eq": ("Gemma4TextConfig", dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
                                          num_key_value_heads=4, head_dim=32, layer_types=HALF * 2, sliding_window=128,
                                          num_kv_shared_layers=0, attention_k_eq_v=True,
                                          num_global_key_value_heads=1, global_head_dim=64,
                                          hidden_size_per_layer_input=0, vocab_size_per_layer_input=VOCABULARY)),
}  # fmt: skip


def save(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Save model `name` under `folder` in float32: where it lies. The same weights each time."""
    config_class, changes = SHAPES[name]
    config = getattr(transformers, config_class)(**COMMON | changes)
    torch.manual_seed(0)
    if name == "gemma3n":
        model = transformers.Gemma3nForCausalLM(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    model.float().save_pretrained(folder / name)
    return folder / name
