"""The page and the figures of a sweep: what they say, and that nothing breaks them."""

import base64
import hashlib
import html.parser
import json
import math
import re
import xml.dom.minidom

import numpy as np
import pytest

from cases.sweeps import entry_of, product, row_of, write_definition, write_run
from moejax.cli import main
from moejax.sweeps.report import figures as sweep_figures
from moejax.sweeps.report import scale as sweep_scale
from moejax.sweeps.report.effect_plots import ONE_SEED
from moejax.sweeps.report.effects import axis_effect, interaction
from moejax.sweeps.report.page import build_sweep_page
from moejax.sweeps.report.settings import mean_and_error, short_names
from moejax.sweeps.report.write import build_sweep_report
from moejax.sweeps.store.records import record_of, write_record
from moejax.sweeps.tables import LOSS, frame_of, settings_of


def page(points, losses, *, changed=None, planned=(), **more):
    """`changed`: by number of a row, columns that differ."""
    rows = [row_of(point, loss, **more) for point, loss in zip(points, losses, strict=True)]
    for i, columns in (changed or {}).items():
        rows[i] |= columns
    entries = [entry_of(point) for point in [*points, *planned]]
    definition = {
        "recipe": "configs/a.py",
        "command": "moejax sweep",
        "match": "",
        "versions": {},
        "arms": entries,
    }
    return build_sweep_page(frame_of(rows), definition)


class Reader(html.parser.HTMLParser):
    def __init__(self, document):
        super().__init__()
        self.images, self.tags, self.text = [], [], []
        self.feed(document)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "img":
            self.images.append(dict(attributes))

    def handle_data(self, data):
        self.text.append(data)


def svgs(document):
    return [
        base64.b64decode(image["src"].partition(",")[2]).decode()
        for image in Reader(document).images
    ]


def test_a_page_of_a_full_design_says_what_was_swept_and_compares_it():
    points = product(moe_router=["a", "b"], moe_balance_weight=[0.001, 0.1], train_seed=[0, 1])
    losses = [3.0, 3.2, 2.0, 2.2, 4.0, 4.2, 5.0, 5.2]
    changed = {
        i: {"tail/moe/dropped": 0.1 * (i // 2), "matched/moe.d_expert": 64} for i in range(8)
    }
    document = page(points, losses, changed=changed)
    text = " ".join(Reader(document).text)
    assert "Of 8 arms planned: 8 done." in text
    assert "8: 4 settings, 2 seeds" in text
    assert "2.10 ± 0.10" in text
    assert text.index("2.10 ± 0.10") < text.index("3.10 ± 0.10") < text.index("5.10 ± 0.10")
    assert "moe.d_expert" in text
    assert '<td data-number="64">64</td>' in document
    assert "None: every arm is done and compared." in text
    alts = [image["alt"] for image in Reader(document).images]
    assert "Difference in eval loss from router a: b: +2 (in every seed)" in alts
    assert any(
        alt.startswith(
            "Mean eval loss by balance_weight, a line for each router; lowest 2.1 at 0.1"
        )
        for alt in alts
    )
    assert any("on the front are the settings 2, 1" in alt for alt in alts)
    assert any(
        alt.startswith("4 settings as lines through router, balance_weight and eval loss")
        for alt in alts
    )


def test_nothing_is_fetched_and_only_the_sorting_script_may_run():
    document = page(product(moe_top_k=[1, 2]), [3, 2])
    tags = Reader(document).tags
    assert all(a["src"].startswith("data:") for tag, a in tags if "src" in a)
    assert not [tag for tag, a in tags if tag == "link" or a.get("href", "#")[0] != "#"]
    (script,) = re.findall(r"<script>(.*?)</script>", document, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(
        a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'")
    assert policy.endswith(f"script-src 'sha256-{digest}'")


def test_no_name_of_a_sweep_breaks_the_page():
    evil = '<script>alert("&")</script>'
    points = product(
        moe_router=[evil, "_x\x01", "$\\frac", ""], moe_top_k=[1, 2], train_seed=[0, 1]
    )
    changed = {15: {"status": "failed", "error": evil, "alarm_rules": json.dumps([evil])}}
    changed |= {i: {"device": evil, "tail/moe/dropped": i / 100} for i in range(15)}
    document = page(points, [3.0 + (7 * i % 11) / 5 for i in range(16)], changed=changed)
    assert len(svgs(document)) > 3
    assert document.count("<script>") == 1
    assert "&lt;script&gt;alert(&quot;&amp;&quot;)" in document
    for svg in svgs(document):
        xml.dom.minidom.parseString(svg)


@pytest.mark.parametrize(
    "points",
    [
        [{}],
        [{"moe.top_k": 2}],
        [{"train.seed": s} for s in range(3)],
        product(moe_top_k=[1, 2, 4]),
        [{"a.b": v} for v in (1, 0.5, "auto", True, None, "1")],
        [{"moe.num_experts": 0}, *product(moe_num_experts=[4, 8], moe_router=["a", "b"])],
    ],
    ids=[
        "one arm",
        "one arm of one axis",
        "seeds only",
        "no seeds",
        "mixed values",
        "a dense control",
    ],
)
def test_every_kind_of_sweep_has_a_page(points):
    losses = [3.0 + i / 7 for i in range(len(points))]
    changed = {i: {"tail/moe/dropped": i / 100} for i in range(1, len(points))}
    document = page(points, losses, changed=changed)
    assert f" planned: {len(points)} done." in document
    for svg in svgs(document):
        xml.dom.minidom.parseString(svg)


def test_a_sweep_of_one_arm_says_in_every_comparison_that_there_is_none():
    text = " ".join(Reader(page([{"moe.top_k": 2}], [3.0])).text)
    assert "Of 1 arm planned: 1 done." in text
    assert "1: 1 setting, no seed axis" in text
    assert text.count("No axis has more than one level among the arms that are compared.") == 4


def test_arms_that_failed_or_are_missing_are_counted_and_listed_with_the_reason():
    changed = {
        1: {"status": "failed", "error": "not finite", "fraction": 0.4, "final/eval/loss": None},
        2: {"status": "stopped", "fraction": 0.5, "alarms": 1, "alarm_rules": '["collapse"]'},
        3: {"final/eval/loss": None},
        4: {"final/eval/loss": math.nan},
    }
    points = product(moe_top_k=[1, 2, 3, 4, 5])
    document = page(points, [1.0] * 5, changed=changed, planned=[{"moe.top_k": 9}])
    text = " ".join(Reader(document).text)
    assert "Of 6 arms planned: 3 done, 1 stopped, 1 failed, 1 not ended." in text
    for reason in (
        "failed at 40% of its schedule: not finite",
        "stopped at 50% of its schedule",
        "not ended",
    ):
        assert reason in text
    assert text.count("its last evaluation is not finite or absent") == 2
    assert "moe.top_k=9" in text
    assert "collapse" in text
    assert "1 of 5 arms raised alarms." in text
    assert re.search(r"[0-9a-f]{10} \(top_k 3\)", text)


def test_a_sweep_of_which_nothing_is_done_says_so():
    text = page([{"moe.top_k": 1}], [1.0], changed={0: {"status": "failed", "error": "x"}})
    assert "No arm is done, so" in text
    assert "<img" not in text
    definition = {"recipe": "", "arms": [entry_of({"moe.top_k": 1})]}
    text = build_sweep_page(frame_of([]), definition)
    assert "Of 1 arm planned: 0 done, 1 not ended." in text


def test_settings_of_which_some_seeds_failed_come_last_and_count_their_arms():
    points = product(moe_top_k=[1, 2], moe_router=["a"], train_seed=[0, 1, 2])
    failed = {i: {"status": "failed", "error": "not finite"} for i in (4, 5)}
    losses = [3.0, 3.1, 3.2, 2.9, 9.0, 9.0]
    dropped = {i: {"tail/moe/dropped": 0.1 + 0.1 * (i > 2)} for i in range(6)}
    document = page(points, losses, changed={i: dropped[i] | failed.get(i, {}) for i in range(6)})
    first, second = re.findall(r'<tr><th scope="row" data-number="(.*?)</tr>', document)
    assert first.startswith("1")
    assert "3.100 ± 0.058" in first
    assert '<td data-number="3">3</td>' in first
    assert second.startswith("2")
    assert "2.9" in second
    assert '<td data-number="1">1 of 3</td>' in second
    assert (
        document.count("over the other arms alone") == 1 and document.count("<td>1 of 3</td>") == 1
    )  # of the front
    alts = [image["alt"] for image in Reader(document).images]
    assert "2 settings as lines through top_k and eval loss; setting 1: top_k 1" in alts
    document = page(points, losses, changed=dropped)
    assert "over the other arms alone" not in document
    assert "1 of 3" not in document


def test_arms_that_have_not_ended_count_among_those_of_their_setting():
    points = product(moe_top_k=[1, 2], train_seed=[0, 1])
    document = page(points[:3], [3.0, 3.1, 2.5], planned=[points[3], {"moe.num_experts": 0}])
    assert document.index('<td data-number="2">2</td>') < document.index(
        '<td data-number="1">1 of 2</td>'
    )


def test_packs_of_different_sizes_are_noted_wherever_step_times_are_compared():
    points = product(moe_top_k=[1, 2], train_seed=[0, 1])
    changed = {i: {"step_s": 0.1 + i, "packed": 8} for i in range(4)}
    assert "Arms trained in packs" not in page(points, [2.0, 2.1, 1.0, 1.1], changed=changed)
    changed[1]["packed"] = 1
    document = html.unescape(page(points, [2.0, 2.1, 1.0, 1.1], changed=changed))
    _, of_effects, of_fronts = document.split(
        "Arms trained in packs of 1 to 8, and the time of an arm is its pack's over their number"
    )
    assert 'id="fronts"' in of_effects
    assert 'id="fronts"' not in of_fronts


def test_a_search_of_many_sampled_arms_stays_readable_and_small():
    draw = np.random.default_rng(0)
    points = [
        {
            "optimizer.learning_rate": float(10 ** draw.uniform(-4, -2)),
            "moe.capacity_factor": float(draw.uniform(1, 2)),
            "moe.router": str(draw.choice(["a", "b"])),
        }
        for _ in range(120)
    ]  # fmt: skip
    document = page(points, draw.uniform(2, 3, 120).tolist())
    assert "120 done" in document
    assert len(document) < 1_000_000
    assert "No two arms of one seed differ in it alone" in document


def test_axes_with_one_level_are_not_drawn():
    alts = [
        image["alt"]
        for image in Reader(page(product(moe_top_k=[1, 2], moe_router=["a"]), [3, 2])).images
    ]
    assert alts
    assert not [alt for alt in alts if "router" in alt]


def test_numbers_that_span_decades_are_logarithmic_unless_they_include_zero():
    assert sweep_scale.scale_of([0.001, 0.1, 0.01]).kind == "log"
    assert sweep_scale.scale_of([4, 8, 16]).kind == "linear"
    assert sweep_scale.scale_of([0, 0.001, 0.1]).kind == "categorical"
    assert sweep_scale.scale_of([0, 4, 8]).kind == "linear"
    mixed = sweep_scale.scale_of(["auto", 4, True, None])
    assert mixed.kind == "categorical"
    assert mixed.levels == (4, "auto", True)
    assert mixed.is_named
    np.testing.assert_array_equal(mixed.places([4.0, True, None, "?"]), [0, 2, np.nan, np.nan])
    assert [name for _, name in sweep_scale.scale_of([0.001, 0.1, 0.01]).ticks()] == [
        "0.001",
        "0.01",
        "0.1",
    ]
    many = sweep_scale.scale_of(np.geomspace(2e-4, 9e-3, 50).tolist()).ticks()
    assert [name for _, name in many] == ["0.0003", "0.001", "0.003"]
    crowded = sweep_scale.scale_of([1, 1.01, 5]).ticks()
    assert [name for _, name in crowded] == ["1", "5"]


def effect_of(points, losses, axis):
    arms = frame_of([row_of(point, loss) for point, loss in zip(points, losses, strict=True)])
    return axis_effect(arms, LOSS, f"override/{axis}")


def test_a_difference_is_drawn_with_its_interval_and_grey_where_it_may_be_noise():
    points = product(a_b=[1, 10, 100], c_d=["x", "y"], train_seed=[0, 1])
    effect = effect_of(points, [0, 0, 0, 0, 2, 2, 2, 2, 1, -1, 1, -1], "a.b")
    axes = sweep_figures.draw_effect(effect, "b", "loss").figure.axes[0]
    assert [line.get_label() for line in axes.lines if line.get_marker() == "D"] == ["reference"]
    effects, noise = axes.containers
    assert effects.get_label() == "told apart from it"
    assert noise.get_label() == "may be noise"
    assert effects.lines[0].get_xydata().tolist() == [[1, 2]]
    assert noise.lines[0].get_xydata().tolist() == [[2, 0]]
    assert effects.lines[0].get_color() == sweep_figures.BLUE
    assert noise.lines[0].get_color() == sweep_figures.GREY
    (bar,) = noise.lines[2][0].get_segments()
    assert bar[:, 1].tolist() == pytest.approx([-12.706, 12.706], 1e-4)  # one standard error is 1
    names = sweep_figures.draw_effect(effect_of(points, range(12), "c.d"), "d", "loss").figure.axes[
        0
    ]
    assert names.containers[0].lines[0].get_ydata().tolist() == [
        1
    ]  # names below one another, the reference at 0


def test_no_figure_shows_noise_as_an_effect_when_there_is_one_seed():
    points = product(moe_top_k=[1, 2], moe_router=["a", "b"])
    changed = {i: {"step_s": 0.1 * (i + 1)} for i in range(4)}
    document = page(points, [3.0, 2.0, 2.5, 4.0], changed=changed)
    assert document.count(ONE_SEED) == 2  # of effects and of interactions
    assert (
        document.count("There is one seed: all that is seen here may be noise.") == 2
    )  # all settings, and a front
    alts = [image["alt"] for image in Reader(document).images]
    assert not [alt for alt in alts if alt.startswith(("Difference", "Mean"))]
    text = " ".join(Reader(document).text)
    assert "nothing can be said about whether a difference is more than noise" in text
    assert (
        "+0.75" in text and "+0.75 (" not in text
    )  # the difference of routers is shown, without an interval


def test_differences_that_seeds_explain_are_called_noise_on_the_page():
    points = product(moe_top_k=[1, 2], moe_router=["a", "b"], train_seed=[0, 1, 2])
    of_seed = {1: [2.744, 2.700, 2.790], 2: [2.700, 2.755, 2.687]}  # the cells agree to 0.001
    losses = [
        of_seed[p["moe.top_k"]][p["train.seed"]] + 0.001 * (p["moe.router"] == "b") for p in points
    ]
    document = page(points, losses)
    section = document.split('id="effects"')[1].split('id="interactions"')[0]
    assert "No level's loss is told apart from noise over 3 seeds." in section
    assert "Told apart from noise over 3 seeds: b: +0.001 (in every seed)." in section


def test_a_metric_that_is_the_same_in_all_arms_is_a_sentence_and_no_picture():
    document = page(
        product(moe_top_k=[1, 2], train_seed=[0, 1]), [3, 3.1, 2, 2.2], tail__moe__dropped=0.0
    )
    assert "The same in all arms: drop rate 0, step time 0.1." in document
    assert not [image for image in Reader(document).images if "drop" in image["alt"]]


def test_what_some_arms_lack_is_not_called_the_same_in_all():
    points = product(moe_num_experts=[0, 4], train_seed=[0, 1])
    changed = {
        i: {"tail/moe/max_violation": math.nan, "tail/moe/dropped": math.nan} for i in (0, 1)
    }
    document = page(
        points,
        [3, 3.1, 2, 2.2],
        changed=changed,
        tail__moe__dropped=0.02,
        tail__moe__max_violation=0.3,
    )
    text = " ".join(" ".join(Reader(document).text).split())
    assert (
        "The same in the arms that have it: MaxVio 0.3 (2 of 4), drop rate 0.02 (2 of 4)." in text
    )
    assert (
        "The same in the settings that have it: MaxVio 0.3 (1 of 2), drop rate 0.02 (1 of 2)"
        in text
    )
    assert "The same in all arms: step time 0.1." in text


def test_an_axis_without_pairs_says_that_its_effect_is_unknown():
    points = [
        {"moe.top_k": k, "model.d_ff": d, "train.seed": s}
        for k, d in ((1, 8), (2, 16), (4, 8))
        for s in (0, 1)
    ]
    document = page(
        [*points, {"moe.top_k": 4, "model.d_ff": 32, "train.seed": 0}], [3, 3.1, 2, 2.2, 1, 1.3, 4]
    )
    assert document.count("No two arms of one seed differ in it alone") == 0
    document = page(
        [*points[:4], {"moe.top_k": 4, "model.d_ff": 32, "train.seed": 0}], [3, 3.1, 2, 2.2, 1]
    )
    assert document.count("No two arms of one seed differ in it alone") == 2


def test_a_level_has_one_colour_in_all_figures_of_pairs():
    points = product(a_b=[1, 2], c_d=["x", "y", "z"], train_seed=[0, 1])
    arms = frame_of(
        [row_of(p, p["a.b"] * (p["c.d"] == "z")) for p in points if p != {"a.b": 2, "c.d": "x"}]
    )
    means = interaction(arms, LOSS, "override/a.b", "override/c.d").means

    def colors(shown):
        drawing = sweep_figures.draw_interaction(shown, "b", "d", "loss", ["x", "y", "z"])
        return [line.get_color() for line in drawing.figure.axes[0].lines]

    assert colors(means[["y", "z"]]) == colors(means)[1:]


def test_settings_are_compared_with_the_dense_control_or_else_the_first():
    def differences(document):
        head = re.search(r"difference from (\d+)", document)[1]
        rows = re.findall(
            r'<tr><th scope="row" data-number="(\d+)">.*?</td><td.*?>(.*?)</td>', document
        )
        return head, dict(rows)

    points = product(moe_num_experts=[4, 8], train_seed=[0, 1])
    head, found = differences(page(points, [3.0, 3.2, 2.0, 2.3]))
    assert head == "2"
    assert found["2"] == "0"
    assert found["1"] == "<b>-0.95 (-1.59 to -0.31)</b>"
    dense = [{"moe.num_experts": 0, "train.seed": seed} for seed in (0, 1)]
    document = page([*points, *dense], [3.0, 3.2, 2.0, 2.3, 2.5, 2.7])
    assert differences(document)[0] == "2"
    assert "the dense control" in document
    assert differences(document)[1]["3"] == "<b>+0.5 (in every seed)</b>"


def test_arms_whose_tokens_differ_are_compared_by_bits_per_byte():
    points = product(data_vocab_size=[512, 4096], train_seed=[0, 1])
    changed = {i: {"final/eval/bits_per_byte": bits} for i, bits in enumerate([3.4, 3.5, 2.5, 2.6])}
    document = page(points, [4.8, 4.9, 6.7, 6.8], changed=changed)
    first, second = re.findall(r'<tr><th scope="row" data-number="(.*?)</tr>', document)
    assert "2.550 ± 0.050" in first
    assert "3.450 ± 0.050" in second
    assert (
        "They differ in data.vocab_size, so in what a token is, and are compared by bits per byte"
        in document
    )
    alts = [image["alt"] for image in Reader(document).images]
    assert any(
        alt.startswith("Difference in bits per byte from vocab_size 512: 4096: -0.9")
        for alt in alts
    )
    assert not any("eval loss" in alt for alt in alts)


def test_the_first_setting_is_thick_and_a_line_stops_where_an_axis_is_not_set():
    points = [{"a.b": 1, "c.d": "x"}, {"a.b": 3, "c.d": "y"}, {"a.b": 2}]
    rows = [
        row_of(point, loss, arm=str(loss)) for point, loss in zip(points, [3, 1, 2], strict=True)
    ]
    found = settings_of(frame_of(rows), [LOSS])
    drawing = sweep_figures.draw_parallel(
        found, {"override/a.b": "b", "override/c.d": "d"}, LOSS, "loss"
    )
    lines = drawing.figure.axes[0].collections[0]
    assert lines.get_linewidths()[-1] > 2 * lines.get_linewidths()[0]
    last = lines.get_segments()[-1]
    assert last[:, 1].tolist() == [0, 0, 1]  # 1, x and the highest loss
    assert lines.get_array().tolist() == [2, 1, 3]


def test_means_are_written_as_precisely_as_their_error_allows():
    assert mean_and_error(3.14159, 0.0123) == "3.142 ± 0.012"
    assert mean_and_error(1234.5, 30.0) == "1,234 ± 30"
    assert mean_and_error(3.14159, math.nan) == "3.142"
    assert mean_and_error(0.2, 1e-17) == "0.2"
    assert short_names(["override/a.x", "override/b.x", "override/b.y"]) == {
        "override/a.x": "a.x", "override/b.x": "b.x", "override/b.y": "y",
    }  # fmt: skip


def test_a_report_is_written_from_a_directory_of_runs(tmp_path, capsys):
    points = product(moe_top_k=[1, 2], train_seed=[0, 1])
    entries = [entry_of(point) for point in points]
    write_definition(tmp_path, entries)
    for entry, loss in zip(entries, [3.0, 3.2, 2.0, 2.2], strict=True):
        workdir = write_run(tmp_path / "arms" / entry["id"], entry, loss=loss, dropped=0.1)
        write_record(
            workdir,
            record_of(workdir, entry, status="done", error=None, wall_s=1, step_s=0.1, packed=1),
        )
    path = build_sweep_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert "2.10 ± 0.10" in path.read_text()
    assert (tmp_path / "records.parquet").exists()
    (tmp_path / "arms" / entries[3]["id"] / "record.json").unlink()
    assert main(["sweep", "report", str(tmp_path), "--json"]) == 0
    found = [
        (row["arms"], row["planned"], row["validation loss"])
        for row in json.loads(capsys.readouterr().out)["settings"]
    ]
    assert found == [(2, 2, 3.1), (1, 2, 2.0)]
