"""RoPE in plain torch, as Llama has it: of a vector's first R elements, j and j + R/2 are turned as a pair."""

from __future__ import annotations

import torch
from torch import Tensor


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Vectors [..., D] with their pairs turned by the angles of these cosines and sines [..., R/2]; or scaled as well,
    where they are means over angles."""
    half = cosine.shape[-1]
    first, second, still = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, still], -1)


def before_rope(x: Tensor, inv_freq: Tensor, positions: Tensor | None = None) -> Tensor:
    """Keys or queries [..., S, D] turned back by their positions, [..., S]; None: 0 to S - 1."""
    if positions is None:
        positions = torch.arange(x.shape[-2], device=x.device)
    angle = positions[..., None] * inv_freq
    return turned(x, angle.cos(), -angle.sin())
