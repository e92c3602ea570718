"""How similar experts are: in their weights, and in their outputs for the same inputs.

Weights compare experts as they are stored. Experts are drawn each by itself, so their hidden units
have no common order, and flattened weights of two experts that compute the same may have a cosine
of 0: a high cosine shows similarity, a low one shows nothing. `unit_similarity` ignores the order
of hidden units but sees only one matrix. Outputs for the same inputs are the better comparison:
`output_cosine` asks whether they are the same, and `linear_cka` whether they are the same up to a
rotation and a scale.
"""

import numpy as np
from jaxtyping import Float, Float64

from moejax.inspection.analysis.expert_profile import ProfileError

MIN_TOKENS = 4  # of the unbiased estimate


def weight_cosine(weights_NE: Float[np.ndarray, "N E ..."]) -> Float64[np.ndarray, "N E E"]:
    """Returns the cosine between flattened weights, by layer; 0 where one of both is 0.

    Args:
      weights_NE: one kind of weights, such as `expert_weights(model)["down"]`.
    """
    return np.stack([_cosine(weights_E) for weights_E in weights_NE])


def unit_similarity(units_NEFD: Float[np.ndarray, "N E F D"]) -> Float64[np.ndarray, "N E E"]:
    """Returns the cosine between W^T W of experts, by layer.

    It does not depend on the order or the signs of hidden units, and is between 0 and 1:
    ||W_i W_j^T||^2 / (||W_i W_i^T|| ||W_j W_j^T||) in Frobenius norms, all products of hidden units
    of the one with those of the other. It is not 0 for unrelated matrices: with independent normal
    entries it is about F / (D + F).

    Args:
      units_NEFD: one vector for each hidden unit, such as "down" or, with its last two axes
        swapped, "up" of `expert_weights`.
    """
    products_NEDD = [_products(units_EFD.swapaxes(1, 2)) for units_EFD in units_NEFD]
    return np.stack([_cosine(products_EDD) for products_EDD in products_NEDD])


def output_cosine(outputs_ETD: Float[np.ndarray, "E T D"]) -> Float64[np.ndarray, "E E"]:
    """Returns the cosine between two experts' outputs for the same input, mean over inputs.

    0 for an output of 0.

    Args:
      outputs_ETD: of one layer, from `expert_outputs`.
    """
    num_experts, num_tokens, _ = outputs_ETD.shape
    total_EE = np.zeros((num_experts, num_experts))
    outputs_TED = outputs_ETD.swapaxes(0, 1)
    for outputs_ED in outputs_TED:
        total_EE += _cosine(outputs_ED)
    return total_EE / max(num_tokens, 1)


def linear_cka(outputs_ETD: Float[np.ndarray, "E T D"]) -> Float64[np.ndarray, "E E"]:
    """Returns the linear centred kernel alignment of experts' outputs for the same T inputs.

    1 for outputs that are equal up to a shift, a rotation and a scale, about 0 for unrelated ones
    (and at times a little below). Kornblith et al. 2019, with the unbiased estimate of HSIC of Song
    et al. 2012 as Nguyen et al. 2021 use it: the usual estimate tends to 1 for unrelated outputs
    too if there are fewer inputs than outputs have dimensions. Takes memory for E T^2 numbers.

    Args:
      outputs_ETD: of one layer, from `expert_outputs`.

    Returns:
      Symmetric, with 1 on the diagonal; 0 for an expert whose outputs are all equal.

    Raises:
      ProfileError: fewer than 4 inputs.
    """
    num_tokens = outputs_ETD.shape[1]
    if num_tokens < MIN_TOKENS:
        raise ProfileError(
            f"linear_cka has outputs for {num_tokens} tokens and needs at least {MIN_TOKENS}"
        )
    gram_ETT = _products(_centred(outputs_ETD))
    diagonal_T = np.arange(num_tokens)
    gram_ETT[:, diagonal_T, diagonal_T] = 0
    # The unbiased estimate centres rows and columns without the diagonal.
    sums_ET1 = gram_ETT.sum(axis=2, keepdims=True)
    means_ET1 = sums_ET1 / (num_tokens - 2)
    means_E1T = means_ET1.swapaxes(1, 2)
    gram_ETT -= means_ET1 + means_E1T
    total_E11 = means_ET1.sum(axis=1, keepdims=True)
    gram_ETT += total_E11 / (num_tokens - 1)
    gram_ETT[:, diagonal_T, diagonal_T] = 0
    return _cosine(gram_ETT)


def _centred(outputs_ETD: np.ndarray) -> np.ndarray:
    """Returns outputs less their mean over tokens, exactly 0 where all are equal.

    The mean changes nothing but the rounding.
    """
    is_same_ETD = outputs_ETD == outputs_ETD[:, :1]
    is_constant_E = is_same_ETD.all(axis=(1, 2))
    centred_ETD = outputs_ETD.astype(np.float64)
    centred_ETD -= centred_ETD.mean(axis=1, keepdims=True)
    centred_ETD[is_constant_E] = 0
    return centred_ETD


def _products(rows_EPQ: np.ndarray) -> np.ndarray:
    """Returns scalar products of the P rows of each of E matrices, `[E, P, P]`."""
    rows_EPQ = rows_EPQ.astype(np.float64)
    rows_EQP = rows_EPQ.swapaxes(1, 2)
    return rows_EPQ @ rows_EQP


def _cosine(vectors_E: np.ndarray) -> np.ndarray:
    """Returns cosines between E flattened arrays; 0 where one of both is 0."""
    num_experts = len(vectors_E)
    flat_EX = vectors_E.reshape(num_experts, -1)
    vectors_EX = flat_EX.astype(np.float64)
    norm_E1 = np.linalg.norm(vectors_EX, axis=1, keepdims=True)
    zeros_EX = np.zeros_like(vectors_EX)
    unit_EX = np.divide(vectors_EX, norm_E1, out=zeros_EX, where=norm_E1 > 0)
    return unit_EX @ unit_EX.T
