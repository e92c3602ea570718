"""The published sizes: parameters counted from recipes against the published totals."""

import runpy
from pathlib import Path

import pytest

from moejax.config import resolve
from moejax.interop.hf.load import read_config
from moejax.planning.count import count

CONFIGS = Path(__file__).parents[2] / "configs"
DATA = Path(__file__).parents[1] / "data" / "published"

BILLIONS = {
    "mixtral_8x7b": (46.7, 12.9),
    "published/dbrx": (131.6, 36.5),
    "published/deepseek_v3": (671.0, 37.5),
    "published/flex_olmo_7x7b": (33.3, 24.6),
    "published/gpt_oss_shapes:120b": (116.8, 5.7),
    "published/gpt_oss_shapes:20b": (20.9, 4.2),
    "published/granite_3_0_1b_a400m": (1.33, 0.43),
    "published/jetmoe_8b": (8.52, 2.33),
    "published/llama_4_scout": (107.8, 17.2),
    "published/longcat_flash": (560.0, 32.2),
    "published/olmoe_1b_7b": (6.92, 1.28),
    "published/phi_3_5_moe": (41.9, 6.6),
    "published/qwen1_5_moe_a2_7b": (14.3, 2.7),
    "published/qwen3_30b_a3b": (30.5, 3.35),
}
"""Total and active parameters as their authors give them, rounded.

Active ones are here with the embedding, which those of gpt-oss (5.1 and 3.6 billion, and 0.6 of the
embedding) and DeepSeek-V3 (37 billion) leave out. Those of JetMoE are rounded down (2.2 billion).
Of LongCat-Flash they are the most, which a token has that chooses no identity (31.3 billion without
the embedding). Those of Llama 4 Scout (109 and 17 billion) include a model of images, of 0.9.
"""


@pytest.mark.parametrize("name", BILLIONS)
def test_a_published_size_has_the_published_number_of_parameters(name):
    file, _, size = name.partition(":")
    recipe = runpy.run_path(str(CONFIGS / f"{file}.py"))
    counted = count(resolve(recipe["get_config"](*filter(None, [size]))))
    total, active = BILLIONS[name]
    assert counted.total / 1e9 == pytest.approx(total, rel=0.005)
    assert counted.active / 1e9 == pytest.approx(active, rel=0.01)


def test_every_published_size_is_compared():
    names = {f"published/{path.stem}" for path in (CONFIGS / "published").glob("*.py")}
    assert names <= {name.partition(":")[0] for name in BILLIONS}


PUBLISHED = {
    "deepseek_v3": "published/deepseek_v3",
    "gpt_oss_120b": "published/gpt_oss_shapes:120b",
    "gpt_oss_20b": "published/gpt_oss_shapes:20b",
    "llama_4_scout": "published/llama_4_scout",
    "mixtral_8x7b": "mixtral_8x7b",
    "olmoe_1b_7b": "published/olmoe_1b_7b",
    "qwen3_30b_a3b": "published/qwen3_30b_a3b",
}
"""Which of the sizes each `config.json` in tests/data/published is, in its published spelling."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_json_as_published_has_the_published_number_of_parameters(name, tmp_path):
    (tmp_path / "config.json").write_bytes((DATA / f"{name}.json").read_bytes())
    config, _ = read_config(tmp_path)
    counted = count(config)
    total, active = BILLIONS[PUBLISHED[name]]
    assert counted.total / 1e9 == pytest.approx(total, rel=0.005)
    assert counted.active / 1e9 == pytest.approx(active, rel=0.01)
