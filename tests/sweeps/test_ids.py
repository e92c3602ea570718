"""Ids of arms: a function of what differs from the defaults, so that new leaves change none."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases.config import nested, other_value
from moejax.config import SECTIONS, MoeConfig, declared, given_leaves, resolve, resolve_recorded
from moejax.config.schema.leaf import leaf
from moejax.sweeps.ids import LEFT_OUT, hash_config

# As they were made first: whoever changes these gives every arm another id in new sweeps.
IDS = [
    ({}, "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"),
    (
        {
            "moe": {"num_experts": 4, "router": "noisy_topk", "load_weight": 0.1},
            "data": {"tokenizer": "bytes", "directory": "elsewhere"},
        },
        "66e523912bd836e3e97c8995dcb4119784b799aaa69eb6a7d798d590d40df99d",
    ),
    (
        {"moe": {"num_experts": 0}, "optimizer": {"schedule": "wsd"}},
        "d06499cc6cb89e0ba0fe56bfd678840e3d9479d56829eedce72ccef2a6f0afaf",
    ),
]
EXAMPLES = [resolve(source) for source, _ in IDS]


@pytest.mark.parametrize(("source", "digits"), IDS)
def test_a_configuration_has_the_id_that_it_always_had(source, digits):
    assert hash_config(resolve(source)) == digits


def test_every_leaf_that_changes_what_is_computed_changes_the_id():
    before = hash_config(resolve({}))
    for key in declared():
        value, with_it = other_value(key)
        config = resolve_recorded(nested({key: value} | with_it))
        assert (hash_config(config) == before) is (key in LEFT_OUT), key


def test_the_leaves_that_are_hashed_are_a_recipe_of_the_configuration():
    for key in declared():
        value, with_it = other_value(key)
        changes = {key: value} | with_it
        config = resolve_recorded(nested(changes))
        found = given_leaves(config)
        assert found.keys() <= changes.keys(), key
        assert resolve_recorded(nested(found)) == config, key


@settings(deadline=None, max_examples=60)
@given(
    experts=st.sampled_from([0, 4, 8]),
    top_k=st.sampled_from([1, 2, 4]),
    width=st.sampled_from([0, 64, 128, 256]),
    router=st.sampled_from(["softmax_topk", "cosine", "soft", "sinkhorn"]),
    score=st.sampled_from(["auto", "softmax", "sigmoid"]),
    slots=st.sampled_from([0, 4, 16, 32]),
    other=st.sampled_from(["", "top_k", "num_experts"]),
)
def test_configurations_share_an_id_only_if_they_are_equal(
    experts, top_k, width, router, score, slots, other
):
    moe = {
        "num_experts": experts, "top_k": top_k, "d_expert": width, "router": router, "score": score,
        "slots_per_expert": slots, "allow_noncausal": True,
    }  # fmt: skip
    pair = []
    for changes in (moe, moe | {"d_expert": 0, "score": "auto"} | ({other: 2} if other else {})):
        try:
            pair.append(resolve_recorded({"model": {"d_ff": 256}, "moe": changes}))
        except ValueError:
            return  # of a combination that cannot work
    first, second = pair
    assert (hash_config(first) == hash_config(second)) == (first == second)


# A copy of the schema with two more leaves


@dataclasses.dataclass(frozen=True)
class MoreMoeConfig(MoeConfig):
    """The section with leaves that a later version may have."""

    temperature: float = leaf(1.0, "of the scores", above=0)
    is_cold: bool = leaf(False, "whether it is cold")


@pytest.fixture
def later_version(monkeypatch):
    """Adds two leaves to `moe`, as a later version would."""
    monkeypatch.setitem(SECTIONS, "moe", MoreMoeConfig)
    declared.cache_clear()
    assert {"moe.temperature", "moe.is_cold"} <= declared().keys()
    yield
    monkeypatch.undo()
    declared.cache_clear()
    assert "moe.temperature" not in declared()


def test_new_leaves_change_no_id_until_they_differ_from_their_defaults(later_version):
    for (source, digits), before in zip(IDS, EXAMPLES, strict=True):
        later = resolve_recorded(source)
        assert later.moe.temperature == 1.0 and not hasattr(before.moe, "temperature")
        assert hash_config(later) == digits
        explicit = {**source, "moe": {**source.get("moe", {}), "temperature": 1, "is_cold": False}}
        assert hash_config(resolve_recorded(explicit)) == digits
    ids = set()
    for changes in ({}, {"temperature": 2.0}, {"is_cold": True}):
        ids.add(hash_config(resolve_recorded({"moe": changes})))
    assert len(ids) == 3


def test_a_value_that_a_leaf_has_anyway_changes_no_id():
    before = resolve({})
    derived = {"d_expert": before.moe.d_expert, "score": before.moe.score}
    assert before.moe.d_expert > 0 and before.moe.score != "auto"
    assert hash_config(resolve({"moe": derived})) == hash_config(before)
    assert hash_config(resolve({"train": {"seed": 0}})) == hash_config(before)
    other_width = resolve({"moe": {"d_expert": before.moe.d_expert + 8}})
    assert hash_config(other_width) != hash_config(before)


def test_equal_numbers_have_one_id():
    ids = [hash_config(resolve({"moe": {"z_weight": value}})) for value in (1, 1.0)]
    assert ids[0] == ids[1]
    config = resolve({"moe": {"balance_weight": 0.0}})
    assert config.moe.balance_weight != MoeConfig().balance_weight
    for zero in (-0.0, 0):
        moe = dataclasses.replace(config.moe, balance_weight=zero)
        assert hash_config(dataclasses.replace(config, moe=moe)) == hash_config(config)
