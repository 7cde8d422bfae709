"""Floors: the bytes that each op must move and the operations it must make, once, for benches, tests and the planner.

A floor counts what has to come from or go to memory; what an algorithm reads again from L2 is not in it. `heads` is the
number of rows: batch × KV heads. `element_size` is bytes per element of K and V.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class _Keys:
    heads: int
    S: int
    D: int
    element_size: int


@dataclass(frozen=True)
class KeydiffScores(_Keys):
    """K read twice, for the anchor and for the scores."""

    @property
    def bytes(self) -> float:
        return self.heads * self.S * (2 * self.D * self.element_size + 4)

    @property
    def operations(self) -> float:
        """Per key and dimension: a square and a sum, a scale and a sum (anchor); a square and a dot product (score)."""
        return self.heads * 8 * self.S * self.D


@dataclass(frozen=True)
class KvScores(_Keys):
    """K read twice, V once; an optional score beside costs what is written of it. RoPE's angles come from a table of
    the kernel's own, positions from the slots."""

    DV: int

    @property
    def bytes(self) -> float:
        return self.heads * self.S * ((2 * self.D + self.DV) * self.element_size + 4)

    @property
    def operations(self) -> float:
        """KeyDiff's and turning each pair back twice (sine and cosine 30, the turn 6); two products and a square."""
        return self.heads * self.S * (8 * self.D + 36 * self.D + 2 * self.D + 4 * self.DV)


@dataclass(frozen=True)
class KeyNorms(_Keys):
    """K read once."""

    @property
    def bytes(self) -> float:
        return self.heads * self.S * (self.D * self.element_size + 4)

    @property
    def operations(self) -> float:
        return self.heads * 2 * self.S * self.D


@dataclass(frozen=True)
class Selection:
    """`topk_indices`: the scores read once, n indices written."""

    heads: int
    S: int
    n: int

    @property
    def bytes(self) -> float:
        return self.heads * (4 * self.S + 8 * self.n)

    @property
    def operations(self) -> float:
        """A comparison per score."""
        return self.heads * self.S


@dataclass(frozen=True)
class Compaction:
    """`compact`: n indices read, the rows that move read and written."""

    heads: int
    n: int
    moved: float  # rows per head that do not stay where they are
    D: int
    DV: int
    element_size: int

    @property
    def bytes(self) -> float:
        return self.heads * (8 * self.n + 2 * self.moved * (self.D + self.DV) * self.element_size)

    @property
    def operations(self) -> float:
        return 0.0


@dataclass(frozen=True)
class KeydiffCompact(KeydiffScores):
    """`keydiff_compact` in two passes over K; scores and indices in between need not leave L2."""

    moved: float

    @property
    def bytes(self) -> float:
        """K read twice; the moved rows of K and V read and written."""
        return self.heads * (2 * self.S + 4 * self.moved) * self.D * self.element_size


@dataclass(frozen=True)
class WindowMass:
    """`attention_mass` of a window of W queries, without a given LSE: two passes over K."""

    heads: int
    group: int
    W: int
    S: int
    D: int
    element_size: int

    @property
    def bytes(self) -> float:
        """K read twice, the window's queries once, the mass written."""
        return self.heads * ((2 * self.S + self.group * self.W) * self.D * self.element_size + 4 * self.S)

    @property
    def operations(self) -> float:
        """Two products of queries and the keys they see, and an exponential and a sum per weight in each pass."""
        seen = self.W * self.S - self.W * (self.W - 1) / 2
        return self.heads * self.group * seen * (4 * self.D + 4)


@dataclass(frozen=True)
class DecodeAttention:
    """`decode_attention`; tracked: with mass and last_used."""

    heads: int
    group: int
    S: int
    D: int
    DV: int
    element_size: int
    tracked: bool

    @property
    def bytes(self) -> float:
        """K and V read once; to track, the logits written and read, mass read and written."""
        track = (8 * self.group + 8) * self.S if self.tracked else 0
        return self.heads * (self.S * (self.D + self.DV) * self.element_size + track)

    @property
    def operations(self) -> float:
        return self.heads * self.group * self.S * 2 * (self.D + self.DV)


@dataclass(frozen=True)
class MlpScores:
    """`mlp_scores`: hidden states [tokens, M] and weights [N, M] read once."""

    tokens: int
    M: int
    N: int
    element_size: int

    @property
    def bytes(self) -> float:
        return (self.tokens * self.M + self.N * (self.M + 2)) * self.element_size + 4 * self.tokens

    @property
    def operations(self) -> float:
        return self.tokens * self.N * (2 * self.M + 3)


@dataclass(frozen=True)
class QuadraticScores:
    """`quadratic_scores`: K and a float32 matrix and vector for each query head read once."""

    heads: int
    group: int
    S: int
    D: int
    element_size: int

    @property
    def bytes(self) -> float:
        matrices = self.group * 4 * (self.D**2 + self.D)
        return self.heads * (self.S * (self.D * self.element_size + 4 * self.group) + matrices)

    @property
    def operations(self) -> float:
        return self.heads * self.group * self.S * 2 * self.D * (self.D + 2)


@dataclass(frozen=True)
class ProjectedNorms:
    """`projected_norms`: V [heads, S, DV] and the weight's [M, DV] of each query head read once."""

    heads: int
    group: int
    S: int
    DV: int
    M: int
    element_size: int

    @property
    def bytes(self) -> float:
        return self.heads * (
            self.S * (self.DV * self.element_size + 4) + self.group * self.M * self.DV * self.element_size
        )

    @property
    def operations(self) -> float:
        return self.heads * self.group * self.S * self.M * (2 * self.DV + 2)


@dataclass(frozen=True)
class AttentionPeaks(WindowMass):
    """`attention_peaks` of W queries, without a given LSE: two passes over K, one for LSEs and sums, one for peaks."""
