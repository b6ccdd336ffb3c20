"""Bugs in the cache: what attention reads is not what it should be, or not where."""

from __future__ import annotations

import numpy as np

import llm.cache
import ops
from llm.cache import Cache, Layer

from .bug import Bugs, Place
from .models import Attention, shifted
from .planting import changed

CACHES = Bugs()
extend, truncate = Cache.extend, Cache.truncate  # as they are without a bug


def write_too_far(self, keys, values, positions):
    """`Layer.write`, but for the keys of a decode step."""
    if self.keys is None or self.values is None or self.keys.spec.shape[0] < self._cache.capacity:
        self.keys = llm.cache._grown(self.keys, keys, self._cache)
        self.values = llm.cache._grown(self.values, values, self._cache)
    rows = positions
    if len(positions) == 1 and len(self._cache):
        rows = ops.tensor(np.minimum(positions.numpy() + np.int32(1), np.int32(len(self.keys) - 1)))
    ops.cache_write(self.keys, keys, rows)
    ops.cache_write(self.values, values, positions)
    self.held = len(self._cache) + len(positions)
    return self.keys, self.values


@CACHES.add("a row too far", Place("layers.0.self_attn/cache_write[0]", write_too_far, "ops.cache_write(self.keys"))
def _(model):
    """A decode step writes its keys one row too far."""
    with changed(Layer, write=write_too_far):
        yield


class WithoutLast(Attention):
    def mixed(self, q, keys, values, positions):
        return ops.attention(q, keys, values, shifted(positions, -1), scale=self.head_dim**-0.5)


@CACHES.add("last key not seen", Place("layers.1.self_attn/attention[0]", WithoutLast.mixed, "ops.attention("))
def _(model):
    """In layer 1 a token does not see itself."""
    with changed(model.layers[1].self_attn, __class__=WithoutLast):
        yield


def extend_onto_last(self, tokens):
    """`Cache.extend`, but a decode step starts at the last token."""
    positions = extend(self, tokens)
    return ops.integer(len(self) - 1) if tokens == 1 and len(self) else positions


@CACHES.add("decode overwrites the last", "layers.0.self_attn/rope[0]")
def _(model):
    """A decode step takes the position of the token before it."""
    with changed(Cache, extend=extend_onto_last):
        yield


def truncate_too_little(self, length):
    """`Cache.truncate`, but one more is kept when there is one."""
    truncate(self, min(length + 1, len(self)))


# What goes on after the truncation has wrong positions, is written a row too far, and sees a key too many: the first
# of these calls is the rotation of the queries, but any of them in layer 0 says what is wrong.
@CACHES.add(
    "truncate keeps one", "layers.0.self_attn/rope[0]", "layers.0.self_attn/rope[1]",
    "layers.0.self_attn/cache_write[0]", "layers.0.self_attn/attention[0]",
)  # fmt: skip
def _(model):
    """A truncated cache keeps one token too many."""
    with changed(Cache, truncate=truncate_too_little):
        yield


def grown_without_last(buffer, rows, cache):
    """`llm.cache._grown`, but the last valid row is not copied."""
    if buffer is not None and buffer.shape[0] >= cache.capacity:
        return buffer
    larger = ops.zeros((cache.capacity, *rows.shape[1:]), cache.dtype or rows.dtype, rows.device)
    if buffer is not None:
        larger.numpy()[: len(cache) - 1] = buffer.numpy()[: len(cache) - 1]
    return larger


# Growing makes no call: the write into the buffer that has lost a row, and the read of it, are the first that can tell.
@CACHES.add("growth loses a row", "layers.0.self_attn/cache_write[0]", "layers.0.self_attn/attention[0]", prompt=80)
def _(model):
    """A cache that grows, at 64 tokens, loses its last row. The prompt reaches beyond."""
    with changed(llm.cache, _grown=grown_without_last):
        yield
