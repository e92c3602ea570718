"""Kimi K2 (Moonshot AI 2025): DeepSeek-V3 by another name."""

import dataclasses

from moejax.interop.hf.families.deepseek import deepseek_v3

FAMILY = dataclasses.replace(deepseek_v3.FAMILY, model_type="kimi_k2")
