"""Information in bits of an attribute of tokens about their experts, and how much is chance.

For one layer, every token and each of its choices is a pair (attribute x, expert e), and

  I(expert; attribute) = sum over x, e of p(x, e) log2(p(x, e) / (p(x) p(e)))

with the pairs' relative frequencies for p. This plug-in estimate is too high, the more so the more
values x has: with 32,000 token ids, routing at random shows more than a bit. So the attribute is
also permuted over tokens, which keeps its distribution and each token's set of experts but breaks
their relation; what remains is chance, and the excess over it is what the attribute tells.

"Identity more than topic" is a question about two attributes that go together, for domains differ
in their words. It is answered by conditional information: I(expert; token | domain) against
I(expert; domain | token), which is what the domain still tells of the experts of one and the same
token. Its chance level permutes the attribute among tokens of equal condition.

Tokens of one document are not independent, so an attribute that is constant in documents, such as
the domain, beats a permutation over tokens even if each document merely has a taste of its own.
The stricter test permutes the values over documents (`over="documents"`). Documents may only trade
places if they are of one size: where one domain has few long documents and another
many short ones, a permutation would change how much text each domain has, and chance would seem
low. So this test takes the same number of tokens of each document, drawn at random. With a
condition that goes together with the attribute it leans to the side of chance: permuted values
meet more values of the condition.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float64, Int

from moejax.inspection.analysis.attributes import Attribute
from moejax.inspection.analysis.mutual_information import Codes, Measure
from moejax.seeds import check_seed

COLUMNS = ("information", "baseline", "spread", "excess", "share", "adjusted", "entropy", "ceiling")
OVER = ("tokens", "documents")


class InformationError(ValueError):
    """Arrays that information cannot be computed from."""


@dataclasses.dataclass(frozen=True)
class Information:
    """What one attribute tells about the experts of N layers; all in bits.

    Attributes:
      attribute: its name.
      given: name of the condition, or None.
      over: what the baseline permuted, "tokens" or "documents".
      information_N: I(expert; attribute), or I(expert; attribute | condition); the
        plug-in estimate.
      baseline_N: its mean over permutations.
      spread_N: its standard deviation over them.
      entropy_N: H(expert) of pairs; at most log2 E.
      ceiling_N: the information if routing were a function of the attribute (and the condition):
        H(expert) less the mean of log2(number of the token's choices), for which of a token's
        experts a pair has stays open; with a condition, less I(expert; condition) too.
    """

    attribute: str
    given: str | None
    over: str
    information_N: Float64[np.ndarray, "N"]
    baseline_N: Float64[np.ndarray, "N"]
    spread_N: Float64[np.ndarray, "N"]
    entropy_N: Float64[np.ndarray, "N"]
    ceiling_N: Float64[np.ndarray, "N"]

    @property
    def excess_N(self) -> Float64[np.ndarray, "N"]:
        """Information above chance, bits."""
        return self.information_N - self.baseline_N

    @property
    def share_N(self) -> Float64[np.ndarray, "N"]:
        """The part of H(expert) that the attribute explains above chance.

        Below 1 even where routing is a function of the attribute: with K choices for each token by
        (H - log2 K) / H, and by what chance alone would show. `adjusted_N` corrects for both.
        """
        return ratio_or_zero(self.excess_N, self.entropy_N)

    @property
    def adjusted_N(self) -> Float64[np.ndarray, "N"]:
        """0 at chance, 1 where routing is a function of the attribute: adjusted mutual information.

        (I - baseline) / (ceiling - baseline); Vinh et al. 2010, "Information Theoretic Measures for
        Clusterings Comparison". Unsteady where chance alone comes near the ceiling, as with
        attributes of a few tokens per value.
        """
        return ratio_or_zero(self.excess_N, self.ceiling_N - self.baseline_N)


def ratio_or_zero(part_N: np.ndarray, all_N: np.ndarray) -> np.ndarray:
    """Returns part over all, 0 where all is 0."""
    zeros_N = np.zeros_like(part_N)
    return np.divide(part_N, all_N, out=zeros_N, where=all_N > 1e-9)


def expert_information(
    attribute: Attribute,
    experts_NTK: Int[np.ndarray, "N T K"],
    num_experts: int,
    *,
    given: Attribute | None = None,
    over: str = "tokens",
    documents_T: Int[np.ndarray, "T"] | None = None,
    tokens_per_document: int | None = None,
    num_permutations: int = 10,
    seed: int = 0,
) -> Information:
    """Measures what an attribute tells about the experts of each layer.

    Args:
      attribute: of each token.
      experts_NTK: in [0, num_experts], num_experts for no expert.
      num_experts: E.
      given: a condition: what the attribute tells of tokens that agree in this one.
      over: the baseline permutes the attribute over "tokens", with a condition among those that
        agree in it; or over "documents", for an attribute that is constant in each. The latter
        does not move the condition.
      documents_T: the document of each token, in [0, ...); for `over="documents"`.
      tokens_per_document: for the same: how many tokens of each are drawn, shorter ones left out;
        None: as many as the shortest has. All numbers are of those tokens.
      num_permutations: at least 2.
      seed: of the permutations, which are the same for all layers, and of that draw.

    Raises:
      InformationError: arrays of other lengths or ids out of range, too few permutations, or
        documents that are missing, too short, or in which the attribute varies.
    """
    for one in (attribute, given):
        _check_length(one, experts_NTK.shape[1])
    _check_experts(experts_NTK, num_experts)
    _check_baseline(over, num_permutations)
    check_seed("seed", seed)
    rng = np.random.default_rng(seed)
    if over == "documents":
        documents_T = _check_documents(attribute, documents_T)
        drawn_t = _draw_equally(documents_T, tokens_per_document, rng)
        attribute = attribute.at(drawn_t)
        given = None if given is None else given.at(drawn_t)
        experts_NTK = experts_NTK[:, drawn_t]
        permute = _over_documents(documents_T[drawn_t])
    else:
        permute = _over_tokens(attribute, given)
    measure = Measure(experts_NTK, num_experts, given)
    values = Codes.from_values(attribute.values_T)
    chance = []
    for _ in range(num_permutations):
        permuted = values.permuted(permute(rng))
        chance.append(measure.information(permuted))
    chance_PN = np.stack(chance)
    return Information(
        attribute=attribute.name,
        given=None if given is None else given.name,
        over=over,
        information_N=measure.information(values),
        baseline_N=chance_PN.mean(axis=0),
        spread_N=chance_PN.std(axis=0, ddof=1),
        entropy_N=measure.entropy_N,
        ceiling_N=measure.ceiling_N,
    )


def information_table(
    results: Sequence[Information],
    layers: Sequence[int],
) -> list[dict[str, str | int | float]]:
    """Returns rows of attributes by layers, for a table or a file.

    Args:
      results: of the same model.
      layers: the model layer of each MoE layer.

    Returns:
      One dict for each result and layer: attribute, given ("" for none), over, layer, and in bits
      information, baseline, spread, excess, entropy and ceiling; and share and adjusted.
    """
    rows = []
    for result in results:
        for n, layer in enumerate(layers):
            row: dict[str, str | int | float] = {
                "attribute": result.attribute,
                "given": result.given or "",
                "over": result.over,
                "layer": int(layer),
            }
            for column in COLUMNS:
                values_N = getattr(result, f"{column}_N")
                row[column] = float(values_N[n])
            rows.append(row)
    return rows


Permutation = Callable[[np.random.Generator], np.ndarray]
"""Draws, for each token, the token that it takes its value from."""


def _over_tokens(attribute: Attribute, condition: Attribute | None) -> Permutation:
    """Permutes tokens, with a condition among those that agree in it."""
    if condition is None:
        codes_T = np.zeros(attribute.values_T.size, np.int64)
    else:
        codes_T = Codes.from_values(condition.values_T).codes_T
    places_T = np.argsort(codes_T, kind="stable")

    def permute(rng: np.random.Generator) -> np.ndarray:
        random_T = rng.random(places_T.size)
        from_T = np.empty_like(places_T)
        from_T[places_T] = np.lexsort((random_T, codes_T))
        return from_T

    return permute


def _over_documents(documents_T: np.ndarray) -> Permutation:
    """Permutes documents, each named by its first token."""
    _, first_d, document_T = np.unique(documents_T, return_index=True, return_inverse=True)

    def permute(rng: np.random.Generator) -> np.ndarray:
        permuted_d = rng.permutation(first_d)
        return permuted_d[document_T]

    return permute


def _draw_equally(
    documents_T: np.ndarray,
    number: int | None,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draws the same number of tokens of each document.

    Args:
      documents_T: the document of each token.
      number: of tokens; documents that have fewer are left out. None: as many as the shortest has.
      rng: of the draw.

    Returns:
      Increasing indices of tokens.
    """
    found_d, document_T, sizes_d = np.unique(documents_T, return_inverse=True, return_counts=True)
    if number is None:
        number = int(sizes_d.min(initial=documents_T.size))
    is_long_d = sizes_d >= number
    if number < 1 or is_long_d.sum() < 2:
        raise InformationError(
            f"tokens_per_document={number} must be at least 1, and two documents must have that "
            f"many; the longest of {len(found_d)} has {sizes_d.max(initial=0)}"
        )
    # By document, and at random within each; the rank counts from 0 in each document.
    random_T = rng.random(documents_T.size)
    order_T = np.lexsort((random_T, document_T))
    starts_d = np.cumsum(sizes_d) - sizes_d
    start_T = np.repeat(starts_d, sizes_d)
    rank_T = np.arange(documents_T.size) - start_T
    document_in_order_T = document_T[order_T]
    is_drawn_T = (rank_T < number) & is_long_d[document_in_order_T]
    drawn_t = order_T[is_drawn_T]
    return np.sort(drawn_t)


def _check_documents(attribute: Attribute, documents_T: np.ndarray | None) -> np.ndarray:
    """Returns the documents, and raises unless each has one value of the attribute."""
    if documents_T is None or (documents_T.size and documents_T.min() < 0):
        raise InformationError(
            'over="documents" needs documents_T, the document of every token; pass it, without '
            'tokens of unknown documents, or use over="tokens"'
        )
    _, first_d, document_T = np.unique(documents_T, return_index=True, return_inverse=True)
    value_d = attribute.values_T[first_d]
    if np.any(value_d[document_T] != attribute.values_T):
        raise InformationError(
            'over="documents" needs an attribute that is constant in each document, and '
            f'{attribute.name!r} is not; use over="tokens"'
        )
    return documents_T


def _check_length(attribute: Attribute | None, num_tokens: int) -> None:
    """Raises for an attribute of other tokens."""
    if attribute is not None and attribute.values_T.size != num_tokens:
        raise InformationError(
            f"attribute {attribute.name!r} has {attribute.values_T.size} values and experts_NTK "
            f"{num_tokens} tokens; take both from the same tokens"
        )


def _check_experts(experts_NTK: np.ndarray, num_experts: int) -> None:
    """Raises for an expert id out of range."""
    if not experts_NTK.size:
        return
    low, high = experts_NTK.min(), experts_NTK.max()
    if low < 0 or high > num_experts:
        raise InformationError(
            f"experts_NTK has values from {low} to {high}; they must be in [0, {num_experts}]"
        )


def _check_baseline(over: str, num_permutations: int) -> None:
    """Raises for a baseline that there is not."""
    if over not in OVER:
        raise InformationError(f"over={over!r} must be one of {', '.join(OVER)}")
    if num_permutations < 2:
        raise InformationError(
            f"num_permutations={num_permutations} must be at least 2, for a standard deviation"
        )
