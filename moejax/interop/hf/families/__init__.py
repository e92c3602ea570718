"""The families, by what `config.json` calls them; each is one file."""

from moejax.interop.hf.families import mixtral, olmoe, qwen2_moe, qwen3_moe
from moejax.interop.hf.family import Family

FAMILIES: dict[str, Family] = {
    "mixtral": mixtral.FAMILY,
    "olmoe": olmoe.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
}
"""A new family is a line here."""
