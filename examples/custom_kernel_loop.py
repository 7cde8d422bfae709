"""The ops in an engine of your own: a decode loop over buffers that were allocated once, without transformers.

    python examples/custom_kernel_loop.py [--steps 200] [--budget 96]

Each layer has K and V for `budget + interval` tokens. When they are full, the layer keeps the best `budget`: half by
the attention that each token drew so far, half by KeyDiff. Nothing is read back to the host. The model is made of
random weights: the loop is what is shown. On a machine without a GPU the ops run in plain torch. Needs kvevict alone.
"""

import argparse

import torch

from kvevict import ops

LAYERS, QUERY_HEADS, HEADS, D = 2, 8, 4, 64


class Layer:
    """One attention layer, and its part of the cache."""

    def __init__(self, capacity: int, device: str, dtype: torch.dtype) -> None:
        width = QUERY_HEADS * D
        self.project = torch.randn(width, (QUERY_HEADS + 2 * HEADS) * D, device=device, dtype=dtype) / width**0.5
        self.keys, self.values = (torch.zeros(1, HEADS, capacity, D, device=device, dtype=dtype) for _ in range(2))
        self.mass = torch.zeros(1, HEADS, capacity, device=device)  # float32: the attention that each token drew
        self.held = 0

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """One token, [1, QUERY_HEADS * D], through the layer."""
        q, k, v = (x @ self.project).view(1, -1, 1, D).split([QUERY_HEADS, HEADS, HEADS], 1)
        self.keys[:, :, self.held] = k[:, :, 0]
        self.values[:, :, self.held] = v[:, :, 0]
        self.mass[:, :, self.held] = 0
        self.held += 1
        keys, values, mass = (t[:, :, : self.held] for t in (self.keys, self.values, self.mass))
        return ops.decode_attention(q, keys, values, mass=mass).flatten(1)

    def evict(self, budget: int) -> None:
        """Score, select, and move what is kept to the front of the same memory."""
        keys, values, mass = (t[:, :, : self.held] for t in (self.keys, self.values, self.mass))
        scores = ops.combine_scores([(0.5, mass), (0.5, ops.keydiff_scores(keys))])
        kept = ops.topk_indices(scores, budget, sink=4, recent=16)  # exactly so many, ties to the lower index
        ops.compact(keys, values, kept)
        mass[:, :, :budget] = mass.gather(2, kept)
        self.held = budget


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="tokens to decode")
    parser.add_argument("--budget", type=int, default=96, help="tokens that a layer keeps")
    parser.add_argument("--interval", type=int, default=32, help="tokens between two evictions")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layers = [Layer(options.budget + options.interval, device, dtype) for _ in range(LAYERS)]
    places, evictions = {layer.keys.data_ptr() for layer in layers}, 0
    for _ in range(options.steps):
        x = torch.randn(1, QUERY_HEADS * D, device=device, dtype=dtype)  # an engine embeds the last token here
        for layer in layers:
            x = x + layer.step(x)
        if layers[0].held == options.budget + options.interval:
            for layer in layers:
                layer.evict(options.budget)
            evictions += 1
    assert places == {layer.keys.data_ptr() for layer in layers}  # nothing was allocated anew
    print(f"{options.steps} tokens, {evictions} evictions, {layers[0].held} held by each layer; {x.norm():.3f}")


if __name__ == "__main__":
    main()
