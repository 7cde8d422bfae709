"""A policy of ours as a press of kvpress, so that kvpress's own evaluation can run it:

    press = PolicyPress(compression_ratio=0.75, policy=KeyDiff())
    pipeline("kv-press-text-generation", model=model)(context, question=question, press=press)

kvpress's forward hook calls it with each layer's keys and values, and it gives back what the policy keeps of them. The
same number of tokens stays in every head, as kvpress's cache asks for. Needs kvpress (`make quality-peers`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from kvpress.presses.base_press import BasePress
from kvpress.presses.scorer_press import compute_n_kept
from kvpress.utils import get_prerope_query_states
from transformers.models.llama.modeling_llama import rotate_half

from kvevict import ops
from kvevict.hf.weights import bound
from kvevict.policies import RECOMMENDED, Observed, Policy

SHOWN = frozenset({"queries", "values", "hidden", "mass"})  # of what policies read; mass from the prompt's queries


@dataclass
class PolicyPress(BasePress):
    """compression_ratio: share of the tokens that go; policy: ours.

    Raises:
        ValueError: the policy reads what a press is not shown, or gives heads unequal numbers of tokens.
    """

    compression_ratio: float = 0.0
    policy: Policy = field(default_factory=lambda: RECOMMENDED)

    def __post_init__(self) -> None:
        missing = sorted(self.policy.needs - SHOWN)
        if missing:
            raise ValueError(f"policy reads {' and '.join(missing)}: expected one that reads {sorted(SHOWN)} or keys")
        if self.policy.heads == "adaptive" or self.policy.spread != "layers":
            raise ValueError(
                f"policy has heads {self.policy.heads!r}, and then they keep unequal numbers of tokens: expected "
                "dataclasses.replace(policy, heads='shared'), because kvpress's cache has equal heads"
            )

    def post_init_from_model(self, model) -> None:
        """Fill in what the policy reads of the model, as kvpress asks before it registers its hooks."""
        self.policy = bound(self.policy, model)

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        """(keys, values) [B, H, n, D] of what stays of [B, H, S, D]."""
        if self.compression_ratio == 0:
            return keys, values
        queries = None
        if self.policy.needs & {"queries", "mass"}:
            queries = get_prerope_query_states(module, hidden_states)
            queries = turned(queries, *kwargs["position_embeddings"])
            scaling = getattr(module, "scaling", None)
            if scaling is not None:  # policies know no other scale of logits than 1/√D
                queries = queries * (scaling * queries.shape[3] ** 0.5)
        seen = Observed(keys=keys, values=values, queries=queries, hidden=hidden_states, layer=module.layer_idx)
        kept = self.policy.select(seen, compute_n_kept(keys.shape[2], self.compression_ratio))
        return ops.compact(keys, values, kept.contiguous(), inplace=False)[:2]


def turned(queries, cos, sin):
    """RoPE of [B, Hq, T, D] by cosines and sines [B, T, R]: of the first R elements, R < D where it is partial."""
    cos, sin = cos[:, None], sin[:, None]
    first, rest = queries[..., : cos.shape[-1]], queries[..., cos.shape[-1] :]
    return torch.cat([first * cos + rotate_half(first) * sin, rest], -1)
