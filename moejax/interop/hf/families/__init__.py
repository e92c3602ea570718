"""The families, by what `config.json` calls them; each is one file."""

from moejax.interop.hf.families import (
    dbrx,
    dots1,
    ernie4_5_moe,
    flex_olmo,
    glm4_moe,
    gpt_oss,
    hunyuan_v1_moe,
    jetmoe,
    longcat_flash,
    minimax_m2,
    olmoe,
    phimoe,
)
from moejax.interop.hf.families.deepseek import deepseek_v2, deepseek_v3, kimi_k2
from moejax.interop.hf.families.granite import granitemoe, granitemoeshared
from moejax.interop.hf.families.llama import llama, llama4
from moejax.interop.hf.families.mistral import mistral, mixtral
from moejax.interop.hf.families.qwen import qwen2_moe, qwen3, qwen3_moe
from moejax.interop.hf.family import Family

FAMILIES: dict[str, Family] = {
    "dbrx": dbrx.FAMILY,
    "deepseek_v2": deepseek_v2.FAMILY,
    "deepseek_v3": deepseek_v3.FAMILY,
    "dots1": dots1.FAMILY,
    "ernie4_5_moe": ernie4_5_moe.FAMILY,
    "flex_olmo": flex_olmo.FAMILY,
    "glm4_moe": glm4_moe.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
    "granitemoe": granitemoe.FAMILY,
    "granitemoeshared": granitemoeshared.FAMILY,
    "hunyuan_v1_moe": hunyuan_v1_moe.FAMILY,
    "jetmoe": jetmoe.FAMILY,
    "kimi_k2": kimi_k2.FAMILY,
    "llama": llama.FAMILY,
    "llama4": llama4.FAMILY,
    "llama4_text": llama4.TEXT,
    "longcat_flash": longcat_flash.FAMILY,
    "minimax_m2": minimax_m2.FAMILY,
    "mistral": mistral.FAMILY,
    "mixtral": mixtral.FAMILY,
    "olmoe": olmoe.FAMILY,
    "phimoe": phimoe.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
}
"""A new family is a line here."""
