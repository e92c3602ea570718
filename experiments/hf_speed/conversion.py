"""How long does converting a released model take, next to copying its folder?

    python experiments/hf_speed/conversion.py --scratch=FOLDER

A random Mixtral of 8 layers, 4.5 GB in float32, is written to FOLDER. It is copied, converted to a
run directory, and converted back, in turns; what comes back is compared with it bit for bit.
Printed are seconds, with those of starting Python, and the peak of memory.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from moejax.interop.hf.files.weights import INDEX
from moejax.interop.hf.load import abstract_model, read_config
from moejax.interop.hf.pieces import pieces_of
from moejax.interop.hf.places import named_arrays, shapes_of

CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 2240,
    "max_position_embeddings": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32_000,
}

FILE_BYTES = 2**29

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def write_model(folder: Path, dtype: str) -> None:
    """Writes random weights in the layout of Mixtral, in several files with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": dtype}))
    config, family = read_config(folder)
    _, params, others = abstract_model(config)
    shapes = shapes_of(named_arrays(params) | named_arrays(others))
    random = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    file_of: dict[str, str] = {}

    def write_file() -> None:
        name = f"model-{len(set(file_of.values())) + 1:05}.safetensors"
        save_file(tensors, folder / name)
        file_of.update(dict.fromkeys(tensors, name))
        tensors.clear()

    for piece in pieces_of(config, family, shapes):
        for name, shape in piece.shapes().items():
            values = random.standard_normal(shape, np.float32) / 50
            tensors[name] = values.astype(DTYPES[dtype])
        if sum(tensor.nbytes for tensor in tensors.values()) >= FILE_BYTES:
            write_file()
    write_file()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": file_of}))


def run(command: Sequence[str]) -> tuple[float, float]:
    """Returns the seconds of a command, and its peak of memory in GB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return seconds, usage.ru_maxrss / 1e6


def copy(source: Path, target: Path) -> float:
    """Returns the seconds of a copy that is on disk."""
    copying, _ = run(["cp", "-r", str(source), str(target)])
    syncing, _ = run(["sync", *map(str, target.iterdir())])
    return copying + syncing


def digests(folder: Path) -> dict[str, str]:
    """Returns the digest of each tensor."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118, for it is no mapping
                found[name] = hashlib.sha256(file.get_tensor(name)).hexdigest()
    return found


def main() -> None:
    """Converts and copies in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, required=True, help="a folder that is made")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0, help="seconds before each command")
    args = parser.parse_args()
    source, target, there, back = (args.scratch / name for name in ("hf", "copy", "run", "back"))
    write_model(source, args.dtype)
    convert = [sys.executable, "-m", "moejax", "convert"]
    for _ in range(args.repetitions):
        for path in source.iterdir():
            path.read_bytes()  # into the file cache
        time.sleep(args.pause)
        copied = copy(source, target)
        shutil.rmtree(target)
        time.sleep(args.pause)
        to_run = run([*convert, f"--hf={source}", f"--workdir={there}"])
        time.sleep(args.pause)
        to_hf = run([*convert, f"--workdir={there}", f"--to_hf={back}"])
        print(
            f"copy {copied:.1f} s; to a run {to_run[0]:.1f} s, {to_run[1]:.2f} GB; "
            f"back {to_hf[0]:.1f} s, {to_hf[1]:.2f} GB",
            flush=True,
        )
        if digests(source) != digests(back):
            raise SystemExit("what came back differs")
        shutil.rmtree(there)
        shutil.rmtree(back)
    shutil.rmtree(args.scratch)


if __name__ == "__main__":
    main()
