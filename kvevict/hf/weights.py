"""What policies read of a model itself: RoPE's angles, and what its attention multiplies values by."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvevict.hf import rotary
from kvevict.policies import Policy


def bound(policy: Policy, model: Any) -> Policy:
    """The policy with the fields filled in that hold weights of the model.

    Raises:
        ValueError: there is only a config; the model has them not, or otherwise than Llama has.
    """
    if not policy.unbound:
        return policy
    if not hasattr(model, "modules"):
        raise ValueError(
            f"model is its config: expected the model itself, whose {', '.join(sorted(policy.unbound))} "
            f"{type(policy).__name__} reads"
        )
    known = {"rotary": rotary.inv_freq, "output": output_weights}
    return policy.bound(**{name: known[name](model) for name in policy.unbound})


def output_weights(model: Any) -> tuple[Tensor | None, ...]:
    """W_O [M, Hq · Dv] of every layer, by its index; None where a layer has none. Views, not copies.

    Raises:
        ValueError: no layer has an `o_proj` with a plain weight.
    """
    found: dict[int, Tensor] = {}
    for module in model.modules():
        weight = getattr(getattr(module, "o_proj", None), "weight", None)
        if hasattr(module, "layer_idx") and isinstance(weight, Tensor) and weight.ndim == 2:
            if weight.is_floating_point():
                found[module.layer_idx] = weight.detach()
    if not found:
        raise ValueError(f"{type(model).__name__} has no o_proj of floating point in its attention: expected Llama's")
    return tuple(found.get(i) for i in range(max(found) + 1))
