"""RWKV 4: no attention but sums that decay, so that a state of fixed size is all it remembers. HF: RwkvForCausalLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import ops
from llm.nn import Embedding, LayerNorm, Linear, Module
from llm.recurrent import Memory, Recurrent
from ops import Spec, Tensor

_EPS = 1e-5  # of the last norm, whatever the config says of the others


@dataclass(kw_only=True)
class Config:
    """HF's RwkvConfig, as far as it changes what is computed."""

    vocab_size: int = 50277
    context_length: int = 1024
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    attention_hidden_size: int | None = None
    intermediate_size: int | None = None
    layer_norm_epsilon: float = 1e-5
    rescale_every: int = 6
    tie_word_embeddings: bool = False

    def __post_init__(self):
        self.attention_hidden_size = self.attention_hidden_size or self.hidden_size
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size

    @property
    def max_position_embeddings(self) -> int:
        return self.context_length


class State(NamedTuple):
    """What a layer remembers: the last token's inputs of both its parts [1, width], and `ops.wkv`'s sums [3, width]."""

    attention: Tensor
    feed_forward: Tensor
    sums: Tensor


class Attention(Module):
    def __init__(self, c: Any, layer: int, dtype: str):
        inner = c.attention_hidden_size
        self.time_decay: Any = Spec((inner,), "float32")
        self.time_first: Any = Spec((inner,), "float32")
        self.time_mix_key: Any = Spec((1, 1, c.hidden_size), dtype)
        self.time_mix_value: Any = Spec((1, 1, c.hidden_size), dtype)
        self.time_mix_receptance: Any = Spec((1, 1, c.hidden_size), dtype)
        self.key = Linear(c.hidden_size, inner, dtype=dtype)
        self.value = Linear(c.hidden_size, inner, dtype=dtype)
        self.receptance = Linear(c.hidden_size, inner, dtype=dtype)
        self.output = Linear(inner, c.hidden_size, dtype=dtype)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, Tensor]:
        before = state.attention
        key = self.key(ops.token_mix(x, before, self.time_mix_key.reshape(-1)))
        value = self.value(ops.token_mix(x, before, self.time_mix_value.reshape(-1)))
        receptance = self.receptance(ops.token_mix(x, before, self.time_mix_receptance.reshape(-1)))
        mixed, sums = ops.wkv(key, value, self.time_decay, self.time_first, state.sums)
        return self.output(ops.sigmoid(receptance) * mixed), sums


class FeedForward(Module):
    def __init__(self, c: Any, dtype: str):
        self.time_mix_key: Any = Spec((1, 1, c.hidden_size), dtype)
        self.time_mix_receptance: Any = Spec((1, 1, c.hidden_size), dtype)
        self.key = Linear(c.hidden_size, c.intermediate_size, dtype=dtype)
        self.receptance = Linear(c.hidden_size, c.hidden_size, dtype=dtype)
        self.value = Linear(c.intermediate_size, c.hidden_size, dtype=dtype)

    def forward(self, x: Tensor, state: State) -> Tensor:
        key = ops.relu(self.key(ops.token_mix(x, state.feed_forward, self.time_mix_key.reshape(-1))))
        receptance = self.receptance(ops.token_mix(x, state.feed_forward, self.time_mix_receptance.reshape(-1)))
        return ops.sigmoid(receptance) * self.value(key * key)


class Block(Module):
    """Past every `rescale_every` layers all is halved, so that it stays in float16's range."""

    def __init__(self, c: Any, layer: int, dtype: str):
        self.layer, every = layer, c.rescale_every
        self.share = 0.5 ** (layer // every) if every else 1.0
        self.halves = bool(every) and (layer + 1) % every == 0
        if layer == 0:
            self.pre_ln = LayerNorm(c.hidden_size, c.layer_norm_epsilon, dtype)
        self.ln1 = LayerNorm(c.hidden_size, c.layer_norm_epsilon, dtype)
        self.ln2 = LayerNorm(c.hidden_size, c.layer_norm_epsilon, dtype)
        self.attention = Attention(c, layer, dtype)
        self.feed_forward = FeedForward(c, dtype)

    def forward(self, x: Tensor, cache: Memory, start: State) -> Tensor:
        state = cache.state(self.layer, start)
        x = self.pre_ln(x) if self.layer == 0 else x
        first = self.ln1(x)
        attended, sums = self.attention(first, state)
        x = x + self._scaled(attended)
        second = self.ln2(x)
        x = x + self._scaled(self.feed_forward(second, state))
        cache.keep(self.layer, State(ops.copy(first[-1:]), ops.copy(second[-1:]), sums))
        return x * 0.5 if self.halves else x

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.share == 1.0 else x * self.share


class Rwkv(Recurrent):
    model_type = "rwkv"
    base = "rwkv."
    heads = ("head",)

    def __init__(self, config: Config, dtype: str = "float32"):
        self.config, self.dtype = config, dtype
        self.embeddings = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.blocks = [Block(config, i, dtype) for i in range(config.num_hidden_layers)]
        self.ln_out = LayerNorm(config.hidden_size, _EPS, dtype)
        if not config.tie_word_embeddings:
            self.head = Linear(config.hidden_size, config.vocab_size, dtype=dtype)
        sums = np.zeros((3, config.attention_hidden_size or 0), "float32")
        sums[2] = -1e30
        nothing = ops.zeros((1, config.hidden_size), dtype)
        self._start = State(nothing, nothing, ops.tensor(sums))

    def forward(self, ids: Any, cache: Memory | None = None, logits_to_keep: int = 0) -> Tensor:
        """Logits [n, vocabulary] for token ids [n], or for the last `logits_to_keep` of them; 0 is all.

        Raises ContextOverflow when the cache has no room for n more tokens.
        """
        ids = self.ids(ids)
        cache = self.new_cache() if cache is None else cache
        cache.extend(len(ids))
        read = cache.unread(ids)
        x = self.embeddings(read)
        for block in self.blocks:
            x = block(x, cache, self._start)
        x = self.ln_out(self.last(x[len(read) - len(ids) :], logits_to_keep))
        logits = ops.linear(x, self.embeddings.weight) if self.config.tie_word_embeddings else self.head(x)
        cache.commit(ids)
        return logits
