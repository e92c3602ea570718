"""Covering arrays hold every possible pair, in few cases."""

import itertools

from cases.covering import covering, name_of, pairs_of

FACTORS = {
    "how": ["ring", "gather", "send"],
    "devices": [1, 2, 8],
    "chunks": [1, 2],
    "fsdp": [1, 2],
}


def product_of(factors):
    return [dict(zip(factors, row, strict=True)) for row in itertools.product(*factors.values())]


def test_every_pair_occurs_in_fewer_cases_than_the_product_has():
    chosen = covering(FACTORS)
    covered = set().union(*map(pairs_of, chosen))
    assert covered == set().union(*map(pairs_of, product_of(FACTORS)))
    assert 9 <= len(chosen) <= 11 < len(product_of(FACTORS))


def test_impossible_cases_are_left_out_and_what_they_alone_hold_is_not_wanted():
    def is_possible(case):
        return case["how"] == "send" or case["chunks"] == 1

    chosen = covering(FACTORS, is_possible)
    assert all(map(is_possible, chosen))
    possible = set().union(*map(pairs_of, filter(is_possible, product_of(FACTORS))))
    assert set().union(*map(pairs_of, chosen)) == possible


def test_the_cases_are_the_same_each_time_and_have_names_of_their_own():
    assert covering(FACTORS) == covering(FACTORS)
    names = [name_of(case) for case in covering(FACTORS)]
    assert names[0] == "how ring, devices 1, chunks 1, fsdp 1" and len(set(names)) == len(names)
