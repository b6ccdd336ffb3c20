"""The key/value cache: what attention has seen so far, one pair of buffers a layer, grown by doubling."""

from __future__ import annotations

import numpy as np

import ops
from ops import Tensor
from ops.spec import FLOATS

from .errors import ContextOverflow, UserError

_FIRST_CAPACITY = 64  # tokens


class Layer:
    """The keys and values of one layer: `keys` [capacity, kv_heads, dim], `values` alike; rows beyond the cache's
    length hold garbage."""

    def __init__(self, cache: Cache):
        self._cache = cache
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.held = 0  # tokens that it has the keys and values of

    def write(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values [n, kv_heads, dim] at `positions` int32 [n]; gives both whole buffers.

        Raises UserError when this layer was left out while the cache was filled: it would attend to garbage.
        """
        if self.held < len(self._cache):
            raise UserError(
                f"the cache holds {len(self._cache)} tokens, and {self.held} of them in this layer: "
                f"it was filled by other layers; start a new one"
            )
        if self.keys is None or self.values is None or self.keys.spec.shape[0] < self._cache.capacity:
            self.keys = _grown(self.keys, keys, self._cache)
            self.values = _grown(self.values, values, self._cache)
        ops.cache_write(self.keys, keys, positions)
        ops.cache_write(self.values, values, positions)
        self.held = len(self._cache) + len(positions)
        return self.keys, self.values


def _grown(buffer: Tensor | None, rows: Tensor, cache: Cache) -> Tensor:
    """A buffer with the cache's capacity that keeps what is valid; the same one while there is room."""
    if buffer is not None and buffer.shape[0] >= cache.capacity:
        return buffer
    larger = ops.empty((cache.capacity, *rows.shape[1:]), cache.dtype or rows.dtype, rows.device)
    if buffer is not None:
        larger.numpy()[: len(cache)] = buffer.numpy()[: len(cache)]
    return larger


class Cache:
    """`Cache(limit)` for at most `limit` tokens. `len(cache)` is how many it holds; `cache[i]` is layer i.

    `device` is the model's. `dtype` of the keys and values: float32, float16 or bfloat16, whatever the activations are;
    None is as they come. What is beyond float16's range, 65504, becomes infinite in a float16 cache: bfloat16 has the
    range of float32.

    `ids` are the tokens it holds. A model call takes room with `extend`, writes through the layers, and makes it count
    with `commit`: a call that is interrupted in between leaves the cache as it was. One sequence; activations are flat
    over tokens, each with its position, so several sequences can share a call once the cache maps positions to
    sequences.
    """

    def __init__(self, limit: int, dtype: str | None = None, device: str = "cpu"):
        if dtype not in (None, *FLOATS):
            raise UserError(f"cache dtype {dtype!r} is not supported; choose one of {', '.join(FLOATS)}")
        self.limit = limit
        self.dtype, self.device = dtype, device
        self.capacity = 0
        self.ids: list[int] = []
        self._layers: list[Layer] = []

    def __len__(self) -> int:
        return len(self.ids)

    def __bool__(self) -> bool:
        return True  # an empty cache is still a cache

    def __getitem__(self, index: int) -> Layer:
        while len(self._layers) <= index:
            self._layers.append(Layer(self))
        return self._layers[index]

    def require(self, tokens: int) -> None:
        """Raises ContextOverflow when `tokens` more do not fit."""
        if len(self) + tokens > self.limit:
            held = f"{len(self)} tokens in the cache and " if len(self) else ""
            raise ContextOverflow(
                f"{held}{tokens} {'more' if held else 'tokens'} do not fit: this model's context holds {self.limit}; "
                f"shorten the prompt"
            )

    def extend(self, tokens: int) -> Tensor:
        """Make room for `tokens` more and give their positions, int32 [tokens]. Raises ContextOverflow."""
        self.require(tokens)
        start, length = len(self), len(self) + tokens
        for layer in self._layers:
            layer.held = min(layer.held, start)  # not what was truncated, or never committed
        if length > self.capacity:
            self.capacity = min(max(length, 2 * self.capacity, _FIRST_CAPACITY), self.limit)
        if tokens == 1:
            return ops.integer(start, self.device)
        return ops.tensor(np.arange(start, length, dtype="int32"), device=self.device)

    def commit(self, ids: Tensor) -> None:
        """The tokens of the last `extend` are in: their ids, int32 [tokens]."""
        self.ids += ids.numpy().tolist()

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= len(self):
            raise ValueError(f"cannot truncate a cache of {len(self)} tokens to {length}")
        del self.ids[length:]

    def copy(self) -> Cache:
        """An independent cache with the same content."""
        twin = Cache(self.limit, self.dtype, self.device)
        twin.ids, twin.capacity = [*self.ids], self.capacity
        for i, layer in enumerate(self._layers):
            twin[i].held = layer.held
            for name in ("keys", "values"):
                if (buffer := getattr(layer, name)) is not None:
                    fresh = ops.empty(buffer.spec)
                    fresh.numpy()[: len(self)] = buffer.numpy()[: len(self)]
                    setattr(twin[i], name, fresh)
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        buffers = [each for layer in self._layers for each in (layer.keys, layer.values)]
        return sum(each.nbytes for each in buffers if each is not None)

    def __repr__(self) -> str:
        return f"<cache of {len(self)} tokens, {len(self._layers)} layers, {self.nbytes} bytes, at most {self.limit}>"
