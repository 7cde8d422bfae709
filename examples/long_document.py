"""Read a document once, save its compressed cache, and ask it questions later, each from the file.

    python examples/long_document.py read --file FILE --folder FOLDER [--keep 0.5]
    python examples/long_document.py ask --folder FOLDER "The question, or the beginning of a sentence"

The document is not read again: what is loaded are the keys and values that were kept. Needs kvevict[hf].
"""

import argparse
import json
import pathlib

import torch

from kvevict import models
from kvevict.hf import EvictingCache

CHUNK = 1024  # tokens per forward: the memory of a long document's activations


def read(model, tokenizer, text: str, folder: pathlib.Path, policy: str, keep: float) -> None:
    """Into `folder`: the cache, cut to that share, and what has to be known to go on from it."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    cache = EvictingCache(model, policy, budget=ids.shape[1])  # holds everything, and notes what the policy reads
    for chunk in ids.split(CHUNK, dim=1):
        model(chunk, past_key_values=cache, logits_to_keep=1)
    cache.evict(keep)
    cache.save_pretrained(folder)
    (folder / "document.json").write_text(json.dumps(dict(tokens=ids.shape[1], policy=policy)))
    kept, held = cache.report()[0].kept, sum(layer.bytes for layer in cache.report())
    print(f"{folder}: {kept} of {ids.shape[1]} tokens, {held / 2**20:.1f} MiB")


def ask(model, tokenizer, folder: pathlib.Path, question: str, tokens: int = 8) -> str:
    """What the model says after the question."""
    about = json.loads((folder / "document.json").read_text())
    cache = EvictingCache.from_pretrained(
        folder, model, about["policy"], device=model.device, budget=about["tokens"] + 4096
    )
    asked = tokenizer(question, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    # `generate` drops as many ids as the cache has seen: which ones they were does not matter to it.
    ids = torch.cat([asked.new_zeros(1, about["tokens"]), asked], 1)
    options = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
    said = model.generate(ids, past_key_values=cache, **options)
    return tokenizer.decode(said[0, ids.shape[1] :])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("read", "ask"))
    parser.add_argument("questions", nargs="*", help="for ask")
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="of the cache")
    parser.add_argument("--file", type=pathlib.Path, help="the document, for read")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the cache")
    parser.add_argument("--policy", default="recommended", help="by name")
    parser.add_argument("--model", default=models.SMOLLM2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_intermixed_args()

    model, tokenizer = models.load(options.model, options.device)
    if options.what == "read":
        read(model, tokenizer, models.read_text(options.file), options.folder, options.policy, options.keep)
    for question in options.questions:
        print(f"{question}{ask(model, tokenizer, options.folder, question)!r}")


if __name__ == "__main__":
    main()
