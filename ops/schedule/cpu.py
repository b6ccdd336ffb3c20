"""The CPU schedule rule for block definitions: rows go to the threads, each row stays in one core's cache.

Inner loops are left to LLVM, which vectorises them, sums included (see `ops.target.host`).
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir, tirx

PARALLEL_WORK = 65536  # elements below which waking the threads costs more than it saves


def schedule(function: Any, rows: int) -> Any:
    """A PrimFunc of blocks, scheduled: all blocks in one loop over rows. `rows` is the least number of rows."""
    sch = s_tir.Schedule(function)
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    work = max(_work(sch, block, rows) for block in blocks)
    if not all(sch.get_loops(block) and _is_spatial(sch.get(block).iter_vars[0]) for block in blocks):
        return _named(sch, function)
    row = sch.get_loops(blocks[0])[0]
    for block in blocks[1:]:
        sch.reverse_compute_at(block, row, preserve_unit_loops=True)
    if work >= PARALLEL_WORK and _extent(sch, row, rows) > 1:
        sch.parallel(row)
    return _named(sch, function)


def _named(sch: s_tir.Schedule, function: Any) -> Any:
    return next(iter(sch.mod.functions.values())).with_attr("global_symbol", function.attrs["global_symbol"])


def _is_spatial(axis: Any) -> bool:
    return axis.iter_type == tirx.IterVar.DataPar


def _extent(sch: s_tir.Schedule, loop: Any, rows: int) -> int:
    extent = sch.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else rows


def _work(sch: s_tir.Schedule, block: Any, rows: int) -> int:
    """How many elements a block visits, at the least."""
    work = 1
    for loop in sch.get_loops(block):
        work *= _extent(sch, loop, rows)
    return work
