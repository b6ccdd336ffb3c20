"""Attention on a GPU: a thread block a query and head, one pass over the keys it sees, with an online softmax.

The keys come in blocks of KEYS. Each thread scores one of them; then each takes its share of the values' width, and
adds up the block's values there. Scores are never in the device's memory. Dao et al. 2022; Milakov and Gimelshein 2018.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .. import tir
from .flash import Problem, capped

KEYS = 128  # keys of a block, and threads
_VECTOR = 4  # neighbours that a thread reads at once


def emit(p: Problem) -> None:
    """The body of the kernel."""
    with (
        T.thread_binding(p.q.shape[0], thread="blockIdx.x") as token,
        T.thread_binding(p.heads, thread="blockIdx.y") as head,
        T.thread_binding(KEYS, thread="threadIdx.x") as thread,
    ):
        _query(p, token, head, thread)


def _query(p: Problem, token: Any, head: Any, thread: Any) -> None:
    query = T.alloc_buffer((p.dim,), "float32", scope="shared")
    scores = T.alloc_buffer((KEYS,), "float32", scope="shared")
    weights = T.alloc_buffer((KEYS,), "float32", scope="shared")
    shares = -(-p.v_dim // KEYS)  # of the values' width: what a thread mixes
    mixed, score, top, new_top, total = (_local(size) for size in (shares, 1, 1, 1, 1))
    kv_head, position = head // p.group, p.positions[token]
    first = p.first_key(position)
    seen = tirx.min(position + 1, p.k.shape[0].astype("int32")) - first

    with T.serial(-(-p.dim // KEYS)) as i, T.If(i * KEYS + thread < p.dim), T.Then():
        T.buffer_store(query, tir.f32(p.q[token, head, i * KEYS + thread]), [i * KEYS + thread])
    with T.unroll(shares) as i:
        T.buffer_store(mixed, tir.f32(0.0), [i])
    start, one = p.sink(head)
    T.buffer_store(top, start, [0])
    T.buffer_store(total, one, [0])
    with T.serial((tirx.max(seen, 0) + (KEYS - 1)) // KEYS) as block:
        here, key = seen - block * KEYS, first + block * KEYS + thread
        T.buffer_store(score, tir.f32(0.0), [0])
        with T.If(thread < here), T.Then():
            _dot(p, query, p.k, key, kv_head, score)
        T.buffer_store(score, capped(score[0] * tir.f32(p.scale), p.softcap), [0])
        T.buffer_store(scores, score[0], [thread])
        T.buffer_store(new_top, top[0], [0])
        with T.serial(tirx.min(here, KEYS)) as j:
            T.buffer_store(new_top, tirx.max(new_top[0], scores[j]), [0])
        weight = tirx.if_then_else(thread < here, tir.exp(score[0] - new_top[0]), tir.f32(0.0))
        T.buffer_store(weights, weight, [thread])
        T.buffer_store(score, tir.exp(top[0] - new_top[0]), [0])  # what all before is worth now
        T.buffer_store(total, total[0] * score[0], [0])
        T.buffer_store(top, new_top[0], [0])
        with T.serial(tirx.min(here, KEYS)) as j:
            T.buffer_store(total, total[0] + weights[j], [0])
        with T.unroll(shares) as i, T.If(i * KEYS + thread < p.v_dim), T.Then():
            column = i * KEYS + thread
            T.buffer_store(mixed, mixed[i] * score[0], [i])
            with T.serial(tirx.min(here, KEYS)) as j:
                value = weights[j] * tir.f32(p.v[first + block * KEYS + j, kv_head, column])
                counted = tirx.if_then_else(weights[j] == tir.f32(0.0), tir.f32(0.0), value)
                T.buffer_store(mixed, mixed[i] + counted, [i])
    with T.unroll(shares) as i, T.If(i * KEYS + thread < p.v_dim), T.Then():
        result = mixed[i] / total[0]
        T.buffer_store(p.out, result.astype(str(p.out.dtype)), [token, head, i * KEYS + thread])


def _dot(p: Problem, query: Any, keys: Any, key: Any, kv_head: Any, score: Any) -> None:
    """score[0] += query . keys[key, kv_head]."""
    width = _VECTOR if p.dim % _VECTOR == 0 else 1
    loaded = T.alloc_buffer((width,), str(keys.dtype), scope="local")
    with T.serial(p.dim // width) as step:
        with T.vectorized(width) if width > 1 else T.serial(width) as i:
            T.buffer_store(loaded, keys[key, kv_head, step * width + i], [i])
        with T.unroll(width) as i:
            T.buffer_store(score, score[0] + query[step * width + i] * tir.f32(loaded[i]), [0])


def _local(size: int) -> Any:
    return T.alloc_buffer((size,), "float32", scope="local")
