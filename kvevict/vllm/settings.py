"""What the plugin is told, and what it cannot do."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from typing import Any

from kvevict import validate
from kvevict.policies import NAMED, RECOMMENDED, Policy

VARIABLE = "KVEVICT_VLLM"
POLICIES: dict[str, Policy] = {"recommended": RECOMMENDED} | {
    name: policy for name, policy in NAMED.items() if not policy.needs - {"queries"} and policy.window <= 1
}


@dataclass(frozen=True)
class Settings:
    """`additional_config["kvevict"]`.

    Attributes:
        policy: a key of POLICIES. Policies that read more than keys and the last query are not served.
        budget: tokens that each layer and KV head of a request holds, at least.
        interval: tokens beyond the budget before a request is cut, each time; rounded up to whole blocks.
        sink, recent: protected tokens, as in kvevict.policies; None: the policy's own.
    """

    policy: str
    budget: int
    interval: int = 64
    sink: int | None = None
    recent: int | None = None

    def __post_init__(self) -> None:
        validate.one_of("policy", self.policy, tuple(POLICIES))
        validate.integer("budget", self.budget, 1)
        validate.integer("interval", self.interval, 0)
        sink, recent = self.build().protected
        if sink + recent > self.budget:
            raise ValueError(f"budget is {self.budget}: expected at least the {sink} + {recent} protected tokens")

    def build(self) -> Policy:
        """The policy object."""
        given = {name: getattr(self, name) for name in ("sink", "recent") if getattr(self, name) is not None}
        return replace(POLICIES[self.policy], **given)

    @classmethod
    def read(cls, vllm_config: Any) -> Settings | None:
        """From additional_config, else the environment; None: the plugin is off.

        Raises:
            ValueError, TypeError: not such settings; an engine whose features cannot be combined with eviction.
        """
        extra = vllm_config.additional_config
        given = extra.get("kvevict") if isinstance(extra, dict) else None
        if given is None:
            text = os.environ.get(VARIABLE)
            if not text:
                return None
            try:
                given = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{VARIABLE} is {text!r}: expected JSON ({error})") from error
        if not isinstance(given, dict) or not {"policy", "budget"} <= given.keys() <= set(cls.__dataclass_fields__):
            raise ValueError(
                f"kvevict is {given!r}: expected a dict with policy, budget and at most interval, sink, recent"
            )
        settings = cls(**given)
        settings._refuse(vllm_config)
        return settings

    def _refuse(self, config: Any) -> None:
        parallel = config.parallel_config
        reasons = {
            "no speculative decoding (tokens that are taken back may have pushed others out)": (
                config.speculative_config is not None
            ),
            "pipeline_parallel_size=1": parallel.pipeline_parallel_size > 1,
            "no context parallelism": (
                parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1
            ),
            "no KV transfer": config.kv_transfer_config is not None,
            f"a policy that selects per head, not {self.policy}, with tensor parallelism": (
                parallel.tensor_parallel_size > 1 and self.build().heads == "shared"
            ),
        }
        wrong = [expected for expected, found in reasons.items() if found]
        if wrong:
            raise ValueError(f"kvevict cannot evict in this engine yet: expected {'; '.join(wrong)}")
