"""Information: hand-worked tables, an oracle that counts, and routings whose cause is known."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from moejax.inspection.analysis import mutual_information
from moejax.inspection.analysis.attributes import Attribute
from moejax.inspection.analysis.information import (
    InformationError,
    expert_information,
    information_table,
)


def information_by_counting(values, experts_TK, num_experts, given=None):
    """I(expert; value | given), by its definition, from dictionaries of pairs."""
    strata = defaultdict(Counter)
    for t, choices in enumerate(experts_TK):
        for e in choices:
            if e < num_experts:
                strata[0 if given is None else given[t]][values[t], e] += 1
    total = sum(sum(pairs.values()) for pairs in strata.values())
    bits = 0.0
    for pairs in strata.values():
        n, of_value, of_expert = sum(pairs.values()), Counter(), Counter()
        for (x, e), count in pairs.items():
            of_value[x] += count
            of_expert[e] += count
        bits += (
            sum(c * math.log2(c * n / (of_value[x] * of_expert[e])) for (x, e), c in pairs.items())
            / total
        )
    return bits


def measure(values, experts, num_experts=2, given=None, **options):
    """The first layer's numbers for lists of values and experts."""
    given = None if given is None else Attribute("condition", np.asarray(given))
    experts_NTK = np.asarray(experts).reshape(1, len(values), -1)
    return expert_information(
        Attribute("value", np.asarray(values)), experts_NTK, num_experts, given=given, **options
    )


def test_an_attribute_that_decides_the_expert_tells_all_of_it():
    # Experts and values are 50:50 and go together: I = H(expert) = 1 bit, and nothing more
    # can be known.
    found = measure([3, 3, 7, 7] * 100, [0, 0, 1, 1] * 100)
    assert found.information_N == pytest.approx(1)
    assert found.entropy_N == pytest.approx(1)
    assert found.ceiling_N == pytest.approx(1)
    assert found.adjusted_N == pytest.approx(1)
    assert found.share_N == pytest.approx(1, abs=0.02)  # less what chance tells
    assert 0 < found.baseline_N[0] < 0.02


def test_a_table_of_two_by_two_is_that_worked_by_hand():
    # p(x, e) = 3/8, 1/8; 1/8, 3/8. Margins are 1/2, so I = 2 * 3/8 log2(3/2) + 2 * 1/8 log2(1/2)
    #   = 3/4 * 0.5849625 - 1/4 = 0.1887219 bits.
    found = measure([0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 0, 1, 1, 1])
    assert found.information_N == pytest.approx(0.1887219)


def test_an_independent_attribute_tells_nothing():
    found = measure([0, 0, 1, 1], [0, 1, 0, 1])
    assert found.information_N == pytest.approx(0, abs=1e-12)


def test_what_two_attributes_tell_together_needs_the_condition():
    # The expert is the exclusive or of value and condition: alone the value tells nothing, given
    # the condition all.
    values, given = [0, 0, 1, 1] * 50, [0, 1, 0, 1] * 50
    experts = np.bitwise_xor(values, given)
    assert measure(values, experts).information_N == pytest.approx(0, abs=1e-12)
    found = measure(values, experts, given=given)
    assert found.information_N == pytest.approx(1)
    assert found.ceiling_N == pytest.approx(1)


def test_with_two_choices_of_four_experts_one_bit_stays_open():
    # Value 0 goes to experts 0 and 1, value 1 to 2 and 3: H(expert) = 2, and of a token's two
    # experts a pair has one or the other: I = 2 - 1 = 1 = the ceiling. Half of the entropy is
    # explained, and all that can be.
    found = measure([0, 1] * 200, [[0, 1], [3, 2]] * 200, num_experts=4)
    assert found.information_N == pytest.approx(1)
    assert found.entropy_N == pytest.approx(2)
    assert found.ceiling_N == pytest.approx(1)
    assert found.adjusted_N == pytest.approx(1)
    assert found.share_N == pytest.approx(0.5, abs=0.02)


def random_case():
    """Skewed values, a condition, and experts that depend on both.

    Some tokens visit fewer than K = 3 experts.
    """
    rng = np.random.default_rng(0)
    values, given = rng.geometric(0.2, 600) - 5, rng.integers(0, 4, 600) * 100
    experts = (
        values[:, None] + given[:, None] // 100 * rng.integers(0, 2, (600, 1)) + np.arange(3)
    ) % 6
    return values, given, np.where(rng.random((600, 3)) < 0.2, 6, experts)


@pytest.mark.parametrize("cells", [2**24, 8], ids=["dense", "sorted"])
def test_information_equals_counting_with_dictionaries(monkeypatch, cells):
    monkeypatch.setattr(mutual_information, "DENSE_CELLS", cells)
    values, given, experts = random_case()
    found = measure(values, experts, 6)
    assert found.information_N == pytest.approx(information_by_counting(values, experts, 6))
    own = information_by_counting(np.arange(600), experts, 6)
    assert found.ceiling_N == pytest.approx(own)
    assert found.information_N < own
    found = measure(values, experts, 6, given=given)
    assert found.information_N == pytest.approx(information_by_counting(values, experts, 6, given))
    assert found.ceiling_N == pytest.approx(
        information_by_counting(np.arange(600), experts, 6, given)
    )


def test_layers_are_measured_each_by_itself_and_seeds_repeat():
    values, given, experts = random_case()
    layers = np.stack([experts, experts[::-1]])
    attribute, condition = Attribute("value", values), Attribute("condition", given)
    both = expert_information(attribute, layers, 6, given=condition, seed=3)
    for n, experts_TK in enumerate(layers):
        one = expert_information(attribute, experts_TK[None], 6, given=condition, seed=3)
        for field in ("information_N", "baseline_N", "spread_N", "entropy_N", "ceiling_N"):
            assert getattr(both, field)[n] == pytest.approx(getattr(one, field)[0])
    other = expert_information(attribute, layers, 6, given=condition, seed=4)
    assert not np.array_equal(both.baseline_N, other.baseline_N)


def test_permutations_within_a_condition_keep_what_the_condition_explains():
    # Value and expert both follow the condition and nothing else. Given it, the value tells nothing
    # above chance; a permutation over all tokens would give another chance level, that of 8 values
    # for each condition.
    rng = np.random.default_rng(1)
    given = rng.integers(0, 8, 4000)
    values = (given + (rng.random(4000) < 0.1)) % 8
    experts = (given + (rng.random(4000) < 0.3) * rng.integers(0, 8, 4000)) % 8
    found = measure(values, experts, 8, given=given, num_permutations=20)
    assert abs(found.excess_N[0]) < 4 * found.spread_N[0]
    # Chance: two values in each of 8 conditions and 8 experts, (2 - 1)(8 - 1) * 8 / (2 n
    # ln 2) bits.
    assert found.baseline_N == pytest.approx(7 * 8 / (2 * 4000 * math.log(2)), rel=0.25)
    assert measure(values, experts, 8).excess_N[0] > 100 * found.spread_N[0]


def test_documents_of_unequal_size_do_not_make_chance_seem_low():
    # Four long documents of one domain and sixteen short ones of another, each with an expert of
    # its own liking.
    rng = np.random.default_rng(5)
    sizes = np.array([4000] * 4 + [200] * 16)
    domain = np.repeat([0, 1], [4, 16])
    scores = []
    for _ in range(60):
        documents = np.repeat(np.arange(20), sizes)
        liking = rng.integers(0, 4, 20)[documents]
        experts = np.where(
            rng.random(documents.size) < 0.5, liking, rng.integers(0, 4, documents.size)
        )
        found = measure(
            domain[documents],
            experts,
            4,
            over="documents",
            documents_T=documents,
            num_permutations=20,
        )
        scores.append(found.excess_N[0] / found.spread_N[0])
    assert abs(np.mean(scores)) < 0.4  # with all tokens of each it is above 1


def test_a_document_test_takes_as_many_tokens_of_each_as_it_is_told():
    documents = np.repeat([0, 1, 2], [50, 300, 400])
    found = measure(
        documents % 2,
        documents % 2,
        over="documents",
        documents_T=documents,
        tokens_per_document=200,
    )
    # 200 tokens of documents 1 and 2 each: one bit, and a permutation of two documents tells
    # it as well.
    assert [found.entropy_N[0], found.information_N[0], found.baseline_N[0]] == pytest.approx(
        [1, 1, 1]
    )
    whole = measure(documents % 2, documents % 2, over="documents", documents_T=documents)
    assert whole.entropy_N[0] == pytest.approx(-math.log2(1 / 3) / 3 - 2 * math.log2(2 / 3) / 3)
    for number in (0, 350):
        with pytest.raises(
            InformationError, match=f"tokens_per_document={number} must be at least 1, and two doc"
        ):
            measure(
                documents,
                documents % 2,
                over="documents",
                documents_T=documents,
                tokens_per_document=number,
            )


def test_documents_are_permuted_whole():
    # Each of 40 documents has an expert of its own liking, whatever its domain. Over tokens the
    # domain seems to tell a lot; over documents it is chance.
    rng = np.random.default_rng(2)
    documents = np.repeat(np.arange(40), rng.integers(50, 150, 40))
    domains = np.array([0, 1] * 20)[documents]
    liking = rng.integers(0, 4, 40)[documents]
    experts = np.where(rng.random(documents.size) < 0.5, liking, rng.integers(0, 4, documents.size))
    over_tokens = measure(domains, experts, 4, num_permutations=40)
    over_documents = measure(
        domains, experts, 4, over="documents", documents_T=documents, num_permutations=40
    )
    assert over_tokens.excess_N[0] > 8 * over_tokens.spread_N[0]
    assert abs(over_documents.excess_N[0]) < 2.5 * over_documents.spread_N[0]
    assert over_documents.baseline_N[0] > 5 * over_tokens.baseline_N[0]
    assert (over_documents.over, over_tokens.over) == ("documents", "tokens")


# Routings whose cause is known
# -----------------------------------------------------------------------------

V, E, D = 60, 8, 3


def corpus():
    """Tokens, domains and documents; words of the three domains differ but overlap."""
    rng = np.random.default_rng(3)
    documents = np.repeat(np.arange(90), 200)
    domains = (np.arange(90) % D)[documents]
    weights = rng.dirichlet(np.full(V, 0.5), D) + 0.2 / V
    tokens = np.empty_like(documents)
    for d in range(D):
        tokens[domains == d] = rng.choice(V, (domains == d).sum(), p=weights[d] / weights[d].sum())
    return tokens, domains, documents


def routed_by(cause, rng):
    """Two experts for each token by a table of its cause, for a fifth of them at random."""
    table = np.argsort(rng.random((cause.max() + 1, E)), axis=1)[:, :2]
    by_chance = np.argsort(rng.random((cause.size, E)), axis=1)[:, :2]
    return np.where(rng.random((cause.size, 1)) < 0.2, by_chance, table[cause])


def test_identity_topic_and_chance_are_told_apart():
    tokens, domains, documents = corpus()
    rng = np.random.default_rng(4)
    layers = np.stack(
        [routed_by(tokens, rng), routed_by(domains, rng), routed_by(np.arange(tokens.size), rng)]
    )
    token, domain = Attribute("token", tokens), Attribute("domain", domains)
    options = {"num_permutations": 10}
    topic = expert_information(domain, layers, E, **options)
    identity_given_topic = expert_information(token, layers, E, given=domain, **options)
    topic_given_identity = expert_information(domain, layers, E, given=token, **options)
    over_documents = expert_information(
        domain, layers, E, over="documents", documents_T=documents, **options
    )

    def z(result):
        return result.excess_N / result.spread_N

    # By identity: the domain seems to matter, for its words do; given the token it is chance.
    assert z(topic)[0] > 50
    assert z(over_documents)[0] > 5
    assert abs(z(topic_given_identity)[0]) < 4
    assert z(identity_given_topic)[0] > 50
    # By domain: the other way round.
    assert abs(z(identity_given_topic)[1]) < 4
    assert z(topic_given_identity)[1] > 50
    # By nothing: all is chance.
    for result in (topic, identity_given_topic, topic_given_identity, over_documents):
        assert abs(z(result)[2]) < 4
    assert identity_given_topic.adjusted_N[0] > 0.5
    assert abs(identity_given_topic.adjusted_N[2]) < 0.01


def test_the_table_has_a_row_for_each_result_and_layer():
    values, given, experts = random_case()
    attribute, condition = Attribute("value", values), Attribute("condition", given)
    layers = np.stack([experts, experts[::-1]])
    results = [expert_information(attribute, layers, 6, given=g) for g in (None, condition)]
    rows = information_table(results, layers=[1, 3])
    assert [(row["attribute"], row["given"], row["layer"]) for row in rows] == [
        ("value", "", 1), ("value", "", 3), ("value", "condition", 1), ("value", "condition", 3),
    ]  # fmt: skip
    assert rows[3]["excess"] == results[1].information_N[1] - results[1].baseline_N[1]
    assert rows[2]["share"] == pytest.approx(rows[2]["excess"] / rows[2]["entropy"])
    assert rows[1]["over"] == "tokens"


def test_a_layer_without_choices_has_no_information():
    found = measure([0, 1, 2], [2, 2, 2])
    assert [found.information_N[0], found.entropy_N[0], found.share_N[0], found.adjusted_N[0]] == [
        0,
        0,
        0,
        0,
    ]


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(
        InformationError, match="attribute 'value' has 3 values and experts_NTK 2 tokens"
    ):
        expert_information(Attribute("value", np.arange(3)), np.zeros((1, 2, 1), int), 2)
    with pytest.raises(
        InformationError, match=r"experts_NTK has values from 0 to 3; they must be in \[0, 2\]"
    ):
        measure([0, 1], [0, 3])
    with pytest.raises(InformationError, match="over='rows' must be one of tokens, documents"):
        measure([0, 1], [0, 1], over="rows")
    with pytest.raises(InformationError, match="num_permutations=1 must be at least 2"):
        measure([0, 1], [0, 1], num_permutations=1)
    for documents_T in (None, np.array([0, -1])):
        with pytest.raises(
            InformationError, match="needs documents_T, the document of every token"
        ):
            measure([0, 1], [0, 1], over="documents", documents_T=documents_T)
    with pytest.raises(InformationError, match="constant in each document, and 'value' is not"):
        measure([0, 1], [0, 1], over="documents", documents_T=np.array([0, 0]))
