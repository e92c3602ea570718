"""Mutual information of experts and values of tokens, from counts of pairs."""

import dataclasses

import numpy as np
from jaxtyping import Float64, Int64

from moejax.inspection.analysis.attributes import Attribute

# Larger tables are counted by sorting: slower, but in memory that the number of pairs bounds.
DENSE_CELLS = 2**24


@dataclasses.dataclass(frozen=True)
class Codes:
    """Values of tokens as `codes_T` in [0, size)."""

    codes_T: Int64[np.ndarray, "T"]
    size: int

    @classmethod
    def from_values(cls, values_T: np.ndarray) -> "Codes":
        """Returns codes that are equal where values are."""
        found, codes_T = np.unique(values_T, return_inverse=True)
        return cls(codes_T.astype(np.int64), len(found))

    def joined(self, other: "Codes") -> "Codes":
        """Returns codes that are equal where both codes are."""
        pair_T = self.codes_T * other.size + other.codes_T
        return Codes.from_values(pair_T)

    def permuted(self, from_T: np.ndarray) -> "Codes":
        """Returns codes of which each token has that of another."""
        return Codes(self.codes_T[from_T], self.size)


class Measure:
    """Information about the experts of N layers, given a condition or none.

    Attributes:
      entropy_N: H(expert) of pairs.
      ceiling_N: the information of an attribute that decides a token's experts.
    """

    def __init__(self, experts_NTK: np.ndarray, num_experts: int, given: Attribute | None):
        self._pairs = [_Pairs(experts_TK, num_experts) for experts_TK in experts_NTK]
        self._condition = None
        if given is not None:
            self._condition = Codes.from_values(given.values_T)
        of_condition_N = self._of_codes(self._condition)
        entropy_N = [layer.entropy for layer in self._pairs]
        own_choice_N = [layer.own_choice() for layer in self._pairs]
        self._of_condition_N = of_condition_N
        self.entropy_N = np.array(entropy_N, np.float64)
        self.ceiling_N = self.entropy_N - np.array(own_choice_N, np.float64) - of_condition_N

    def information(self, values: Codes) -> Float64[np.ndarray, "N"]:
        """Returns I(expert; value | condition) by the chain rule, in bits."""
        joint = values
        if self._condition is not None:
            joint = values.joined(self._condition)
        return self._of_codes(joint) - self._of_condition_N

    def _of_codes(self, codes: Codes | None) -> np.ndarray:
        """Returns I(expert; codes); no codes hold no information."""
        if codes is None:
            return np.zeros(len(self._pairs))
        bits_N = [layer.information(codes) for layer in self._pairs]
        return np.array(bits_N, np.float64)


class _Pairs:
    """The (token, choice) pairs of one layer."""

    def __init__(self, experts_TK: np.ndarray, num_experts: int):
        self.num_experts = num_experts
        self.is_choice_TK = experts_TK < num_experts
        self.experts_TK = experts_TK.astype(np.int64)
        self.is_full = bool(self.is_choice_TK.all())
        self.visits_T = self.is_choice_TK.sum(axis=1)
        visited = self.experts_TK[self.is_choice_TK]
        self.entropy = _entropy(np.bincount(visited))  # H(expert)

    def own_choice(self) -> float:
        """Returns H(expert | token of the text): log2 of its number of choices, over pairs."""
        visits_t = self.visits_T[self.visits_T > 0]
        bits = (visits_t * np.log2(visits_t)).sum()
        return float(bits / max(visits_t.sum(), 1))

    def information(self, values: Codes) -> float:
        """Returns I(expert; value), from the entropies of both and of the pair."""
        if values.size < 2:
            return 0.0
        counts = np.bincount(values.codes_T, weights=self.visits_T)
        joint_counts = self._joint_counts(values)
        return self.entropy + _entropy(counts) - _entropy(joint_counts)

    def _joint_counts(self, values: Codes) -> np.ndarray:
        """Returns how often each pair of value and expert occurs; zeros may be missing."""
        first_cell_T = values.codes_T * self.num_experts
        cells_TK = first_cell_T[:, None] + self.experts_TK
        cells = cells_TK.ravel() if self.is_full else cells_TK[self.is_choice_TK]
        num_cells = values.size * self.num_experts
        if num_cells <= DENSE_CELLS:
            return np.bincount(cells)
        _, counts = np.unique(cells, return_counts=True)
        return counts


def _entropy(counts: np.ndarray) -> float:
    """Returns the entropy of relative frequencies, in bits."""
    counts = counts[counts > 0]
    total = counts.sum()
    if not total:
        return 0.0
    weighted = counts * np.log2(counts)
    bits = np.log2(total) - weighted.sum() / total
    return float(bits)
