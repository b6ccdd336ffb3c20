"""Fused functions on the CPU: a product together with what comes before and after it, as one fast kernel.

`fuse` has Relax put block definitions together. A function that comes of it is a row of blocks; those that `tir.part`
marks are a product x @ weight.T. `schedule` puts its template, `gemm` or `quantized`, in their place. The blocks that x
is made by become the prologue: they run a token at a time, before the template reads x or, for a packed weight, where
it quantises a token. All others become the epilogue: they run an element at a time, where the template stores y.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import ir, relax, s_tir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .. import target
from ..errors import KernelError
from ..quantize import KNOWN
from ..spec import DTYPES
from . import cpu, gemm, quantized
from .vector import i64

# What FuseOps goes by, of TVM's OpPatternKind.
_BROADCAST, _REDUCTION, _ANCHOR, _OPAQUE = 1, 3, 4, 8

Loads = dict[Any, Callable[[Sequence[Any]], Any]]  # by buffer of the fused function, what its element at indices is


def fuse(module: tvm.IRModule) -> tvm.IRModule:
    """`module`, whose Relax functions `call_tir` block definitions, with calls fused by Relax's FuseOps and FuseTIR.

    They run twice. First products take in the element-wise ops that follow; then, passed off as reductions, what comes
    before them and makes each row of one row, such as a norm.
    """
    for pattern in (_first_pattern, _second_pattern):
        module = tvm.IRModule({name: _annotated(each, pattern) for name, each in module.functions.items()})
        entries = [name.name_hint for name, each in module.functions.items() if isinstance(each, relax.Function)]
        for each in (
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(entries),
        ):
            module = each(module)
    return module


def schedule(function: tirx.PrimFunc, low: int, high: int | None = None) -> tirx.PrimFunc:
    """The fast kernel of a function of blocks that holds one product at the most; its first size is `low` to `high`.

    Without a product the blocks are scheduled as those of any op (`cpu.schedule`). Raises KernelError for a block that
    is neither computed row by row before the product nor element by element after it.
    """
    name = function.attrs.get("global_symbol", "fused")
    function = _plain(function).with_attr("global_symbol", name)
    if not _has_product(function):
        return cpu.schedule(function, low)
    parts = Parts(function)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        _emit(parts, low, high)
    return builder.get().with_attr("tirx.noalias", True)  # of so many buffers LLVM does not check it in front of a loop


def _annotated(function: Any, pattern: Callable[[tirx.PrimFunc], int | None]) -> Any:
    """A PrimFunc with its kind of op for FuseOps; where `pattern` gives None, TVM is to tell."""
    if not isinstance(function, tirx.PrimFunc):
        return function
    kind = pattern(function)
    function = function.without_attr("global_symbol")  # with it, a function stays though nothing calls it
    return _plain(function if kind is None else function.with_attr("op_pattern", kind))


def _first_pattern(function: tirx.PrimFunc) -> int | None:
    return _ANCHOR if _has_product(function) else _OPAQUE if _stays_alone(function) else None


def _stays_alone(function: tirx.PrimFunc) -> bool:
    """Whether a template without slots computes it, such as attention's: in company it would lose its speed."""
    return bool(function.attrs.get("has_template", False))


def _second_pattern(function: tirx.PrimFunc) -> int:
    if _has_product(function):
        return _REDUCTION
    if _stays_alone(function):
        return _OPAQUE
    try:
        blocks = [Block(each) for each in _nests(function)]
        rows = blocks[0].spatial[0].dom.extent
    except (KernelError, IndexError):
        return _OPAQUE
    by_row = {load.source for each in blocks for load in each.loads if _same(load.source.shape[0], rows)}
    return _BROADCAST if all(each.goes_by_row(rows, by_row) for each in blocks) else _OPAQUE


def _plain(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function with its arguments declared alike: FuseTIR puts theirs into cache lines, and then refuses others."""
    plain = {
        each: tirx.decl_buffer(
            [i64(int(size)) if isinstance(size, tirx.IntImm) else size for size in each.shape], each.dtype, each.name,
            data_alignment=_itemsize(each), offset_factor=1, elem_offset=i64(0), layout=None,
        )
        for each in function.params
        if _is_buffer(each)
    }  # fmt: skip
    body = tvm_ffi.structural_map(function.body, (tirx.Var, lambda each: plain.get(each, each)))
    return tirx.PrimFunc([plain.get(each, each) for each in function.params], body, attrs=function.attrs)


def _is_buffer(parameter: Any) -> bool:
    return isinstance(parameter.ty, tirx.buffer.BufferType)


def _itemsize(buffer: Any) -> int:
    return DTYPES[str(buffer.dtype)].itemsize


def _nests(function: tirx.PrimFunc) -> list[Any]:
    """The loop nests of a function's blocks."""
    body = function.body.block.body
    return list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]


def _has_product(function: tirx.PrimFunc) -> bool:
    found = []
    tvm_ffi.structural_walk(function.body, (s_tir.SBlock, lambda block: found.append("product" in block.annotations)))
    return any(found)


class Block:
    """`buffer[indices] = value` for all `axes`; where some are reductions, `value` follows on itself, from `start` on.

    `product` is the dtype of the weight whose product the block is a part of, or None.
    """

    def __init__(self, nest: Any):
        loops = []
        while isinstance(nest, tirx.For):
            loops.append(nest.loop_var)
            nest = nest.body
        block = getattr(nest, "block", None)
        store: Any = getattr(block, "body", None)
        if block is None or not isinstance(store, tirx.BufferStore) or not _all_same(nest.iter_values, loops):
            raise KernelError(f"{getattr(block, 'name_hint', type(nest).__name__)} is no block of one assignment")
        self.name, self.product = block.name_hint, block.annotations.get("product")
        self.spatial = [each for each in block.iter_vars if each.iter_type == tirx.IterVar.DataPar]
        self.reduced = [each for each in block.iter_vars if each.iter_type == tirx.IterVar.CommReduce]
        self.buffer, self.indices, self.value = store.buffer, list(store.indices), store.value
        self.start = block.init.value if block.init is not None else None
        loads: list[Any] = []
        tvm_ffi.structural_walk(self.value, (ir.expr.TensorLoad, loads.append))
        self.loads = [each for each in loads if not each.source.same_as(self.buffer)]

    def goes_by_row(self, rows: Any, buffers: Collection[Any]) -> bool:
        """Whether it goes over `rows` first, writes a row of its buffer, and reads the same row of `buffers`."""
        at = [self.indices[0], *(each.indices[0] for each in self.loads if each.source in buffers)]
        return any(_same(axis.dom.extent, rows) and _all_same(at, [axis.var] * len(at)) for axis in self.spatial[:1])

    def goes_by_element(self, shape: Sequence[Any], buffers: Collection[Any]) -> bool:
        """Whether it gives each element of `shape`, and reads the same element of `buffers`."""
        axes = [each.var for each in self.spatial]
        at = [self.indices, *(each.indices for each in self.loads if each.source in buffers)]
        sizes = [each.dom.extent for each in self.spatial]
        return self.start is None and _all_same(sizes, shape) and all(_all_same(each, axes) for each in at)


def _all_same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(_same(a, b) for a, b in zip(some, others, strict=True))


def _same(a: Any, b: Any) -> bool:
    """Whether two sizes or variables are the same; an int32 may meet an int64."""
    return a.same_as(b) or (isinstance(a, tirx.IntImm) and isinstance(b, tirx.IntImm) and int(a) == int(b))


class Parts:
    """A function taken apart at its product of `x` and `weight`, which gives `sums` [n, rows].

    `before` are the blocks that x is made by, the last one being x's; `after` are the others, the last one being y's.
    `kept` are the buffers written before that are read by others than these, and so are needed as a whole.
    """

    def __init__(self, function: tirx.PrimFunc):
        self.name, self.params = function.attrs["global_symbol"], list(function.params)
        blocks = [Block(each) for each in _nests(function)]
        inside, outside = ([b for b in blocks if (b.product is not None) == chosen] for chosen in (True, False))
        self.x, self.weight, self.sums = self._product(inside, outside)
        self.form = KNOWN.get(inside[0].product or "")
        self.before: list[Block] = []
        wanted = {self.x}
        for each in reversed(outside):
            if each.buffer in wanted:
                self.before.insert(0, each)
                wanted |= {load.source for load in each.loads}
        self.after = [each for each in outside if each not in self.before]
        self.y = self.after[-1].buffer
        made = {each.buffer for each in self.before}
        elsewhere = {load.source for each in self.after for load in each.loads} | ({self.x} if not self.form else set())
        self.kept = [each for each in made if each in elsewhere and each not in self.params]
        self._check(made)

    def _product(self, inside: list[Block], outside: list[Block]) -> tuple[Any, Any, Any]:
        """x, the weight and the sums."""
        inner = {each.buffer for each in inside}
        read = dict.fromkeys(load.source for each in inside for load in each.loads if load.source not in inner)
        given = dict.fromkeys(load.source for each in outside for load in each.loads if load.source in inner)
        if len(read) != 2 or len(given) != 1 or outside[-1].buffer not in self.params:
            raise KernelError(f"{self.name}: expected one product x @ weight.T, and the output computed of it")
        x, weight = read
        if weight not in self.params:
            raise KernelError(f"{self.name}: the weight {weight.name} is computed in it, expected an argument of it")
        return x, weight, *given

    def _check(self, made: set[Any]) -> None:
        results = {self.sums, *(each.buffer for each in self.after)}
        wrong = [each for each in self.before if not each.goes_by_row(self.x.shape[0], made)]
        wrong += [each for each in self.before[-1:] if not each.goes_by_element(self.x.shape, ())]
        wrong += [each for each in self.after if not each.goes_by_element(self.sums.shape, results)]
        if wrong:
            raise KernelError(
                f"{self.name}: the block {wrong[0].name} does not fit a product's kernel. Before the product, blocks "
                "go row by row, x itself element by element; after it they go element by element. Leave the op out"
            )


@dataclass(frozen=True)
class Place:
    """Where a buffer of the fused function is in the kernel: as a whole, or only the row at hand."""

    buffer: Any
    whole: bool = True

    def load(self, indices: Sequence[Any]) -> Any:
        return self.buffer[tuple(self._at(indices))]

    def store(self, indices: Sequence[Any], value: Any) -> None:
        T.buffer_store(self.buffer, value, self._at(indices))

    def _at(self, indices: Sequence[Any]) -> list[Any]:
        return list(indices) if self.whole else list(indices[1:]) or [i64(0)]


def _emit(parts: Parts, low: int, high: int | None) -> None:
    """The arguments and the body of the kernel."""
    places = {each: Place(_argument(each)) for each in parts.params if _is_buffer(each)}
    places |= {each: Place(_scratch(each, each.shape)) for each in parts.kept}
    x = places[parts.x].buffer if parts.x in places else parts.x
    weight, y = places[parts.weight].buffer, places[parts.y].buffer
    n, rows = parts.sums.shape

    def prologue(token: Any) -> Callable[[Any], Any]:
        element = _row(parts, places, token)
        return lambda i: element(i).astype("float32")

    def epilogue(token: Any, row: Any, value: Any) -> Any:
        return _result(parts, places, token, row, value)

    if parts.before and parts.x in places:
        _compute_x(parts, places, low)
    with T.attr(i64(0), "pragma_product", 1):  # a part of its own, whose vectors share no memory with scratch before it
        if parts.form is None:
            gemm.emit(gemm.Product(x, weight, y, n, low, high, epilogue))
        else:
            fill = prologue if parts.before and parts.x not in places else None
            quantized.emit(quantized.Product(x, weight, y, n, low, high, int(rows), parts.form, epilogue, fill))
    for each in parts.kept:  # in use to the end: TVM 0.27 would give their memory to the product's vectors, and fail
        T.evaluate(places[each].buffer.data)


def _compute_x(parts: Parts, places: dict[Any, Place], low: int) -> None:
    """Emits x as a whole, before the product."""
    place, (n, k) = places[parts.x], parts.x.shape
    parallel = low * int(k) >= cpu.PARALLEL_WORK and target.threads() > 1
    with (T.parallel if parallel else T.serial)(i64(0), n) as token:
        element = _row(parts, places, token)
        with T.serial(i64(0), k) as i:
            place.store([token, i], element(i))


def _argument(parameter: Any) -> Any:
    return T.arg(parameter.name, T.buffer(parameter.shape, str(parameter.dtype), align=_itemsize(parameter)))


def _scratch(buffer: Any, shape: Sequence[Any]) -> Any:
    made = T.alloc_buffer(shape, str(buffer.dtype), scope="global")
    T.evaluate(made.data)  # a buffer whose address is taken stays as it is: TVM 0.27 makes others of bfloat16 float32
    return made


def _row(parts: Parts, places: dict[Any, Place], token: Any) -> Callable[[Any], Any]:
    """Emits what a token's x takes; gives its elements by their indices."""
    places = dict(places)
    for each in parts.before[:-1]:
        if each.buffer not in places:
            shape = list(each.buffer.shape[1:]) or [1]
            places[each.buffer] = Place(_scratch(each.buffer, shape), whole=False)
        _compute(each, places, token)
    last = parts.before[-1]
    return lambda i: _substituted(last.value, _bound(last.spatial, (token, i)), _loads(places))


def _compute(block: Block, places: dict[Any, Place], token: Any) -> None:
    """Emits a block, for one token."""
    place, loads = places[block.buffer], _loads(places)
    axes = _bound(block.spatial[:1], [token])
    with _loops(block.spatial[1:]) as spatial:
        axes |= spatial
        indices = [_substituted(each, axes, {}) for each in block.indices]
        if block.start is not None:
            place.store(indices, block.start)
        with _loops(block.reduced) as reduced:
            place.store(indices, _substituted(block.value, axes | reduced, loads))


def _result(parts: Parts, places: dict[Any, Place], token: Any, row: Any, value: Any) -> Any:
    """What y holds of a sum `value`; an output beside y is stored."""
    loads = _loads(places) | {parts.sums: lambda _: value}
    result = value
    for each in parts.after:
        result = _substituted(each.value, _bound(each.spatial, (token, row)), loads)
        loads[each.buffer] = lambda _, result=result: result
        if each is not parts.after[-1] and each.buffer in places:
            places[each.buffer].store([token, row], result)
    return result


def _loads(places: dict[Any, Place]) -> Loads:
    return {buffer: place.load for buffer, place in places.items()}


@contextlib.contextmanager
def _loops(axes: Sequence[Any]) -> Iterator[dict[Any, Any]]:
    """Loops over axes of a block; gives their variables by the axes'."""
    if not axes:
        yield {}
        return
    with T.grid(*(each.dom.extent for each in axes)) as variables:
        yield _bound(axes, variables if len(axes) > 1 else [variables])


def _bound(axes: Sequence[Any], values: Sequence[Any]) -> dict[Any, Any]:
    return {axis.var: value.astype(str(axis.var.ty.dtype)) for axis, value in zip(axes, values, strict=True)}


def _substituted(value: Any, axes: dict[Any, Any], loads: Loads) -> Any:
    """An expression of a block, with values for its axes, and for the elements that it loads."""

    def element(load: Any) -> Any:
        return loads[load.source]([_uncast(each) for each in load.indices]) if load.source in loads else load

    return tvm_ffi.structural_map(value, [(tirx.Var, lambda each: axes.get(each, each)), (ir.expr.TensorLoad, element)])


def _uncast(index: Any) -> Any:
    """An index as wide as it was: a vector of neighbours is one load only where no cast hides it."""
    return index.value if isinstance(index, tirx.Cast) else index
