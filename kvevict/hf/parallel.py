"""Tensor parallelism: a rank sees some of a layer's KV heads. What each head chooses for itself needs nothing of the
others; what they choose together needs the scores of all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kvevict import distributed
from kvevict.policies import Policy


def group_of(model: Any, group: Any) -> Any:
    """The process group whose ranks hold the model's KV heads, in the order of ranks: the given one, or that of the
    mesh on which transformers has spread the model; None where neither is there.

    Raises:
        TypeError, ValueError: no such group.
    """
    if group is None:
        mesh = getattr(model, "_device_mesh", None)
        if mesh is None or "tp" not in (mesh.mesh_dim_names or ()):
            return None
        group = mesh["tp"]
    return distributed.process_group(group)


def check(policy: Policy, seen: int, heads: int, group: Any, *, of_heads: bool, static: bool) -> bool:
    """Whether the policy's scores have to be averaged over the ranks of `group`. seen: KV heads here, of `heads`.

    Raises:
        ValueError: heads choose together, and the other ranks' cannot be reached, or such a choice is not served.
    """
    spread = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not spread or seen >= heads or not (of_heads or policy.heads == "shared"):
        return False
    here = f"this rank sees {seen} of the model's {heads} KV heads"
    if of_heads or static:
        what = "static is True" if static else "heads are to keep unequal numbers of tokens"
        raise ValueError(f"{what}, and {here}: expected a policy with heads='each' and a budget over layers")
    if group is None:
        raise ValueError(
            f"policy has heads 'shared', and {here}: expected group=, the process group whose ranks hold all of them"
        )
    if seen * group.size() != heads:
        raise ValueError(f"group has {group.size()} ranks, and {here}: expected {heads // seen} ranks")
    return True


def mean_over_heads(scores: Tensor, group: Any) -> Tensor:
    """[B, 1, S]: the mean of scores [B, H, S] over the heads of all ranks, added in the order of heads, as one process
    adds them. Two collectives: each rank is sent all heads of a part of the tokens, and gathers the parts' means."""
    (B, H, S), ranks = scores.shape, group.size()
    part = -(-S // ranks)
    sent = torch.nn.functional.pad(scores, (0, part * ranks - S)).unflatten(-1, (ranks, part)).permute(2, 0, 1, 3)
    got = torch.empty((ranks, B, H, part), dtype=scores.dtype, device=scores.device)
    dist.all_to_all_single(got, sent.contiguous(), group=group)
    total = torch.zeros((B, part), dtype=scores.dtype, device=scores.device)
    for rank in range(ranks):
        for h in range(H):
            total += got[rank, :, h]
    parts = [torch.empty_like(total) for _ in range(ranks)]
    dist.all_gather(parts, total / (ranks * H), group=group)
    return torch.cat(parts, -1)[:, None, :S].contiguous()
