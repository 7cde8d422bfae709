"""What the plugin is told, and what it cannot do."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from kvevict import validate
from kvevict.policies import NAMED, RECOMMENDED, Hybrid, LearnedKV, Policy

VARIABLE = "KVEVICT_VLLM"
LEARNED = "learned"
# All that read keys, values, or the queries of one step.
POLICIES: dict[str, Policy] = {"recommended": RECOMMENDED} | {
    name: policy for name, policy in NAMED.items() if policy.needs <= {"queries", "values"}
}


def refuse(message: str) -> NoReturn:
    """End an engine's start with one line.

    vLLM prints an exception of a process that it has started under several tracebacks and goes on with its own; what
    such a process exits with it leaves as it is.

    Raises:
        ValueError, SystemExit: always.
    """
    if multiprocessing.parent_process() is not None:
        raise SystemExit(f"kvevict: {message}")
    raise ValueError(message)


@dataclass(frozen=True)
class Settings:
    """`additional_config["kvevict"]`.

    Attributes:
        policy: a key of POLICIES, or "learned": a LearnedKV by rank, one selection for the heads of a layer. Policies
            that read what earlier steps noted are not served.
        budget: tokens that each layer and KV head of a request holds, at least.
        interval: tokens beyond the budget before a request is cut, each time; rounded up to whole blocks.
        prefix: the first so many tokens, rounded up to whole blocks, are never evicted, and `budget` counts what lies
            behind them: a system prompt that all requests share.
        sink, recent: protected tokens, as in kvevict.policies; None: the policy's own. sink counts from the prefix on.
        scorer: of "learned": what `kvevict train` saved; None: what the package carries for the model.
    """

    policy: str
    budget: int
    interval: int = 64
    prefix: int = 0
    sink: int | None = None
    recent: int | None = None
    scorer: str | None = None

    def __post_init__(self) -> None:
        validate.one_of("policy", self.policy, (*POLICIES, LEARNED))
        validate.integer("budget", self.budget, 1)
        validate.integer("interval", self.interval, 0)
        validate.integer("prefix", self.prefix, 0)
        if self.scorer is not None and self.policy != LEARNED:
            raise ValueError(f"scorer is {self.scorer!r}: expected None, as policy is {self.policy!r}, not {LEARNED!r}")
        protection = POLICIES.get(self.policy, RECOMMENDED)
        sink, recent = replace(protection, **self._protection()).protected
        if sink + recent > self.budget:
            raise ValueError(f"budget is {self.budget}: expected at least the {sink} + {recent} protected tokens")

    def _protection(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("sink", "recent") if getattr(self, name) is not None}

    @property
    def reads_queries(self) -> bool:
        return self.policy != LEARNED and "queries" in POLICIES[self.policy].needs

    def build(self, model_config: Any = None) -> Policy:
        """The policy object; model_config: vLLM's, which "learned" needs.

        Raises:
            ValueError: there is no scorer for the model.
        """
        if self.policy != LEARNED:
            return replace(POLICIES[self.policy], **self._protection())
        config = model_config.hf_config
        scorer = LearnedKV.of_model(config) if self.scorer is None else LearnedKV.load(self.scorer)
        text = config.get_text_config(decoder=True)
        heads, head_dim = model_config.get_total_num_kv_heads(), model_config.get_head_size()
        scorer.check(config, text.num_hidden_layers, heads, head_dim)
        return Hybrid(parts=((1.0, scorer),), heads="shared", **self._protection())

    @classmethod
    def read(cls, vllm_config: Any) -> Settings | None:
        """From additional_config, else the environment; None: the plugin is off.

        Raises:
            ValueError, TypeError, SystemExit: not such settings; an engine whose features cannot be combined with
                eviction: see `refuse`.
        """
        extra = vllm_config.additional_config
        given = extra.get("kvevict") if isinstance(extra, dict) else None
        try:
            settings = cls._parsed(given)
        except (TypeError, ValueError) as error:
            refuse(str(error))
        if settings is not None:
            settings._refuse(vllm_config)
        return settings

    @classmethod
    def _parsed(cls, given: Any) -> Settings | None:
        if given is None:
            text = os.environ.get(VARIABLE)
            if not text:
                return None
            try:
                given = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{VARIABLE} is {text!r}: expected JSON ({error})") from error
        names = list(cls.__dataclass_fields__)
        if not isinstance(given, dict) or not {"policy", "budget"} <= given.keys() <= set(names):
            raise ValueError(f"kvevict is {given!r}: expected a dict with policy, budget and at most {names[2:]}")
        return cls(**given)

    def _refuse(self, config: Any) -> None:
        parallel = config.parallel_config
        mm_prefix = getattr(config.model_config, "is_mm_prefix_lm", False)
        reasons = {
            "no speculative_config (tokens that are taken back may have pushed others out)": (
                config.speculative_config is not None
            ),
            "pipeline_parallel_size=1": parallel.pipeline_parallel_size > 1,
            "decode_context_parallel_size=1 and prefill_context_parallel_size=1": (
                parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1
            ),
            "no kv_transfer_config": config.kv_transfer_config is not None,
            "enable_dbo=False and ubatch_size=0": getattr(parallel, "use_ubatching", False),
            "kv_sharing_fast_prefill=False": getattr(config.cache_config, "kv_sharing_fast_prefill", False),
            "a model whose images are no prefix of their own (their ranges go by slots, which change)": mm_prefix,
        }
        wrong = [expected for expected, found in reasons.items() if found]
        if wrong:
            refuse(f"cannot evict in this engine: expected {'; '.join(wrong)}")
