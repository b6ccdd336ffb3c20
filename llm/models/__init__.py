"""One file an architecture, named after HF's `model_type`. They never import each other."""

from __future__ import annotations

import dataclasses
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
    "mamba2": "Mamba2",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "olmo": "Olmo",
    "olmo2": "Olmo2",
    "phi": "Phi",
    "phi3": "Phi3",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "rwkv": "Rwkv",
    "smollm3": "SmolLM3",
    "stablelm": "StableLm",
    "starcoder2": "Starcoder2",
}

_REGISTERED: dict[str, tuple[type, type]] = {}  # model_type -> config and model class, ahead of those above


def register(model_class: type, config_class: type) -> None:
    """Load checkpoints of `model_class.model_type` with these classes, which need not lie in a file of `llm/models`.

    `model_class` is a subclass of `llm.Model`, made as `model_class(config, dtype)`; `config_class` is a dataclass
    whose fields carry HF's names. The last one registered for a model_type wins, also over Limpid's own families.
    Raises TypeError for classes of another kind.
    """
    from llm.model import Model

    if not (isinstance(model_class, type) and issubclass(model_class, Model)):
        raise TypeError(f"register takes a subclass of llm.Model and its config class, given {model_class!r}")
    if not (isinstance(config_class, type) and dataclasses.is_dataclass(config_class)):
        raise TypeError(f"the config class of {model_class.__name__} must be a dataclass, given {config_class!r}")
    if not isinstance(getattr(model_class, "model_type", None), str):
        raise TypeError(f"{model_class.__name__} has no model_type: name it as config.json does")
    _REGISTERED[model_class.model_type] = config_class, model_class


def architecture(model_type: object) -> tuple[type, type]:
    """The config and model class for a config.json's `model_type`. Raises ConfigError."""
    if isinstance(model_type, str) and model_type in _REGISTERED:
        return _REGISTERED[model_type]
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        known = ", ".join(sorted({*ARCHITECTURES, *_REGISTERED}))
        raise ConfigError(
            f"model_type {model_type!r} is not supported; supported are {known}, and what llm.register adds"
        )
    module: ModuleType = importlib.import_module(f"llm.models.{model_type}")
    return module.Config, getattr(module, ARCHITECTURES[model_type])
