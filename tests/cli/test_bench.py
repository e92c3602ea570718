"""`moejax bench`: rows that scripts can rely on, and mistakes refused before any measurement."""

import csv
import itertools
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cases.training import small_config
from moejax.benchmarks import generation, start
from moejax.benchmarks.recipe import ChildError
from moejax.benchmarks.timing import Peaks
from moejax.cli import main
from moejax.cli.verbs import bench
from moejax.inference.layered import LayeredDecoder
from moejax.models import Decoder

DEBUG = Path(__file__).parents[2] / "configs/debug.py"


@pytest.mark.slow
def test_bench_step_compares_moe_and_dense_in_one_run(capsys):
    arguments = [
        "bench",
        "step",
        f"--config={DEBUG}",
        "--config.train.num_steps=2",
        "--repetitions=2",
        "--json",
    ]
    assert main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows["ratio"] == pytest.approx(rows["moe_ms"] / rows["dense_ms"], abs=0.01)
    # The dense twin has the active parameters of the MoE but for the routers: 2 layers of 32 x 4.
    assert rows["moe_active_parameters"] - rows["dense_parameters"] == 2 * 32 * 4


@pytest.mark.slow
def test_bench_optimizers_compares_each_with_adamw(capsys):
    arguments = ["bench", "optimizers", f"--config={DEBUG}", "--repetitions=2", "--json"]
    assert main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)
    for name in ("muon", "muonh", "adafactor", "lion", "sgd"):
        ratio = rows[f"{name}_ms"] / rows["adamw_ms"]
        assert rows[f"ratio_{name}"] == pytest.approx(ratio, rel=0.05)
    assert rows["ratio_adamw"] == 1


@pytest.mark.slow
def test_bench_telemetry_compares_intervals_with_and_without_what_is_logged(capsys):
    arguments = [
        "bench",
        "telemetry",
        f"--config={DEBUG}",
        "--config.train.log_every=2",
        "--repetitions=2",
        "--json",
    ]
    assert main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)
    watched_ms, bare_ms, write_ms = rows["watched_step_ms"], rows["bare_step_ms"], rows["write_ms"]
    assert rows["ratio"] == pytest.approx(watched_ms / bare_ms, rel=0.05)
    assert rows["write_share"] == pytest.approx(write_ms / (2 * bare_ms), rel=0.05)
    assert rows["log_every"] == rows["repetitions"] == 2


def test_bench_generate_compares_ways_to_draw_a_token(capsys, monkeypatch):
    monkeypatch.setattr(generation, "STEPS", 3)
    assert main(["bench", "generate", f"--config={DEBUG}", "--repetitions=2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    greedy_ms, nucleus_ms = rows["greedy_ms_of_step"], rows["nucleus_ms_of_step"]
    assert rows["greedy_tokens_per_s"] == pytest.approx(16e3 / greedy_ms, rel=0.01)
    ratio = nucleus_ms / greedy_ms
    assert rows["ratio_nucleus_to_greedy"] == pytest.approx(ratio, rel=0.02)


def test_a_writer_of_the_benchmark_writes_what_the_model_does_and_again(monkeypatch):
    monkeypatch.setattr(generation, "STEPS", 8)
    config = small_config()
    model = Decoder(config, rngs=nnx.Rngs(params=0))
    # Strong attention, so that a wrong position changes what is written.
    for name in ("query", "key", "value", "out"):
        weight = getattr(model.stacks[0].block.mixer, name)
        weight[...] = 3 * weight[...]
    writer = generation._Writer(LayeredDecoder(model), 0.0, 1.0)
    last_B = np.asarray(writer())
    np.testing.assert_array_equal(np.asarray(writer()), last_B)
    prompts_BL = jax.random.randint(jax.random.key(0), (16, 16), 0, config.num_token_ids, jnp.int32)
    positions_BL = jnp.broadcast_to(jnp.arange(25), (16, 25))

    @jax.jit
    def forward(tokens_BL):
        hidden_BLD, _ = model(tokens_BL, jnp.ones_like(tokens_BL), positions_BL)
        return model.logits(hidden_BLD)

    rows_BL = np.zeros((16, 25), np.int32)
    rows_BL[:, :16] = prompts_BL
    for place in range(16, 25):
        logits_BV = forward(rows_BL)[:, place - 1]
        rows_BL[:, place] = logits_BV.argmax(-1)
    np.testing.assert_array_equal(rows_BL[:, -1], last_B)


@pytest.mark.slow
def test_bench_attention_compares_rows_with_rows_four_times_as_long(capsys):
    arguments = [
        f"--config={DEBUG}",
        "--config.train.batch_size=32",
        "--config.data.seq_len=16",
        "--repetitions=1",
    ]
    assert main(["bench", "attention", *arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert (rows["short_positions"], rows["long_positions"]) == (16, 64)
    ratio = rows["long_step_ms"] / rows["short_step_ms"]
    assert rows["step_ratio_long_to_short"] == pytest.approx(ratio, rel=0.01)
    ratio = rows["long_rows_ms"] / rows["long_scores_ms"]
    assert rows["attention_ratio_to_all_scores_long"] == pytest.approx(ratio, rel=0.15)
    assert main(["bench", "attention", f"--config={DEBUG}", "--config.train.batch_size=6"]) == 2
    assert "train.batch_size=6 must be a multiple of 4" in capsys.readouterr().err


def test_bench_start_times_processes_up_to_their_first_step(monkeypatch, capsys):
    workdirs, caches, had_cache = [], [], []

    class Process:
        def __init__(self, command, env, **_):
            flags = dict(flag.split("=") for flag in command[4:] if "=" in flag)
            cache = Path(env["XDG_CACHE_HOME"])
            workdirs.append(flags["--workdir"])
            caches.append(cache)
            had_cache.append(cache.exists())
            cache.mkdir(exist_ok=True)
            self.stderr = iter(["compiling\n", "step 1/20  loss 6\n", "step 2/20\n"])
            self.is_killed = False

        def __enter__(self):
            return self

        def __exit__(self, *_):
            assert self.is_killed and next(self.stderr) == "step 2/20\n"

        def kill(self):
            self.is_killed = True

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/nowhere")
    assert main(["bench", "start", f"--config={DEBUG}", "--repetitions=2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows["each_s"]["first"]) == len(rows["each_s"]["again"]) == 2
    assert had_cache == [False, False, True, False, True]
    assert caches[0] == caches[2] == caches[4]
    assert len(set(workdirs)) == 5


def test_a_start_that_ends_before_its_first_step_is_an_error(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("def get_config(): return {}['missing']")
    with pytest.raises(ChildError, match=r"ended before its first step: .*missing"):
        start._start(recipe, tmp_path / "run", tmp_path / "kept")


def test_several_processes_give_a_median_and_the_lowest_and_the_highest(capsys, monkeypatch):
    commands = []
    ratios = [1.5, 1.1, 1.2, 1.0, 3.0]

    def run(command, **_):
        commands.append(command)
        row = {"dtype": "float32", "ratio": ratios.pop(0), "quartiles_ms": [1, 2], "repetitions": 2}
        has_rows = command[4] == "layer"
        return SimpleNamespace(returncode=0, stdout=json.dumps([row] if has_rows else row))

    def fail(*_, **__):
        return SimpleNamespace(returncode=3, stderr="no room")

    monkeypatch.setattr(subprocess, "run", run)
    passed_on = ["--shapes=64:8:4:4:2", "--repetitions=2", "--json"]
    assert main(["bench", "layer", "--processes=3", *passed_on]) == 0
    spread = {"median": 1.2, "lowest": 1.1, "highest": 1.5}
    row = {"dtype": "float32", "ratio": spread, "repetitions": 2}
    assert json.loads(capsys.readouterr().out) == {"processes": 3, "rows": [row]}
    for command in commands:
        assert set(passed_on) <= set(command)
        assert not any("--processes" in flag for flag in command)
    assert main(["bench", "step", f"--config={DEBUG}", "--processes=2"]) == 0
    assert "2 (1 to 3)" in capsys.readouterr().out
    monkeypatch.setattr(subprocess, "run", fail)
    assert main(["bench", "step", f"--config={DEBUG}", "--processes=2"]) == 1
    assert "failed: no room" in capsys.readouterr().err


@pytest.fixture
def _peaks(monkeypatch):
    """Peaks of no machine: measuring them takes longer than the layers of these tests."""
    monkeypatch.setattr(bench, "measure_peaks", lambda: Peaks(gflops=100.0, gbytes=10.0))


LAYER = ["bench", "layer", "--repetitions=1", "--shapes=64:8:4:4:2,64:8:4:4:2:skewed"]


def assert_figures_agree(row, dense):
    """Checks a row of `bench layer` against its own times, and those of the dense layer."""
    assert row["ratio_to_dense"] == pytest.approx(row["ms"] / dense["ms"], rel=0.02, abs=2e-3)
    low, high = row["quartiles_ms"]
    assert low <= row["ms"] <= high
    assert row["gflops"] > 0 and row["temporary_bytes"] >= 0
    passes = {"forward": 1, "forward_backward": 3}[row["direction"]]
    num_networks = 2 if row["implementation"] == "dense_layer" else 4
    weight_bytes = passes * 3 * 8 * 4 * 4 * num_networks
    assert row["gbytes"] == pytest.approx(weight_bytes / row["ms"] / 1e6, abs=6e-3)
    fraction = weight_bytes / row["ms"] / 1e7
    assert row["fraction_of_peak_gbytes"] == pytest.approx(fraction, abs=6e-4)


@pytest.mark.usefixtures("_peaks")
def test_bench_layer_writes_a_row_for_every_shape_direction_and_name(capsys, tmp_path):
    files = [f"--csv={tmp_path / 'rows.csv'}", f"--plot={tmp_path / 'ratios.svg'}"]
    implementations = ["tiled", "ragged", "padded", "dense", "capacity 1.25"]
    flag = f"--implementations={','.join(implementations)}"
    assert main([*LAYER, flag, "--json", *files]) == 0
    rows = json.loads(capsys.readouterr().out)
    names = ["dense_layer", *implementations]
    expected = itertools.product([False, True], ["forward", "forward_backward"], names)
    named = [(row["skewed"], row["direction"], row["implementation"]) for row in rows]
    assert named == list(expected)
    sizes = {"tokens": 64, "d_model": 8, "d_expert": 4, "num_experts": 4, "top_k": 2}
    for row in rows:
        assert row == row | sizes
        if row["implementation"] == "dense_layer":
            dense = row  # the first of its shape and direction
        assert_figures_agree(row, dense)
    written = list(csv.DictReader((tmp_path / "rows.csv").open()))
    for line, row in zip(written, rows, strict=True):
        assert (line["ms"], line["q75_ms"]) == (str(row["ms"]), str(row["quartiles_ms"][1]))
    root = ElementTree.parse(tmp_path / "ratios.svg").getroot()
    shown = "".join(root.itertext())
    assert all(name in shown for name in implementations) and "skewed" in shown


@pytest.mark.usefixtures("_peaks")
def test_bench_decode_says_what_reading_the_chosen_experts_would_take(capsys):
    arguments = [
        "bench",
        "decode",
        "--repetitions=1",
        "--shapes=1:8:4:64:2",
        "--implementations=tiled",
    ]
    assert main([*arguments, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["active_experts"] == 2 and row["direction"] == "forward"
    weight_bytes = 2 * 3 * 8 * 4 * 4
    assert row["reading_ms"] == pytest.approx(weight_bytes / 10e6, abs=1e-3)
    assert row["gbytes"] == pytest.approx(weight_bytes / row["ms"] / 1e6, abs=0.01)
    assert main(arguments) == 0
    assert "1 tokens, D 8, F 4, E 64, K 2, float32: forward" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer", "--shapes=mixtrall"], "--shapes: 'mixtrall' must be one of switch, mixtral"),
        (["layer", "--shapes=1:2:3:4"], "'1:2:3:4' must be one of"),
        (["layer", "--shapes=64:8:4:4:0"], "five positive numbers"),
        (["layer", "--shapes=64:8:4:4:5"], "top_k=5 must be at most num_experts=4"),
        (
            ["layer", "--implementations=tilde"],
            "--implementations=tilde must be some of auto, tiled",
        ),
        (["decode", "--plot=x.svg"], "--plot belongs to moejax bench layer"),
        (["step", "--shapes=mixtral"], "--shapes belongs to moejax bench layer, decode, compiled"),
        (["layer", "--csv=/nowhere/rows.csv"], "/nowhere is not a folder"),
        (["layer", "--repetitions=-1"], "--repetitions=-1 must be at least 0"),
        (["layer", "--processes=0"], "--processes=0 must be at least 1"),
        (["packed", "--processes=2"], "--processes belongs to moejax bench layer, decode, step"),
        (["layer", "--processes=2", "--csv=rows.csv"], "--csv is of one process"),
    ],
)
def test_a_wrong_benchmark_is_refused_before_anything_is_measured(capsys, arguments, message):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


LAYER_OF_ROWS = {
    "tokens": 64,
    "d_model": 8,
    "d_expert": 4,
    "num_experts": 4,
    "top_k": 2,
    "skewed": False,
}
FIGURES = {"fits": True, "flops": 2_500_000_000, "temporary_bytes": 1_500_000, "open_loops": 0}
ROWS = [
    LAYER_OF_ROWS
    | {"implementation": name, "direction": "forward", "dtype": "bfloat16", "target": "h100"}
    | figures
    for name, figures in {
        "dense_layer": FIGURES | {"flops_over_ideal": 1.0, "kernels": {}},
        "tokamax": FIGURES | {"flops_over_ideal": 1.002, "kernels": {"tokamax triton": 2}},
        "ragged": dict.fromkeys([*FIGURES, "flops_over_ideal", "kernels"]) | {"fits": False},
    }.items()
]


def test_bench_compiled_shows_arithmetic_memory_and_kernels(capsys, monkeypatch, tmp_path):
    asked = []

    def bench_compiled(*arguments):
        asked.append(arguments)
        return ROWS

    monkeypatch.setattr(bench, "bench_compiled", bench_compiled)
    arguments = [
        "bench",
        "compiled",
        "--target=h100",
        "--shapes=olmoe",
        f"--csv={tmp_path / 'rows.csv'}",
    ]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for text in ("64 tokens", "1.002", "2.5", "1.5", "2 tokamax triton", "XLA's own", "too large"):
        assert text in shown
    assert " ms" not in shown
    ((shape, names, dtype, target),) = asked
    assert (str(shape), names, dtype, target.name) == ("4096:512:256:64:8", [], "bfloat16", "h100")
    written = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [line["kernels"] for line in written] == ["", "2 tokamax triton", ""]
    assert [line["fits"] for line in written] == ["True", "True", "False"]
    assert main([*arguments, "--json", "--implementations=padded,tokamax", "--dtype=float32"]) == 0
    assert json.loads(capsys.readouterr().out) == ROWS
    assert asked[1][1:3] == (["padded", "tokamax"], "float32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compiled"], "needs --target, one of h100, b200, v5p, v6e"),
        (["compiled", "--target=a100"], "a100"),
        (
            ["compiled", "--target=h100", "--implementations=cublas"],
            "--implementations=cublas must be some of auto",
        ),
        (["layer", "--target=h100"], "--target belongs to moejax bench compiled"),
        (
            ["layer", "--implementations=tokamax"],
            "--implementations=tokamax cannot run here: its kernels are for",
        ),
        (["compiled", "--target=h100", "--plot=x.svg"], "--plot belongs to moejax bench layer"),
    ],
)
def test_bench_compiled_refuses_what_cannot_be(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_bench_compiled_without_the_compiler_names_the_extra(capsys, monkeypatch):
    from jax.experimental import topologies

    def missing(*args, **kwargs):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    assert main(["bench", "compiled", "--target=b200"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install -e '.[cuda13]'" in error
