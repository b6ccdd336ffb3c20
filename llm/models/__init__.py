"""One file an architecture, named after HF's `model_type`. They never import each other."""

from __future__ import annotations

import importlib
from types import ModuleType

from llm.errors import ConfigError

# model_type -> the class in the file of that name
ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "gpt2": "GPT2",
    "gpt_neox": "GPTNeoX",
    "gpt_oss": "GptOss",
    "granite": "Granite",
    "llama": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "olmo2": "Olmo2",
    "phi": "Phi",
    "phi3": "Phi3",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "rwkv": "Rwkv",
    "smollm3": "SmolLM3",
    "stablelm": "StableLm",
}


def architecture(model_type: object) -> tuple[type, type]:
    """The config and model class for a config.json's `model_type`. Raises ConfigError."""
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ConfigError(f"model_type {model_type!r} is not supported; supported are {known}")
    module: ModuleType = importlib.import_module(f"llm.models.{model_type}")
    return module.Config, getattr(module, ARCHITECTURES[model_type])
