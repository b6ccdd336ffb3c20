"""Small random models, drawn from a generator and saved, so that transformers loads the same checkpoint."""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import llm
import ops
from llm.load import build
from llm.models import llama
from llm.weights import read_directory
from ops.quantize import FORMATS

CONTEXT = 256  # tokens
_SHAPES = (  # few, as each asks for kernels of its own
    {"hidden_size": 64, "intermediate_size": 112, "num_attention_heads": 4, "num_key_value_heads": 2},
    {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 2},
)
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | {
    "original_max_position_embeddings": 64
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_ROPES: tuple[dict[str, Any] | None, ...] = (None, _LLAMA3, YARN, {"rope_type": "linear", "factor": 2.5})


class CappedAttention(llama.Attention):
    """Llama's attention with the scores bounded, as Gemma 2 has it."""

    cap = 4.0

    def forward(self, x, rotate, cache):
        tokens = x.shape[0]
        q, k, v = (each(x).reshape(tokens, -1, self.head_dim) for each in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q), rotate(k)
        keys, values = cache.write(k, v, rotate.positions)
        mixed = ops.attention(q, keys, values, rotate.positions, scale=self.head_dim**-0.5, softcap=self.cap)
        return self.o_proj(mixed.reshape(tokens, -1))


@dataclass
class Pair:
    """A model, and the checkpoint that it was loaded from."""

    model: Any
    folder: tempfile.TemporaryDirectory

    def reference(self, kind: str) -> Any:
        """What the model is held against: "hf", "weights" (of the checkpoint, by its names) or "float64"."""
        return {"hf": lambda: self.hf, "weights": lambda: self.weights, "float64": lambda: "float64"}[kind]()

    @functools.cached_property
    def hf(self) -> Any:
        """Of Hugging Face, in float32, with the same weights."""
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        load = transformers.AutoModelForCausalLM.from_pretrained
        return load(self.folder.name, dtype=torch.float32, attn_implementation="eager").eval()

    @functools.cached_property
    def weights(self) -> Mapping[str, np.ndarray]:
        return {name: np.array(values) for name, values in read_directory(Path(self.folder.name)).items()}

    def close(self) -> None:
        self.folder.cleanup()


def draw(
    rng: np.random.Generator, model_type: str = "llama", held: str = "float32",
    larger: Mapping[str, float] | None = None, capped: bool = False, **pinned: Any,
) -> Pair:  # fmt: skip
    """A model with a config and weights from `rng`; `pinned` is what the config must have.

    `held` is the dtype of everything, or the format of the matrices. `larger` are factors on weights by a pattern of
    their names. `capped`: attention with a softcap, which transformers' Llama has not.
    """
    config = _config(rng, model_type) | pinned
    stored = build(config, "float32" if held in FORMATS else held)
    for name, spec in list(stored.parameters()):
        values = _values(rng, name, spec.shape)
        for pattern, factor in (larger or {}).items():
            values *= factor if re.fullmatch(pattern, name) else 1.0
        stored.set_parameter(name, ops.tensor(values.astype("float32"), spec.dtype))
    folder = tempfile.TemporaryDirectory(prefix="limpid-bug-hunt-")
    stored.save(Path(folder.name) / "model")
    for path in (Path(folder.name) / "model").iterdir():
        path.rename(Path(folder.name) / path.name)
    model = _packed(stored, config, held) if held in FORMATS else llm.load(folder.name, progress=False)
    if capped:
        for layer in model.layers:
            layer.self_attn.__class__ = CappedAttention
    return Pair(model, folder)


def _packed(stored: Any, config: dict[str, Any], held: str) -> Any:
    """The same model with packed matrices, made here: random ones would only fill the disk cache."""
    model = build(config, "float32", held)
    values = dict(stored.parameters())
    for name, spec in list(model.parameters()):
        model.set_parameter(name, ops.tensor(values[name].numpy(), spec.dtype))
    return model


def _config(rng: np.random.Generator, model_type: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": int(rng.choice([131, 262])),
        "num_hidden_layers": int(rng.integers(3, 9)),
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": float(rng.choice([1e-5, 1e-6])),
        "rope_theta": float(rng.choice([10000.0, 500000.0])),
        "tie_word_embeddings": False,
    } | _SHAPES[rng.integers(len(_SHAPES))]
    if model_type == "mistral":
        return config | {"sliding_window": int(rng.choice([8, 24]))}
    return config


def varied(rng: np.random.Generator, model_type: str = "llama") -> dict[str, Any]:
    """What else the config of a clean model may have: tied embeddings, biases, scaled positions."""
    more: dict[str, Any] = {"tie_word_embeddings": bool(rng.integers(2))}
    if model_type == "llama":
        more |= dict.fromkeys(("attention_bias", "mlp_bias"), bool(rng.integers(2)))
        more |= {"rope_scaling": _ROPES[rng.integers(len(_ROPES))]}
    return more


def _values(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Such that every layer counts and activations stay near 1; embeddings are small, as trained ones are."""
    if name.endswith("norm.weight"):
        return 1 + 0.2 * rng.standard_normal(shape)
    deviation = 0.3 if len(shape) == 1 else 0.05 if name.startswith("embed_tokens") else shape[-1] ** -0.5
    return deviation * rng.standard_normal(shape)


def prompt(rng: np.random.Generator, model: Any, tokens: int) -> list[int]:
    """Random token ids."""
    return rng.integers(0, model.config.vocab_size, tokens).tolist()
