"""What is worth keeping: policies give scores and protection, budgets the number of tokens per layer and head, measured
Shares what they follow, a Tracker notes what decoding does with each token."""

from dataclasses import replace

from kvevict.policies.attention import TOVA, AttentionMass, SnapKV
from kvevict.policies.base import Policy
from kvevict.policies.budgets import Budget, Fixed, LayerWide, ModelWide, Pyramid, Uniform, kept_shares, model_wide
from kvevict.policies.defensive import DefensiveKV
from kvevict.policies.expected import ExpectedAttention
from kvevict.policies.keys import KeyDiff, KeyNorm
from kvevict.policies.kvzip import KVzip
from kvevict.policies.learned import Learned
from kvevict.policies.learned_kv import LearnedKV
from kvevict.policies.mixture import Hybrid
from kvevict.policies.observed import Observed
from kvevict.policies.order import LRU, Random, Recency
from kvevict.policies.scorer import Scorer
from kvevict.policies.shares import Shares
from kvevict.policies.tracker import Tracker

# By the names that the command line takes. Learned is not among them: it needs trained weights.
NAMED: dict[str, Policy] = {
    "keydiff": KeyDiff(),
    "keynorm": KeyNorm(),
    "attention": AttentionMass(),
    "snapkv": SnapKV(),
    "tova": TOVA(),
    "recency": Recency(),
    "lru": LRU(),
    "hybrid": Hybrid(),
    "random": Random(),
}

# By name as well, where a model's weights are at hand: EvictingCache fills them in.
OF_MODEL: dict[str, Policy] = {
    "expected-attention": ExpectedAttention(),
    "defensivekv": DefensiveKV(),
    "criticalkv": SnapKV(value_norms="output", heads="adaptive"),
}

# Far attention: the most that a token draws from any query at least 32 tokens later.
FAR = AttentionMass(reduce="max", normalize=None, min_distance=32)

# The best of what bench/quality.py has tried (see the README): the last query's attention and KeyDiff in equal parts by
# rank, and one selection for all heads of a layer.
RECOMMENDED = Hybrid(parts=((0.5, TOVA()), (0.5, KeyDiff())), heads="shared")

# Its scores where each head keeps a number of its own: with `Fixed` shares, which bring more than any scorer does
# (`kvevict eval`). Where there is a LearnedKV for the model, that is better still.
RECOMMENDED_FOR_SHARES = replace(RECOMMENDED, heads="each")

__all__ = [
    "FAR",
    "LRU",
    "NAMED",
    "OF_MODEL",
    "RECOMMENDED",
    "RECOMMENDED_FOR_SHARES",
    "TOVA",
    "AttentionMass",
    "Budget",
    "DefensiveKV",
    "ExpectedAttention",
    "Fixed",
    "Hybrid",
    "KVzip",
    "KeyDiff",
    "KeyNorm",
    "LayerWide",
    "Learned",
    "LearnedKV",
    "ModelWide",
    "Observed",
    "Policy",
    "Pyramid",
    "Random",
    "Recency",
    "Scorer",
    "Shares",
    "SnapKV",
    "Tracker",
    "Uniform",
    "kept_shares",
    "model_wide",
]
