"""Products x @ weight.T on a GPU: tiles in a thread block's own memory for many tokens, a row of warps for few.

`tiles`: a thread block computes TILE tokens by TILE rows. It goes along k in steps; it copies what a step needs of x
and of the weight, as float32 and with zeros past their ends, and each thread adds up 4 by 4 sums in registers.

`tensor_cores`: the same, of 16-bit x and weight on an NVIDIA GPU, whose fragments of 16 by 16 warps multiply at once.

`warps`: 32 threads compute one row of the weight for a few tokens. They read the row side by side, add up a part each,
and put the parts together.

Both keep a token's sums apart from all others': its result does not depend on what comes with it, within one range of
sizes.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .. import packed, target, tir
from .gemm import Product

TILE, STEP, PER_THREAD = 64, 16, 4
FRAGMENT = 16  # of tensor cores: tokens, rows and k of one
_SHAPE, _AREA = (FRAGMENT,) * 3, FRAGMENT * FRAGMENT
_SIDE = TILE // PER_THREAD  # threads on each side of a tile
WARP, WARPS, FEW = 32, 4, 4  # threads that share a row, rows of a thread block, tokens that it takes at once


def emit(product: Product) -> None:
    """The body of the kernel, by the number of tokens that it is for."""
    device, stored = target.gpu(), {str(product.x.dtype), str(product.weight.dtype)}
    if product.high is not None and product.high <= 16:
        warps(product)
    elif device is not None and device.version >= 80 and stored in ({"float16"}, {"bfloat16"}):
        tensor_cores(product)
    else:
        tiles(product)


def tiles(p: Product) -> None:
    """Many tokens."""
    rows, k = (int(each) for each in p.weight.shape)
    with (
        T.thread_binding(tirx.ceildiv(p.n, TILE), thread="blockIdx.y") as token_block,
        T.thread_binding(-(-rows // TILE), thread="blockIdx.x") as row_block,
        T.thread_binding(_SIDE * _SIDE, thread="threadIdx.x") as thread,
    ):
        first_token, first_row = token_block * TILE, row_block * TILE
        # A column more, so that threads that copy neighbours of k write to different banks.
        xs = T.alloc_buffer((STEP, TILE + 1), "float32", scope="shared")
        ws = T.alloc_buffer((STEP, TILE + 1), "float32", scope="shared")
        sums = T.alloc_buffer((PER_THREAD * PER_THREAD,), "float32", scope="local")
        with T.unroll(PER_THREAD * PER_THREAD) as i:
            T.buffer_store(sums, tir.f32(0.0), [i])
        with T.serial(-(-k // STEP)) as step:
            with T.unroll(TILE * STEP // (_SIDE * _SIDE)) as part:
                element = part * (_SIDE * _SIDE) + thread
                line, column = element // STEP, element % STEP
                at = step * STEP + column
                for shared, source, first, count in ((xs, p.x, first_token, p.n), (ws, p.weight, first_row, rows)):
                    inside = tirx.And(first + line < count, at < k)
                    value = tirx.if_then_else(inside, tir.f32(source[first + line, at]), tir.f32(0.0))
                    T.buffer_store(shared, value, [column, line])
            with T.serial(STEP) as column, T.unroll(PER_THREAD) as i, T.unroll(PER_THREAD) as j:
                both = xs[column, thread // _SIDE * PER_THREAD + i] * ws[column, thread % _SIDE + j * _SIDE]
                T.buffer_store(sums, sums[i * PER_THREAD + j] + both, [i * PER_THREAD + j])
        with T.unroll(PER_THREAD) as i, T.unroll(PER_THREAD) as j:
            token = first_token + thread // _SIDE * PER_THREAD + i
            row = first_row + thread % _SIDE + j * _SIDE
            with T.If(tirx.And(token < p.n, row < rows)), T.Then():
                value = p.epilogue(token, row, sums[i * PER_THREAD + j])
                T.buffer_store(p.y, value.astype(str(p.y.dtype)), [token, row])


def tensor_cores(p: Product) -> None:
    """Many tokens, x and weight in one 16-bit dtype, on NVIDIA's tensor cores, which add up in float32.

    A thread block of 4 warps takes TILE tokens by TILE rows, 32 of k at a time; a warp 2 by 2 fragments.
    """
    rows, k = (int(each) for each in p.weight.shape)
    dtype, deep, vector = str(p.x.dtype), 2 * FRAGMENT, 4 if k % 4 == 0 else 1
    with (
        T.thread_binding(tirx.ceildiv(p.n, TILE), thread="blockIdx.y") as token_block,
        T.thread_binding(-(-rows // TILE), thread="blockIdx.x") as row_block,
        T.thread_binding(4, thread="threadIdx.y") as warp,
        T.thread_binding(WARP, thread="threadIdx.x") as lane,
    ):
        first_token, first_row, thread = token_block * TILE, row_block * TILE, warp * WARP + lane
        xs, ws = (T.alloc_buffer((TILE, deep + 8), dtype, scope="shared") for _ in range(2))  # 8 more: other banks
        tile = T.alloc_buffer((TILE, TILE + 4), "float32", scope="shared")
        a, b = (T.alloc_buffer((2 * _AREA,), dtype, scope=f"wmma.matrix_{name}") for name in "ab")
        sums = T.alloc_buffer((4 * _AREA,), "float32", scope="wmma.accumulator")
        for i in range(4):
            T.evaluate(T.tvm_fill_fragment(sums.data, *_SHAPE, i, tir.f32(0.0)))
        with T.serial(-(-k // deep)) as step:
            with T.unroll(TILE * deep // vector // 128) as part:
                element = (part * 128 + thread) * vector
                line, column = element // deep, element % deep
                at = step * deep + column
                for shared, source, first, count in ((xs, p.x, first_token, p.n), (ws, p.weight, first_row, rows)):
                    with T.If(tirx.And(first + line < count, at < k)):
                        with T.Then(), _side_by_side(vector) as i:
                            T.buffer_store(shared, source[first + line, at + i], [line, column + i])
                        with T.Else(), _side_by_side(vector) as i:
                            T.buffer_store(shared, tirx.const(0, dtype), [line, column + i])
            for inner in range(0, deep, FRAGMENT):
                for i in range(2):
                    for part, shared, block, order in ((a, xs, warp // 2, "row_major"), (b, ws, warp % 2, "col_major")):
                        place = (block * 32 + i * FRAGMENT) * (deep + 8) + inner
                        pointer = shared.access_ptr("r", offset=place)
                        T.evaluate(T.tvm_load_matrix_sync(part.data, *_SHAPE, i, pointer, deep + 8, order))
                for i in range(2):
                    for j in range(2):
                        at = i * 2 + j
                        T.evaluate(T.tvm_mma_sync(sums.data, at, a.data, i, b.data, j, sums.data, at))
        for i in range(2):
            for j in range(2):
                place = (warp // 2 * 32 + i * FRAGMENT) * (TILE + 4) + warp % 2 * 32 + j * FRAGMENT
                pointer = tile.access_ptr("w", offset=place)
                T.evaluate(T.tvm_store_matrix_sync(sums.data, *_SHAPE, i * 2 + j, pointer, TILE + 4, "row_major"))
        with T.serial(TILE * TILE // 128) as part:
            line, column = (part * 128 + thread) // TILE, (part * 128 + thread) % TILE
            token, row = first_token + line, first_row + column
            with T.If(tirx.And(token < p.n, row < rows)), T.Then():
                T.buffer_store(p.y, p.epilogue(token, row, tile[line, column]).astype(str(p.y.dtype)), [token, row])


def _side_by_side(width: int) -> Any:
    """A loop over neighbours, which are moved at once."""
    return T.vectorized(width) if width > 1 else T.serial(width)


def warps(p: Product) -> None:
    """One token, or a few."""
    rows, k = (int(each) for each in p.weight.shape)
    few = 1 if p.high == 1 else FEW
    width = 4 if k % 4 == 0 else 1  # neighbours that a thread reads at once
    with (
        T.thread_binding(tirx.ceildiv(p.n, few), thread="blockIdx.y") as token_block,
        T.thread_binding(-(-rows // WARPS), thread="blockIdx.x") as row_block,
        T.thread_binding(WARPS, thread="threadIdx.y") as warp,
        T.thread_binding(WARP, thread="threadIdx.x") as lane,
    ):
        row = row_block * WARPS + warp
        here = tirx.min(row, rows - 1)  # threads past the end go along: all must come to each barrier
        parts = T.alloc_buffer((few,), "float32", scope="local")
        weights = T.alloc_buffer((width,), str(p.weight.dtype), scope="local")
        with T.unroll(few) as i:
            T.buffer_store(parts, tir.f32(0.0), [i])
        with T.serial(-(-k // (WARP * width))) as step:
            at = (step * WARP + lane) * width
            with T.If(at < k), T.Then():
                with _side_by_side(width) as i:
                    T.buffer_store(weights, p.weight[here, at + i], [i])
                with T.unroll(few) as t, T.unroll(width) as i:
                    token = tirx.min(token_block * few + t, p.n - 1)
                    both = tir.f32(p.x[token, at + i]) * tir.f32(weights[i])
                    T.buffer_store(parts, parts[t] + both, [t])
        totals = [together(parts[t], lane) for t in range(few)]
        for t in range(few):
            token = token_block * few + t
            with T.If(tirx.And(tirx.And(lane < 1, row < rows), token < p.n)), T.Then():
                T.buffer_store(p.y, p.epilogue(token, row, totals[t]).astype(str(p.y.dtype)), [token, row])


def packed_product(p: Product, weight: packed.Weight) -> None:
    """Blocks for a packed weight, of which `gpu.schedule` makes kernels: the int8 activations, then a thread a sum.

    A group's products are added exactly, and the groups in one order.
    """
    form, k = weight.form, weight.inputs
    codes, scales, sums = packed.quantized(p.x, p.n, k, form)
    with tir.block("product", (p.n, weight.rows)) as (token, row):
        total = T.sblock_alloc_buffer((1,), "float32", scope="local")
        dot = T.sblock_alloc_buffer((1,), "int32", scope="local")
        T.buffer_store(total, tir.f32(0.0), [0])
        with T.serial(weight.groups) as group:
            T.buffer_store(dot, tirx.const(0, "int32"), [0])
            with T.serial(tirx.min(k - group * form.group, form.group)) as i:
                column = group * form.group + i
                product = codes[token, column].astype("int32") * weight.level(row, column)
                T.buffer_store(dot, dot[0] + product, [0])
            value = dot[0].astype("float32") * weight.scale(row, group)
            if form.minimum:
                value = value + sums[token, group].astype("float32") * weight.minimum(row, group)
            T.buffer_store(total, total[0] + value * scales[token, group], [0])
        T.buffer_store(p.y, p.epilogue(token, row, total[0]).astype(str(p.y.dtype)), [token, row])


def together(part: Any, thread: Any) -> Any:
    """The sum of all threads' parts along threadIdx.x, known to each of them."""
    total = T.alloc_buffer((1,), "float32", scope="local")
    with T.attr(T.comm_reducer(lambda x, y: x + y, [tir.f32(0.0)]), "reduce_scope", tirx.const(0, "int32")):
        T.evaluate(T.tvm_thread_allreduce(tirx.const(1, "uint32"), part, tirx.const(True, "bool"), total[0], thread))
    return total[0]
