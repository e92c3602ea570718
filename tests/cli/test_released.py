"""Released models on the command line: converted, evaluated, continued, and refused."""

import json
import shutil

import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cases.hf import FOLDER
from moejax.cli import main
from moejax.config import resolve
from moejax.interop.hf.save import save_model
from moejax.models import Decoder

TEXT = "The people of the United States, in order to form a more perfect union, do ordain this. "


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of documents."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(24):
        (folder / f"{number}.txt").write_text(f"{number}: {TEXT * 6}")
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A released model with a tokenizer, a chat template and defaults of generation."""
    folder = tmp_path_factory.mktemp("released") / "tiny"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    model = {
        "num_layers": 2,
        "d_model": 32,
        "vocab_size": tokenizer.get_vocab_size() + 3,
        "tied_embeddings": False,
        "embedding_multiplier": 1.0,
    }
    config = resolve(
        {
            "model": model,
            "moe": {"num_experts": 4, "top_k": 2, "d_expert": 24, "z_weight": 0.0},
            "data": {"tokenizer": "bytes", "seq_len": 64},
        }
    )
    save_model(Decoder(config, rngs=nnx.Rngs(params=0)), folder, "mixtral")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
        "{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text('{"do_sample": false, "max_new_tokens": 6}')
    return folder


@pytest.fixture(scope="module")
def run(released, tmp_path_factory):
    """The same as a run directory."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["convert", f"--hf={released}", f"--workdir={workdir}"]) == 0
    return workdir


def answer(capsys, *command):
    assert main([*command, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_released_model_and_its_run_have_the_same_loss_and_text(
    released, run, texts, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    text_flag = f"--data.files={texts}"
    from_folder = answer(capsys, "eval", f"--hf={released}", text_flag)
    assert 0 < from_folder["bits per byte"] < 20
    generate = ("generate", "--prompt=The people", "--prompt=States")
    of_folder = answer(capsys, *generate, f"--hf={released}")
    of_run = answer(capsys, *generate, f"--workdir={run}")
    assert of_folder == of_run
    assert [each["prompt"] for each in of_folder] == ["The people", "States"]
    again = answer(capsys, *generate, f"--hf={released}", "--seed=3")
    assert again == of_folder  # do_sample=false takes the most probable token
    hot = answer(capsys, *generate, f"--hf={released}", "--temperature=5", "--max_tokens=30")
    assert hot[0]["text"] != of_folder[0]["text"]


def test_a_chat_begins_with_the_template_and_shows_the_answer_alone(released, run, capsys):
    command = ("--chat", "--prompt=Hello")
    chats = [
        answer(capsys, "generate", f"--hf={released}", *command),
        answer(capsys, "generate", f"--workdir={run}", *command),
    ]
    assert chats[0] == chats[1]
    plain = answer(capsys, "generate", f"--hf={released}", "--prompt=Hello")
    assert plain[0]["text"] != chats[0][0]["text"]
    assert main(["generate", f"--hf={released}", *command]) == 0
    assert capsys.readouterr().out.strip() == chats[0][0]["text"].strip()


def test_a_converted_run_is_trained_by_a_recipe_that_fits_its_weights(
    run, released, texts, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "run")
    recipe = [
        "--config=run/config.json",
        "--workdir=run",
        "--report=false",
        "--config.data.source=files",
        f"--config.data.files={texts}",
        "--config.data.seq_len=32",
        "--config.train.batch_size=8",
        "--config.train.num_steps=2",
        "--config.optimizer.learning_rate=1e-9",
    ]
    assert main(["train", *recipe, "--config.model.d_model=64"]) == 2
    assert "holds a run with model.d_model=32, not 64" in capsys.readouterr().err
    trained = answer(capsys, "train", *recipe)
    assert trained["steps"] == 2
    evaluated = answer(capsys, "eval", f"--hf={released}", f"--data.files={texts}", "--seq_len=32")
    # A learning rate of almost nothing leaves the weights as they were.
    assert trained["validation loss"] == pytest.approx(evaluated["validation loss"], rel=1e-5)
    again = answer(capsys, "eval", "--workdir=run")
    assert again["step"] == 2
    assert main(["convert", "--workdir=run", "--to_hf=out"]) == 0
    out = tmp_path / "out"
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
    assert (out / "tokenizer.json").read_bytes() == (released / "tokenizer.json").read_bytes()


def test_a_model_without_a_tokenizer_takes_and_gives_ids(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ("--max_tokens=4", "--temperature=0", "--prompt=5 17 3")
    (found,) = answer(capsys, "generate", f"--hf={FOLDER / 'mixtral'}", *flags)
    ids = [int(word) for word in found["text"].split()]
    assert len(ids) == 4
    assert max(ids) < 257
    capsys.readouterr()
    assert main(["generate", f"--hf={FOLDER / 'mixtral'}", "--prompt=hello"]) == 2
    assert "text must be token ids below 257" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["convert"], "moejax convert with no flags is not clear; --hf=DIR --workdir=RUN converts"),
        (["convert", "--hf=HF"], "moejax convert with --hf is not clear"),
        (["convert", "--hf=none", "--workdir=new"], "--hf=none is not a folder"),
        (["convert", "--hf=HF", "--workdir=full"], "holds notes.txt; name a new folder"),
        (["convert", "--hf=HF", "--compare=none.npz"], "is no file of arrays"),
        (["convert", "--workdir=RUN", "--to_hf=new", "--family=olmoe"], "family olmoe"),
        (["convert", "--workdir=RUN", "--to_hf=new", "--step=3"], "holds no step 3; it holds [0]"),
        (["convert", "--hf=pickled", "--workdir=new"], "which is a pickle"),
        (["eval", "--hf=HF", "--workdir=RUN"], "--hf and --workdir exclude each other"),
        (["eval", "--hf=HF", "--step=1"], "--step=1 goes with --workdir only"),
        (["eval", "--workdir=RUN", "--seq_len=8"], "--seq_len=8 goes with --hf only"),
        (["generate", "--hf=HF", "--step=1"], "--step=1 goes with --workdir only"),
        (["generate", "--hf=MIXTRAL", "--chat"], "--chat needs a released model with a tokenizer"),
        (["train", "--config=none/config.json"], "none/config.json does not exist"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_writes_nothing(
    command, words, released, run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "pickled").mkdir()
    shutil.copyfile(released / "config.json", tmp_path / "pickled" / "config.json")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    before = sorted(tmp_path.rglob("*"))
    places = {"HF": str(released), "RUN": str(run), "MIXTRAL": str(FOLDER / "mixtral")}
    written = []
    for word in command:
        name, separator, value = word.partition("=")
        written.append(name + separator + places.get(value, value))
    assert main(written) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("moejax:")]
    assert len(lines) == 1
    assert words in lines[0]
    assert sorted(tmp_path.rglob("*")) == before
