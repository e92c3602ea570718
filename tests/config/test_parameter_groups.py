"""Entries of `optimizer.groups`, and what is none."""

import pytest

from moejax.config import ConfigError, ParameterGroup, kind_of, read_groups, resolve


def test_entries_are_read_in_order():
    text = " router: rate=0.3 weight_decay=0 ;experts:clip_norm=0.5; */mixer/q*: rate=2;"
    assert read_groups(text) == (
        ParameterGroup("router", rate=0.3, weight_decay=0.0),
        ParameterGroup("experts", clip_norm=0.5),
        ParameterGroup("*/mixer/q*", rate=2.0),
    )
    assert read_groups("") == ()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("embedding", "embedding"),
        ("unembedding", "embedding"),
        ("final_norm/scale", "norm"),
        ("stacks/0/block/mixer_norm/scale", "norm"),
        ("stacks/0/block/mixer/query_norm/scale", "norm"),
        ("stacks/0/block/mixer/query", "attention"),
        ("stacks/0/block/ffn/router/kernel", "router"),
        ("stacks/0/block/ffn/shared/gate_up", "shared"),
        ("stacks/0/block/ffn/experts/down", "experts"),
        ("stacks/0/block/ffn/gate_up", "dense"),
        ("stacks/0/block/ffn/latent_down", "other"),
    ],
)
def test_each_parameter_is_of_one_kind(path, kind):
    assert kind_of(path) == kind


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("router", "must have the form NAME: CHANGES"),
        (": rate=1", "must have the form NAME: CHANGES"),
        ("routers: rate=1", "'routers' is no kind of parameters; the nearest is router"),
        ("router: rate=1; router: rate=2", "names router twice"),
        ("router: lr=1", "'lr' is none of rate, weight_decay, clip_norm"),
        ("router: rate=1 rate=2", "sets rate twice"),
        ("router:", "changes nothing"),
        ("router: rate=fast", "rate=fast must be a number"),
        ("router: rate=-1", "rate=-1 must be at least 0"),
        ("router: rate=nan", "rate=nan must be at least 0"),
    ],
)
def test_what_is_no_group_is_refused(text, words):
    with pytest.raises(ConfigError, match=r"optimizer\.groups") as caught:
        resolve({"optimizer": {"groups": text}})
    assert words in str(caught.value)
