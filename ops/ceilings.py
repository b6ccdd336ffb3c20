"""What this machine can do at most: how fast all threads read memory, and how fast they multiply and add.

Measured, not looked up, with kernels that do nothing else. A kernel's bytes or flops over these say how good it is.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable

import numpy as np
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from . import device as devices
from . import target
from .schedule import vector
from .schedule.vector import Register, i64
from .tensor import zeros

_BYTES = 2**28  # all that is read: several times a last-level cache
_PARTS = 8  # read one at a time: a short pass finds its quiet moment on a busy machine
_STREAMS = 4  # per thread
_CHAINS = 12  # independent sums per thread: enough to hide the latency of an fma, and they fit in 16 registers
_ROUNDS = 2**16
_SECONDS = 0.4  # spent on the measurement of one ceiling


@functools.cache
def read_bandwidth() -> float:
    """Bytes per second that all threads together read from memory: the floor of what streams weights."""
    values = np.empty(_BYTES // 4, "float32")  # NumPy asks for large pages, which read faster
    values[::1024] = 1.0  # pages that nobody wrote would all be one page of zeros
    parts = itertools.cycle(np.split(values.view("uint8"), _PARTS))
    read = reader(_BYTES // _PARTS)
    return _BYTES / _PARTS / _best(lambda: read(next(parts)))


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes per second that a device reads and writes, by a copy kernel over memory of its own."""
    from .pointwise import copy  # ops stand on this file

    source = zeros((_BYTES // 4 if device != "emulate" else _BYTES // 2**12,), device=device)

    def run() -> None:
        copy(source)
        devices.wait(device)

    return 2 * source.nbytes / _best(run)


def bandwidth(device: str) -> float:
    """Bytes per second: what the CPU reads, what a device copies."""
    return read_bandwidth() if device == "cpu" else copy_bandwidth(device)


def peak(device: str) -> float | None:
    """`fma_peak` of the CPU; None of a device, where nothing measures it."""
    return fma_peak() if device == "cpu" else None


def described(device: str) -> list[str]:
    """The ceilings that are known, in words."""
    flops = peak(device)
    return [f"{bandwidth(device) / 1e9:.3g} GB/s", *([f"{flops / 1e9:.4g} GFLOP/s"] if flops else [])]


def reader(nbytes: int) -> Callable[[np.ndarray], None]:
    """A function that reads uint8 [nbytes], all threads together, as fast as the machine reads."""
    sums = zeros((target.threads() * target.lanes(),))
    run = tvm.compile(_reader(nbytes // 4), target=target.host())["reader"]
    return lambda data: run(data[: nbytes // 4 * 4].view("float32"), sums.buffer.data)


@functools.cache
def fma_peak() -> float:
    """Float32 operations per second, two for each fused multiply-add, of all threads together."""
    factors, sums = zeros((2,)), zeros((target.threads() * target.lanes(),))
    run = tvm.compile(_multiplier(), target=target.host())["multiplier"]
    flops = 2 * target.threads() * _ROUNDS * _CHAINS * target.lanes()
    return flops / _best(lambda: run(factors.buffer.data, sums.buffer.data))


def _best(run: Callable[[], object]) -> float:
    """The least seconds that a call of `run` takes."""
    run()
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < _SECONDS:
        before = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - before)
    return best


def _reader(size: int) -> tirx.PrimFunc:
    """Adds up `size` float32 values: each thread reads a few streams that lie far apart."""
    lanes, threads = target.lanes(), target.threads()
    length = size // (threads * _STREAMS * lanes)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("reader")
        data = T.arg("data", T.buffer((size,), "float32", align=4))
        out = T.arg("out", T.buffer((threads * lanes,), "float32", align=4))
        with T.parallel(i64(0), i64(threads)) as thread:
            sums = [Register(lanes) for _ in range(_STREAMS)]
            with T.serial(i64(0), i64(length)) as i:
                for s, each in enumerate(sums):
                    at = ((thread * _STREAMS + s) * length + i) * lanes
                    each.value = each.value + vector.load(data, [at], lanes)
            vector.store(out, [thread * lanes], sum(each.value for each in sums), lanes)
    return builder.get()


def _multiplier() -> tirx.PrimFunc:
    """Chains of s = s * a + b, each thread its own."""
    lanes = target.lanes()
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("multiplier")
        factors = T.arg("factors", T.buffer((2,), "float32", align=4))
        out = T.arg("out", T.buffer((target.threads() * lanes,), "float32", align=4))
        with T.parallel(i64(0), i64(target.threads())) as thread:
            a, b = (T.bind(T.broadcast(factors[i], lanes)) for i in range(2))
            sums = [Register(lanes) for _ in range(_CHAINS)]
            for s, each in enumerate(sums):
                each.value = T.broadcast(tirx.const(float(s), "float32"), lanes)
            with T.serial(i64(0), i64(_ROUNDS)):
                for each in sums:
                    each.value = vector.fma(each.value, a, b, lanes)
            vector.store(out, [thread * lanes], sum(each.value for each in sums), lanes)
    return builder.get()
