"""`python -m bench.generate`: what eviction is worth in a whole model: decode speed, memory, cost beside the prefill.

A Llama-shaped model with random weights (its speed does not depend on them), a prompt in chunks, one eviction, then
decode steps; with the whole cache and with keep = 0.25. Break-even is measured (eviction's time over the time that a
decode step saves) beside what `kvevict.plan` computes at the measured copy bandwidth.

On a GPU: 8B in bf16, 8K to 128K tokens, batch 1 and 8. On a CPU: a tiny model and short prompts; it shows that the
script runs, and its times say nothing about a GPU.
"""

import argparse
import copy
import json
import pathlib
import statistics
import time

import torch

import kvevict
from bench import RESULTS, device_name
from bench.measure import STATED, ceilings
from kvevict.hf import EvictingCache
from kvevict.policies import KeyDiff

KEEP = 0.25
CHUNK = 4096
STEPS = 32


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def build(device):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                 num_key_value_heads=8, vocab_size=128256)  # fmt: skip
    if device == "cpu":
        sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8,
                     num_key_value_heads=2, vocab_size=1024)  # fmt: skip
    config = LlamaConfig(**sizes, max_position_embeddings=2**18)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def measure(model, tokens, batch, bandwidth):
    """One line: prefill once; then decode from the whole cache, and from a copy of it that was cut."""
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device=model.device)
    cache = EvictingCache(model, KeyDiff(), budget=tokens + STEPS)
    start = now()
    for chunk in ids.split(CHUNK, dim=1):
        logits = model(chunk, past_key_values=cache, logits_to_keep=1).logits
    prefill = now() - start
    row = dict(tokens=tokens, batch=batch, keep=KEEP, prefill_seconds=prefill)
    for name in ("whole", "cut"):
        if name == "cut":
            cache.crop(-STEPS)
            copy.deepcopy(cache).evict(KEEP)  # compiles
            start = now()
            cache.evict(KEEP)
            row["eviction_seconds"] = now() - start
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        token, steps = logits[:, -1:].argmax(-1), []
        for _ in range(STEPS):
            start = now()
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            steps.append(now() - start)
        row[f"{name}_step_seconds"] = statistics.median(steps)
        row[f"{name}_tokens_per_second"] = batch / row[f"{name}_step_seconds"]
        row[f"{name}_cache_bytes"] = sum(layer.bytes for layer in cache.report())
        if model.device.type == "cuda":
            row[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated()
    saved = row["whole_step_seconds"] - row["cut_step_seconds"]
    dtype = "bfloat16" if model.dtype == torch.bfloat16 else "float32"
    plan = kvevict.plan(model.config, context=tokens, batch=batch, dtype=dtype, keep=KEEP, bandwidth=bandwidth)
    return row | dict(
        eviction_share_of_prefill=row["eviction_seconds"] / prefill,
        break_even_steps=row["eviction_seconds"] / saved if saved > 0 else None,
        planned_break_even_steps=plan.break_even_steps,
    )


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.generate", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the two shortest prompts, batch 1")
    parser.add_argument("--out", type=pathlib.Path, help="folder; default: bench/results/<device>")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = device_name(device)
    lengths = [2**k for k in range(13, 18)] if device == "cuda" else [512, 1024]
    bandwidth = (ceilings() if device == "cuda" else STATED)["bandwidth"]
    torch.manual_seed(0)
    model = build(device)
    rows = []
    for batch in (1,) if options.quick else (1, 8):
        for tokens in lengths[:2] if options.quick else lengths:
            try:
                rows.append(measure(model, tokens, batch, bandwidth))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                rows.append(dict(tokens=tokens, batch=batch, missing="out of memory with the whole cache"))
            print(rows[-1], flush=True)
    out = options.out or RESULTS / name
    out.mkdir(parents=True, exist_ok=True)
    caption = f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    (out / "generate.json").write_text(json.dumps(dict(schema=1, caption=caption, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
