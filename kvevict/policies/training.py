"""Weights of the learned scorers: ridge regression from sums, a small network by gradient descent, and how well either
ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvevict import ops

PATIENCE = 2  # epochs without a better held-out loss
BATCH = 256  # tokens


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors; ties take their mean rank."""
    ranks = [ops.combine_scores([(1.0, x.float()[None, None])])[0, 0].double() for x in (a, b)]
    centred = [rank - rank.mean() for rank in ranks]
    return float(centred[0] @ centred[1] / (centred[0].norm() * centred[1].norm()).clamp(min=1e-12))


class Ridge:
    """A ridge regression of targets y on features x, standardised, for every head; all that is kept of what it has seen
    are sums, and these add up."""

    def __init__(self) -> None:
        self.square: Any = 0.0  # Σ xxᵀ, x with a 1 behind: [H or 1, F + 1, F + 1]
        self.product: Any = 0.0  # Σ xy: [H, F + 1]

    def add(self, features: Tensor, target: Tensor) -> None:
        """Rows [H, N, F], or [1, N, F] where heads have the same, and their targets [H, N]."""
        rows = F.pad(features, (0, 1), value=1.0).double()
        self.square = self.square + rows.mT @ rows
        self.product = self.product + (target.double()[:, None] @ rows)[:, 0]

    def weights(self, penalty: float) -> Tensor:
        """[H, F + 1] float32, the constant last."""
        count = self.square[:, -1:, -1:]
        mean, mean_target = self.square[:, :-1, -1:] / count, self.product[:, -1:] / count[..., 0]
        covariance = self.square[:, :-1, :-1] / count - mean @ mean.mT
        with_target = self.product[:, :-1] / count[..., 0] - mean[..., 0] * mean_target
        deviation = covariance.diagonal(dim1=1, dim2=2).clamp(min=1e-10).sqrt()
        scaled = covariance / deviation[:, :, None] / deviation[:, None]
        scaled = scaled + penalty * torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device)
        wanted = (with_target / deviation)[..., None]
        slope = torch.linalg.solve(scaled.expand(len(wanted), -1, -1), wanted)[..., 0] / deviation
        constant = mean_target - (mean[..., 0] * slope).sum(-1, keepdim=True)
        return torch.cat([slope, constant], -1).float()


@torch.enable_grad()
def network(
    features: Tensor, target: Tensor, held_features: Tensor, held_target: Tensor, epochs: int, seed: int = 0
) -> tuple[Tensor, ...]:
    """(W1 [N, F], b1 [N], W2 [H, N], b2 [H]) of F/2 hidden units, by least squares, AdamW, from the epoch that fits the
    held-out rows best.

    Args:
        features, target: [T, F] and [H, T]; held_features, held_target likewise.
        epochs: passes at most; it stops after PATIENCE without a better one.
        seed: of the first weights and the order of the rows.
    """
    device, width = features.device, features.shape[1]
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, len(target))).to(device)
    torch.set_rng_state(state)
    mean, deviation = target.mean(1), target.std(1).clamp(min=1e-6)
    wanted, held_wanted = (((x.T - mean) / deviation) for x in (target, held_target))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
    shuffle = torch.Generator().manual_seed(seed)
    best, best_state, since = float("inf"), net.state_dict(), 0
    for _ in range(epochs):
        for rows in torch.randperm(len(features), generator=shuffle).to(device).split(BATCH):
            loss = F.mse_loss(net(features[rows]), wanted[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            held = F.mse_loss(net(held_features), held_wanted).item()
        since += 1
        if held < best:
            best, since = held, 0
            best_state = {name: value.clone() for name, value in net.state_dict().items()}
        if since >= PATIENCE:
            break
    w1, b1, w2, b2 = (best_state[name] for name in ("0.weight", "0.bias", "2.weight", "2.bias"))
    return w1, b1, w2 * deviation[:, None], b2 * deviation + mean
