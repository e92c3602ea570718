"""The families, by what `config.json` calls them; each is one file."""

from moejax.interop.hf.families import (
    flex_olmo,
    gpt_oss,
    granitemoe,
    granitemoeshared,
    jetmoe,
    longcat_flash,
    olmoe,
    phimoe,
)
from moejax.interop.hf.families.deepseek import deepseek_v2, deepseek_v3
from moejax.interop.hf.families.llama import llama
from moejax.interop.hf.families.mistral import mistral, mixtral
from moejax.interop.hf.families.qwen import qwen2_moe, qwen3, qwen3_moe
from moejax.interop.hf.family import Family

FAMILIES: dict[str, Family] = {
    "deepseek_v2": deepseek_v2.FAMILY,
    "deepseek_v3": deepseek_v3.FAMILY,
    "flex_olmo": flex_olmo.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
    "granitemoe": granitemoe.FAMILY,
    "granitemoeshared": granitemoeshared.FAMILY,
    "jetmoe": jetmoe.FAMILY,
    "llama": llama.FAMILY,
    "longcat_flash": longcat_flash.FAMILY,
    "mistral": mistral.FAMILY,
    "mixtral": mixtral.FAMILY,
    "olmoe": olmoe.FAMILY,
    "phimoe": phimoe.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
}
"""A new family is a line here."""
