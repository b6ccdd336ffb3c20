"""Launches OpenCL kernels on the CPU, by PoCL, in place on the memory of the arguments."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ops.cross import Lowered


@functools.cache
def _queue() -> tuple[Any, Any]:
    import pyopencl as cl

    platform = next(each for each in cl.get_platforms() if "Portable" in each.name)
    context = cl.Context(platform.get_devices())
    return context, cl.CommandQueue(context)


@functools.cache
def _program(text: str) -> Any:
    import pyopencl as cl

    return cl.Program(_queue()[0], text).build()


def launcher(lowered: Lowered) -> Any:
    """What `ops.languages.hosted` takes to launch a kernel's functions."""
    import pyopencl as cl

    def launch(name: str, args: list[Any], grid: tuple[int, ...], block: tuple[int, ...], text: str) -> None:
        context, queue = _queue()
        kernel = cl.Kernel(_program(text), name)
        kept = []
        for i, (value, kind) in enumerate(zip(args, lowered.functions[name].parameters, strict=True)):
            if isinstance(value, np.ndarray):
                flags = cl.mem_flags.READ_WRITE
                in_place = flags | cl.mem_flags.USE_HOST_PTR
                value = cl.Buffer(context, in_place, hostbuf=value) if value.size else cl.Buffer(context, flags, 4)
                kept.append(value)
            else:
                value = np.dtype(kind).type(value)
            kernel.set_arg(i, value)
        cl.enqueue_nd_range_kernel(queue, kernel, tuple(g * b for g, b in zip(grid, block, strict=True)), block)
        queue.finish()
        for buffer, value in zip(kept, [each for each in args if isinstance(each, np.ndarray)], strict=True):
            if value.size:
                mapped, _ = cl.enqueue_map_buffer(queue, buffer, cl.map_flags.READ, 0, value.shape, value.dtype)
                mapped.base.release(queue)
        queue.finish()

    return launch
