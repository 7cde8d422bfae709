"""A policy of your own: a frozen dataclass with one method, which every cache, budget and command then takes.

    python examples/custom_policy.py [--keep 0.25] [--device cuda]

This one keeps phrases: KeyDiff's scores, each averaged with its neighbours', so that words stay with those around them.
Needs kvevict[hf].
"""

import argparse
from dataclasses import dataclass

import torch

from kvevict import demo, models, ops
from kvevict.hf import EvictingCache
from kvevict.policies import KeyDiff, Observed, Policy


@dataclass(frozen=True, kw_only=True)
class Phrases(Policy):
    """Attributes:
    width: how many tokens are averaged, an odd number.
    """

    width: int = 5
    # needs = frozenset({"queries"}) would ask for more than the keys: see kvevict.policies.Observed for what there is.

    def scores(self, seen: Observed) -> torch.Tensor:
        """[B, H, S] float32, higher means keep. Protection, selection and moving are the base class's work."""
        return ops.pool_scores(ops.keydiff_scores(seen.keys, lengths=seen.lengths), self.width)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.25, help="share of the cache")
    parser.add_argument("--tokens", type=int, default=800, help="of the text")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    model, tokenizer = models.load(device=options.device)
    ids = demo.build_prompt(tokenizer, models.sample_text(), options.tokens).to(options.device)
    for policy in (KeyDiff(), Phrases()):
        cache = EvictingCache(model, policy, keep=options.keep)
        model(ids, past_key_values=cache, logits_to_keep=1)
        loss, answer = demo.ask(model, tokenizer, cache, ids)
        print(f"{type(policy).__name__}: {cache.report()[0].kept} tokens, {answer!r}, loss {loss:.2f}")


if __name__ == "__main__":
    main()
