"""OpenCL C on a device of pyopencl: on arrays in place where it shares memory, and errors on the user's line."""

from __future__ import annotations

import functools
import re
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from .base import Launch, LaunchError, Parameter, Program, Source, SourceError, Value
from .shared import check_launch, check_values, load, located

_NUMBERS = {
    "float": "f4", "half": "f2", "double": "f8", "char": "i1", "uchar": "u1", "int": "i4", "uint": "u4", "long": "i8",
    "ulong": "u8",
}  # fmt: skip
_GUARD = 4096  # bytes before and after an array that a first run watches
_RUNS = 64  # how many first runs are watched
_POISON = 0xFF  # bytes of a NaN
_LANES = 16  # of OpenCL's widest vectors, which a kernel may read an array by


class Device:
    """A device of OpenCL with its queue; one lock for all that run on it."""

    def __init__(self, cl: Any, device: Any):
        self.cl, self.handle = cl, device
        self.name = f"{device.name.strip()} ({device.platform.name.strip()})"
        self.context = cl.Context([device])
        self.queue = cl.CommandQueue(self.context)
        self.shares = bool(device.host_unified_memory)
        self.f16 = "cl_khr_fp16" in device.extensions.split()
        self.lock = threading.Lock()


_opening = threading.Lock()


def device(named: str | None = None) -> Device:
    """The device to run on: a GPU if there is one; a part of its name; or "emulate" for one that is a CPU."""
    with _opening:
        return _device(named)


@functools.cache
def _device(named: str | None) -> Device:
    cl = load("pyopencl", "opencl")
    missing = "no OpenCL driver: install your GPU's, or PoCL for the CPU: pip install 'limpid[opencl]'"
    try:
        devices = [each for platform in cl.get_platforms() for each in platform.get_devices()]
    except cl.Error as error:
        raise SourceError(f"{missing} ({error})") from error
    if not devices:
        raise SourceError(missing)
    devices.sort(key=lambda each: 0 if each.type & cl.device_type.GPU else 1)
    for each in devices:
        cpu = bool(each.type & cl.device_type.CPU)
        if named is None or (cpu if named == "emulate" else named.lower() in each.name.lower()):
            return Device(cl, each)
    raise SourceError(f"no device {named!r}; there are {', '.join(each.name for each in devices)}")


class OpenCLProgram(Program):
    """A kernel in OpenCL C, built for one device."""

    def __init__(self, source: Source, parameters: Sequence[Parameter], flags: Sequence[str], on: Device):
        self.source, self.parameters, self._on = source, tuple(parameters), on
        self.device = on.name
        self._watched: set[tuple] = set()  # launches, shapes and numbers whose first run wrote nowhere else
        with on.lock:
            self._kernel = self._built(flags)

    def _built(self, flags: Sequence[str]) -> Any:
        cl = self._on.cl
        try:
            with warnings.catch_warnings():  # of what a compiler says beside errors
                warnings.simplefilter("ignore")
                built = cl.Program(self._on.context, self.source.located).build(options=list(flags))
            return cl.Kernel(built, self.source.entry)
        except cl.Error as error:
            raise SourceError(_told(self.source, str(error), self._on)) from error

    def sources(self) -> dict[str, str]:
        return {"opencl": self.source.text}

    def run(self, values: Sequence[Value], launch: Launch) -> None:
        check_launch(launch, "declare __local in the kernel")
        check_values(self.parameters, values)
        for parameter, value in zip(self.parameters, values, strict=True):
            lanes = re.search(r"(?<=[a-z])(2|4|8|16)$", parameter.type)
            if lanes and isinstance(value, np.ndarray) and value.size % int(lanes[1]):
                raise LaunchError(f"{parameter} takes vectors of {lanes[1]}, got {value.size} numbers")
        if 0 in launch.grid or 0 in launch.block:
            return
        key = (launch, *(value.shape if isinstance(value, np.ndarray) else value for value in values))
        watch = key not in self._watched and len(self._watched) < _RUNS
        with self._on.lock:
            try:
                self._compute(values, launch, guard=_GUARD if watch else 0)
            except self._on.cl.Error as error:
                what = f"{self.source.entry}, grid {launch.grid} of block {launch.block}, on {self.device}"
                raise LaunchError(f"{what}: {error}") from error
        if watch:
            self._watched.add(key)

    def _compute(self, values: Sequence[Value], launch: Launch, guard: int) -> None:
        cl, queue = self._on.cl, self._on.queue
        pairs = [*zip(self.parameters, values, strict=True)]
        written = {_place(value) for each, value in pairs if isinstance(value, np.ndarray) and not each.const}
        places: dict[tuple[int, int], _Held] = {}  # an array that is given twice is one in the kernel too
        for index, (parameter, value) in enumerate(pairs):
            if isinstance(value, np.ndarray):
                place = _place(value)
                if place not in places:
                    places[place] = _Held(self._on, parameter.name, value, place in written, guard)
                self._kernel.set_arg(index, places[place].argument)
            else:
                self._kernel.set_arg(index, np.dtype(_NUMBERS[parameter.type]).type(value))
        sizes = tuple(grid * block for grid, block in zip(launch.grid, launch.block, strict=True))
        cl.enqueue_nd_range_kernel(queue, self._kernel, sizes, launch.block)
        for each in places.values():
            each.fetch(queue)
        queue.finish()
        for each in places.values():
            each.check(self.source)
        for each in places.values():
            each.give_back()


def _place(array: np.ndarray) -> tuple[int, int]:
    return array.ctypes.data, array.nbytes


class _Held:
    """An array as the device has it: the array itself where it may be, else a copy, with a guard around it if asked."""

    def __init__(self, on: Device, name: str, array: np.ndarray, writes: bool, guard: int):
        self.name, self.array, self.writes, self.guard, self.argument = name, array, writes, guard, None
        self._cl, flags = on.cl, on.cl.mem_flags
        if not array.nbytes:
            return
        self.data = array.reshape(-1).view("uint8")
        aligned = array.ctypes.data % (_LANES * array.itemsize) == 0
        self.host = self.data if aligned and on.shares and not guard else _padded(self.data, guard)
        access = flags.READ_WRITE if writes or guard else flags.READ_ONLY
        shared = flags.USE_HOST_PTR if on.shares else flags.COPY_HOST_PTR
        self.buffer = on.cl.Buffer(on.context, access | shared, hostbuf=self.host)
        self.argument = self.buffer.get_sub_region(guard, array.nbytes) if guard else self.buffer

    def fetch(self, queue: Any) -> None:
        """Have what the kernel wrote in the host's memory, once the queue is done."""
        if self.argument is None or not (self.writes or self.guard):
            return
        if self.buffer.flags & self._cl.mem_flags.USE_HOST_PTR:
            read = self._cl.map_flags.READ
            mapped, _ = self._cl.enqueue_map_buffer(queue, self.buffer, read, 0, self.host.shape, "uint8")
            mapped.base.release(queue)
        else:
            self._cl.enqueue_copy(queue, self.host, self.buffer)

    def check(self, source: Source) -> None:
        """Raise LaunchError when the kernel wrote beside the array."""
        if not self.guard or self.argument is None:
            return
        end = self.guard + self.array.nbytes
        hit = np.flatnonzero(np.r_[self.host[: self.guard], self.host[end:]] != _POISON)
        if hit.size:
            at = int(hit[0]) - self.guard + (self.array.nbytes if hit[0] >= self.guard else 0)
            raise LaunchError(
                f"{source.file}:{source.line}: {source.entry} writes {self.name}"
                f"[{at // self.array.itemsize}], of {self.array.size} elements"
            )

    def give_back(self) -> None:
        """Copy the result to where the user's array is, if the kernel did not write there."""
        if self.argument is not None and self.writes and self.host is not self.data:
            self.data[:] = self.host[self.guard : self.guard + self.data.size]


def _padded(data: np.ndarray, guard: int) -> np.ndarray:
    """A copy that is aligned for every vector, with poison before and after it."""
    align = _LANES * 8
    room = np.full(data.size + 2 * guard + align, _POISON, "uint8")
    start = -room.ctypes.data % align
    padded = room[start : start + data.size + 2 * guard]
    padded[guard : guard + data.size] = data
    return padded


def _told(source: Source, text: str, on: Device) -> str:
    """What the compiler says, on the user's own lines."""
    place = re.compile(rf"^(?:error: )?{re.escape(source.file)}:(\d+):\d+: (?:fatal )?(?:error: )?(.*)$", re.MULTILINE)
    errors = [found for found in place.finditer(text) if "error:" in found[0]]
    said = "\n".join(dict.fromkeys(located(source, int(each[1]), each[2]) for each in errors))
    said = said or f"{source.file}:{source.line}: error: {text.strip()}"
    if re.search(r"fp16|\bhalf\b", said, re.IGNORECASE) and not on.f16:
        said += f"\n{on.name} has no cl_khr_fp16: read half with vload_half(i, x), write vstore_half(value, i, out)"
    return said
