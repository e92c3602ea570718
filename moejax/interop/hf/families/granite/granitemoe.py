"""Granite 3.0 and 3.1 MoE (IBM 2024)."""

from moejax.interop.hf.family import Family
from moejax.interop.hf.llama import OUTER
from moejax.interop.hf.shared.granite import GRANITE, LAYER, MOE

FAMILY = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    keys=GRANITE,
    outer=OUTER,
    layer=LAYER,
    dense=(),
    moe=MOE,
)
