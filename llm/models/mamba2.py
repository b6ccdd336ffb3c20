"""Mamba 2: no attention but a state that each token fades and adds to, by amounts of its own. HF: Mamba2ForCausalLM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

import ops
from llm.errors import ConfigError
from llm.nn import Embedding, Linear, Module, RMSNorm
from llm.recurrent import Memory, Recurrent
from ops import Spec, Tensor

# Nobody reads them: how to draw weights, how to cut the sums, and options of other implementations.
_UNREAD = (
    *("chunk_size", "intermediate_size", "norm_before_gate", "rescale_prenorm_residual", "time_step_floor"),
    *("time_step_init_scheme", "time_step_max", "time_step_min", "time_step_rank", "time_step_scale"),
)
_INFINITY = (math.inf, {"__float__": "Infinity"})  # as JSON of Python has it, and as transformers 5 writes it


@dataclass(kw_only=True)
class Config:
    """HF's Mamba2Config, as far as it changes what is computed. The upper `time_step_limit` may be None, for none."""

    vocab_size: int = 32768
    hidden_size: int = 4096
    num_hidden_layers: int = 64
    num_heads: int = 128
    head_dim: int = 64
    state_size: int = 128
    n_groups: int = 8
    expand: int = 2
    conv_kernel: int = 4
    hidden_act: Literal["silu"] = "silu"
    layer_norm_epsilon: float = 1e-5
    time_step_limit: tuple[float, float | None] = (0.0, None)
    use_bias: bool = False
    use_conv_bias: bool = True
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = False

    @staticmethod
    def modern(raw: Mapping[str, Any]) -> dict[str, Any]:
        """Without what nobody reads, and with None for an infinite limit."""
        values = {key: value for key, value in raw.items() if key not in _UNREAD}
        if isinstance(limits := values.get("time_step_limit"), list | tuple):
            values["time_step_limit"] = [None if each in _INFINITY else each for each in limits]
        return values

    @staticmethod
    def written(values: Mapping[str, Any]) -> dict[str, Any]:
        """With the infinity that transformers asks for."""
        low, high = values["time_step_limit"]
        return {**values, "time_step_limit": [low, math.inf if high is None else high]}

    def __post_init__(self):
        if self.hidden_size * self.expand != self.inner:
            raise ConfigError(
                f"hidden_size {self.hidden_size} * expand {self.expand} is {self.hidden_size * self.expand}, expected "
                f"num_heads {self.num_heads} * head_dim {self.head_dim}, {self.inner}"
            )
        if self.num_heads % self.n_groups:
            raise ConfigError(f"num_heads {self.num_heads} is not a multiple of n_groups {self.n_groups}")
        if self.conv_kernel < 2:
            raise ConfigError(f"conv_kernel is {self.conv_kernel}, expected at least 2: a token and the one before it")
        low, high = self.time_step_limit
        if high is not None and high < low:
            raise ConfigError(f"time_step_limit is {low} to {high}, expected the lower one first")

    @property
    def inner(self) -> int:
        """The width between the projections."""
        return self.num_heads * self.head_dim

    @property
    def channels(self) -> int:
        """The width of what is convolved: the values, and each group's b and c."""
        return self.inner + 2 * self.n_groups * self.state_size

    @property
    def max_position_embeddings(self) -> int:
        return 2**20  # a state has no end; this is what llama.cpp says too


class State(NamedTuple):
    """What a layer remembers: the last inputs of its convolution [kernel - 1, channels], `ops.selective_scan`'s state
    [heads, dim, size]."""

    inputs: Tensor
    scanned: Tensor


class Convolution(Module):
    """Each channel's weighted sum of the last `kernel` tokens, then silu."""

    def __init__(self, c: Any, dtype: str):
        self.weight: Any = Spec((c.channels, 1, c.conv_kernel), dtype)
        self.bias: Any = Spec((c.channels,), dtype) if c.use_conv_bias else None

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """The convolved tokens, and what stands before the next ones."""
        weight, count = self.weight.reshape(x.shape[1], -1), len(before)
        last = ops.copy(x[-count:]) if len(x) >= count else ops.concat(before[len(x) :], x)
        return ops.silu(ops.causal_conv(x, before, weight, self.bias)), last


class GatedNorm(Module):
    """The root-mean-square norm of x * silu(gate), of each group's share of the width by itself."""

    def __init__(self, c: Any, dtype: str):
        self.weight: Any = Spec((c.inner,), dtype)
        self.eps, self.width = c.layer_norm_epsilon, c.inner // c.n_groups
        self._ones = ops.tensor(np.ones(self.width, "float32"))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        gated = ops.silu_mul(gate, x).reshape(-1, self.width)
        return ops.rms_norm(gated, self._ones, eps=self.eps).reshape(x.shape) * self.weight


class Mixer(Module):
    def __init__(self, c: Any, dtype: str):
        self.config = c
        self.in_proj = Linear(c.hidden_size, c.inner + c.channels + c.num_heads, c.use_bias, dtype)
        self.conv1d = Convolution(c, dtype)
        self.dt_bias: Any = Spec((c.num_heads,), "float32")
        self.A_log: Any = Spec((c.num_heads,), "float32")
        self.D: Any = Spec((c.num_heads,), "float32")
        self.norm = GatedNorm(c, dtype)
        self.out_proj = Linear(c.inner, c.hidden_size, c.use_bias, dtype)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        config, tokens = self.config, len(x)
        gate, mixed, dt = _split(self.in_proj(x), config.inner, config.channels, config.num_heads)
        convolved, inputs = self.conv1d(mixed, state.inputs)
        size = config.n_groups * config.state_size
        values, b, c = _split(convolved, config.inner, size, size)
        low, high = config.time_step_limit
        step = ops.softplus(_as(dt, "float32") + self.dt_bias, low=low, high=high)
        values = values.reshape(tokens, config.num_heads, config.head_dim)
        b, c = (each.reshape(tokens, config.n_groups, config.state_size) for each in (b, c))
        y, scanned = ops.selective_scan(values, step, self.A_log, b, c, self.D, state.scanned)
        return self.out_proj(self.norm(y.reshape(tokens, config.inner), gate)), State(inputs, scanned)


def _split(x: Tensor, *widths: int) -> list[Tensor]:
    """The columns of x, so many for each."""
    ends = np.cumsum(widths).tolist()
    return [ops.columns(x, start=end - width, stop=end) for width, end in zip(widths, ends, strict=True)]


def _as(x: Tensor, dtype: str) -> Tensor:
    return x if x.dtype == dtype else ops.cast(x, dtype=dtype)


class Block(Module):
    """What the layers add up may be of more digits than what they compute with."""

    def __init__(self, c: Any, layer: int, dtype: str):
        self.layer, self.dtype = layer, dtype
        self.norm = RMSNorm(c.hidden_size, c.layer_norm_epsilon, dtype)
        self.mixer = Mixer(c, dtype)

    def forward(self, x: Tensor, cache: Memory, start: State) -> Tensor:
        mixed, state = self.mixer(self.norm(_as(x, self.dtype)), cache.state(self.layer, start))
        cache.keep(self.layer, state)
        return x + _as(mixed, x.dtype)


class Mamba2(Recurrent):
    model_type = "mamba2"
    base = "backbone."

    def __init__(self, config: Config, dtype: str = "float32"):
        self.config, self.dtype = config, dtype
        summed = "float32" if config.residual_in_fp32 else dtype
        self.embeddings = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.embeddings.dtype = summed  # of what it gives
        self.layers = [Block(config, i, dtype) for i in range(config.num_hidden_layers)]
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon, summed)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype)
        self._start = State(
            ops.zeros((config.conv_kernel - 1, config.channels), dtype),
            ops.zeros((config.num_heads, config.head_dim, config.state_size)),
        )

    def from_checkpoint(self, named: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Old checkpoints have one embedding, not several."""
        return {name.replace("backbone.embedding.", "backbone.embeddings."): array for name, array in named.items()}

    def forward(self, ids: Any, cache: Memory | None = None, logits_to_keep: int = 0) -> Tensor:
        """Logits [n, vocabulary] for token ids [n], or for the last `logits_to_keep` of them; 0 is all.

        Raises ContextOverflow when the cache has no room for n more tokens.
        """
        ids = self.ids(ids)
        cache = self.new_cache() if cache is None else cache
        cache.extend(len(ids))
        read = cache.unread(ids)
        x = self.embeddings(read)
        for block in self.layers:
            x = block(x, cache, self._start)
        x = _as(self.norm_f(self.last(x[len(read) - len(ids) :], logits_to_keep)), self.dtype)
        logits = ops.linear(x, self.embeddings.weight) if self.config.tie_word_embeddings else self.lm_head(x)
        cache.commit(ids)
        return logits
