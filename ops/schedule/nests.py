"""Loop nests of block definitions on a GPU: one after another, and those whose order matters, bound by hand.

Such a nest runs in its own order in each thread; its data-parallel axes are shared out. A buffer that each of its
threads uses a part of its own of becomes that part, in the thread's registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm_ffi
from tvm import ir, s_tir, tirx

from ..target import Gpu

THREADS = 256  # of a thread block, where nothing asks for fewer


def of(function: tirx.PrimFunc) -> list[Any]:
    return [each for each in _statements(function) if not isinstance(each, tirx.AllocBuffer)]


def _statements(function: tirx.PrimFunc) -> list[Any]:
    body = function.body.block.body
    return list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]


def with_nests(function: tirx.PrimFunc, nests: Sequence[Any], gone: Sequence[Any] = ()) -> tirx.PrimFunc | None:
    """The function with these loop nests only; its buffers, but those that are `gone`, are the outermost block's."""
    if not nests:
        return None
    realize, block = function.body, function.body.block
    body = nests[0] if len(nests) == 1 else tirx.SeqStmt(nests)
    buffers = [each for each in _buffers(function) if not any(each.same_as(other) for other in gone)]
    inner = s_tir.SBlock(
        block.iter_vars, block.reads, block.writes, block.name_hint, body, block.init, buffers, block.match_buffers,
        block.annotations,
    )  # fmt: skip
    outer = s_tir.SBlockRealize(realize.iter_values, realize.predicate, inner)
    return tirx.PrimFunc(function.params, outer, function.ret_type, function.attrs)


def is_check(nest: Any) -> bool:
    found: list[Any] = []
    tvm_ffi.structural_walk(nest, (tirx.AssertStmt, found.append))
    return bool(found)


def with_private_buffers(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function with what only a thread of its own looks at in that thread: a smaller buffer of its block."""
    parts, gone = of(function), []
    for buffer in _buffers(function):
        users = [i for i, each in enumerate(parts) if any(at[0].same_as(buffer) for at in _accesses(each))]
        if len(users) == 1 and (made := _with_private(parts[users[0]], buffer)) is not None:
            parts[users[0]] = made
            gone.append(buffer)
    return with_nests(function, parts, gone) or function


def _buffers(function: tirx.PrimFunc) -> list[Any]:
    own = [each.buffer for each in _statements(function) if isinstance(each, tirx.AllocBuffer)]
    return [*function.body.block.alloc_buffers, *own]


def _accesses(nest: Any) -> list[tuple[Any, Sequence[Any]]]:
    """Each buffer that is read or written, and where."""
    found: list[tuple[Any, Sequence[Any]]] = []
    load = (ir.expr.TensorLoad, lambda each: found.append((each.source, each.indices)))
    tvm_ffi.structural_walk(nest, (load, (tirx.BufferStore, lambda each: found.append((each.buffer, each.indices)))))
    return found


def _with_private(nest: Any, buffer: Any) -> Any:
    """The nest with a part of the buffer in each thread; None where it has no such part, or one of open size."""
    loops, realize = _innermost(nest)
    if not isinstance(realize, s_tir.SBlockRealize) or not has_own_order(realize.block):
        return None
    block = realize.block
    spatial = [each.var for each in block.iter_vars if each.iter_type == tirx.IterVar.DataPar]
    places = [at for source, at in _accesses(nest) if source.same_as(buffer)]
    found = [[i for i in range(len(buffer.shape)) if all(at[i].same_as(var) for at in places)] for var in spatial]
    own = {i for each in found for i in each}
    shape = [size for i, size in enumerate(buffer.shape) if i not in own]
    if not all(found) or not all(isinstance(size, tirx.IntImm) for size in shape):
        return None
    part = tirx.decl_buffer(shape or [1], str(buffer.dtype), buffer.name, scope="local")

    def at(indices: Sequence[Any]) -> list[Any]:
        return [each for i, each in enumerate(indices) if i not in own] or [tirx.const(0, "int32")]

    def load(each: Any) -> Any:
        return tirx.BufferLoad(part, at(each.indices)) if each.source.same_as(buffer) else each

    def store(each: Any) -> Any:
        return tirx.BufferStore(part, each.value, at(each.indices)) if each.buffer.same_as(buffer) else each

    body = tvm_ffi.structural_map(block.body, ((ir.expr.TensorLoad, load), (tirx.BufferStore, store)))
    reads, writes = ([each for each in kind if not each.source.same_as(buffer)] for kind in (block.reads, block.writes))
    inner = s_tir.SBlock(
        block.iter_vars, reads, writes, block.name_hint, body, block.init, [*block.alloc_buffers, part],
        block.match_buffers, block.annotations,
    )  # fmt: skip
    return _around(loops, s_tir.SBlockRealize(realize.iter_values, realize.predicate, inner))


def _innermost(nest: Any) -> tuple[list[Any], Any]:
    """The loops of a nest, and what they go over."""
    loops = []
    while isinstance(nest, tirx.For):
        loops.append(nest)
        nest = nest.body
    return loops, nest


def _around(loops: Sequence[Any], body: Any) -> Any:
    """The loops around a body."""
    for each in reversed(loops):
        body = tirx.For(each.loop_var, each.min, each.extent, each.kind, body)
    return body


def bind_by_hand(nest: Any, gpu: Gpu) -> Any:
    """The nest of a block of an order of its own, or of more than one assignment, which TVM's schedules do not touch.

    What its data-parallel axes go over is shared out to threads; the other loops run in each of them, in their order.
    """
    loops, body = _innermost(nest)
    if not isinstance(body, s_tir.SBlockRealize) or not has_own_order(body.block):
        return nest
    axes = zip(body.block.iter_vars, body.iter_values, strict=True)
    parallel = [value for axis, value in axes if axis.iter_type == tirx.IterVar.DataPar]
    shared = [each for each in loops if any(value.same_as(each.loop_var) for value in parallel)]
    threads = min(THREADS, gpu.threads)
    width = "int64" if any(str(each.loop_var.ty.dtype) == "int64" for each in loops) else "int32"
    total: Any = tirx.const(1, width)
    for each in shared:
        total = total * each.extent.astype(width)
    block, thread = tirx.Var("block", width), tirx.Var("thread", width)
    element: Any = block * threads + thread
    values, rest = {}, element
    for each in reversed(shared):
        extent = each.extent.astype(width)
        inside = rest if each.same_as(shared[0]) else rest % extent
        values[each.loop_var] = inside.astype(each.loop_var.ty.dtype)
        rest = rest // extent
    at = [tvm_ffi.structural_map(each, (tirx.Var, lambda var: values.get(var, var))) for each in body.iter_values]
    result: Any = s_tir.SBlockRealize(at, tirx.And(body.predicate, element < total), body.block)
    result = _around([each for each in loops if each.loop_var not in values], result)
    for var, extent, tag in ((thread, threads, "threadIdx.x"), (block, -(-total // threads), "blockIdx.x")):
        axis = tirx.IterVar(None, var, tirx.IterVar.ThreadIndex, tag)
        extent = tirx.const(extent, width) if isinstance(extent, int) else extent
        result = tirx.For(var, tirx.const(0, width), extent, tirx.ForKind.THREAD_BINDING, result, axis)
    return result


def has_own_order(block: Any) -> bool:
    parallel = {tirx.IterVar.DataPar, tirx.IterVar.CommReduce}
    return not isinstance(block.body, tirx.BufferStore) or any(v.iter_type not in parallel for v in block.iter_vars)
