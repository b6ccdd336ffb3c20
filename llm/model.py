"""What every language model has besides its layers: a config, a tokenizer, a cache, text in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

import ops
from ops import Tensor

from .cache import Cache
from .errors import UserError
from .nn import Module

if TYPE_CHECKING:
    from .generate import Generation, TextStream
    from .tokenizer import Tokenizer

__limpid_plumbing__ = True


class Model(Module):
    """Base of the architectures in `llm/models`. `model(ids, cache)` gives logits [n, vocabulary].

    `base` is the prefix that the checkpoint puts before the names of everything but the `heads`.
    """

    model_type: ClassVar[str]
    hf_class: ClassVar[str | None] = None  # None: the class's own name and "ForCausalLM"
    base: ClassVar[str] = "model."
    heads: ClassVar[tuple[str, ...]] = ("lm_head",)
    ignored: ClassVar[tuple[str, ...]] = ("rotary_emb.inv_freq",)  # buffers in old checkpoints, computed here

    kept: ClassVar[tuple[str, ...]] = ()  # ends of names of small matrices that are not packed: a choice hangs on them

    config: Any
    layers: Any
    dtype: str
    device: str = "cpu"  # where it runs: `to` moves it
    cache_dtype: str | None = None  # what a new cache holds; None: as the keys come
    tokenizer: Tokenizer | None = None

    def new_cache(self, dtype: str | None = None) -> Cache:
        """An empty cache for this model. `dtype` as for `Cache`; None is the model's own `cache_dtype`."""
        return Cache(self.context, dtype or self.cache_dtype, self.device)

    def to(self, device: str) -> Self:
        """Move the model to a device, "cpu", "cuda" or "emulate"; caches made before stay where they are."""
        super().to(device)
        self.device = device
        return self

    @property
    def context(self) -> int:
        """How many tokens the model can attend to; dynamic NTK stretches it by its factor."""
        rope = getattr(self.config, "rope", None)
        scaling = rope and rope.scaling
        stretch = scaling.factor if scaling and scaling.rope_type == "dynamic" else 1
        return int(self.config.max_position_embeddings * stretch)

    @property
    def token_values(self) -> int:
        """How many numbers a cache keeps of a token, in all layers."""
        return len(self.layers) * 2 * self.config.num_key_value_heads * self.config.head_dim

    def ids(self, given: Any) -> Tensor:
        """Token ids as an int32 tensor [n], from a list, an array or a tensor. Raises UserError."""
        if isinstance(given, str):
            raise UserError("ids are token ids, given text; use model.tokenizer.encode(text), or model.generate(text)")
        if type(given) is list and len(given) == 1 and type(given[0]) is int and 0 <= given[0] < self.config.vocab_size:
            return ops.integer(given[0], self.device)  # a decode step
        if isinstance(given, Tensor):
            given = given.numpy()
        array = np.asarray(given)
        if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
            raise UserError(f"ids must be a non-empty list of ints; given shape {array.shape}, dtype {array.dtype}")
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise UserError(f"token id {wrong} is outside the vocabulary of {self.config.vocab_size}")
        return ops.tensor(np.ascontiguousarray(array, "int32"), device=self.device)

    def last(self, x: Tensor, count: int) -> Tensor:
        """The last `count` rows of x, all where there are not so many, or for 0. Raises UserError."""
        if count < 0:
            raise UserError(f"logits_to_keep is {count}, expected a number of tokens, or 0 for all of them")
        return x[-count:]

    def from_checkpoint(self, named: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The arrays of the parameters, by the checkpoint's names, where a checkpoint holds them in another way."""
        return named

    def to_checkpoint(self, named: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The inverse of `from_checkpoint`: what `save` writes."""
        return named

    def named_tensors(self) -> dict[str, Tensor]:
        """Weights by the names that a checkpoint gives them."""
        missing = [name for name, weight in self.parameters() if not isinstance(weight, Tensor)]
        if missing:
            raise UserError(f"weights are not loaded: {', '.join(missing[:8])}")
        prefixed = {
            name: name if name.split(".")[0] in self.heads else self.base + name for name, _ in self.parameters()
        }
        return {prefixed[name]: weight for name, weight in self.parameters() if isinstance(weight, Tensor)}

    def save(self, directory: str | Path) -> Path:
        """Write the model in Hugging Face's layout, atomically; `llm.load` gives it back equal."""
        from .load import save

        return save(self, Path(directory))

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Generation:
        """The text that follows `prompt`; options as for `llm.generate.TextStream`."""
        return self.stream(prompt, **options).finish()

    def stream(self, prompt: str | Sequence[int], **options: Any) -> TextStream:
        """The same, piece by piece as it is made: iterate over it."""
        from .generate import TextStream

        return TextStream(self, prompt, **options)

    def chat(self, messages: list[dict[str, Any]], **options: Any) -> TextStream:
        """Stream the answer to `messages` ({"role", "content"}), rendered with the model's own chat template."""
        from .generate import chat_prompt

        return self.stream(chat_prompt(self, messages), **options)
