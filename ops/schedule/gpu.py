"""The GPU schedule rules for block definitions, by pattern: the same blocks that the CPU's rules read.

- An element-wise block: an element, or a vector of them, a thread. What is cheap to compute again is put in its place.
- Reductions along memory (a norm, a softmax), and what is computed of their rows: a thread block a row, whose threads
  add up a part each and then put their parts together.
- Other reductions: a thread an element, which goes through the reduction by itself.
- A block whose order matters runs in that order, one launch after another; of what is left, elements are shared out.

Sizes may stay open. A rule takes blocks that follow each other into one kernel where it can; buffers between kernels
are in the device's memory, others in registers or in the thread block's own memory. Checks of what arguments hold,
which a GPU cannot raise as errors, run on the CPU, in front: `checks` has them, `schedule` leaves them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm import ir, s_tir, tirx

from ..target import Gpu
from . import nests

_CHEAP = {"tirx.reinterpret", "tirx.if_then_else", "tirx.isnan", "tirx.bitwise_and", "tirx.shift_right"}
_LONG = 32  # elements from which a reduction along memory is shared by threads
VECTOR = 4  # elements that a thread loads at once; arguments of GPU kernels begin at multiples of 16 bytes


def schedule(function: tirx.PrimFunc, gpu: Gpu) -> tirx.PrimFunc:
    """A PrimFunc of blocks, every loop of which is bound to the GPU's blocks and threads or runs in a thread."""
    name = function.attrs["global_symbol"]
    function = nests.with_private_buffers(narrow(function))
    bound = [nests.bind_by_hand(each, gpu) for each in nests.of(function) if not nests.is_check(each)]
    sch = s_tir.Schedule(nests.with_nests(function, bound))
    _inline(sch)
    for group in _groups(sch):
        _schedule_group(sch, group, gpu)
    return next(iter(sch.mod.functions.values())).with_attr("global_symbol", name)


def checks(function: tirx.PrimFunc) -> tirx.PrimFunc | None:
    """The blocks that check what arguments hold, as a function for the CPU; None where there are none."""
    return nests.with_nests(function, [each for each in nests.of(function) if nests.is_check(each)])


def narrow(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """With 32-bit indices, which GPUs compute fast and TVM's rules see through: arguments are below 2**31 elements.

    A function of int64 tensors stays as it is; its rules are element-wise.
    """
    if any(str(each.dtype) == "int64" for each in function.params if hasattr(each, "shape")):
        return function
    module = tirx.transform.ForceNarrowIndexToInt32()(tvm.IRModule.from_expr(function))
    return next(iter(module.functions.values()))


class _Block:
    """What the rules ask of a block: its axes, what it reads, and whether it reduces along memory."""

    def __init__(self, sch: s_tir.Schedule, block: Any):
        self.sch, self.handle = sch, block
        node = sch.get(block)
        axes = list(node.iter_vars)
        self.has_own_order = nests.has_own_order(node)
        self.spatial = [each for each in axes if each.iter_type == tirx.IterVar.DataPar]
        self.reduced = [each for each in axes if each.iter_type == tirx.IterVar.CommReduce]
        self.shape = [each.dom.extent for each in self.spatial]
        self.writes = [each.source for each in node.writes]
        self.loads: list[Any] = []
        tvm_ffi.structural_walk(node.body, (ir.expr.TensorLoad, self.loads.append))
        self.node = node

    @property
    def is_element_wise(self) -> bool:
        return not self.reduced and not self.has_own_order

    @property
    def along_memory(self) -> bool:
        """Whether neighbours of the one reduction lie side by side in what it reads, and are many."""
        if self.has_own_order or len(self.reduced) != 1:
            return False
        axis, extent = self.reduced[0].var, self.reduced[0].dom.extent
        if isinstance(extent, tirx.IntImm) and int(extent) < _LONG:
            return False
        return any(each.indices[-1].same_as(axis) for each in self.loads)

    def leads(self, shape: Sequence[Any]) -> bool:
        """Whether its first axes are of `shape`."""
        return len(self.shape) >= len(shape) and _same(self.shape[: len(shape)], shape)

    def reads(self, buffers: Sequence[Any]) -> bool:
        return any(each.source.same_as(buffer) for each in self.loads for buffer in buffers)

    @property
    def is_cheap(self) -> bool:
        """Whether computing it again costs next to nothing."""
        calls: list[Any] = []
        tvm_ffi.structural_walk(self.node.body, ((ir.Call, tirx.Div), calls.append))
        return all(isinstance(each, ir.Call) and getattr(each.op, "name", "") in _CHEAP for each in calls)


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(_same_size(a, b) for a, b in zip(some, others, strict=True))


def _same_size(a: Any, b: Any) -> bool:
    return a.same_as(b) or (isinstance(a, tirx.IntImm) and isinstance(b, tirx.IntImm) and int(a) == int(b))


def _blocks(sch: s_tir.Schedule) -> list[_Block]:
    return [_Block(sch, each) for each in sch.get_child_blocks(sch.get_sblock("root"))]


def _inline(sch: s_tir.Schedule) -> None:
    """Put element-wise blocks whose buffers are the kernel's own into those that read them, where that costs little."""
    inside = {each.name for each in sch.get(sch.get_sblock("root")).alloc_buffers}
    for block in _blocks(sch):
        if not block.is_element_wise or block.writes[0].name not in inside:
            continue
        consumers = [_Block(sch, each) for each in sch.get_consumers(block.handle)]
        if all(each.is_element_wise or block.is_cheap or _once(block, each) for each in consumers):
            try:
                sch.compute_inline(block.handle)
            except s_tir.ScheduleError:  # read in a way that an expression cannot stand for: it stays a block
                continue


def _once(block: _Block, consumer: _Block) -> bool:
    """Whether a reduction visits each element of the block's once."""
    return not consumer.has_own_order and _same(
        block.shape, [*consumer.shape, *[each.dom.extent for each in consumer.reduced]]
    )


def _groups(sch: s_tir.Schedule) -> list[list[_Block]]:
    """The blocks that become a kernel each: a reduction with what is computed of its rows."""
    groups: list[list[_Block]] = []
    for block in _blocks(sch):
        if not (groups and _joins(sch, block, groups[-1])):
            groups.append([])
        groups[-1].append(block)
    return groups


def _joins(sch: s_tir.Schedule, block: _Block, group: list[_Block]) -> bool:
    """Whether a thread block, or a thread, that computes the group can go on with `block`."""
    head = group[0]
    if not head.reduced or head.has_own_order or block.has_own_order or not block.leads(head.shape):
        return False
    names = {sch.get(each.handle).name_hint for each in group}
    if any(sch.get(each).name_hint not in names for each in sch.get_producers(block.handle)):
        return False  # what another kernel makes must not be read in the middle of this one, for TVM
    wide = [each for each in group if len(each.shape) > len(head.shape)]
    if block.reads([buffer for each in wide for buffer in each.writes]):
        return False  # it may be another thread's
    if head.along_memory:
        return block.along_memory and _same(block.shape, head.shape) if block.reduced else True
    return not block.reduced and _same(block.shape, head.shape)


def _schedule_group(sch: s_tir.Schedule, group: list[_Block], gpu: Gpu) -> None:
    head = group[0]
    if head.has_own_order:
        return  # bound already
    if head.along_memory:
        _by_rows(sch, group, gpu)
    elif head.reduced:
        _by_elements(sch, group, gpu)
    else:
        _element_wise(sch, head, gpu)


def _element_wise(sch: s_tir.Schedule, block: _Block, gpu: Gpu) -> None:
    """out[i] = f(...): an element a thread, or a few neighbours, which are loaded and stored at once."""
    loops = sch.get_loops(block.handle)
    if not loops:
        loops = [sch.add_unit_loop(block.handle)]
    if not _vectors(block, gpu):
        _bind_elements(sch, loops, gpu)
        return
    outer, inner = sch.split(loops[-1], [None, VECTOR])
    own = [i for i, each in enumerate(block.node.reads) if _is_along(block, each.source)]
    loaded = [sch.cache_read(block.handle, i, "local", consumer_blocks=[block.handle]) for i in own]
    stored = sch.cache_write(block.handle, 0, "local")
    _, thread = _bind_elements(sch, [*loops[:-1], outer], gpu)
    for each in loaded:
        sch.compute_at(each, thread, preserve_unit_loops=True)
        sch.vectorize(sch.get_loops(each)[-1])
    sch.reverse_compute_at(stored, thread, preserve_unit_loops=True)
    sch.vectorize(sch.get_loops(stored)[-1])
    sch.unroll(inner)


def _vectors(block: _Block, gpu: Gpu) -> bool:
    """Whether neighbours can be loaded and stored at once: all that is read is read along memory, or not there."""
    last = block.spatial[-1] if block.spatial else None
    if gpu.apart or last is None or not isinstance(last.dom.extent, tirx.IntImm) or int(last.dom.extent) % VECTOR:
        return False
    if not block.node.body.indices[-1].same_as(last.var):
        return False

    def uses(index: Any) -> bool:
        found: list[Any] = []
        tvm_ffi.structural_walk(index, (tirx.Var, lambda each: found.append(each.same_as(last.var))))
        return any(found)

    conditional: list[Any] = []  # what is read in one case only cannot be loaded in front
    tvm_ffi.structural_walk(block.node.body.value, (ir.Call, lambda c: conditional.append(_is_conditional(c))))
    plain = all(each.indices[-1].same_as(last.var) or not any(map(uses, each.indices)) for each in block.loads)
    return plain and not any(conditional)


def _is_conditional(call: Any) -> bool:
    return getattr(call.op, "name", "") == "tirx.if_then_else"


def _is_along(block: _Block, buffer: Any) -> bool:
    """Whether the block reads the buffer by its own last axis, in one place."""
    loads = [each for each in block.loads if each.source.same_as(buffer)]
    return len({str(each.indices) for each in loads}) == 1 and loads[0].indices[-1].same_as(block.spatial[-1].var)


def _bind_elements(sch: s_tir.Schedule, loops: Sequence[Any], gpu: Gpu) -> tuple[Any, Any]:
    """Share the elements of a loop nest out to threads."""
    fused = sch.fuse(*loops) if len(loops) > 1 else loops[0]
    count, threads = sch.get(fused).extent, min(nests.THREADS, gpu.threads)
    if isinstance(count, tirx.IntImm):  # one element has no index that could keep the other threads out
        threads = max(1, min(threads, int(count)))
    block, thread = sch.split(fused, [None, threads])
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    return block, thread


def _by_elements(sch: s_tir.Schedule, group: list[_Block], gpu: Gpu) -> None:
    """A thread an element of the reduction, and of what is computed of it."""
    head, *rest = group
    loops = _ordered(sch, head)
    _, thread = _bind_elements(sch, loops[: len(head.shape)] or [sch.add_unit_loop(loops[0])], gpu)
    sch.decompose_reduction(head.handle, sch.get_loops(head.handle)[-len(head.reduced)])
    for each in rest:
        sch.reverse_compute_at(each.handle, thread, preserve_unit_loops=True)
    _keep(sch, group, "local")


def _ordered(sch: s_tir.Schedule, block: _Block) -> list[Any]:
    """Its loops, those over its reductions last."""
    loops = sch.get_loops(block.handle)
    body = sch.get(loops[-1]).body
    kinds = dict(zip([str(each) for each in body.iter_values], body.block.iter_vars, strict=True))
    kind = {loop: kinds[str(sch.get(loop).loop_var)].iter_type for loop in loops}
    ordered = sorted(loops, key=lambda loop: kind[loop] != tirx.IterVar.DataPar)
    if ordered != loops:
        sch.reorder(*ordered)
    return ordered


def _by_rows(sch: s_tir.Schedule, group: list[_Block], gpu: Gpu) -> None:
    """A thread block a row: all that is read of it, and computed of it, is shared by its threads."""
    head, *rest = group
    threads = _threads_of_row(group, gpu)
    loops = _ordered(sch, head)
    outer = loops[: len(head.shape)] or [sch.add_unit_loop(loops[0])]
    row = sch.fuse(*outer) if len(outer) > 1 else outer[0]
    for each in rest:
        sch.reverse_compute_at(each.handle, row, preserve_unit_loops=True)
    sch.bind(row, "blockIdx.x")
    for each in group:
        inner = sch.get_loops(each.handle)[1:]
        if not each.reduced and len(each.shape) == len(head.shape):
            inner = [*inner, sch.add_unit_loop(each.handle)]  # a value of the row: one thread's work
        fused = sch.fuse(*inner) if len(inner) > 1 else inner[0]
        _, thread = sch.split(fused, [None, threads])
        sch.bind(thread, "threadIdx.x")
    _keep(sch, group, "local")


def _threads_of_row(group: list[_Block], gpu: Gpu) -> int:
    """As many threads as there is work for, a power of two."""
    extent = group[0].reduced[0].dom.extent
    most = min(nests.THREADS, gpu.threads)
    if not isinstance(extent, tirx.IntImm):
        return min(128, most)
    threads = 32
    while threads < most and threads * 4 < int(extent):
        threads *= 2
    return threads


def _keep(sch: s_tir.Schedule, group: list[_Block], scope: str) -> None:
    """Reductions that nothing outside of the group reads stay in it."""
    inside = {each.name for each in sch.get(sch.get_sblock("root")).alloc_buffers}
    names = {sch.get(each.handle).name_hint for each in group}
    for each in group:
        if not each.reduced or sch.get(each.handle).writes[0].source.name not in inside:
            continue
        readers = {sch.get(reader).name_hint for reader in sch.get_consumers(each.handle)}
        if readers <= names:
            sch.set_scope(each.handle, 0, scope)
