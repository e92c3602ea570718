"""Released models in their folders, as runs are: loaded with their tokenizer, and evaluated."""

import dataclasses
from pathlib import Path

import jax

from moejax.config import Config, DataConfig, MeshConfig, resolve_recorded, to_dict
from moejax.data import prepare
from moejax.data.sources.choose import data_directory
from moejax.inference.evaluate import evaluate_on, make_eval_setup
from moejax.inference.load import LoadedRun
from moejax.interop.hf.conversion.texts import released_tokenizer
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.load import load_model, read_config
from moejax.moe.overrides import AS_TRAINED
from moejax.paths import resolve_path
from moejax.training.evaluation import Evaluation
from moejax.training.run_directory.text import LONGEST_ROW, TextPlaces, said_text
from moejax.training.state import split_model


def load_released(folder: str | Path) -> LoadedRun:
    """Loads a released model from its folder in the Hugging Face layout, onto the first device.

    Without a tokenizer in the folder, text is token ids (`IdTokenizer`).

    Args:
      folder: with `config.json` and safetensors files.

    Raises:
      HfError: it holds something else than such a model.
      ConfigError: a tokenizer with more ids than the embedding has rows.
      DataError: the tokenizer is damaged.
    """
    path = resolve_path(folder)
    config, _ = read_config(path)
    config, tokenizer = released_tokenizer(config, path)
    data = dataclasses.replace(config.data, seq_len=min(config.data.seq_len, LONGEST_ROW))
    corpus_config = dataclasses.replace(config, data=data)
    return LoadedRun(config=corpus_config, model=load_model(path), tokenizer=tokenizer, step=0)


def check_rows_are_outside(folder: str | Path, places: TextPlaces | None = None) -> None:
    """Raises `HfError` if rows would be prepared in a released model's folder.

    Args:
      folder: of the model, in which nothing is written.
      places: where the user says that text and rows are.
    """
    data = said_text(DataConfig(), places)
    rows = resolve_path(data_directory(data))
    if rows.is_relative_to(resolve_path(folder)):
        raise HfError(
            f"data.directory={data.directory} is in the released model's folder, where nothing is "
            "written; name one elsewhere by --data.directory="
        )


def evaluate_released(
    folder: str | Path,
    mesh: MeshConfig | None = None,
    *,
    places: TextPlaces | None = None,
    seq_len: int | None = None,
) -> tuple[Config, Evaluation]:
    """Evaluates a released model, on the speeches or on files of the user's.

    Args:
      folder: in the Hugging Face layout, with a tokenizer.
      mesh: of all devices; None splits the batch over as many as divide it, with the weights on
        each of them.
      places: of files, and of prepared rows.
      seq_len: tokens of a row; None takes the default of `data.seq_len`.

    Returns:
      The model's configuration with the text that it was evaluated on, and the figures.

    Raises:
      HfError: the folder holds something else than such a model, or rows would be prepared there.
      ConfigError: the model does not fit the mesh.
      DataError: there is no tokenizer, or no text.
    """
    check_rows_are_outside(folder, places)
    loaded = load_released(folder)
    data = said_text(loaded.config.data, places)
    data = dataclasses.replace(data, seq_len=seq_len or data.seq_len)
    config = resolve_recorded(to_dict(dataclasses.replace(loaded.config, data=data)))
    setup = make_eval_setup(config, mesh)
    corpus = prepare(data, loaded.tokenizer)
    _, params, router_state = split_model(loaded.model)
    params = jax.device_put(params, setup.shardings.params)
    router_state = jax.device_put(router_state, setup.shardings.router_state)
    return config, evaluate_on(corpus, setup, params, router_state, AS_TRAINED)
