"""Compacting towards the tail: which slots of a request are empty, as a function of how many tokens it has computed."""

from __future__ import annotations

from typing import Any


def skip(computed: Any, budget: int, interval: int, block_size: int) -> Any:
    """How many of a request's slots hold no token any more once `computed` tokens are: an int, or a tensor of them.

    0 up to budget + interval; then the largest whole number of blocks that leaves at least `budget` tokens. The tokens
    that are kept lie in the slots behind, [skip, computed). It depends on nothing else, so an engine's scheduler, which
    frees the blocks, and its worker, which moves the tokens, agree without a message; a preempted request begins anew
    with both.
    """
    return (computed - budget) // block_size * block_size * (computed > budget + interval)
