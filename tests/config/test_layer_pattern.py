"""Layers that differ: how `moe.per_layer` is read, and the groups of layers that are scanned."""

import pytest

from moejax.config import ConfigError, resolve


def config_of(per_layer, num_layers=6, **moe):
    base = {"num_experts": 4, "d_expert": 8, "per_layer": per_layer}
    return resolve({"model": {"num_layers": num_layers}, "moe": base | moe})


def test_entries_change_layers_by_index_from_the_end_and_by_range():
    config = config_of(
        "0: router=hash; 2-3: num_shared_experts=1; -1: top_k=1 renormalize=False d_expert=16"
    )
    kinds = [kind for kind in config.layers if kind is not None]
    assert [kind.router for kind in kinds] == ["hash"] + ["softmax_topk"] * 5
    assert [kind.score for kind in kinds] == ["uniform"] + ["softmax"] * 5
    assert [kind.num_shared_experts for kind in kinds] == [0, 0, 1, 1, 0, 0]
    changed = [(kind.top_k, kind.renormalize, kind.d_expert) for kind in kinds]
    assert changed == [(2, True, 8)] * 5 + [(1, False, 16)]


def test_equal_neighbours_are_one_group_to_scan():
    config = config_of("0: router=hash; 2-3: num_shared_experts=1; -1: top_k=1 renormalize=False")
    assert [group.num for group in config.layer_groups] == [1, 1, 2, 1, 1]
    assert [group.num for group in config_of("").layer_groups] == [6]
    assert [group.num for group in config_of("0,1: dense").layer_groups] == [2, 4]


def test_dense_layers_are_not_counted_and_a_pattern_stays_a_pattern():
    config = config_of("0-2: dense")
    assert config.moe_layers == (3, 4, 5) and config.num_moe_layers == 3
    every = config_of("3: num_shared_experts=1", num_layers=8, every=2)
    assert every.moe_layers == (1, 3, 5, 7)
    sizes = [(len(group.kinds), group.num) for group in every.layer_groups]
    assert sizes == [(2, 1), (2, 1), (2, 2)]


def test_losses_that_do_not_fit_a_layers_router_are_left_out_there():
    config = config_of("0: router=hash", router="noisy_topk", load_weight=0.1)
    assert [kind.load_weight for kind in config.layers] == [0.0] + [0.1] * 5


def test_what_follows_from_top_k_follows_from_that_of_the_layer():
    soft = {
        "num_experts": 4,
        "d_expert": 8,
        "router": "soft",
        "allow_noncausal": True,
        "per_layer": "0: top_k=4",
    }
    config = resolve({"model": {"num_layers": 2}, "data": {"seq_len": 32}, "moe": soft})
    assert [kind.slots_per_expert for kind in config.layers] == [32, 16]
    one = config_of("-1: top_k=1 renormalize=False", router="sinkhorn", allow_noncausal=True)
    assert [kind.score for kind in one.layers] == ["softmax_after"] * 5 + ["sigmoid"]


def test_a_layer_that_does_not_look_at_tokens_has_no_jitter():
    kinds = config_of("0: router=random", jitter=0.1).layers
    assert [kind.jitter for kind in kinds] == [0.0] + [0.1] * 5


@pytest.mark.parametrize(
    ("per_layer", "parts"),
    [
        ("0 router=hash", ["'0 router=hash'", "LAYERS: CHANGES"]),
        ("x: dense", ["'x' is no layer"]),
        ("6: dense", ["'6'", "layers 0 to 5"]),
        ("4-2: dense", ["'4-2'"]),
        ("0: rooter=hash", ["'rooter'", "nearest is router"]),
        ("0: router=hsh", ["moe.router='hsh'", "must be one of", "nearest is hash"]),
        ("0: top_k=two", ["top_k='two'", "must be a whole number"]),
        ("0: num_experts=8", ["moe.num_experts is the same for all layers"]),
        ("0: save_exchanged=False", ["moe.save_exchanged is the same for all layers"]),
        ("0: score=sigmoyd", ["moe.score='sigmoyd'", "the nearest is sigmoid"]),
        ("0: renormalize=yes", ["moe.renormalize='yes' must be True or False"]),
        ("0: z_weight=0", ["moe.z_weight is the same for all layers"]),
        ("0:", ["changes nothing"]),
        ("0: top_k=3 top_k=2", ["sets top_k twice"]),
        ("0: d_expert=-4", ["layer 0 by moe.per_layer", "moe.d_expert=-4"]),
        ("0: d_expert=0", ["layer 0 by moe.per_layer", "moe.d_expert=0 must be at least 1"]),
        ("0: num_groups=0", ["layer 0 by moe.per_layer", "moe.num_groups=0"]),
        ("0: route_scale=nan", ["layer 0 by moe.per_layer", "moe.route_scale=nan"]),
        ("0: dense; 0: router=hash", ["layer 0 is dense"]),
        ("0-5: dense", ["no MoE layer", "moe.per_layer='0-5: dense'"]),
        ("0: top_k=1", ["layer 0 by moe.per_layer", "moe.renormalize=True with moe.top_k=1"]),
        ("0: router=soft", ["layer 0 by moe.per_layer", "moe.allow_noncausal"]),
    ],
)
def test_an_entry_that_cannot_work_is_refused_with_its_text_and_a_remedy(per_layer, parts):
    with pytest.raises(ConfigError) as caught:
        config_of(per_layer)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_value_that_every_layer_overrides_does_not_refuse_the_model():
    config = config_of("0-5: top_k=1 renormalize=False", num_experts=1)  # top_k=2 by default
    assert [kind.top_k for kind in config.layers] == [1] * 6
    widths = {"d_expert": 0, "top_k": 3}  # of which no width can be derived
    assert config_of("0-5: d_expert=8", **widths).layers[5].d_expert == 8
    with pytest.raises(ConfigError, match=r"model.d_ff=1024 is not a multiple of moe.top_k=3"):
        config_of("0-4: d_expert=8", **widths)


def test_what_every_layer_overrides_is_refused_where_it_is_set():
    with pytest.raises(
        ConfigError,
        match=r"moe.router='cosine' does nothing: moe.per_layer=.* sets it in every layer",
    ):
        config_of("0-5: router=hash", router="cosine")
