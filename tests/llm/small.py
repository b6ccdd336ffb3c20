"""A small random Llama with a byte-level tokenizer: what it writes is noise, full of broken UTF-8."""

from __future__ import annotations

from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

import llm
import ops
from llm.load import build

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 400,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
EOS = 257
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def model(rng: np.random.Generator, dtype: str = "float32", **changes: Any) -> Any:
    """The model with weights drawn from `rng`; `changes` to its config."""
    result = build(CONFIG | changes, dtype)
    for name, spec in list(result.parameters()):
        values = rng.standard_normal(spec.shape) * 0.4 + (1.0 if name.endswith("norm.weight") else 0.0)
        result.set_parameter(name, ops.tensor(values.astype("float32"), dtype))
    result.tokenizer = tokenizer()
    return result


def tokenizer(**options: Any) -> llm.Tokenizer:
    """Ids 0 to 255 are bytes, 256 begins a text, 257 ends it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return llm.Tokenizer(backend, bos_id=256, eos_ids=[EOS], bos_token="<s>", eos_token="</s>", **options)


class Addresses(ops.Interceptor):
    """Remembers the address of every call."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def call(self, call: ops.Call, launch: Any) -> Any:
        self.seen.append(call.address)
        return launch(call)


def addresses(run: Any) -> list[str]:
    """Where the calls of `run()` are made."""
    recorder = Addresses()
    with ops.intercepted(recorder):
        run()
    return recorder.seen
