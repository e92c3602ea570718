"""The families, by what `config.json` calls them; each is one file."""

from moejax.interop.hf.families import (
    deepseek_v3,
    flex_olmo,
    gpt_oss,
    granitemoe,
    granitemoeshared,
    jetmoe,
    longcat_flash,
    mixtral,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_moe,
)
from moejax.interop.hf.family import Family

FAMILIES: dict[str, Family] = {
    "deepseek_v3": deepseek_v3.FAMILY,
    "flex_olmo": flex_olmo.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
    "granitemoe": granitemoe.FAMILY,
    "granitemoeshared": granitemoeshared.FAMILY,
    "jetmoe": jetmoe.FAMILY,
    "longcat_flash": longcat_flash.FAMILY,
    "mixtral": mixtral.FAMILY,
    "olmoe": olmoe.FAMILY,
    "phimoe": phimoe.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
}
"""A new family is a line here."""
