"""A chat of any length in the memory of a short one: every layer holds about as many tokens as the budget says.

    python examples/chat.py [--budget 512] [--model ID] [--device cuda]      # one line, one turn; end with Ctrl-D
    printf 'Hello.\\nWho are you?\\n' | python examples/chat.py

The system prompt is pinned: whatever else goes, it stays. Needs kvevict[hf].
"""

import argparse
import sys

import torch

from kvevict import models
from kvevict.hf import EvictingCache

SYSTEM = "You are a helpful assistant. Answer in one sentence."
TURN = "<|im_start|>{role}\n{text}<|im_end|>\n"  # as SmolLM2 and Qwen write turns; other models: their chat template
REPLY = "<|im_start|>assistant\n"
STOP = "<|im_end|>"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=models.SMOLLM2)
    parser.add_argument("--policy", default="recommended", help="by name")
    parser.add_argument("--budget", type=int, default=512, help="tokens that every layer holds")
    parser.add_argument("--reply", type=int, default=40, help="tokens of a reply at most")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    model, tokenizer = models.load(options.model, options.device)

    def encode(text: str) -> torch.Tensor:
        return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(options.device)

    ids = encode(TURN.format(role="system", text=SYSTEM))
    stop = tokenizer.convert_tokens_to_ids(STOP)
    cache = EvictingCache(model, options.policy, budget=options.budget, pin=ids.shape[1])
    for line in sys.stdin:
        ids = torch.cat([ids, encode(TURN.format(role="user", text=line.strip()) + REPLY)], 1)
        said = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=options.reply,
            do_sample=False, eos_token_id=stop, pad_token_id=stop,
        )  # fmt: skip
        print(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip())
        ids = said if said[0, -1] == stop else torch.cat([said, encode(STOP)], 1)
        ids = torch.cat([ids, encode("\n")], 1)
        layer = cache.report()[0]
        print(f"  [{layer.seen} tokens so far, {layer.kept} held by each layer]", file=sys.stderr)


if __name__ == "__main__":
    main()
